"""Every option of a run, once: name, type, default, choices, meaning, and where it counts.

The command line, the signature and docstring of `wanda_fast.prune` and `evaluate`, the identity of a resumed
run and the report's recipe are made from the fields of `Options`. To add an option, add a field here and read
it where it takes effect.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanda_fast.errors import CheckpointError, OptionError, PathError
from wanda_fast.options.option import (
    BYTES,
    CALIBRATION,
    EVALUATION,
    MODEL,
    OUTPUT,
    RESOURCES,
    RESULTS,
    WHAT,
    option,
)

# Options that can be paths: "~" in them is the home folder, which a shell expands in some places only.
PATHS = ("model", "dataset", "eval_dataset", "checkpoint", "cache_dir")
PATHS += ("allocation", "save", "save_model", "save_log", "save_mask", "tasks_path", "report", "expect")


@dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """The options of one run. The fields' order is that of the recipe and of the keywords."""

    model: nn.Module | str | Path = option(
        help="Hub id, folder or .gguf file of a causal language model, or of an image classifier.",
        python_help="Or a model in memory, which is pruned in place.",
        panel=MODEL,
        decides=RESULTS,
        flag_type=str,
        flag_default="meta-llama/Llama-3.2-1B",
    )
    prune_method: str = option(
        "wanda",
        help="How weights are ranked: magnitude, wanda, connect (or wanda_connect), gated, sparsegpt, admm, "
        "an ablation (ablate_mag_seq, ablate_wanda_seq, ablate_mag_iter, ablate_wanda_iter), or a registered "
        "method. dense prunes nothing.",
        flag_help="Also --prune_metric.",
        panel=WHAT,
        decides=BYTES,
        aliases=("prune_metric",),
        commands=("prune",),
    )
    sparsity_type: str = option(
        "unstructured",
        help="unstructured, N:M (keep N of every M consecutive inputs), or a registered pattern.",
        panel=WHAT,
        decides=BYTES,
        commands=("prune",),
    )
    sparsity_ratio: float | None = option(
        None,
        help="Fraction of the weights to prune, in [0, 1). Default: 0.5, or 1 - N/M for N:M.",
        flag_help="Also --sparsity.",
        panel=WHAT,
        decides=BYTES,
        aliases=("sparsity",),
        commands=("prune",),
    )
    allocation: str | Path | Mapping = option(
        "uniform",
        help="How the sparsity is spread: uniform, owl (less in blocks with more outliers, the mean is kept; "
        "one more pass over the dense model), or a JSON file of name patterns, as for ignore, and ratios.",
        python_help="Or a dict of these.",
        panel=WHAT,
        commands=("prune",),
        decides=BYTES,
        flag_type=str,
    )
    dataset: str | Path | Iterable = option(
        "wikitext2",
        help="Calibration text: wikitext2, c4, ptb, pydoc (Python's own help topics, no download), or a "
        ".txt, .json, .jsonl, .parquet or .arrow file, also .gz or .zst, or a folder of such files. For an "
        "image classifier: a folder of images or of class folders, a dataset of the hub, or digits.",
        python_help="Or token ids, integers [nsamples, seqlen] (tensor, array, lists, BatchEncoding); or "
        "strings, chats, a datasets.Dataset; or an iterable of these. Or pixel values [n, 3, height, width].",
        panel=CALIBRATION,
        decides=RESULTS,
        flag_type=str,
        aliases=("data_path",),
    )
    text_column: str | None = option(
        None,
        help="Column of a JSON, Parquet or Arrow file that holds text, or chats for the tokenizer's "
        "template. Default: the first of text, sentence, content, messages and conversations.",
        panel=CALIBRATION,
        decides=RESULTS,
        commands=("prune", "sweep", "eval"),
    )
    nsamples: int | None = option(
        None,
        help="Number of calibration windows, or images. Default: 128 windows, 4096 images.",
        panel=CALIBRATION,
        minimum=1,
        decides=BYTES,
    )
    image_transform: str = option(
        "eval",
        help="Calibration images of a classifier. eval: by the model's own image processor; train: by timm's "
        "random transform for training, with its size, mean and std, as in the published code (needs timm).",
        panel=CALIBRATION,
        choices=("eval", "train"),
        decides=BYTES,
        commands=("prune",),
    )
    seqlen: int | None = option(
        None,
        help="Tokens in a window. Default: 2048, or the model's context length if that is shorter.",
        panel=CALIBRATION,
        minimum=2,
        decides=BYTES,
        commands=("prune", "sweep", "eval"),
    )
    bos: str = option(
        "auto",
        help="Whether every window of text begins with BOS, the token that begins a text. auto: if that "
        "lowers the dense perplexity of a window by more than a fifth; models of published tables (llama, "
        "opt, bloom, gpt_neox, mistral, mixtral) keep the published windows, without it.",
        panel=CALIBRATION,
        choices=("auto", "always", "never"),
        decides=BYTES,
        commands=("prune", "sweep", "eval"),
    )
    seed: int = option(0, help="Seed that selects the calibration windows.", panel=CALIBRATION, decides=BYTES)
    use_variant: bool = option(
        False,
        help="Use the Wanda variant's threshold, which prunes more in some rows than in others (unstructured "
        "only).",
        panel=WHAT,
        decides=BYTES,
    )
    connect_gate: str = option(
        "activated",
        help="The gate values that connect reads: after the activation function, as in the published code, "
        "or before it (raw).",
        panel=WHAT,
        choices=("activated", "raw"),
        decides=BYTES,
    )
    update: str = option(
        "none",
        help="obs: adjust the kept weights to make up for the pruned ones, as SparseGPT does. sparsegpt and "
        "the ablations always do.",
        panel=WHAT,
        choices=("none", "obs"),
        decides=BYTES,
    )
    refine: int = option(
        0,
        help="Sweeps of mask descent, before any update: pruned and kept weights are exchanged where that "
        "lowers the layer error ||(W - W')X||^2.",
        panel=WHAT,
        minimum=0,
        decides=BYTES,
    )
    polish: int | None = option(
        None,
        help="Steps of conjugate gradients on the kept weights, at the end. Default: 4 for admm, else 0.",
        panel=WHAT,
        minimum=0,
        decides=BYTES,
    )
    dampening: float = option(
        0.01,
        help="Fraction of the Hessian's mean diagonal that is added to it. It grows tenfold, up to three "
        "times, while SparseGPT's factor does not exist.",
        panel=WHAT,
        decides=BYTES,
    )
    hessian_device: str = option(
        "auto",
        help="Where Hessians are kept and factored. auto: on the device, except the widest ones if those of "
        "a block could take more than half of its free memory.",
        panel=RESOURCES,
        choices=("auto", "device", "host"),
        decides=None,
    )
    measure_error: bool | None = option(
        None,
        help="Measure each linear's reconstruction error ||(W - W')X||^2 for the report. Default: only if "
        "Hessians are gathered anyway, as for sparsegpt, admm, update obs, refine and polish.",
        flag_help="The flag also prints a table of them.",
        panel=OUTPUT,
        decides=BYTES,
    )
    ignore: tuple[str, ...] | list[str] = option(
        (),
        help="Linears to leave dense: an exact name (of a linear or of a module around it), a glob, or "
        "re:REGEX.",
        python_help="A list of such patterns.",
        flag_help="Repeatable.",
        panel=WHAT,
        decides=BYTES,
        flag_type=list[str] | None,
        flag_default=None,
    )
    expert_shrinkage: float = option(
        0.0,
        help="TAU: the statistics of an expert that saw few tokens, n, are drawn towards those of all: n "
        "parts of its own mean and TAU of theirs. 0: not at all.",
        panel=WHAT,
        decides=BYTES,
    )
    expert_tokens: str = option(
        "routed",
        help="Tokens in an expert's statistics: those routed to it, or all, which go through every expert "
        "for the statistics alone.",
        panel=WHAT,
        choices=("routed", "all"),
        decides=BYTES,
    )
    expert_weighting: str = option(
        "router",
        help="router: a token counts in an expert's statistics by the square of the router's weight, which "
        "multiplies the expert's error. none: every token counts the same.",
        panel=WHAT,
        choices=("none", "router"),
        decides=BYTES,
    )
    batch_size: int | None = option(
        None,
        help="Sequences in one forward pass. Default: about 4096 tokens (CPU) or 16384 (GPU), fewer if "
        "memory is short; a resumed run keeps its first value.",
        panel=RESOURCES,
        minimum=1,
        decides=RESULTS,
    )
    forward_dtype: str | None = option(
        None,
        help="fp8 or int8: calibration forwards multiply in 8 bits, with a scale for each token and output, "
        "while statistics, saved weights and evaluation are not rounded. For GPUs; a CPU computes such "
        "products in fp32, slower. Default: the model's dtype.",
        panel=RESOURCES,
        choices=("fp8", "int8"),
        decides=BYTES,
    )
    prune_granularity: str | None = option(
        None,
        help="Which weights of a linear compete: those of a row, or all of them (layer). Default: layer for "
        "magnitude, row for all other methods. Unstructured only.",
        panel=WHAT,
        choices=("row", "layer"),
        decides=BYTES,
    )
    statistics: str | None = option(
        None,
        help="sequential: a block's statistics are of what the pruned blocks before it give. dense: of what "
        "dense ones give. Default: sequential; dense for an image classifier, as published.",
        panel=WHAT,
        choices=("sequential", "dense"),
        decides=BYTES,
    )
    sequential: str = option(
        "block",
        help="block: gather statistics in the dense block, then prune its linears, as published. linear: one "
        "pass, in which each linear is pruned before later ones see its output.",
        python_help="With linear, a gated MLP's down projection is scored while the other two are dense, on "
        "an eighth of the sequences.",
        panel=WHAT,
        choices=("block", "linear"),
        decides=BYTES,
    )
    activations: str = option(
        "auto",
        help="Where the hidden states of all sequences are kept. auto: the first of device, host and disk "
        "that has room. The results are the same.",
        python_help='The file on disk is in `save_model` + ".partial", or in the system\'s folder for '
        "temporary files.",
        panel=RESOURCES,
        choices=("auto", "device", "host", "disk"),
        decides=None,
    )
    device: str | torch.device | None = option(
        None,
        help="Where blocks are computed: cpu, cuda or cuda:N. Default: a GPU if there is one.",
        python_help="The default for a model in memory is its own device.",
        panel=RESOURCES,
        commands=("prune", "sweep", "eval"),
        flag_type=str | None,
        decides=None,
    )
    dtype: str = option(
        "auto",
        help="Data type of the checkpoint's weights. auto: the type they are stored in.",
        python_help="No effect on a model in memory.",
        panel=MODEL,
        choices=("auto", "float32", "float16", "bfloat16"),
        refused_with=CheckpointError,
        decides=BYTES,
        commands=("prune", "sweep", "eval"),
    )
    checkpoint: str | Path | None = option(
        None,
        help="File with the weights of a timm model (.safetensors, .pth); model is then its name in timm.",
        panel=MODEL,
        commands=("prune", "eval"),
        decides=RESULTS,
        flag_type=str | None,
    )
    dequantize: bool = option(
        False,
        help="Read a checkpoint in block fp8 or MXFP4 as 16-bit weights, and save those. Without it, "
        "quantised weights are refused.",
        panel=MODEL,
        commands=("prune", "sweep", "eval"),
        decides=None,
    )
    cache_dir: str | None = option(
        None,
        help="Folder for hub downloads. Default: Hugging Face's own cache.",
        panel=MODEL,
        commands=("prune", "sweep", "eval", "inspect", "apply-mask", "verify", "pack", "unpack", "bench"),
        decides=None,
    )
    eval_dataset: str | Path | Iterable | None = option(
        None,
        help="Text to measure perplexity on, before and after pruning: wikitext2, ptb, c4, pydoc (its last "
        "fifth) or a local file. For an image classifier, whose accuracy is measured, as --dataset.",
        python_help="Or what else dataset takes. None: nothing is measured.",
        flag_help="none: do not measure. auto: wikitext2 if --dataset is on the hub, else the same text, or "
        "the images for evaluation beside it.",
        panel=EVALUATION,
        decides=RESULTS,
        flag_type=str,
        flag_default="auto",
    )
    protocol: str | None = option(
        None,
        help="Window of the evaluation, as published: wanda (the model's context, at most 8192), 2048, 4096 "
        "or 8192. Default: seqlen.",
        panel=EVALUATION,
        choices=("wanda", "2048", "4096", "8192"),
        decides=RESULTS,
        commands=("prune", "sweep", "eval"),
    )
    eval_windows: int | None = option(
        None,
        help="Measure on at most this many windows, or images.",
        panel=EVALUATION,
        minimum=1,
        decides=RESULTS,
        commands=("prune", "sweep", "eval"),
    )
    expect: str | Path | None = option(
        None,
        help="JSON file of published figures that the perplexities are held against, such as those in "
        "docs/published; FILE:MODEL if it names the model differently.",
        panel=EVALUATION,
        decides=None,
        commands=("prune",),
        flag_type=str | None,
    )
    eval_zero_shot: bool = option(
        False,
        help="Measure accuracy on the published tasks: boolq, rte, hellaswag, winogrande, arc_easy, "
        "arc_challenge and openbookqa. As --tasks.",
        panel=EVALUATION,
        decides=RESULTS,
        commands=("prune", "eval"),
    )
    tasks: str | Iterable[str] | None = option(
        None,
        help="Measure accuracy on these tasks of lm-evaluation-harness (the eval extra), e.g. "
        "arc_easy,piqa, before and after pruning. The whole model must fit in memory.",
        panel=EVALUATION,
        decides=RESULTS,
        commands=("prune", "eval"),
        flag_type=str | None,
    )
    tasks_path: str | Path | None = option(
        None,
        help="Folder with the tasks' data, NAME.jsonl or NAME_openai.jsonl, in place of the harness's own.",
        panel=EVALUATION,
        decides=RESULTS,
        commands=("prune", "eval"),
        flag_type=Path | None,
    )
    tasks_limit: int | None = option(
        None,
        help="Measure each task on at most this many of its items, the first ones.",
        panel=EVALUATION,
        minimum=1,
        decides=RESULTS,
        commands=("prune", "eval"),
    )
    save: str | Path | None = option(
        None,
        help="Folder for the published code's log line (log_METHOD.txt) and the report (wanda_fast.json); "
        "for that of a sweep, wanda_fast_sweep.json.",
        panel=OUTPUT,
        flag_type=Path | None,
        decides=None,
    )
    save_model: str | Path | None = option(
        None,
        help="Folder for the pruned model, its tokenizer and the report. from_pretrained loads it. A sweep "
        "makes a folder in it for each setting.",
        panel=OUTPUT,
        flag_type=Path | None,
        decides=None,
    )
    save_packed: bool = option(
        False,
        help="Write the folder of save_model packed: of each pruned weight, a bit for every element and the "
        "kept ones. unpack makes it dense again.",
        panel=OUTPUT,
        decides=RESULTS,
        commands=("prune",),
    )
    save_log: str | Path | None = option(
        None,
        help="File for the log line and the report.",
        panel=OUTPUT,
        decides=None,
        flag_type=Path | None,
        commands=("prune",),
    )
    save_mask: str | Path | None = option(
        None,
        help="File for the packed masks (safetensors), which apply-mask and verify read.",
        panel=OUTPUT,
        decides=RESULTS,
        flag_type=Path | None,
        commands=("prune",),
    )
    report: str | Path | None = option(
        None,
        help="HTML file for a page on the run, with charts, a heat map and a table of every weight. It needs "
        "no network.",
        panel=OUTPUT,
        commands=("prune", "eval"),
        flag_type=Path | None,
        decides=None,
    )
    overwrite: bool = option(
        False,
        help="Allow output folders that are not empty and output files that exist.",
        panel=OUTPUT,
        commands=("prune", "sweep", "eval", "apply-mask", "pack", "unpack"),
        decides=None,
    )
    resume: bool = option(
        False,
        help="Continue the unfinished run of the same save_model folder, if there is one.",
        panel=OUTPUT,
        decides=None,
    )

    def __post_init__(self) -> None:
        for name in PATHS:
            # The class is frozen.
            object.__setattr__(self, name, at_home(getattr(self, name)))

    def require_choices(self) -> None:
        """Raise if an option's value is not among its choices, or below its minimum."""
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata["choices"]
            least = each.metadata["minimum"]
            if None not in (least, value) and not (isinstance(value, Integral) and value >= least):
                raise OptionError(f"{each.name} must be a whole number from {least} on, got {value!r}")
            if choices and value not in choices and not (value is None and each.default is None):
                listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
                raise each.metadata["refused_with"](f"{each.name} must be {listed}, got {value!r}")

    @property
    def ignored(self) -> tuple[str, ...]:
        """The patterns of `ignore`, of which Python users may pass one as a string."""
        return (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore)

    def objects(self) -> list[str]:
        """The options whose values are objects of Python: a model in memory, data."""
        named = ("model", "allocation", "dataset", "eval_dataset")
        return [name for name in named if not isinstance(getattr(self, name), str | Path | None)]

    def recipe(self) -> dict:
        """The options by name, as a report keeps them."""
        recipe = {each.name: _plain(getattr(self, each.name)) for each in fields(self)}
        return recipe | {name: _data_named(recipe[name]) for name in ("dataset", "eval_dataset")}


def at_home(path: Any) -> Any:
    """A path with `~` or `~user` replaced by the home folder; any other value is returned as it is.

    Raises: `PathError` if that folder is unknown.
    """
    if not isinstance(path, str | Path) or not str(path).startswith("~"):
        return path
    try:
        return type(path)(Path(path).expanduser())
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise PathError(
            f"path {path} begins with {user}, whose home folder is unknown: write ./{path} if it is a name"
        ) from error


def _plain(value: object) -> object:
    """A value as the recipe keeps it: a tensor by its shape, a model by its class."""
    if isinstance(value, Tensor):
        return f"token ids {list(value.shape)}"
    return type(value).__name__ if isinstance(value, nn.Module) else value


def _data_named(value: object) -> object:
    """Data as the recipe keeps it: its name or path, or its kind and number of rows."""
    if value is None or isinstance(value, (str, Path)):
        return value
    rows = operator.length_hint(value, -1)
    size = f" {list(value.shape)}" if hasattr(value, "shape") else f" of {rows}" if rows >= 0 else ""
    return type(value).__name__ + size
