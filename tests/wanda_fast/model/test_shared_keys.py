"""Blocks that pass on more than hidden states: blocks of Gemma 4 read keys and values of earlier ones."""

import copy
import os
import signal

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import wanda_fast
from tests.tiny_models import GQA, WINDOW, token_ids
from wanda_fast import errors

pytestmark = pytest.mark.usefixtures("one_thread")

NBLOCKS = 4
# The last two blocks have no keys and values of their own.
KINDS = ["sliding_attention", "full_attention"] * 2
KEYS = dict(layer_types=KINDS, num_kv_shared_layers=2, sliding_window=WINDOW, head_dim=16, global_head_dim=16)
PER_LAYER = dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=320)


@pytest.fixture(scope="module")
def model():
    config = hf.Gemma4TextConfig(**GQA | dict(num_hidden_layers=NBLOCKS) | KEYS | PER_LAYER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prune(model, tmp_path_factory):
    """A function that prunes the checkpoint into a folder, or, with None, a copy of the model in memory."""
    folder = tmp_path_factory.mktemp("gemma4")
    model.save_pretrained(folder)

    def prune(out, **options):
        pruned = str(folder) if out else copy.deepcopy(model)
        options |= dict(dataset=token_ids(model, 3, 24), eval_dataset=token_ids(model, 4, 24, seed=1))
        report = wanda_fast.prune(pruned, seqlen=24, batch_size=2, save_model=out, **options)
        return report, load_file(out / "model.safetensors") if out else pruned.state_dict()

    return prune


class StopAt:
    """A progress display that sends Ctrl-C during the selection of a block."""

    def __init__(self, block):
        self.block = block

    def step(self, phase, done, total, detail=""):
        if (phase, done) == ("selection", self.block):
            self.block = None
            os.kill(os.getpid(), signal.SIGINT)


def test_streamed_perplexities_equal_those_in_memory(prune, tmp_path):
    expected, tensors = prune(None)
    report, streamed = prune(tmp_path / "out")
    assert report.perplexity == expected.perplexity
    assert all(torch.equal(streamed[name], tensors[name]) for name in streamed)


def test_resumed_at_a_block_that_reads_keys_of_earlier_ones(prune, tmp_path):
    expected, tensors = prune(tmp_path / "unbroken")
    with pytest.raises(errors.InterruptedRunError, match=f"stopped after block {NBLOCKS - 1} of {NBLOCKS}"):
        prune(tmp_path / "out", progress=StopAt(NBLOCKS - 2))
    report, resumed = prune(tmp_path / "out", resume=True)
    assert report.perplexity == expected.perplexity
    assert all(torch.equal(resumed[name], tensors[name]) for name in tensors)
