"""`python -m wanda_fast`: the command line."""

from wanda_fast.cli.main import main

main()
