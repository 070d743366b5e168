"""ALPS, arXiv 2406.07831, as published, in float64: ADMM by eigendecomposition, then conjugate gradients."""

import torch

RHO = 0.1
UPDATE_EVERY = 3  # iterations
# rho's factor where at least this share of the kept weights has changed since its last update
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
SETTLED, SETTLED_AFTER = 3e-4, 30
GRADIENT_STEPS = 10


def decompose(hessian):
    """What `prune_admm_published` takes of a damped Hessian, for any number of weights and patterns."""
    scale = hessian.double().diagonal().sqrt()
    h = hessian.double() / scale / scale[:, None]
    return scale, h, *torch.linalg.eigh(h)


def prune_admm_published(weight, decomposed, pattern):
    """The solution [out, in] for a pattern such as "0.5" or "2:4", fp64."""
    scale, h, values, vectors = decomposed
    w = weight.double() * scale
    kept = highest(w, pattern)
    z, dual, rho = w * kept, torch.zeros_like(w), RHO
    last_kept, iteration = kept, 0
    while True:
        b = ((w @ h - dual + rho * z) @ vectors / (values + rho)) @ vectors.T
        kept = highest(b + dual / rho, pattern)
        z = (b + dual / rho) * kept
        dual += rho * (b - z)
        iteration += 1
        if iteration % UPDATE_EVERY == 0:
            changed = (kept != last_kept).sum().item() / max(kept.sum().item(), 1)
            if changed == 0 or iteration > SETTLED_AFTER and changed < SETTLED:
                break
            rho *= next(factor for least, factor in GROWTH if changed >= least)
            last_kept = kept
    return _conjugate_gradients(w, z, kept, h) / scale


def highest(scores, pattern):
    """The kept weights: the highest magnitudes of each row, or n of each group of m."""
    group = int(pattern.split(":")[1]) if ":" in pattern else scores.shape[1]
    n_kept = int(pattern.split(":")[0]) if ":" in pattern else group - int(group * float(pattern))
    groups = scores.abs().reshape(-1, group)
    chosen = groups.sort(dim=1, stable=True).indices[:, group - n_kept :]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, chosen, True).view(scores.shape)


def layer_error(difference, hessian):
    """tr(D H D^T) in float64."""
    difference = difference.double()
    return ((difference @ hessian.double()) * difference).sum().item()


def _conjugate_gradients(w, z, kept, h):
    """One step length for all rows, as published."""
    residual = (w - z) @ h * kept
    direction, rho = residual.clone(), residual.square().sum()
    for _ in range(GRADIENT_STEPS):
        product = direction @ h * kept
        curvature = (direction * product).sum()
        if curvature <= 0:
            break
        z = z + rho / curvature * direction
        residual = residual - rho / curvature * product
        rho, last = residual.square().sum(), rho
        direction = residual + rho / last * direction
    return z
