"""The command line's flags, made from `wanda_fast.options`."""

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated

import typer

from wanda_fast.options.all_options import Options, at_home
from wanda_fast.options.option import PANELS, WHAT
from wanda_fast.options.signature import add_parameters, options_of

WIDEST_METAVAR = 24  # of 80 columns; longer lists of choices are in the help
MODEL = next(each for each in fields(Options) if each.name == "model")

ModelArgument = Annotated[str, typer.Argument(help=MODEL.metadata["help"])]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        help="A .py file or module that registers methods or patterns. Repeatable.", rich_help_panel=WHAT
    ),
]

Methods = Annotated[
    str, typer.Option(help="Methods between commas, e.g. wanda,sparsegpt.", rich_help_panel=WHAT)
]
Patterns = Annotated[
    str, typer.Option(help="Patterns between commas, e.g. 2:4,4:8,unstructured.", rich_help_panel=WHAT)
]
Ratios = Annotated[
    str | None,
    typer.Option(
        help="Ratios between commas, for each pattern but N:M, e.g. 0.4,0.5. Default: 0.5.",
        rich_help_panel=WHAT,
    ),
]


def takes_flags(name: str, *, model: bool = False) -> Callable[[Callable], Callable]:
    """Decorator: the options of the command `name` are the function's flags, which arrive in its `**options`.

    `~` at the beginning of a value is the home folder: a shell does not expand `--mask=~/file`.

    Args:
        model: the model is a flag too, `--model`, and `--help` shows the flags in panels.
    """
    options = [MODEL] * model + options_of(name)
    ordered = sorted(options, key=lambda each: PANELS.index(each.metadata["panel"]))

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def command(**flags):
            return function(**{flag: at_home(value) for flag, value in flags.items()})

        command.__signature__ = add_parameters(function, [_flag(each, in_panel=model) for each in ordered])
        return command

    return decorate


def _flag(each: Field, in_panel: bool) -> inspect.Parameter:
    facts = each.metadata
    metavar = f"[{'|'.join(facts['choices'])}]" if facts["choices"] else None
    sentences = [facts["help"], facts["flag_help"]]
    if metavar and len(metavar) > WIDEST_METAVAR:
        metavar = None
        sentences.append(f"Choices: {', '.join(facts['choices'])}.")
    kind = facts["flag_type"] or each.type
    flag = typer.Option(
        *_names(each),
        help=" ".join(filter(None, sentences)),
        min=facts["minimum"],
        metavar=metavar,
        rich_help_panel=facts["panel"] if in_panel else None,
    )
    return inspect.Parameter(
        each.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=facts["flag_default"],
        annotation=Annotated[kind, flag],
    )


def _names(each: Field) -> list[str]:
    """The flag's name where typer would add `--no-...` to it; none: typer's own."""
    return ["--" + each.name.replace("_", "-")] if each.type is bool else []


def normalized(word: str) -> str:
    """A flag's name with dashes; that of the option which the published code calls so."""
    return ALIASES.get(dashed(word), dashed(word))


def dashed(name: str) -> str:
    return name.replace("_", "-")


ALIASES = {dashed(alias): dashed(each.name) for each in fields(Options) for alias in each.metadata["aliases"]}
