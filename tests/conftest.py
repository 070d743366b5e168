"""What every test shares: Triton's interpreter where there is no GPU, and no network."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before the first `import triton`
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers fill the cores; threads of theirs would spin against each other
os.environ["COLUMNS"] = "200"  # tables are read by tests: not cut to a narrow terminal
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def language_patched_once():
    """Triton's interpreter patches triton.language for a kernel, and again in each call of a device function.

    That is a seventh of the time that interpreted kernels take. Nothing undoes the first patch of a module of
    device functions, so one is enough.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(scope="module")
def one_thread():
    """Tiny matrices gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
