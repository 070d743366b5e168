"""Products of linears in 8 bits, for calibration forwards. Nothing that is kept or saved is rounded.

A weight has one scale for each output, an input one for each token: the largest absolute value becomes the
format's largest number. Products are summed in fp32 and multiplied by both scales; on a GPU the product of
fp8 is then rounded to bf16.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_fast.errors import DeviceError
from wanda_fast.model.architecture import Block
from wanda_fast.model.linears import Linear
from wanda_fast.model.patching import forwards_replaced

# Name of the format -> dtype, largest number, compute capability of GPUs that multiply it.
FORMATS = {"fp8": (torch.float8_e4m3fn, 448.0, (8, 9)), "int8": (torch.int8, 127.0, (8, 0))}
# Rows and columns of the operands of torch's products on GPUs; `torch._int_mm` takes no fewer rows than ROWS.
MULTIPLE, ROWS = 16, 32


def require_multiplies(forward_dtype: str | None, device: torch.device) -> None:
    """Raise `DeviceError` if the GPU has no products in this format. A CPU computes them in fp32."""
    if forward_dtype is None or device.type != "cuda":
        return
    needed, found = FORMATS[forward_dtype][2], torch.cuda.get_device_capability(device)
    if found < needed:
        raise DeviceError(
            f"forward_dtype {forward_dtype} needs a GPU of compute capability {needed[0]}.{needed[1]} or "
            f"later, and {device} has {found[0]}.{found[1]}"
        )


def rounding_warnings(blocks: list[Block], forward_dtype: str | None, calibrates: bool) -> list[str]:
    """What `forward_dtype` does not do in this run."""
    if forward_dtype is None:
        return []
    if not calibrates:
        return [f"forward_dtype {forward_dtype} has no effect: the method runs no calibration forward"]
    linears = [linear for block in blocks for linear in block.linears]
    exact = [linear.name for linear in linears if not is_rounded(linear)]
    if not exact:
        return []
    return [
        f"forward_dtype {forward_dtype}: {len(exact)} of {len(linears)} weights, such as {exact[0]}, are no "
        f"nn.Linear and multiply in the model's dtype"
    ]


def is_rounded(linear: Linear) -> bool:
    return type(linear.module) is nn.Linear


@contextmanager
def rounded_products(linears: Iterable[Linear], forward_dtype: str | None) -> Iterator[None]:
    """Context in which the modules of `linears` multiply in 8 bits; None: as they do.

    Their hooks see inputs that are not rounded. Convolutions, GPT-2's `Conv1D`, and experts in
    three-dimensional parameters multiply as they do.
    """
    modules = {linear.module for linear in linears if is_rounded(linear) and forward_dtype}
    with forwards_replaced({module: partial(_linear, module, forward_dtype) for module in modules}):
        yield


def _linear(module: nn.Linear, forward_dtype: str, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    values, by_token = rounded(rows, forward_dtype)
    weights, by_output = rounded(module.weight, forward_dtype)
    product = _on_gpu if x.device.type == "cuda" and _fits(rows, module.weight) else _in_fp32
    output = product(values, by_token, weights, by_output)
    if module.bias is not None:
        output = output + module.bias.to(output.dtype)
    return output.to(x.dtype).view(*x.shape[:-1], module.out_features)


def rounded(matrix: Tensor, forward_dtype: str) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits, and fp32 `[rows, 1]` that its rows are to be multiplied by."""
    dtype, largest, _ = FORMATS[forward_dtype]
    scale = matrix.abs().amax(dim=-1, keepdim=True).float() / largest
    # Of a row of zeros, or of denormal numbers. NaN stays, and makes the product NaN.
    scale = torch.where(scale == 0, 1.0, scale)
    values = matrix.float() / scale
    return (values.round() if dtype == torch.int8 else values).clamp_(-largest, largest).to(dtype), scale


def _in_fp32(values: Tensor, by_token: Tensor, weights: Tensor, by_output: Tensor) -> Tensor:
    """The product of numbers of 8 bits, which is exact in fp32 but for its sums."""
    return F.linear(values.float(), weights.float()) * by_token * by_output.t()


def _on_gpu(values: Tensor, by_token: Tensor, weights: Tensor, by_output: Tensor) -> Tensor:
    if values.dtype == torch.int8:
        return torch._int_mm(values, weights.t()).float() * by_token * by_output.t()
    scales = {"scale_a": by_token, "scale_b": by_output.t().contiguous()}
    return torch._scaled_mm(values, weights.t(), out_dtype=torch.bfloat16, **scales)


def _fits(rows: Tensor, weight: Tensor) -> bool:
    return len(rows) >= ROWS and not any(side % MULTIPLE for side in weight.shape)
