"""One run at a time writes an output folder or file.

DIR.partial.lock is locked by the operating system (flock) while a run lasts. The lock ends with its process,
however that ends; the file alone locks nothing. It holds the process id and the machine, for the message of
the second run.
"""

import errno
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from wanda_fast.checkpoint.journal import partial_of
from wanda_fast.checkpoint.save import writing
from wanda_fast.distributed.torchrun import is_running
from wanda_fast.errors import OutputInUseError, RanksError

logger = logging.getLogger(__name__)

# What file systems without flock answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
# A run that ends removes its file: the next one then opens a new file, as often as this.
ATTEMPTS = 100
# Seconds until the holder has written its name, right after it got the lock.
PATIENCE = 1.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which this run alone may write `folder`, which may be a file, and its DIR.partial.

    Folders above it are made, and removed at the end if they are still empty.

    Raises: `OutputInUseError` that names the run that has the lock; `OutputError` if no file can be written.
    """
    file = partial_of(folder).absolute()
    file = file.with_name(file.name + ".lock")
    with writing(folder):
        made = [parent for parent in file.parents if not parent.exists()]
    try:
        with writing(folder):
            descriptor = _acquire(file, folder)
        try:
            yield
        finally:
            # Removed under the lock: a run that opened this file before finds that it is not the folder's.
            if _is_at(file, descriptor):
                file.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        _remove_empty(made)


def require_one_process(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `RanksError` if torchrun started several processes, of which each would do all of the work."""
    if is_running(environment):
        raise RanksError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, as torchrun sets it: pass process_group= to work on "
            f"one model together, or start this once"
        )


def _acquire(file: Path, folder: Path) -> int:
    """The open and locked file."""
    for _ in range(ATTEMPTS):
        descriptor = _open(file)
        if descriptor is None:
            continue
        try:
            _lock(descriptor, folder)
            if _is_at(file, descriptor):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OutputInUseError(f"output {folder} is in use by other runs: {file} changed {ATTEMPTS} times")


def _open(file: Path) -> int | None:
    """None if another run has removed the folder around the file, which it had made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputInUseError(
            f"output {folder} is being written by {_holder(descriptor)}: wait until that run has ended, or "
            f"name another output"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s is on a file system without locks: start no other run that writes it", folder)


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _holder(descriptor: int) -> str:
    """What the holder has written, e.g. "process 4711 on node3"."""
    until = time.monotonic() + PATIENCE
    while not (name := os.pread(descriptor, 512, 0).decode(errors="replace")).endswith("\n"):
        if time.monotonic() > until:
            return "another process"
        time.sleep(0.02)
    return name.strip()


def _remove_empty(folders: list[Path]) -> None:
    """Remove these folders, of which each contains the one before it, up to the first with content."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
