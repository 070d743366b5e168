"""Installs `wanda_fast` (the driver) and `wanda_kernels` (the operations, from kernels/wanda_kernels)."""

from pathlib import Path

from setuptools import setup

setup(
    name="wanda_fast",
    version="0.1.0",
    description="CUDA/Triton kernel-accelerated one-shot pruner for large transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="wanda_fast contributors",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=["wanda_fast", "wanda_kernels"],
    package_dir={"wanda_fast": "wanda_fast", "wanda_kernels": "kernels/wanda_kernels"},
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.0",
        "datasets>=4.0",
        "safetensors>=0.5",
        "accelerate>=1.1",
        "gguf>=0.10",
        "ninja",
        "rich>=13",
        "typer>=0.15",
    ],
    extras_require={
        "test": ["hypothesis", "pytest", "ruff"],
        "bench": ["matplotlib"],
        "eval": ["lm-eval>=0.4.5"],
        "vision": ["pillow"],
    },
    entry_points={"console_scripts": ["wanda-fast = wanda_fast.cli:main"]},
)
