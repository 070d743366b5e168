"""The windows that perplexity is measured on, and zero-shot accuracy through lm-evaluation-harness."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from wanda_fast.data.calibration import log_warning, require_tokenizer, tokenize
from wanda_fast.data.given import given_text, ids_or_rows, require_ids
from wanda_fast.data.text import evaluation_text
from wanda_fast.errors import CalibrationError, MissingDependencyError

ZERO_SHOT_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TOKENS_PER_FORWARD = 4096


@dataclass
class EvaluationSet:
    """The data that perplexity is measured on.

    Attributes:
        windows: int64 `[nwindows, seqlen]`.
        label: name of the text.
    """

    windows: Tensor
    label: str

    @property
    def protocol(self) -> str:
        """The data in words, for the report."""
        nwindows, seqlen = self.windows.shape
        return f"{self.label}, {nwindows} windows of {seqlen}, {nwindows * seqlen} tokens"

    @property
    def batch_size(self) -> int:
        """Windows per forward."""
        return max(1, TOKENS_PER_FORWARD // self.windows.shape[1])

    def batches(self) -> Iterator[slice]:
        for start in range(0, len(self.windows), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.windows)))

    def part(self, windows: slice) -> "EvaluationSet":
        return replace(self, windows=self.windows[windows])


def evaluation_set(
    dataset: str | Path | Tensor | Iterable,
    tokenizer,
    seqlen: int,
    max_windows: int | None = None,
    cache_dir: str | None = None,
    text_column: str | None = None,
    warn: Callable[[str], None] = log_warning,
) -> EvaluationSet:
    """Consecutive windows of seqlen tokens from the start of the text. An incomplete last window is dropped.

    Args:
        dataset: a name or path for `text.evaluation_text`; token ids of any shape, which are flattened to
            one text; or what else `given.ids_or_rows` takes.
        tokenizer: the model's; not needed for token ids.
        max_windows: upper bound on the number of windows.
        cache_dir: for downloads from the hub.
        text_column: of data that has columns.
        warn: receives one sentence for each thing that was skipped or replaced.
    Raises: `CalibrationError` if the text cannot be read or has fewer than seqlen tokens, or no tokenizer is
        given for it.
    """
    if not isinstance(dataset, (str, Path)):
        dataset = ids_or_rows(dataset, text_column)
    if isinstance(dataset, Tensor):
        ids, label = require_ids(dataset.flatten(), "of any shape"), "token ids"
    else:
        require_tokenizer(tokenizer, dataset)
        if isinstance(dataset, list):
            text = given_text(dataset, text_column, tokenizer).joined()
        else:
            text = evaluation_text(dataset, cache_dir, text_column, tokenizer)
        for note in text.notes:
            warn(note)
        ids, label = tokenize(tokenizer, text.documents[0], text.special_tokens), text.label
    nwindows = len(ids) // seqlen
    if not nwindows:
        raise CalibrationError(
            f"evaluation text {label} has {len(ids)} tokens, fewer than one window of {seqlen}"
        )
    nwindows = min(nwindows, max_windows or nwindows)
    return EvaluationSet(ids[: nwindows * seqlen].view(nwindows, seqlen), label)


def require_zero_shot() -> None:
    """Raise `MissingDependencyError` if lm-evaluation-harness is not installed. Called before the pruning."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "--eval_zero_shot needs lm-evaluation-harness, which is not installed: "
            "pip install 'wanda_fast[eval]'"
        )


def zero_shot(model: nn.Module, tokenizer, tasks: tuple[str, ...] = ZERO_SHOT_TASKS) -> dict[str, dict]:
    """Zero-shot results by task name, from lm-evaluation-harness.

    Raises: `MissingDependencyError` if it is not installed (it comes with the `eval` extra).
    """
    require_zero_shot()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    return simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))["results"]
