"""SmolLM2-135M, all of its blocks, in float32: the driver against the published algorithm."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import wanda_fast
from tests.published import perplexity_published, prune_published

EQUAL_MASKS = 0.9999  # of all weights: sums may differ in the last bit
PERPLEXITY_RTOL = 1e-3
NSAMPLES, SEQLEN = 4, 128


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    gguf = next(smollm2_folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=gguf)
    return AutoModelForCausalLM.from_pretrained(
        smollm2_folder, gguf_file=gguf, dtype=torch.float32
    ), tokenizer


@pytest.fixture(scope="module")
def pydoc_ids(smollm2, pydoc_text):
    """Calibration [4, 128] from the text's beginning, evaluation [1, 512] from its end."""
    ids = [
        smollm2[1](part, return_tensors="pt").input_ids for part in (pydoc_text[:4000], pydoc_text[-4000:])
    ]
    return ids[0][0, : NSAMPLES * SEQLEN].reshape(NSAMPLES, SEQLEN), ids[1][:, : 4 * SEQLEN]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("connect", dict(sparsity_type="2:4", sparsity_ratio=None)), ("wanda", dict(sparsity_ratio=0.5))],
    ids=["connect-2:4", "wanda-0.5"],
)
def test_same_masks_and_perplexity_as_published(smollm2, pydoc_ids, method, pattern):
    calibration, evaluation = pydoc_ids
    expected, model = copy.deepcopy(smollm2[0]), copy.deepcopy(smollm2[0])
    masks = prune_published(expected, calibration, method, pattern.get("sparsity_type", "0.5"))
    report = wanda_fast.prune(model, prune_method=method, dataset=calibration, **pattern)

    assert len(masks) == 7 * 30 and report.linears.keys() == masks.keys()
    zeros = {name: model.get_submodule(name).weight == 0 for name in masks}
    differing = sum((zeros[name] != mask).sum().item() for name, mask in masks.items())
    total = sum(mask.numel() for mask in masks.values())
    assert differing <= (1 - EQUAL_MASKS) * total, f"{differing} of {total} masks differ"
    assert report.sparsity == pytest.approx(sum(z.sum().item() for z in zeros.values()) / total, abs=1e-6)

    measured = wanda_fast.perplexity(model, evaluation, seqlen=SEQLEN)
    assert measured == pytest.approx(perplexity_published(expected, evaluation, SEQLEN), rel=PERPLEXITY_RTOL)
