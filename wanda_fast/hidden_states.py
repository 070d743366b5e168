"""The hidden states that move from block to block: of the calibration samples, and of the evaluation windows.

A streamed model is read once, so the evaluation runs along with the pruning: each block is applied to one set
of hidden states of the windows while it is dense, and to a second set after it is pruned. A model in memory
that is pruned in place is evaluated by forwards of its own, and has calibration samples here alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.data.scores import Scores, scores_of_hidden
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.model.block_source import BlockSource
from wanda_fast.model.head import body
from wanda_fast.model.offload import Offload, Offloaded
from wanda_fast.model.recorder import record_block_inputs, record_next_chain_


@dataclass
class Activations:
    """The inputs of one block. A field is None if the run does not need it.

    Attributes:
        calibration: of the calibration samples.
        dense: of the evaluation windows, after dense blocks.
        pruned: of the evaluation windows, after pruned blocks.
    """

    calibration: BlockInputs | None = None
    dense: BlockInputs | None = None
    pruned: BlockInputs | None = None

    def hidden(self) -> dict[str, Tensor | Offloaded]:
        """The hidden states by field name, each `[sequences, seqlen, features]`."""
        return {name: inputs.hidden for name, inputs in self.present().items()}

    @property
    def has_containers(self) -> bool:
        """Whether blocks pass on more than hidden states, e.g. keys and values for later blocks."""
        return any(inputs.has_containers for inputs in self.present().values())

    def sequences(self) -> dict[str, tuple[int, int]]:
        """By field name, the first of this rank's sequences among those of all ranks, and the one behind."""
        present = self.present()
        return {name: (own.before, own.before + len(own.hidden)) for name, own in present.items()}

    def are_in(self, parts: list[dict[str, tuple[int, int]]]) -> bool:
        """Whether all of this rank's sequences are in files that hold these `sequences`."""
        for name, (first, end) in self.sequences().items():
            held = {index for part in parts if name in part for index in range(*part[name])}
            if not held.issuperset(range(first, end)):
                return False
        return True

    def restore_(self, file: Path, sequences: dict[str, tuple[int, int]]) -> None:
        """Overwrite the hidden states that are in a safetensors file, one batch at a time.

        Args:
            sequences: that the file holds.
        """
        with safe_open(file, "pt") as opened:
            for name, inputs in self.present().items():
                if name in sequences:
                    inputs.restore_(opened.get_slice(name), *sequences[name])

    def distance(self) -> tuple[float, float]:
        """The squared distance of pruned from dense hidden states, and the dense ones' squared length."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self.dense.slices():
            dense, pruned = self.dense.hidden[batch].float(), self.pruned.hidden[batch].float()
            parts = (pruned - dense).square().sum(), dense.square().sum()
            sums += torch.stack(parts).double().cpu()
        return tuple(sums.tolist())

    def present(self) -> dict[str, BlockInputs]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: inputs for name, inputs in named.items() if inputs is not None}


def enter_next_chain_(source: BlockSource, index: int, inputs: list[BlockInputs]) -> None:
    """Replace outputs of block `index`, the last of its chain, by inputs of the next one."""
    if not inputs:
        return
    with source.surroundings(head=False):
        forward = body(source.model)
        for each in inputs:
            record_next_chain_(forward, source.blocks, index, each)


def record_activations(
    source: BlockSource,
    offload: Offload,
    token_ids: Tensor | None,
    batch_size: int,
    evaluation: EvaluationSet | None = None,
    pruned: bool = True,
    ranks: Ranks | None = None,
) -> Activations:
    """The first block's inputs, for calibration samples and evaluation windows: of several ranks, its shares.

    Args:
        source: the model, whose embeddings are loaded for this.
        offload: makes the buffers of the hidden states.
        token_ids: int64 `[nsamples, seqlen]`, or images `[nsamples, 3, height, width]`; None for a method
            that uses no activations.
        batch_size: calibration sequences per forward.
        evaluation: windows to evaluate on block by block; None if the model is in memory.
        pruned: whether to evaluate pruned blocks too.
    Raises: `HiddenStatesError` if the blocks cannot be run one by one; `OutputError` if the hidden states go
        to a disk that has no room for them.
    """
    activations = Activations()
    if token_ids is None and evaluation is None:
        return activations
    with source.surroundings(head=False):
        forward = body(source.model)
        record = partial(_record_share, ranks or Ranks(), forward, source, offload)
        if token_ids is not None:
            activations.calibration = record(token_ids, batch_size)
        if evaluation is not None:
            activations.dense = record(evaluation.windows, evaluation.batch_size)
            activations.pruned = activations.dense.copy(offload) if pruned else None
    return activations


def _record_share(
    ranks: Ranks,
    forward: Callable[[Tensor], object],
    source: BlockSource,
    offload: Offload,
    token_ids: Tensor,
    batch_size: int,
) -> BlockInputs:
    share = ranks.share(len(token_ids))
    # A rank without a sequence runs one, to find out what hidden states look like.
    ids = token_ids[share] if share.stop > share.start else token_ids[:1]
    inputs = record_block_inputs(forward, source.blocks, ids, batch_size, offload)
    if share.stop == share.start:
        shape, dtype = (0, *inputs.hidden.shape[1:]), inputs.hidden.dtype
        inputs = BlockInputs(offload.empty(shape, dtype), batch_size, [])
    inputs.before = share.start
    return inputs


def scores_by_blocks(
    source: BlockSource, states: dict[str, BlockInputs | None], evaluation: EvaluationSet, ranks: Ranks
) -> dict[str, Scores]:
    """Scores by name, from the outputs of the last block.

    Must be called inside `source.surroundings(head=True)`. Each rank has its share of the windows.

    Args:
        states: of the evaluation windows. The dense model's come first; None: there are none.
    """
    hidden_of = {name: inputs.hidden.__getitem__ for name, inputs in states.items() if inputs}
    own = evaluation.part(ranks.share(len(evaluation.windows)))
    # The head of a model in memory can be on another device than its blocks in their turn.
    device = next(p.device for p in source.model.parameters() if not p.is_meta)
    return scores_of_hidden(source.model, source.blocks, own, hidden_of, device)
