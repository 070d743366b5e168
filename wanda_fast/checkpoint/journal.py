"""Notes of an unfinished run for the run that resumes it: one for each finished block, and one on the run.

A note is a JSON file with its own sha256 and the digest of its run. A note that is incomplete, altered or
from another run counts as missing: its block is pruned again, and no other block.
"""

import hashlib
import json
from pathlib import Path

from wanda_fast.checkpoint.atomic_write import write_atomically
from wanda_fast.errors import ResumeError

# The note on the run. A folder that has it is an unfinished run.
RUN = "run.json"
# Digests in an identity -> their names in messages, with the verb.
CONTENTS = {
    "model": "the model differs",
    "calibration": "calibration tokens differ",
    "evaluation": "evaluation tokens differ",
    "allocation": "ratios by name differ",
    "tasks": "items of the tasks differ",
}


class Journal:
    """The notes of one run.

    Args:
        folder: where the notes are.
        identity: everything that the output's bytes depend on: options by name, digests of model and tokens.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder
        # In the types that reading the note gives.
        self.identity = json.loads(json.dumps(identity, default=str))
        self.run = _digest(self.identity)

    def begin(self) -> None:
        """Write the note on the run."""
        self.write(RUN, self.identity)

    def is_begun(self) -> bool:
        """Whether the folder has the note on this run."""
        return self.read(RUN) is not None

    def require_same_run(self) -> None:
        """Raise `ResumeError` that says what differs if the note on the run has another identity.

        If that note is invalid it is written again.
        """
        before = _read_note(self.folder / RUN)
        if before is None:
            self.begin()
        elif changed := differences(before["content"], self.identity):
            raise ResumeError(f"{self.folder} cannot be resumed: {'; '.join(changed)}")

    def write(self, name: str, content: dict) -> None:
        """Write a note, with its checksum."""
        note = {"run": self.run, "content": content}
        text = json.dumps({"sha256": _digest(note), "note": note}, indent=1)
        write_atomically(self.folder / name, lambda partial: partial.write_text(text, encoding="utf-8"))

    def read(self, name: str) -> dict | None:
        """The content of a note; None if it is missing, invalid or from another run."""
        note = _read_note(self.folder / name)
        return note["content"] if note is not None and note["run"] == self.run else None


def partial_of(folder: Path) -> Path:
    """DIR.partial, in which a run builds the later `folder`."""
    # Relative folders like "." have no name to append to.
    if folder.name in ("", ".."):
        folder = folder.resolve()
    return folder.with_name(folder.name + ".partial")


def unfinished_run(folder: Path) -> Path | None:
    """The DIR.partial of an unfinished run: `folder` itself, the folder around it, or the one beside it."""
    candidates = (folder, folder.parent) if folder.exists() else (partial_of(folder),)
    return next((found for found in candidates if (found / RUN).is_file()), None)


def chosen_before(folder: Path, option: str) -> object:
    """The value of an option in the unfinished run whose output is `folder`; None without a valid note."""
    note = _read_note(partial_of(folder) / RUN)
    return None if note is None else note["content"].get(option)


def _read_note(file: Path) -> dict | None:
    """A note with the digest of its run; None if it is missing or its checksum is wrong."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        return read["note"] if _digest(read["note"]) == read["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(before: dict, now: dict) -> list[str]:
    """What differs between two identities, in words."""
    changed = [key for key in now if before.get(key) != now[key]]
    return [CONTENTS.get(key, f"{key} was {before.get(key)}, is {now[key]}") for key in changed]
