import numpy as np
import pytest

from lmscripts.counters import (
    hash32,
    hash_counters,
    permute,
    small_permutations,
    split_shares,
    stream_key,
    unit_interval,
)
from lmscripts.data.steps import Shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 97, 1000, 4097, 65_537, 99_991])
def test_permute_is_a_permutation(size):
    images = permute(np.arange(size), size, key=11)
    assert sorted(images.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [16, 97])
def test_permute_sends_every_index_anywhere_alike(size):
    images = np.array([permute(np.arange(size), size, key) for key in range(3_000)])
    counts = np.array([np.bincount(column, minlength=size) for column in images.T])
    wanted = 3_000 / size
    # Chi-square over its degrees of freedom: 1 for a fair permutation, with a standard deviation below 0.1.
    assert abs(((counts - wanted) ** 2 / wanted).sum() / (size - 1) ** 2 - 1) < 0.4


def test_permute_depends_on_key_and_mixes_well():
    size = 10_000
    first, second = permute(np.arange(size), size, 1), permute(np.arange(size), size, 2)
    assert (first == second).mean() < 0.01
    # Neighbours do not stay neighbours: the mean distance of a random permutation is a third of its length.
    assert abs(np.abs(np.diff(first)).mean() / size - 1 / 3) < 0.02


def test_permute_needs_no_table():
    size = 3_000_000_000_000
    images = permute(np.array([0, 1, size - 1]), size, 5)
    assert images.max() < size
    assert len(set(images.tolist())) == 3


def test_every_row_once_per_epoch_and_batches_cross_epochs():
    rows, epochs = Shuffled(20, 1, 50, seed=3).rows(np.arange(50))
    for epoch in (0, 1):
        assert sorted(rows[epochs == epoch].tolist()) == list(range(20))
    assert (epochs == 2).sum() == 10
    assert rows[:20].tolist() != rows[20:40].tolist()


def test_position_can_be_asked_for_directly():
    whole_rows, whole_epochs = Shuffled(37, 1, 500, seed=9).rows(np.arange(500))
    for start, count in ((0, 1), (36, 2), (123, 300)):
        rows, epochs = Shuffled(37, 1, 500, seed=9).rows(np.arange(start, start + count))
        assert np.array_equal(rows, whole_rows[start : start + count])
        assert np.array_equal(epochs, whole_epochs[start : start + count])


def test_shares_sum_and_follow_weights():
    assert split_shares(256, [80, 80, 48, 48]) == [80, 80, 48, 48]
    assert sum(split_shares(100, [1, 1, 1])) == 100
    assert split_shares(8, [3, 1]) == [6, 2]
    assert split_shares(1, [1, 1, 1]).count(1) == 1
    with pytest.raises(ValueError):
        split_shares(5, [0, 0])


def test_hashes_are_uniform_and_independent_of_their_neighbours():
    keys = hash_counters(np.array([stream_key(1)], np.uint64), np.arange(400, dtype=np.uint64))
    grid = hash32(keys[:, None], np.arange(500, dtype=np.uint32)).astype(np.float64) / 2**32
    assert abs(grid.mean() - 0.5) < 0.002
    assert abs(grid.var() - 1 / 12) < 0.001
    for axis in (0, 1):
        left, right = (grid[:-1], grid[1:]) if axis == 0 else (grid[:, :-1], grid[:, 1:])
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.01
    unit = unit_interval(hash_counters(keys[:, None], np.arange(500, dtype=np.uint64)))
    assert unit.min() >= 0
    assert unit.max() < 1
    assert abs(unit.mean() - 0.5) < 0.002


def test_stream_key_separates_its_parts():
    keys = {stream_key(a, b) for a in range(30) for b in range(30)} | {stream_key(a) for a in range(30)}
    assert len(keys) == 930


@pytest.mark.parametrize(("bits", "count"), [(1, 2), (4, 16), (7, 60), (7, 128), (9, 512), (16, 200)])
def test_small_permutations_repeat_no_number(bits, count):
    keys = hash_counters(np.array([stream_key(8)], np.uint64), np.arange(50, dtype=np.uint64))
    images = small_permutations(keys, bits, count)
    assert images.shape == (50, count)
    assert images.max() < 2**bits
    assert all(len(set(row.tolist())) == count for row in images)
