"""What the blocks receive: the hidden states of every calibration sequence, and each block's own arguments.

One forward of the model with its blocks replaced by recorders: a recorder notes its arguments and hands the
hidden states on, so that no block is computed, and none needs to be loaded.
"""

from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, reduce
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from wanda_fast.errors import HiddenStatesError
from wanda_fast.model.architecture import Block
from wanda_fast.model.block_forward import faster_forward
from wanda_fast.model.offload import Moved, Placement
from wanda_fast.model.patching import forwards_replaced


@dataclass
class BlockCall:
    """A block's arguments but for the hidden states."""

    args: tuple
    kwargs: dict

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for `hidden` `[sequences, seqlen, features]`."""
        with faster_forward(hidden.device):
            output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class BlockInputs:
    """hidden `[nsamples, seqlen, features]`, overwritten block by block; calls[batch][block]."""

    hidden: Tensor | Moved
    batch_size: int
    calls: list[list[BlockCall]]

    def slices(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.hidden)))

    def batches(self, block: int) -> Iterator[tuple[slice, BlockCall]]:
        return ((batch, calls[block]) for batch, calls in zip(self.slices(), self.calls, strict=True))

    def advance_(self, index: int, block: nn.Module) -> None:
        """The hidden states become what `block`, the model's `index`-th, makes of them."""
        for batch, call in self.batches(index):
            self.hidden[batch] = call.run(block, self.hidden[batch])

    @property
    def has_containers(self) -> bool:
        """Whether blocks hand more on than hidden states: what one puts into an argument, another reads."""
        calls = [(call.args, call.kwargs) for call in self.calls[0]]
        return any(map(_is_container, tree_leaves(calls)))

    def copy(self, placement: Placement) -> "BlockInputs":
        """Hidden states and containers of its own; all other arguments are shared."""
        hidden = placement.empty(self.hidden.shape, self.hidden.dtype)
        for batch in self.slices():
            hidden[batch] = self.hidden[batch]
        return BlockInputs(hidden, self.batch_size, [_with_own_containers(calls) for calls in self.calls])


def _with_own_containers(calls: list[BlockCall]) -> list[BlockCall]:
    """The calls of one forward: a container that blocks share has one copy, which they share too."""
    copies: dict[int, object] = {}

    def own(leaf: object) -> object:
        return deepcopy(leaf, copies) if _is_container(leaf) else leaf

    return [BlockCall(*tree_map(own, (call.args, call.kwargs))) for call in calls]


def _is_container(leaf: object) -> bool:
    """Of what blocks hand on beside the hidden states, as Gemma 4's do keys and values."""
    return isinstance(leaf, MutableMapping | MutableSequence)


@torch.no_grad()
def record_block_inputs(
    forward: Callable[[Tensor], object],
    blocks: list[Block],
    token_ids: Tensor,
    batch_size: int,
    placement: Placement,
) -> BlockInputs:
    """Run `forward(token_ids[batch])` over all batches with every block replaced by a recorder.

    Args:
        forward: the model's own forward, caches off.
        blocks: in the order in which the model calls them.
        token_ids: int64 `[nsamples, seqlen]`.
        placement: of the hidden states; the blocks will run on its device.
    Raises: `HiddenStatesError`.
    """
    hidden, calls, keep = None, [], _KeepOnce(placement.device)
    for start in range(0, len(token_ids), batch_size):
        batch = slice(start, min(start + batch_size, len(token_ids)))
        with _recorders(blocks) as recorders:
            forward(token_ids[batch])
        if hidden is None:
            _require_one_after_the_other(recorders, blocks)
        first = recorders[0].hidden
        _require_sequences(first, token_ids[batch], blocks[0])
        if hidden is None:
            dtypes = [first.dtype, *(recorder.outputs.dtype for recorder in recorders)]
            dtype = reduce(torch.promote_types, dtypes)  # Mamba's blocks put out float32, whatever they take
            hidden = placement.empty((len(token_ids), *first.shape[1:]), dtype)
        hidden[batch] = first
        calls.append([keep(recorder.call, index) for index, recorder in enumerate(recorders)])
    return BlockInputs(hidden, batch_size, calls)


def _require_sequences(hidden: Tensor, token_ids: Tensor, block: Block) -> None:
    """Whether hidden states can be cut into sequences and be put together again."""
    leading = 1 if hidden.dim() <= 3 else 2  # a dimension more may stand before the sequences, of any length
    if hidden.shape[:leading] != token_ids.shape[:leading]:
        raise HiddenStatesError(
            f"{type(block.module).__name__} takes hidden states {list(hidden.shape)} of {len(token_ids)} "
            f"sequences of {token_ids.shape[1]} tokens: only [sequences, tokens, ...] run block by block"
        )


def _require_one_after_the_other(recorders: list["_Recorder"], blocks: list[Block]) -> None:
    """Whether a forward is the blocks in turn, each once, with nothing done between them."""
    for recorder, block in zip(recorders, blocks, strict=True):
        if recorder.calls != 1:
            raise HiddenStatesError(
                f"{block.name} runs {recorder.calls} times in a forward: only blocks that run once can be "
                "pruned one by one"
            )
    for index in range(1, len(blocks)):
        put_out, taken = recorders[index - 1].hidden, recorders[index].hidden
        if taken is not put_out and not torch.equal(taken.to(put_out), put_out):
            raise HiddenStatesError(
                f"{blocks[index].name} does not take what {blocks[index - 1].name} puts out: only blocks "
                "that follow each other directly can be pruned one by one"
            )


@contextmanager
def hidden_states_given(blocks: list[Block], hidden: Tensor) -> Iterator[None]:
    """A forward of the model takes `hidden` for the last block's output, and runs no block."""
    with _recorders(blocks) as recorders:
        recorders[-1].given = hidden
        yield


@contextmanager
def _recorders(blocks: list[Block]) -> Iterator[list["_Recorder"]]:
    """Put a recorder in the place of each block's forward; the module itself, with its attributes, stays."""
    known = _OUTPUTS.setdefault(blocks[0].module, {})
    recorders = [_Recorder(block.module, known) for block in blocks]
    turns: dict[nn.Module, list[_Recorder]] = {}  # several, where one module is several of the blocks
    for recorder in recorders:
        turns.setdefault(recorder.block, []).append(recorder)
    with forwards_replaced({module: partial(_take_turn, own) for module, own in turns.items()}):
        yield recorders


def _take_turn(recorders: list["_Recorder"], *args, **kwargs) -> object:
    recorder = recorders.pop(0) if len(recorders) > 1 else recorders[0]
    return recorder(*args, **kwargs)


class _Recorder:
    """Stands for a block's forward: notes the arguments, returns the hidden states that came in, or given."""

    def __init__(self, block: nn.Module, known: dict[tuple[type, torch.dtype], "_Outputs"]):
        self.block, self.own, self.known = block, block.forward, known
        self.calls = 0
        self.given: Tensor | None = None

    def __call__(self, *args, **kwargs):
        if not args:  # a model that names its hidden states
            args = (kwargs.pop("hidden_states"),)
        self.calls += 1
        self.hidden, self.call = args[0], BlockCall(args[1:], kwargs)
        self.outputs = self._outputs()
        output = self.hidden if self.given is None else self.given
        return output if self.outputs.others is None else (output, *[None] * self.outputs.others)

    def _outputs(self) -> "_Outputs":
        """Asked of the block itself, on the meta device where it can: no computing, no weights."""
        key = type(self.block), self.hidden.dtype
        if key not in self.known:
            with forwards_replaced({self.block: self.own}):
                try:
                    output = _on_meta(self.block, self.hidden, self.call)
                except (RuntimeError, NotImplementedError):  # no meta kernel for an operation: ask in earnest
                    output = _on_zeros(self.block, self.hidden, self.call)
            hidden, *others = output if isinstance(output, tuple) else (output,)
            self.known[key] = _Outputs(hidden.dtype, len(others) if isinstance(output, tuple) else None)
        return self.known[key]


@dataclass(frozen=True)
class _Outputs:
    """What a block returns: hidden states of a dtype, and how many values beside them, None for no tuple."""

    dtype: torch.dtype
    others: int | None


# By a model's first block, since models of one class can differ; then by a block's class and what it takes.
_OUTPUTS: WeakKeyDictionary[nn.Module, dict[tuple[type, torch.dtype], _Outputs]] = WeakKeyDictionary()


def _on_meta(block: nn.Module, hidden: Tensor, call: BlockCall) -> object:
    state = dict(block.named_parameters()) | dict(block.named_buffers())
    to_meta = lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf  # noqa: E731
    state, args, kwargs = tree_map(to_meta, (state, (hidden, *call.args), call.kwargs))
    return torch.func.functional_call(block, state, args, kwargs)


def _on_zeros(block: nn.Module, hidden: Tensor, call: BlockCall) -> object:
    """Zeros for weights that are not read yet."""
    state = dict(block.named_parameters()) | dict(block.named_buffers())
    state = {key: torch.zeros_like(t, device=hidden.device) if t.is_meta else t for key, t in state.items()}
    return torch.func.functional_call(block, state, (hidden, *call.args), call.kwargs)


class _KeepOnce:
    """Moves arguments to the device, each distinct tensor once: most masks recur."""

    def __init__(self, device: torch.device):
        self.device = device
        self.first: dict[int, list] = {}  # block -> leaves of its first call
        self.kept: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # id of a tensor seen in this batch -> (it, what is kept)

    def __call__(self, call: BlockCall, block: int) -> BlockCall:
        if block == 0:
            self.kept.clear()
        leaves, structure = tree_flatten((call.args, call.kwargs))
        first = self.first.get(block, [None] * len(leaves))
        leaves = [self._keep(leaf, known) for leaf, known in zip(leaves, first, strict=True)]
        self.first.setdefault(block, leaves)
        return BlockCall(*tree_unflatten(leaves, structure))

    def _keep(self, leaf: object, known: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in self.kept:
            moved = leaf.to(self.device)
            same = isinstance(known, Tensor) and known.dtype == moved.dtype and torch.equal(known, moved)
            self.kept[id(leaf)] = (leaf, known if same else moved)
        return self.kept[id(leaf)][1]
