"""A streamed run's memory does not grow with the model, and its phases add up to its time."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

# Bound on the peak as a share of the checkpoint, above the memory of Python, torch and a first small run.
SHARE = 0.35
# Bytes by which the peak may grow from 12 to 24 blocks of 14 MiB: noise of the allocator.
GROWTH = 64 * 2**20
# Bytes above the predicted peak, for the allocator and small tensors.
SLACK = 48 * 2**20
BLOCK = dict(hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12)
TINY = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2)
EXPERTS = dict(hidden_size=256, intermediate_size=544, num_attention_heads=4, num_key_value_heads=4)
EXPERTS |= dict(num_local_experts=16)
METHODS, NSAMPLES = ("wanda", "connect"), (4, 32)

# The clock counts this process's CPU time, which does not depend on what else the machine does. The peak is
# the kernel's own record: a thread that samples the memory can be late.
MEASURED = """
import gc, json, sys, time, torch, wanda_fast
from types import SimpleNamespace
from wanda_fast import timer
from wanda_fast.memory import release_freed_memory
timer.time = SimpleNamespace(perf_counter=time.process_time)
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
def run(model, out, method="wanda", nsamples=8, evaluate=True, batch_size=2, dtype="bfloat16"):
    tokens = torch.randint(256, (nsamples, 128))
    return wanda_fast.prune(model, prune_method=method, sparsity_type="2:4", dataset=tokens, seqlen=128,
                            eval_dataset=tokens[:4] if evaluate else None, batch_size=batch_size,
                            device="cpu", dtype=dtype, save_model=out)
folder, cases = sys.argv[1], json.loads(sys.argv[2])
run(folder + "/tiny", folder + "/tiny.out", "connect")
for number, (model, *case) in enumerate(cases):
    gc.collect()
    release_freed_memory()
    forget_peak()
    before, began = peak(), time.process_time()
    report = run(f"{folder}/{model}", f"{folder}/{number}.out", *case)
    total = time.process_time() - began
    print(json.dumps({"peak": peak() - before, "total": total, "seconds": report.seconds,
                      "predicted": report.predicted_memory["host"]}))
"""


def build(folder, nblocks, sizes, kind=LlamaConfig):
    config = kind(vocab_size=256, num_hidden_layers=nblocks, max_position_embeddings=256, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(blocks, method, sequences, ...) -> (bytes of the checkpoint, the object that MEASURED printed)."""
    folder = tmp_path_factory.mktemp("costs")
    build(folder / "tiny", 2, TINY)
    sizes = {nblocks: build(folder / str(nblocks), nblocks, BLOCK) for nblocks in (3, 12, 24)}
    sizes["experts"] = build(folder / "experts", 24, EXPERTS, MixtralConfig)
    cases = [
        (12,),
        (24,),
        ("experts",),
        *((3, *case, False, None, "auto") for case in itertools.product(METHODS, NSAMPLES)),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-c", MEASURED, str(folder), json.dumps(cases)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True)
    # The output is a model that loads.
    AutoModelForCausalLM.from_pretrained(folder / "1.out")
    lines = done.stdout.splitlines()[-len(cases) :]
    return {case: (sizes[case[0]], json.loads(line)) for case, line in zip(cases, lines, strict=True)}


needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from /proc"
)


@needs_proc
def test_peak_memory_is_a_few_blocks(measured):
    (_, small), (size, large) = measured[12,], measured[24,]
    assert large["peak"] < SHARE * size
    assert large["peak"] < small["peak"] + GROWTH


@needs_proc
def test_peak_memory_of_experts_is_a_few_blocks(measured):
    size, run = measured["experts",]
    assert run["peak"] < SHARE * size
    assert run["peak"] <= 1.15 * run["predicted"] + SLACK


@needs_proc
@pytest.mark.parametrize("nsamples", NSAMPLES)
@pytest.mark.parametrize("method", METHODS)
def test_the_formula_predicts_the_peak(method, nsamples, measured):
    run = measured[3, method, nsamples, False, None, "auto"][1]
    assert run["peak"] <= 1.15 * run["predicted"] + SLACK
    assert run["predicted"] <= 2 * run["peak"]


def test_phases_add_up_to_the_run(measured):
    for _, run in (measured[12,], measured[24,]):
        assert sum(run["seconds"].values()) == pytest.approx(run["total"], rel=0.05)
        assert {"load", "read", "dense pass", "statistics", "selection", "pruned pass", "evaluation"} <= set(
            run["seconds"]
        )
