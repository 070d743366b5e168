"""Builds `wanda_fast` (the pruner) and `wanda_kernels` (the operations, in kernels/wanda_kernels).

WANDA_FAST_CPU and WANDA_FAST_CUDA control the two native libraries:
    0      do not build the library
    1      build it, or fail
    auto   build it if a compiler and torch are found (the default)
Without a library the package still works: torch serves the CPU, more slowly, and Triton serves the GPU.

A wheel with a library serves every Python 3 and every torch from 2.10 on, because the library uses torch's
stable ABI and no Python API.
"""

import os
import shutil
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
    """The libraries to build. If one cannot be built, say why; exit if its variable is 1."""
    extensions = []
    for backend in BACKENDS:
        choice, library = wanted(backend), native_build.LIBRARIES[backend]
        reason = f"WANDA_FAST_{backend.upper()}=0" if choice == "0" else native_build.why_not(backend)
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
    # pip runs this file for the metadata first, then for the build: say it once.
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(f"wanda_fast: {sentence}", file=sys.stderr)


class BuildNative(build_ext):
    """Builds plain shared libraries for torch.ops.load_library instead of Python extension modules."""

    def get_ext_filename(self, fullname: str) -> str:
        # setuptools passes the name with its package or without.
        *package, backend = fullname.split(".")
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
    """One wheel for every Python 3: of this platform with a library in it, of any platform without."""

    def run(self) -> None:
        # build/lib may hold modules that have been moved or deleted since an earlier build.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

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
    package_data={"wanda_fast.report": ["assets/*"]},
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
        "jinja2>=3",
        "ninja",
        "rich>=13",
        "typer>=0.15",
    ],
    extras_require={
        "test": [
            "hypothesis",
            "lm-eval>=0.4.13",
            "peft",
            "pillow",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
            "selenium",
        ],
        "bench": ["matplotlib"],
        "eval": ["lm-eval>=0.4.13"],
        "vision": ["pillow", "timm"],
    },
    entry_points={"console_scripts": ["wanda-fast = wanda_fast.cli.main:main"]},
)
