"""Starts processes that are the ranks of a gloo group, and collects what a function returns in each."""

import io
import multiprocessing
import socket
import sys
import time
import traceback
from datetime import timedelta

import torch

SECONDS = 240  # until a hang is a failure
TIMEOUT = timedelta(seconds=45)  # of a collective, and of the ranks' search for each other
_context = multiprocessing.get_context("forkserver")
# Imported once: the processes are forks of a server that has these.
_context.set_forkserver_preload(["torch.distributed", "transformers", "wanda_fast", "tests.tiny_models"])


class Ranks:
    """`size` processes that run `function(group, *arguments)`."""

    def __init__(self, size, function, *arguments):
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = _context.Pipe()
            arguments_of_rank = (rank, size, port, theirs, function, arguments)
            process = _context.Process(target=_be_rank, args=arguments_of_rank, daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

        # Until they have found each other, a killed one would be waited for.
        for pipe in self.pipes:
            assert pipe.poll(SECONDS) and pipe.recv() == "ready"

    def results(self):
        """What each rank returned."""
        found = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(SECONDS), f"rank {rank} gives no result"
            kind, value = pipe.recv()
            assert kind == "returned", f"rank {rank}: {value}"
            found.append(torch.load(io.BytesIO(value), weights_only=False))
        self.end_within(60)
        return found

    def errors(self):
        """(type's name, message) of what each rank raised."""
        found = []
        for pipe in self.pipes:
            assert pipe.poll(SECONDS)
            kind, value = pipe.recv()
            assert kind == "raised", value
            found.append(value[:2])
        return found

    def end_within(self, seconds):
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
        assert not hanging, f"ranks {hanging} have not ended after {seconds} s"


def run_ranks(size, function, *arguments):
    """What `function(group, *arguments)` returns on each of `size` ranks."""
    return Ranks(size, function, *arguments).results()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _be_rank(rank, size, port, pipe, function, arguments):
    import torch.distributed as dist

    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=TIMEOUT)
    pipe.send("ready")
    try:
        # A tensor in a pipe would be gone with its process.
        value = io.BytesIO()
        torch.save(function(dist.group.WORLD, *arguments), value)
        pipe.send(("returned", value.getvalue()))
        dist.barrier()
    except Exception as error:
        pipe.send(("raised", (type(error).__name__, str(error), traceback.format_exc())))
        sys.exit(3)
