"""Every weight of a run, as columns that a page can hold for a model with 20,000 of them.

A name is kept as its block, its kind and its numbers: `model.layers.3.mlp.experts.7.up_proj` is block
`model.layers.3`, kind `mlp.experts.*.up_proj` and number 7.
"""

from math import isfinite

# Attributes of a linear's report, in the order of the page's table.
NUMBERS = ("weights", "sparsity", "relative_error", "error", "tokens", "iterations", "dampening", "seconds")
WORDS = ("fallback", "operation", "backend")
# Lists of blocks inside of stages, as in stages.2.blocks.5.
NESTED = ("blocks", "layers")


def columns(linears: dict[str, dict]) -> dict:
    """The weights of one run: names of blocks and kinds, and for each attribute its values by weight.

    An attribute that no weight has is left out.
    """
    places = [_place(name) for name in linears]
    blocks, kinds = (list(dict.fromkeys(place[part] for place in places)) for part in (0, 1))
    at_block, at_kind = ({name: at for at, name in enumerate(names)} for names in (blocks, kinds))
    values = {name: [_short(linear.get(name)) for linear in linears.values()] for name in NUMBERS}
    values |= {name: _counted([linear.get(name) for linear in linears.values()]) for name in WORDS}
    return {
        "blocks": blocks,
        "labels": _labels(blocks),
        "kinds": kinds,
        "block": [at_block[block] for block, _, _ in places],
        "kind": [at_kind[kind] for _, kind, _ in places],
        "numbers": [numbers for _, _, numbers in places],
        "values": {name: column for name, column in values.items() if _has_any(column)},
    }


def by_block(weights: dict, attribute: str, weighted: bool = False) -> list[float | None]:
    """The mean of an attribute over each block's weights, for blocks in which some weight has it.

    Args:
        weighted: each weight counts by its number of elements.
    """
    sums = [[0.0, 0] for _ in weights["blocks"]]
    column = weights["values"].get(attribute, ())
    sizes = weights["values"]["weights"] if weighted and column else [1] * len(column)
    for block, value, size in zip(weights["block"], column, sizes, strict=False):
        if value is not None:
            sums[block][0] += value * size
            sums[block][1] += size
    return [total / count if count else None for total, count in sums]


def _place(name: str) -> tuple[str, str, list[int]]:
    parts = name.split(".")
    numbered = [at for at, part in enumerate(parts) if part.isdecimal()]
    nested = [at for at in numbered[1:] if parts[at - 1] in NESTED]
    end = (nested or numbered or [-1])[0]
    inside = parts[end + 1 :]
    kind = ".".join("*" if part.isdecimal() else part for part in inside)
    return ".".join(parts[: end + 1]), kind, [int(part) for part in inside if part.isdecimal()]


def _labels(blocks: list[str]) -> list[str]:
    """Short names for an axis: the blocks' numbers, if those tell them apart."""
    numbers = [".".join(part for part in block.split(".") if part.isdecimal()) for block in blocks]
    return numbers if all(numbers) and len(set(numbers)) == len(blocks) else blocks


def _short(value: float | None) -> float | None:
    """Five digits; a page shows no more. JSON has no NaN or infinity."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.5g}") if isfinite(value) else None


def _counted(words: list[str | None]) -> dict:
    """Words that repeat, as their list and each one's place in it."""
    known = {word: at for at, word in enumerate(dict.fromkeys(filter(None, words)))}
    return {"words": list(known), "at": [known.get(word) for word in words]}


def _has_any(column: list | dict) -> bool:
    return bool(column["words"]) if isinstance(column, dict) else any(value is not None for value in column)
