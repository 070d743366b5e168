"""Files that are whole or not there, however the process ends."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

CHUNK = 2**22  # bytes read at once
PIECE = 2**24  # bytes that one thread checks
MOST_THREADS = 8


def write_atomically(path: Path, write: Callable[[Path], None]) -> str:
    """`write` fills a file of another name, which then takes `path`'s place at once; returns its checksum."""
    return begin_write(path, write)()


def begin_write(path: Path, write: Callable[[Path], None]) -> Callable[[], str]:
    """The first half of `write_atomically`; what is returned is the second, which waits for the disk."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        write(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return partial(_take_place, unfinished, path)


def _take_place(unfinished: Path, path: Path) -> str:
    with ThreadPoolExecutor(1) as pool:  # the disk works while the checksum is computed
        reached_disk = pool.submit(_sync, unfinished)
        digest = checksum(unfinished)
        reached_disk.result()
    os.replace(unfinished, path)
    sync_folder(path.parent)
    return digest


def sync_folder(folder: Path, files: bool = False) -> None:
    """Renames in a folder reach the disk with the folder; `files`: after all of its files."""
    for path in [*(folder.iterdir() if files else ()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """sha256 of the sha256 of each 16 MiB: over a block of a 7B one thread (0.7 GB/s) takes longer than a GPU
    takes to prune it."""
    begins = range(0, path.stat().st_size, PIECE)
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:  # begins as many as have work
        return hashlib.sha256(b"".join(pool.map(partial(_sha256, path), begins))).hexdigest()


def _sha256(path: Path, begin: int) -> bytes:
    found = hashlib.sha256()
    for chunk in chunks(path, begin, begin + PIECE):
        found.update(chunk)
    return found.digest()


def chunks(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The file's bytes from `begin` on, up to `end` where given."""
    with path.open("rb", buffering=0) as opened:
        opened.seek(begin)
        while chunk := opened.read(CHUNK if end is None else min(CHUNK, end - opened.tell())):
            yield chunk
