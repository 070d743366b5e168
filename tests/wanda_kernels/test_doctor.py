"""`diagnose()` reports the true state, on a machine with the native libraries and on one without."""

import torch

from wanda_kernels import OPERATIONS, choose_backend, diagnose
from wanda_kernels.dispatch import backends
from wanda_kernels.native import library


def facts() -> dict[tuple[str, str], str]:
    return {(section, name): value for section, name, value in diagnose()}


def test_report_names_versions_and_the_backend_of_every_operation():
    found = facts()
    assert torch.__version__ in found["versions", "torch"]
    for operation in OPERATIONS:
        assert found["operations", f"{operation} on cpu"].split()[0] == choose_backend(operation, "cpu")
    state = found["libraries", "libwanda_cpu.so"]
    assert state == library.why_not("cpu") or state.startswith("loaded from ")


def test_report_says_why_a_library_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDA_KERNELS_NATIVE_DIR", str(tmp_path))
    caches = (library.why_not, backends.why_not, backends._first_available)
    try:
        for each in caches:
            each.cache_clear()
        found = facts()
    finally:
        monkeypatch.undo()
        for each in caches:
            each.cache_clear()
    assert "was not built" in found["libraries", "libwanda_cpu.so"]
    chosen = found["operations", "prune_rows_ on cpu"]
    assert chosen.startswith("torch (cpu: libwanda_cpu.so was not built")


def test_report_names_a_forced_backend_that_cannot_serve(monkeypatch):
    monkeypatch.setenv("WANDA_KERNELS_BACKEND", "cuda")
    assert "cannot serve prune_rows_" in facts()["operations", "prune_rows_ on cpu"]
