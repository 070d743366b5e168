"""What an unfinished run leaves for the one that continues it: sealed notes, one for each finished block.

A note is JSON that carries its own sha256 and the digest of the run that it belongs to. One that is torn,
altered or of another run reads as absent: its block is done again, and nothing else.
"""

import hashlib
import json
from pathlib import Path

from wanda_fast.checkpoint.atomic_write import write_atomically
from wanda_fast.errors import ResumeError

RUN = "run.json"  # the note that marks a folder as an unfinished run
CONTENTS = {"model": "the model", "calibration": "calibration tokens", "evaluation": "evaluation tokens"}


class Journal:
    """The notes of one run.

    Args:
        folder: where they are.
        identity: what decides the output's bytes: options by name, and digests of model and tokens.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder
        self.identity = json.loads(json.dumps(identity, default=str))  # as it will be read
        self.run = _digest(self.identity)

    def begin(self) -> None:
        self.write(RUN, self.identity)

    def require_same_run(self) -> None:
        """Raise `ResumeError` that says what differs; a first note that is spoilt is written again."""
        before = _unsealed(self.folder / RUN)
        if before is None:
            self.begin()
        elif changed := differences(before["content"], self.identity):
            raise ResumeError(f"{self.folder} cannot be resumed: {'; '.join(changed)}")

    def write(self, name: str, content: dict) -> None:
        note = {"run": self.run, "content": content}
        sealed = json.dumps({"sha256": _digest(note), "note": note}, indent=1)
        write_atomically(self.folder / name, lambda partial: partial.write_text(sealed, encoding="utf-8"))

    def read(self, name: str) -> dict | None:
        note = _unsealed(self.folder / name)
        return note["content"] if note is not None and note["run"] == self.run else None


def partial_of(folder: Path) -> Path:
    """Where a run grows what is to become `folder`."""
    if folder.name in ("", ".."):  # "." has no name of its own
        folder = folder.resolve()
    return folder.with_name(folder.name + ".partial")


def unfinished_run(folder: Path) -> Path | None:
    """The unfinished run that `folder` is, is inside of, or is yet to become."""
    candidates = (folder, folder.parent) if folder.exists() else (partial_of(folder),)
    return next((found for found in candidates if (found / RUN).is_file()), None)


def chosen_before(folder: Path, option: str) -> object:
    """What the unfinished run towards `folder` was begun with; None where there is none, or it cannot be
    read."""
    note = _unsealed(partial_of(folder) / RUN)
    return None if note is None else note["content"].get(option)


def _unsealed(file: Path) -> dict | None:
    try:
        sealed = json.loads(file.read_text(encoding="utf-8"))
        return sealed["note"] if _digest(sealed["note"]) == sealed["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(before: dict, now: dict) -> list[str]:
    """What two runs do not share, in words."""
    changed = [key for key in now if before.get(key) != now[key]]
    return [
        f"{CONTENTS[key]} differ{'s' * (key == 'model')}"
        if key in CONTENTS
        else f"{key} was {before.get(key)}, is {now[key]}"
        for key in changed
    ]
