"""Runs that end in SIGKILL, each in a fork of this process:
`python killed_runs.py MODEL OUT METHOD KILLS SEED`.

Every run resumes what the one before it left. When one reaches its end, its tensors' digest is noted and the
next begins anew, until KILLS runs were killed and one more was finished. Prints JSON: the moments of the
kills, and the digests, of an unbroken run first.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import transformers  # noqa: F401  (imported once, before the forks)
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
    """Make this process kill itself at the moment, at one of its first few occurrences."""
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
    """Exit status of a run in a fork; killed from outside after a random time where the moment is any."""
    pid = os.fork()
    if not pid:
        arm(moment, chance)
        activation_cache.SHARE_OF_TIME = chance.choice(
            (0.0001, 0.1, 1e9)
        )  # rarely, as always, after every block
        run(model, out, method)
        os._exit(0)
    if moment == "any":
        time.sleep(chance.uniform(0.02, 0.6))
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def digest(folder):
    """Of the tensors' bytes; the order of a file's metadata is left to chance."""
    found = hashlib.sha256()
    for file in (folder / "model.safetensors", str(folder) + ".masks"):
        for name, tensor in sorted(load_file(file).items()):
            found.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main(model, out, method, kills, seed):
    torch.set_num_threads(1)
    chance, moments, out = random.Random(seed), [], Path(out)
    run(model, out, method)  # unbroken; the forks start with all that it imported
    digests = [digest(out)]
    shutil.rmtree(out)
    while len(moments) < kills or len(digests) == 1:
        planned = None if len(moments) >= kills else MOMENTS[len(moments) % len(MOMENTS)]
        if planned == "between the renames of --overwrite":
            out.mkdir(exist_ok=True)
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
    print(json.dumps({"moments": moments, "digests": digests}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
