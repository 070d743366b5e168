"""What a run writes: refused before the work if it could not be written or would replace something."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import OptionError, ResumeError
from wanda_fast.options.all_options import Options
from wanda_fast.output.lock import locked, require_one_process
from wanda_fast.output.pages import require_page, write_page
from wanda_fast.output.resume import finished_run
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.report.contents import Report


@contextmanager
def sole_writer(options: Options, ranks: Ranks) -> Iterator[None]:
    """Context in which no other run writes an output of this one. The first rank sees to it.

    Raises: `OutputInUseError` if one does; `RanksError` if torchrun started several processes that do not
        work together, unless each prunes a model of its own in memory and writes nothing.
    """
    names = (options.save_model, options.save, options.save_log, options.save_mask, options.report)
    outputs = {Path(name).resolve(): Path(name) for name in names if name}
    if ranks.size == 1 and (outputs or not isinstance(options.model, nn.Module)):
        require_one_process()
    with ExitStack() as locks:
        ranks.from_first(lambda: _lock(options, outputs, locks))
        yield


def _lock(options: Options, outputs: dict[Path, Path], locks: ExitStack) -> None:
    for file in filter(None, (options.save_log, options.save_mask)):
        saving.require_free(Path(file), overwrite=True)
    if options.report is not None:
        made = [Path(name) for name in (options.save_model, options.save) if name]
        require_page(Path(options.report), overwrite=True, made=made)
    folder, mask = path_of(options.save_model), path_of(options.save_mask)
    if folder and mask:
        saving.require_outside(mask, folder)
    for resolved, output in outputs.items():
        # The folder's lock holds for what is inside of it.
        if folder is None or folder.resolve() not in resolved.parents:
            locks.enter_context(locked(output))


def require_outputs(options: Options, recipe: dict) -> Report | None:
    """Refuse outputs that cannot be written, or that would replace files which may not be overwritten.

    Returns: the report of the finished run that `--resume` finds in `save_model`; None if there is none.
    """
    if options.resume and options.save_model is None:
        raise ResumeError("--resume goes on with what --save_model FOLDER was to receive: name the folder")
    if options.save_packed and options.save_model is None:
        raise OptionError("--save_packed packs what --save_model FOLDER receives: name the folder")
    folder, finished = path_of(options.save_model), None
    if folder:
        saving.restore_replaced(folder)
    if options.resume and not isinstance(options.model, nn.Module):
        finished = finished_run(folder, recipe)
    _require_writable(options, options.overwrite or finished is not None)
    return finished


def _require_writable(options: Options, may_replace: bool) -> None:
    folder = path_of(options.save_model)
    if folder:
        saving.require_empty(folder, may_replace, options.resume)
    # The files may be those of the unfinished run that is resumed.
    may_replace = may_replace or (options.resume and StreamedOutput.is_under_way(folder))
    if options.save:
        saving.require_empty(Path(options.save).resolve(), may_replace, options.resume)
    for file in map(path_of, filter(None, (options.save_log, options.save_mask, options.report))):
        saving.require_free(file, may_replace)


def write_report(options: Options, loaded: object, report: Report) -> Report:
    """The report in the model's folder, if it does not have the last figures yet, and in the logs."""
    # A model in memory was saved before it was evaluated.
    if options.save_model is not None and not isinstance(loaded, MetaModel):
        saving.save_report(report, Path(options.save_model))
    return write_logs(options, report)


def write_logs(options: Options, report: Report) -> Report:
    """The logs, and the page."""
    saving.save_logs(report, path_of(options.save), path_of(options.save_log))
    if options.report is not None:
        write_page({"": json.loads(report.to_json())}, Path(options.report))
    return report


def path_of(name: str | Path | None) -> Path | None:
    return Path(name) if name else None
