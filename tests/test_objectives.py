import numpy as np
import pytest
import torch
from tiny import new_models

from lmscripts import objectives
from lmscripts.data.masking import MaskingPlan, prediction_slots
from lmscripts.data.packing import Layout, Rows
from lmscripts.models import families
from lmscripts.objectives import masked

LENGTH = 64
LAYOUT = Layout(LENGTH, "isolated", begin_id=2, end_id=3, pad_id=0)
PLAN = MaskingPlan(0.15, prediction_slots(0.15, LENGTH - 2), 4, np.arange(10, 512, dtype=np.int32), "word")


def make_rows(num_rows, segments=1, seed=0):
    random = np.random.default_rng(seed)
    ids = random.integers(10, 512, (num_rows, LENGTH)).astype(np.int32)
    segment = np.tile(np.arange(LENGTH) * segments // LENGTH, (num_rows, 1)).astype(np.int32)
    position = np.concatenate([np.arange(n) for n in np.bincount(segment[0])]).astype(np.int32)
    content = np.ones((num_rows, LENGTH), bool)
    content[:, [0, -1]] = False
    starts = (random.random(ids.shape) < 0.7) & content
    starts[:, 1] = True
    return Rows(ids, content, starts, segment, np.tile(position, (num_rows, 1)))


class InMemory:
    """A source of rows that are there already."""

    layout, usual_segments = LAYOUT, 2.0

    def __init__(self, rows):
        self._rows = rows

    def read(self, numbers):
        assert numbers.tolist() == list(range(len(self._rows.ids)))
        return self._rows


def make_objective(family="bert"):
    models = new_models(family, "masked", LAYOUT)
    return objectives.trained("masked", families.family(family), models, "sdpa", masked.Settings())


def batches_of(rows, sizes=None, seed=1, plan=PLAN):
    numbers = np.arange(len(rows.ids))
    return masked.batches(InMemory(rows), numbers, np.zeros_like(numbers), seed, sizes or [numbers.size], plan)


def batch_of(rows, seed=1):
    return batches_of(rows, seed=seed)[0]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_loss_and_gradient_equal_the_plain_model_with_full_logits(family):
    objective = make_objective(family)
    batch, counts = batch_of(make_rows(4))
    labels = torch.full((4, LENGTH), -100)
    used = batch["weights"] > 0
    labels.view(-1)[batch["slots"][used]] = batch["labels"][used]
    plain = objective.model(input_ids=batch["input_ids"], labels=labels)
    plain.loss.backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    sums = objective(batch)
    assert counts["mlm"] == used.sum()
    loss = sums["mlm"] / counts["mlm"]
    assert abs(loss.item() - plain.loss.item()) < 1e-5
    loss.backward()
    for name, parameter in objective.named_parameters():
        if name in expected:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-6), name


def test_unused_slots_have_no_weight_and_no_gradient():
    objective = make_objective()
    batch, _ = batch_of(make_rows(2))
    batch["labels"][batch["weights"] == 0] = 77
    first = objective(batch)["mlm"]
    batch["labels"][batch["weights"] == 0] = 99
    assert torch.equal(first, objective(batch)["mlm"])
    batch["weights"].zero_()
    loss = objective(batch)["mlm"]
    loss.backward()
    assert loss == 0
    assert all((p.grad is None) or (p.grad == 0).all() for p in objective.parameters())


def test_a_batch_cut_in_two_has_the_same_sum():
    objective = make_objective()
    rows = make_rows(6, segments=2)
    whole, counts = batch_of(rows)
    total = objective(whole)["mlm"]
    cut = batches_of(rows, [2, 4])
    parts = [objective(batch)["mlm"] for batch, _ in cut]
    assert sum(part_counts["mlm"] for _, part_counts in cut) == counts["mlm"]
    assert abs(sum(parts) - total).item() / total.item() < 1e-6
    assert counts["tokens"] == rows.content.sum()


def test_accuracy_is_counted_in_eval_mode_only():
    objective = make_objective()
    batch, counts = batch_of(make_rows(3))
    assert "mlm_correct" not in objective.train()(batch)
    logits = objective.model.eval()(input_ids=batch["input_ids"]).logits.view(-1, 512)[batch["slots"]]
    right = ((logits.argmax(-1) == batch["labels"]).float() * batch["weights"]).sum()
    assert objective.eval()(batch)["mlm_correct"] == right
    assert 0 <= right <= counts["mlm"]


def test_full_rows_of_one_document_need_no_mask():
    rows = make_rows(3)
    assert "segments" not in batch_of(rows)[0]
    assert "segments" in batch_of(make_rows(3, segments=2))[0]
