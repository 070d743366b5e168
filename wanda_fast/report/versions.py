"""Versions of Python and of packages, as a report keeps them."""

import platform
from importlib import metadata

# Packages whose version can change a mask.
DECIDING = ("wanda_fast", "torch", "triton", "transformers")


def deciding_versions() -> dict[str, str]:
    """Versions of the packages that can change a mask."""
    return {name: version for name, version in versions().items() if name in DECIDING}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in ("wanda_fast", "torch", "triton", "transformers", "datasets", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
