"""`wanda-fast`: its commands. Every flag of the published programs, with dashes or underscores."""

import logging
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from wanda_fast.errors import InterruptedRunError, WandaFastError
from wanda_fast.memory import prefer_huge_pages
from wanda_fast.tables import doctor_tables, error_table, inspection_tables, perplexity_line, summary_tables
from wanda_kernels.backends import BackendError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
    help="Set the least important weights of a pretrained transformer to zero, in one shot.",
)
console = Console()
errors = Console(stderr=True)
complain = partial(errors.print, style="red", highlight=False, markup=False, soft_wrap=True)
say = partial(console.print, highlight=False, markup=False, soft_wrap=True)

Model = Annotated[str, typer.Option(help="Hub id, folder or .gguf file of a causal LM.")]
CacheDir = Annotated[str | None, typer.Option(help="For hub downloads. Default: Hugging Face's own cache.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, float16 or bfloat16.")]
EvalDataset = Annotated[
    str,
    typer.Option(
        help="Text for perplexity: wikitext2, ptb, c4, pydoc (its last fifth), a local file, or none. "
        "auto: wikitext2 for hub datasets, else the same as --dataset."
    ),
]
EvalWindows = Annotated[
    int | None, typer.Option(min=1, help="Measure perplexity on at most so many windows.")
]
Seqlen = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens a window. Default: 2048, or the model's context where shorter."),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(help="A .py file or module that registers methods or patterns; repeatable."),
]


@app.command()
def prune(
    model: Model = "meta-llama/Llama-3.2-1B",
    seed: Annotated[int, typer.Option(help="Seed of the calibration windows.")] = 0,
    nsamples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    sparsity_ratio: Annotated[
        float | None, typer.Option(help="Fraction to prune, in [0, 1). Default: 0.5, or 1 - N/M for N:M.")
    ] = None,
    sparsity_type: Annotated[
        str, typer.Option(help="unstructured, N:M (N kept of every M inputs), or a registered pattern.")
    ] = "unstructured",
    prune_method: Annotated[
        str,
        typer.Option(
            help="magnitude, wanda, connect (or wanda_connect), gated, sparsegpt, dense, ablate_mag_seq, "
            "ablate_wanda_seq, ablate_mag_iter, ablate_wanda_iter, or a registered method."
        ),
    ] = "wanda",
    cache_dir: CacheDir = None,
    use_variant: Annotated[
        bool, typer.Option("--use-variant", help="The Wanda variant's threshold (unstructured only).")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="Folder for log_METHOD.txt (the published line) and wanda_fast.json.")
    ] = None,
    save_model: Annotated[
        Path | None, typer.Option(help="Folder for the pruned model, which from_pretrained loads.")
    ] = None,
    save_log: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
    save_mask: Annotated[
        Path | None, typer.Option(help="File for the packed masks (safetensors), for apply-mask and verify.")
    ] = None,
    eval_zero_shot: Annotated[
        bool,
        typer.Option("--eval-zero-shot", help="Zero-shot tasks by lm-evaluation-harness (the eval extra)."),
    ] = False,
    dataset: Annotated[
        str,
        typer.Option(
            help="Calibration text: wikitext2, c4, ptb, pydoc (the standard library's help, no download), "
            "or a .txt, .jsonl or .parquet file or folder."
        ),
    ] = "wikitext2",
    seqlen: Seqlen = None,
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences a forward. Default: about 4096 (CPU) or 16384 (GPU) tokens, if they fit."
        ),
    ] = None,
    sequential: Annotated[
        str,
        typer.Option(
            help="block, as published, or linear: one pass, each linear sees its pruned forerunners."
        ),
    ] = "block",
    activations: Annotated[
        str,
        typer.Option(help="Where hidden states lie: device, host, disk, or auto, the first that has room."),
    ] = "auto",
    connect_gate: Annotated[
        str, typer.Option(help="connect's gate: activated (as the published code) or raw.")
    ] = "activated",
    update: Annotated[
        str,
        typer.Option(help="obs: update what a method keeps for what it prunes, as sparsegpt does; or none."),
    ] = "none",
    dampening: Annotated[
        float, typer.Option(help="Share of a Hessian's mean diagonal that is added before it is factored.")
    ] = 0.01,
    hessian_device: Annotated[
        str,
        typer.Option(help="Where Hessians are: device, host, or auto: host for those too wide for a GPU."),
    ] = "auto",
    measure_error: Annotated[
        bool | None,
        typer.Option(
            "--measure-error/--no-measure-error",
            help="Print each linear's ||(W - W')X||^2. Default: with sparsegpt and --update obs, by block.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Linears to leave dense: a name, a glob, or re:REGEX; repeatable."),
    ] = None,
    eval_dataset: EvalDataset = "auto",
    eval_windows: EvalWindows = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Allow folders to save to that are not empty, and files that exist."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run of the same --save-model folder.")
    ] = False,
    plugin: Plugin = None,
) -> None:
    """Prune a checkpoint, measure its perplexity before and after, and save it."""
    from wanda_fast.driver import prune as prune_model
    from wanda_fast.progress import terminal_progress
    from wanda_fast.registry import load_plugin

    for name in plugin or ():
        load_plugin(name)
    with terminal_progress(console) as progress:
        report = prune_model(
            model,
            prune_method=prune_method,
            sparsity_type=sparsity_type,
            sparsity_ratio=sparsity_ratio,
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
            seed=seed,
            use_variant=use_variant,
            connect_gate=connect_gate,
            update=update,
            dampening=dampening,
            hessian_device=hessian_device,
            measure_error=measure_error,
            ignore=tuple(ignore or ()),
            batch_size=batch_size,
            sequential=sequential,
            activations=activations,
            device=device,
            dtype=dtype,
            cache_dir=cache_dir,
            eval_dataset=_eval_dataset(eval_dataset, dataset),
            eval_windows=eval_windows,
            eval_zero_shot=eval_zero_shot,
            save=save,
            save_model=save_model,
            save_log=save_log,
            save_mask=save_mask,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
    for table in [error_table(report)] * bool(measure_error) + summary_tables(report):
        console.print(table)
    for path in filter(None, (save_model, save, save_log, save_mask)):
        say(f"written: {path}")
    if save_model is None and save_mask is None:
        say("nothing is kept of the pruned model: --save-model FOLDER writes it")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file of a causal LM.")],
    dataset: Annotated[
        str, typer.Option(help="Text: wikitext2, ptb, c4, pydoc (its last fifth), a local file, or none.")
    ] = "wikitext2",
    seqlen: Seqlen = None,
    eval_windows: EvalWindows = None,
    eval_zero_shot: Annotated[
        bool,
        typer.Option("--eval-zero-shot", help="Zero-shot tasks by lm-evaluation-harness (the eval extra)."),
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    cache_dir: CacheDir = None,
) -> None:
    """Measure a model's perplexity, and print the protocol with it."""
    from wanda_fast.driver import evaluate as evaluate_model
    from wanda_fast.progress import terminal_progress

    with terminal_progress(console) as progress:
        report = evaluate_model(
            model,
            dataset=_eval_dataset(dataset, "wikitext2"),
            seqlen=seqlen,
            eval_windows=eval_windows,
            eval_zero_shot=eval_zero_shot,
            device=device,
            dtype=dtype,
            cache_dir=cache_dir,
            progress=progress,
        )
    say(perplexity_line(report))
    for task, results in report.zero_shot.items():
        say(f"{task}: {results}")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file of a causal LM.")],
    cache_dir: CacheDir = None,
) -> None:
    """List a model's blocks and linears, their zeros, and the N:M patterns that the zeros keep to."""
    from wanda_fast.inspection import inspect as inspect_model

    for table in inspection_tables(inspect_model(model, cache_dir)):
        console.print(table)


@app.command()
def apply_mask(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file of a causal LM.")],
    mask: Annotated[Path, typer.Option(help="A file that prune --save_mask wrote.")],
    save_model: Annotated[Path, typer.Option(help="Folder for the masked model.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Allow a folder that is not empty.")] = False,
    cache_dir: CacheDir = None,
) -> None:
    """Zero what a mask does not keep: after fine-tuning or merging a pruned model."""
    from wanda_fast import checkpoint, masks, saving

    saving.require_empty(save_model, overwrite)
    loaded = checkpoint.load(model, cache_dir=cache_dir, device="any")
    changed = masks.apply_masks_(loaded.model, mask)
    saving.save(loaded, save_model)
    say(f"{changed:,} weights set to zero; written: {save_model}")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file of a causal LM.")],
    mask: Annotated[Path | None, typer.Option(help="A file that prune --save_mask wrote.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, for every prunable linear.")] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Check that a model keeps to a mask or an N:M pattern: exit code 0, or 1 and the linears that do not."""
    from wanda_fast import checkpoint, masks
    from wanda_fast.patterns import parse_pattern

    if (mask is None) == (pattern is None):
        raise typer.BadParameter("name either --mask FILE or --pattern N:M")
    wanted = None if pattern is None else parse_pattern(pattern)
    loaded = checkpoint.load(model, cache_dir=cache_dir, device="any").model
    broken = masks.mask_violations(loaded, mask) if mask else masks.pattern_violations(loaded, wanted)
    for violation in broken:
        unit = "weights not zero" if mask else f"groups over {wanted.n} of {wanted.m}"
        say(f"{violation.name}: {violation.count:,} {unit}")
    say(f"{model} {'breaks' if broken else 'keeps'} {mask or pattern}")
    raise typer.Exit(1 if broken else 0)


@app.command()
def doctor() -> None:
    """What is here: versions, GPU, CPU instruction sets, libraries, and which backend serves what and why."""
    from wanda_kernels import doctor as examination

    for table in doctor_tables(examination.report()):
        console.print(table)


def _eval_dataset(eval_dataset: str, dataset: str) -> str | None:
    if eval_dataset == "auto":
        return "wikitext2" if dataset in ("c4", "ptb") else dataset
    return None if eval_dataset == "none" else eval_dataset


def main() -> None:
    """The console script: errors of ours are one sentence on standard error and exit code 2."""
    _quiet_libraries()
    prefer_huge_pages()
    try:
        app(prog_name="wanda-fast")
    except InterruptedRunError as error:
        complain(f"wanda-fast: {error}; go on with:\n{_resuming(sys.argv[1:])}")
        sys.exit(130)  # as a shell reports SIGINT
    except (WandaFastError, BackendError) as error:
        complain(f"wanda-fast: {error}")
        sys.exit(2)


def _resuming(words: list[str]) -> str:
    return shlex.join(["wanda-fast", *words] if "--resume" in words else ["wanda-fast", *words, "--resume"])


def _quiet_libraries() -> None:
    """One progress display and one log: ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = RichHandler(console=errors, show_time=False, show_path=False)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[handler])
    logging.getLogger("wanda_fast").setLevel(logging.INFO)


if __name__ == "__main__":
    main()
