"""Makes transformers load packed checkpoints after `import wanda_fast`.

Importing transformers' quantizers takes two seconds, which a command that loads no model need not spend. So
the quantizer is registered when transformers has imported them, for the first model that it loads.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

from wanda_fast.checkpoint.packed.format import METHOD

QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the quantizer now if transformers' quantizers are imported, else as soon as they are."""
    if QUANTIZERS in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport(MetaPathFinder):
    """Finds one module, by the other finders, and registers the quantizer when its code has run."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run_module = spec.loader.exec_module

        def run_and_register(module: object) -> None:
            run_module(module)
            _register()

        spec.loader.exec_module = run_and_register
        return spec


def _register() -> None:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer

    from wanda_fast.inference.quantizer import PackedConfig, PackedQuantizer

    register_quantization_config(METHOD)(PackedConfig)
    register_quantizer(METHOD)(PackedQuantizer)
