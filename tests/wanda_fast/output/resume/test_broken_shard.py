"""A damaged shard ends the run with a sentence; once it is repaired, the run keeps its finished blocks."""

import pytest
from safetensors.torch import load_file, save_file

import wanda_fast
from tests.tiny_models import FAMILIES, save_checkpoint, token_ids
from tests.wanda_fast.output.resume.runs import stop_in
from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.errors import CheckpointError, InterruptedRunError, NonFiniteError, ResumeError
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.pruning import orders


@pytest.fixture
def job(tmp_path, pydoc_text):
    """(shard of a checkpoint of four blocks, function that prunes it to a folder)."""
    model = FAMILIES["gemma3"]()
    save_checkpoint(model, tmp_path / "in", pydoc_text[:20000])

    def prune(folder, **options):
        return wanda_fast.prune(
            tmp_path / "in", dataset=token_ids(model, 2, 16), seqlen=16, save_model=folder, **options
        )

    return tmp_path / "in" / "model.safetensors", prune


def test_finished_blocks_are_kept_until_the_shard_is_repaired(job, tmp_path, monkeypatch):
    shard, prune = job
    out, expected = tmp_path / "out", tmp_path / "expected"
    whole, read = shard.read_bytes(), TensorFiles.read

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


def change(shard, name, value):
    """Give the first element of a tensor another value."""
    tensors = load_file(shard)
    tensors[name].view(-1)[0] = value
    save_file(tensors, shard, {"format": "pt"})


def test_a_shard_with_nan_is_repaired(job, tmp_path, monkeypatch):
    shard, prune = job
    out, expected = tmp_path / "out", tmp_path / "expected"
    whole = shard.read_bytes()
    prune(expected)
    change(shard, "model.layers.2.mlp.up_proj.weight", float("nan"))
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2.*up_proj"):
        prune(out)
    shard.write_bytes(whole)
    pruned, prune_block = [], orders.prune_block
    monkeypatch.setattr(
        orders, "prune_block", lambda block, *rest: pruned.append(block.name) or prune_block(block, *rest)
    )
    prune(out, resume=True)
    assert pruned == ["model.layers.2", "model.layers.3"]
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("model.layers.1.mlp.up_proj.weight", r"the model differs in block 2 of 4, which is finished"),
        ("model.layers.0.mlp.up_proj.weight", r"the model differs in block 1 of 4, which is finished"),
        ("model.embed_tokens.weight", r"the model differs$"),
    ],
)
def test_tensors_that_finished_blocks_came_from_may_not_change(name, sentence, job, tmp_path, monkeypatch):
    shard, prune = job
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(StreamedOutput, "write_block", stop_in(1, StreamedOutput.write_block))
        with pytest.raises(InterruptedRunError, match="stopped after block 2 of 4"):
            prune(out)
    whole = shard.read_bytes()
    change(shard, name, 0.125)
    with pytest.raises(ResumeError, match=f"cannot be resumed: {sentence}"):
        prune(out, resume=True)
    # Nothing is lost: with the tensors of before, the run goes on.
    shard.write_bytes(whole)
    assert prune(out, resume=True).complete


def test_the_digest_of_a_checkpoint_is_that_of_its_tensors(tmp_path):
    """Not of the files that they are in, or of their order there."""
    tensors = FAMILIES["smollm"]().state_dict()
    tensors.pop("lm_head.weight")
    names = list(tensors)
    save_file(tensors, tmp_path / "all.safetensors")
    parts = [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    for part, chosen in zip(parts, (names[:7], names[7:]), strict=True):
        save_file({name: tensors[name] for name in chosen}, part)
    whole, split = TensorFiles.of([tmp_path / "all.safetensors"]), TensorFiles.of(parts)
    assert whole.digest() == split.digest() != whole.digest(names[:7]) == split.digest(names[6::-1])
    change(parts[0], names[3], 0.125)
    changed = TensorFiles.of(parts)
    assert changed.digest() != split.digest() and changed.digest(names[7:]) == split.digest(names[7:])
