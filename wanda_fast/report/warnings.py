"""Sentences on how a run differs from what was requested."""

from collections import Counter
from collections.abc import Iterable

from wanda_fast.report.contents import STARVED_TOKENS, LinearReport, tokens_by_expert
from wanda_fast.report.versions import deciding_versions


def pruning_warnings(linears: dict[str, LinearReport], dampening: float | None) -> list[str]:
    """A sentence for each way in which the pruning differs from the request.

    Args:
        dampening: that was requested for Hessians; None: there are none.
    """
    found: dict[str, list[str]] = {}
    experts = tokens_by_expert(linears)
    starved = [name for name, tokens in experts.items() if tokens < STARVED_TOKENS]
    for name, linear in linears.items():
        if linear.fallback is not None:
            what = f"pruned by {linear.fallback}, since no calibration token reached them, or zeros alone"
            found.setdefault(what, []).append(name)
        elif None not in (linear.dampening, dampening) and linear.dampening > dampening:
            what = (
                f"factored with a dampening of {linear.dampening:g}, since {dampening:g} leaves their Hessian"
            )
            found.setdefault(f"{what} not positive definite", []).append(name)
    sentences = [f"{_counted(names)} {what}: {_listed(names)}" for what, names in found.items()]
    if starved:
        fewest = min(experts[name] for name in starved)
        sentences.append(
            f"{len(starved):,} of {len(experts):,} experts saw fewer than {STARVED_TOKENS} calibration "
            f"tokens, the fewest {fewest}: {_listed(starved)}"
        )
    return sentences


def version_warnings(notes: Iterable[dict]) -> list[str]:
    """A sentence for each set of other versions that pruned blocks of a resumed run.

    Args:
        notes: of the finished blocks; `versions` is what `deciding_versions` returned.
    """
    now = deciding_versions()
    changes = Counter()
    for note in notes:
        before = now | note.get("versions", {})
        changed = [f"{name} {before[name]}, now {now[name]}" for name in now if before[name] != now[name]]
        changes["; ".join(changed)] += 1
    return [
        f"{count} blocks were pruned by other versions, whose masks may differ: {changed}"
        for changed, count in changes.items()
        if changed
    ]


def ranks_warnings(notes: Iterable[dict], size: int) -> list[str]:
    """A sentence if another number of ranks than `size` pruned blocks of a resumed run; `notes` as above."""
    others = [note.get("ranks", 1) for note in notes if note.get("ranks", 1) != size]
    if not others:
        return []
    listed = ", ".join(map(str, sorted(set(others))))
    return [
        f"{len(others)} blocks were pruned by another number of ranks ({listed}, now {size}): masks may "
        f"differ as they do with another --batch_size"
    ]


def _counted(names: list[str]) -> str:
    return "1 linear was" if len(names) == 1 else f"{len(names):,} linears were"


def _listed(names: list[str], most: int = 4) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
