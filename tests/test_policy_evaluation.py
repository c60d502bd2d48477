"""A policy judged on decisions, and asked about new ones: the figures are those of every record taken alone."""

import gzip
import hashlib
import json
import math
import subprocess
import sys
import tempfile

import forked
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
from lmscripts.models import policy
from lmscripts.models.saved import open_policy
from lmscripts.objectives import choice
from lmscripts.training import processes

SCHEMA = load_schema("kanachan-v1")
RULES = ("draw", "numeric", "random")  # all kinds of candidates are chosen among them, 2 to 14 of them
COLUMNS = {field.kind: place for place, field in enumerate(SCHEMA.fields)}


def records(number=45):
    """Lines of text, none of them twice."""
    return [line.encode() for seed, rule in enumerate(RULES) for line in generate(SCHEMA, number, seed, rule)]


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
    trained = torch.nn.functional.huber_loss(torch.from_numpy(values), torch.from_numpy(outcomes)).item()
    assert metrics["value_loss"] == pytest.approx(trained, rel=1e-4)
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


# ---- evaluate_policy.py ------------------------------------------------------------------------------------------


def evaluate(model_dir, data, *more, output=None, check=True):
    arguments = ["--model", model_dir, "--data", data, *([] if output is None else ["--output_file", output]), *more]
    done = run_here("evaluate_policy.py", *arguments, check=check)
    return done, json.loads(output.read_text(encoding="utf-8")) if output is not None and not done.returncode else None


@pytest.fixture(scope="module")
def result(workspace, model_dir, text):
    return evaluate(model_dir, text, "--batch_size", 32, output=workspace / "result.json")[1]


def test_a_result_says_what_was_judged_and_how(part, model_dir, result):
    expected = decisions.report(decisions.judge(Accelerator(cpu=True), objective_of(new_policy()), part, SCHEMA, 32))
    assert {name: result[name] for name in expected} == json.loads(json.dumps(expected))
    weights = (model_dir / "model.safetensors").read_bytes()
    assert result["model"]["weights_sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert result["model"]["parameters"] == new_policy().num_parameters()
    assert (result["untrained"], result["decisions"]["schema"]) == (False, "kanachan-v1")
    assert result["options"] == {"part": "train", "batch_size": 32, "precision": "fp32"}


def test_a_store_and_its_text_give_the_same(model_dir, text, result, tmp_path):
    prepare = ["--input_file", text, "--output_dir", tmp_path / "store", "--num_workers", 1]
    run_here("prepare_annotations.py", *prepare, "--validation_share", 0)
    done, found = evaluate(model_dir, tmp_path / "store", "--batch_size", 32, output=tmp_path / "result.json")
    assert found["metrics"] == result["metrics"]
    assert f"top-1 {found['metrics']['top1_accuracy']:.2%}" in done.stdout
    assert "discard" in done.stdout
    for more, reason in (
        (("--part", "validation"), "no decision"),
        (("--on_bad_row", "skip"), "--on_bad_row skip has no effect on a store"),
        ((text,), "is a decision store, which is read alone"),
    ):
        done, _ = evaluate(model_dir, tmp_path / "store", *more, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert reason in done.stderr


def test_decisions_that_are_repeated_are_told_and_counted_once_unless_asked(model_dir, tmp_path):
    file = tmp_path / "winners.txt"
    file.write_bytes(b"\n".join(records(3) * 2))
    for more, number in (((), 9), (("--keep_duplicates",), 18)):
        done, found = evaluate(model_dir, file, *more, output=tmp_path / "result.json")
        assert found["counts"]["decisions"] == number
        assert ("9 decisions repeat one of the same game and were left out" in done.stdout) == (number == 9)


def test_the_store_of_another_schema_is_refused(model_dir, tmp_path):
    schema = load_schema(ROOT / "sample_data" / "offered_answers.json")
    (tmp_path / "offers.txt").write_text("\n".join(generate(schema, 5, 1, "draw")), encoding="utf-8")
    prepare = ["--input_file", tmp_path / "offers.txt", "--output_dir", tmp_path / "store", "--num_workers", 1]
    run_here("prepare_annotations.py", *prepare, "--schema", ROOT / "sample_data" / "offered_answers.json")
    done, _ = evaluate(model_dir, tmp_path / "store", check=False)
    assert done.returncode == 2
    assert "has the schema offered-answers, whose fields, sizes or scales are others than those" in done.stderr


def test_a_dry_run_says_what_would_be_done(model_dir, text, tmp_path):
    done, _ = evaluate(model_dir, text, "--dry_run", "--batch_size", 50)
    assert "train: 135 decisions, 3 forward passes of each process; processes: 1 on " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_other_scripts_are_understood(model_dir, text):
    done = run_here("evaluate_policy.py", "--model_dir", model_dir, "--input_file", text, "--dry_run")
    assert "135 decisions" in done.stdout
    assert "--model_dir is now --model\n--input_file is now --data\n" in done.stderr


def test_who_was_never_trained_is_named_or_refused(text, tmp_path):
    new_policy(trained=False).save_pretrained(tmp_path / "fresh")
    done, found = evaluate(tmp_path / "fresh", text, output=tmp_path / "result.json")
    assert found["untrained"] is True
    assert "WAS NEVER TRAINED" in done.stdout
    done, _ = evaluate(tmp_path / "fresh", text, "--require_trained", check=False)
    assert done.returncode == 2
    assert "was never trained" in done.stderr


def test_mistakes_are_one_sentence_and_nothing_is_lost(model_dir, text, result, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}", encoding="utf-8")
    bad = tmp_path / "bad.txt"
    lines = records(2)
    bad.write_bytes(b"\n".join([lines[0], with_column(lines[1], "numeric", b"0,0,x,1,1,1"), lines[2], b""]))
    for arguments, reason in (
        ((text, "--output_file", other), "is not an earlier result"),
        ((text, "--part", "train"), "--part train has no effect on text"),
        ((text, "--batch_size", 0), "--batch_size must be greater than 0"),
        ((tmp_path / "nowhere.txt",), "nowhere.txt does not exist"),
        ((bad,), "bad.txt:2: field 2"),
    ):
        done, _ = evaluate(model_dir, *arguments, check=False)
        assert done.returncode == 2
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
    assert other.read_text(encoding="utf-8") == "{}"
    done, found = evaluate(model_dir, bad, "--on_bad_row", "skip", output=tmp_path / "result.json")
    assert found["counts"]["decisions"] == 2
    assert f"1 x field 2 (numbers) holds what is no whole number, at {bad}:2" in done.stdout
    done, _ = evaluate(tmp_path, text, check=False)
    assert done.returncode == 2


def test_who_is_stopped_writes_nothing_and_leaves_nothing(model_dir, text, tmp_path, monkeypatch):
    class Stop:
        reason = "SIGTERM"

        def __call__(self):
            return True

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(processes, "StopRequest", Stop)
    done = run_here(
        "evaluate_policy.py", "--model", model_dir, "--data", text, "--output_file", tmp_path / "r.json", check=False
    )
    assert done.returncode == processes.stopped_early()
    assert "stopped by SIGTERM; no result was written" in done.stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


@pytest.mark.launch
def test_two_processes_give_the_same_bits(model_dir, text, result, tmp_path):
    arguments = ["--model", model_dir, "--data", text, "--batch_size", 32, "--output_file", tmp_path / "result.json"]
    launch("cpu_2proc.yaml", "evaluate_policy.py", *arguments)
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert found | {"versions": 0} == result | {"versions": 0}


# ---- predict_policy.py -------------------------------------------------------------------------------------------

SCRIPT = "predict_policy.py"


def predict(model_dir, lines, *more, check=True):
    done = run_here(SCRIPT, "--model", model_dir, *more, check=check, standard_input=b"".join(n + b"\n" for n in lines))
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def with_column(line, kind, value):
    """A record with something else in the column of a kind."""
    values = line.split(b"\t")
    values[COLUMNS[kind]] = value
    return b"\t".join(values)


def test_answers_are_those_of_the_model(part, model_dir):
    lines = records()
    _, answers = predict(model_dir, lines, "--batch_size", 16)
    alone = one_by_one(objective_of(new_policy()), part)
    assert [answer["line"] for answer in answers] == list(range(1, len(lines) + 1))
    for line, answer, facts in zip(lines, answers, alone, strict=True):
        given = list(map(int, line.split(b"\t")[COLUMNS["candidates"]].split(b",")))
        shares = [each["probability"] for each in answer["candidates"]]
        assert answer["id"] == line.split(b"\t")[0].decode()
        assert sorted(each["index"] for each in answer["candidates"]) == list(range(len(given)))
        assert all(each["candidate"] == given[each["index"]] for each in answer["candidates"])
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert answer["best"] == answer["candidates"][0]["candidate"]
        assert answer["chosen"] == facts["chosen"] == answer["candidates"][facts["rank"]]["candidate"]
        assert shares[0] == pytest.approx(facts["confidence"], abs=1e-5)
        assert shares[facts["rank"]] == pytest.approx(math.exp(-facts["loss"]), abs=1e-5)
        assert answer["value"] == pytest.approx(facts["value"], abs=1e-4)


def test_words_and_the_likeliest_alone(model_dir):
    _, answers = predict(model_dir, records(3), "--words", "--top", 2)
    for answer in answers:
        assert len(answer["candidates"]) == 2
        for each in answer["candidates"]:
            assert each["words"] == SCHEMA.words(SCHEMA.field("candidates"), each["candidate"])


def test_what_is_not_known_while_one_plays_may_be_missing(model_dir):
    line = records(1)[0]
    unknown = with_column(line, "label", b"?")
    forms = [line, unknown, with_column(line, "label", b""), with_column(unknown, "extra", b"")]
    forms += [unknown.rsplit(b"\t", 1)[0], line.rsplit(b"\t", 2)[0], line.rsplit(b"\t", 2)[0] + b"\r"]
    _, answers = predict(model_dir, forms, "--batch_size", 1)
    assert "chosen" in answers[0]
    assert not any("chosen" in answer for answer in answers[1:])
    for answer in answers[1:]:
        assert (answer["best"], answer["candidates"]) == (answers[0]["best"], answers[0]["candidates"])


HOSTILE = {
    "negative id": lambda line: with_column(line, "candidates", b"-1,4"),
    "id outside": lambda line: with_column(line, "set", b"2,526"),
    "label outside": lambda line: with_column(line, "label", b"99"),
    "label below": lambda line: with_column(line, "label", b"-1"),
    "too many fields": lambda line: line + b"\t1",
    "too few fields": lambda line: line.rsplit(b"\t", 4)[0],
    "a field empty": lambda line: with_column(line, "candidates", b""),
    "no id": lambda line: with_column(line, "id", b""),
    "nothing": lambda line: b"",
    "another encoding": lambda line: line.decode().encode("utf-16"),
    "no UTF-8": lambda line: with_column(line, "sequence", b"\xff\xfe"),
    "cut": lambda line: line[: len(line) // 3],
    "words": lambda line: "打牌".encode() + line.replace(b",", b" , "),
    "too long": lambda line: with_column(line, "sequence", b",".join([b"1"] * 400_000)),
}


def test_a_line_that_is_no_record_is_said_and_the_others_are_answered(model_dir):
    lines = records(10)[:16]
    _, good = predict(model_dir, lines)
    mixed = [*lines[:2]]
    for line, spoil in zip(lines[2:], HOSTILE.values(), strict=True):
        mixed += [spoil(line).replace(b"\n", b""), line]
    done, answers = predict(model_dir, mixed, check=False)
    assert done.returncode == 1
    assert f"{len(mixed)} lines, {len(HOSTILE)} of them no records" in done.stderr
    assert [answer["line"] for answer in answers] == list(range(1, len(mixed) + 1))
    assert [answer.get("best") for answer in answers if "error" not in answer] == [answer["best"] for answer in good]
    for answer, kind in zip(answers[2::2], HOSTILE, strict=True):
        assert answer.keys() == {"line", "error"}, kind
        assert 10 < len(answer["error"]) < 300, kind
    for lines in ([], [b"no record"]):
        done, answers = predict(model_dir, lines, check=False)
        assert done.returncode == len(lines) == len(answers)


def test_a_file_is_answered_as_standard_input_is(model_dir, text, tmp_path):
    _, expected = predict(model_dir, records())
    arguments = ["--model", model_dir, "--input_file", text, "--output_file", tmp_path / "answers.jsonl"]
    run_here(SCRIPT, *arguments)
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(a["line"], a["best"], a["chosen"]) for a in written] == [
        (a["line"], a["best"], a["chosen"]) for a in expected
    ]
    before = (tmp_path / "answers.jsonl").read_bytes()
    done = run_here(SCRIPT, *arguments, check=False)
    assert done.returncode == 2
    assert "is there already" in done.stderr
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    (tmp_path / "cut.txt.gz").write_bytes(text.read_bytes()[:-20])
    done = run_here(SCRIPT, *arguments[:2], "--input_file", tmp_path / "cut.txt.gz", check=False)
    assert done.returncode == 2
    assert "is damaged or cut off" in done.stderr


def test_the_first_line_is_answered_before_the_second_is_sent(model_dir):
    command = [sys.executable, str(ROOT / "scripts" / SCRIPT), "--model", str(model_dir), "--top", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with forked.Popen(command, **pipes) as player:
        for number, line in enumerate([*records(2), b"no record"], 1):
            for piece in (line[:20], line[20:] + b"\n"):  # as a network brings it
                player.stdin.write(piece)
                player.stdin.flush()
            answer = json.loads(player.stdout.readline())
            assert answer["line"] == number
            assert ("best" in answer) == (line != b"no record")
        rest, _ = player.communicate(timeout=PATIENCE)
        assert rest == b""
        assert player.returncode == 1
