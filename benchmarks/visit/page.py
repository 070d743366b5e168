"""A visit as a page: conditions, parts, truth, rates, figures, what the tables would change, jobs, goals."""

from collections.abc import Iterable

from benchmarks import machine, model_table, tables
from benchmarks.roofs import Roofs
from benchmarks.rows import Row
from benchmarks.tables import duration, markdown, times
from benchmarks.visit.choices import choices
from benchmarks.visit.goals import outcomes

NOTHING = "Not measured."


def whole(data: dict, rows: list[Row]) -> str:
    """Everything, for the file."""
    parts = ["# A visit to a GPU", *_warning(data), conditions(data), *_section("Parts", _parts(data))]
    parts += _section("Truth", truth(data["proof"].values()))
    parts += _section("Rates", _rates(data))
    parts += _section("Figures", _figures(rows))
    parts += _section("Choices", _choices(rows, data["machine"], all_of_them=True))
    parts += _section("Whole jobs", _jobs(data["jobs"]))
    parts += _section("Goals", goals(data, rows))
    return "\n\n".join([*parts, *(f"- {note}" for note in data["notes"])]) + "\n"


def closing(data: dict, rows: list[Row]) -> str:
    """What is printed last: the goals beside what came, and what would change in the tables."""
    parts = _section("Truth", truth(data["proof"].values()))
    parts += _section("Changes that the figures ask for", _choices(rows, data["machine"], all_of_them=False))
    parts += [*_warning(data), *_section("Goals", goals(data, rows))]
    return "\n\n".join(parts)


def conditions(data: dict) -> str:
    if "roofs" in data["rates"]:
        return tables.conditions(data["machine"], Roofs(**data["rates"]["roofs"]))
    return machine.sentence(data["machine"])


def truth(checks: Iterable[dict]) -> str:
    """One line a check: how many cases passed; a failure's first sentence."""
    lines = [
        (each["operation"], each["how"], f"{each['passed']} of {each['planned']}", _verdict(each))
        for each in sorted(checks, key=lambda each: (each["operation"], each["how"]))
    ]
    return markdown(("operation", "how", "passed", "verdict"), lines) if lines else NOTHING


def goals(data: dict, rows: list[Row]) -> str:
    lines = [(each.goal, each.came, each.verdict) for each in outcomes(data, rows)]
    return markdown(("goal", "what came", "verdict"), lines)


def _verdict(check: dict) -> str:
    if check["failed"]:
        return f"**FAILED**: {check['failed'][0]}"
    return check["note"] or ("ok" if check["passed"] else "not run")


def _warning(data: dict) -> list[str]:
    return [f"**{tables.REHEARSAL}**"] if data["rehearsal"] else []


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text]


def _parts(data: dict) -> str:
    lines = [(name, f"{part['seconds']:.0f} s", part["state"]) for name, part in data["parts"].items()]
    return markdown(("part", "time", "state"), lines)


def _rates(data: dict) -> str:
    rates = data["rates"].get("rates", [])
    lines = [(each["name"], ", ".join(filter(None, (_value(each), each["note"])))) for each in rates]
    clocks = ", ".join(f"{name} {value}" for name, value in data["rates"].get("clocks", {}).items())
    table = markdown(("rate", "measured"), lines) if lines else NOTHING
    return f"{table}\n\nJust after: {clocks}." if clocks else table


def _value(rate: dict) -> str:
    return f"{rate['value']:.3g} {rate['unit']}" if rate["value"] else ""


def _figures(rows: list[Row]) -> str:
    lines = [(row.operation, *tables.cells(row)) for row in rows]
    return markdown(("operation", *tables.COLUMNS), lines) if lines else NOTHING


def _choices(rows: list[Row], facts: dict, all_of_them: bool) -> str:
    found = choices(rows, facts)
    shown = found if all_of_them else [each for each in found if each.change]
    if not shown:
        return "None: of what was measured, the tables choose the fastest." if found else NOTHING
    header = ("operation", "shape", "dtype", "setting", "the tables' choice", "fastest", "factor", "change")
    return markdown(header, [_choice_cells(each) for each in shown])


def _choice_cells(choice) -> tuple[str, ...]:
    row, fastest = choice.row, choice.fastest
    both = (f"{each.provider} {duration(each.time_ms)}" for each in (row, fastest))
    return (
        row.operation,
        row.shape,
        row.dtype,
        row.setting,
        *both,
        times(choice.factor),
        choice.change or "-",
    )


def _jobs(reports: dict[str, dict]) -> str:
    pages = [model_table.page(report).strip() for report in model_table.merged(reports).values()]
    return "\n\n".join(pages) if pages else NOTHING
