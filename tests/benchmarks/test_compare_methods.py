"""The table of methods of `make prune`."""

import os
import subprocess
import sys

from benchmarks.core import machine


def test_bad_input_is_one_sentence():
    command = [sys.executable, "-m", "benchmarks.compare_methods", "--model", "no/such/model"]
    paths = os.pathsep.join([str(machine.ROOT), str(machine.ROOT / "kernels")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 2 and "no/such/model" in done.stderr and "Traceback" not in done.stderr
