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

from wanda_fast.cli import flags
from wanda_fast.cli.tables import (
    doctor_tables,
    error_table,
    inspection_tables,
    perplexity_line,
    summary_tables,
)
from wanda_fast.errors import InterruptedRunError, WandaFastError
from wanda_fast.memory import prefer_huge_pages
from wanda_kernels.dispatch.backends import BackendError

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


@app.command()
def prune(
    model: flags.Model = "meta-llama/Llama-3.2-1B",
    seed: flags.Seed = 0,
    nsamples: flags.Nsamples = 128,
    sparsity_ratio: flags.SparsityRatio = None,
    sparsity_type: flags.SparsityType = "unstructured",
    prune_method: flags.PruneMethod = "wanda",
    cache_dir: flags.CacheDir = None,
    use_variant: flags.UseVariant = False,
    save: flags.Save = None,
    save_model: flags.SaveModel = None,
    save_log: flags.SaveLog = None,
    save_mask: flags.SaveMask = None,
    eval_zero_shot: flags.EvalZeroShot = False,
    dataset: flags.Dataset = "wikitext2",
    seqlen: flags.Seqlen = None,
    device: flags.Device = None,
    dtype: flags.Dtype = "auto",
    batch_size: flags.BatchSize = None,
    sequential: flags.Sequential = "block",
    activations: flags.Activations = "auto",
    connect_gate: flags.ConnectGate = "activated",
    update: flags.Update = "none",
    dampening: flags.Dampening = 0.01,
    hessian_device: flags.HessianDevice = "auto",
    measure_error: flags.MeasureError = None,
    ignore: flags.Ignore = None,
    eval_dataset: flags.EvalDataset = "auto",
    eval_windows: flags.EvalWindows = None,
    overwrite: flags.Overwrite = False,
    resume: flags.Resume = False,
    plugin: flags.Plugin = None,
) -> None:
    """Prune a checkpoint, measure its perplexity before and after, and save it."""
    from wanda_fast.api import prune as prune_model
    from wanda_fast.cli.progress import terminal_progress
    from wanda_fast.pruning.registry import load_plugin

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
    model: flags.ModelArgument,
    dataset: Annotated[
        str, typer.Option(help="Text: wikitext2, ptb, c4, pydoc (its last fifth), a local file, or none.")
    ] = "wikitext2",
    seqlen: flags.Seqlen = None,
    eval_windows: flags.EvalWindows = None,
    eval_zero_shot: flags.EvalZeroShot = False,
    device: flags.Device = None,
    dtype: flags.Dtype = "auto",
    cache_dir: flags.CacheDir = None,
) -> None:
    """Measure a model's perplexity, and print the protocol with it."""
    from wanda_fast.api import evaluate as evaluate_model
    from wanda_fast.cli.progress import terminal_progress

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
    model: flags.ModelArgument,
    cache_dir: flags.CacheDir = None,
) -> None:
    """List a model's blocks and linears, their zeros, and the N:M patterns that the zeros keep to."""
    from wanda_fast.cli.inspection import inspect as inspect_model

    for table in inspection_tables(inspect_model(model, cache_dir)):
        console.print(table)


@app.command()
def apply_mask(
    model: flags.ModelArgument,
    mask: Annotated[Path, typer.Option(help="A file that prune --save_mask wrote.")],
    save_model: Annotated[Path, typer.Option(help="Folder for the masked model.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Allow a folder that is not empty.")] = False,
    cache_dir: flags.CacheDir = None,
) -> None:
    """Zero what a mask does not keep: after fine-tuning or merging a pruned model."""
    from wanda_fast.checkpoint import load as checkpoint
    from wanda_fast.checkpoint import save as saving
    from wanda_fast.output import masks

    saving.require_empty(save_model, overwrite)
    loaded = checkpoint.load(model, cache_dir=cache_dir, device="any")
    changed = masks.apply_masks_(loaded.model, mask)
    saving.save(loaded, save_model)
    say(f"{changed:,} weights set to zero; written: {save_model}")


@app.command()
def verify(
    model: flags.ModelArgument,
    mask: Annotated[Path | None, typer.Option(help="A file that prune --save_mask wrote.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, for every prunable linear.")] = None,
    cache_dir: flags.CacheDir = None,
) -> None:
    """Check that a model keeps to a mask or an N:M pattern: exit code 0, or 1 and the linears that do not."""
    from wanda_fast.checkpoint import load as checkpoint
    from wanda_fast.output import masks
    from wanda_fast.pruning.patterns import parse_pattern

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
