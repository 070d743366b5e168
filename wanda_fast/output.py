"""A streamed model's folder: a shard for each block as soon as it is pruned, the rest around them."""

import json
import os
import shutil
from pathlib import Path

from wanda_fast.checkpoint import REPORT, writing
from wanda_fast.report import Report
from wanda_fast.shards import TensorFiles, sync_folder, write_tensors
from wanda_fast.sources import StreamedModel

ONE_FILE = 2**28  # bytes of tensors that leave as one model.safetensors instead of a shard for each block


class StreamedOutput:
    """`DIR.partial` while it grows; `DIR`, by one rename, when all of it is there."""

    def __init__(self, folder: Path, nblocks: int):
        self.folder, self.nshards = folder, nblocks + 1
        self.partial = folder.with_name(folder.name + ".partial")
        self.model = self.partial / "model"

    def __enter__(self) -> "StreamedOutput":
        self.discard()
        with writing(self.folder):
            self.model.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write_block(self, index: int, source: StreamedModel) -> None:
        with writing(self.folder):
            write_tensors(self._shard(index + 1), source.stored(source.names[index]))

    def finish(self, source: StreamedModel, report: Report) -> None:
        """All but the blocks, then the rename that makes the folder a model."""
        skeleton = source.skeleton
        with writing(self.folder):
            write_tensors(self._shard(0), skeleton.files.read(source.outside, skeleton.dtype))
            self._index()
            config = skeleton.model.config
            config.dtype = str(skeleton.dtype).removeprefix("torch.")
            config.architectures = [type(skeleton.model).__name__]
            config.save_pretrained(self.model)
            skeleton.model.generation_config.save_pretrained(self.model)
            if skeleton.tokenizer is not None:
                skeleton.tokenizer.save_pretrained(self.model)
            (self.model / REPORT).write_text(report.to_json(), encoding="utf-8")
            if self.folder.exists():
                shutil.rmtree(self.folder)
            os.replace(self.model, self.folder)
            sync_folder(self.folder.parent)
            self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def _shard(self, number: int) -> Path:
        return self.model / f"model-{number + 1:05}-of-{self.nshards:05}.safetensors"

    def _index(self) -> None:
        """What `from_pretrained` looks for: the map of the shards, or one file where they are small."""
        shards = TensorFiles.of(self._shard(number) for number in range(self.nshards))
        if shards.nbytes() <= ONE_FILE:
            write_tensors(self.model / "model.safetensors", shards.read(shards.location))
            for shard in shards.files:
                shard.unlink()
            return
        weight_map = {name: shard.name for name, shard in sorted(shards.location.items())}
        index = {"metadata": {"total_size": shards.nbytes()}, "weight_map": weight_map}
        (self.model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
