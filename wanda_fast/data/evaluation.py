"""The windows that perplexity is measured on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from wanda_fast.data.calibration import log_warning, require_tokenizer, tokenize
from wanda_fast.data.given import given_text, ids_or_rows, require_ids
from wanda_fast.data.text import evaluation_text
from wanda_fast.errors import CalibrationError

TOKENS_PER_FORWARD = 4096


@dataclass
class EvaluationSet:
    """The data that perplexity is measured on.

    Attributes:
        windows: int64 `[nwindows, seqlen]`.
        label: name of the text.
        is_limited: whether the text has more windows.
        bos: whether every window begins with BOS.
    """

    windows: Tensor
    label: str
    is_limited: bool = False
    bos: bool = False

    @property
    def protocol(self) -> str:
        """The data in words, for the report."""
        nwindows, seqlen = self.windows.shape
        begin = ", each beginning with BOS" if self.bos else ""
        return f"{self.label}, {nwindows} windows of {seqlen}, {nwindows * seqlen} tokens{begin}"

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
    measured = min(nwindows, max_windows or nwindows)
    return EvaluationSet(ids[: measured * seqlen].view(measured, seqlen), label, measured < nwindows)
