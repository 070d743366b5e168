"""`wanda-fast bench`: what a model's linears take here, dense, packed and 2:4, before anything is pruned.

Only the configuration is read. Weights are random; each shape is measured with as many copies as the model
has linears of it, up to 256 MiB, so that they come from memory and not from a cache.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_fast.checkpoint.dequantize import forget_quantization
from wanda_fast.checkpoint.load import DTYPES, UNLOADABLE, first_line, locate, require_dtype
from wanda_fast.checkpoint.meta_model import without_weights
from wanda_fast.checkpoint.packed.format import PACKABLE
from wanda_fast.errors import CheckpointError, NoPrunableBlockError, OptionError
from wanda_fast.inference import stopwatch
from wanda_fast.inference.packed_linear import PackedLinear
from wanda_fast.memory import out_of_memory_explained
from wanda_fast.model.architecture import find_blocks
from wanda_kernels import PackedRows, pack_bits

COPIES_BYTES = 256 << 20
MOST_ROWS = 1 << 20
TWO_OF_FOUR = "2:4"
NOT_ON_CPUS = "not on CPUs"
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ShapeTimes:
    """Seconds of the products of all linears of one shape, by variant; a reason where a variant cannot run.

    Attributes:
        count: linears of this shape in the model.
        rows: of the input.
        seconds: variant -> seconds of one product, or why there is none.
    """

    shape: tuple[int, int]
    count: int
    rows: int
    seconds: dict[str, float | str]


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        dtype: of packed and 2:4 weights, and of the first dense variant.
    """

    model: str
    device: str
    dtype: torch.dtype
    threads: int
    times: list[ShapeTimes]

    def total(self, rows: int) -> dict[str, float | str]:
        """Seconds of all linears of the model by variant; a reason where a variant cannot run."""
        at = [each for each in self.times if each.rows == rows]
        totals: dict[str, float | str] = {}
        for variant in at[0].seconds:
            each = [(one.seconds[variant], one.count) for one in at]
            reasons = [value for value, _ in each if isinstance(value, str)]
            totals[variant] = reasons[0] if reasons else sum(value * count for value, count in each)
        return totals


def bench(
    model: str,
    rows: Iterable[int] = (1, 8, 512),
    patterns: Iterable[str] = ("0.5", "0.6", TWO_OF_FOUR),
    dtype: str = "auto",
    device: str | None = None,
    cache_dir: str | None = None,
    budget_s: float = 0.3,
) -> Bench:
    """Time the products of a model's prunable linears on this machine.

    Args:
        model: folder or hub id; its config.json is read.
        rows: tokens that a linear gets at once: 1 to 8 in decoding, more in prefill.
        patterns: sparsities of packed weights, e.g. "0.5", and "2:4" for torch's semi-structured tensors.
        dtype: of the weights; "auto": the configuration's.
        device: None: the first GPU, else the CPU.
        budget_s: for each shape and number of rows.

    Raises: `OptionError` for rows, patterns or a dtype that cannot be measured; `CheckpointError`;
        `NoPrunableBlockError`.
    """
    rows, patterns = list(dict.fromkeys(rows)), list(patterns)
    _require_options(rows, patterns)
    require_dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes, stored = linear_shapes(model, cache_dir)
    stored, times = DTYPES.get(dtype, stored), []
    if stored not in PACKABLE.values():
        dtypes = ", ".join(PACKABLE)
        raise OptionError(f"weights of {name_of(stored)} are not measured: choose a dtype of {dtypes}")
    with out_of_memory_explained("name fewer rows"):
        for shape, count in shapes.items():
            variants = _variants(shape, count, stored, device, patterns)
            for number in rows:
                x = torch.randn(number, shape[1], dtype=stored, device=device)
                times.append(ShapeTimes(shape, count, number, _measured(variants, x, budget_s)))
    return Bench(model, device, stored, torch.get_num_threads(), times)


def linear_shapes(path: str, cache_dir: str | None = None) -> tuple[Counter[tuple[int, int]], torch.dtype]:
    """How often a model's blocks have an `nn.Linear` of each shape, and the dtype of its checkpoint."""
    from transformers import AutoConfig

    folder, gguf = locate(path)
    if gguf:
        raise CheckpointError(f"model {path} is a GGUF file: bench reads the config.json of a model's folder")
    try:
        config = AutoConfig.from_pretrained(folder, cache_dir=cache_dir, trust_remote_code=False)
        forget_quantization(config)
        dtype = config.dtype or torch.float32
        model = without_weights(path, config, dtype)
    except UNLOADABLE as error:
        raise CheckpointError(f"model {path} has no config.json of a model: {first_line(error)}") from error
    linears = (linear for block in find_blocks(model) for linear in block.linears)
    shapes = Counter(tuple(each.weight.shape) for each in linears if type(each.module) is nn.Linear)
    if not shapes:
        raise NoPrunableBlockError(f"the blocks of {path} have no nn.Linear, which alone can stay packed")
    return shapes, dtype


def _require_options(rows: list[int], patterns: list[str]) -> None:
    if not rows or min(rows) < 1 or max(rows) > MOST_ROWS:
        raise OptionError(f"rows must be positive numbers, at most {MOST_ROWS:,}, got {rows}")
    for pattern in patterns:
        if pattern != TWO_OF_FOUR and not (_is_number(pattern) and 0 < float(pattern) < 1):
            raise OptionError(f"a pattern is {TWO_OF_FOUR}, or a sparsity between 0 and 1, got {pattern!r}")


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdecimal()


def _variants(
    shape: tuple[int, int], count: int, dtype: torch.dtype, device: str, patterns: list[str]
) -> dict[str, list[Product] | str]:
    """By variant its products, each with weights of its own; or why there are none."""
    weight = torch.randn(shape, dtype=dtype, device=device)
    copies = min(count, COPIES_BYTES // weight.nbytes + 1)
    found: dict[str, list[Product] | str] = {f"dense {name_of(dtype)}": _dense(weight, copies)}
    if torch.device(device).type == "cpu" and dtype != torch.float32:
        found["dense float32"] = _dense(weight.float(), copies)
    for pattern in patterns:
        if pattern != TWO_OF_FOUR:
            found[f"packed {100 * float(pattern):g}%"] = _packed(weight, float(pattern), copies)
        elif torch.device(device).type == "cpu":
            found[pattern] = NOT_ON_CPUS
        else:
            found[pattern] = _two_of_four(weight, copies)
    return found


def _dense(weight: Tensor, copies: int) -> list[Product]:
    return [partial(_product, weight.clone()) for _ in range(copies)]


def _packed(weight: Tensor, sparsity: float, copies: int) -> list[Product]:
    rows, columns = weight.shape
    kept = columns - int(sparsity * columns)
    # One random row of the mask, rotated by other numbers of columns in the others.
    mask, turn = torch.randperm(columns) < kept, 7919 * torch.arange(rows).unsqueeze(1)
    bits = pack_bits(mask[(torch.arange(columns) + turn) % columns]).to(weight.device)
    values = weight[:, :kept].contiguous()
    return [PackedLinear(PackedRows(bits.clone(), values.clone(), None), columns) for _ in range(copies)]


def _two_of_four(weight: Tensor, copies: int) -> list[Product] | str:
    if weight.shape[1] % 4:
        return f"{weight.shape[1]} inputs are no multiple of 4"
    pruned = weight.clone()
    pruned.view(-1, 4)[:, ::2] = 0
    try:
        return [partial(_product, torch.sparse.to_sparse_semi_structured(pruned)) for _ in range(copies)]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return first_line(error)


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight)


@torch.no_grad()
def _measured(variants: dict[str, list[Product] | str], x: Tensor, budget_s: float) -> dict[str, float | str]:
    calls = {name: _in_turn(each, x) for name, each in variants.items() if not isinstance(each, str)}
    seconds = stopwatch.medians(calls, str(x.device), budget_s)
    return {name: seconds.get(name, each) for name, each in variants.items()}


def _in_turn(products: list[Product], x: Tensor) -> Callable[[], Tensor]:
    turns = cycle(products)
    return lambda: next(turns)(x)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
