"""ELECTRA's objective: what is sampled, where it is put, what is called replaced, what stays shared."""

import pytest
import torch
from test_objectives import LAYOUT, LENGTH, batches_of, make_rows
from tiny import VOCABULARY, new_models, tiny_preset

from lmscripts import objectives
from lmscripts.data.packing import Rows
from lmscripts.models import families
from lmscripts.objectives import module, replaced
from lmscripts.objectives.replaced import sample


class Vocabulary:
    """A tokenizer of which only the ids are asked."""

    all_special_ids = list(range(10))
    mask_token_id = 4

    def get_vocab(self):
        return {f"word{number}": number for number in range(VOCABULARY)}


SETTINGS = replaced.resolved(replaced.Settings(mask_probability=(0.15,), mask_unit="word"), tiny_preset("electra"))
PLAN = replaced.plan(Vocabulary(), LAYOUT, SETTINGS)


def make_pair(seed=3):
    models = new_models("electra", "replaced", LAYOUT, seed=seed)
    return objectives.trained("replaced", families.family("electra"), models, "sdpa", SETTINGS)


def padded_rows(num_rows):
    """Rows of two documents with an empty end of five positions."""
    rows = make_rows(num_rows, segments=2)
    ids, content, segments = rows.ids.copy(), rows.content.copy(), rows.segments.copy()
    ids[:, -5:], content[:, -6:], segments[:, -5:] = 0, False, -1
    return Rows(ids, content, rows.word_starts & content, segments, rows.positions)


def seen_by_discriminator(monkeypatch, objective, batch):
    """The ids that reach the discriminator, the labels it is held to, and the sums."""
    found = {}
    encode, judge = objective.family.encode, torch.nn.functional.binary_cross_entropy_with_logits

    def watched_encode(model, ids, *rest):
        if model is objective.discriminator:
            found["ids"] = ids
        return encode(model, ids, *rest)

    def watched_judge(scores, labels, **settings):
        found["labels"] = labels
        return judge(scores, labels, **settings)

    with monkeypatch.context() as watched:
        watched.setattr(objective.family, "encode", watched_encode)
        watched.setattr(torch.nn.functional, "binary_cross_entropy_with_logits", watched_judge)
        sums = objective(batch)
    return found["ids"], found["labels"].bool(), sums


def test_a_rigged_generator_puts_its_ids_where_it_said(monkeypatch):
    """An id that depends on the position must arrive at that position (an older system took those of others)."""
    rows = padded_rows(6)
    ((batch, counts),) = batches_of(rows, plan=PLAN)
    wanted = 20 + torch.arange(6 * LENGTH) % 97
    # At every third position the rigged generator happens to be right.
    original = torch.from_numpy(rows.ids).reshape(-1).long()
    wanted = torch.where(torch.arange(wanted.numel()) % 3 == 0, original, wanted)

    def rigged(trained, model, batch, attention):
        return 1e4 * torch.nn.functional.one_hot(wanted[batch["slots"]], 512).float()

    monkeypatch.setattr(module.Objective, "logits_at_slots", rigged)
    objective = make_pair()
    seen, replaced, sums = seen_by_discriminator(monkeypatch, objective, batch)
    used = batch["slots"][batch["weights"] > 0]
    expected = original.clone()
    expected[used] = wanted[used]
    assert torch.equal(seen.reshape(-1).long(), expected)
    assert torch.equal(replaced.reshape(-1), expected != original)
    assert 0 < replaced.sum() < used.numel()
    assert sums["rtd_replaced"] == (expected != original).sum()
    assert sums["mlm_correct"] == (wanted[used] == original[used]).sum()
    assert counts["rtd"] == (rows.segments >= 0).sum() == 6 * (LENGTH - 5)


def test_losses_equal_the_plain_pair(monkeypatch):
    """The same as ElectraForMaskedLM and ElectraForPreTraining with labels, on rows of one document."""
    objective = make_pair()
    rows = make_rows(4)
    ((batch, counts),) = batches_of(rows, plan=PLAN)
    seen, replaced, sums = seen_by_discriminator(monkeypatch, objective, batch)
    labels = torch.full((4 * LENGTH,), -100)
    used = batch["weights"] > 0
    labels[batch["slots"][used]] = batch["labels"][used]
    generator = objective.generator(input_ids=batch["input_ids"], labels=labels.view(4, LENGTH))
    discriminator = objective.discriminator(input_ids=seen, labels=replaced.long())
    assert abs(sums["mlm"] / counts["mlm"] - generator.loss) < 1e-5
    assert abs(sums["rtd"] / counts["rtd"] - discriminator.loss) < 1e-5
    expected = torch.autograd.grad(generator.loss + 50 * discriminator.loss, objective.parameters())
    total = objective.loss(sums, counts)
    found = torch.autograd.grad(total, objective.parameters())
    for (name, _), a, b in zip(objective.named_parameters(), expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
    flagged = discriminator.logits > 0
    assert sums["rtd_flagged"] == flagged.sum()
    assert sums["rtd_hits"] == (flagged & replaced).sum()
    assert sums["rtd_correct"] == (flagged == replaced).sum()
    metrics = objective.metrics({name: value.item() for name, value in sums.items()}, counts)
    assert abs(metrics["loss"] - (metrics["generator_loss"] + 50 * metrics["discriminator_loss"])) < 1e-5


def test_masked_tokens_are_hidden_from_the_generator_in_85_of_100():
    rows = make_rows(2000)
    ((batch, _),) = batches_of(rows, plan=PLAN)
    used = batch["weights"] > 0
    at_slots = batch["input_ids"].reshape(-1)[batch["slots"][used]]
    hidden = (at_slots == PLAN.mask_id).float().mean().item()
    kept = (at_slots == batch["labels"][used]).float().mean().item()
    assert abs(hidden - 0.85) < 0.01
    assert hidden + kept == pytest.approx(1)


def test_samples_have_the_distribution_of_the_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 20, generator=generator)
    draws = torch.rand(200_000, generator=generator)
    counts = torch.bincount(sample(logits.expand(draws.numel(), -1), draws), minlength=20).double()
    expected = logits.double().softmax(-1)[0] * draws.numel()
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand


def test_samples_at_the_ends_of_the_distribution():
    logits = torch.tensor([[0.0, float("-inf"), 0.0]])
    draws = torch.tensor([0.0, 0.499, 0.501, 1 - 2.0**-24])
    assert sample(logits.expand(4, -1), draws).tolist() == [0, 0, 2, 2]


def test_draws_do_not_depend_on_the_batch(monkeypatch):
    """The same rows in one batch or in three: the same samples, hence the same labels and sums."""
    objective = make_pair()
    rows = padded_rows(6)
    ((whole, counts),) = batches_of(rows, plan=PLAN)
    cut = batches_of(rows, [1, 2, 3], plan=PLAN)
    seen, replaced, sums = seen_by_discriminator(monkeypatch, objective, whole)
    parts = [seen_by_discriminator(monkeypatch, objective, batch) for batch, _ in cut]
    assert torch.equal(seen, torch.cat([part[0] for part in parts]))
    assert torch.equal(replaced, torch.cat([part[1] for part in parts]))
    for name, value in sums.items():
        together = sum(part[2][name] for part in parts)
        assert abs(together - value) <= 1e-5 * abs(value), name
    assert sum(c["rtd"] for _, c in cut) == counts["rtd"]


def test_an_idle_process_adds_nothing():
    objective = make_pair()
    ((batch, _),) = batches_of(make_rows(1), plan=PLAN)
    for name in ("weights", "row_weights"):
        batch[name].zero_()
    sums = objective(batch)
    assert all(value == 0 for value in sums.values())
    objective.loss(sums, {"mlm": 3, "rtd": 5}).backward()
    assert all((p.grad is not None and (p.grad == 0).all()) for p in objective.parameters())


def test_embeddings_are_one_module_and_stay_shared(tmp_path):
    from lmscripts.training.checkpoint import load_weights

    objective = make_pair()
    for subfolder, model in objective.models.items():
        model.save_pretrained(tmp_path / "checkpoint" / subfolder)
    other = make_pair(seed=9)
    load_weights(other.models, tmp_path / "checkpoint")
    for pair in (objective, other):
        words = pair.discriminator.electra.embeddings.word_embeddings.weight
        assert pair.generator.electra.embeddings is pair.discriminator.electra.embeddings
        assert pair.generator.generator_lm_head.weight is words
    ((batch, counts),) = batches_of(make_rows(2), plan=PLAN)
    assert objective(batch)["rtd"] == other(batch)["rtd"]
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other.loss(other(batch), counts).backward()
    optimizer.step()
    assert torch.equal(other.generator.generator_lm_head.weight, words)
    assert not torch.equal(words, objective.discriminator.electra.embeddings.word_embeddings.weight)
    assert (words.grad != 0).any()


def test_a_pair_whose_halves_disagree_is_refused(tmp_path):
    from lmscripts.errors import UserError
    from lmscripts.training.checkpoint import load_weights

    objective = make_pair()
    objective.discriminator.save_pretrained(tmp_path / "checkpoint")
    make_pair(seed=9).generator.save_pretrained(tmp_path / "checkpoint" / "generator")
    with pytest.raises(UserError, match="embeddings"):
        load_weights(objective.models, tmp_path / "checkpoint")


def test_a_step_never_waits_for_the_device(monkeypatch):
    """On the meta device there are no values: whatever would fetch one to the host fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # meta has no autocast
    objective = make_pair().to("meta")
    ((batch, counts),) = batches_of(padded_rows(4), plan=PLAN)
    sums = objective({name: tensor.to("meta") for name, tensor in batch.items()})
    objective.loss(sums, counts).backward()
    with pytest.raises(RuntimeError):
        bool(torch.isnan(sums["mlm"]))  # what the older system did in every step
