"""Without a compiler the build gives a pure Python wheel and says what is missing."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path):
    """A copy of what setup.py reads, with an empty `wanda_fast`: these tests concern the build alone."""
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "wanda_fast").mkdir()
    (tmp_path / "wanda_fast" / "__init__.py").touch()
    return tmp_path


def build_wheel(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    # The hook that pip calls. `setup.py bdist_wheel` is deprecated and prints a warning.
    program = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    command = [sys.executable, "-c", program]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDA_", "CXX"))}
    clean |= {"PYTHONPATH": "", **environment}
    return subprocess.run(command, cwd=tree, env=clean, capture_output=True, text=True)


def test_no_compiler_gives_a_pure_wheel(tree):
    said = build_wheel(tree, PATH=str(tree))
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("libwanda_cpu.so is left out: no C++ compiler found (c++, g++, clang++)") == 1
    assert [wheel.name for wheel in (tree / "dist").iterdir()] == ["wanda_fast-0.1.0-py3-none-any.whl"]


def test_a_library_asked_for_by_name_must_build(tree):
    said = build_wheel(tree, PATH=str(tree), WANDA_FAST_CPU="1")
    assert said.returncode != 0
    assert "cannot build libwanda_cpu.so: no C++ compiler found" in said.stderr


@pytest.mark.skipif(not Path("/bin/false").exists(), reason="needs a compiler that fails")
def test_a_failing_compiler_leaves_the_library_out(tree):
    said = build_wheel(tree, CXX="/bin/false", WANDA_FAST_CUDA="0")
    assert said.returncode == 0, said.stderr
    assert "libwanda_cpu.so is left out: its build failed" in said.stderr


def test_a_wrong_setting_is_named(tree):
    said = build_wheel(tree, WANDA_FAST_CPU="yes")
    assert said.returncode != 0 and "WANDA_FAST_CPU must be 0, 1 or auto, got 'yes'" in said.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets of x86")
def test_every_instruction_set_that_a_file_uses_is_checked_at_run_time(tmp_path):
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    native_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native_build)
    if native_build.why_not("cpu"):
        pytest.skip(native_build.why_not("cpu"))
    steps = native_build._cpu_steps(tmp_path / "libwanda_cpu.so", sanitize=False)
    flags = {
        target.stem: {flag[2:] for flag in command if flag.startswith("-m")} for target, _, command in steps
    }
    dispatch = "".join(path.read_text() for path in (ROOT / "csrc" / "cpu").glob("dispatch_*.cpp"))
    assert set().union(*flags.values()) <= set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', dispatch))
    expands = ["cpu_packed_rows_avx512", "cpu_sparse_linear_avx512"]
    assert [name for name in flags if "avx512vbmi2" in flags[name]] == expands
    assert not any("avx512bf16" in each for name, each in flags.items() if name.startswith("cpu_kernels"))
    assert not any(each for name, each in flags.items() if not name.endswith(("_avx2", "_avx512")))


SAYS = """
#include <cstring>

#include "require.h"

extern "C" void say(char* text) {
  try {
    wanda::require(false, "root must have ", int64_t{16}, " elements");
  } catch (const std::runtime_error& error) {
    std::strcpy(text, error.what());
  }
}
"""


def test_a_library_with_a_static_libstdcxx_gives_the_whole_message(tmp_path):
    compiler = os.environ.get("CXX", "c++").split()
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    (tmp_path / "says.cpp").write_text(SAYS)
    flags = ["-std=c++17", "-fPIC", "-I", ROOT / "csrc", "-c", "-o", "says.o"]
    subprocess.run([*compiler, *flags, "says.cpp"], check=True, cwd=tmp_path)
    link = [*compiler, "-shared", "-static-libstdc++", "says.o", "-o", "says.so"]
    if subprocess.run(link, cwd=tmp_path).returncode:
        pytest.skip("no libstdc++.a")
    text = ctypes.create_string_buffer(100)
    ctypes.CDLL(tmp_path / "says.so").say(text)
    assert text.value == b"root must have 16 elements"
