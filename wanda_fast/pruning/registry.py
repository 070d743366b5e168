"""The methods and patterns by name, and how a user's own join them."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from wanda_fast.errors import MissingDependencyError

METHODS: dict[str, type] = {}
PATTERNS: dict[str, type] = {}


def register_method(*names: str) -> Callable[[type], type]:
    """Class decorator: make a `Method` available under these names."""
    return _register_in(METHODS, names)


def register_pattern(*names: str) -> Callable[[type], type]:
    """Class decorator: make a `Pattern` available under these names (`name:2:3` passes 2 and 3 to it)."""
    return _register_in(PATTERNS, names)


def load_plugin(plugin: str) -> None:
    """Import a module by dotted name, or a `.py` file by path, which registers methods and patterns."""
    path = Path(plugin)
    if path.suffix == ".py" and not path.is_file():
        raise MissingDependencyError(f"plugin file {plugin} does not exist")
    try:
        _import_file(path) if path.suffix == ".py" else importlib.import_module(plugin)
    # A plugin's code can raise anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise MissingDependencyError(f"plugin {plugin!r} cannot be imported: {reason}") from error


def _import_file(path: Path) -> None:
    # A name of its own, so that a plugin called statistics.py does not hide Python's module.
    name = f"wanda_fast_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _register_in(registry: dict[str, type], names: tuple[str, ...]) -> Callable[[type], type]:
    if not names:
        raise TypeError("a name is needed: @register_method('name')")

    def register(cls: type) -> type:
        for name in names:
            if name in registry and _is_ours(registry[name]) and not _is_ours(cls):
                raise ValueError(f"{name!r} is built in: register {cls.__name__} under another name")
        cls.name = names[0]
        registry.update(dict.fromkeys(names, cls))
        return cls

    return register


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("wanda_fast.")
