"""A packed folder that is broken, or is none, is one sentence, and nothing is left of the output."""

import json
import os
import shutil

import pytest
import torch

import wanda_fast
from tests.wanda_fast.checkpoint.packed_folders import changed, pruned, saved, with_entry
from wanda_fast import errors
from wanda_fast.checkpoint.load import load

pytestmark = pytest.mark.usefixtures("one_thread")

UP = "model.layers.1.mlp.up_proj.weight"


def set_bit(tensors, row, column):
    tensors[f"{UP}.bits"][row, column // 8] |= 1 << column % 8


def one_more(tensors, _):
    bits = tensors[f"{UP}.bits"]
    # Byte 5 has padding.
    bits[2, bits[2, :5].argmin()] = 255


def narrower(tensors, _):
    tensors[f"{UP}.values"] = tensors[f"{UP}.values"][:, 1:].contiguous()


# By the sentence that says it: a change to an even folder's tensors.
BROKEN = {
    rf"{UP} is broken: row 2 has \d+ ones in its bits, and 22 values": one_more,
    rf"{UP} is broken: its bits have ones after column 44": lambda t, _: set_bit(t, 3, 44),
    rf"{UP}.values is BF16 \[57, 21\], config.json needs BF16 \[57, 22\]": narrower,
    rf"{UP}.bits is absent from packed.safetensors": lambda t, _: t.pop(f"{UP}.bits"),
    rf"{UP}.values is F16 \[57, 22\], config.json needs BF16": lambda t, _: t.update(
        {f"{UP}.values": t[f"{UP}.values"].half()}
    ),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_broken_weight_is_one_sentence(sentence, even, tmp_path):
    """Whether the folder is unpacked, streamed or loaded."""
    folder = changed(even, tmp_path / "packed", BROKEN[sentence])
    for use in (unpacking, evaluating, loading):
        with pytest.raises(errors.CheckpointError, match=sentence) as caught:
            use(folder)
        assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"packed"}


def unpacking(folder):
    wanda_fast.unpack(folder, folder.parent / "again")


def evaluating(folder):
    wanda_fast.evaluate(str(folder), dataset=torch.arange(64), seqlen=16, device="cpu")


def loading(folder):
    load(str(folder), device="any")


def first_later(tensors, _):
    tensors[f"{UP}.offsets"][0] = 1


def swapped(tensors, _):
    offsets = tensors[f"{UP}.offsets"]
    offsets[3:5] = offsets[3:5].flip(0)


def one_lost(tensors, _):
    tensors[f"{UP}.offsets"][-1] -= 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (first_later, r"its offsets run from 1 to (\d+), it has \1 values"),
        (one_lost, r"its offsets run from 0 to 1225, it has 1226 values"),
        (swapped, r"row 2 has \d+ ones in its bits, and \d+ values"),
    ],
)
def test_offsets_that_do_not_fit(change, sentence, uneven, tmp_path):
    folder = changed(uneven, tmp_path / "packed", change)
    with pytest.raises(errors.CheckpointError, match=sentence):
        unpacking(folder)


def without(key):
    return lambda entry: entry.pop(key)


def entry_of_up(**change):
    return lambda entry: entry["weights"][UP].update(change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda entry: entry.update(version=2), "is packed in version 2 of the format; .* reads version 1"),
        (without("version"), "is packed in version None of the format"),
        (without("sharded"), "is packed, and its config.json does not say whether it is sharded"),
        (without("weights"), "its config.json describes no packed weight"),
        (entry_of_up(dtype="int3"), f"config.json of .* describes {UP} as .*int3"),
        (entry_of_up(shape=[], values=[]), rf"describes {UP} as \[\] with values \[\], which do not fit"),
        (entry_of_up(shape=[57]), rf"describes {UP} as \[57\] with values \[57, 22\], which do not fit"),
        (entry_of_up(values=[57, 45]), r"as \[57, 44\] with values \[57, 45\], which do not fit"),
        (entry_of_up(shape="57x44"), f"describes {UP} as"),
        (entry_of_up(shape=[57, 52]), rf"{UP}.bits is U8 \[57, 6\], config.json needs U8 \[57, 7\]"),
        (lambda entry: entry["weights"].pop(UP), f"{UP} is absent, and BF16 .* in its source_header"),
    ],
)
def test_a_broken_description_is_one_sentence(change, sentence, even, tmp_path):
    with pytest.raises(errors.CheckpointError, match=sentence):
        unpacking(with_entry(even, tmp_path / "packed", change))


def move(about):
    about["data_offsets"] = [offset + 2 for offset in about["data_offsets"]]


def header_of(metadata, change):
    header = json.loads(metadata["source_header"])
    change(header)
    metadata["source_header"] = json.dumps(header)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda _, metadata: metadata.pop("source_header"),
            "is not a packed file: its metadata has no source_h",
        ),
        (
            lambda _, metadata: metadata.update(source_header="{"),
            "source_header of .* its header is not JSON",
        ),
        (
            lambda _, metadata: header_of(metadata, lambda header: header[UP].update(dtype="F16")),
            rf"{UP} is BF16 \[57, 44\], and F16 \[57, 44\] in its source_header",
        ),
        (
            lambda _, metadata: header_of(metadata, lambda header: header.pop(UP)),
            rf"{UP} is BF16 \[57, 44\], and absent in its source_header",
        ),
        (
            lambda _, metadata: header_of(metadata, lambda header: move(header[UP])),
            rf"source_header of .*: {UP} begins at byte \d+, not at \d+",
        ),
        (
            lambda _, metadata: header_of(metadata, lambda header: header[UP]["data_offsets"].reverse()),
            f"source_header of .* is broken: {UP} has -5016 bytes, BF16 .* needs 5016",
        ),
        (
            lambda _, metadata: header_of(metadata, lambda header: header[UP].pop("data_offsets")),
            "source_header of .* names no offsets",
        ),
        (
            lambda _, metadata: metadata.update(source_file="../other.safetensors"),
            "names '../other.safetensors' as its source_file: that is no file of weights",
        ),
    ],
)
def test_a_broken_source_header_is_one_sentence(change, sentence, even, tmp_path):
    with pytest.raises(errors.CheckpointError, match=sentence):
        unpacking(changed(even, tmp_path / "packed", change))
    assert {path.name for path in tmp_path.iterdir()} == {"packed"}


def test_a_truncated_file_and_a_missing_shard(even, tmp_path):
    folder = shutil.copytree(even, tmp_path / "packed")
    file = folder / "packed.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    for use in (unpacking, evaluating, loading):
        with pytest.raises(errors.CheckpointError, match="packed.safetensors is truncated: it has"):
            use(folder)
    file.unlink()
    for use in (unpacking, evaluating, loading):
        with pytest.raises(errors.CheckpointError, match="no packed.safetensors"):
            use(folder)


def test_what_is_not_packed_or_unpacked(even, tmp_path):
    dense = even.parent / "dense"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused = [
        (wanda_fast.pack, even, "out", errors.PackError, "is packed already"),
        (wanda_fast.unpack, dense, "out", errors.PackError, "is not packed: its config.json does not name"),
        (wanda_fast.pack, dense, dense, errors.PackError, "are one folder, or one is in the other"),
        (wanda_fast.pack, dense, dense / "in", errors.PackError, "are one folder, or one is in the other"),
        (wanda_fast.pack, dense, dense.parent, errors.PackError, "are one folder, or one is in the other"),
        (wanda_fast.unpack, even, even, errors.PackError, "are one folder, or one is in the other"),
        (wanda_fast.pack, dense, "full", errors.OutputError, r"is not empty \(1 entries\)"),
        (wanda_fast.unpack, even, "full", errors.OutputError, r"is not empty \(1 entries\)"),
        (wanda_fast.pack, tmp_path / "none", "out", errors.CheckpointError, "does not exist"),
    ]
    for function, folder, out, kind, sentence in refused:
        with pytest.raises(kind, match=sentence):
            function(folder, tmp_path / out, overwrite=out != "full")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_source_in_the_working_folder_of_the_output_is_kept(inside, even, tmp_path):
    source = tmp_path / "out.partial" / inside
    shutil.copytree(even.parent / "dense", source)
    with pytest.raises(errors.PackError, match="out.partial and model .* are one folder, or one is in the"):
        wanda_fast.pack(source, tmp_path / "out", overwrite=True)
    assert (source / "model.safetensors").is_file()


def test_an_output_that_a_kill_had_set_aside_is_kept(even, tmp_path):
    aside = tmp_path / "out.partial" / "replaced"
    aside.mkdir(parents=True)
    (aside / "file").touch()
    with pytest.raises(errors.OutputError, match=r"is not empty \(1 entries\)"):
        wanda_fast.pack(even.parent / "dense", tmp_path / "out")
    assert (tmp_path / "out" / "file").is_file()


def test_a_model_without_zeros_and_files_of_other_formats(tmp_path):
    model = pruned("smollm", torch.bfloat16, "rows")
    for block in model.model.layers:
        for name in ("q", "k", "v", "o"):
            getattr(block.self_attn, f"{name}_proj").weight.data.fill_(1.0)
        for name in ("gate", "up", "down"):
            getattr(block.mlp, f"{name}_proj").weight.data.fill_(1.0)
    dense = saved(model, tmp_path / "dense")
    with pytest.raises(
        errors.PackError, match="none of its 14 prunable weights gets smaller when it is packed"
    ):
        wanda_fast.pack(dense, tmp_path / "out")
    with pytest.raises(errors.PackError, match="nosuch cannot be packed: it is no folder, and the hub"):
        wanda_fast.pack("nosuch", tmp_path / "out")
    (dense / "model.safetensors").unlink()
    (dense / "pytorch_model.bin").touch()
    with pytest.raises(errors.CheckpointError, match="holds its weights as pickles only"):
        wanda_fast.pack(dense, tmp_path / "out")
    (dense / "model.gguf").touch()
    with pytest.raises(errors.PackError, match="cannot be packed: GGUF files are read whole"):
        wanda_fast.pack(dense / "model.gguf", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_bytes_that_no_tensor_has_are_refused(tmp_path):
    dense = saved(pruned("smollm", torch.bfloat16, "rows"), tmp_path / "dense")
    with (dense / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(errors.CheckpointError, match="model.safetensors has bytes that are in no tensor"):
        wanda_fast.pack(dense, tmp_path / "out")
