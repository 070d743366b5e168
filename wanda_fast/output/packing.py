"""`pack` and `unpack`: a checkpoint's folder without most of its zeros, and the same folder again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wanda_fast.checkpoint.journal import partial_of
from wanda_fast.checkpoint.load import locate, tensor_files
from wanda_fast.checkpoint.meta_model import MetaModel, open_meta_model
from wanda_fast.checkpoint.packed.files import PackedFiles
from wanda_fast.checkpoint.packed.format import METHOD
from wanda_fast.checkpoint.packed.packing import pack_folder, prunable_names, unpack_folder
from wanda_fast.checkpoint.save import require_empty, restore_replaced, save_folder
from wanda_fast.errors import CheckpointError, NotStreamableError, PackError
from wanda_fast.options.all_options import at_home
from wanda_fast.output.lock import locked, require_one_process
from wanda_fast.report.packed_sizes import PackedSizes
from wanda_fast.timer import Progress


def pack(
    folder: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> PackedSizes:
    """Pack a pruned checkpoint without loss: of each pruned weight, a bit for every weight and the kept ones.

    Args:
        folder: of safetensors files, or hub id, of the dense checkpoint.
        out: folder of the packed one. It is written completely or not at all.
        overwrite: `out` may have content.
        cache_dir: for downloads from the hub.
        progress: its `step` is called with each tensor.
    Returns: what was packed, and the bytes before and after.
    Raises: `PackError` if the checkpoint is packed already, or no weight gets smaller; `CheckpointError` if
        it cannot be read; `OutputError` if `out` cannot be written.
    """
    sizes = []
    with _written(folder, out, overwrite) as (path, out):
        opened = _open_dense(path, cache_dir)
        names = prunable_names(opened)
        try:
            save_folder(out, lambda model: sizes.append(pack_folder(opened.files, names, model, progress)))
        except PackError as error:
            raise PackError(f"model {path} cannot be packed: {error}") from error
    return sizes[0]


def unpack(
    folder: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the dense checkpoint that was packed, with the same bytes in all files. Arguments as in `pack`.

    Raises: `PackError` if the checkpoint is not packed; `CheckpointError` if it is broken; `OutputError`.
    """
    with _written(folder, out, overwrite) as (path, out):
        files = _open_packed(path, cache_dir)
        save_folder(out, lambda model: unpack_folder(files, model, progress))


@contextmanager
def _written(folder: str | Path, out: str | Path, overwrite: bool) -> Iterator[tuple[str, Path]]:
    """Context in which this process alone writes `out`. Gives both with their home folders."""
    path, out = str(at_home(folder)), Path(at_home(out))
    require_one_process()
    source = Path(path).resolve()
    for target in (out, partial_of(out)):
        resolved = target.resolve()
        if Path(path).is_dir() and (source.is_relative_to(resolved) or resolved.is_relative_to(source)):
            raise PackError(
                f"output {target} and model {path} are one folder, or one is in the other: name another"
            )
    with locked(out):
        restore_replaced(out)
        require_empty(out, overwrite)
        yield path, out


def _open_dense(path: str, cache_dir: str | None) -> MetaModel:
    """Raises: `PackError`; `CheckpointError`; `QuantizedModelError`."""
    try:
        opened = open_meta_model(path, cache_dir=cache_dir, device="any", with_tokenizer=False)
    except NotStreamableError as error:
        raise PackError(f"model {path} cannot be packed: {error}") from error
    if isinstance(opened.files, PackedFiles):
        raise PackError(f"model {path} is packed already")
    return opened


def _open_packed(path: str, cache_dir: str | None) -> PackedFiles:
    try:
        files = tensor_files(locate(path)[0], cache_dir)
    except NotStreamableError as error:
        raise CheckpointError(f"model {path} cannot be unpacked: {error}") from error
    if not isinstance(files, PackedFiles):
        raise PackError(f"model {path} is not packed: its config.json does not name {METHOD}")
    return files
