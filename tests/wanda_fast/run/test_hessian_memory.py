"""Where Hessians are kept, and what they take: the formula against resident memory."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.tiny_models import FAMILIES
from wanda_fast import errors
from wanda_fast.model.architecture import find_blocks
from wanda_fast.pruning.hessian import HessianUse
from wanda_fast.run import hessian_memory
from wanda_fast.run.hessian_memory import peak_bytes, place_hessians, visiting_bytes

MIB = 2**20
WIDTHS = (2048, 1024, 1024)  # 16 MiB and twice 4 MiB
NOISE = 6 * MIB  # a batch of 256 tokens, buffers of the matmuls

# The peak is the kernel's own record: a thread that samples the memory can be late on a busy machine.
MEASURED = """
import json, sys, torch
from types import SimpleNamespace
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.pruning.hessian import Hessian, HessianUse, factor, prepare
from wanda_fast.pruning.row_shares import RowShares
torch.set_num_threads(1)
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
def run(widths, use):
    hessians = {str(index): Hessian(width, "cpu") for index, width in enumerate(widths)}
    for hessian in hessians.values():
        for _ in range(2):
            hessian.add(torch.randn(256, hessian.in_features))
    weight = SimpleNamespace(device=torch.device("cpu"))
    linears = [SimpleNamespace(name=name, weight=weight) for name in hessians]
    block, shares = SimpleNamespace(name="block", linears=linears), RowShares([], 0, False)
    prepare(block, hessians, use)
    factor(block, hessians, use, dict.fromkeys(hessians, shares), Ranks())
found = []
run([512], HessianUse(True, True))
for update, measure_error in ((False, True), (True, False), (True, True)):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()
    run(json.loads(sys.argv[1]), HessianUse(update, measure_error))
    found.append(peak() - before)
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from /proc")
def test_peak_bytes_is_what_is_resident():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # freed is returned
    words = [sys.executable, "-c", MEASURED, json.dumps(WIDTHS)]
    found = json.loads(subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    for use, measured in zip(
        (HessianUse(False, True), HessianUse(True, False), HessianUse(True, True)), found, strict=True
    ):
        formula = peak_bytes(WIDTHS, use)
        assert 0.85 * formula - NOISE < measured < formula + NOISE, (use, measured / MIB, formula / MIB)


def test_peak_bytes_by_hand(monkeypatch):
    monkeypatch.setattr(hessian_memory, "FACTORING", 3)
    update, measured = HessianUse(True, False), HessianUse(True, True)
    assert peak_bytes([10], HessianUse(False, True)) == 4 * 100
    assert peak_bytes([10], update) == 4 * 400  # one, and three while it is factored
    assert peak_bytes([10, 10, 10], update) == 4 * 600
    assert peak_bytes([10, 10, 10], measured) == 4 * (300 + 200 + 300)  # two factors are there
    assert peak_bytes([], update) == 0


def test_what_visits_the_gpu_of_hessians_on_the_host():
    assert visiting_bytes(None) == visiting_bytes(HessianUse(True, True)) == 0
    assert visiting_bytes(HessianUse(True, True, on_host=frozenset({64, 160}))) == 4 * 160**2
    assert visiting_bytes(HessianUse(True, True, on_host=frozenset({64, 28_672}))) == 256 * MIB


def test_auto_places_the_widest_on_the_host(monkeypatch):
    """160 inputs of the down projection; 64 of six others, each counted with a Hessian of its own."""
    blocks = find_blocks(FAMILIES["llama3"]())
    free = {"cuda": 0, "cpu": 10 * MIB}
    monkeypatch.setattr(hessian_memory, "free_memory", lambda device: free[device.type])

    def on_host(device_memory, where="auto", device="cuda", before=None):
        free["cuda"], use = device_memory, HessianUse(True, True)
        place_hessians(blocks, torch.device(device), where, use, before)
        return set(use.on_host)

    whole = peak_bytes([160, *[64] * 6], HessianUse(True, True))
    assert on_host(2 * whole) == set()
    assert on_host(2 * whole - 2) == {160}
    assert on_host(2 * peak_bytes([64] * 6, HessianUse(True, True)) - 2) == {64, 160}
    assert on_host(2 * whole - 2, "device") == set() and on_host(2 * whole, "host") == {64, 160}
    assert on_host(0, "host", "cpu") == set()  # the device is the host
    assert on_host(2 * whole, before=[160]) == {160}  # a resumed run keeps to its first choice
    assert on_host(2 * whole, "device", before=[160]) == set()
    with pytest.raises(errors.OutOfMemoryError, match="Hessian of 160 inputs takes 0 MiB .* and cuda"):
        on_host(1000, "device")
    free["cpu"] = 1000
    with pytest.raises(errors.OutOfMemoryError, match="Hessian of 160 inputs .* and cpu has 0 MiB free"):
        on_host(2 * whole, "host")
