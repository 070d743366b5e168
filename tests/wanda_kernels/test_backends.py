import subprocess
import sys

import pytest
import torch

import wanda_kernels
from wanda_kernels.dispatch import backends
from wanda_kernels.native import library
from wanda_kernels.triton_ops.add_coactivation import path

CELLS = [(operation, backend) for operation, row in backends.TABLE.items() for backend in row]


@pytest.mark.parametrize(("operation", "backend"), CELLS)
def test_a_cell_of_the_table_is_the_operation_of_its_row(operation, backend):
    """Called without operands, the function behind the cell names itself in Python's error."""
    with pytest.raises(TypeError, match=rf"^{operation}\(\) missing"):
        backends.TABLE[operation][backend]()


def test_torch_is_the_last_resort_of_every_operation():
    assert all(list(row)[-1] == "torch" for row in backends.TABLE.values())
    assert wanda_kernels.OPERATIONS == tuple(backends.TABLE)


def test_the_order_is_by_operation_and_device():
    assert backends.order("prune_rows_", "cuda") == ("cuda", "triton", "torch")
    assert backends.order("prune_nm_", "cuda") == ("triton", "torch")
    assert backends.order("prune_rows_", "cpu") == ("cpu", "torch")
    assert backends.order("prune_rows_", "meta") == ("torch",)


def test_the_package_does_not_import_triton():
    """It may be absent, and it reads TRITON_INTERPRET when it is imported."""
    statement = "import sys, wanda_kernels, wanda_kernels.forward; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", statement]).returncode == 0


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


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to the backend choice that there is a GPU with the CUDA library; nothing stays cached."""
    monkeypatch.delenv("WANDA_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(library, "why_not", lambda backend: "")
    monkeypatch.setattr(library, "why_not_on_gpu", lambda index: "")
    for cached in (backends.why_not, backends._first_available):
        cached.cache_clear()
    yield torch.device("cuda", 1)
    for cached in (backends.why_not, backends._first_available):
        cached.cache_clear()


def test_auto_takes_triton_where_the_cuda_library_has_no_code_for_the_gpu(gpu, monkeypatch):
    assert backends.choose_backend("prune_rows_", gpu) == "cuda"
    other = torch.device("cuda", 2)
    said = "no kernel image is available"
    monkeypatch.setattr(library, "why_not_on_gpu", lambda index: said if index == 2 else "")
    assert backends.choose_backend("prune_rows_", other) == "triton"
    assert backends.choose_backend("prune_rows_", gpu) == "cuda"
    with pytest.raises(wanda_kernels.BackendError, match=f"on cuda:2 tensors: {said}"):
        backends.choose_backend("prune_rows_", other, "cuda")


def test_auto_takes_torch_where_the_gpu_is_too_old_for_triton(gpu, monkeypatch):
    assert backends.choose_backend("add_hessian_", gpu) == "triton"
    backends.why_not.cache_clear()
    backends._first_available.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backends.choose_backend("add_hessian_", gpu) == "torch"
    assert backends.why_not("add_hessian_", gpu, "triton").endswith("capability 8.0, cuda:1 has 7.5")


def test_auto_never_interprets(monkeypatch):
    monkeypatch.delenv("WANDA_KERNELS_BACKEND", raising=False)
    assert backends.choose_backend("prune_rows_", "cpu") in ("cpu", "torch")


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "torch")
    assert backends.choose_backend("prune_rows_", "cpu") == "torch"
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "no such")
    with pytest.raises(wanda_kernels.BackendError, match="no such"):
        backends.choose_backend("prune_rows_", "cpu")


def test_coactivation_paths_by_architecture_and_shape():
    assert path((9, 0), 11008, 4096) == "addmm"
    assert path((8, 0), 11008, 4096) == "fused"
    assert path((8, 6), 512, 512) == "addmm"
    assert path((7, 5), 11008, 4096) == "fused"
