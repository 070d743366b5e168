"""`compute-sanitizer` over one small workload of each operation: bad accesses, and races in the CUDA C++.

A process watches all operations of a backend, since torch starts slowly under it; a finding belongs to the
operation whose line stands above it in the log.
"""

import re
import shutil

from benchmarks.visit.commands import Command, Ended
from benchmarks.visit.proof import Check, check

WATCHES = (("memcheck", "triton"), ("memcheck", "cuda"), ("racecheck", "cuda"))
# torch's caching allocator hands out parts of large blocks: beyond a part is then still inside a block
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
FINDING = r"^========= +((?:Invalid|Uninitialized|Misaligned|Error: |Warning: |Program hit).*)"
SUMMARY = r"^========= .*SUMMARY: \d+"
SUBJECT = "subject "  # begins the line that truth.py prints before each operation's cases


def path() -> str | None:
    return shutil.which("compute-sanitizer")


def under(tool: str, command: Command) -> Command:
    """The command with the tool watching it."""
    watched = [str(path()), "--tool", tool, *command.argv]
    return Command(command.name, watched, command.limit_s, command.log, command.env | ENVIRONMENT)


def judged(tool: str, ended: Ended) -> list[Check]:
    """One check for each operation that was reached; none where the tool did not run."""
    text = ended.log.read_text(errors="replace")
    _, *sections = re.split(rf"^{SUBJECT}", text, flags=re.MULTILINE)
    whole = bool(re.search(SUMMARY, text, re.MULTILINE)) and not ended.why()
    checks = []
    for number, section in enumerate(sections, start=1):
        operation, backend = section.split(maxsplit=1)[0].split(":")
        found = re.findall(FINDING, section, re.MULTILINE)
        finished = whole or number < len(sections)
        note = "" if finished or found else f"not finished: {ended.why() or 'no summary'}"
        passed = int(finished and not found)
        checks.append(check(operation, f"{tool} {backend}", passed, 1, found[:1], note))
    return checks
