"""Programs whose bad input ends as wanda-fast's does: one sentence, exit code 2."""

import sys

import typer

from wanda_fast.errors import WandaFastError


def run(app: typer.Typer) -> None:
    try:
        app()
    except WandaFastError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
