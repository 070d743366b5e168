"""Installs `wanda_fast` (the driver) and `wanda_kernels` (the operations, from kernels/wanda_kernels).

WANDA_FAST_CPU and WANDA_FAST_CUDA say whether the native libraries are built: 0 no, 1 yes or fail, auto (the
default) where a compiler and torch are found. Without them the install is pure Python: slower on a CPU, and
on a GPU left to Triton.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build as native_build  # noqa: E402  (csrc/build.py)

BACKENDS = ("cpu", "cuda")


def wanted(backend: str) -> str:
    choice = os.environ.get(f"WANDA_FAST_{backend.upper()}", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"WANDA_FAST_{backend.upper()} must be 0, 1 or auto, got {choice!r}")
    return choice


def native_extensions() -> list[Extension]:
    """The libraries to build here. What stands in the way of one is said, or fatal where it was asked for."""
    extensions = []
    for backend in BACKENDS:
        choice, library = wanted(backend), native_build.LIBRARIES[backend]
        reason = "as asked for" if choice == "0" else native_build.why_not(backend)
        if reason and choice == "1":
            raise SystemExit(f"cannot build {library}: {reason}")
        if reason:
            say(f"{library} is left out: {reason}")
        else:
            extensions.append(
                Extension(f"wanda_kernels.native.{backend}", sources=[], optional=choice == "auto")
            )
    return extensions


def say(sentence: str) -> None:
    if not {"egg_info", "dist_info"} & set(sys.argv):  # pip runs this file for its metadata first
        print(f"wanda_fast: {sentence}", file=sys.stderr)


class BuildNative(build_ext):
    """Plain shared libraries inside the package, not Python modules: torch.ops.load_library loads them."""

    def get_ext_filename(self, fullname: str) -> str:
        *package, backend = fullname.split(".")  # setuptools asks with the package and without
        return str(Path(*package, native_build.LIBRARIES[backend]))

    def build_extension(self, ext: Extension) -> None:
        backend = ext.name.rpartition(".")[2]
        try:
            built = native_build.build(backend, ROOT / "build" / "native")
        except subprocess.CalledProcessError as error:
            if not ext.optional:
                raise SystemExit(f"building {native_build.LIBRARIES[backend]} failed") from error
            say(f"{native_build.LIBRARIES[backend]} is left out: its build failed")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))


class Wheel(bdist_wheel):
    """The libraries know no Python version: one wheel a platform, or one for all where there are none."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2] if self.distribution.ext_modules else "any")


setup(
    name="wanda_fast",
    version="0.1.0",
    description="CUDA/Triton kernel-accelerated one-shot pruner for large transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="wanda_fast contributors",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=[
        *find_packages(include=["wanda_fast", "wanda_fast.*"]),
        *find_packages("kernels", include=["wanda_kernels", "wanda_kernels.*"]),
    ],
    package_dir={"wanda_fast": "wanda_fast", "wanda_kernels": "kernels/wanda_kernels"},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.1",
        "datasets>=4.0",
        "safetensors>=0.5",
        "psutil>=5.9",
        "accelerate>=1.1",
        "gguf>=0.10",
        "ninja",
        "rich>=13",
        "typer>=0.15",
    ],
    extras_require={
        "test": ["hypothesis", "pytest", "pytest-xdist", "ruff"],
        "bench": ["matplotlib"],
        "eval": ["lm-eval>=0.4.5"],
        "vision": ["pillow"],
    },
    entry_points={"console_scripts": ["wanda-fast = wanda_fast.cli.main:main"]},
)
