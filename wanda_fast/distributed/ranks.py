"""The ranks of a run and their collectives, by `torch.distributed`. One process alone is `Ranks()`."""

import pickle
import platform
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wanda_fast.errors import LostRankError, RanksError, WandaFastError

T = TypeVar("T")
# Tensors of fewer bytes are summed together.
SMALL = 2**20
# Each tensor of a message begins at a multiple of this many bytes.
ALIGNMENT = 16


class Ranks:
    """The processes that prune one model together.

    All of them call the same collectives in the same order. Data on a GPU travel by the group's own backend,
    all other data by gloo.

    Attributes:
        rank, size: this process, and how many there are.
        hosts: name of each rank's machine.
        moved: bytes of the tensors that this rank took part in summing or sending.
        timed: makes a context around each collective.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = self._by_gloo = group
        self.rank, self.size = 0, 1
        self._traffic = Counter()
        self.timed: Callable[[], AbstractContextManager] = nullcontext
        self.hosts = [platform.node()]
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            if self.rank < 0:
                raise RanksError("this process is not in the process_group that it was given")
            if dist.get_backend(group) != "gloo":
                members = dist.get_process_group_ranks(group)
                self._by_gloo = dist.new_group(members, backend="gloo", use_local_synchronization=True)
            self.hosts = self.gather(f"{platform.node()} {_boot()}")

    @property
    def moved(self) -> int:
        return self._traffic["bytes"]

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def local(self) -> list[int]:
        """The ranks on this machine."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    def of_machine(self) -> "Ranks":
        """The ranks on this machine, as a group of their own."""
        if len(self.local) == self.size:
            return self
        members = [dist.get_global_rank(self._group, rank) for rank in self.local]
        machine = Ranks(dist.new_group(members, use_local_synchronization=True))
        machine.timed, machine._traffic = self.timed, self._traffic
        return machine

    def shares(self, count: int) -> list[slice]:
        """`count` things in a row, split among the ranks; sizes differ by at most 1, rank 0 has the most."""
        bounds = [-(-rank * count // self.size) for rank in range(self.size + 1)]
        return [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]

    def share(self, count: int) -> slice:
        """This rank's part of `shares`."""
        return self.shares(count)[self.rank]

    def owner(self, index: int, count: int) -> int:
        """The rank whose share has thing number `index` of `count`."""
        return next(rank for rank, share in enumerate(self.shares(count)) if index < share.stop)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace tensors, of the same shapes on each rank, by their sums over the ranks."""
        if self.size == 1:
            return
        packs: dict[tuple, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.nbytes < SMALL or not tensor.is_contiguous():
                packs.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            else:
                self._sum_(tensor)
        for pack in packs.values():
            whole = torch.cat([tensor.flatten() for tensor in pack])
            self._sum_(whole)
            for tensor, part in zip(pack, whole.split([x.numel() for x in pack]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of a small tensor over the ranks, a new tensor."""
        total = tensor.clone()
        self.sum_([total])
        return total

    def send_(self, tensors: list[Tensor], source: int) -> None:
        """Overwrite tensors by those of rank `source`; shapes and dtypes are the same on each rank."""
        if self.size == 1 or not tensors:
            return
        if len(tensors) == 1 and tensors[0].is_contiguous():
            self._send_(tensors[0].view(-1).view(torch.uint8), source)
            return
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        message = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
        parts = [
            part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(message.split(sizes), tensors, strict=True)
        ]
        pairs = list(zip(parts, tensors, strict=True))
        if source == self.rank:
            for part, tensor in pairs:
                part.copy_(tensor)
        self._send_(message, source)
        if source != self.rank:
            for part, tensor in pairs:
                tensor.copy_(part)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with self._collective():
            dist.all_gather_object(values, value, group=self._by_gloo)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, or the `WandaFastError` that it raises; the others wait for it."""
        if self.size == 1:
            return make()
        made: list = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except WandaFastError as error:
                made[1] = error
        with self._collective():
            dist.broadcast_object_list(made, group=self._by_gloo, group_src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def least(self, number: int) -> int:
        """The smallest number of any rank."""
        return min(self.gather(number)) if self.size > 1 else number

    def wait_for_all(self) -> None:
        self.gather(None)

    def _sum_(self, tensor: Tensor) -> None:
        with self._collective(tensor.nbytes):
            dist.all_reduce(tensor, group=self._group_for(tensor))

    def _send_(self, message: Tensor, source: int) -> None:
        with self._collective(message.nbytes):
            dist.broadcast(message, group=self._group_for(message), group_src=source)

    def _group_for(self, tensor: Tensor) -> dist.ProcessGroup:
        return self._group if tensor.is_cuda else self._by_gloo

    @contextmanager
    def _collective(self, nbytes: int = 0) -> Iterator[None]:
        """Around a collective. Raises: `LostRankError` if it fails, because a rank has ended or hangs."""
        self._traffic["bytes"] += nbytes
        with self.timed():
            try:
                yield
            # gloo raises RuntimeError itself, and a broken message cannot be unpickled.
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise LostRankError(f"rank {self.rank} has lost another rank: {reason}") from error


def _boot() -> str:
    """Tells machines of one name apart."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return socket.getfqdn()
