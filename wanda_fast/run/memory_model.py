"""The memory model: a run's peak memory, above that of Python and torch, as a formula.

    kept    = activations (if they are in memory) + masks
    block   = block + ahead + forward + widening + max(statistics + hessians, stored, converted)
    ends    = surroundings + logits
    on a CPU: kept + max(block, ends)

On a GPU, `widening` is not needed, and `ahead` and `stored` are on the host. `ahead` counts twice, since one
block is copied to the GPU while the next is read. `stored` counts in any dtype, since a block is copied to
the host to be written. `converted` is on the GPU, at times when only the block is there. Of Hessians on the
host, the formula counts the bands that visit the GPU; `hessian_memory.place_hessians` checks the rest.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanda_fast.data.scores import COPIES, tokens_at_once
from wanda_fast.model.architecture import Block
from wanda_fast.model.block_forward import WIDENED_TOKENS, WIDENED_WEIGHTS, multiplies_bf16
from wanda_fast.model.block_lists import is_of_transformers
from wanda_fast.model.linears import Linear
from wanda_fast.model.offload import MAX_PENDING_COPIES
from wanda_fast.pruning.methods import Method
from wanda_fast.run.hessian_memory import block_bytes, visiting_bytes
from wanda_fast.run.job import Job
from wanda_fast.run.live_model import dtype_of

FP32 = 4
# Attributes of a configuration that say how many experts a token is sent to.
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")


@dataclass
class Footprint:
    """The terms of the formula, in bytes.

    Attributes:
        block: the largest block, in the dtype of the computation.
        ahead: the next block while it is read, with the copy that its widening needs if it is computed in
            another dtype.
        stored: the copy of a block that is written, if it is not written from where it is.
        converted: parameters of a block that are merged from several tensors on disk: they are copied when
            they are merged, and when they are split to be written.
        activations: hidden states of all sequences, for calibration and evaluation.
        statistics: of one block.
        hessians: of one block, if the method has them.
        masks: packed, of all blocks, if they are saved.
        surroundings: all weights outside the blocks: embeddings, final norm, head.
        forward: temporaries of a block's forward pass. On a CPU they are reused from block to block.
        widening: fp32 copies of one bf16 linear and its input, on a CPU that multiplies them in fp32.
        logits: of the tokens whose logits are looked at together, in fp32, COPIES times; and the head's fp32
            copy, on a CPU that multiplies bf16 in fp32.
        dense: the copy of a block's prunable weights from which a sweep restores them.
    """

    block: int
    ahead: int
    stored: int
    converted: int
    activations: int
    statistics: int
    hessians: int
    masks: int
    surroundings: int
    forward: int
    widening: int
    logits: int
    dense: int = 0

    def peak(self, device: torch.device, kind: str) -> dict[str, int]:
        """Peak bytes on the host, and on the GPU if `device` is one, with activations kept in `kind`."""
        gathered, ends = self.statistics + self.hessians, self.surroundings + self.logits
        on_host = self.activations if kind == "host" else 0
        if device.type == "cpu":
            kept = self.masks + (self.activations if kind != "disk" else 0)
            inside = (
                self.block
                + self.dense
                + self.ahead
                + self.forward
                + self.widening
                + max(gathered, self.stored, self.converted)
            )
            return {"host": kept + max(inside, ends)}
        on_device = self.activations if kind == "device" else 0
        return {
            "host": self.masks
            + on_host
            + max(2 * self.ahead + (self.stored or self.block), 2 * self.surroundings),
            str(device): on_device
            + max(self.block + self.dense + max(gathered + self.forward, self.converted), ends),
        }


def footprint(
    job: Job,
    model: nn.Module,
    blocks: list[Block],
    stored: torch.dtype | None,
    batch_size: int,
    converted: frozenset[str] = frozenset(),
) -> Footprint:
    """The formula's terms for a job with `batch_size` sequences per forward pass.

    Args:
        stored: dtype of a streamed checkpoint. None for a model in memory: its weights exist already and do
            not count.
        converted: names of the parameters that are merged from several tensors of the checkpoint.
    """
    config = model.config.get_text_config() if is_of_transformers(model) else None
    dtype = dtype_of(model)
    size = dtype.itemsize
    widths = [linear.in_features for block in blocks for linear in block.linears]
    hidden_size = getattr(config, "hidden_size", None) or min(widths, default=0)
    calibration, windows = job.own_tokens, job.own_windows
    weights = surroundings = 0
    if stored is not None:
        each = [_weights(block.module) for block in blocks]
        weights, surroundings = max(each), _weights(model) - sum(each)
    # Bytes of a weight in the checkpoint's dtype, beside its copy in the dtype of the computation.
    widened = stored.itemsize if stored not in (None, dtype) else 0
    in_fp32 = dtype == torch.bfloat16 and not multiplies_bf16()
    # Bytes of one value of the hidden states between blocks.
    hidden_value = FP32 if getattr(config, "residual_in_fp32", False) else size
    tokens = 0 if calibration is None else math.prod(job.calibration_shape)
    use = job.method.hessians
    # In one pass, all sequences are inside the block at once.
    one_pass = job.sequential == "linear"
    inside = tokens if one_pass or not tokens else min(tokens, batch_size * job.calibration_shape[1])
    in_windows = 0 if windows is None else windows.numel()
    evaluated = 0 if windows is None else min(in_windows, job.evaluation.batch_size * windows.shape[1])
    activations = (tokens + 2 * in_windows) * hidden_size * hidden_value
    if job.image_shapes is not None:
        activations = job.calibration_shape[0] * job.image_shapes.values * hidden_value
    return Footprint(
        block=weights * size,
        ahead=weights * (size + widened),
        stored=weights * widened,
        converted=max(_converted(block, converted) for block in blocks) * size,
        activations=activations,
        statistics=max(_statistics(block, job.method) for block in blocks) if tokens else 0,
        hessians=block_bytes(blocks, use) + visiting_bytes(use) if tokens else 0,
        masks=0 if job.masks is None else sum(_mask_bytes(block) for block in blocks),
        surroundings=surroundings * size,
        forward=max(inside, evaluated)
        * (_forward_per_token(blocks, hidden_size, size) + _experts_per_token(blocks, config, size)),
        widening=max(
            (_widening(linear) for block in blocks for linear in block.linears if in_fp32), default=0
        ),
        logits=0 if windows is None else _logits(evaluated, config, job.device, in_fp32),
    )


def _logits(evaluated: int, config, device: torch.device, in_fp32: bool) -> int:
    """Bytes of the logits of some tokens, and of the head's weights if they are widened."""
    tokens = min(evaluated, tokens_at_once(config.vocab_size, device))
    widened = min(config.vocab_size * config.hidden_size, WIDENED_WEIGHTS) if in_fp32 else 0
    return FP32 * (COPIES * tokens * config.vocab_size + widened)


def _forward_per_token(blocks: list[Block], hidden_size: int, size: int) -> int:
    """Bytes per token: a gated MLP's activated gate, up and product; residual, norm and the batches that are
    being copied out; a norm's two fp32 copies."""
    widest = max((linear.out_features for block in blocks for linear in block.dense), default=0)
    return size * (3 * widest + (3 + MAX_PENDING_COPIES) * hidden_size) + 2 * FP32 * hidden_size


def _experts_per_token(blocks: list[Block], config, size: int) -> int:
    """Bytes per token in a module of experts, for each expert of the token: input, first projection's output,
    hidden values, output; the weighted outputs, fp32, in the experts' order and in the tokens'."""
    chosen = next((getattr(config, name) for name in EXPERTS_OF_A_TOKEN if hasattr(config, name)), 1)
    most = 0
    for experts in (each for block in blocks for each in block.experts):
        first, down = experts.first.stack, experts.down.stack
        values = first.shape[2] + first.shape[1] + down.shape[2] + down.shape[1]
        most = max(most, experts.per_token(chosen) * (size * values + 2 * FP32 * down.shape[1]))
    return most


def _widening(linear: Linear) -> int:
    weight = linear.weight
    return FP32 * (min(weight.numel(), WIDENED_WEIGHTS) + WIDENED_TOKENS * sum(weight.shape))


def _statistics(block: Block, method: Method) -> int:
    """Bytes of a block's statistics, by making them on the meta device. Each linear counts with its own."""
    gathered = [method.statistic(linear.on_meta()) for linear in block.linears]
    held = [value for stat in gathered if stat is not None for value in vars(stat).values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _mask_bytes(block: Block) -> int:
    return sum(linear.out_features * -(-linear.in_features // 8) for linear in block.linears)


def _converted(block: Block, names: frozenset[str]) -> int:
    """Weights of a block in the parameters with these names in the model."""
    each = block.module.named_parameters(block.name)
    return sum(parameter.numel() for name, parameter in each if name in names)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
