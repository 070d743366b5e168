"""Two to four runs, started at once towards one folder: `python -m tests.wanda_fast.output.racing_runs`.

Every run has a pattern of its own. After a race the folder must be that of an uninterrupted run with the
pattern of a run that ended with exit code 0; the other runs must have ended with a sentence and exit code 2.
Each run is a fork of this process, in which the modules are imported already.
"""

import argparse
import hashlib
import itertools
import pydoc_data.topics
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.tiny_models import FAMILIES, save_checkpoint
from tests.wanda_fast import forked

PATTERNS = ("2:4", "4:8", "1:4", "2:8")
MODES = {"start": [], "resume": ["--resume"], "overwrite": ["--overwrite"]}
RACES = [race for count in (2, 3, 4) for race in itertools.combinations_with_replacement(MODES, count)]
LONGEST_DELAY = 0.5  # seconds


def words(here, pattern, out, mode):
    quick = ["--dataset", here / "text.txt", "--nsamples", 2, "--seqlen", 24, "--eval-dataset", "none"]
    flags = ["--sparsity-type", pattern, "--device", "cpu", "--save-model", out, *MODES[mode]]
    return ["wanda-fast", "prune", "--model", here / "model", *quick, *flags]


def digest(folder):
    """sha256 of the tensors' names and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        found.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def whole_outputs(here):
    """pattern -> digest of the output of an uninterrupted run."""
    save_checkpoint(FAMILIES["smollm"]().bfloat16(), here / "model", topics()[:20000])
    (here / "text.txt").write_text(topics()[:20000])
    digests = {}
    for pattern in PATTERNS:
        pid = forked.start(words(here, pattern, here / pattern, "start"), here / "said")
        assert forked.wait(pid) == 0, (here / "said").read_text()
        digests[pattern] = digest(here / pattern)
    assert len(set(digests.values())) == len(PATTERNS)
    return digests


def topics():
    return "\n\n".join(pydoc_data.topics.topics.values())


def race(here, modes, digests, chance):
    """Run one race. Returns the patterns of the runs that ended with exit code 0."""
    place = Path(tempfile.mkdtemp(dir=here))
    out, began = place / "race" / "out", []
    for pattern, mode in zip(PATTERNS, modes, strict=False):
        delay = chance.choice((0.0, chance.uniform(0, LONGEST_DELAY)))
        wait = partial(time.sleep, delay)
        began.append(forked.start(words(here, pattern, out, mode), place / f"said {pattern}", wait))
    codes = [forked.wait(pid) for pid in began]
    winners = []
    for pattern, code in zip(PATTERNS, codes, strict=False):
        said = (place / f"said {pattern}").read_text()
        assert code in (0, 2) and "Traceback" not in said, f"{modes}, {pattern}: exit code {code}\n{said}"
        assert code == 0 or said.splitlines()[-1].startswith("wanda-fast: "), f"{modes}, {pattern}:\n{said}"
        winners += [pattern] * (code == 0)
    assert winners, f"{modes}: no run ended with exit code 0"
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["out"], f"{modes}: {names} is left"
    assert digest(out) in [digests[pattern] for pattern in winners], f"{modes}: the output is a mixture"
    shutil.rmtree(place)
    return winners


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50, help=f"each is {len(RACES)} races")
    parser.add_argument("--races", type=int, default=None, help="races in a round, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chance, began, wins = random.Random(options.seed), time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        digests = whole_outputs(Path(folder))
        for round in range(options.rounds):
            for modes in RACES if options.races is None else chance.sample(RACES, options.races):
                modes = chance.sample(modes, len(modes))
                wins += len(race(Path(folder), modes, digests, chance))
            print(f"round {round + 1}: all right, {time.perf_counter() - began:.0f} s", flush=True)
    races = options.rounds * (options.races or len(RACES))
    print(f"{races} races, {wins} runs ended with exit code 0, every output whole")


if __name__ == "__main__":
    main()
