"""The published algorithms in plain PyTorch: the tests' independent check, and the yardstick of whole jobs.

The whole model in memory, one block and one sequence at a time, fp32 statistics of every linear, two full
passes of each block, loops over columns. It shares no code with `wanda_fast`.
Sources: Han et al. 2015 (magnitude); Sun et al. 2023, arXiv 2306.11695, locuslab/wanda (wanda, and the
ablations of SparseGPT); Wanda-CoNNect (connect); Frantar & Alistarh 2023, arXiv 2301.00774,
IST-DASLab/sparsegpt (sparsegpt); gated is this project's, as docs/gated.md derives it.
"""

import math
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from benchmarks.jobs.published_selection import lowest_by_stable_sort, lowest_by_topk, select, update
from benchmarks.jobs.stopwatch import Stopwatch

METHODS = ("magnitude", "wanda", "connect", "sparsegpt")  # of which there is published code to time
UPDATING = ("sparsegpt", "ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter", "ablate_wanda_iter")


@torch.no_grad()
def prune_published(
    model: nn.Module,
    token_ids: Tensor,
    method: str,
    pattern: str,
    *,
    connect_gate: str = "activated",
    running_mean: bool = True,
    choose: Callable[[Tensor], Tensor] | None = None,
    follow: nn.Module | None = None,
    updated: dict[str, Tensor] | None = None,
    stopwatch: Stopwatch | None = None,
    n_blocks: int | None = None,
) -> dict[str, Tensor]:
    """Prune a live model in place, and return which weights went.

    Args:
        model: a Hugging Face causal LM; every nn.Linear of its blocks is pruned.
        token_ids: LongTensor [nsamples, seqlen].
        method: "magnitude", "wanda", "connect" (up_proj of a gated MLP; everything else as wanda), "gated"
            (its gate_proj, too), or one of `UPDATING`.
        pattern: "n:m" (n kept of m consecutive inputs) or a ratio as text, such as "0.5".
        connect_gate: "activated" (after the MLP's activation function) or "raw".
        running_mean: wanda's statistic as the published code keeps it; False: the paper's sum of squares,
            which ranks alike but for the last bit.
        choose: a linear's mask from its scores, in the place of `select`; not for `UPDATING`.
        follow: a pruned model; after a block's masks are chosen here, it takes its weights from there, so
            that the next blocks see the inputs that they saw in that model.
        updated: a dict that gets each linear's weight as the method leaves it.
        stopwatch: for a timed run, which does what the published code does: every block gets block 0's
            arguments, topk selects in groups and leaves ties open, and no masks are kept.
        n_blocks: prune only the first n_blocks blocks.

    Returns: dict of linears' names, as in model.named_modules(), to bool masks [out, in], True where pruned.
    """
    timed, stopwatch = stopwatch is not None, stopwatch or Stopwatch(token_ids.device)
    lowest = lowest_by_topk if timed else lowest_by_stable_sort
    model.eval()
    names = {module: name for name, module in model.named_modules()}
    blocks = find_blocks(model)[:n_blocks]
    hidden, kwargs = [], [[]] * len(blocks)
    if method != "magnitude":
        with stopwatch.phase("block inputs"):
            hidden, kwargs = record_block_calls(model, blocks, token_ids, first=timed)
    masks = {}
    for block, block_kwargs in zip(blocks, kwargs, strict=True):
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        with stopwatch.phase("dense pass"):
            found = Statistics(block, linears, method, connect_gate, running_mean, stopwatch)
            found.collect(hidden, block_kwargs)
        with stopwatch.phase("selection"):
            for linear in linears:
                mask = prune_linear(linear, found, pattern, choose, lowest)
                name = names[linear]
                if not timed:
                    masks[name] = mask
                if updated is not None:
                    updated[name] = linear.weight.clone()
                if follow is not None:
                    linear.weight.copy_(follow.get_submodule(name).weight)
            del found
        with stopwatch.phase("pruned pass"):
            hidden = [run_block(block, x, kw) for x, kw in zip(hidden, block_kwargs, strict=True)]
    return masks


def prune_linear(linear, found, pattern, choose, lowest) -> Tensor:
    """Prune one linear by its statistics; returns the mask."""
    weight, method, root = linear.weight, found.method, found.root(linear)
    if root is None:
        # Read by magnitude alone; of an expert without tokens the published statistic is zero.
        root = torch.zeros(weight.shape[1], device=weight.device)
    if method in UPDATING:
        return update(weight, found.hessians[linear], root, pattern, method, lowest)
    scores = weight.abs() if method == "magnitude" else weight.abs() * root
    mask = choose(scores) if choose else select(scores, pattern, method, lowest)
    weight[mask] = 0
    return mask


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The outermost list of modules: every decoder keeps its layers in one."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


class _FirstBlock(Exception):
    """Ends a forward at the first block."""


def record_block_calls(model, blocks, token_ids, first: bool) -> tuple[list[Tensor], list[list[dict]]]:
    """Run the dense model on each sequence; note block 0's input and every block's own arguments.

    first: run no block; block 0's arguments stand for those of every block.
    """
    hidden, kwargs, handles = [], [[] for _ in blocks], []

    def record(index):
        def hook(_, args, call_kwargs):
            call_kwargs = dict(call_kwargs)
            x = args[0] if args else call_kwargs.pop("hidden_states")
            assert len(args) <= 1, "blocks are expected to take one positional argument"
            kwargs[index].append(call_kwargs)
            if index == 0:
                hidden.append(x.clone())
            if first:
                raise _FirstBlock

        return hook

    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(record(index), with_kwargs=True))
    for ids in token_ids:
        with suppress(_FirstBlock):
            model(ids.unsqueeze(0).to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return hidden, [kwargs[0]] * len(blocks) if first else kwargs


def run_block(block, x, kwargs) -> Tensor:
    out = block(x, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class Statistics:
    """Of one block's dense pass, by linear, as forward hooks find them.

    squares: mean (or sum) of ||X_j||^2 over sequences, [in].
    hessians: of the methods that update weights, mean of 2 x^T x, [in, in].
    coactivations: [out, in] sums of a gated MLP. connect: sum_t |x_j| |g_i| of up. gated: sum_t (x_j a_i)^2
        of up, sum_t (x_j u_i a'_i)^2 of gate. Where one linear is both, gate comes first; connect scores its
        half as wanda.
    """

    def __init__(self, block, linears, method, connect_gate, running_mean, stopwatch):
        self.block, self.linears, self.method = block, linears, method
        self.connect_gate, self.running_mean, self.stopwatch = connect_gate, running_mean, stopwatch
        self.squares, self.hessians, self.coactivations = {}, {}, {}
        self.seen = dict.fromkeys(linears, 0)
        self.mlps = [
            each for each in block.modules() if method in ("connect", "gated") and parts_of_mlp(each)
        ]
        self.outputs = {linear: None for mlp in self.mlps for linear in parts_of_mlp(mlp)[:2]}

    def root(self, linear: nn.Linear) -> Tensor | None:
        """The square root of what a score multiplies by, [1, in] or [out, in]."""
        if linear in self.coactivations:
            return self.coactivations[linear].sqrt()
        return self.squares[linear].sqrt().reshape(1, -1) if linear in self.squares else None

    def collect(self, hidden: list[Tensor], kwargs: list[dict]) -> None:
        handles = [linear.register_forward_hook(self._add) for linear in self.linears]
        handles += [mlp.register_forward_hook(self._add_products) for mlp in self.mlps]
        for x, kw in zip(hidden, kwargs, strict=True):
            run_block(self.block, x, kw)
        for handle in handles:
            handle.remove()

    def _add(self, linear: nn.Linear, args, output: Tensor) -> None:
        with self.stopwatch.part("statistics"):
            x = args[0].reshape(-1, linear.in_features).t().float()
            before, self.seen[linear] = self.seen[linear], self.seen[linear] + 1
            if self.method in UPDATING:
                self._add_hessian(linear, x, before)
            if self.method != "sparsegpt":
                self._add_squares(linear, x, before)
        if linear in self.outputs:
            self.outputs[linear] = output.reshape(-1, linear.out_features)

    def _add_hessian(self, linear: nn.Linear, x: Tensor, before: int) -> None:
        if linear not in self.hessians:
            self.hessians[linear] = x.new_zeros(len(x), len(x))
        hessian = self.hessians[linear]
        hessian *= before / (before + 1)
        x = math.sqrt(2 / (before + 1)) * x
        hessian += x.matmul(x.t())

    def _add_squares(self, linear: nn.Linear, x: Tensor, before: int) -> None:
        squares = self.squares.setdefault(linear, x.new_zeros(len(x)))
        if not self.running_mean:
            squares += (x * x).sum(dim=1)
            return
        squares *= before / (before + 1)
        squares += torch.norm(x, p=2, dim=1) ** 2 / (before + 1)

    def _add_products(self, mlp: nn.Module, args, _output) -> None:
        with self.stopwatch.part("statistics"):
            gate_proj, up_proj, activation = parts_of_mlp(mlp)
            x = args[0].reshape(-1, gate_proj.in_features).float()
            gate, up = self.outputs[gate_proj], self.outputs[up_proj]
            if gate_proj is up_proj:
                gate, up = gate.chunk(2, dim=1)
            if self.method == "connect":
                seen = (activation(gate) if self.connect_gate == "activated" else gate).float().abs()
                of_up = torch.einsum("to,ti->oi", seen, x.abs())
                of_gate = (x * x).sum(dim=0).expand_as(of_up) if gate_proj is up_proj else None
            else:
                activated, slope = torch.func.jvp(activation, (gate,), (torch.ones_like(gate),))
                of_gate = torch.einsum("to,ti->oi", (up * slope).float().square(), x * x)
                of_up = torch.einsum("to,ti->oi", activated.float().square(), x * x)
            products = {up_proj: of_up, gate_proj: of_gate}
            if gate_proj is up_proj:
                products = {up_proj: torch.cat([of_gate, of_up])}
            for linear, product in products.items():
                if linear in self.coactivations:
                    self.coactivations[linear] += product
                elif product is not None:
                    self.coactivations[linear] = product


def parts_of_mlp(module):
    """(gate projection, up projection, activation) of a gated MLP; of Phi-3's and GLM-4's twice the same."""
    gate = getattr(module, "gate_proj", None) or getattr(module, "gate_up_proj", None)
    if not isinstance(gate, nn.Linear):
        return None
    return gate, getattr(module, "up_proj", gate), getattr(module, "act_fn", None) or module.activation_fn
