"""transformers' configuration and quantizer of packed checkpoints: `from_pretrained` keeps weights packed.

Each `nn.Linear` with a packed weight becomes a `PackedLinear` before any weight is read. Packed weights that
the model keeps in another form are unpacked while they are loaded (`unpacking.py`).
"""

import logging
import math
from pathlib import Path

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wanda_fast.checkpoint.conversions import dtype_plan, renaming
from wanda_fast.checkpoint.shards import TensorFiles
from wanda_fast.errors import CheckpointError, PackedModelError
from wanda_fast.inference.packed_folder import (
    METHOD,
    PARTS,
    VERSION,
    packed_shapes,
    require_consistent,
    require_parts,
    require_version,
    weights_file,
)
from wanda_fast.inference.packed_linear import PackedLinear
from wanda_fast.inference.unpacking import UNPACK, unpacking_conversions
from wanda_kernels import PackedRows

logger = logging.getLogger(__name__)


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint's config.json.

    Attributes:
        weights: name in the checkpoint's files -> `shape`, `dtype`, and the shape of its `values`.
    """

    def __init__(self, weights: dict[str, dict] | None = None, version: int = VERSION, **_):
        require_version(version)
        if not isinstance(weights, dict):
            raise CheckpointError(f"config.json names no packed weights: quantization_config is {weights!r}")
        self.quant_method, self.version, self.weights = METHOD, version, weights


class PackedQuantizer(HfQuantizer):
    """Loads packed weights; `model.dequantize()` makes them dense."""

    requires_calibration = True  # of transformers: no dense model is packed while it is loaded
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: PackedConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.linears: dict[str, str] = {}  # name of the weight in the files -> name of the PackedLinear
        self.dtypes: dict[str, torch.dtype] = {}  # name of the PackedLinear -> that of its values
        self.unpacked: dict[str, int] = {}  # name of the weight in the files -> in_features
        self.replaced: dict[int, object] = {}

    def update_attn_implementation(self, config):
        """Called with the configuration before files are looked for: names the file of packed weights."""
        config.transformers_weights = weights_file(
            config._name_or_path, getattr(config, "_commit_hash", None)
        )
        return config

    # transformers before 5.2x has this hook instead.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs):
        files = TensorFiles.of(Path(file) for file in checkpoint_files or ())
        weights = self.quantization_config.weights
        require_parts(weights, files)
        self._choose(model, files)
        kept_in = dtype_plan(model, model.dtype)
        for name, linear in self.linears.items():
            self.dtypes[linear] = kept_in(f"{linear}.weight") or model.dtype
            _swap(model, linear, name, weights[name], self.dtypes[linear])
        self._require_found(model)
        if self.unpacked:
            self._warn(model, files)
        return model

    def _choose(self, model: nn.Module, files: TensorFiles) -> None:
        """Decide which weights stay packed."""
        state, modules = model.state_dict(), dict(model.named_modules())
        rename, tied = renaming(model, state), model.all_tied_weights_keys
        tied, weights, merged = {*tied, *tied.values()}, self.quantization_config.weights, {}
        for name, about in weights.items():
            _, key, _, pattern = rename(name)
            linear = key.removesuffix(".weight")
            if pattern is None and key not in tied and type(modules.get(linear)) is nn.Linear:
                self.linears[name] = linear
            elif key in state:
                self.unpacked[name] = about["shape"][-1]
                merged[key, pattern] = name
        for name in files.location:
            _, key, _, pattern = rename(name)
            if other := merged.get((key, pattern)):
                raise PackedModelError(
                    f"transformers merges {name}, which is dense, and {other}, packed: {UNPACK}"
                )

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module | None = None) -> list:
        made, self.replaced = unpacking_conversions(weight_conversions, self.unpacked)
        return made

    def _require_found(self, model: nn.Module) -> None:
        """Raise `PackedModelError` unless all parts of packed weights become parts of the model."""
        rename, state = renaming(model, model.state_dict(), self), model.state_dict()
        for name in (*self.linears, *self.unpacked):
            for part in packed_shapes(name, self.quantization_config.weights[name]):
                if rename(part)[1] not in state:
                    raise PackedModelError(f"transformers does not find a place for {part}: {UNPACK}")

    def _warn(self, model: nn.Module, files: TensorFiles) -> None:
        weights = self.quantization_config.weights
        parts = files.on_meta(part for name in self.linears for part in packed_shapes(name, weights[name]))
        packed = sum(part.nbytes for part in parts.values())
        dense = sum(math.prod(weights[name]["shape"]) for name in self.unpacked) * model.dtype.itemsize
        logger.warning(
            f"{len(self.linears)} weights stay packed in {packed:,} bytes; {len(self.unpacked)} are unpacked "
            f"to {dense:,} bytes, because the model does not have them in an nn.Linear of their own"
        )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs):
        for name, linear in self.linears.items():
            module = model.get_submodule(linear)
            if not module.bits.is_meta:
                require_consistent(name, module.packed, module.in_features)
                # transformers before 5.2x loads renamed tensors in the file's dtype.
                module.values = module.values.to(self.dtypes[linear])
        self.quantization_config.weights = {
            name: self.quantization_config.weights[name] for name in self.linears
        }
        conversions = getattr(model, "_weight_conversions", None) or []
        dense = [self.replaced.get(id(each), each) for each in conversions]
        model._weight_conversions = [each for each in dense if each is not None]
        return model.requires_grad_(False)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for linear in self.linears.values():
            packed, parent = model.get_submodule(linear), model.get_submodule(linear.rpartition(".")[0])
            dense = nn.Linear(packed.in_features, packed.out_features, device="meta", bias=False)
            dense.weight, dense.bias = nn.Parameter(packed.weight.to(dtype)), packed.bias
            setattr(parent, linear.rpartition(".")[2], dense)
        return model.requires_grad_(True)

    def is_serializable(self, **_) -> bool:
        raise PackedModelError(
            "a packed model in memory cannot be saved: copy its folder, or save model.dequantize() and pack "
            "that with wanda-fast pack"
        )


def _swap(model: nn.Module, linear: str, name: str, about: dict, dtype: torch.dtype) -> None:
    """Put a `PackedLinear` on the meta device in a linear's place."""
    dense, (parent, _, last) = model.get_submodule(linear), linear.rpartition(".")
    if list(dense.weight.shape) != list(about["shape"]):
        raise CheckpointError(
            f"{name} is {about['shape']} by config.json, {list(dense.weight.shape)} in the model"
        )
    tensors = {
        part.rpartition(".")[2]: torch.empty(shape, dtype=kind, device="meta")
        for part, (kind, shape) in packed_shapes(name, about).items()
    }
    tensors["values"] = tensors["values"].to(dtype)
    packed = PackedRows(**dict.fromkeys(PARTS) | tensors)
    setattr(model.get_submodule(parent), last, PackedLinear(packed, dense.in_features, dense.bias))
