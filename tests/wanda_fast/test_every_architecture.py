"""Architectures unlike Llama, in bfloat16. `python -m tests.every_architecture` judges all of them."""

import pytest

from tests import every_architecture

pytestmark = pytest.mark.usefixtures("one_thread")

UNLIKE_LLAMA = ("bloom", "codegen", "deepseek_v3", "falcon", "got_ocr2", "granitemoehybrid", "jamba")
UNLIKE_LLAMA += (
    "gpt2",
    "gpt_oss",
    "llama4_text",
    "longcat_flash",
    "jetmoe",
    "mamba",
    "mamba2",
    "mpt",
    "nemotron_h",
    "openai-gpt",
    "recurrent_gemma",
    "rwkv",
    "zamba2",
)


@pytest.mark.parametrize("name", UNLIKE_LLAMA)
def test_pruned_as_the_model_that_it_is(name, tmp_path):
    assert every_architecture.judge(name, tmp_path).startswith("ok: ")


@pytest.mark.parametrize("name", ["xlm"])
def test_refused(name, tmp_path):
    assert every_architecture.judge(name, tmp_path).startswith("refused: ")
