import pytest
import torch

import wanda_kernels
from wanda_kernels import backends, coactivation_paths


def test_every_cell_of_the_table_is_a_function():
    for operation, row in backends.TABLE.items():
        assert "torch" in row
        for backend in row:
            if backend in ("torch", "triton"):
                assert callable(backends.implementation(operation, backend))


def test_an_unknown_backend_is_named():
    with pytest.raises(wanda_kernels.BackendError, match="'numpy': choose auto, torch, triton"):
        wanda_kernels.prune_rows_(torch.ones(2, 4), None, 1, backend="numpy")


def test_triton_serves_the_cpu_only_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in backends.why_not.__wrapped__("prune_rows_", "cpu", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.why_not.__wrapped__("prune_rows_", "cpu", "triton") == ""
    assert backends.why_not.__wrapped__("prune_rows_", "cuda", "triton") == ""


def test_triton_may_be_absent(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.why_not.__wrapped__("prune_rows_", "cuda", "triton") == "triton is not installed"


def test_auto_never_interprets(monkeypatch):
    monkeypatch.delenv("WANDA_KERNELS_BACKEND", raising=False)
    assert backends.choose("prune_rows_", "cpu") in ("cpu", "torch")


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "torch")
    assert backends.choose("prune_rows_", "cpu") == "torch"
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "no such")
    with pytest.raises(wanda_kernels.BackendError, match="no such"):
        backends.choose("prune_rows_", "cpu")


def test_coactivation_paths_by_architecture_and_shape():
    assert coactivation_paths.path((9, 0), 11008, 4096) == "addmm"
    assert coactivation_paths.path((8, 0), 11008, 4096) == "fused"
    assert coactivation_paths.path((8, 6), 512, 512) == "addmm"
    assert coactivation_paths.path((7, 5), 11008, 4096) == "fused"
