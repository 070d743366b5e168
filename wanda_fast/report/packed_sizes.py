"""Bytes that packing a checkpoint saves, beside what quantising the dense one would save."""

from dataclasses import dataclass

# Bits of a weight in groups of 32 with a 16-bit scale, as llama.cpp's Q8_0 and Q4_0 have them.
BITS_8, BITS_4 = 8.5, 4.5


@dataclass
class PackedSizes:
    """A packed checkpoint in numbers.

    Attributes:
        packed: number of packed weights (matrices, or stacks of them).
        prunable: number of weights that could have been packed: the blocks' prunable ones.
        dense_bytes: of the packed weights before.
        packed_bytes: of the packed weights.
        prunable_bytes, prunable_numel: of all prunable weights, dense.
        before, after: bytes of the files of weights.
    """

    packed: int
    prunable: int
    dense_bytes: int
    packed_bytes: int
    prunable_bytes: int
    prunable_numel: int
    before: int
    after: int

    def quantised(self, bits: float) -> int:
        """Bytes of the dense files with `bits` bits for each prunable weight."""
        return self.before - self.prunable_bytes + round(self.prunable_numel * bits / 8)

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each row of a table."""
        return [
            ("weights packed", f"{self.packed} of {self.prunable} prunable ones"),
            ("their bytes", _change(self.dense_bytes, self.packed_bytes)),
            ("all files' bytes", _change(self.before, self.after)),
            ("dense model in 8 bits", f"{self.quantised(BITS_8):,}, prunable weights at {BITS_8} bits"),
            ("dense model in 4 bits", f"{self.quantised(BITS_4):,}, prunable weights at {BITS_4} bits"),
            ("as in Q8_0 and Q4_0", "groups of 32 weights with a 16-bit scale; all else as it is"),
        ]


def _change(before: int, after: int) -> str:
    return f"{before:,} to {after:,} ({after / before:.4f})"
