"""Local files of tasks: JSON Lines with one item a line, of three kinds.

- choices: `query`, `choices`, `gold`: which choice follows the query;
- contexts: `context_options`, `continuation`, `gold`: which context comes before the continuation;
- last words: `context`, `continuation`: whether the model's first choices are the continuation.

`gold` is the number of the right choice, from 0 on.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from wanda_fast.data.documents import reason
from wanda_fast.errors import CalibrationError

CHOICES, CONTEXTS, LAST_WORDS = "choices", "context_options", "context"
# The fields of each kind, after the one that names it.
FIELDS = {CHOICES: ("query", "gold"), CONTEXTS: ("continuation", "gold"), LAST_WORDS: ("continuation",)}
# Queries of a question, as files of ARC and PIQA have them, end as in the harness's own tasks.
QUESTION, ANSWER = "Question:", "\nAnswer:"


def file_of(name: str, folder: Path) -> Path:
    """The file of a task in `folder`. Raises: `CalibrationError` if there is none."""
    files = [folder / f"{name}.jsonl", folder / f"{name}_openai.jsonl"]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        held = sorted(file.stem for file in folder.glob("*.jsonl"))
        raise CalibrationError(
            f"task {name!r} has no file in tasks_path {folder}: neither {files[0].name} nor {files[1].name} "
            f"is among its {len(held)} .jsonl files ({', '.join(held) or 'none'})"
        )
    return found


def read_items(file: Path) -> list[dict]:
    """The items of a file, all of one kind.

    Raises: `CalibrationError` if the file cannot be read, has no item, or a line is not an item of the kind
        of the first.
    """
    items, kind = [], None
    try:
        for number, line in _lines(file):
            where = f"task file {file}, line {number}"
            item = _parsed(line, where)
            kind = kind or _kind(item, where)
            items.append(_checked(item, kind, where))
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"task file {file} cannot be read: {reason(error)}") from error
    if not items:
        raise CalibrationError(f"task file {file} holds no item")
    return items


def harness_config(name: str, items: list[dict]) -> dict:
    """The task of these items as lm-evaluation-harness describes tasks, except for its data."""
    kind = _kind(items[0], name)
    config = {"task": name, "test_split": "test", "output_type": "multiple_choice", "target_delimiter": " "}
    metrics = ("acc", "acc_norm") if kind == CHOICES else ("acc",)
    config["metric_list"] = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]
    if kind == CHOICES:
        return config | {"doc_to_text": _prompt, "doc_to_choice": CHOICES, "doc_to_target": "gold"}
    if kind == CONTEXTS:
        # The harness takes a number in the place of a text for the right one of several contexts.
        return config | {
            "doc_to_text": "gold",
            "doc_to_choice": CONTEXTS,
            "doc_to_target": "continuation",
        }
    own = {"doc_to_text": LAST_WORDS, "doc_to_target": lambda item: " " + item["continuation"]}
    return config | {"output_type": "loglikelihood"} | own


def _prompt(item: dict) -> str:
    query = item["query"].rstrip()
    return query + ANSWER if query.startswith(QUESTION) else query


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _parsed(line: str, where: str) -> dict:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(item, dict):
        raise CalibrationError(f"{where} is {type(item).__name__}, not an object with the fields of an item")
    return item


def _kind(item: dict, where: str) -> str:
    found = next((kind for kind in FIELDS if kind in item), None)
    if found is None:
        raise CalibrationError(
            f"{where} has none of {', '.join(FIELDS)}: its fields are {', '.join(item) or 'none'}"
        )
    return found


def _checked(item: dict, kind: str, where: str) -> dict:
    """The item's own fields. Raises: `CalibrationError`."""
    if absent := [field for field in (kind, *FIELDS[kind]) if field not in item]:
        raise CalibrationError(f"{where} has no {absent[0]}: its fields are {', '.join(item) or 'none'}")
    texts = [field for field in (kind, *FIELDS[kind]) if field != "gold" and not _is_list(field)]
    for field in texts:
        _require_text(item[field], f"{where}: {field}")
    if _is_list(kind):
        _require_choice(item[kind], item["gold"], kind, where)
    return {field: item[field] for field in (kind, *FIELDS[kind])}


def _is_list(field: str) -> bool:
    return field in (CHOICES, CONTEXTS)


def _require_text(value: object, what: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise CalibrationError(f"{what} is {value!r}, not a text")


def _require_choice(choices: object, gold: object, kind: str, where: str) -> None:
    if not isinstance(choices, list) or len(choices) < 2:
        raise CalibrationError(f"{where}: {kind} is {choices!r}, not a list of two texts or more")
    for choice in choices:
        _require_text(choice, f"{where}: one of {kind}")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise CalibrationError(
            f"{where}: gold is {gold!r}, not the number of one of the {len(choices)} {kind}, 0 to "
            f"{len(choices) - 1}"
        )
