"""A pytest plugin: runs a share of the tests, and writes each outcome at once, with its operations.

    pytest -p benchmarks.visit.pytest_outcomes --outcomes FILE --share 0/4 --library without --seconds 60

JSON lines: {"test", "verdict", "operations", "note"}; "started" stands before a test, so that one which never
comes back is known by name.
"""

import inspect
import json
import re
import time
from pathlib import Path

from wanda_kernels.dispatch.backends import TABLE

VERDICTS = {"passed": "passed", "failed": "wrong", "skipped": "not run"}


def pytest_addoption(parser):
    group = parser.getgroup("outcomes")
    group.addoption("--outcomes", type=Path, help="file of JSON lines")
    group.addoption("--share", default="0/1", help="I/N: every N-th test from the I-th on")
    group.addoption("--library", choices=("with", "without", "any"), default="any", help="the CUDA library")
    group.addoption("--seconds", type=float, default=float("inf"), help="no test is begun after them")


def pytest_configure(config):
    if config.getoption("outcomes"):
        config.pluginmanager.register(Outcomes(config), "outcomes-writer")


class Outcomes:
    def __init__(self, config):
        self.file = config.getoption("outcomes").open("w")
        self.share = tuple(map(int, config.getoption("share").split("/")))
        self.library = config.getoption("library")
        self.until = time.monotonic() + config.getoption("seconds")
        self.operations: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, config, items):
        index, of = self.share
        wanted = [item for item in items if self.library in ("any", library(item.nodeid))][index::of]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted
        self.operations = {item.nodeid: operations(item.nodeid, _source(item)) for item in items}

    def pytest_runtest_logstart(self, nodeid):
        self._write(nodeid, "started")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            note = crash.message.splitlines()[0] if crash and crash.message else ""
            if report.skipped:
                note = report.longrepr[2]
            self._write(report.nodeid, VERDICTS[report.outcome], note)

    def pytest_collectreport(self, report):
        if report.failed:
            self._write(report.nodeid, "not run", "cannot be imported", operations=list(TABLE))

    def pytest_runtest_protocol(self, item):
        if time.monotonic() <= self.until:
            return None
        self._write(item.nodeid, "not run", "out of time")
        return True

    def _write(self, test: str, verdict: str, note: str = "", **more):
        line = {"test": test, "verdict": verdict, "operations": self.operations.get(test, []), "note": note}
        self.file.write(json.dumps(line | more) + "\n")
        self.file.flush()


def library(nodeid: str) -> str:
    """Whether a test needs the CUDA library, which may still be building: its name says so."""
    return "with" if "cuda" in nodeid.lower() else "without"


def operations(nodeid: str, source: str) -> list[str]:
    """The operations that a test is about: by its parameters, else by its code, else all of them."""
    for text in (nodeid.partition("[")[2], source):
        named = [name for name in TABLE if re.search(rf"\b{name.rstrip('_')}_?(?![a-z_])", text)]
        if named:
            return named
    return list(TABLE)


def _source(item) -> str:
    function = getattr(item, "function", None)
    return inspect.getsource(function) if function else ""
