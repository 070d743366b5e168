"""The hidden states that move from block to block: of the calibration samples, and of the evaluation windows.

A streamed model is read once, so the evaluation runs along with the pruning: each block is applied to one set
of hidden states of the windows while it is dense, and to a second set after it is pruned. A model in memory
is evaluated by whole forwards instead, and has calibration samples here alone.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wanda_fast.data.evaluation import EvaluationSet, batch_of, mean_perplexity, window_losses
from wanda_fast.model.block_inputs import BlockInputs
from wanda_fast.model.block_lists import classifies_images
from wanda_fast.model.block_source import BlockSource
from wanda_fast.model.offload import Offload, Offloaded
from wanda_fast.model.recorder import blocks_skipped, record_block_inputs, record_next_chain_


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
        return {name: inputs.hidden for name, inputs in self._present().items()}

    @property
    def has_containers(self) -> bool:
        """Whether blocks pass on more than hidden states, e.g. keys and values for later blocks."""
        return any(inputs.has_containers for inputs in self._present().values())

    def restore_(self, file: Path) -> None:
        """Overwrite the hidden states with those in a safetensors file, one batch at a time."""
        with safe_open(file, "pt") as opened:
            for name, inputs in self._present().items():
                stored = opened.get_slice(name)
                if (shape := torch.Size(stored.get_shape())) != inputs.hidden.shape:
                    inputs.hidden = inputs.offload.empty(shape, inputs.hidden.dtype)
                for batch in inputs.slices():
                    inputs.hidden[batch] = stored[batch.start : batch.stop]

    def enter_next_chain_(self, source: BlockSource, index: int) -> None:
        """Replace outputs of block `index`, the last of its chain, by inputs of the next one."""
        if not (present := self._present()):
            return
        with source.surroundings(head=False):
            forward = _forward_of(source.model)
            for inputs in present.values():
                record_next_chain_(forward, source.blocks, index, inputs)

    def _present(self) -> dict[str, BlockInputs]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: inputs for name, inputs in named.items() if inputs is not None}


def record_activations(
    source: BlockSource,
    offload: Offload,
    token_ids: Tensor | None,
    batch_size: int,
    evaluation: EvaluationSet | None = None,
    pruned: bool = True,
) -> Activations:
    """The first block's inputs, for calibration samples and evaluation windows.

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
        forward = _forward_of(source.model)
        if token_ids is not None:
            activations.calibration = record_block_inputs(
                forward, source.blocks, token_ids, batch_size, offload
            )
        if evaluation is not None:
            activations.dense = record_block_inputs(
                forward, source.blocks, evaluation.windows, batch_of(evaluation), offload
            )
            activations.pruned = activations.dense.copy(offload) if pruned else None
    return activations


def perplexities(
    source: BlockSource, activations: Activations, evaluation: EvaluationSet
) -> dict[str, float]:
    """Perplexity by "dense" and "pruned", from the outputs of the last block.

    Must be called inside `source.surroundings(head=True)`.
    """
    measured = {"dense": activations.dense, "pruned": activations.pruned}
    return {name: _perplexity(source, inputs, evaluation) for name, inputs in measured.items() if inputs}


@torch.no_grad()
def _perplexity(source: BlockSource, inputs: BlockInputs, evaluation: EvaluationSet) -> float:
    """Final norm, head and soft-capping run by the model's own code, in a forward without its blocks."""
    losses = []
    for batch in inputs.slices():
        hidden = inputs.hidden[batch]
        with blocks_skipped(source.blocks, hidden):
            losses += window_losses(source.model, evaluation.windows[batch].to(hidden.device))
    return mean_perplexity(losses)


def _forward_of(model: nn.Module):
    """The model's own forward without the language-model head, since the logits are not needed."""
    body = getattr(model, "base_model", model)
    embedding = next(p for p in body.parameters() if not p.is_meta)
    embedding_device = embedding.device
    if classifies_images(model):
        return lambda images: body(images.to(embedding_device, embedding.dtype))
    return lambda ids: body(input_ids=ids.to(embedding_device), use_cache=False)
