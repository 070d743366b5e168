"""The published pipeline in plain PyTorch, as the yardstick of whole jobs.

The whole model in memory, one sequence at a time, statistics in fp32 for every linear, two full forward
passes of every block, a loop over columns. After locuslab/wanda (lib/prune.py, lib/layerwrapper.py),
Wanda-CoNNect and IST-DASLab/sparsegpt, written anew for today's transformers. It shares no code with
`wanda_fast`.
"""

import time
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SPARSEGPT_COLUMNS, DAMPENING = 128, 0.01
METHODS = ("magnitude", "wanda", "connect", "sparsegpt")


class Stopwatch:
    """Seconds per part of the job; parts inside a pass are taken out of it. GPU work is timed by events."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._parts: list[tuple] = []

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        if self.on_gpu:
            torch.cuda.synchronize()
        inside = self._parts_by_name()
        for part, seconds in inside.items():
            self._add(part, seconds)
        self._add(name, time.perf_counter() - start - sum(inside.values()))

    @contextmanager
    def part(self, name: str):
        """A piece of the phase around it, too short to wait for the device."""
        begin = self._mark()
        yield
        self._parts.append((name, begin, self._mark()))

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _parts_by_name(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, begin, end in self._parts:
            seconds = begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin
            found[name] = found.get(name, 0.0) + seconds
        self._parts.clear()
        return found

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@torch.no_grad()
def prune_as_published(
    model: nn.Module,
    token_ids: Tensor,
    method: str,
    kept: int,
    group: int,
    ratio: float,
    stopwatch: Stopwatch,
    n_blocks: int | None = None,
    follow: nn.Module | None = None,
) -> None:
    """Prune a Llama-like model in place.

    Args:
        model: on the device where it is to be computed; its blocks are `model.model.layers`.
        token_ids: int64 `[nsamples, seqlen]`.
        method: one of `METHODS`.
        kept, group: of N:M; 0, 0 for unstructured, which loses `ratio` of each row (magnitude: of all).
        n_blocks: prune the first so many blocks only.
        follow: a pruned model whose blocks compute the next blocks' inputs in the place of this one's, so
            that each block here is pruned from what the same block saw there.
    """
    model.eval()
    followed = (model if follow is None else follow.eval()).model.layers
    layers = model.model.layers[:n_blocks]
    if method != "magnitude":
        with stopwatch.phase("block inputs"):
            inputs, arguments = catch_inputs(model, token_ids)
            outputs = torch.zeros_like(inputs)
    for layer, pruned in zip(layers, followed, strict=False):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        wrapped = {}
        if method != "magnitude":
            wrapped = {linear: Statistics(linear, method) for linear in linears}
            with stopwatch.phase("dense pass"), gathering(layer, wrapped, stopwatch):
                run_layer(layer, inputs, outputs, arguments)
        with stopwatch.phase("selection"):
            for linear in linears:
                prune_linear(linear, wrapped.get(linear), method, kept, group, ratio)
            del wrapped
        if method != "magnitude":
            with stopwatch.phase("pruned pass"):
                run_layer(pruned, inputs, outputs, arguments)
            inputs, outputs = outputs, inputs


class _Caught(Exception):
    """Ends a forward at the first block."""


def catch_inputs(model: nn.Module, token_ids: Tensor) -> tuple[Tensor, dict]:
    """The first block's inputs `[nsamples, seqlen, hidden]`, and the arguments that all blocks get."""
    caught, arguments = [], {}

    def catch(_module, args, kwargs):
        kwargs = dict(kwargs)
        caught.append((args[0] if args else kwargs.pop("hidden_states")).clone())
        arguments.update(kwargs)
        raise _Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in token_ids:
        try:
            model(sequence.unsqueeze(0).to(model.device), use_cache=False)
        except _Caught:
            pass
    handle.remove()
    return torch.cat(caught), arguments


def run_layer(layer: nn.Module, inputs: Tensor, outputs: Tensor, arguments: dict) -> None:
    for index in range(len(inputs)):
        output = layer(inputs[index].unsqueeze(0), **arguments)
        outputs[index] = output[0] if isinstance(output, tuple) else output


class Statistics:
    """Of one linear: `norm`, the running mean of squared L2 norms `[in]`; for connect's up projections
    `coactivation` `[out, in]`; for sparsegpt `hessian` `[in, in]`."""

    def __init__(self, linear: nn.Linear, method: str):
        self.method, self.device, self.shape = method, linear.weight.device, linear.weight.shape
        self.seen = 0
        self.norm = torch.zeros(self.shape[1], device=self.device)
        self.coactivation = None
        self.hessian = (
            torch.zeros(self.shape[1], self.shape[1], device=self.device) if method == "sparsegpt" else None
        )

    def add(self, x: Tensor) -> None:
        """One sequence's input `[1, seqlen, in]`."""
        x = x.reshape(-1, x.shape[-1]).t()
        before, self.seen = self.seen, self.seen + 1
        if self.hessian is not None:
            self.hessian *= before / self.seen
            x = (2 / self.seen) ** 0.5 * x.float()
            self.hessian += x.matmul(x.t())
            return
        self.norm *= before / self.seen
        self.norm += torch.norm(x.float(), p=2, dim=1) ** 2 / self.seen

    def add_coactivation(self, gate: Tensor, x: Tensor) -> None:
        """One sequence's activated gate `[1, seqlen, out]` and input."""
        if self.coactivation is None:
            self.coactivation = torch.zeros(self.shape, device=self.device)
        gate, x = (each.reshape(-1, each.shape[-1]).float().abs() for each in (gate, x))
        self.coactivation += torch.einsum("to,ti->oi", gate, x)


@contextmanager
def gathering(layer: nn.Module, wrapped: dict[nn.Linear, Statistics], stopwatch: Stopwatch):
    """Forward hooks on every linear, and for connect on the gated MLP's activation and up projection."""
    mlp, handles, gates = getattr(layer, "mlp", None), [], []
    connect = next(iter(wrapped.values())).method == "connect"

    def hook(linear, args, _output):
        with stopwatch.part("statistics"):
            wrapped[linear].add(args[0])
            if connect and linear is mlp.up_proj:
                wrapped[linear].add_coactivation(gates.pop(), args[0])

    for linear in wrapped:
        handles.append(linear.register_forward_hook(hook))
    if connect:
        handles.append(mlp.act_fn.register_forward_hook(lambda _module, _args, output: gates.append(output)))
    yield
    for handle in handles:
        handle.remove()


def prune_linear(
    linear: nn.Linear, found: Statistics | None, method: str, kept: int, group: int, ratio: float
) -> None:
    weight = linear.weight.data
    if method == "sparsegpt":
        sparsegpt(linear, found.hessian, kept, group, ratio)
        return
    score = weight.abs().float()
    if found is not None:
        statistic = found.norm.reshape(1, -1) if found.coactivation is None else found.coactivation
        score = weight.abs() * statistic.sqrt()
    mask = torch.zeros_like(score) == 1
    if group:
        for column in range(0, score.shape[1], group):
            part = score[:, column : column + group].float()
            mask.scatter_(1, column + torch.topk(part, group - kept, dim=1, largest=False)[1], True)
    elif method == "magnitude":
        mask = score <= score.flatten().sort()[0][int(score.numel() * ratio)]
    else:
        order = torch.sort(score, dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(score.shape[1] * ratio)], True)
    weight[mask] = 0


def sparsegpt(linear: nn.Linear, hessian: Tensor, kept: int, group: int, ratio: float) -> None:
    """Column after column, each error passed on to the columns on the right (arXiv 2301.00774)."""
    weight = linear.weight.data.float()
    n_columns = weight.shape[1]
    diagonal = torch.arange(n_columns, device=weight.device)
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian[diagonal, diagonal] += DAMPENING * torch.mean(torch.diag(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, n_columns, SPARSEGPT_COLUMNS):
        end = min(start + SPARSEGPT_COLUMNS, n_columns)
        part, own = weight[:, start:end].clone(), inverse[start:end, start:end]
        errors = torch.zeros_like(part)
        score = part**2 / torch.diag(own).reshape(1, -1) ** 2
        mask = torch.zeros_like(part) == 1
        if not group:
            mask = score <= score.flatten().sort()[0][int(score.numel() * ratio)]
        for column in range(end - start):
            if group and column % group == 0:
                score = part[:, column : column + group] ** 2
                score = score / torch.diag(own)[column : column + group].reshape(1, -1) ** 2
                mask.scatter_(1, column + torch.topk(score, group - kept, dim=1, largest=False)[1], True)
            before = part[:, column].clone()
            part[mask[:, column], column] = 0
            error = (before - part[:, column]) / own[column, column]
            part[:, column + 1 :] -= error.unsqueeze(1) * own[column, column + 1 :].unsqueeze(0)
            errors[:, column] = error
        weight[:, start:end] = part
        weight[:, end:] -= errors.matmul(inverse[start:end, end:])
    linear.weight.data = weight.to(linear.weight.dtype)
