"""What a run uses of the machine: device, sequences per forward pass, and where activations are kept."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch import nn

from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import DeviceError, RanksError
from wanda_fast.memory import free_memory
from wanda_fast.model.architecture import Block
from wanda_fast.model.offload import KINDS
from wanda_fast.run.job import Job
from wanda_fast.run.memory_model import Footprint, footprint

logger = logging.getLogger(__name__)

# Tokens in a forward pass; more are not faster.
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 4096}
MIB = 2**20
# Share of the free memory that a run plans to use.
SHARE = 0.8


@dataclass
class Resources:
    """What was chosen and why. `predicted` is peak bytes by device, `parts` the terms of the formula."""

    batch_size: int
    activations: str
    why: str
    predicted: dict[str, int]
    parts: dict[str, int]

    @property
    def chosen(self) -> dict:
        return {"batch_size": self.batch_size, "activations": self.activations, "why": self.why} | {
            "bytes": self.parts
        }


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises `DeviceError` if it is neither the CPU nor a GPU of this machine."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device must be cpu, cuda or cuda:N, got {str(name)!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"device {str(name)!r} is not here: torch {torch.__version__} sees {count} GPUs")
    return device


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """Of several ranks on a machine, each takes a GPU of its own.

    Raises: `RanksError` if several of them name one GPU; `DeviceError` if there are too few.
    """
    if device.type != "cuda":
        return device
    named = ranks.gather(device.index)
    here = [named[rank] for rank in ranks.local]
    if device.index is not None and here.count(device.index) > 1:
        raise RanksError(
            f"device {device} is one GPU, and {here.count(device.index)} ranks of this machine name it: name "
            f"cuda, and each rank takes a GPU of its own"
        )
    if device.index is not None or len(here) == 1:
        return device
    return usable_device(f"cuda:{ranks.local.index(ranks.rank)}")


def choose_resources(
    job: Job,
    model: nn.Module,
    blocks: list[Block],
    device: torch.device,
    stored: torch.dtype | None,
    batch_size: int | None = None,
    activations: str = "auto",
    converted: frozenset[str] = frozenset(),
    terms: Callable[..., Footprint] = footprint,
) -> Resources:
    """The first placement of activations with room for a full batch; else the last, with the batch that fits.

    Args:
        stored, converted: as in `footprint`.
        batch_size, activations: used as they are, unless None and "auto".
        terms: gives the memory model's terms, with the arguments of `footprint`.
    """
    free = {name: free_memory(torch.device("cpu" if name == "host" else name)) for name in _places(device)}
    # The ranks of a machine share its memory.
    free["host"] //= len(job.ranks.local)
    nsamples, seqlen = job.calibration_shape
    tokens = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cpu"])
    batch = batch_size or min(nsamples, max(1, tokens // seqlen))
    kinds = KINDS[device.type == "cpu" :] if activations == "auto" else (activations,)

    @cache
    def parts_of(batch: int) -> Footprint:
        return terms(job, model, blocks, stored, batch, converted)

    def fits(kind: str, batch: int) -> bool:
        needed = parts_of(batch).peak(device, kind)
        return all(needed[name] <= SHARE * free[name] for name in needed)

    kind = next((kind for kind in kinds if fits(kind, batch)), kinds[-1])
    while batch_size is None and batch > 1 and not fits(kind, batch):
        batch = (batch + 1) // 2
    batch, kind = job.ranks.least(batch), kinds[-job.ranks.least(-kinds.index(kind))]
    parts = parts_of(batch)
    predicted = parts.peak(device, kind)
    why = f"{'as asked' if activations != 'auto' else 'the first with room'}; {_needs(predicted, free)}"
    if not fits(kind, batch):
        why += f", more than {SHARE:.0%}"
    logger.info("batch size %d, activations: %s (%s)", batch, kind, why)
    return Resources(batch, kind, why, predicted, asdict(parts))


def _needs(predicted: dict[str, int], free: dict[str, int]) -> str:
    rooms = (
        f"{needed / MIB:,.0f} of {free[name] / MIB:,.0f} MiB free on {name}"
        for name, needed in predicted.items()
    )
    return f"needs {', '.join(rooms)}"


def _places(device: torch.device) -> list[str]:
    return ["host"] if device.type == "cpu" else ["host", str(device)]
