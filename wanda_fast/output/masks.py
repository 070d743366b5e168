"""Mask files: written by a run, applied to a model again (e.g. after fine-tuning), and verified.

A mask file is a safetensors file with one tensor for each linear, under the name of its weight: uint8
`[out, ceil(in / 8)]`. Bit j % 8 of byte j // 8 is 1 if input j is kept, as in numpy's
`packbits(bitorder="little")`. Padding bits are 0.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wanda_fast.checkpoint.atomic_write import write_atomically
from wanda_fast.errors import MaskError
from wanda_fast.model.architecture import all_linears, find_blocks
from wanda_fast.model.linears import Linear
from wanda_fast.pruning.patterns import Pattern, empty_mask
from wanda_kernels import unpack_bits


@dataclass
class Violation:
    """A linear that violates its mask or its N:M pattern.

    Attributes:
        count: non-zero weights that the mask prunes, or groups of M with more than N non-zero weights.
    """

    name: str
    count: int


def write_masks(masks: dict[str, Tensor], file: Path, recipe: dict) -> None:
    """Write a mask file, with the recipe's method, pattern and ratio as metadata.

    Args:
        masks: packed masks by linear name, uint8 `[out, ceil(in / 8)]` on the host.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {key: str(recipe[key]) for key in ("prune_method", "sparsity_type", "sparsity_ratio")}
    named = {f"{name}.weight": mask for name, mask in masks.items()}
    write_atomically(file, lambda unfinished: save_file(named, unfinished, {"format": "pt", **about}))


def read_masks(file: Path, model: nn.Module) -> dict[str, tuple[Linear, Tensor]]:
    """linear name -> (the linear of `model`, bool `[out, in]`, True for kept weights).

    Raises: `MaskError` if the file cannot be read, or has a tensor that fits no linear of the model.
    """
    try:
        packed = load_file(file)
    except (OSError, SafetensorError) as error:
        raise MaskError(f"mask file {file} cannot be read: {str(error).splitlines()[0]}") from error
    linears = {f"{name}.weight": linear for name, linear in all_linears(model).items()}
    masks = {}
    for name, bits in packed.items():
        if name not in linears:
            raise MaskError(f"mask file {file} has {name}, which is not a linear of {type(model).__name__}")
        shape = list(empty_mask(linears[name].weight).shape)
        if bits.dtype != torch.uint8 or list(bits.shape) != shape:
            raise MaskError(
                f"mask file {file}: {name} is {bits.dtype} {list(bits.shape)}; the model needs uint8 {shape}"
            )
        kept = unpack_bits(bits, linears[name].in_features)
        masks[name.removesuffix(".weight")] = (linears[name], kept)
    return masks


def apply_masks_(model: nn.Module, file: Path) -> int:
    """Zero every weight that the file's masks do not keep, in place.

    Returns: how many of them were not zero.
    Raises: `MaskError` as `read_masks`.
    """
    changed = 0
    for linear, kept in read_masks(file, model).values():
        weight = linear.weight.data
        changed += int((weight.ne(0) & ~kept).sum())
        weight.masked_fill_(~kept, 0.0)
    return changed


def mask_violations(model: nn.Module, file: Path) -> list[Violation]:
    """Linears with non-zero weights that the file's masks prune. Raises: `MaskError` as `read_masks`."""
    counts = {
        name: int((linear.weight.ne(0) & ~kept).sum())
        for name, (linear, kept) in read_masks(file, model).items()
    }
    return [Violation(name, count) for name, count in counts.items() if count]


def pattern_violations(model: nn.Module, pattern: Pattern) -> list[Violation]:
    """Prunable linears with groups of M that have more than N non-zero weights.

    Raises: `PatternError` if a linear's in_features is not a multiple of M; `NoPrunableBlockError`.
    """
    violations = []
    for block in find_blocks(model):
        for linear in block.linears:
            pattern.check(linear.name, linear.in_features)
            if broken := pattern.count_violations(linear.weight):
                violations.append(Violation(linear.name, broken))
    return violations
