"""Hidden states that are put back from a run's files."""

from types import SimpleNamespace

import torch

from wanda_fast.model.block_inputs import BlockInputs


class Stored:
    """A safetensors slice of a file."""

    def __init__(self, tensor):
        self.tensor = tensor

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, rows):
        return self.tensor[rows]


def test_a_file_of_a_rank_without_samples_changes_nothing():
    """Its shape is that of an earlier stage, which no sample of the rank has entered."""
    offload = SimpleNamespace(empty=lambda shape, dtype: torch.full(shape, torch.nan, dtype=dtype))
    inputs = BlockInputs(torch.zeros(2, 9), 1, [], offload=offload)
    later, earlier = torch.arange(8.0).view(2, 4), torch.empty(0, 9)
    inputs.restore_(Stored(later[:1]), 0, 1)
    inputs.restore_(Stored(later[1:]), 1, 2)
    inputs.restore_(Stored(earlier), 2, 2)
    assert torch.equal(inputs.hidden, later)


def test_only_the_ranks_own_samples_are_put_back():
    stored = Stored(torch.arange(12.0).view(4, 3))
    inputs = BlockInputs(torch.zeros(2, 3), 1, [], before=1)
    inputs.restore_(stored, 0, 4)
    assert torch.equal(inputs.hidden, stored.tensor[1:3])
    empty = BlockInputs(torch.zeros(0, 3), 1, [], before=4)
    empty.restore_(stored, 0, 4)
    assert empty.hidden.shape == (0, 3)
