"""The command that repeats a run, from its recipe: only the options that differ from the flags' defaults."""

import shlex
from collections.abc import Iterator
from dataclasses import Field, fields

from wanda_fast.options.all_options import Options

WIDTH = 100


def repeat_command(content: dict) -> str | None:
    """A command line of as many shell lines as it needs; None if the run was given objects of Python.

    A plugin is not part of the recipe, and not of the command.
    """
    if content.get("objects"):
        return None
    recipe, ranks = content["recipe"], content.get("ranks") or ()
    program = "wanda-fast"
    if ranks:
        nodes = len({rank["host"] for rank in ranks})
        machines = f"--nnodes {nodes} " * (nodes > 1)
        program = f"torchrun {machines}--nproc-per-node {len(ranks) // nodes} -m wanda_fast"
    return _in_lines([program, "prune"], [word for each in fields(Options) for word in _flag(each, recipe)])


def _flag(each: Field, recipe: dict) -> Iterator[list[str]]:
    """The words of one option: none, one flag, or one for each value of a list."""
    value, default = recipe.get(each.name, each.metadata["flag_default"]), each.metadata["flag_default"]
    name = "--" + each.name
    if each.name == "eval_dataset" and value is None:
        value = "none"
    if each.name == "model" or value != default:
        if isinstance(value, bool):
            yield [name if value else "--no-" + each.name]
        elif each.name == "tasks" and not isinstance(value, str):
            yield _with_value(name, ",".join(value))
        elif isinstance(value, list | tuple):
            yield from (_with_value(name, item) for item in value)
        elif value is not None:
            yield _with_value(name, value)


def _with_value(name: str, value: object) -> list[str]:
    """A value that begins with a dash would be read as a flag of its own."""
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]


def _in_lines(program: list[str], flags: list[list[str]]) -> str:
    lines = [" ".join(program)]
    for words in map(shlex.join, flags):
        if len(lines[-1]) + len(words) < WIDTH:
            lines[-1] += " " + words
        else:
            lines.append("    " + words)
    return " \\\n".join(lines)
