"""What Python users call: `prune`, `sweep` and `evaluate`. Their keywords are the command line's flags."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn
from torch.distributed import ProcessGroup

from wanda_fast.options.all_options import Options
from wanda_fast.options.signature import takes_options
from wanda_fast.report.contents import Report
from wanda_fast.report.sweep import Sweep
from wanda_fast.run.prune_model import prune_model
from wanda_fast.run.settings import settings_of
from wanda_fast.run.sweep_model import sweep_model
from wanda_fast.timer import Progress


@takes_options("prune")
def prune(
    model: nn.Module | str | Path,
    *,
    tokenizer=None,
    progress: Progress | None = None,
    process_group: ProcessGroup | None = None,
    **options,
) -> Report:
    """Prune a checkpoint, or a model in memory in place, in one shot.

    Args:
        model: hub id, folder or .gguf file of a causal language model, or a model in memory.
        {options}
        tokenizer: for a model in memory and a `dataset` that is text.
        progress: its `step` is called when a block or a phase begins.
        process_group: of `torch.distributed`, whose processes all call this and work on the model together;
            rank 0 reads the calibration and writes the files. None: this process alone.
    Returns: the `Report`.
    Raises: subclasses of `wanda_fast.errors.WandaFastError`, each with one sentence.
    """
    return prune_model(Options(model=model, **options), tokenizer, progress, process_group)


@takes_options("sweep")
def sweep(
    model: nn.Module | str | Path,
    *,
    prune_method: str | Sequence[str] = "wanda",
    sparsity_type: str | Sequence[str] = "unstructured",
    sparsity_ratio: float | str | Sequence[float] | None = None,
    tokenizer=None,
    progress: Progress | None = None,
    **options,
) -> Sweep:
    """Prune copies of a model by several settings at once, and measure each: read, calibrated and evaluated
    dense only once. The model itself stays as it is.

    Args:
        model: hub id, folder or .gguf file of a causal language model, or a model in memory.
        {options}
        prune_method, sparsity_type: lists, or names between commas, as `prune` takes one of.
        sparsity_ratio: likewise, for each pattern but N:M, which has a ratio of its own. Default: 0.5.
        tokenizer, progress: as in `prune`.
    Returns: the `Sweep`, whose `reports` are those of `prune` with each setting.
    Raises: as `prune`; `SweepError` for what a sweep cannot do.
    """
    settings = settings_of(prune_method, sparsity_type, sparsity_ratio)
    return sweep_model(Options(model=model, **options), settings, tokenizer, progress)


@takes_options("eval")
def evaluate(
    model: str,
    *,
    dataset: str | Path | Iterable | None = "wikitext2",
    progress: Progress | None = None,
    process_group: ProcessGroup | None = None,
    **options,
) -> Report:
    """Measure a checkpoint's perplexity and zero-shot accuracy, without pruning it.

    Args:
        model: hub id, folder or .gguf file of a causal language model.
        {options}
        dataset: text to measure perplexity on, as `prune`'s eval_dataset; None: not measured.
        progress: its `step` is called when a phase begins.
        process_group: as in `prune`.
    Returns: the `Report`; `perplexity["dense"]` is the perplexity.
    Raises: subclasses of `wanda_fast.errors.WandaFastError`, each with one sentence.
    """
    own = {"progress": progress, "process_group": process_group}
    return prune(model, prune_method="dense", eval_dataset=dataset, **own, **options)
