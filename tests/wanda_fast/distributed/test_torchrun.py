"""The command line under torchrun: two machines, and one sentence if the ranks fail."""

import json
import os
import subprocess
import sys

import pytest

import wanda_fast
from tests.tiny_models import build, save_checkpoint
from tests.wanda_fast.distributed.processes import free_port

TEXT = "some words that the tokenizer learns and that the model is calibrated on, again and again. "
FLAGS = ["--sparsity-type", "2:4", "--nsamples", "5", "--seqlen", "16", "--eval-windows", "5"]
FLAGS += ["--batch-size", "1"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    (folder / "words.txt").write_text(TEXT * 30)
    save_checkpoint(build("llama2"), folder / "model", TEXT * 20)
    return folder


def torchrun(dense, *words, **environment):
    """Start `torchrun ... -m wanda_fast prune` on the checkpoint."""
    flags = ["--model", dense / "model", "--dataset", dense / "words.txt", *FLAGS]
    command = [sys.executable, "-m", "torch.distributed.run", *words[0], "-m", "wanda_fast", "prune"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    return subprocess.Popen([*map(str, command + flags + list(words[1:]))], env=environment, **pipes)


def test_two_machines_prune_to_the_end(dense):
    """Two agents that meet at one address, each with a process, as on two machines."""
    meet = ["--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d"]
    meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "pair"]
    agents = [torchrun(dense, meet, "--save-model", dense / "pruned") for _ in range(2)]
    said = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    printed = [out for out, _ in said]
    assert sum("perplexity, pruned" in out for out in printed) == 1
    assert sum("2 on 1 machine;" in out for out in printed) == 1
    report = json.loads((dense / "pruned" / "wanda_fast.json").read_text())
    alone = wanda_fast.prune(
        dense / "model",
        dataset=dense / "words.txt",
        eval_dataset=dense / "words.txt",
        sparsity_type="2:4",
        nsamples=5,
        seqlen=16,
        eval_windows=5,
        batch_size=1,
        save_model=dense / "alone",
    )
    assert report["perplexity"]["pruned"] == pytest.approx(alone.perplexity["pruned"], rel=1e-5)
    one, other = (dense / name / "model.safetensors" for name in ("alone", "pruned"))
    assert one.read_bytes() == other.read_bytes()


def test_one_sentence_if_the_ranks_fail(dense):
    run = torchrun(dense, ["--nproc-per-node", 2, "--standalone"], "--save-model", dense / "words.txt")
    out, err = run.communicate(timeout=240)
    assert run.returncode != 0 and "Traceback" not in err.split("torch/distributed/elastic")[0]
    assert (out + err).count("wanda-fast: ") == 1
    assert f"wanda-fast: output {dense / 'words.txt'} exists and is not a folder" in err
