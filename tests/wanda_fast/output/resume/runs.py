"""Runs of a small model, and the comparison of their outputs."""

import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

import wanda_fast

NBLOCKS = 5
QUICK = dict(dataset="text.txt", eval_dataset="text.txt", nsamples=2, seqlen=24, eval_windows=2, device="cpu")
WORDS = "--dataset text.txt --nsamples 2 --seqlen 24 --eval-windows 2 --device cpu".split()


def stop_in(block, write_block):
    def write(self, index, *rest):
        write_block(self, index, *rest)
        if index == block:
            os.kill(os.getpid(), signal.SIGINT)

    return write


def resume(llama, out, **options):
    return wanda_fast.prune(
        str(llama), save_model=out, save_mask=str(out) + ".masks", resume=True, **QUICK | options
    )


def assert_same(out, unbroken, report):
    expected, folder = unbroken
    files = [(out / "model.safetensors", folder / "model.safetensors"), (masks(out), masks(folder))]
    for file, other in files:
        tensors, wanted = load_file(file), load_file(other)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert report.perplexity == expected.perplexity and report.sparsity == expected.sparsity
    assert list(report.linears) == list(expected.linears)
    assert {path.name for path in out.parent.iterdir()} == {"out", "out.masks"}


def masks(out):
    return Path(str(out) + ".masks")


def partial(out):
    return out.with_name("out.partial")


def copied(llama, folder):
    return Path(shutil.copytree(llama, folder, dirs_exist_ok=True))


def fine_tune(folder):
    """Flip a bit in the last byte of the model."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
