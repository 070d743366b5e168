"""Wrong offsets and sums are refused in one sentence, before any sum is changed."""

import pytest
import torch

import wanda_kernels
from tests.wanda_kernels.test_segments import N_TOKENS, SUMS, add, stacks, tokens

EXPERTS = "int32 or int64 \\[experts \\+ 1\\], got"
BAD = {
    "length": (dict(offsets=torch.tensor([0, 9])), r"float32 \[1, 6\] for 1 experts, got .* \[2, 6\]"),
    "dtype": (dict(offsets=torch.tensor([0.0, 5, 9])), rf"{EXPERTS} torch.float32 \[3\]"),
    "dimensions": (dict(offsets=torch.tensor([[0, 5, 9]])), rf"{EXPERTS} torch.int64 \[1, 3\]"),
    "none": (dict(offsets=torch.tensor([], dtype=torch.int64)), rf"{EXPERTS} torch.int64 \[0\]"),
    "strided": (dict(offsets=torch.tensor([0, 0, 5, 5, 9, 9])[::2]), "offsets must be contiguous"),
    "descending": (dict(offsets=torch.tensor([0, 7, 5])), "element 2 must be from 7 to 9, .* got 5"),
    "negative": (dict(offsets=torch.tensor([-1, 7, 9])), "element 0 must be from 0 to 9, .* got -1"),
    "past the end": (dict(offsets=torch.tensor([0, 7, 10])), "element 2 must be from 7 to 9, .* got 10"),
    "experts": (dict(acc=torch.zeros(3, 6)), r"float32 \[2, 6\] for 2 experts, got .* \[3, 6\]"),
    "sums": (dict(acc=torch.zeros(2, 6).half()), "acc must be float32 .* got torch.float16"),
    "scattered": (dict(acc=torch.zeros(2, 12)[:, ::2]), r"acc must be contiguous .* strides \[12, 2\]"),
    "shared": (dict(acc=torch.zeros(6).expand(2, 6)), r"acc must be .* its own, got strides \[0, 1\]"),
    "three dimensions": (dict(x=torch.ones(3, 3, 6)), r"x must be \[tokens, features\] .* \[3, 3, 6\]"),
    "device": (dict(offsets=torch.zeros(3, dtype=torch.int64, device="meta")), "offsets is on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_wrong_offsets_and_sums(case):
    change, sentence = BAD[case]
    given = dict(acc=torch.zeros(2, 6), x=torch.ones(9, 6), offsets=torch.tensor([0, 5, 9])) | change
    with pytest.raises(ValueError, match=sentence) as refusal:
        wanda_kernels.add_sq_norm_(**given)
    assert "\n" not in str(refusal.value) and not given["acc"].any()


@pytest.mark.parametrize("operation", SUMS)
def test_every_sum_is_checked(operation):
    given, offsets = tokens(torch.float32), torch.tensor([0, 5, N_TOKENS])
    for wrong in range(len(SUMS[operation])):
        sums = stacks(operation, 2)
        sums[wrong] = stacks(operation, 3)[wrong]
        before = [each.clone() for each in sums]
        with pytest.raises(
            ValueError, match=r"must be float32 \[2, .* for 2 experts, got torch.float32 \[3, "
        ):
            add(operation, sums, given, offsets)
        assert all(map(torch.equal, sums, before))
