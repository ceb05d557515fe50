from itertools import chain

import numpy as np
import pytest

from aurora.data.sampler import BatchSampler


def sampler(n=50, *, weights=(1.0,), sizes=None, group_batches=4):
    rng = np.random.default_rng(0)
    sizes = sizes or [n]
    n = sum(sizes)
    return BatchSampler(sizes, weights, rng.integers(0, 3, n), rng.integers(1, 100, n), group_batches=group_batches)


@pytest.mark.parametrize("group_batches", [1, 5])
def test_every_epoch_sees_every_sample_once(group_batches):
    made = sampler(100, group_batches=group_batches)
    steps = [made.batch(step, 5) for step in range(40)]
    epochs = [list(chain(*steps[:20])), list(chain(*steps[20:]))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(100))] * 2
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_its_arguments_alone():
    one, other = sampler(), sampler()
    late = one.batch(37, 8, seed=3)
    assert late == [one.batch(step, 8, seed=3) for step in range(38)][37] == other.batch(37, 8, seed=3)
    assert late != one.batch(37, 8, seed=4)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_batches(world_size):
    made = sampler()
    shares = [made.batch(5, 8, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(chain(*shares)) == sorted(made.batch(5, 8))
    assert {len(share) for share in shares} == {8 // world_size}


def test_windows_group_kind_and_length():
    rng = np.random.default_rng(1)
    kinds, lengths = rng.integers(0, 2, 400), rng.integers(1, 1000, 400)

    def padding(group_batches):
        made = BatchSampler([400], [1.0], kinds, lengths, group_batches=group_batches)
        batches = [made.batch(step, 8) for step in range(50)]
        mixed = sum(len(set(kinds[batch])) > 1 for batch in batches)
        return mixed, sum(8 * lengths[batch].max() - lengths[batch].sum() for batch in batches)

    assert padding(12)[0] <= 5 < padding(1)[0]  # at most one batch of a window holds both kinds
    assert padding(12)[1] < padding(1)[1] / 3


def test_weights_are_visits_in_an_epoch():
    made = sampler(sizes=[10, 8, 4], weights=(1.0, 0.5, 2.0))
    assert made.epoch_size == 10 + 4 + 8
    halves = []
    for number in range(6):
        counts = np.bincount(made.epoch(0, number), minlength=22)
        assert counts[:10].tolist() == [1] * 10
        assert counts[10:18].sum() == 4
        assert counts[18:].tolist() == [2] * 4
        halves.append(tuple(np.flatnonzero(counts[10:18])))
    assert len(set(halves)) > 1


def test_a_sample_of_a_small_set_never_meets_itself_and_meets_all_others():
    made = sampler(20, group_batches=32)
    batches = [made.batch(step, 4) for step in range(300)]
    assert all(len(set(batch)) == 4 for batch in batches)
    assert len({other for batch in batches if 0 in batch for other in batch}) == 20


def test_a_batch_may_be_larger_than_an_epoch():
    batch = sampler(3).batch(0, 12)
    assert np.bincount(batch).tolist() == [4, 4, 4]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size=5: want a positive multiple of the 2 ranks"):
        sampler().batch(0, 5, world_size=2)
    with pytest.raises(ValueError, match="step=-1"):
        sampler().batch(-1, 4)
    with pytest.raises(ValueError, match="empty epoch"):
        sampler(sizes=[1], weights=(0.1,))
