"""transformers' configuration and quantizer of packed checkpoints: `from_pretrained` keeps weights packed.

Each `nn.Linear` with a packed weight becomes a `PackedLinear` before any weight is read. Packed weights that
the model keeps in another form are unpacked while they are loaded (`unpacking.py`).
"""

import logging
from pathlib import Path

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wanda_fast.checkpoint.conversions import dtype_plan, renaming
from wanda_fast.checkpoint.packed.files import PackedFiles, fault
from wanda_fast.checkpoint.packed.format import (
    KEY,
    METHOD,
    PACKABLE,
    VERSION,
    WEIGHTS,
    PackedWeight,
    packed_name,
    packed_weights,
)
from wanda_fast.errors import CheckpointError, PackedModelError
from wanda_fast.inference.packed_linear import PackedLinear
from wanda_fast.inference.unpacking import UNPACK, unpacking_conversions
from wanda_kernels import PackedRows

FILE, INDEX = packed_name(WEIGHTS), packed_name(f"{WEIGHTS}.index.json")
logger = logging.getLogger(__name__)


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint's config.json.

    Attributes:
        weights: name in the checkpoint's files -> `shape`, `dtype`, and the shape of its `values`.
        sharded: whether the weights are in several files, named by an index.
    """

    def __init__(
        self, weights: dict[str, dict] | None = None, version: int = VERSION, sharded: bool = False, **_
    ):
        self.quant_method, self.version, self.weights, self.sharded = METHOD, version, weights, sharded


class PackedQuantizer(HfQuantizer):
    """Loads packed weights; `model.dequantize()` makes them dense.

    Attributes:
        weights: all packed weights by their names in the files.
        linears: name of a weight that stays packed -> name of its `PackedLinear`.
        dtypes: name of a `PackedLinear` -> dtype of its values.
        unpacked: names of the other weights.
        replaced: see `unpacking_conversions`.
    """

    requires_calibration = True  # of transformers: no dense model is packed while it is loaded
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: PackedConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.weights: dict[str, PackedWeight] = {}
        self.linears: dict[str, str] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.unpacked: list[str] = []
        self.replaced: dict[int, object] = {}

    def update_attn_implementation(self, config):
        """Called with the model's configuration before its files are looked for: names the packed file."""
        folder = config._name_or_path
        self.weights = packed_weights(folder, {KEY: self.quantization_config.to_dict()})
        config.transformers_weights = INDEX if self.quantization_config.sharded else FILE
        return config

    # The hook of transformers 5.17.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs):
        files = PackedFiles.of_packed((Path(file) for file in checkpoint_files or ()), self.weights)
        self._choose(model, files)
        kept_in = dtype_plan(model, model.dtype)
        for name, linear in self.linears.items():
            self.dtypes[linear] = kept_in(f"{linear}.weight") or model.dtype
            if self.dtypes[linear] not in PACKABLE.values():
                wanted = f"{', '.join(PACKABLE)}, not {self.dtypes[linear]}"
                raise PackedModelError(f"packed weights multiply in {wanted}: load with another dtype")
            _swap(model, linear, name, self.weights[name], self.dtypes[linear])
        self._require_found(model)
        for name in self.unpacked:
            files.packed_rows(name)  # raises an error if the weight is broken
        if self.unpacked:
            self._warn(files)
        return model

    def _choose(self, model: nn.Module, files: PackedFiles) -> None:
        """Decide which weights stay packed: those of linears that share them with no other module."""
        state, modules = model.state_dict(), dict(model.named_modules())
        rename, tied, dense, packed = renaming(model, state), model.all_tied_weights_keys, {}, {}
        for name in files.location:
            _, key, _, pattern = rename(name)
            linear = key.removesuffix(".weight")
            if name not in self.weights:
                dense[key, pattern] = name
            elif pattern or key in (*tied, *tied.values()) or type(modules.get(linear)) is not nn.Linear:
                packed[key, pattern] = name
                self.unpacked += [name] * (key in state)
            else:
                self.linears[name] = linear
        for both in packed.keys() & dense.keys():
            raise PackedModelError(
                f"transformers merges {packed[both]}, which is packed, and {dense[both]}, which is not: "
                f"{UNPACK}"
            )

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module | None = None) -> list:
        columns = {name: self.weights[name].shape[-1] for name in self.unpacked}
        made, self.replaced = unpacking_conversions(weight_conversions, columns)
        return made

    def _require_found(self, model: nn.Module) -> None:
        """Raise `PackedModelError` unless all parts of packed weights become parts of the model."""
        state = model.state_dict()
        rename = renaming(model, state, self)
        for name in (*self.linears, *self.unpacked):
            for part in self.weights[name].stored_names(name):
                if rename(part)[1] not in state:
                    raise PackedModelError(f"transformers does not find a place for {part}: {UNPACK}")

    def _warn(self, files: PackedFiles) -> None:
        parts = [part for name in self.linears for part in self.weights[name].stored_names(name)]
        packed = sum(part.nbytes for part in files.stored.on_meta(parts).values())
        dense = sum(self.weights[name].nbytes for name in self.unpacked)
        logger.warning(
            f"{len(self.linears)} weights stay packed in {packed:,} bytes; {len(self.unpacked)} are unpacked "
            f"to {dense:,} bytes, because the model does not have them in an nn.Linear of their own"
        )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs):
        for name, linear in self.linears.items():
            module = model.get_submodule(linear)
            if module.bits.is_meta:  # offloaded
                continue
            if wrong := fault(module.packed, module.in_features):
                raise CheckpointError(f"{model.name_or_path}: {name} is broken: {wrong}")
            # transformers 5.17 loads renamed tensors in the file's dtype.
            module.values = module.values.to(self.dtypes[linear])
        self.quantization_config.weights = {name: self.weights[name].described() for name in self.linears}
        conversions = getattr(model, "_weight_conversions", None) or []
        dense = [self.replaced.get(id(each), each) for each in conversions]
        model._weight_conversions = [each for each in dense if each is not None]
        return model.requires_grad_(False)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for linear in self.linears.values():
            packed, parent = model.get_submodule(linear), model.get_submodule(linear.rpartition(".")[0])
            dense = nn.Linear(packed.in_features, packed.out_features, device="meta", bias=False)
            # transformers passes the configuration's dtype if the caller names none.
            own = packed.values.dtype if dtype in (None, model.config.dtype) else dtype
            dense.weight = nn.Parameter(packed.weight.to(own))
            dense.bias = None if packed.bias is None else nn.Parameter(packed.bias.to(own))
            setattr(parent, linear.rpartition(".")[2], dense)
        return model.requires_grad_(True)

    def is_serializable(self, **_) -> bool:
        raise PackedModelError(
            "a packed model in memory cannot be saved: copy its folder, or save model.dequantize() and pack "
            "that with wanda-fast pack"
        )


def _swap(model: nn.Module, linear: str, name: str, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Put a `PackedLinear` on the meta device in a linear's place."""
    dense, (parent, _, last) = model.get_submodule(linear), linear.rpartition(".")
    if tuple(dense.weight.shape) != packed.shape:
        shapes = f"{list(packed.shape)} by config.json, {list(dense.weight.shape)} in the model"
        raise CheckpointError(f"{model.name_or_path}: {name} is {shapes}")
    kinds = {"bits": torch.uint8, "values": dtype, "offsets": torch.int64}
    tensors = {
        part: torch.empty(about["shape"], dtype=kinds[part], device="meta")
        for part, about in packed.parts.items()
    }
    rows = PackedRows(**dict.fromkeys(PackedRows._fields) | tensors)
    setattr(model.get_submodule(parent), last, PackedLinear(rows, dense.in_features, dense.bias))
