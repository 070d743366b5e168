"""What is said of one option: meaning, choices, where it counts."""

from dataclasses import MISSING, field
from typing import Any

from wanda_fast.errors import UnknownMethodError, WandaFastError

PANELS = ("Model", "What to prune", "Calibration", "Evaluation", "Output", "Speed and memory")
MODEL, WHAT, CALIBRATION, EVALUATION, OUTPUT, RESOURCES = PANELS

# What `--resume` compares. BYTES: the option decides the output's bytes, so an unfinished run continues only
# with the same value. RESULTS: only a finished run is compared; an unfinished one records the digest of what
# the option names, or the value that was chosen for it.
BYTES, RESULTS = "bytes", "results"


def option(
    default: Any = MISSING,
    *,
    help: str,
    panel: str,
    python_help: str = "",
    flag_help: str = "",
    choices: tuple[str, ...] = (),
    refused_with: type[WandaFastError] = UnknownMethodError,
    decides: str | None,
    minimum: int | None = None,
    commands: tuple[str, ...] = ("prune", "sweep"),
    flag_type: Any = None,
    flag_default: Any = MISSING,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A field of `Options`.

    Args:
        default: of the keyword and of the flag; none where the keyword is required.
        help: one or two sentences, for the command line and for Python.
        panel: of `--help`, one of PANELS.
        python_help, flag_help: what is true of the keyword alone, or of the flag alone.
        choices: all values that are accepted; any other is refused with `refused_with`.
        minimum: the lowest number that is accepted.
        decides: BYTES, RESULTS, or None.
        commands: the commands that take it.
        flag_type, flag_default: of the flag, where they differ from the keyword's.
        aliases: other names of the flag, which the published code for image classifiers has.
    """
    facts = dict(
        help=help,
        panel=panel,
        python_help=python_help,
        flag_help=flag_help,
        choices=choices,
        refused_with=refused_with,
        minimum=minimum,
        decides=decides,
        commands=commands,
        flag_type=flag_type,
        aliases=aliases,
        flag_default=default if flag_default is MISSING else flag_default,
    )
    return field(default=default, metadata=facts)
