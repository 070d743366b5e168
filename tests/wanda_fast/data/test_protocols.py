"""Windows as published, and what they can be compared with."""

import pytest
import torch

import wanda_fast
from tests import tiny_models
from wanda_fast import errors
from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.data.protocols import PROTOCOLS, comparable_with, window_of
from wanda_fast.options.all_options import Options


def of(nwindows=2, seqlen=2048, label="wikitext2 test", **facts):
    return EvaluationSet(torch.zeros(nwindows, seqlen, dtype=torch.int64), label, **facts)


def test_the_windows_of_the_published_code():
    assert [window_of("wanda", context) for context in (2048, 4096, 131072)] == [2048, 4096, 8192]
    assert [window_of(protocol, 10**6) for protocol in PROTOCOLS] == [8192, 2048, 4096, 8192]
    assert Options.__dataclass_fields__["protocol"].metadata["choices"] == PROTOCOLS


def test_only_published_windows_are_comparable():
    assert comparable_with(of()) == (
        "tables on WikiText-2 with windows of 2048 (dense LLaMA-2-7B 5.47, LLaMA-3-8B 6.14)"
    )
    assert comparable_with(of(seqlen=100, label="a.txt", is_limited=True, bos=True)) == (
        "no published table (text a.txt, the first 2 windows only, windows begin with BOS, windows of 100)"
    )


def test_the_evaluation_has_a_window_of_its_own():
    model = tiny_models.build("llama2")
    ids = tiny_models.token_ids(model, 2, 16)
    found = wanda_fast.prune(
        model, dataset=ids, eval_dataset=torch.cat([ids] * 20), seqlen=16, protocol="wanda"
    )
    assert found.calibration["shape"] == [2, 16]
    assert "2 windows of 256" in found.perplexity["protocol"]
    with pytest.raises(errors.CalibrationError, match="of 2048 tokens exceed .* 256: lower --protocol"):
        wanda_fast.prune(model, dataset=ids, eval_dataset=ids.repeat(200, 1), seqlen=16, protocol="2048")
    # Said before any text is looked for.
    with pytest.raises(errors.CalibrationError, match="windows of 300 tokens exceed .* 256: lower --seqlen"):
        wanda_fast.prune(model, dataset="no/such.txt", seqlen=300, tokenizer=object())
