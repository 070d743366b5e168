import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.compile_report import MODULES, SHARED_LIMIT, Usage

ROOT = Path(__file__).parents[2]


def test_every_kernel_of_the_tables_compiles_without_a_spill():
    """For sm_80 and sm_90, in a process without TRITON_INTERPRET; 75 s on two cores with an empty cache."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tools.compile_report"]
    report = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert report.returncode == 0, report.stdout + report.stderr
    rows = [line.split(" | ") for line in report.stdout.splitlines() if line.startswith("| sm_")]
    assert all(int(row[3]) == 0 for row in rows)
    assert {row[0] for row in rows} == {"| sm_80", "| sm_90"}
    compiled = {row[1].split()[0] for row in rows}
    assert compiled == {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_a_spill_or_too_much_shared_memory_is_over_budget(arch):
    assert Usage(255, 0, SHARED_LIMIT[arch]).excess(arch) == ""
    assert "8 bytes of stack" in Usage(64, 8, 0).excess(arch)
    assert str(SHARED_LIMIT[arch]) in Usage(64, 0, SHARED_LIMIT[arch] + 1).excess(arch)
