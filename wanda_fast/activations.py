"""What travels from block to block: the calibration's hidden states, and those of the evaluation windows.

A streamed model is read once. So its perplexities travel along: the windows' hidden states pass through each
block while it is dense, and others of the same windows once it is pruned.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from wanda_fast.block_inputs import BlockInputs, hidden_states_given, record_block_inputs
from wanda_fast.evaluation import EvaluationSet, batch_of, mean_perplexity, window_losses
from wanda_fast.sources import BlockSource


@dataclass
class Activations:
    """Hidden states at one boundary between blocks; None for what nobody asked for."""

    calibration: BlockInputs | None = None
    dense: BlockInputs | None = None  # evaluation windows, dense blocks
    pruned: BlockInputs | None = None  # evaluation windows, pruned blocks

    def hidden(self) -> dict[str, Tensor]:
        return {name: inputs.hidden for name, inputs in self._present()}

    def restore_(self, hidden: dict[str, Tensor]) -> None:
        """Overwrite with the hidden states of another boundary."""
        for name, inputs in self._present():
            inputs.hidden.copy_(hidden[name])

    def _present(self) -> Iterator[tuple[str, BlockInputs]]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ((name, inputs) for name, inputs in named if inputs is not None)


def record_activations(
    source: BlockSource,
    device: torch.device,
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
                forward, source.blocks, token_ids, batch_size, device
            )
        if evaluation is not None:
            activations.dense = record_block_inputs(
                forward, source.blocks, evaluation.windows, batch_of(evaluation), device
            )
            activations.pruned = activations.dense.copy() if pruned else None
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
    for windows, hidden in zip(
        evaluation.windows.split(inputs.batch_size), inputs.hidden.split(inputs.batch_size), strict=True
    ):
        with hidden_states_given(source.blocks, hidden):
            losses += window_losses(source.model, windows.to(hidden.device))
    return mean_perplexity(losses)


def _forward_of(model: nn.Module):
    """The model's own forward without the language-model head, whose logits nobody reads."""
    body = getattr(model, "base_model", model)
    embedding_device = next(p.device for p in body.parameters() if not p.is_meta)
    return lambda ids: body(input_ids=ids.to(embedding_device), use_cache=False)
