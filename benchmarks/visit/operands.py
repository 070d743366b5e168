"""Operands on which a kernel can go wrong: fresh random numbers, ties, zeros, subnormals, huge values.

A selection's weight and scale, and a sum's activations, are drawn anew; an operation whose operands have
other names (a factor, say) gets its workload's own. A sum starts from what one call has left, so that a
kernel which overwrites instead of adding is found out.
"""

import inspect

import torch
from torch import Tensor

import wanda_kernels
from benchmarks.workloads import Workload

RECIPES = ("random", "ties", "zeros", "subnormals", "huge")


def names(operation: str) -> list[str]:
    """The public function's parameters, which begin with a workload's operands."""
    return list(inspect.signature(getattr(wanda_kernels, operation)).parameters)


def recipes(workload: Workload) -> tuple[str, ...]:
    """Those that apply: all where the operands are drawn here."""
    first, second = names(workload.operation)[:2]
    return RECIPES if (first, second) == ("weight", "scale") or first.startswith("acc") else RECIPES[:1]


def draw(workload: Workload, recipe: str, seed: int) -> tuple:
    """The workload's operands, after the recipe; all finite."""
    operands = workload.make_operands()
    generator = torch.Generator(operands[0].device).manual_seed(seed)
    drawn = []
    for name, operand in zip(names(workload.operation), operands, strict=False):
        if not isinstance(operand, Tensor) or recipe not in recipes(workload):
            drawn.append(operand)
        elif name == "weight" and "scale" in names(workload.operation)[:2]:
            drawn.append(_weight(operand, recipe, generator))
        elif name == "scale":
            drawn.append(_scale(operand, recipe, generator))
        elif name in ("x", "gate", "up"):
            drawn.append(_activations(operand, recipe, generator, bounded=name != "x"))
        else:
            drawn.append(operand)
    return tuple(drawn)


def _weight(like: Tensor, recipe: str, generator: torch.Generator) -> Tensor:
    limits = torch.finfo(like.dtype)
    weight = torch.randn(like.shape, generator=generator, device=like.device)
    chosen = torch.rand(like.shape, generator=generator, device=like.device) < 0.5
    if recipe == "ties":
        weight = (weight * 2).round() / 2
    elif recipe == "zeros":
        weight = torch.where(chosen, weight, torch.where(weight > 0, 0.0, -0.0))
    elif recipe == "subnormals":
        weight *= limits.tiny / 4
    elif recipe == "huge":
        weight = torch.where(chosen, weight * (limits.max / 4), weight)
    else:
        weight *= 0.02
    return weight.clamp(-limits.max, limits.max).to(like.dtype)


def _scale(like: Tensor, recipe: str, generator: torch.Generator) -> Tensor:
    scale = torch.randn(like.shape, generator=generator, device=like.device).mul(2).exp()
    chosen = torch.rand(like.shape, generator=generator, device=like.device) < 0.5
    special = {"zeros": 0.0, "subnormals": 1e-40, "huge": 3e38}
    if recipe == "ties":
        return scale.ceil()
    return torch.where(chosen, special[recipe], scale) if recipe in special else scale


def _activations(like: Tensor, recipe: str, generator: torch.Generator, bounded: bool) -> Tensor:
    """Special values in whole columns, since a sum's error is relative to its own column.

    bounded: of what passes through an activation, whose result is rounded: only ties and zeros.
    """
    x = torch.randn(like.shape, generator=generator, device=like.device)
    special = torch.arange(like.shape[-1], device=like.device) % 5 == 3
    if recipe == "ties":
        x = (x * 2).round() / 2
    elif recipe == "zeros":
        x = torch.where(special | (x < -1), 0.0, x)
    elif recipe == "subnormals" and not bounded:
        x = torch.where(special, x * (torch.finfo(like.dtype).tiny / 4), x)
    elif recipe == "huge" and not bounded:
        x = torch.where(special, x * (2.0**8 if like.dtype == torch.float16 else 2.0**30), x)
    return x.to(like.dtype)
