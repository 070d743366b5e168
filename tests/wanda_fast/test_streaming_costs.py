"""What a streamed run costs: memory that does not grow with the model, and seconds that are accounted for."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHARE = 0.35  # of the checkpoint, above what Python, torch and a first small run take
GROWTH = 24 * 2**20  # bytes, from 12 to 24 blocks: two blocks' worth of allocator noise
BLOCK = dict(hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12)
TINY = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2)

MEASURED = """
import json, sys, threading, time, torch, wanda_fast
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
def run(model, out):
    tokens = torch.randint(256, (8, 128))
    return wanda_fast.prune(model, dataset=tokens, eval_dataset=tokens[:4], seqlen=128, sparsity_type="2:4",
                            batch_size=2, device="cpu", save_model=out)
def watch():
    while not done:
        seen.append(resident())
        time.sleep(0.002)
tiny, model, out = sys.argv[1:]
run(tiny, out + ".tiny")
before, seen, done = resident(), [], False
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
report = run(model, out)
wall = time.perf_counter() - began
done = True
watcher.join()
print(json.dumps({"peak": max(seen) - before, "wall": wall, "seconds": report.seconds}))
"""


def build(folder, nblocks, sizes):
    config = LlamaConfig(vocab_size=256, num_hidden_layers=nblocks, max_position_embeddings=256, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Blocks -> (bytes of the checkpoint, what MEASURED printed)."""
    folder, found = tmp_path_factory.mktemp("costs"), {}
    build(folder / "tiny", 2, TINY)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    # glibc by itself keeps freed tensors for reuse, more or less by chance: count what is held, not that
    environment |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    for nblocks in (12, 24):
        size = build(folder / str(nblocks), nblocks, BLOCK)
        folders = [str(folder / name) for name in ("tiny", str(nblocks), f"{nblocks}.out")]
        words = [sys.executable, "-c", MEASURED, *folders]
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True)
        found[nblocks] = size, json.loads(done.stdout)
    AutoModelForCausalLM.from_pretrained(folder / "24.out")  # not written in vain
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_peak_memory_is_a_few_blocks(measured):
    (_, small), (size, large) = measured[12], measured[24]
    assert large["peak"] < SHARE * size
    assert large["peak"] < small["peak"] + GROWTH


def test_phases_add_up_to_the_wall_time(measured):
    for _, run in measured.values():
        assert sum(run["seconds"].values()) == pytest.approx(run["wall"], rel=0.05)
        assert {"load", "read", "dense pass", "statistics", "selection", "pruned pass", "evaluation"} <= set(
            run["seconds"]
        )
