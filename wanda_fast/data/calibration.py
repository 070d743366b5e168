"""Calibration tokens: windows of seqlen tokens, drawn at random from a text as in the published code."""

import hashlib
import logging
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from wanda_fast.data.documents import Text
from wanda_fast.data.given import given_text, ids_or_rows, require_ids
from wanda_fast.data.text import calibration_text, named
from wanda_fast.errors import CalibrationError

logger = logging.getLogger(__name__)

# Documents drawn in search of one longer than seqlen, before all documents are joined into one text.
DRAWS_PER_DOCUMENT = 1000


def log_warning(sentence: str) -> None:
    logger.warning("%s", sentence)


def calibration_tokens(
    dataset: str | Path | Tensor | Iterable,
    tokenizer,
    nsamples: int,
    seqlen: int,
    seed: int,
    cache_dir: str | None = None,
    text_column: str | None = None,
    warn: Callable[[str], None] = log_warning,
) -> Tensor:
    """Token ids int64 `[nsamples, seqlen]`.

    Args:
        dataset: a name or path for `text.calibration_text`; token ids of any integer dtype
            `[nsamples, seqlen]`, which are used unchanged; or what else `given.ids_or_rows` takes.
        tokenizer: the model's; not needed for token ids.
        nsamples, seqlen: number and length of the windows; ignored for token ids.
        seed: of Python's `random`; ignored for token ids.
        cache_dir: for downloads from the hub.
        text_column: of data that has columns.
        warn: receives one sentence for each thing that was skipped, replaced or packed.
    Raises: `CalibrationError` if the text cannot be read, has no more than seqlen tokens, or no tokenizer is
        given for it; if token ids are not a non-empty matrix of integers.
    Source: the published Wanda's `lib/data.py`: `random.seed(seed)`, then a window begins at
        `random.randint(0, len - seqlen - 1)`.
    """
    if not isinstance(dataset, (str, Path)):
        dataset = ids_or_rows(dataset, text_column)
    if isinstance(dataset, Tensor):
        return _checked_ids(dataset)
    if nsamples < 1 or seqlen < 1:
        raise CalibrationError(f"nsamples and seqlen must be at least 1, got {nsamples} and {seqlen}")
    require_tokenizer(tokenizer, dataset)
    if isinstance(dataset, list):
        text = given_text(dataset, text_column, tokenizer)
    else:
        text = calibration_text(dataset, cache_dir, text_column, tokenizer)
    for note in text.notes:
        warn(note)
    # The same sequence as after random.seed(seed); the caller's random state is not changed.
    rng = random.Random(seed)
    if text.is_one:
        return _windows_of_one(text, tokenizer, nsamples, seqlen, rng)
    windows = _windows_of_documents(text, tokenizer, nsamples, seqlen, rng)
    if windows is None:
        warn(
            f"{text.label}: no document of more than {seqlen} tokens in {DRAWS_PER_DOCUMENT} draws; all "
            f"documents are packed into one text"
        )
        return _windows_of_one(text.joined(), tokenizer, nsamples, seqlen, rng)
    return windows


def require_tokenizer(tokenizer, dataset: str | Path | list) -> None:
    """Raise `CalibrationError` if there is no tokenizer for a dataset that is text."""
    if tokenizer is None:
        name = f"of {len(dataset)} rows" if isinstance(dataset, list) else named(dataset)
        raise CalibrationError(f"dataset {name} is text: pass a tokenizer, or token ids in its place")


def tokenize(tokenizer, text: str, special_tokens: bool = True) -> Tensor:
    """Token ids int64 `[tokens]`, with the special tokens that the tokenizer adds by default, or none."""
    options = {} if special_tokens else {"add_special_tokens": False}
    return tokenizer(text, return_tensors="pt", verbose=False, **options).input_ids[0]


def digest(samples: Tensor) -> str:
    """sha256 of token ids or images and their shape: equal if two runs have the same calibration data."""
    shape = "x".join(map(str, samples.shape))
    dtype = torch.float32 if samples.is_floating_point() else torch.int64
    return hashlib.sha256(shape.encode() + samples.to("cpu", dtype).numpy().tobytes()).hexdigest()


def _checked_ids(ids: Tensor) -> Tensor:
    if ids.dim() != 2:
        raise CalibrationError(
            f"token ids must be integers [nsamples, seqlen], got {ids.dtype} {list(ids.shape)}"
        )
    return require_ids(ids, "[nsamples, seqlen]")


def _windows_of_one(text: Text, tokenizer, nsamples: int, seqlen: int, rng: random.Random) -> Tensor:
    ids = tokenize(tokenizer, text.documents[0], text.special_tokens)
    if len(ids) <= seqlen:
        raise CalibrationError(
            f"text {text.label} has {len(ids)} tokens; seqlen {seqlen} needs more: lower --seqlen"
        )
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([ids[start : start + seqlen] for start in starts])


class _LongDocuments:
    """Token ids of the documents that are longer than seqlen. Each document is tokenised once."""

    def __init__(self, text: Text, tokenizer, seqlen: int):
        self.text, self.tokenizer, self.seqlen = text, tokenizer, seqlen
        self.known: dict[int, Tensor | None] = {}

    def get(self, index: int) -> Tensor | None:
        """Token ids int32 `[tokens]`, as large as the text; None if not longer than seqlen."""
        if index not in self.known:
            ids = tokenize(self.tokenizer, self.text.documents[index], self.text.special_tokens)
            self.known[index] = ids.int() if len(ids) > self.seqlen else None
        return self.known[index]

    def draw(self, rng: random.Random) -> Tensor | None:
        """A random one; None if none is found."""
        for _ in range(DRAWS_PER_DOCUMENT):
            ids = self.get(rng.randint(0, len(self.text.documents) - 1))
            if ids is not None:
                return ids
        return None


def _windows_of_documents(
    text: Text, tokenizer, nsamples: int, seqlen: int, rng: random.Random
) -> Tensor | None:
    """One window of each of nsamples random documents; None if they are too short."""
    documents, windows = _LongDocuments(text, tokenizer, seqlen), []
    for _ in range(nsamples):
        ids = documents.draw(rng)
        if ids is None:
            return None
        start = rng.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen].long())
    return torch.stack(windows)
