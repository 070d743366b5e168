"""Accuracy on tasks (ARC, PIQA, ...) by lm-evaluation-harness: its own tasks, or local files."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from torch import nn

from wanda_fast.data.documents import reason
from wanda_fast.data.task_files import file_of, harness_config, read_items
from wanda_fast.errors import CalibrationError, MissingDependencyError, OptionError, UnknownMethodError

# The tasks of the published Wanda's --eval_zero_shot.
ZERO_SHOT_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# Exceptions of `datasets` for data that cannot be fetched, and of the harness for a task that needs more.
UNREADABLE = (OSError, ValueError, ImportError, RuntimeError)
# The same examples in the prompts of every run, for tasks that have some; the harness's own seed.
FEWSHOT_SEED = 1234


@dataclass
class Tasks:
    """Tasks that are read and ready to be measured, on any number of models.

    Attributes:
        loaded: "tasks", "groups" and "group_map" of the harness, each by name.
        limit: items of each task, the first ones; None: all.
        digest: of the local files' items; None: the tasks are the harness's own.
        tokenizer: of the model; set before the first is measured.
    """

    loaded: dict[str, dict]
    limit: int | None
    digest: str | None = None
    tokenizer: object = None

    def measure(
        self, model: nn.Module, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, dict[str, float]]:
        """Task -> its metrics and their standard errors: `acc`, `acc_stderr` ..., and its number of `items`.

        Args:
            model: a causal LM of transformers, on one device.
            progress: called with the number of continuations done, and of all.
        """
        found = self.outcome(model, progress)
        items = {name: counts["effective"] for name, counts in found["n-samples"].items()}
        return {name: _metrics(each, items.get(name)) for name, each in found["results"].items()}

    def outcome(self, model: nn.Module, progress: Callable, log_samples: bool = False) -> dict:
        """What the harness returns: "results", "n-samples", and "samples" if they are logged."""
        from lm_eval import evaluate

        from wanda_fast.data.harness import LanguageModel, quiet

        # Dense and pruned models get the same examples in their prompts.
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with quiet():
            harness_model = LanguageModel(model, self.tokenizer, progress)
            return evaluate(
                lm=harness_model, task_dict=self.loaded, limit=self.limit, log_samples=log_samples
            )


def task_names(zero_shot: bool, tasks: str | Iterable[str] | None) -> list[str]:
    """The tasks that the options name: the published ones, and those of a list or a word with commas.

    Raises: `OptionError` if a list has no names.
    """
    words = tasks.split(",") if isinstance(tasks, str) else list(tasks or ())
    named = [str(word).strip() for word in words]
    if tasks is not None and not all(named or [""]):
        raise OptionError(f"tasks must be names, separated by commas, got {tasks!r}")
    return list(dict.fromkeys([*(ZERO_SHOT_TASKS if zero_shot else ()), *named]))


def open_tasks(names: list[str], folder: Path | None = None, limit: int | None = None) -> Tasks:
    """Read the tasks' data: local files of `folder`, or what lm-evaluation-harness has under these names.

    Raises: `MissingDependencyError` if the harness is not installed; `UnknownMethodError` if it has no task
        of a name; `CalibrationError` if a task's data are absent, unreadable or malformed.
    """
    items = None if folder is None else {name: read_items(file_of(name, folder)) for name in names}
    require_harness()
    from wanda_fast.data.harness import quiet

    with quiet():
        loaded = _of_harness(names) if items is None else {"tasks": _of_files(items), "groups": {}}
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Tasks(loaded, limit, items and _digest(items))


def require_harness() -> None:
    """Raise `MissingDependencyError` if lm-evaluation-harness cannot be imported."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "tasks need lm-evaluation-harness, which is not installed: pip install 'wanda_fast[eval]'"
        )
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"tasks need lm-evaluation-harness, which cannot be imported: {reason(error)}"
        ) from error


def _of_files(items: dict[str, list[dict]]) -> dict[str, object]:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def rows_of(name: str) -> Callable:
        # The harness passes the task's own settings.
        return lambda **_: {"test": Dataset.from_list(items[name])}

    own = {name: {"custom_dataset": rows_of(name), "metadata": {"version": 1.0}} for name in items}
    return {name: ConfigurableTask(config=harness_config(name, items[name]) | own[name]) for name in items}


def _of_harness(names: list[str]) -> dict[str, dict]:
    from lm_eval.tasks import TaskManager

    manager, loaded = TaskManager(), {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        if name not in manager.all_tasks:
            raise UnknownMethodError(_unknown(name, manager.all_tasks))
    for name in names:
        try:
            found = manager.load([name])
        except UNREADABLE as error:
            raise CalibrationError(
                f"task {name!r} cannot be read: {reason(error)}; --tasks_path DIR measures local files"
            ) from error
        for kind in loaded:
            loaded[kind] |= found.get(kind, {})
    return loaded


def _unknown(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=4)
    return (
        f"task {name!r} is not one of the {len(known):,} that lm-evaluation-harness has"
        f"{'; near it: ' if near else ''}{', '.join(near)}"
    )


def _metrics(found: dict[str, object], items: int | None) -> dict[str, float]:
    """The harness's entry of a task, without the names of filters that do nothing."""
    numbers = {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if "," in name and isinstance(value, (int, float))
    }
    return numbers if items is None else numbers | {"items": items}


def _digest(items: dict[str, list[dict]]) -> str:
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()
