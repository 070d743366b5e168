"""Text by name: datasets on the Hugging Face hub, local files, the standard library's help topics."""

import json
from dataclasses import dataclass
from pathlib import Path

from wanda_fast.errors import CalibrationError

# Columns of a JSON Lines or Parquet file that hold text; the first one found is read.
TEXT_COLUMNS = ("text", "sentence", "content")


@dataclass
class HubText:
    """A dataset on the Hugging Face hub.

    Attributes:
        path, name: arguments of `load_dataset`.
        train, test: further arguments of it, for the calibration text and the evaluation text.
        column: holds the text.
        joined_by: joins the rows to one calibration text; None: each row is a document.
    """

    path: str
    name: str | None
    train: dict
    test: dict
    column: str
    joined_by: str | None


HUB = {
    "wikitext2": HubText(
        "Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train"}, {"split": "test"}, "text", " "
    ),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        {"split": "train", "revision": "refs/convert/parquet"},
        {"split": "test", "revision": "refs/convert/parquet"},
        "sentence",
        " ",
    ),
    "c4": HubText(
        "allenai/c4",
        None,
        {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
        {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
        "text",
        None,
    ),
}
NAMES = (*HUB, "pydoc")


@dataclass
class Text:
    """One text, or many documents.

    Attributes:
        label: its name in reports and messages.
    """

    label: str
    documents: list[str]

    @property
    def is_one(self) -> bool:
        return len(self.documents) == 1


def calibration_text(dataset: str, cache_dir: str | None = None) -> Text:
    """The text that calibration windows are drawn from.

    Args:
        dataset: "wikitext2", "c4", "ptb", "pydoc" (the first four fifths of it), or a local .txt, .raw,
            .jsonl or .parquet file, or a folder of such files.
        cache_dir: for downloads from the hub.
    Raises: `CalibrationError` if it cannot be loaded or read.
    """
    if dataset == "pydoc":
        text = _pydoc()
        return Text("pydoc, first four fifths", [text[: len(text) * 4 // 5]])
    if dataset in HUB:
        hub = HUB[dataset]
        rows = _load_hub(dataset, hub, hub.train, cache_dir)
        return Text(f"{dataset} train", list(rows) if hub.joined_by is None else [hub.joined_by.join(rows)])
    return _local_text(dataset)


def evaluation_text(dataset: str, cache_dir: str | None = None) -> Text:
    """The text that perplexity is measured on, as one document.

    Args:
        dataset: as for `calibration_text`. It is the test split of wikitext2 and ptb, the first 1100
            documents of c4's validation split, the last fifth of pydoc, and all of a local file or folder.
        cache_dir: for downloads from the hub.
    Raises: `CalibrationError` if it cannot be loaded or read.
    """
    if dataset == "pydoc":
        text = _pydoc()
        return Text("pydoc, last fifth", [text[len(text) * 4 // 5 :]])
    if dataset in HUB:
        hub = HUB[dataset]
        rows = _load_hub(dataset, hub, hub.test, cache_dir)
        if dataset == "c4":
            return Text("c4 validation, first 1100 documents", [" ".join(rows[:1100])])
        return Text(f"{dataset} test", [("\n\n" if dataset == "wikitext2" else " ").join(rows)])
    local = _local_text(dataset)
    return Text(local.label, ["\n\n".join(local.documents)])


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _load_hub(dataset: str, hub: HubText, split: dict, cache_dir: str | None) -> list[str]:
    import datasets

    try:
        return datasets.load_dataset(hub.path, hub.name, cache_dir=cache_dir, **split)[hub.column]
    # Offline, not in the cache, or removed from the hub: the remedy is the same.
    except (OSError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CalibrationError(
            f"dataset {dataset} ({hub.path}) could not be loaded: {reason.strip()}. Without a network, "
            f"name a local file: --dataset FILE.txt (or .jsonl, .parquet, a folder), or --dataset pydoc"
        ) from error


def _local_text(dataset: str) -> Text:
    path = Path(dataset).expanduser()
    if not path.exists():
        raise CalibrationError(
            f"dataset {dataset!r} is neither {', '.join(NAMES)} "
            f"nor an existing .txt, .jsonl or .parquet file or folder"
        )
    files = sorted(file for file in path.rglob("*") if file.suffix in READERS) if path.is_dir() else [path]
    if not files:
        raise CalibrationError(f"dataset folder {dataset} holds no {', '.join(READERS)} file")
    return Text(str(path), [document for file in files for document in _read_file(file)])


def _read_file(file: Path) -> list[str]:
    if file.suffix not in READERS:
        raise CalibrationError(f"dataset file {file} is not of a known kind: {', '.join(READERS)}")
    try:
        return _documents(READERS[file.suffix](file))
    # Unreadable, not UTF-8, not JSON, or without a text column.
    except (OSError, ValueError) as error:
        raise CalibrationError(f"dataset file {file} cannot be read: {str(error).splitlines()[0]}") from error


def _documents(rows: list[object]) -> list[str]:
    """The rows that are not null."""
    documents = [row for row in rows if row is not None]
    if not documents:
        raise ValueError("it holds no text")
    if odd := next((row for row in documents if not isinstance(row, str)), None):
        raise ValueError(f"a row's text is {odd!r}")
    return documents


def _read_plain(file: Path) -> list[str]:
    return [file.read_text(encoding="utf-8")]


def _read_jsonl(file: Path) -> list[object]:
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if odd := next((row for row in rows if not isinstance(row, dict)), None):
        raise ValueError(f"a line is not a JSON object: {json.dumps(odd)[:40]}")
    column = _text_column(list(rows[0]) if rows else [])
    return [row.get(column) for row in rows]


def _read_parquet(file: Path) -> list[object]:
    from pyarrow import parquet

    column = _text_column(parquet.read_schema(file).names)
    return parquet.read_table(file, columns=[column])[column].to_pylist()


READERS = {".txt": _read_plain, ".raw": _read_plain, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _text_column(names: list[str]) -> str:
    found = [name for name in TEXT_COLUMNS if name in names]
    if not found:
        raise ValueError(f"its columns {names} hold none of {', '.join(TEXT_COLUMNS)}")
    return found[0]
