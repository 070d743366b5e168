"""Collectives of the ranks: who has which share, sums, messages, errors of the first rank."""

import pytest
import torch

from tests.wanda_fast.distributed.processes import Ranks as Processes
from tests.wanda_fast.distributed.processes import run_ranks
from wanda_fast import errors
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.distributed.same_weights import checksums, require_same_weights


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 64])
def test_shares_cover_everything_once(size, count):
    ranks = Ranks()
    ranks.size = size
    shares = ranks.shares(count)
    assert [index for share in shares for index in range(count)[share]] == list(range(count))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)
    assert all(index in range(count)[shares[ranks.owner(index, count)]] for index in range(count))


def test_one_process_is_alone():
    ranks, tensor = Ranks(), torch.ones(3)
    ranks.sum_([tensor])
    ranks.send_([tensor], 0)
    assert tensor.tolist() == [1.0, 1.0, 1.0] and ranks.gather("x") == ["x"] and ranks.least(4) == 4
    with pytest.raises(errors.OptionError):
        ranks.from_first(lambda: (_ for _ in ()).throw(errors.OptionError("no")))


def collect(group):
    ranks = Ranks(group)
    own, found = ranks.rank + 1, {}
    small = torch.full((3,), float(own), dtype=torch.float64)
    counts = torch.tensor([own, 10 * own])
    strided = torch.full((4, 2), float(own)).t()
    large = torch.full((600, 500), 0.1 * own)
    ranks.sum_([small, counts, strided, large])
    found["sums"] = small[0].item(), counts.tolist(), strided.unique().tolist(), large.unique().tolist()
    message = [torch.full((2, 3), own, dtype=torch.bfloat16), torch.tensor([own > 1, True]), torch.empty(0)]
    message += [torch.full((3, 2), own, dtype=torch.int8).t(), torch.tensor(float(own), dtype=torch.float64)]
    ranks.send_(message, 1)
    found["message"] = [each.tolist() for each in message]
    one = torch.arange(6.0).view(2, 3) * own
    ranks.send_([one], 2)
    found["one"] = one.tolist()
    found["gathered"] = ranks.gather({"rank": ranks.rank}), ranks.least(5 - own)
    found["first"] = ranks.from_first(lambda: f"by {ranks.rank}")
    found["summed"] = ranks.summed(counts).tolist(), counts.tolist()
    found["moved"] = ranks.moved > large.nbytes
    try:
        ranks.from_first(lambda: (_ for _ in ()).throw(errors.PatternError(f"rank {ranks.rank}")))
    except errors.PatternError as error:
        found["error"] = str(error)
    found["machine"] = ranks.of_machine() is ranks
    return found


def test_collectives_of_three_ranks():
    first, *others = run_ranks(3, collect)
    assert all(other == first for other in others)
    assert first["sums"] == (6.0, [6, 60], [6.0], [pytest.approx(0.6)])
    assert first["message"] == [[[2.0] * 3] * 2, [True, True], [], [[2] * 3] * 2, 2.0]
    assert first["one"] == [[0.0, 3.0, 6.0], [9.0, 12.0, 15.0]]
    assert first["gathered"] == ([{"rank": 0}, {"rank": 1}, {"rank": 2}], 2)
    assert first["first"] == "by 0" and first["error"] == "rank 0"
    assert first["summed"] == ([18, 180], [6, 60]) and first["moved"] and first["machine"]


def altered(group):
    ranks, module = Ranks(group), torch.nn.Linear(5, 7, dtype=torch.bfloat16)
    torch.nn.init.ones_(module.weight)
    if ranks.rank == 1:
        module.weight.data[3, 2] += 2**-7
    require_same_weights("layers.4", module, ranks)


def test_ranks_with_other_weights_are_found():
    found = Processes(3, altered).errors()
    assert {kind for kind, _ in found} == {"RanksDifferError"}
    assert all("layers.4: ranks 0, 2 and 1 have different weights" in said for _, said in found)


def test_checksums_see_exchanged_rows_and_signs():
    module = torch.nn.Linear(4, 3)
    before = checksums(module)
    module.weight.data = module.weight.data[[1, 0, 2]]
    exchanged = checksums(module)
    module.weight.data = module.weight.data[[1, 0, 2]].neg()
    assert len({before, exchanged, checksums(module)}) == 3


def wait_for_lost_rank(group):
    ranks = Ranks(group)
    if ranks.rank == 2:
        raise errors.NonFiniteError("rank 2 found NaN")
    ranks.gather("never complete")


def test_a_failed_rank_does_not_leave_the_others_waiting():
    processes = Processes(3, wait_for_lost_rank)
    found = processes.errors()
    assert [kind for kind, _ in found] == ["LostRankError", "LostRankError", "NonFiniteError"]
    processes.end_within(60)
