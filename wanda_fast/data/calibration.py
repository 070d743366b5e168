"""Calibration tokens: windows of seqlen tokens, drawn at random from a text as in the published code."""

import hashlib
import logging
import random

import torch
from torch import Tensor

from wanda_fast.data.text import Text, calibration_text
from wanda_fast.errors import CalibrationError

logger = logging.getLogger(__name__)

# Documents drawn in search of one longer than seqlen, before all documents are joined into one text.
DRAWS_PER_DOCUMENT = 1000


def calibration_tokens(
    dataset: str | Tensor, tokenizer, nsamples: int, seqlen: int, seed: int, cache_dir: str | None = None
) -> Tensor:
    """Token ids int64 `[nsamples, seqlen]`.

    Args:
        dataset: a name or path for `text.calibration_text`, or token ids of any integer dtype
            `[nsamples, seqlen]`, which are used unchanged.
        tokenizer: the model's; not needed for token ids.
        nsamples, seqlen: number and length of the windows; ignored for token ids.
        seed: of Python's `random`; ignored for token ids.
        cache_dir: for downloads from the hub.
    Raises: `CalibrationError` if the text cannot be read, has no more than seqlen tokens, or no tokenizer is
        given for it; if token ids are not a non-empty matrix of integers.
    Source: the published Wanda's `lib/data.py`: `random.seed(seed)`, then a window begins at
        `random.randint(0, len - seqlen - 1)`.
    """
    if isinstance(dataset, Tensor):
        return _checked_ids(dataset)
    if nsamples < 1 or seqlen < 1:
        raise CalibrationError(f"nsamples and seqlen must be at least 1, got {nsamples} and {seqlen}")
    require_tokenizer(tokenizer, dataset)
    text = calibration_text(dataset, cache_dir)
    # The same sequence as after random.seed(seed); the caller's random state is not changed.
    rng = random.Random(seed)
    if text.is_one:
        return _windows_of_one(tokenize(tokenizer, text.documents[0]), text.label, nsamples, seqlen, rng)
    return _windows_of_documents(text, tokenizer, nsamples, seqlen, rng)


def require_tokenizer(tokenizer, dataset: str) -> None:
    """Raise `CalibrationError` if there is no tokenizer for a dataset that is text."""
    if tokenizer is None:
        raise CalibrationError(f"dataset {dataset!r} is text: pass a tokenizer, or token ids in its place")


def tokenize(tokenizer, text: str) -> Tensor:
    """Token ids int64 `[tokens]`, with the special tokens that the tokenizer adds by default."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def digest(token_ids: Tensor) -> str:
    """sha256 of token ids and their shape: equal if two runs have the same calibration data."""
    shape = "x".join(map(str, token_ids.shape))
    return hashlib.sha256(shape.encode() + token_ids.to("cpu", torch.int64).numpy().tobytes()).hexdigest()


def _checked_ids(ids: Tensor) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise CalibrationError(
            f"token ids must be integers [nsamples, seqlen], got {ids.dtype} {list(ids.shape)}"
        )
    return ids.long()


def _windows_of_one(ids: Tensor, label: str, nsamples: int, seqlen: int, rng: random.Random) -> Tensor:
    if len(ids) <= seqlen:
        raise CalibrationError(
            f"text {label} has {len(ids)} tokens; seqlen {seqlen} needs more: lower --seqlen"
        )
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([ids[start : start + seqlen] for start in starts])


def _windows_of_documents(text: Text, tokenizer, nsamples: int, seqlen: int, rng: random.Random) -> Tensor:
    windows = []
    for _ in range(nsamples):
        ids = _long_document(text, tokenizer, seqlen, rng)
        if ids is None:
            logger.warning(
                "%s: no document of more than %d tokens in %d draws; all documents are packed into one text",
                text.label,
                seqlen,
                DRAWS_PER_DOCUMENT,
            )
            packed = tokenize(tokenizer, "\n\n".join(text.documents))
            return _windows_of_one(packed, text.label, nsamples, seqlen, rng)
        start = rng.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return torch.stack(windows)


def _long_document(text: Text, tokenizer, seqlen: int, rng: random.Random) -> Tensor | None:
    """Token ids of a random document that is longer than seqlen; None if none is found."""
    for _ in range(DRAWS_PER_DOCUMENT):
        ids = tokenize(tokenizer, text.documents[rng.randint(0, len(text.documents) - 1)])
        if len(ids) > seqlen:
            return ids
    return None
