"""Runs that are killed by SIGKILL, each in a fork of this process.

Every run resumes the one before it. When a run ends, the digest of its tensors is recorded and the next run
starts from the beginning, until enough runs were killed and one more has ended.
"""

import hashlib
import os
import random
import shutil
import signal
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file

import wanda_fast
from wanda_fast.checkpoint import journal, shards
from wanda_fast.output import activation_cache

MOMENTS = ("in a shard", "in a note", "after a shard, before its note", "before the last rename", "any")
MOMENTS += ("between the renames of --overwrite", "after the last rename")


def run(model, out, method):
    wanda_fast.prune(
        model,
        dataset=f"{model}/text.txt",
        eval_dataset=f"{model}/text.txt",
        nsamples=2,
        seqlen=24,
        eval_windows=2,
        device="cpu",
        prune_method=method,
        save_model=out,
        save_mask=str(out) + ".masks",
        resume=True,
        overwrite=True,
    )


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment, chance):
    """Make this process kill itself at one of the first three occurrences of the moment."""
    countdown = chance.randint(1, 3)

    def due():
        nonlocal countdown
        countdown -= 1
        return countdown == 0

    def save_half(path, *content):
        write_file(path, *content)
        if due():
            os.truncate(path, path.stat().st_size // 2)
            kill()

    def write_note(self, name, content):
        if moment != "in a note" and name.startswith("block") and due():
            kill()
        write(self, name, content)

    def write_half(path, text, **options):
        write_text(path, text, **options)
        if path.name.endswith(".json.tmp") and due():
            os.truncate(path, len(text) // 2)
            kill()

    def replace(source, target):
        last = Path(source).name == "model"
        if last and moment != "after the last rename":
            kill()
        os_replace(source, target)
        if last:
            kill()

    write_file, write, write_text, os_replace = (
        shards.write_file,
        journal.Journal.write,
        Path.write_text,
        os.replace,
    )
    if moment == "in a shard":
        shards.write_file = save_half
    elif moment == "in a note":
        Path.write_text = write_half
    elif moment == "after a shard, before its note":
        journal.Journal.write = write_note
    elif "rename" in (moment or ""):
        os.replace = replace


def child(model, out, method, moment, chance):
    """Exit status of a run in a fork. If the moment is "any", it is killed from outside at a random time."""
    pid = os.fork()
    if not pid:
        try:
            arm(moment, chance)
            # Activations are cached rarely, often, or after every block.
            activation_cache.SHARE_OF_TIME = chance.choice((0.0001, 0.1, 1e9))
            run(model, out, method)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if moment == "any":
        time.sleep(chance.uniform(0.02, 0.6))
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def digest(folder):
    """sha256 of the tensors' bytes. Files are not compared, because the order of their metadata varies."""
    found = hashlib.sha256()
    for file in (folder / "model.safetensors", str(folder) + ".masks"):
        for name, tensor in sorted(load_file(file).items()):
            found.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main(model, out, method, kills, seed):
    """(moments of the kills, digests); the first digest is of an uninterrupted run."""
    chance, moments = random.Random(seed), []
    # The uninterrupted run. The forks start with the modules that it imported.
    run(model, out, method)
    digests = [digest(out)]
    shutil.rmtree(out)
    while len(moments) < kills or len(digests) == 1:
        planned = None if len(moments) >= kills else MOMENTS[len(moments) % len(MOMENTS)]
        # A kill at any moment may have come after the last rename.
        if planned == "between the renames of --overwrite" and not out.exists():
            out.mkdir()
            (out / "old").touch()
        status = child(model, out, method, planned, chance)
        if status == signal.SIGKILL:
            moments.append(planned)
            under_way = (out.with_name(out.name + ".partial") / "model").exists()
            assert not (out / "config.json").exists() or not under_way
            continue
        assert status == 0, status
        assert not (out / "old").exists() and not out.with_name(out.name + ".partial").exists()
        digests.append(digest(out))
        shutil.rmtree(out)
    return moments, digests
