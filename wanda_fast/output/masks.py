"""Masks as a product: packed bits in a safetensors file, applied again after fine-tuning, and checked.

One tensor a linear under the name of its weight: uint8 `[out, ceil(in / 8)]`, bit j % 8 of byte j // 8 is 1
where input j was kept (numpy's `packbits(bitorder="little")`), padding bits 0.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wanda_fast.checkpoint.atomic_write import write_atomically
from wanda_fast.errors import MaskError
from wanda_fast.model.architecture import find_blocks
from wanda_fast.pruning.patterns import Pattern, empty_mask
from wanda_kernels import unpack_bits


@dataclass
class Violation:
    """A linear that breaks its mask (weights not zero) or its N:M pattern (groups too full)."""

    name: str
    count: int


def write_masks(masks: dict[str, Tensor], file: Path, recipe: dict) -> None:
    """`masks` by linear name, with the recipe's method and pattern as metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {key: str(recipe[key]) for key in ("prune_method", "sparsity_type", "sparsity_ratio")}
    named = {f"{name}.weight": mask for name, mask in masks.items()}
    write_atomically(file, lambda unfinished: save_file(named, unfinished, {"format": "pt", **about}))


def read_masks(file: Path, model: nn.Module) -> dict[str, tuple[nn.Linear, Tensor]]:
    """linear name -> (its module in `model`, bool `[out, in]`, True where kept); shapes are checked."""
    try:
        packed = load_file(file)
    except (OSError, SafetensorError) as error:
        raise MaskError(f"mask file {file} cannot be read: {str(error).splitlines()[0]}") from error
    modules = {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    masks = {}
    for name, bits in packed.items():
        if name not in modules:
            raise MaskError(f"mask file {file} has {name}, which is no linear of {type(model).__name__}")
        shape = list(empty_mask(modules[name].weight).shape)
        if bits.dtype != torch.uint8 or list(bits.shape) != shape:
            raise MaskError(
                f"mask file {file}: {name} is {bits.dtype} {list(bits.shape)}; the model needs uint8 {shape}"
            )
        kept = unpack_bits(bits, modules[name].in_features)
        masks[name.removesuffix(".weight")] = (modules[name], kept)
    return masks


def apply_masks_(model: nn.Module, file: Path) -> int:
    """Zero every weight that the file's masks do not keep, in place; returns how many were not zero."""
    changed = 0
    for module, kept in read_masks(file, model).values():
        weight = module.weight.data
        changed += int((weight.ne(0) & ~kept).sum())
        weight.masked_fill_(~kept, 0.0)
    return changed


def mask_violations(model: nn.Module, file: Path) -> list[Violation]:
    """Linears with weights not zero where the file's masks do not keep them."""
    counts = {
        name: int((m.weight.ne(0) & ~kept).sum()) for name, (m, kept) in read_masks(file, model).items()
    }
    return [Violation(name, count) for name, count in counts.items() if count]


def pattern_violations(model: nn.Module, pattern: Pattern) -> list[Violation]:
    """Prunable linears with groups of M that hold more than N non-zero weights."""
    violations = []
    for block in find_blocks(model):
        for linear in block.linears:
            pattern.check(linear.name, linear.module.in_features)
            if broken := pattern.count_violations(linear.module.weight):
                violations.append(Violation(linear.name, broken))
    return violations
