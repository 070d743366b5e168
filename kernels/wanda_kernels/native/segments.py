"""Cuts tokens into blocks whose fp32 copies exist at once, and blocks into the tokens of each expert."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

BLOCK_TOKENS = 1024  # tokens of a block: 1024 x 11008 fp32 values are 45 MB


def blocks(n_tokens: int, offsets: Tensor | None) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Blocks of at most BLOCK_TOKENS rows: (the rows, [(expert, its rows within the block)]).

    Without offsets, all tokens are those of expert 0. An expert's tokens are cut at every BLOCK_TOKENS-th of
    them, whatever block they are in, so that its sums do not depend on other experts.
    """
    bounds = [0, n_tokens] if offsets is None else offsets.tolist()
    block: list[tuple[int, int, int]] = []
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        for first in range(start, stop, BLOCK_TOKENS):
            end = min(first + BLOCK_TOKENS, stop)
            if block and end - block[0][1] > BLOCK_TOKENS:
                yield _of_block(block)
                block = []
            block.append((expert, first, end))
    if block:
        yield _of_block(block)


def _of_block(block: list[tuple[int, int, int]]) -> tuple[slice, list[tuple[int, slice]]]:
    begin, end = block[0][1], block[-1][2]
    return slice(begin, end), [(expert, slice(a - begin, b - begin)) for expert, a, b in block]
