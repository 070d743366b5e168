"""Pages on finished runs: from the reports in their folders, or from the report of this run."""

import json
from collections.abc import Iterable
from pathlib import Path

from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.atomic_write import write_atomically
from wanda_fast.checkpoint.journal import unfinished_run
from wanda_fast.errors import OutputError, ReportError
from wanda_fast.report.contents import Report
from wanda_fast.report.page import page


def named_reports(folders: list[Path]) -> dict[str, dict]:
    """The reports of several runs by short names: their folders' own, or the paths if two have the same.

    The folder of a sweep stands for its settings, by their names.

    Raises: `ReportError` if a folder has no report of a finished run, or is named twice.
    """
    if twice := [folder for at, folder in enumerate(folders) if folder in folders[:at]]:
        raise ReportError(f"{twice[0]} is named twice: a run is compared with other runs")
    names = [folder.resolve().name for folder in folders]
    same = len(set(names)) < len(names)
    found = {}
    for name, folder in zip(names, folders, strict=True):
        label = str(folder) if same else name
        if (folder / saving.SWEEP).is_file():
            prefix = f"{label}: " if len(folders) > 1 else ""
            found |= {prefix + setting: report for setting, report in _read_sweep(folder).items()}
        else:
            found[label] = read_report(folder)
    return found


def _read_sweep(folder: Path) -> dict[str, dict]:
    """The reports of a sweep's settings, as their JSON holds them."""
    file = folder / saving.SWEEP
    try:
        reports = json.loads(file.read_text(encoding="utf-8"))["reports"]
        return {name: _whole(json.dumps(report)) for name, report in reports.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ReportError(f"{file} is not a report of a sweep by wanda_fast") from error


def read_report(folder: Path) -> dict:
    """The report of a finished run as its JSON holds it, with all fields that a report of this version has.

    Args:
        folder: of the run, or its wanda_fast.json.
    Raises: `ReportError`.
    """
    if not folder.is_file() and (partial := unfinished_run(folder)):
        raise ReportError(f"{folder} has no report yet: its run is unfinished and left {partial}")
    file = folder if folder.is_file() else folder / saving.REPORT
    try:
        content = _whole(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        missing = f"holds no {saving.REPORT}" if folder.is_dir() else "does not exist"
        raise ReportError(f"{folder} {missing}: name a folder that prune wrote") from error
    except OSError as error:
        raise ReportError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ReportError(f"{file} is not a report of wanda_fast") from error
    if not content["complete"]:
        raise ReportError(f"{file} is the report of a run that did not finish")
    return content


def _whole(text: str) -> dict:
    """A report's JSON: fields that it lacks get their defaults, and fields of later versions are kept."""
    content = json.loads(Report.from_json(text).to_json()) | {"versions": {}} | json.loads(text)
    if missing := {"model", "prune_method", "sparsity_type", "sparsity_ratio"} - content["recipe"].keys():
        raise KeyError(*missing)
    for name, empty in json.loads(Report({}).to_json()).items():
        if empty is not None and not isinstance(content[name], type(empty)):
            raise TypeError(f"{name} is a {type(content[name]).__name__}")
    return content


def require_page(file: Path, overwrite: bool, made: Iterable[Path] = ()) -> None:
    """Raise `OutputError` if a page cannot be written as `file`.

    Args:
        overwrite: `file` may exist.
        made: folders that the run makes.
    """
    folder = file.absolute().parent
    if not folder.exists() and not any(folder.resolve().is_relative_to(each.resolve()) for each in made):
        raise OutputError(f"output file {file} cannot be written: the folder {folder} does not exist")
    saving.require_free(file, overwrite)


def write_page(contents: dict[str, dict], file: Path) -> None:
    """Write the page on these reports."""
    with saving.writing(file):
        write_atomically(file, lambda unfinished: unfinished.write_text(page(contents), encoding="utf-8"))
