"""The package must not break other packages, and must import cheaply."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_kernels_is_no_package():
    """Hugging Face ships a package `kernels`. A second one of that name would break every model import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    program = "import transformers.models.llama.modeling_llama as m; print(m.LlamaForCausalLM.__name__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_import_is_cheap_and_leaves_optional_packages_alone():
    """`datasets` and `gguf` are imported where they are used, because not every machine has them."""
    modules = "('datasets', 'gguf', 'lm_eval', 'rich')"
    program = f"import sys, wanda_fast; print([name for name in {modules} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
