"""The commands of `wanda-fast`. Flags, also the published programs', take dashes or underscores."""

import io
import logging
import os
import shlex
import sys
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from wanda_fast import api
from wanda_fast.checkpoint import load as checkpoint
from wanda_fast.checkpoint import save as saving
from wanda_fast.cli import bench, flags, inspection, packing, pages
from wanda_fast.cli.progress import terminal_progress
from wanda_fast.cli.tables import (
    doctor_tables,
    error_table,
    inspection_tables,
    measured_line,
    summary_tables,
    sweep_tables,
)
from wanda_fast.data.images import has_evaluation, holds_images
from wanda_fast.distributed.torchrun import is_first, is_running, process_group
from wanda_fast.errors import AnotherRankFailedError, InterruptedRunError, OptionError, WandaFastError
from wanda_fast.memory import prefer_huge_pages
from wanda_fast.output import masks
from wanda_fast.output.lock import locked, require_one_process
from wanda_fast.pruning.patterns import parse_pattern
from wanda_fast.pruning.registry import load_plugin
from wanda_fast.report.task_results import in_words
from wanda_kernels import BackendError, diagnose

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "token_normalize_func": flags.normalized,
        "help_option_names": ["-h", "--help"],
    },
)
console = Console()
errors = Console(stderr=True)
complain = partial(errors.print, style="red", highlight=False, markup=False, soft_wrap=True)
say = partial(console.print, highlight=False, markup=False, soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"wanda_fast {metadata.version('wanda_fast')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Set the least important weights of a pretrained transformer to zero, in one shot."""


@app.command()
@flags.takes_flags("prune", model=True)
def prune(*, plugin: flags.Plugin = None, **options) -> None:
    """Prune a checkpoint, measure its perplexity before and after, and save it."""
    for name in plugin or ():
        load_plugin(name)
    options["ignore"] = tuple(options["ignore"] or ())
    options["eval_dataset"] = _eval_dataset(options["eval_dataset"], options["dataset"])
    with process_group() as group, terminal_progress(console) as progress:
        report = api.prune(**options, progress=progress, process_group=group)
    for table in [error_table(report)] * bool(options["measure_error"]) + summary_tables(report):
        console.print(table)
    _say_what_is_written(options)


@app.command()
@flags.takes_flags("sweep", model=True)
def sweep(
    *,
    prune_method: flags.Methods = "wanda",
    sparsity_type: flags.Patterns = "unstructured",
    sparsity_ratio: flags.Ratios = None,
    plugin: flags.Plugin = None,
    **options,
) -> None:
    """Prune copies of a checkpoint by several settings at once, and compare them in one table."""
    for name in plugin or ():
        load_plugin(name)
    options["ignore"] = tuple(options["ignore"] or ())
    options["eval_dataset"] = _eval_dataset(options["eval_dataset"], options["dataset"])
    settings = {
        "prune_method": prune_method,
        "sparsity_type": sparsity_type,
        "sparsity_ratio": sparsity_ratio,
    }
    with terminal_progress(console) as progress:
        swept = api.sweep(**settings, **options, progress=progress)
    for table in sweep_tables(swept):
        console.print(table)
    for option in ("save_model", "save"):
        if options[option]:
            say(f"written: {options[option]}")


@app.command("eval")
@flags.takes_flags("eval")
def evaluate(
    model: flags.ModelArgument,
    dataset: Annotated[
        str, typer.Option(help="Text: wikitext2, ptb, c4, pydoc (its last fifth), a local file, or none.")
    ] = "wikitext2",
    **options,
) -> None:
    """Measure a model's perplexity and its accuracy on tasks, and print them with the protocol."""
    with process_group() as group, terminal_progress(console) as progress:
        options |= {"progress": progress, "process_group": group}
        report = api.evaluate(model, dataset=_eval_dataset(dataset, "wikitext2"), **options)
    say(measured_line(report))
    for task, results in report.zero_shot.items():
        say(f"{task} {in_words(results['dense'])}")
    if options["report"]:
        say(f"written: {options['report']}")


@app.command()
@flags.takes_flags("inspect")
def inspect(model: flags.ModelArgument, **options) -> None:
    """List a model's blocks and linears, their sparsity, and the N:M patterns that they satisfy."""
    for table in inspection_tables(inspection.inspect(model, **options)):
        console.print(table)


@app.command()
@flags.takes_flags("apply-mask")
def apply_mask(
    model: flags.ModelArgument,
    mask: Annotated[Path, typer.Option(help="A file that prune --save-mask wrote.")],
    save_model: Annotated[Path, typer.Option(help="Folder for the masked model.")],
    **options,
) -> None:
    """Zero again the weights that a mask prunes, after a pruned model was fine-tuned or merged."""
    require_one_process()
    with locked(save_model):
        saving.restore_replaced(save_model)
        saving.require_empty(save_model, options["overwrite"])
        loaded = checkpoint.load(model, cache_dir=options["cache_dir"], device="any")
        changed = masks.apply_masks_(loaded.model, mask)
        saving.save(loaded, save_model)
    say(f"{changed:,} weights set to zero; written: {save_model}")


@app.command()
@flags.takes_flags("verify")
def verify(
    model: flags.ModelArgument,
    mask: Annotated[Path | None, typer.Option(help="A file that prune --save-mask wrote.")] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M, for every prunable linear.")] = None,
    **options,
) -> None:
    """Check a model against a mask or an N:M pattern. Lists the linears that break it, with exit code 1."""
    if (mask is None) == (pattern is None):
        raise typer.BadParameter("name either --mask FILE or --pattern N:M")
    wanted = None if pattern is None else parse_pattern(pattern)
    loaded = checkpoint.load(model, device="any", **options).model
    broken = masks.mask_violations(loaded, mask) if mask else masks.pattern_violations(loaded, wanted)
    for violation in broken:
        unit = "weights not zero" if mask else f"groups over {wanted.n} of {wanted.m}"
        say(f"{violation.name}: {violation.count:,} {unit}")
    say(f"{model} {'breaks' if broken else 'keeps'} {mask or pattern}")
    raise typer.Exit(1 if broken else 0)


@app.command()
def doctor() -> None:
    """Show versions, GPU, CPU instruction sets, libraries, and which backend runs each operation and why."""
    for table in doctor_tables(diagnose()):
        console.print(table)


app.command()(bench.bench)
app.command()(packing.pack)
app.command()(packing.unpack)
app.command()(pages.report)
app.command()(pages.compare)


def _say_what_is_written(options: dict) -> None:
    for option in ("save_model", "save", "save_log", "save_mask", "report"):
        if options[option]:
            say(f"written: {options[option]}")
    if options["save_model"] is None and options["save_mask"] is None:
        say("the pruned model is not saved: --save-model FOLDER writes it")


def _eval_dataset(eval_dataset: str, dataset: str) -> str | None:
    if eval_dataset == "auto" and holds_images(dataset):
        return dataset if has_evaluation(dataset) else None
    if eval_dataset == "auto":
        return "wikitext2" if dataset in ("c4", "ptb") else dataset
    return None if eval_dataset == "none" else eval_dataset


def main() -> None:
    """The console script. wanda_fast's own errors end in one sentence on standard error and exit code 2."""
    _print_any_character()
    _quiet_libraries()
    prefer_huge_pages()
    try:
        _refuse_resumed_file(sys.argv[1:])
        app(prog_name="wanda-fast")
    except AnotherRankFailedError:
        sys.exit(2)
    except InterruptedRunError as error:
        complain(f"wanda-fast: {error}; go on with:\n{_resuming(sys.argv[1:])}")
        sys.exit(130)  # as a shell reports SIGINT
    except (WandaFastError, BackendError) as error:
        complain(f"wanda-fast: {error}")
        sys.exit(2)


def _refuse_resumed_file(words: list[str]) -> None:
    """Raise `OptionError` for the published `--resume FILE`: the flag means something else here."""
    for flag, value in pairwise(words):
        if flag == "--resume" and not value.startswith("-"):
            raise OptionError(
                f"--resume continues an unfinished run and takes no value, got {value}: the weights of a "
                f"timm model are --checkpoint {value}"
            )


def _resuming(words: list[str]) -> str:
    program = "torchrun ... -m wanda_fast" if is_running() else "wanda-fast"
    return f"{program} {shlex.join(words if '--resume' in words else [*words, '--resume'])}"


def _print_any_character() -> None:
    """Escape characters that the output's encoding lacks: printing must not end a run that has finished."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Leave the terminal to one progress display and one log, wanda_fast's."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = RichHandler(console=errors, show_time=False, show_path=False)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[handler])
    logging.getLogger("wanda_fast").setLevel(logging.INFO if is_first() else logging.ERROR)
    console.quiet = not is_first()


if __name__ == "__main__":
    main()
