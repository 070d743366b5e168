"""The published algorithms, straight from their papers: slow, plain, and sharing no code with the library.

One block at a time, one sequence at a time, one statistic a linear, full sorts.
Sources: Han et al. 2015 (magnitude); Sun et al. 2023, arXiv 2306.11695 (wanda, and SparseGPT's ablations);
Wanda-CoNNect (connect); Frantar & Alistarh 2023, arXiv 2301.00774 (sparsegpt); gated is this project's, as
docs/gated.md derives it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


@torch.no_grad()
def prune_published(
    model,
    token_ids,
    method,
    pattern,
    *,
    use_variant=False,
    connect_gate="activated",
    running_mean=True,
    gaps=None,
    follow=None,
    updated=None,
):
    """Prune a live float32 model in place, and return which weights went.

    Args:
        model: a Hugging Face causal LM; every nn.Linear of its blocks is pruned.
        token_ids: LongTensor [nsamples, seqlen].
        method: "magnitude", "wanda", "connect" (up_proj of a gated MLP; everything else as wanda), "gated"
            (its gate_proj, too); "sparsegpt", "ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter" or
            "ablate_wanda_iter".
        pattern: "n:m" (n kept of m consecutive inputs) or a ratio as text, such as "0.5".
        use_variant: wanda's per-row cumulative-sum variant, for a ratio.
        connect_gate: "activated" (after the MLP's activation function) or "raw".
        running_mean: wanda's statistic as the published code keeps it; False: the paper's sum of squares,
            which ranks alike but for the last bit.
        gaps: a list that gets each linear's nearest_tie: decisions with a gap do not hang on rounding.
        follow: a model pruned already; each block takes its weights from there after its masks are chosen,
            so that the next blocks see the inputs which they saw in that model.
        updated: a dict that gets each linear's weight as the method leaves it.

    Returns: dict of linears' names, as in model.named_modules(), to bool masks [out, in], True where pruned.
    """
    assert all(p.dtype == torch.float32 for p in model.parameters()), "the oracle works in float32"
    model.eval()
    names = {module: name for name, module in model.named_modules()}
    blocks = find_blocks(model)
    hidden, kwargs = record_block_calls(model, blocks, token_ids)
    masks = {}
    for block, block_kwargs in zip(blocks, kwargs, strict=True):
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        squares, coactivations = collect_statistics(
            block, linears, hidden, block_kwargs, method, connect_gate, running_mean
        )
        hessians = collect_hessians(block, linears, hidden, block_kwargs) if method in UPDATING else {}
        for linear in linears:
            if method in UPDATING:
                root = squares[linear].sqrt()
                mask = update(linear.weight, hessians.pop(linear), root, pattern, method)
            else:
                mask = score_and_select(
                    linear, squares[linear], coactivations, pattern, method, use_variant, gaps
                )
                linear.weight[mask] = 0
            masks[names[linear]] = mask
            if updated is not None:
                updated[names[linear]] = linear.weight.clone()
            if follow is not None:
                linear.weight.copy_(follow.get_submodule(names[linear]).weight)
        hidden = [run_block(block, x, kw) for x, kw in zip(hidden, block_kwargs, strict=True)]
    return masks


def score_and_select(linear, squares, coactivations, pattern, method, use_variant, gaps):
    """Which weights go, by their own scores alone."""
    scores = linear.weight.abs()
    if linear in coactivations:
        scores = scores * coactivations[linear].sqrt()
    elif method != "magnitude":
        scores = scores * squares.sqrt().reshape(1, -1)
    mask = select(scores, pattern, method, use_variant)
    if gaps is not None and method != "magnitude":
        gaps.append(nearest_tie(scores, mask, pattern, use_variant))
    return mask


def find_blocks(model):
    """The outermost list of modules: every decoder keeps its layers in one."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def record_block_calls(model, blocks, token_ids):
    """Run the dense model on each sequence; note block 0's input and every block's own arguments."""
    hidden, kwargs, handles = [], [[] for _ in blocks], []

    def record(index):
        def hook(_, args, call_kwargs):
            call_kwargs = dict(call_kwargs)
            x = args[0] if args else call_kwargs.pop("hidden_states")
            assert len(args) <= 1, "blocks are expected to take one positional argument"
            kwargs[index].append(call_kwargs)
            if index == 0:
                hidden.append(x.clone())

        return hook

    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(record(index), with_kwargs=True))
    for ids in token_ids:
        model(ids.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return hidden, kwargs


def run_block(block, x, kwargs):
    out = block(x, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def collect_statistics(block, linears, hidden, kwargs, method, connect_gate, running_mean=True):
    """The dense pass: each linear's mean (or sum) of ||X_j||^2, and [out, in] sums for a gated MLP's.

    connect: sum_t |x_j| |g_i| of up. gated: sum_t (x_j a_i)^2 of up, sum_t (x_j u_i a'_i)^2 of gate. Where
    one linear is both, gate comes first; connect scores it as wanda.
    """
    squares = {linear: torch.zeros(linear.in_features) for linear in linears}
    seen = dict.fromkeys(linears, 0)
    coactivations, handles = {}, []

    def add_squares(linear, args, _):
        x = args[0].reshape(-1, linear.in_features).float()
        if not running_mean:
            squares[linear] += (x * x).sum(dim=0)
            return
        squares[linear] *= seen[linear] / (seen[linear] + 1)
        seen[linear] += 1
        squares[linear] += torch.linalg.vector_norm(x, dim=0) ** 2 / seen[linear]

    def add_products(mlp, args, _):
        gate_proj, up_proj, activation = parts_of_mlp(mlp)
        x = args[0].reshape(-1, gate_proj.in_features)
        gate, up = (F.linear(x, each.weight, each.bias) for each in (gate_proj, up_proj))
        if gate_proj is up_proj:
            half = gate.shape[1] // 2
            gate, up = gate[:, :half], up[:, half:]
        if method == "connect":
            seen_by_gate = torch.ones_like(gate), x * x
            seen_by_up = (activation(gate) if connect_gate == "activated" else gate).abs(), x.abs()
        else:
            activated, slope = torch.func.jvp(activation, (gate,), (torch.ones_like(gate),))
            seen_by_gate, seen_by_up = ((up * slope).square(), x * x), (activated.square(), x * x)
        halves = [torch.einsum("to,ti->oi", *seen) for seen in (seen_by_gate, seen_by_up)]
        if gate_proj is up_proj:
            coactivations[up_proj] = coactivations.get(up_proj, 0) + torch.cat(halves)
            return
        for linear, products in zip((gate_proj, up_proj), halves, strict=True):
            if method == "gated" or linear is up_proj:
                coactivations[linear] = coactivations.get(linear, 0) + products

    for linear in linears:
        handles.append(linear.register_forward_hook(add_squares))
    for mlp in block.modules():
        if method in ("connect", "gated") and parts_of_mlp(mlp):
            handles.append(mlp.register_forward_hook(add_products))
    for x, kw in zip(hidden, kwargs, strict=True):
        run_block(block, x, kw)
    for handle in handles:
        handle.remove()
    return squares, coactivations


def parts_of_mlp(module):
    """(gate projection, up projection, activation) of a gated MLP; of Phi-3's and GLM-4's twice the same."""
    gate = getattr(module, "gate_proj", None) or getattr(module, "gate_up_proj", None)
    if not isinstance(gate, nn.Linear):
        return None
    return gate, getattr(module, "up_proj", gate), getattr(module, "act_fn", None) or module.activation_fn


UPDATING = ("sparsegpt", "ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter", "ablate_wanda_iter")


def collect_hessians(block, linears, hidden, kwargs):
    """The dense pass once more: each linear's own running mean over sequences of 2 x^T x."""
    hessians = {linear: torch.zeros(linear.in_features, linear.in_features) for linear in linears}
    seen, handles = dict.fromkeys(linears, 0), []

    def add(linear, args, _):
        x = args[0].reshape(-1, linear.in_features).float()
        seen[linear] += 1
        hessians[linear] *= (seen[linear] - 1) / seen[linear]
        x = x * math.sqrt(2 / seen[linear])
        hessians[linear] += x.T @ x

    for linear in linears:
        handles.append(linear.register_forward_hook(add))
    for x, kw in zip(hidden, kwargs, strict=True):
        run_block(block, x, kw)
    for handle in handles:
        handle.remove()
    return hessians


def update(weight, hessian, root, pattern, method, dampening=0.01, width=128):
    """SparseGPT on one weight [out, in], in place, by the published column loop; returns what was pruned.

    "seq": the mask is wanda's or magnitude's, of the weight as it was. "iter" and sparsegpt: chosen in each
    block of columns (for a ratio: one threshold), or in each group as its first column comes (for n:m).
    """
    w = weight.clone()
    kept, group = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    given = None
    if method.endswith("seq"):
        scores = w.abs() * root if "wanda" in method else w.abs()
        given = select(scores, pattern, "wanda" if "wanda" in method else "magnitude")
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    w[:, unused] = 0
    hessian.diagonal().add_(dampening * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    u = torch.linalg.cholesky(inverse, upper=True)

    def importances(values, columns):
        if "wanda" in method:
            return values.abs() * root[columns]
        return values.abs() if "mag" in method else values**2 / u.diagonal()[columns] ** 2

    pruned = torch.zeros_like(w, dtype=torch.bool)
    for first in range(0, w.shape[1], width):
        last = min(first + width, w.shape[1])
        values, u_block = w[:, first:last].clone(), u[first:last, first:last]
        gone, errors = pruned[:, first:last], torch.zeros_like(values)
        if given is not None:
            gone |= given[:, first:last]
        elif not group:
            scores = importances(values, slice(first, last))
            threshold = scores.flatten().sort().values[int(scores.numel() * float(pattern))]
            gone |= scores <= threshold
        for i in range(last - first):
            if group and given is None and i % group == 0:
                scores = importances(values[:, i : i + group], slice(first + i, first + i + group))
                gone[:, i : i + group] = lowest_of_each_group(scores, kept, group)
            error = values[:, i].masked_fill(~gone[:, i], 0) / u_block[i, i]
            values[:, i:] -= error[:, None] @ u_block[i : i + 1, i:]
            errors[:, i] = error
        w[:, first:last] = values.masked_fill(gone, 0)
        w[:, last:] -= errors @ u[first:last, last:]
    weight.copy_(w)
    return pruned


def select(scores, pattern, method, use_variant=False):
    """Which of scores [out, in] go: a bool mask."""
    if ":" in pattern:
        kept, group = map(int, pattern.split(":"))
        return lowest_of_each_group(scores, kept, group)
    ratio = float(pattern)
    if method == "magnitude":
        threshold = scores.flatten().sort().values[int(scores.numel() * ratio)]
        return scores <= threshold
    if use_variant:
        return variant_mask(scores, variant_alpha(scores, ratio))
    order = torch.sort(scores, dim=1, stable=True).indices
    lowest = order[:, : int(scores.shape[1] * ratio)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, lowest, True)


def lowest_of_each_group(scores, kept, group):
    groups = scores.reshape(-1, group)
    lowest = torch.sort(groups, dim=1, stable=True).indices[:, : group - kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, lowest, True).reshape(scores.shape)


def variant_alpha(scores, ratio):
    """Wanda's variant: bisect alpha, from 0.4 within [0, 0.8], until sparsity is within 0.001 of ratio."""
    low, alpha, high = 0.0, 0.4, 0.8
    sparsity = variant_mask(scores, alpha).float().mean()
    while abs(sparsity - ratio) > 0.001 and high - low >= 0.001:
        if sparsity > ratio:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        sparsity = variant_mask(scores, alpha).float().mean()
    return alpha


def variant_mask(scores, alpha):
    """The lowest scores of a row while their sum is within alpha of the row's; ties of the last go too."""
    ascending = torch.sort(scores, dim=1, stable=True).values
    count = (ascending.cumsum(dim=1) <= scores.sum(dim=1, keepdim=True) * alpha).sum(dim=1, keepdim=True)
    return scores <= ascending.gather(1, count - 1)


def nearest_tie(scores, mask, pattern, use_variant=False):
    """The closest decision: relative gap of highest score pruned and lowest kept, within a row or group."""
    group = int(pattern.split(":")[1]) if ":" in pattern else scores.shape[1]
    lost = scores.masked_fill(~mask, 0).reshape(-1, group).amax(dim=1)
    kept = scores.masked_fill(mask, math.inf).reshape(-1, group).amin(dim=1)
    gap = (1 - lost / kept).min().item()
    if use_variant:
        share = torch.sort(scores, dim=1).values.cumsum(dim=1) / scores.sum(dim=1, keepdim=True)
        gap = min(gap, (share / variant_alpha(scores, float(pattern)) - 1).abs().min().item())
    return gap


@torch.no_grad()
def perplexity_published(model, ids, seqlen):
    """exp of the mean of window losses, each the mean over its seqlen - 1 predicted tokens."""
    model.eval()
    ids = ids.reshape(1, -1)
    n_windows = ids.numel() // seqlen
    total = 0.0
    for i in range(n_windows):
        window = ids[:, i * seqlen : (i + 1) * seqlen]
        logits = model(window, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[0, 1:]).item() * seqlen
    return math.exp(total / (n_windows * seqlen))
