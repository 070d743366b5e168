"""What travels from block to block: the calibration's hidden states, and those of the evaluation windows.

A streamed model is read once. So its perplexities travel along: the windows' hidden states pass through each
block while it is dense, and others of the same windows once it is pruned.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wanda_fast.data.evaluation import EvaluationSet, batch_of, mean_perplexity, window_losses
from wanda_fast.model.block_inputs import BlockInputs, hidden_states_given, record_block_inputs
from wanda_fast.model.block_source import BlockSource
from wanda_fast.model.offload import Moved, Placement


@dataclass
class Activations:
    """Hidden states at one boundary between blocks; None for what nobody asked for."""

    calibration: BlockInputs | None = None
    dense: BlockInputs | None = None  # evaluation windows, dense blocks
    pruned: BlockInputs | None = None  # evaluation windows, pruned blocks

    def hidden(self) -> dict[str, Tensor | Moved]:
        return {name: inputs.hidden for name, inputs in self._present().items()}

    @property
    def has_containers(self) -> bool:
        """Whether blocks hand more on than these hidden states."""
        return any(inputs.has_containers for inputs in self._present().values())

    def restore_(self, file: Path) -> None:
        """Overwrite with the hidden states of another boundary, batch by batch."""
        with safe_open(file, "pt") as opened:
            for name, inputs in self._present().items():
                stored = opened.get_slice(name)
                for batch in inputs.slices():
                    inputs.hidden[batch] = stored[batch.start : batch.stop]

    def _present(self) -> dict[str, BlockInputs]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: inputs for name, inputs in named.items() if inputs is not None}


def record_activations(
    source: BlockSource,
    placement: Placement,
    token_ids: Tensor | None,
    batch_size: int,
    evaluation: EvaluationSet | None = None,
    pruned: bool = True,
) -> Activations:
    """The first block's inputs, for calibration and evaluation windows.

    Args:
        token_ids: int64 `[nsamples, seqlen]`; None for a method that uses no activations.
        pruned: whether there will be pruned blocks to evaluate.
    """
    activations = Activations()
    if token_ids is None and evaluation is None:
        return activations
    with source.surroundings(head=False):
        forward = _forward_of(source.model)
        if token_ids is not None:
            activations.calibration = record_block_inputs(
                forward, source.blocks, token_ids, batch_size, placement
            )
        if evaluation is not None:
            activations.dense = record_block_inputs(
                forward, source.blocks, evaluation.windows, batch_of(evaluation), placement
            )
            activations.pruned = activations.dense.copy(placement) if pruned else None
    return activations


def perplexities(
    source: BlockSource, activations: Activations, evaluation: EvaluationSet
) -> dict[str, float]:
    """Dense and pruned, by name, of what left the last block. The caller holds surroundings and head."""
    measured = {"dense": activations.dense, "pruned": activations.pruned}
    return {name: _perplexity(source, inputs, evaluation) for name, inputs in measured.items() if inputs}


@torch.no_grad()
def _perplexity(source: BlockSource, inputs: BlockInputs, evaluation: EvaluationSet) -> float:
    """Perplexity from the last block's output: norm, head and soft-capping are the model's own code."""
    losses = []
    for batch in inputs.slices():
        hidden = inputs.hidden[batch]
        with hidden_states_given(source.blocks, hidden):
            losses += window_losses(source.model, evaluation.windows[batch].to(hidden.device))
    return mean_perplexity(losses)


def _forward_of(model: nn.Module):
    """The model's own forward without the language-model head, whose logits nobody reads."""
    body = getattr(model, "base_model", model)
    embedding_device = next(p.device for p in body.parameters() if not p.is_meta)
    return lambda ids: body(input_ids=ids.to(embedding_device), use_cache=False)
