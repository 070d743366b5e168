"""Ranks that are killed: the others end, and `--resume` goes on with any number of ranks."""

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import wanda_fast
from tests.tiny_models import CONFIGS, save_checkpoint, token_ids
from tests.wanda_fast.distributed.processes import Ranks, free_port, run_ranks
from wanda_fast.distributed import torchrun

BLOCKS = 12
OPTIONS = {"prune_method": "sparsegpt", "sparsity_ratio": 0.5, "seqlen": 24, "batch_size": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint of many blocks, and calibration tokens."""
    import transformers

    config = CONFIGS["llama2"]()
    config.num_hidden_layers = BLOCKS
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("dense")
    save_checkpoint(model, folder, "some words to train a tokenizer on " * 20)
    return str(folder), token_ids(model, 5, 24)


def prune(group, folder, ids, out, slow=0.0):
    """Prune with `resume`; `slow` seconds longer for each block, so that a kill finds it at work."""
    if slow:
        from wanda_fast.pruning import block_loop

        own = block_loop.require_same_weights
        block_loop.require_same_weights = lambda *what: (time.sleep(slow), own(*what))
    report = wanda_fast.prune(
        folder, dataset=ids, eval_dataset=ids, save_model=out, resume=True, process_group=group, **OPTIONS
    )
    return report.warnings, report.perplexity["pruned"]


def test_killed_at_random_and_resumed_by_any_number(dense, tmp_path):
    """Eight times a random rank is killed at a random moment; the others end within a minute."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = run_ranks(2, prune, *dense, str(whole))[0][1]
    chance, kept, kills = random.Random(7), 0, 0
    while kills < 8:
        size = chance.choice([2, 3])
        ranks = Ranks(size, prune, *dense, str(out), 0.1)
        time.sleep(chance.uniform(0.0, 1.5))
        killed = chance.randrange(size)
        os.kill(ranks.processes[killed].pid, signal.SIGKILL)
        ranks.end_within(60)
        if out.exists():
            break
        kills += 1
        now = len(list((tmp_path / "out.partial").glob("block-*.json")))
        assert now >= kept, "a block that was finished is lost"
        kept = now
    warnings, perplexity = run_ranks(3, prune, *dense, str(out))[0]
    assert perplexity == pytest.approx(expected, rel=1e-4)
    if kept:
        assert any("by another number of ranks" in sentence for sentence in warnings)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight == 0, other[name] == 0), name
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-3)


def test_the_same_number_of_ranks_gives_the_same_bytes_after_a_kill(dense, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_ranks(2, prune, *dense, str(whole))
    ranks = Ranks(2, prune, *dense, str(out), 0.1)
    while not (tmp_path / "out.partial" / "block-00003.json").exists():
        time.sleep(0.01)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    ranks.end_within(60)
    run_ranks(2, prune, *dense, str(out))
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def stand_still(group, port):
    """Rank 1 stops, and gives no more signs of life; what rank 0 gets to know is its exit code."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torchrun.PERIOD, torchrun.SILENCE, torchrun.GRACE = 0.1, 1.5, 0.5
    watch = torchrun.Watch()
    watch.start()
    if watch.rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def test_a_rank_that_stands_still_ends_the_others():
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    ranks = Ranks(3, stand_still, port)
    for rank in (0, 2):
        ranks.processes[rank].join(60)
        assert ranks.processes[rank].exitcode == 2
    ranks.processes[1].kill()
    said = json.loads(torch.distributed.PrefixStore("wanda_fast/run0", store).get(torchrun.FAILURE))
    assert said["rank"] == 0 and f"rank 1 (process {ranks.processes[1].pid} on" in said["why"]
    assert "has not answered for" in said["why"]
