"""`PackedLinear`: a linear whose weight is a row of bits and the kept values of each output."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_fast.errors import PackedModelError
from wanda_fast.model.block_forward import multiplies_bf16
from wanda_kernels import PACKED_LINEAR_ROWS, PackedRows, packed_linear, unpack_rows

# Bytes of the unpacked rows that a product reads. On a CPU they stay in its second-level cache.
BAND_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
NOT_TRAINABLE = "a packed model cannot be trained: train the dense model, model.dequantize() returns it"


class PackedLinear(nn.Module):
    """y = x weight^T + bias, for inference.

    Args:
        packed: the weight, as `wanda_kernels.pack_rows` returns it.
        in_features: columns of the weight.
        bias: `[out]` or None.

    Attributes:
        bits, values, offsets: buffers, the parts of `packed`; offsets is None if all rows have equally many
            values.
    """

    def __init__(self, packed: PackedRows, in_features: int, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, len(packed.bits)
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def packed(self) -> PackedRows:
        return PackedRows(self.bits, self.values, self.offsets)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]`, unpacked each time it is read."""
        return unpack_rows(self.packed, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        parts = self._buffers  # as attributes of the module they take a microsecond each
        bits, values, offsets = parts["bits"], parts["values"], parts["offsets"]
        if x.shape[-1] != self.in_features or x.dtype != values.dtype:
            wanted = f"{values.dtype} [..., {self.in_features}]"
            raise ValueError(f"x must be {wanted}, got {x.dtype} {list(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            return _WithoutGradient.apply(x, *self.packed, self.bias)
        if torch.compiler.is_compiling():
            return torch.ops.wanda_fast.packed_product(x, *self.packed, self.bias)
        # The registered operation and the checks take as long as a small product. Without offsets and bias
        # the shapes are those that the module was made with.
        plain = offsets is None and self.bias is None and x.device == values.device == bits.device
        return _packed_product(x, bits, values, offsets, self.bias, check_operands=not plain)

    def extra_repr(self) -> str:
        kept = self.values.numel() / max(self.in_features * self.out_features, 1)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, kept={kept:.2f}, dtype={self.values.dtype}"
        )


class _WithoutGradient(torch.autograd.Function):
    """The product; its gradient is refused with a sentence."""

    @staticmethod
    def forward(ctx, x: Tensor, *args: Tensor | None) -> Tensor:
        return _packed_product(x, *args)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise PackedModelError(NOT_TRAINABLE)


def _packed_product(
    x: Tensor,
    bits: Tensor,
    values: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    check_operands: bool = True,
) -> Tensor:
    packed = PackedRows(bits, values, offsets)
    if x.shape[:-1].numel() <= PACKED_LINEAR_ROWS:
        return packed_linear(x, packed, bias, check_operands=check_operands)
    return _product_by_bands(x.reshape(-1, x.shape[-1]), packed, bias).view(*x.shape[:-1], len(bits))


def _product_by_bands(x: Tensor, packed: PackedRows, bias: Tensor | None) -> Tensor:
    """Unpack a band of rows of the weight, multiply by it, and so on: never the whole weight."""
    n_rows, dtype = len(packed.bits), _product_dtype(x)
    height = max(BAND_BYTES.get(x.device.type, BAND_BYTES["cuda"]) // (x.shape[1] * dtype.itemsize), 1)
    buffer = packed.values.new_empty(min(height, n_rows), x.shape[1])
    out, x = x.new_empty(len(x), n_rows), x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    for begin in range(0, n_rows, height):
        end = min(begin + height, n_rows)
        weight = unpack_rows(_rows(packed, begin, end), x.shape[1], out=buffer[: end - begin])
        out[:, begin:end] = F.linear(x, weight.to(dtype), None if bias is None else bias[begin:end])
    return out


def _product_dtype(x: Tensor) -> torch.dtype:
    """fp32 on CPUs without instructions for x's 16 bits: up to five times faster there, with closer sums."""
    fast = x.dtype.itemsize > 2 or (x.dtype == torch.bfloat16 and multiplies_bf16())
    return torch.float32 if x.device.type == "cpu" and not fast else x.dtype


def _rows(packed: PackedRows, begin: int, end: int) -> PackedRows:
    bits, values, offsets = packed
    if offsets is None:
        return PackedRows(bits[begin:end], values[begin:end], None)
    return PackedRows(bits[begin:end], values, offsets[begin : end + 1])


def _fake(x: Tensor, bits: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], bits.shape[0])


# `torch.compile` and CUDA graphs see one operation for any number of rows. `Library.impl` costs 3
# microseconds a call, `torch.library.custom_op` 27.
library = torch.library.Library("wanda_fast", "FRAGMENT")
library.define(
    "packed_product(Tensor x, Tensor bits, Tensor values, Tensor? offsets, Tensor? bias) -> Tensor"
)
library.impl("packed_product", _packed_product, "CompositeExplicitAutograd")
torch.library.register_fake("wanda_fast::packed_product", _fake, lib=library)
