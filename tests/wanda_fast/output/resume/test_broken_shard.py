"""A shard that is damaged while it is read: the run ends with a sentence, and goes on when it is repaired."""

import pytest

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.errors import CheckpointError
from wanda_fast.output.streamed import StreamedOutput


def test_finished_blocks_are_kept_until_the_shard_is_repaired(tmp_path, pydoc_text, monkeypatch):
    model = FAMILIES["gemma3"]()
    save_checkpoint(model, tmp_path / "in", pydoc_text[:20000])
    shard, out, expected = (tmp_path / name for name in ("in/model.safetensors", "out", "expected"))
    whole, read = shard.read_bytes(), TensorFiles.read

    def prune(folder, **options):
        return wanda_fast.prune(
            tmp_path / "in", dataset=token_ids(model, 2, 16), seqlen=16, save_model=folder, **options
        )

    def damaged(files, names, *rest):
        if any(".layers.3." in name for name in names):
            shard.write_bytes(whole[: len(whole) // 4])
        return read(files, names, *rest)

    prune(expected)
    with monkeypatch.context() as patch:
        patch.setattr(TensorFiles, "read", damaged)
        with pytest.raises(CheckpointError, match="model.safetensors ends before its last tensor"):
            prune(out)
    # Not repaired yet: refused as the checkpoint is opened, and nothing is lost.
    with pytest.raises(CheckpointError, match="model.safetensors is truncated"):
        prune(out, resume=True)
    shard.write_bytes(whole)
    restored, begin = [], StreamedOutput.begin_
    monkeypatch.setattr(
        StreamedOutput, "begin_", lambda self, *args: restored.extend(self.finished) or begin(self, *args)
    )
    prune(out, resume=True)
    assert restored[:2] == [0, 1]
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
