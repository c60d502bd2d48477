"""Which decisions stand in which step, and how they are laid out as a batch."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from lmscripts.data.decision_rows import Steps, make_batch
from lmscripts.data.steps import InWindows

# Two sequences and numbers in the middle, as no built-in schema has them.
FIELDS = [
    ("id", 0, 1),
    ("sequence", 5, 4),
    ("set", 7, 3),
    ("numeric", 0, 2),
    ("sequence", 3, 6),
    ("candidates", 11, 5),
    ("label", 0, 1),
    ("extra", 0, 2),
]
SCHEMA = SimpleNamespace(
    fields=[SimpleNamespace(kind=kind, vocab_size=size, max_length=most) for kind, size, most in FIELDS],
    num_ids=31,
    pad_id=30,
    value_id=29,
    num_numeric=2,
    max_positions=21,
    scales=(1.0, 100.0),
    value=SimpleNamespace(index=1, scale=50.0),
)


def random_part(number, seed=0):
    """Records as the store has them, and as lists."""
    draw = np.random.default_rng(seed)
    shapes = [
        (most, 0 if kind == "set" else 1) for kind, _, most in FIELDS if kind in ("sequence", "set", "candidates")
    ]
    counts = np.stack([draw.integers(least, most + 1, number) for most, least in shapes], 1).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum(counts.sum(1, dtype=np.int64))])
    return SimpleNamespace(
        num_records=number,
        ids=draw.integers(0, 29, offsets[-1]).astype(np.uint16),
        counts=counts,
        offsets=offsets,
        numeric=draw.integers(0, 1000, (number, 2)).astype(np.float32),
        labels=(draw.random(number) * counts[:, 3]).astype(np.uint16),
        extra=draw.integers(-99, 99, (number, 2)).astype(np.int32),
        lengths=lambda rows: counts[rows].sum(1, dtype=np.int64) + 2,
    )


def one_by_one(part, row, with_value):
    """A record as lists, token after token: ids, values, places, where candidates stand."""
    fields = np.split(part.ids[part.offsets[row] : part.offsets[row + 1]], np.cumsum(part.counts[row])[:-1])
    first, of_set, second, candidates = ([int(each) for each in field] for field in fields)
    numbers = [float(part.numeric[row, 0]), float(part.numeric[row, 1] / np.float32(100))]
    ids = [*first, *of_set, 31, 32, *second, *candidates, *[29] * with_value]
    before = [0.0] * (len(first) + len(of_set))
    values = [*before, *numbers, *[0.0] * (len(second) + len(candidates) + with_value)]
    places = [*range(1, len(first) + 1), *[0] * (len(of_set) + 2), *range(1, len(second) + 1)]
    places += [0] * (len(candidates) + with_value)
    begin = len(ids) - with_value - len(candidates)
    return ids, values, places, list(range(begin, begin + len(candidates)))


@pytest.mark.parametrize("with_value", [False, True])
def test_a_batch_is_what_its_records_are_one_by_one(with_value):
    part = random_part(60)
    rows = np.random.default_rng(1).permutation(60)[:23]
    batch = {name: tensor.numpy() for name, tensor in make_batch(part, rows, SCHEMA, with_value).items()}
    alone = [one_by_one(part, row, with_value) for row in rows]
    assert batch["input_ids"].shape[1] == max(len(ids) for ids, *_ in alone)
    assert batch["candidates"].shape[1] == max(len(where) for *_, where in alone)
    for number, (row, (ids, values, places, where)) in enumerate(zip(rows, alone)):
        size, rest = len(ids), batch["input_ids"].shape[1] - len(ids)
        assert batch["input_ids"][number].tolist() == ids + [30] * rest
        assert batch["values"][number].tolist() == values + [0.0] * rest
        assert batch["position_ids"][number].tolist() == places + [0] * rest
        assert batch["attention_mask"][number].tolist() == [1] * size + [0] * rest
        assert batch["candidates"][number][batch["candidate_mask"][number]].tolist() == where
        assert batch["candidate_mask"][number].sum() == len(where)
        assert not batch["candidates"][number][~batch["candidate_mask"][number]].any()
        assert batch["labels"][number] == part.labels[row] < len(where)
        if with_value:
            assert batch["value_places"][number] == size - 1
            assert batch["outcome"][number] == np.float32(part.extra[row, 1] / 50)
    assert batch["weights"].tolist() == [1.0] * 23
    assert ("outcome" in batch) == with_value


@pytest.mark.parametrize(("number", "batch_size"), [(1, 4), (7, 7), (1000, 8), (1003, 8), (400, 8), (401, 8)])
def test_every_epoch_has_every_row_once_and_ends_at_a_step(number, batch_size):
    lengths = np.random.default_rng(3).integers(1, 99, number)
    order = InWindows(number, lambda rows: lengths[rows], batch_size, seed=5)
    epochs = []
    for epoch in range(3):
        bounds = [order.bounds(step) for step in range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)]
        assert bounds[0][0] == epoch * number
        assert bounds[-1][1] == (epoch + 1) * number
        assert all(before[1] == after[0] for before, after in pairwise(bounds))
        sizes = [end - begin for begin, end in bounds]
        assert sorted(sizes)[1:] == [batch_size] * (order.per_epoch - 1)
        rows, of = order.rows(np.arange(epoch * number, (epoch + 1) * number))
        assert (of == epoch).all()
        assert sorted(rows.tolist()) == list(range(number))
        epochs.append(rows.tolist())
    assert number < 8 or epochs[0] != epochs[1]


def test_rows_of_a_step_are_about_equally_long_and_can_be_asked_for_directly():
    lengths = np.random.default_rng(3).integers(1, 100, 3000)
    order = InWindows(3000, lambda rows: lengths[rows], 16, seed=5)
    whole = order.rows(np.arange(9000))[0]
    spread = [np.ptp(lengths[whole[slice(*order.bounds(step))]]) for step in range(order.per_epoch)]
    assert np.mean(spread) < 6  # of 99
    means = np.array([lengths[whole[slice(*order.bounds(step))]].mean() for step in range(order.per_epoch)])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25  # the short ones do not come first
    for first, count in ((2999, 2), (799, 900), (8999, 1), (0, 1)):
        again = InWindows(3000, lambda rows: lengths[rows], 16, seed=5)
        assert np.array_equal(again.rows(np.arange(first, first + count))[0], whole[first : first + count])


def test_a_window_is_laid_out_when_it_is_asked_for():
    """So that neither memory nor the time to the first step grow with the number of records."""
    asked = []

    def lengths(rows):
        asked.append(len(rows))
        return rows % 7

    order = InWindows(10**12, lengths, 100, seed=1)
    rows, epochs = order.rows(np.arange(10**12 + 4_990, 10**12 + 5_010))
    assert order.bounds(order.per_epoch + 50) == (10**12 + 5000, 10**12 + 5100)
    assert len(set(rows.tolist())) == 20
    assert (epochs == 1).all()
    assert asked == [5000, 5000]


@pytest.mark.parametrize("shares", [[1], [3, 1], [1, 0, 2]])
def test_processes_divide_a_step_and_nobody_else_has_its_records(shares):
    part, seen, tokens = random_part(53), [], 0.0
    for process in range(len(shares)):
        about = {"batch_size": 8, "micro_batch_size": 3, "shares": shares, "seed": 2}
        steps = Steps(part, SCHEMA, True, **about)
        batches = steps.prefetch(0, steps.per_epoch, process)
        for micro_batches, counts in batches:
            assert all(len(batch["labels"]) <= 3 for batch in micro_batches)
            assert counts["choice"] == counts["value"] == sum(float(batch["weights"].sum()) for batch in micro_batches)
            tokens += counts["tokens"]
            seen += [float(x) for b in micro_batches for x, w in zip(b["outcome"], b["weights"]) if w]
        batches.close()
    assert sorted(seen) == sorted((part.extra[:, 1] / 50).astype(np.float32).tolist())
    assert tokens == part.lengths(np.arange(53)).sum() + 53


def test_snapshots_are_named_by_whole_epochs_and_all_records_and_rounded_up_to_a_step():
    steps = Steps(random_part(20), SCHEMA, False, batch_size=6, micro_batch_size=6, shares=[6], seed=2)
    assert steps.per_epoch == 4
    records = [steps.records(step) for step in range(9)]
    assert records[::4] == [0, 20, 40]
    names = [steps.snapshot(step, 2) for step in range(9)]
    assert names[4] == "snapshots/01"
    assert names[8] == "snapshots/02"
    assert names[1] == f"snapshots/00.{records[1]}"
    assert names[5] == f"snapshots/01.{records[5]}"
    assert steps.snapshot(4, 4) == "snapshots/0001"
    due = [step for step in range(9) if steps.is_due(step, 10)]
    wanted = {next(step for step in range(9) if records[step] >= most) for most in (10, 20, 30, 40)} | {4, 8}
    assert due == sorted(wanted)
    assert [step for step in range(9) if steps.is_due(step, 0)] == [4, 8]
