"""Dense linears in 8 and 4 bits by torch's own weight-only products on CPUs, to compare packed ones with."""

import torch
from torch import Tensor, nn

GROUP = 64  # columns that share a scale in 4 bits


class Int8Linear(nn.Module):
    """A scale for each output, weights rounded to -127 .. 127."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), self.weight, self.scale)
        return rows.view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """A scale and an offset for each group of columns, weights rounded to 0 .. 15."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        groups = linear.weight.detach().float().unflatten(1, (-1, GROUP))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = (high - low).clamp_min(1e-8) / 15
        codes = ((groups - low) / scale).round().clamp(0, 15).flatten(1).int()
        self.register_buffer("weight", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        # torch's product is (code - 8) * scale + offset.
        of_groups = torch.cat([scale, low + 8 * scale], 2).transpose(0, 1)
        self.register_buffer("scale", of_groups.to(linear.weight.dtype).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        rows = torch._weight_int4pack_mm_for_cpu(x.reshape(-1, x.shape[-1]), self.weight, GROUP, self.scale)
        return rows.view(*x.shape[:-1], -1)


def quantize_(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Replace the linears of a model's blocks, none of which has a bias, and unmap the files."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "layers." in name:
            assert module.bias is None, name
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, kind(module))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model
