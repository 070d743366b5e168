"""Published figures that a run is held against: their file, the row that fits, how far they are apart."""

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from wanda_fast.errors import ExpectedError, PathError

MEASURES = ("dense", "pruned")
# What a figure was measured with, as a file and a message name it. A file leaves out what its source does
# not state; a row can have values of its own.
PROTOCOL = {
    "text": "evaluation text",
    "window": "evaluation window",
    "bos": "BOS in every window",
    "calibration": "calibration set",
    "nsamples": "calibration samples",
    "seqlen": "calibration window",
}
KINDS = {"text": str, "window": int, "bos": bool, "calibration": str, "nsamples": int, "seqlen": int}
SETTING = {"model": str, "prune_method": str, "sparsity_type": str, "sparsity_ratio": float}
ROW = SETTING | dict.fromkeys(MEASURES, float) | KINDS
FILE = {"source": str, "protocol": dict, "rows": list}


@dataclass
class Row:
    """Published perplexities of one pruned model.

    Attributes:
        dense: None: not published.
        protocol: by the names in PROTOCOL, as far as the source states it.
        by_nsamples: whether the table has a column for each number of calibration samples.
    """

    model: str
    prune_method: str
    sparsity_type: str
    sparsity_ratio: float
    pruned: float
    source: str
    dense: float | None = None
    protocol: dict = field(default_factory=dict)
    by_nsamples: bool = False

    @property
    def setting(self) -> str:
        """For example "wanda unstructured 0.5, 16 samples"."""
        samples = f", {self.protocol['nsamples']} samples" if self.by_nsamples else ""
        return f"{self.prune_method} {self.sparsity_type} {self.sparsity_ratio:g}{samples}"

    def fits(self, method: str, pattern: str, ratio: float, nsamples: int) -> bool:
        same = (self.prune_method, self.sparsity_type) == (method, pattern)
        samples = not self.by_nsamples or self.protocol["nsamples"] == nsamples
        return same and samples and abs(self.sparsity_ratio - ratio) < 1e-6


def read_rows(file: Path) -> list[Row]:
    """All rows of a file of published figures.

    Raises: `PathError` if it cannot be read; `ExpectedError` if it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PathError(f"expect file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExpectedError(f"expect file {file} is not JSON: {error}") from error
    _require(content, FILE, ("source", "rows"), f"expect file {file}")
    shared = content.get("protocol", {})
    _require(shared, KINDS, (), f"protocol of expect file {file}")
    rows = []
    for at, given in enumerate(content["rows"], start=1):
        _require(given, ROW, (*SETTING, "pruned"), f"row {at} of expect file {file}")
        protocol = shared | {name: value for name, value in given.items() if name in PROTOCOL}
        own = {name: value for name, value in given.items() if name not in PROTOCOL}
        stated = {name: value for name, value in protocol.items() if value is not None}
        by_nsamples = given.get("nsamples") is not None
        rows.append(Row(**own, source=content["source"], protocol=stated, by_nsamples=by_nsamples))
    return rows


def _require(given: object, kinds: dict[str, type], needed: tuple[str, ...], what: str) -> None:
    """Raise `ExpectedError` unless `given` has the keys `needed`, and no others than those of `kinds`."""
    if not isinstance(given, dict):
        raise ExpectedError(f"{what} must be an object, got {given!r:.60}")
    if unknown := [name for name in given if name not in kinds]:
        raise ExpectedError(f"{what} has the unknown key {unknown[0]!r}: known are {', '.join(kinds)}")
    if missing := [name for name in needed if given.get(name) is None]:
        raise ExpectedError(f"{what} has no {missing[0]!r}")
    for name, value in given.items():
        if value is not None and not _is_a(value, kinds[name]):
            raise ExpectedError(f"{what}: {name} must be {_named(kinds[name])}, got {value!r:.60}")


def _is_a(value: object, kind: type) -> bool:
    if kind in (int, float):
        allowed = (int, float) if kind is float else int
        return isinstance(value, allowed) and not isinstance(value, bool) and 0 < value < float("inf")
    return isinstance(value, kind)


def _named(kind: type) -> str:
    names = {str: "a string", int: "a positive whole number", float: "a positive number"}
    return names.get(kind, {bool: "true or false", dict: "an object", list: "a list"}.get(kind, ""))


def find_row(wanted: str | Path, model: str, method: str, pattern: str, ratio: float, nsamples: int) -> Row:
    """The row that fits a run.

    Args:
        wanted: a file, or FILE:MODEL, where the file's name of the model is another one.
        model: hub id or path; only its last part counts, in any case.
    Raises: `ExpectedError` if no row fits, or several do; as `read_rows`.
    """
    file, colon, named = str(wanted).rpartition(":")
    if not colon or Path(wanted).exists():
        file, named = str(wanted), model
    rows = read_rows(Path(file))
    of_model = [row for row in rows if last_part(row.model) == last_part(named)]
    if not of_model:
        models = ", ".join(dict.fromkeys(row.model for row in rows)) or "no row at all"
        raise ExpectedError(
            f"expect file {file} has no figures of {named}, but of {models}: FILE:MODEL names one of these"
        )
    found = [row for row in of_model if row.fits(method, pattern, ratio, nsamples)]
    if len(found) != 1:
        number = "no row" if not found else f"{len(found)} rows"
        raise ExpectedError(
            f"expect file {file} has {number} for {named} with {method} {pattern} {ratio:g} and {nsamples} "
            f"samples; its rows: {'; '.join(row.setting for row in of_model)}"
        )
    return found[0]


def last_part(model: str) -> str:
    return PurePath(model).name.lower()


def held_against(row: Row, perplexity: dict, protocol: dict, others: list[str]) -> dict:
    """Published and measured perplexities, how far they are apart in percent, how the protocols differ.

    Args:
        perplexity: of the run; what is not in it was not measured.
        protocol: the run's, by the names in PROTOCOL; without those that have no meaning for the method.
        others: further differences, in words.
    """
    differences = [
        f"{PROTOCOL[name]} {_said(value)} in place of {_said(row.protocol[name])}"
        for name, value in protocol.items()
        if name in row.protocol and row.protocol[name] != value
    ]
    figures = {which: _figures(getattr(row, which), perplexity.get(which)) for which in MEASURES}
    return {
        "source": row.source,
        "row": f"{row.model}, {row.setting}",
        **figures,
        "differences": differences + others,
        "not_stated": [PROTOCOL[name] for name in protocol if name not in row.protocol],
    }


def _figures(published: float | None, measured: float | None) -> dict:
    apart = None if None in (published, measured) else 100 * (measured / published - 1)
    return {"published": published, "measured": measured, "apart": apart}


def _said(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def expected_rows(expected: dict) -> list[tuple[str, str]]:
    """A report's `expected` as rows of a table, each a name and words; none if nothing is expected."""
    if not expected:
        return []
    figures = [(f"held against, {which}", figures_in_words(expected[which])) for which in MEASURES]
    return [
        *figures,
        ("held against", f"{expected['row']} ({expected['source']})"),
        ("its protocol", f"this run's {protocol_in_words(expected)}"),
    ]


def figures_in_words(figures: dict) -> str:
    """For example `published 12.10, here 12.0712, -0.24% apart`."""
    published, measured, apart = figures["published"], figures["measured"], figures["apart"]
    words = ["not published" if published is None else f"published {published:.2f}"]
    words.append("not measured" if measured is None else f"here {measured:.4f}")
    return ", ".join(words if apart is None else [*words, f"{apart:+.2f}% apart"])


def protocol_in_words(expected: dict) -> str:
    """A sentence on how the run's protocol differs from the published one."""
    sentence = "the same as published"
    if expected["differences"]:
        sentence = f"differs from the published one: {'; '.join(expected['differences'])}"
    if expected["not_stated"]:
        sentence += f" (the source does not state: {', '.join(expected['not_stated'])})"
    return sentence
