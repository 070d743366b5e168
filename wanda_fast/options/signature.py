"""The options of a command as a function's keywords: in its signature, and in its docstring."""

import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from functools import wraps

from wanda_fast.options.all_options import Options


def names_deciding(*what: str) -> list[str]:
    """Names of the options that decide the output's BYTES, the RESULTS, or either."""
    return [each.name for each in fields(Options) if each.metadata["decides"] in what]


def options_of(command: str) -> list[Field]:
    """The options that a command takes, but for its model."""
    return [each for each in fields(Options) if command in each.metadata["commands"] and each.name != "model"]


def add_parameters(function: Callable, parameters: Iterable[inspect.Parameter]) -> inspect.Signature:
    """`function`'s signature with `parameters` in place of its `**options`, before its own keywords."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    leading = [each for each in own if each.kind is not each.KEYWORD_ONLY]
    return signature.replace(parameters=[*leading, *parameters, *own[len(leading) :]])


def takes_options(command: str) -> Callable[[Callable], Callable]:
    """Decorator: the options of `command` are the function's keywords, in its signature and docstring.

    They arrive in its `**options`; its docstring has `{options}` where their description belongs.
    """
    options = options_of(command)

    def decorate(function: Callable) -> Callable:
        keywords = (
            inspect.Parameter(x.name, inspect.Parameter.KEYWORD_ONLY, default=x.default, annotation=x.type)
            for x in options
        )
        signature = add_parameters(function, keywords)

        @wraps(function)
        def checked(*args, **kwargs):
            signature.bind(*args, **kwargs)  # a TypeError that names an unknown keyword
            return function(*args, **kwargs)

        checked.__signature__ = signature
        checked.__doc__ = function.__doc__.replace("{options}", "\n        ".join(map(_described, options)))
        return checked

    return decorate


def _described(each: Field) -> str:
    """An option as an entry of a docstring's Args."""
    facts = each.metadata
    sentences = [facts["help"], facts["python_help"]]
    if facts["choices"]:
        sentences.append(f"Choices: {', '.join(facts['choices'])}.")
    kind = inspect.formatannotation(each.type)
    entry = f"{each.name} ({kind}, default {each.default!r}): {' '.join(filter(None, sentences))}"
    return textwrap.fill(entry, 108, initial_indent=" " * 8, subsequent_indent=" " * 12).lstrip()
