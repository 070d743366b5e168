"""Writes files that are complete or do not exist, however the process ends."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

# Bytes per read.
CHUNK = 2**22
# Bytes per task of the threads that compute a checksum.
PIECE = 2**24
MOST_THREADS = 8


def write_atomically(path: Path, write: Callable[[Path], None]) -> str:
    """`write` fills a temporary file, which is then renamed to `path`. Returns the file's checksum."""
    return begin_write(path, write)()


def begin_write(path: Path, write: Callable[[Path], None]) -> Callable[[], str]:
    """The first half of `write_atomically`: fills the temporary file.

    Returns the second half, a function that waits for the disk, renames the file and returns its checksum.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        write(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return partial(_finish_write, unfinished, path)


def _finish_write(unfinished: Path, path: Path) -> str:
    # The disk writes while the checksum is computed.
    with ThreadPoolExecutor(1) as pool:
        reached_disk = pool.submit(_sync, unfinished)
        digest = checksum(unfinished)
        reached_disk.result()
    os.replace(unfinished, path)
    sync_folder(path.parent)
    return digest


def sync_folder(folder: Path, files: bool = False) -> None:
    """Flush a folder, and with it the renames in it, to the disk; with `files`, all of its files first."""
    for path in [*(folder.iterdir() if files else ()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """sha256 of the concatenated sha256 of each 16 MiB of a file.

    The pieces are hashed in threads: one thread (0.7 GB/s) takes longer for a block of a 7B model than a GPU
    takes to prune it.
    """
    begins = range(0, path.stat().st_size, PIECE)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(partial(_sha256, path), begins))).hexdigest()


def _sha256(path: Path, begin: int) -> bytes:
    found = hashlib.sha256()
    for chunk in chunks(path, begin, begin + PIECE):
        found.update(chunk)
    return found.digest()


def chunks(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end` (default: the file's end), 4 MiB at a time."""
    with path.open("rb", buffering=0) as opened:
        opened.seek(begin)
        while chunk := opened.read(CHUNK if end is None else min(CHUNK, end - opened.tell())):
            yield chunk
