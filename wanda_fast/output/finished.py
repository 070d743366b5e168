"""`--resume` where the run has ended: its report, and whether it leaves nothing to do."""

from pathlib import Path

from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.journal import differences
from wanda_fast.errors import ResumeError
from wanda_fast.output.resume import same_options
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.report import Report


def finished_run(folder: Path, recipe: dict) -> Report | None:
    """The report of a run with these options whose model is in `folder`, where there is one to be read."""
    if StreamedOutput.is_under_way(folder):
        return None
    try:
        report = Report.from_json((folder / saving.REPORT).read_text(encoding="utf-8"))
        return report if same_options(report.recipe, recipe) else None
    except (OSError, ValueError, TypeError, AttributeError):  # absent, torn, or not of ours
        return None


def nothing_to_do(finished: Report, report: Report) -> bool:
    """Whether `finished` is of the same input as `report`, and left all that was asked for.

    Raises: `ResumeError` where it is of other input, and may not be overwritten.
    """
    folder, mask = report.recipe["save_model"], report.recipe["save_mask"]
    changed = differences(finished.digests, report.digests)
    if changed and not report.recipe["overwrite"]:
        raise ResumeError(
            f"{folder} holds a finished run of other input ({'; '.join(changed)}): name another folder, or "
            f"pass --overwrite"
        )
    return not changed and finished.complete and (mask is None or Path(mask).is_file())
