"""A streamed model's folder, around the blocks' shards: what else `from_pretrained` looks for."""

import json
from pathlib import Path

from wanda_fast.shards import TensorFiles, join_files, write_tensors
from wanda_fast.sources import StreamedModel

ONE_FILE = 2**28  # bytes of tensors that leave as one model.safetensors instead of a shard for each block


def save_surroundings(source: StreamedModel, folder: Path, shards: list[Path]) -> None:
    """Write shards[0], all that is outside of the blocks; the index; configurations and tokenizer.

    Args:
        shards: the model's files, in order; those of the blocks are there.
    """
    skeleton = source.skeleton
    write_tensors(shards[0], skeleton.files.read(source.outside, skeleton.dtype))
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
