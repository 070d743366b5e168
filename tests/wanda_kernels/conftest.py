"""The `backend` fixture: every backend here that serves the OPERATION which a test module names."""

import pytest
import torch

from wanda_kernels.dispatch import backends

GPU = "cuda" if torch.cuda.is_available() else "cpu"


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else GPU


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames and hasattr(metafunc.module, "OPERATION"):
        operation = metafunc.module.OPERATION
        names = [b for b in backends.BACKENDS if not backends.why_not(operation, device_of(b), b)]
        metafunc.parametrize("backend", names)


@pytest.fixture
def device(backend):
    return device_of(backend)


def pytest_collection_modifyitems(items):
    if GPU == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(
                    pytest.mark.skip(reason="no GPU here: real shapes take hours in the interpreter")
                )
