"""A streamed checkpoint gives the same tensors, byte for byte, as a model that is pruned in memory."""

import hashlib
import json
import re
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Zamba2Config

import wanda_fast
from tests.tiny_models import FAMILIES, GQA, save_checkpoint, token_ids
from wanda_fast import errors
from wanda_fast.checkpoint import atomic_write, block_loader, save, shards
from wanda_fast.checkpoint import load as checkpoint
from wanda_fast.output import streamed as output
from wanda_fast.run import inputs, streamed

pytestmark = pytest.mark.usefixtures("one_thread", "short_pydoc")

STREAMED = ("llama2", "smollm", "qwen3", "gemma2", "gemma3", "olmo3", "opt", "opt_350m", "phi", "phi3")
# transformers renames or merges their tensors as it loads them.
STREAMED += ("gpt_neox", "mixtral", "qwen3_moe")
QUICK = dict(nsamples=3, seqlen=24, batch_size=2, eval_windows=5)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, pydoc_text):
    """A function that saves a family's checkpoint in bfloat16; with `shards`, in files of 100 kB."""

    def folder_of(name, shards=False):
        folder = tmp_path_factory.mktemp(name)
        model = FAMILIES[name]().bfloat16()
        save_checkpoint(model, folder, pydoc_text[:20000])
        if shards:
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="100kB")
            assert (folder / "model.safetensors.index.json").is_file()
        return folder

    return folder_of


def prune(folder, out, whole=False, **options):
    """(report, tensors that were written); with `whole`, the model is pruned in memory."""
    with pytest.MonkeyPatch.context() as patch:
        if whole:
            patch.setattr(inputs, "open_meta_model", refuse)
        report = wanda_fast.prune(
            str(folder), dataset="pydoc", eval_dataset="pydoc", save_model=out, **QUICK | options
        )
    return report, {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}


def refuse(*_args):
    raise errors.NotStreamableError("the test says so")


def refuse_whole(*_args, **_options):
    raise AssertionError("loaded as a whole")


def assert_equal_bytes(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_equals_in_memory(name, folder_of, tmp_path, monkeypatch):
    folder, method = folder_of(name, shards=name in ("llama2", "gemma3")), "connect"
    expected, tensors = prune(folder, tmp_path / "whole", whole=True, prune_method=method)
    monkeypatch.setattr(checkpoint, "load", refuse_whole)
    report, streamed = prune(folder, tmp_path / "streamed", prune_method=method)
    assert_equal_bytes(streamed, tensors)
    assert report.perplexity == expected.perplexity
    assert report.linears.keys() == expected.linears.keys()
    assert [r.sparsity for r in report.linears.values()] == [r.sparsity for r in expected.linears.values()]
    for file in ("config.json", "generation_config.json"):
        written = [json.loads((tmp_path / kind / file).read_text()) for kind in ("whole", "streamed")]
        assert written[0] == written[1]
    assert {p.name for p in (tmp_path / "streamed").iterdir()} == {
        p.name for p in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize(
    "options",
    [
        dict(prune_method="magnitude", sparsity_type="2:4"),
        dict(prune_method="wanda", sparsity_type="2:4", dtype="bfloat16"),
        dict(prune_method="wanda", ignore=("model.layers.0",)),
        dict(prune_method="dense"),
        dict(prune_method="connect", sequential="linear"),
        dict(prune_method="admm", sparsity_type="2:4"),
        dict(prune_method="wanda", update="obs", refine=2, polish=3),
    ],
    ids=["magnitude", "bfloat16", "ignore", "dense", "sequential", "admm", "steps"],
)
def test_every_kind_of_run_streams(options, folder_of, tmp_path):
    folder = folder_of("smollm")
    masks = [tmp_path / "whole.safetensors", tmp_path / "streamed.safetensors"]
    expected, tensors = prune(folder, tmp_path / "whole", whole=True, save_mask=masks[0], **options)
    report, streamed = prune(folder, tmp_path / "streamed", save_mask=masks[1], **options)
    assert_equal_bytes(streamed, tensors)
    assert report.perplexity == expected.perplexity and report.sparsity == expected.sparsity
    assert_equal_bytes(load_file(masks[1]), load_file(masks[0]))


def test_large_models_are_written_in_shards_that_load(folder_of, tmp_path, monkeypatch):
    folder = folder_of("smollm", shards=True)
    _, tensors = prune(folder, tmp_path / "one")
    monkeypatch.setattr(save, "ONE_FILE", 0)
    _, shards = prune(folder, tmp_path / "shards")
    assert_equal_bytes(shards, tensors)
    files = sorted(p.name for p in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys() and index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors.values()
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert not (tmp_path / "shards.partial").exists()


def test_blocks_that_share_weights_are_loaded_whole(tmp_path, caplog):
    caplog.set_level("INFO", logger="wanda_fast")
    config = Zamba2Config(
        **GQA | dict(num_key_value_heads=4), layers_block_type=["hybrid"] * 2, num_mem_blocks=1,
        mamba_d_state=16, n_mamba_heads=8, mamba_ngroups=1, chunk_size=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 320, (2, 24))
    report = wanda_fast.prune(str(tmp_path / "dense"), dataset=ids, save_model=tmp_path / "out")
    assert report.sparsity > 0.49
    (said,) = (record.message for record in caplog.records if "not streamed" in record.message)
    assert re.search(r"layers\.0\.\S+ and \S+layers\.1\.\S+ are one weight, in two blocks", said)


def test_tied_weights_in_the_file_twice(folder_of, tmp_path, caplog):
    """As in transformers: two equal tensors are one weight, two different ones are not tied.
    Both keep their names."""
    caplog.set_level("INFO", logger="wanda_fast")
    folder = folder_of("smollm")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    for change, streams in ((0.0, True), (1.0, False)):
        save_file(tensors | {"lm_head.weight": head + change}, file, metadata={"format": "pt"})
        out = tmp_path / str(streams)
        prune(folder, out)
        assert any("differ in the file" in record.message for record in caplog.records) != streams
        with safe_open(out / "model.safetensors", "pt") as opened:
            assert torch.equal(opened.get_tensor("lm_head.weight"), head + change)


def test_pickled_weights_are_refused(tmp_path, pydoc_text):
    model = FAMILIES["llama2"]()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(errors.CheckpointError, match=r"pickles only \(pytorch_model.bin\).*safetensors"):
        wanda_fast.prune(str(tmp_path), dataset=token_ids(model, 2, 8))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_on_the_hub_are_refused(file, tmp_path):
    """A repository in the hub's cache, without safetensors. The pickle is not read."""
    snapshot = tmp_path / "models--some--one" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--one" / "refs").mkdir()
    (tmp_path / "models--some--one" / "refs" / "main").write_text("1")
    FAMILIES["llama2"]().config.save_pretrained(snapshot)
    (snapshot / file).write_bytes(b"not to be read")
    tokens = torch.randint(3, 320, (2, 8))
    with pytest.raises(errors.CheckpointError, match=rf"some/one holds .* pickles only \({file}\)"):
        wanda_fast.prune("some/one", dataset=tokens, cache_dir=str(tmp_path))


def test_weights_loaded_whole_are_no_pickles(tmp_path):
    model = FAMILIES["mixtral"]()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with (
        pytest.raises(errors.CheckpointError, match="holds its weights as pickles only"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(checkpoint, "locate", lambda path: (path, None))
        checkpoint.load(str(tmp_path))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda content: content[:-1000], "is truncated: it has"),
        (lambda content: b"a web page, not a model", "is not a safetensors file: its header would be"),
        (
            lambda content: content[:9] + b"{" + content[10:],
            "is not a safetensors file: its header is not JSON",
        ),
        (
            lambda content: content.replace(b"[320,64]", b"[321,64]", 1),
            r"is broken: \S+ has \d+ bytes, \w+ \[321, 64\] needs \d+",
        ),
    ],
    ids=["cut", "foreign", "header", "shape"],
)
def test_an_invalid_checkpoint_is_refused_with_one_sentence(spoil, sentence, folder_of, tmp_path):
    folder = folder_of("llama2")
    file = folder / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(errors.CheckpointError, match=f"model.safetensors {sentence}"):
        prune(folder, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_truncated_in_a_tensor_outside_the_blocks(folder_of, tmp_path):
    """The head, which is copied from file to file. The error names the model's file, not the output."""
    file = folder_of("llama2") / "model.safetensors"
    tensors = load_file(file)
    shards.begin_tensors(file, tensors | {"lm_head.weight": tensors.pop("lm_head.weight")})()  # now the last
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        errors.CheckpointError, match=r"model.safetensors is truncated: it has \d+ bytes, its header names"
    ):
        wanda_fast.prune(str(file.parent), dataset="pydoc", save_model=tmp_path / "out", **QUICK)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("save_mask", [False, True])
def test_a_copy_is_written_during_the_next_block(save_mask, folder_of, tmp_path, monkeypatch):
    """As on a GPU, where the tensors to write are copies under way: the writing thread waits for them."""
    folder, stored, threads = folder_of("llama2"), block_loader.StreamedModel.stored, []
    options = dict(save_mask=tmp_path / "masks") if save_mask else {}
    _, expected = prune(folder, tmp_path / "expected", sparsity_type="2:4", **options, overwrite=True)
    masks = load_file(tmp_path / "masks") if save_mask else {}

    def under_way(self, names):
        there = stored(self, names).tensors
        copies = {name: torch.full_like(tensor, torch.nan) for name, tensor in there.items()}
        values = {name: tensor.clone() for name, tensor in there.items()}

        def arrived():
            threads.append(threading.current_thread().name)
            for name, copy in copies.items():
                copy.copy_(values[name])

        return block_loader.Stored(copies, True, arrived)

    monkeypatch.setattr(block_loader.StreamedModel, "stored", under_way)
    _, tensors = prune(folder, tmp_path / "out", sparsity_type="2:4", **options, overwrite=True)
    assert_equal_bytes(tensors, expected)
    if save_mask:
        assert_equal_bytes(load_file(tmp_path / "masks"), masks)
    assert len(threads) == 2 and all(name.startswith("wanda-fast-disk") for name in threads)


def test_no_room_for_a_copy_that_is_written_in_the_background(folder_of, tmp_path, monkeypatch):
    stored, begin = block_loader.StreamedModel.stored, output.begin_tensors

    def full(path, *rest):
        if path.name.startswith("model-00002"):
            raise OSError(28, "No space left on device", str(path))
        return begin(path, *rest)

    monkeypatch.setattr(
        block_loader.StreamedModel, "stored", lambda *args: replace(stored(*args), is_copy=True)
    )
    monkeypatch.setattr(output, "begin_tensors", full)
    with pytest.raises(errors.OutputError, match="No space left on device"):
        prune(folder_of("llama2"), tmp_path / "out")


@pytest.mark.parametrize("pieces", [0, 1, 3, 3.5])
def test_a_checksum_sees_every_byte(pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_write, "PIECE", 1000)
    monkeypatch.setattr(atomic_write, "CHUNK", 300)
    file, content = tmp_path / "file", bytearray(range(250)) * 14
    content = content[: int(1000 * pieces)]
    file.write_bytes(content)
    parts = [content[begin : begin + 1000] for begin in range(0, len(content), 1000)]
    expected = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    assert atomic_write.checksum(file) == expected
    monkeypatch.setattr(atomic_write, "MOST_THREADS", 1)
    assert atomic_write.checksum(file) == expected
    for place in range(0, len(content), 499):
        file.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        assert atomic_write.checksum(file) != expected


def test_no_weights_are_left_in_the_meta_model(folder_of, monkeypatch):
    held = []
    monkeypatch.setattr(streamed, "scores_by_blocks", lambda source, *_: held.append(source.model) or {})
    wanda_fast.prune(str(folder_of("llama2")), dataset="pydoc", eval_dataset="pydoc", **QUICK)
    assert all(parameter.is_meta for parameter in held[0].parameters())
