"""A streamed model's folder, around the blocks' shards: what else `from_pretrained` looks for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.shards import TensorFiles, begin_tensors, join_files

ONE_FILE = 2**28  # bytes of tensors that leave as one model.safetensors instead of a shard for each block


def save_outside(source: StreamedModel, shard: Path, abandoned: Callable[[], bool]) -> None:
    """Write all tensors that are outside of the blocks, which nothing changes, from file to file.

    Raises: `InterruptedError` between two pieces where it is `abandoned`.
    """
    files, dtype = source.skeleton.files, source.skeleton.dtype

    def pieces(name: str, _tensor: Tensor) -> Iterator[Tensor]:
        for piece in files.pieces(name, dtype):
            if abandoned():
                raise InterruptedError(f"{shard} was abandoned")
            yield piece

    begin_tensors(shard, files.on_meta(source.outside, dtype), pieces)()


def save_surroundings(source: StreamedModel, folder: Path, shards: list[Path]) -> None:
    """Write configurations, tokenizer, and the index of the shards, which are there."""
    skeleton = source.skeleton
    config = skeleton.model.config
    config.dtype = str(skeleton.dtype).removeprefix("torch.")
    config.architectures = [type(skeleton.model).__name__]
    config.save_pretrained(folder)
    skeleton.model.generation_config.save_pretrained(folder)
    if skeleton.tokenizer is not None:
        skeleton.tokenizer.save_pretrained(folder)
    _index(TensorFiles.of(shards), folder)


def _index(shards: TensorFiles, folder: Path) -> None:
    """The map of the shards, or one file where they are small."""
    if shards.nbytes() <= ONE_FILE:
        join_files(shards, folder / "model.safetensors")
        for shard in shards.files:
            shard.unlink()
        return
    weight_map = {name: shard.name for name, shard in sorted(shards.location.items())}
    index = {"metadata": {"total_size": shards.nbytes()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
