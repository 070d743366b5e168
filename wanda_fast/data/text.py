"""Text by name: datasets on the Hugging Face hub, local files, the standard library's help topics."""

import os
from dataclasses import dataclass
from pathlib import Path

from wanda_fast.data.documents import Text
from wanda_fast.data.files import READERS, read_files
from wanda_fast.errors import CalibrationError, MissingDependencyError


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
# A longer string is no name or path in a message.
LONGEST_NAME = 200


def calibration_text(
    dataset: str | Path,
    cache_dir: str | None = None,
    text_column: str | None = None,
    tokenizer: object = None,
) -> Text:
    """The text that calibration windows are drawn from.

    Args:
        dataset: "wikitext2", "c4", "ptb", "pydoc" (the first four fifths of it), or a local .txt, .raw,
            .json, .jsonl or .parquet file, also compressed (.gz, .zst), or a folder of such files.
        cache_dir: for downloads from the hub.
        text_column: of a local file that has columns; None: the first of `documents.TEXT_COLUMNS`.
        tokenizer: renders chats by its template.
    Raises: `CalibrationError` if it cannot be loaded or read.
    """
    if dataset == "pydoc":
        text = _pydoc()
        return Text("pydoc, first four fifths", [text[: len(text) * 4 // 5]])
    if dataset in HUB:
        hub = HUB[dataset]
        rows = _load_hub(dataset, hub, hub.train, cache_dir)
        return Text(f"{dataset} train", list(rows) if hub.joined_by is None else [hub.joined_by.join(rows)])
    return _local_text(dataset, text_column, tokenizer)


def evaluation_text(
    dataset: str | Path,
    cache_dir: str | None = None,
    text_column: str | None = None,
    tokenizer: object = None,
) -> Text:
    """The text that perplexity is measured on, as one document.

    Args:
        dataset: as for `calibration_text`. It is the test split of wikitext2 and ptb, the first 1100
            documents of c4's validation split, the last fifth of pydoc, and all of a local file or folder.
        cache_dir, text_column, tokenizer: as for `calibration_text`.
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
    return _local_text(dataset, text_column, tokenizer).joined()


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _load_hub(dataset: str, hub: HubText, split: dict, cache_dir: str | None) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"dataset {dataset} needs the package datasets, which is not installed: pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(hub.path, hub.name, cache_dir=cache_dir, **split)[hub.column]
    # Offline, not in the cache, or removed from the hub: the remedy is the same.
    except (OSError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CalibrationError(
            f"dataset {dataset} ({hub.path}) could not be loaded: {reason.strip()}. Without a network, "
            f"name a local file: --dataset FILE.txt (or .jsonl, .parquet, a folder), or --dataset pydoc"
        ) from error


def named(dataset: str | Path) -> str:
    """A dataset's name in messages; its length where it cannot be a name, since it may be the text itself."""
    name = str(dataset)
    if len(name) > LONGEST_NAME or "\n" in name:
        return f"of {len(name)} characters"
    return repr(name)


def _local_text(dataset: str | Path, text_column: str | None, tokenizer: object) -> Text:
    path = Path(dataset).expanduser()
    if not os.path.exists(path):
        raise CalibrationError(
            f"dataset {named(dataset)} is neither {', '.join(NAMES)} "
            f"nor an existing file or folder of {', '.join(READERS)}"
        )
    return read_files(path, text_column, tokenizer)
