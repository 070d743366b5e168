"""Records the inputs of the blocks by a forward in which every block is replaced by a recorder.

A recorder stores its arguments and returns the hidden states unchanged, so the blocks need no weights.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial, reduce
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from wanda_fast.errors import HiddenStatesError, WandaFastError
from wanda_fast.model.architecture import Block
from wanda_fast.model.block_inputs import BlockCall, BlockInputs
from wanda_fast.model.experts import Experts, sorted_by_expert
from wanda_fast.model.offload import Offload
from wanda_fast.model.patching import forwards_replaced

NOTHING = nullcontext()


@torch.no_grad()
def record_block_inputs(
    forward: Callable[[Tensor], object],
    blocks: list[Block],
    samples: Tensor,
    batch_size: int,
    offload: Offload,
) -> BlockInputs:
    """The first block's hidden states, and the other arguments of all blocks.

    Runs `forward(samples[batch])` over all batches with every block replaced by a recorder.

    Args:
        forward: the model's own forward, without a key-value cache.
        blocks: in the order in which the model calls them.
        samples: token ids int64 `[nsamples, seqlen]`, or images `[nsamples, 3, height, width]`.
        offload: makes the buffer of the hidden states; the blocks will run on its device.
    Raises: `HiddenStatesError` if the blocks cannot be run one by one.
    """
    hidden, calls, keep = None, [], _KeepOnce(offload.device)
    for start in range(0, len(samples), batch_size):
        batch = slice(start, min(start + batch_size, len(samples)))
        with _recorders(blocks) as recorders:
            try:
                forward(samples[batch])
            except WandaFastError:
                raise
            except (TypeError, ValueError) as error:
                what = "token ids" if samples.dim() == 2 else "images"
                raise HiddenStatesError(f"the model's forward fails on {what} alone: {error}") from error
        if hidden is None:
            _require_one_after_the_other(recorders, blocks)
        first = recorders[0].hidden
        _require_sequences(first, samples[batch], blocks[0])
        if hidden is None:
            dtypes = [first.dtype, *(recorder.outputs.dtype for recorder in recorders)]
            # Mamba's blocks return float32 for any input.
            dtype = reduce(torch.promote_types, dtypes)
            hidden = offload.empty((len(samples), *first.shape[1:]), dtype)
        hidden[batch] = first
        calls.append([keep(recorder.call, index) for index, recorder in enumerate(recorders)])
    return BlockInputs(hidden, batch_size, calls, samples if blocks[-1].chain else None, offload)


@torch.no_grad()
def record_next_chain_(
    forward: Callable[[Tensor], object], blocks: list[Block], index: int, inputs: BlockInputs
) -> None:
    """Replace the outputs of block `index`, the last of its chain, by the inputs of the block after it.

    What stands between the two runs by the model's own code, in a forward that stops behind it.

    Args:
        forward, blocks: as for `record_block_inputs`, which gave `inputs`.
    """
    hidden = inputs.hidden if not len(inputs.hidden) else None
    for batch in inputs.slices():
        with _recorders(blocks) as recorders, suppress(_Enough):
            recorders[index].given, recorders[index + 1].is_enough = inputs.hidden[batch], True
            forward(inputs.samples[batch])
        first = recorders[index + 1].hidden
        if hidden is None:
            dtype = torch.promote_types(first.dtype, inputs.hidden.dtype)
            hidden = inputs.offload.empty((len(inputs.hidden), *first.shape[1:]), dtype)
        hidden[batch] = first
    inputs.hidden = hidden


class _Enough(Exception):
    """Ends a forward at the block whose input is wanted."""


def _require_sequences(hidden: Tensor, samples: Tensor, block: Block) -> None:
    """Raise `HiddenStatesError` if hidden states cannot be split into samples."""
    # Of token ids, a fourth dimension may come before the sequences, and be as long as they are many by
    # chance. Then the second dimension is not the tokens.
    leading = 2 if samples.dim() == 2 and hidden.dim() > 3 else 1
    if hidden.shape[:leading] != samples.shape[:leading]:
        what = f"sequences of {samples.shape[1]} tokens" if samples.dim() == 2 else "images"
        form = "sequences, tokens" if samples.dim() == 2 else "images"
        raise HiddenStatesError(
            f"{type(block.module).__name__} takes hidden states {list(hidden.shape)} of {len(samples)} "
            f"{what}: only [{form}, ...] run block by block"
        )


def _require_one_after_the_other(recorders: list["_Recorder"], blocks: list[Block]) -> None:
    """Raise `HiddenStatesError` unless each block runs once, on the output of the previous one."""
    for recorder, block in zip(recorders, blocks, strict=True):
        if recorder.calls != 1:
            raise HiddenStatesError(
                f"{block.name} runs {recorder.calls} times in a forward: only blocks that run once can be "
                "pruned one by one"
            )
    for index in range(1, len(blocks)):
        if blocks[index].chain != blocks[index - 1].chain:
            continue
        output, following = recorders[index - 1].hidden, recorders[index].hidden
        if following is not output and not torch.equal(following.to(output), output):
            raise HiddenStatesError(
                f"the input of {blocks[index].name} is not the output of {blocks[index - 1].name}: only "
                "blocks that follow each other directly can be pruned one by one"
            )
        if recorders[index].reads_other_outputs():
            raise HiddenStatesError(
                f"{blocks[index].name} takes more of an earlier block's output than its hidden states: such "
                "blocks cannot be pruned one by one"
            )


@contextmanager
def blocks_skipped(blocks: list[Block], hidden: Tensor) -> Iterator[None]:
    """Context in which the model's forward runs no block and uses `hidden` as the last block's output."""
    with _recorders(blocks) as recorders:
        recorders[-1].given = hidden
        yield


@contextmanager
def _recorders(blocks: list[Block]) -> Iterator[list["_Recorder"]]:
    """Context in which each block's forward is a recorder. The modules keep their other attributes."""
    known = _OUTPUTS.setdefault(blocks[0].module, {})
    recorders = [_Recorder(block.module, block.experts, known) for block in blocks]
    # Several recorders for a module that is several of the blocks.
    turns: dict[nn.Module, list[_Recorder]] = {}
    for recorder in recorders:
        turns.setdefault(recorder.block, []).append(recorder)
    with forwards_replaced({module: partial(_take_turn, own) for module, own in turns.items()}):
        yield recorders


def _take_turn(recorders: list["_Recorder"], *args, **kwargs) -> object:
    recorder = recorders.pop(0) if len(recorders) > 1 else recorders[0]
    return recorder(*args, **kwargs)


class _Recorder:
    """Replaces a block's forward: stores the arguments, and returns its input, or `given` if that is set."""

    def __init__(
        self, block: nn.Module, experts: list[Experts], known: dict[tuple[type, torch.dtype], "_Outputs"]
    ):
        self.block, self.own, self.experts, self.known = block, block.forward, experts, known
        self.calls = 0
        self.given: Tensor | None = None
        self.is_enough = False

    def __call__(self, *args, **kwargs):
        # Some models pass the hidden states by name.
        if not args:
            args = (kwargs.pop("hidden_states"),)
        self.calls += 1
        self.hidden, self.call = args[0], BlockCall(args[1:], kwargs)
        if self.is_enough:
            raise _Enough
        self.outputs = self._outputs()
        others = self.outputs.others
        if self.given is not None:
            return self.given if others is None else (self.given, *[None] * len(others))
        return self.hidden if others is None else (self.hidden, *others)

    def reads_other_outputs(self) -> bool:
        """Whether the block computes with what an earlier block returned after its hidden states.

        GLM-5's blocks receive the indices that the block before has selected, and only some of them read it.
        """
        watch = _Watch(leaf for leaf in tree_leaves((self.call.args, self.call.kwargs)) if _is_meta(leaf))
        if watch.tensors:
            with forwards_replaced({self.block: self.own}):
                try:
                    _on_meta(self.block, self.hidden, self.call, watch)
                except (RuntimeError, NotImplementedError):
                    return True
        return watch.used

    def _outputs(self) -> "_Outputs":
        """What the block would return: found once for each class of blocks and dtype.

        The block runs on the meta device, which computes nothing and needs no weights. If an operation has
        no meta kernel, the block runs with zeros for weights that are not loaded.
        """
        key = type(self.block), self.hidden.dtype
        if key not in self.known:
            own_forward = forwards_replaced({self.block: self.own})
            with own_forward, sorted_by_expert(self.experts):
                try:
                    output = _on_meta(self.block, self.hidden, self.call)
                except (RuntimeError, NotImplementedError):
                    output = _on_zeros(self.block, self.hidden, self.call)
            hidden, *others = output if isinstance(output, tuple | list) else (output,)
            others = [each.to("meta") if isinstance(each, Tensor) else None for each in others]
            self.known[key] = _Outputs(hidden.dtype, others if isinstance(output, tuple | list) else None)
        return self.known[key]


@dataclass(frozen=True)
class _Outputs:
    """The form of a block's return value.

    Attributes:
        dtype: of the hidden states.
        others: what follows the hidden states in a tuple: tensors on the meta device, which are recognised in
            another block's arguments, and None for all else. None if the block returns no tuple.
    """

    dtype: torch.dtype
    others: list[Tensor | None] | None


# first block of a model -> (class of a block, dtype of its input) -> the form of its return value. Models of
# one class can differ, hence the first key.
_OUTPUTS: WeakKeyDictionary[nn.Module, dict[tuple[type, torch.dtype], _Outputs]] = WeakKeyDictionary()


class _Watch(TorchFunctionMode):
    """Notes whether an operation takes one of these tensors."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.tensors, self.used = {id(tensor): tensor for tensor in tensors}, False

    def __torch_function__(self, operation, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.used |= any(id(leaf) in self.tensors for leaf in tree_leaves((args, kwargs)))
        return operation(*args, **kwargs)


def _is_meta(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def _on_meta(
    block: nn.Module, hidden: Tensor, call: BlockCall, watch: AbstractContextManager = NOTHING
) -> object:
    state = dict(block.named_parameters()) | dict(block.named_buffers())
    to_meta = lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf  # noqa: E731
    state, args, kwargs = tree_map(to_meta, (state, (hidden, *call.args), call.kwargs))
    with watch:
        return torch.func.functional_call(block, state, args, kwargs)


def _on_zeros(block: nn.Module, hidden: Tensor, call: BlockCall) -> object:
    """The block's return value, with zeros for weights on the meta device."""
    state = dict(block.named_parameters()) | dict(block.named_buffers())
    state = {key: torch.zeros_like(t, device=hidden.device) if t.is_meta else t for key, t in state.items()}
    return torch.func.functional_call(block, state, (hidden, *call.args), call.kwargs)


class _KeepOnce:
    """Moves arguments to the device, and keeps one copy of equal tensors: most masks recur in every batch.

    Attributes:
        first: block -> the leaves of its first call.
        kept: id of a tensor seen in this batch -> (the tensor, what is kept of it).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.first: dict[int, list] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, call: BlockCall, block: int) -> BlockCall:
        if block == 0:
            self.kept.clear()
        leaves, structure = tree_flatten((call.args, call.kwargs))
        first = self.first.get(block, [None] * len(leaves))
        leaves = [self._keep(leaf, known) for leaf, known in zip(leaves, first, strict=True)]
        self.first.setdefault(block, leaves)
        return BlockCall(*tree_unflatten(leaves, structure))

    def _keep(self, leaf: object, known: object) -> object:
        # Of an earlier block's output, which this one does not read.
        if _is_meta(leaf):
            return None
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.kept:
            moved = leaf.to(self.device)
            same = isinstance(known, Tensor) and known.dtype == moved.dtype and torch.equal(known, moved)
            self.kept[id(leaf)] = (leaf, known if same else moved)
        return self.kept[id(leaf)][1]
