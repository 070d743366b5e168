"""`wanda-fast` in forks of this process, in which the modules are imported already: that takes seconds."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from wanda_fast.cli import main as cli


def start(words: list, said: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """Fork a process that calls `prepare` and runs `words`, with its output in the file `said`.

    Returns: its id.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = said.open("w")  # not pytest's
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        prepare()
        sys.argv = [str(word) for word in words]
        cli.main()
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of the process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
