"""A policy judged on decisions, and asked about new ones: the figures are those of every record taken alone."""

import gzip
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import PATIENCE, ROOT, launch
from test_analyze_results import run_here

from lmscripts.data.decision_rows import make_batch
from lmscripts.data.decisions import parse
from lmscripts.data.schema import load_schema
from lmscripts.data.synthetic_decisions import generate
from lmscripts.errors import UserError
from lmscripts.evaluation import calibration, decisions
from lmscripts.evaluation.result import as_json
from lmscripts.models import policy
from lmscripts.models.saved import open_policy
from lmscripts.objectives import choice

SCHEMA = load_schema("kanachan-v1")
RULES = ("draw", "numeric", "random")  # all kinds of candidates are chosen among them, 2 to 14 of them
COLUMNS = {field.kind: place for place, field in enumerate(SCHEMA.fields)}


def records(number=45, seed=5):
    """Lines of text."""
    return [line.encode() for rule in RULES for line in generate(SCHEMA, number, seed, rule)]


def new_policy(trained=True, value_head=True, **more):
    """A small model; a trained one has other weights than initialisation gives."""
    model = policy.build(SCHEMA, policy.sizes(None, 32, 2, 2), seed=3, value_head=value_head, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) * trained)
    return model


def objective_of(model):
    return choice.trained(model, choice.Settings(value=model.config.value_head))


@pytest.fixture(scope="module")
def part():
    found, bad = parse(records(), SCHEMA)
    assert not bad
    return found


@pytest.fixture(scope="module")
def model_dir(workspace):
    new_policy().save_pretrained(workspace / "policy")
    return workspace / "policy"


@pytest.fixture(scope="module")
def text(workspace):
    file = workspace / "records.txt.gz"
    file.write_bytes(gzip.compress(b"".join(line + b"\n" for line in records())))
    return file


# ---- judging -----------------------------------------------------------------------------------------------------


def one_by_one(objective, part):
    """What a policy says of every record, each in a batch of its own and computed by hand."""
    found = []
    objective.eval()
    for row in range(part.num_records):
        batch = make_batch(part, np.array([row]), SCHEMA, True)
        with torch.no_grad():
            said = choice.say(objective, batch)
        logits, label = said.logits[0].double().numpy(), int(batch["labels"][0])
        assert len(logits) == part.counts[row, -1]
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        token = part.ids[part.offsets[row + 1] - len(logits) + label] - SCHEMA.first_id(SCHEMA.field("candidates"))
        outcome = part.extra[row, SCHEMA.value.index] / SCHEMA.value.scale
        facts = {"loss": -math.log(shares[label]), "rank": int((shares > shares[label]).sum())}
        facts |= {"confidence": shares.max(), "candidates": len(logits), "chosen": int(token), "outcome": outcome}
        found.append(facts | {"value": float(said.value[0])})
    return found


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_figures_are_those_of_every_record_alone(part, size, monkeypatch):
    monkeypatch.setattr(decisions, "_BLOCK", 50)  # the last has fewer
    model = new_policy()
    objective = objective_of(model)
    model.train()
    blocks = list(decisions.measured(Accelerator(cpu=True), objective, part, SCHEMA, size))
    assert model.training  # and nothing was dropped
    found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    assert [len(block["loss"]) for block in blocks] == [50, 50, 35]
    alone = one_by_one(objective, part)
    for name in ("rank", "candidates", "chosen"):
        assert found[name].tolist() == [facts[name] for facts in alone]
    for name in ("loss", "confidence", "value", "outcome"):
        assert found[name] == pytest.approx([facts[name] for facts in alone], rel=1e-5, abs=1e-5)


def test_the_report_says_what_the_records_say(part):
    objective = objective_of(new_policy())
    reported = decisions.report(decisions.judge(Accelerator(cpu=True), objective, part, SCHEMA, 64))
    alone, metrics = one_by_one(objective, part), reported["metrics"]
    ranks, number = np.array([facts["rank"] for facts in alone]), len(alone)
    assert reported["counts"] == {"decisions": number}
    assert metrics["top1_accuracy"] == (ranks == 0).sum() / number
    assert metrics["top3_accuracy"] == (ranks < 3).sum() / number
    assert 0 < metrics["top1_accuracy"] < metrics["top3_accuracy"] < 1
    assert metrics["loss"] == pytest.approx(np.mean([facts["loss"] for facts in alone]), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["chance_accuracy"] == pytest.approx(np.mean([1 / facts["candidates"] for facts in alone]), rel=1e-14)
    # Two columns stand for all candidates: how sure, and the rest; right is the first.
    sure = np.array([facts["confidence"] for facts in alone])
    labels, two = (ranks > 0).astype(int), np.stack([sure, np.zeros(number)], 1)
    assert metrics["calibration_error"] == pytest.approx(calibration.judged(two, labels)["ece"], rel=1e-5)
    values, outcomes = (np.array([facts[name] for facts in alone]) for name in ("value", "outcome"))
    assert metrics["value_error"] == pytest.approx(np.abs(values - outcomes).mean(), rel=1e-5, abs=1e-5)
    assert metrics["value_explained"] == pytest.approx(1 - np.mean((values - outcomes) ** 2) / outcomes.var(), rel=1e-4)
    for name, facts in reported["types"].items():
        mine = [each for each in alone if SCHEMA.type_of(each["chosen"]) == name]
        assert facts["decisions"] == len(mine) > 0
        assert facts["share"] == len(mine) / number
        assert facts["top1_accuracy"] == sum(each["rank"] == 0 for each in mine) / len(mine)
    assert sum(facts["decisions"] for facts in reported["types"].values()) == number
    assert len(reported["types"]) > 1
    words = decisions.in_words(reported)
    assert f"top-1 {metrics['top1_accuracy']:.2%}" in words
    assert len(words.splitlines()) == 2 + len(reported["types"])


def test_one_record_is_judged_and_none_is_refused(part):
    objective = objective_of(new_policy(value_head=False))
    wanted = np.arange(part.num_records) == 7
    reported = decisions.report(decisions.judge(Accelerator(cpu=True), objective, part.taken(wanted), SCHEMA, 8))
    assert reported["counts"] == {"decisions": 1}
    assert "value_error" not in reported["metrics"]
    with pytest.raises(UserError, match="no decision"):
        decisions.judge(Accelerator(cpu=True), objective, part.taken(wanted & False), SCHEMA, 8)


def test_who_knows_nothing_is_at_chance(part):
    """Equal logits: of equal candidates the first counts as chosen, the loss is that of a guess."""
    model = new_policy(value_head=False)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    reported = decisions.report(decisions.judge(Accelerator(cpu=True), objective_of(model), part, SCHEMA, 32))
    numbers = part.counts[:, -1].astype(float)
    assert reported["metrics"]["loss"] == pytest.approx(np.log(numbers).mean(), rel=1e-12)
    assert reported["metrics"]["top1_accuracy"] == (part.labels == 0).mean()
    assert reported["metrics"]["top3_accuracy"] == (part.labels < 3).mean()


def test_logits_that_are_no_numbers_are_refused(part):
    model = new_policy()
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite numbers for 135 of 135 decisions"):
        decisions.judge(Accelerator(cpu=True), objective_of(model), part, SCHEMA, 32)


def test_who_is_asked_to_stop_says_nothing(part, monkeypatch):
    monkeypatch.setattr(decisions, "_BLOCK", 50)
    asked, told = iter([False, False, False, True]), []
    progress = lambda done, passes: told.append((done, passes))  # noqa: E731
    about = (Accelerator(cpu=True), objective_of(new_policy()), part, SCHEMA, 20, lambda: next(asked), progress)
    assert decisions.judge(*about) is None
    assert told == [(1, 8), (2, 8), (3, 8)]


def test_what_is_saved_and_loaded_gives_the_same_to_the_last_digit(part, tmp_path):
    """The older trainer neither trained nor saved the vectors of its numbers: every reload was another player."""
    for original in (False, True):
        model = new_policy(value_head=False, original=original)
        before = decisions.report(decisions.judge(Accelerator(cpu=True), objective_of(model), part, SCHEMA, 32))
        model.save_pretrained(tmp_path / str(original))
        again = objective_of(open_policy(str(tmp_path / str(original))).models[""])
        assert decisions.report(decisions.judge(Accelerator(cpu=True), again, part, SCHEMA, 32)) == before
