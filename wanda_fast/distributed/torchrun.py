"""The process group of a command that torchrun started, and the end of all ranks when one fails.

Every rank has a thread that tells the others through torchrun's store that it is alive, and looks there for a
failure: `torch.distributed` alone would let the other ranks wait until their collectives time out.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from wanda_fast.errors import AnotherRankFailedError, LostRankError, RanksError

# The longest wait for another rank in a collective. A rank that ends is noticed much sooner.
TIMEOUT = timedelta(hours=1)
# Seconds: between two looks at the store; without a sign of life; for the main thread to end by itself.
PERIOD, SILENCE, GRACE = 2.0, 30.0, 10.0
FAILURE = "failure"
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_running(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process as one of several."""
    ranks = environment.get("WORLD_SIZE", "")
    return ranks.isdecimal() and int(ranks) > 1


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that talks to the user."""
    return not is_running(environment) or environment.get("RANK", "0") == "0"


@contextmanager
def process_group() -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes that torchrun started; None if it started none, or one.

    If the work fails on a rank, all ranks end within a minute. The first that failed says why.

    Raises: `AnotherRankFailedError` on the other ranks; `RanksError` if the group cannot be made.
    """
    if not is_running():
        yield None
        return
    if absent := [name for name in VARIABLES if name not in os.environ]:
        size = os.environ["WORLD_SIZE"]
        raise RanksError(
            f"WORLD_SIZE is {size}, as torchrun sets it, and {', '.join(absent)} not set: "
            f"start all ranks by torchrun, or unset it"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        watch = Watch()
    except (RuntimeError, ValueError) as error:
        raise RanksError(f"the ranks cannot find each other as torchrun's variables say: {error}") from error
    watch.start()
    try:
        yield dist.group.WORLD
        dist.barrier()
    except (Exception, KeyboardInterrupt) as error:
        if not watch.claim(watch.explained(error)):
            raise AnotherRankFailedError(f"{error}") from error
        if isinstance(error, LostRankError):
            raise LostRankError(watch.explained(error)) from error
        raise
    finally:
        watch.over.set()
    dist.destroy_process_group()


class Watch(threading.Thread):
    """Tells the other ranks that this one is alive, and ends it if another one has failed."""

    def __init__(self):
        super().__init__(name="wanda-fast-watch", daemon=True)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.following = (self.rank + 1) % self.size
        # Set when the work has ended.
        self.over = threading.Event()
        # A connection of its own: the group's is busy while a collective waits.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SILENCE))
        run = os.environ.get("TORCHELASTIC_RUN_ID", "run") + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"wanda_fast/{run}", store)
        self.store.set(f"who/{self.rank}", f"{os.getpid()} {os.uname().nodename}")

    def run(self) -> None:
        heard, since = b"", time.monotonic()
        while not self.over.wait(PERIOD):
            try:
                if self.store.check([FAILURE]):
                    break
                if (now := self._exchange_signs()) != heard:
                    heard, since = now, time.monotonic()
            # torchrun itself, which keeps the store, has ended.
            except RuntimeError:
                break
            if time.monotonic() - since > SILENCE:
                sentence = f"{self._who(self.following)} has not answered for {SILENCE:.0f} s"
                if self.claim(sentence):
                    print(f"wanda-fast: {sentence}", file=sys.stderr, flush=True)
                break
        else:
            return
        # The main thread may wait in a collective that never ends.
        time.sleep(GRACE)
        os._exit(2)

    def _exchange_signs(self) -> bytes:
        """Give a sign of life, and return the latest one of the following rank."""
        self.store.set(f"alive/{self.rank}", str(time.monotonic()))
        sign = f"alive/{self.following}"
        return self.store.get(sign) if self.store.check([sign]) else b""

    def claim(self, sentence: str) -> bool:
        """Whether this rank is the first that failed; it says so to the others."""
        own = json.dumps({"rank": self.rank, "why": sentence})
        try:
            return self.store.compare_set(FAILURE, "", own).decode() == own
        except RuntimeError:
            return True

    def explained(self, error: BaseException) -> str:
        """The error in words; if a rank was lost, which one has ended."""
        if not isinstance(error, LostRankError):
            return str(error)
        ended = [self._who(rank) for rank in range(self.size) if self._has_ended(rank)]
        if not ended:
            return str(error)
        return f"{', '.join(ended)} ended without a word, as a killed process does"

    def _who(self, rank: int) -> str:
        try:
            process, host = self.store.get(f"who/{rank}").decode().split()
            return f"rank {rank} (process {process} on {host})"
        except RuntimeError:
            return f"rank {rank}"

    def _has_ended(self, rank: int) -> bool:
        """Whether the rank's process is known to have ended, which only its own machine knows."""
        import psutil

        try:
            process, host = self.store.get(f"who/{rank}").decode().split()
            if host != os.uname().nodename:
                return False
            return psutil.Process(int(process)).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except RuntimeError:
            return False
