"""The wheel serves the CPU library in an environment that has no compiler."""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_LIBRARY = "wanda_kernels/native/libwanda_cpu.so"
PIP = [sys.executable, "-m", "pip"]

# Keep 2 of 4: the two largest of |w| * sqrt(scale) in each group.
PROGRAM = """
import shutil
import torch, wanda_fast, wanda_kernels

assert not any(map(shutil.which, ("c++", "g++", "clang++", "gcc", "cc", "nvcc")))
weight = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, 5.0, 5.0, 5.0]])
scale = torch.tensor([64.0, 1.0, 1.0, 1.0, 1.0, 4.0, 1.0, 4.0])
wanda_kernels.prune_nm_(weight, scale, 2, 4, backend="cpu")
sq_norm = torch.zeros(3)
wanda_kernels.add_sq_norm_(sq_norm, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), backend="cpu")
print(weight.tolist(), sq_norm.tolist(), wanda_fast.__file__, wanda_kernels.__file__, sep="\\n")
"""


def native_build():
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as `make wheel` builds it. Objects in build/native are reused."""
    if reason := native_build().why_not("cpu"):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("dist")
    command = [*PIP, "wheel", ROOT, "--no-deps", "--no-index", "--no-build-isolation", "-w", folder]
    built = subprocess.run(command, env=os.environ | {"WANDA_FAST_CPU": "1"}, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "Deprecat" not in built.stdout + built.stderr
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, and with this environment's torch and other dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = [*PIP, "--python", folder / "bin" / "python", "install", "-q", "--no-deps", "--no-index", wheel]
    # pip must not see another wanda_fast: no PYTHONPATH here, and the dependencies' folder only afterwards.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(install, env=clean, cwd=folder, check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return folder


def run(environment: Path, *command: str) -> str:
    """Standard output of a command that finds the environment's programs alone, outside the source tree."""
    variables = {"PATH": str(environment / "bin"), "HOME": str(environment), "COLUMNS": "200"}
    done = subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        env=variables,
        cwd=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_and_the_cpu_library(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        description = archive.read(metadata).decode()
    assets = {f.relative_to(ROOT).as_posix() for f in (ROOT / "wanda_fast" / "report" / "assets").iterdir()}
    assert {"page.html", "page.css", "page.js", "chart.umd.min.js", "chart.LICENSE.md"} == {
        Path(name).name for name in assets
    }
    modules = python_files(ROOT, "wanda_fast") | python_files(ROOT / "kernels", "wanda_kernels")
    assert held - {"wanda_kernels/native/libwanda_cuda.so"} == modules | assets | {CPU_LIBRARY}
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in description


def python_files(base: Path, package: str) -> set[str]:
    return {file.relative_to(base).as_posix() for file in (base / package).rglob("*.py")}


def test_the_tag_names_the_platform_and_no_python_version(wheel):
    assert re.fullmatch(r"wanda_fast-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)


def test_the_doctor_finds_the_cpu_library_serving(environment):
    said = run(environment, "wanda-fast", "doctor")
    rows = {cells[0]: cells[1] for cells in table_rows(said)}
    assert rows["libwanda_cpu.so"].startswith("loaded from /")
    assert CPU_LIBRARY in said and str(ROOT) not in said
    served = [rows[f"{operation} on cpu"] for operation in ("prune_nm_", "prune_rows_", "sparsegpt_")]
    assert served == ["cpu (the first choice)"] * 3


def table_rows(text: str) -> list[list[str]]:
    lines = [line.strip("│").split("│") for line in text.splitlines() if "│" in line]
    rows = [[cell.strip() for cell in line] for line in lines]
    return [row for row in rows if len(row) == 2]


def test_an_operation_gives_the_right_result(environment):
    weight, sq_norm, *files = run(environment, "python", "-c", PROGRAM).splitlines()
    assert weight == "[[1.0, 0.0, 0.0, -4.0, 0.0, 5.0, 0.0, 5.0]]"
    assert sq_norm == "[17.0, 29.0, 45.0]"
    assert all(Path(file).is_relative_to(environment) for file in files)
