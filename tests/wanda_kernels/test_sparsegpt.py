"""`sparsegpt_` against a straight walk over the columns, and every backend against the reference's bits."""

import pytest
import torch

import wanda_kernels

OPERATION = "sparsegpt_"


def correlated(n_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(n_tokens, width, generator=generator) @ (mixing + torch.eye(width))


def column_loop(weight, hessian, ratio, kept=0, group=0, blocksize=128):
    """The published algorithm, a column at a time over the whole width: (weight, pruned)."""
    w, h = weight.clone(), hessian.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    pruned = torch.zeros_like(w, dtype=torch.bool)
    for i in range(w.shape[1]):
        block = slice(i, min(i + blocksize, w.shape[1]))
        if not group and i % blocksize == 0:
            scores = w[:, block] ** 2 / u.diagonal()[block] ** 2
            pruned[:, block] = scores <= scores.flatten().sort().values[int(scores.numel() * ratio)]
        if group and i % group == 0:
            scores = w[:, i : i + group] ** 2 / u.diagonal()[i : i + group] ** 2
            lowest = scores.sort(dim=1, stable=True).indices[:, : group - kept]
            pruned[:, i : i + group] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, lowest, True)
        gone = pruned[:, i]
        error = w[:, i] * gone / u[i, i]
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
        w[gone, i] = 0
    return w, pruned


@pytest.mark.parametrize("pattern", (0.5, 0.7, "2:4", "4:8"))
def test_equals_the_column_loop(backend, device, pattern):
    hessian = torch.zeros(200, 200)
    wanda_kernels.add_hessian_(hessian, correlated(700, 200), backend="torch")
    weight = torch.randn(24, 200, generator=torch.Generator().manual_seed(1))
    rule = (0, *map(int, pattern.split(":"))) if isinstance(pattern, str) else (pattern,)
    expected, pruned = column_loop(weight, hessian, *rule)
    factor = wanda_kernels.factor_hessian(hessian.to(device))
    got, mask = weight.to(device), torch.zeros(24, 25, dtype=torch.uint8, device=device)
    wanda_kernels.sparsegpt_(got, factor, pattern, mask=mask, backend=backend)
    assert torch.equal(wanda_kernels.unpack_bits(mask.cpu(), 200), ~pruned)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
