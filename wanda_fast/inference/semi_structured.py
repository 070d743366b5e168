"""`accelerate`: 2:4 linears as torch's semi-structured tensors, where a timing on this GPU favours them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_fast.checkpoint.load import first_line
from wanda_fast.errors import DeviceError
from wanda_fast.inference import stopwatch

# A gain below this is within the spread of a timing.
LEAST_GAIN = 1.03
# The sparse and the dense product round differently; more than this, of the largest result, is an error.
TOLERANCE = 2**-5


@dataclass(frozen=True)
class LinearTiming:
    """What was measured for one linear.

    Attributes:
        dense_ms, sparse_ms: of its product; None if torch has no sparse product for its shape or dtype.
        chosen: "sparse" if the linear was changed, else "dense".
        reason: why it stays dense; "" if it was changed.
    """

    shape: tuple[int, int]
    dense_ms: float | None
    sparse_ms: float | None
    chosen: str
    reason: str = ""


def accelerate(
    model: nn.Module,
    rows: int = 512,
    *,
    convert: Callable[[Tensor], Tensor] = torch.sparse.to_sparse_semi_structured,
    medians: Callable[..., dict[str, float]] = stopwatch.medians,
) -> dict[str, LinearTiming]:
    """Change 2:4 linears of a model on a GPU to sparse ones, for inference, where that is faster.

    Each `nn.Linear` whose weight keeps at most two of every four inputs is timed, dense and sparse; linears
    of one shape share the timing. Where the sparse product wins by 3%, the weight becomes one of torch's
    semi-structured tensors, in place. The others stay as they are.

    Args:
        model: on a GPU.
        rows: tokens that a linear will get at once: batch times tokens in prefill, batch in decoding.
        convert, medians: the conversion of a weight and the timing of calls.

    Returns: what was measured, by the linear's name; the linears that are not 2:4 are not in it.
    Raises: `DeviceError` if the model is not on a GPU.
    Source: torch.sparse.to_sparse_semi_structured.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if not devices or any(device.type != "cuda" for device in devices):
        found = ", ".join(sorted(map(str, devices))) or "no device"
        raise DeviceError(f"2:4 products need a GPU, and the model is on {found}: move it with model.cuda()")
    return _accelerate(model, rows, convert, medians)


def _accelerate(model: nn.Module, rows: int, convert, medians) -> dict[str, LinearTiming]:
    found, by_kind = {}, {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or not is_two_of_four(module.weight):
            continue
        kind = (module.weight.shape, module.weight.dtype, module.weight.device, module.bias is not None)
        if kind not in by_kind:
            by_kind[kind] = _timing(module, rows, convert, medians)
        found[name] = by_kind[kind]
        if found[name].chosen == "sparse":
            module.weight = nn.Parameter(convert(_plain(module.weight)), requires_grad=False)
    return found


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs are not zero."""
    if weight.is_meta or weight.shape[1] % 4:
        return False
    return bool((weight.detach().reshape(-1, 4).count_nonzero(1) <= 2).all())


def _plain(weight: Tensor) -> Tensor:
    """The weight with +0.0 for each -0.0, which torch's conversion would take for a value."""
    return weight.detach() + 0.0


@torch.no_grad()
def _timing(linear: nn.Linear, rows: int, convert, medians) -> LinearTiming:
    weight, shape = linear.weight, tuple(linear.weight.shape)
    try:
        sparse = convert(_plain(weight))
        x = torch.randn(rows, shape[1], dtype=weight.dtype, device=weight.device)
        dense_y, sparse_y = F.linear(x, weight, linear.bias), F.linear(x, sparse, linear.bias)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return LinearTiming(shape, None, None, "dense", first_line(error))
    calls = {
        "dense": lambda: F.linear(x, weight, linear.bias),
        "sparse": lambda: F.linear(x, sparse, linear.bias),
    }
    ms = {name: each * 1e3 for name, each in medians(calls, str(weight.device)).items()}
    reason = ""
    # NaN is not within the tolerance either.
    if not (dense_y - sparse_y).abs().max() <= TOLERANCE * dense_y.abs().max():
        reason = "torch's sparse product differs from the dense one"
    elif ms["dense"] < LEAST_GAIN * ms["sparse"]:
        reason = f"sparse is {ms['dense'] / ms['sparse']:.2f} times as fast"
    return LinearTiming(shape, ms["dense"], ms["sparse"], "dense" if reason else "sparse", reason)
