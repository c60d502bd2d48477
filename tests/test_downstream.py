"""Downstream tasks beside pretraining: what is refused, the probe, the fine-tuning, and a run that stays the same."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, TINY_PRESET, run_script
from matplotlib.figure import Figure
from runs import log_of, same_bits
from safetensors.torch import load_file
from tiny import new_models
from transformers import AutoTokenizer

from lmscripts import objectives
from lmscripts.data.packing import Layout
from lmscripts.errors import UserError
from lmscripts.evaluation import downstream
from lmscripts.models import families
from lmscripts.training.log import draw_curves

SCRIPT = ROOT / "scripts" / "run_pretraining.py"
TOPICS = f"{SAMPLE / 'topics.csv'}:text:label:article"


def table_of(folder, rows, name="table.csv"):
    (folder / name).write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return folder / name


# ---- what is asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{}"], "is not FILE:TEXT:LABEL"),
        (["{}:text:label:a:b"], "is not FILE:TEXT:LABEL"),
        (["{}x:text:label"], "--eval_task .*csvx:text:label: .*does not exist"),
        (["{}:txt:label"], "no column 'txt'.* did you mean 'text'.* name that one"),
        (["{}:text:label:work"], "no column 'work'"),
        (["{}:text:one"], "every row .* has the label 'a'"),
        (["{}:text:label", "{}:text:one"], "two of --eval_task have the name table"),
        (["few={}few.csv:text:label"], "20 documents are too few .* 50"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(tmp_path, given, said):
    rows = [f"text {n},{'xy'[n % 2]},a" for n in range(60)]
    for name, number in (("table.csv", 60), ("table.csvfew.csv", 20)):
        lines = ["text,label,one", *rows[:number]]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        downstream.read_tasks([each.format(tmp_path / "table.csv") for each in given], SCRIPT)


def test_a_training_script_that_was_copied_finds_the_classifier_or_says_that_it_has_none(tmp_path, monkeypatch):
    table = table_of(tmp_path, [(f"text {n}", n % 2) for n in range(60)])
    assert downstream.read_tasks([f"{table}:text:label"], tmp_path / "my.py")[0].name == "table"
    monkeypatch.setattr(downstream, "project_folder", lambda: tmp_path / "site")
    with pytest.raises(UserError, match=r"needs finetune_classifier.py, .*: copy it there"):
        downstream.read_tasks([f"{table}:text:label"], tmp_path / "my.py")
    monkeypatch.setenv("RANK", "1")  # only the main process reads
    assert downstream.read_tasks([f"{table}:text:label"], tmp_path / "my.py") == []


def test_a_sample_is_drawn_and_no_group_nor_text_stands_on_two_sides(tmp_path):
    rows = [f"text {n % 4000},{'xyz'[n % 3]},group {n // 5}" for n in range(5000)]
    (tmp_path / "big.csv").write_text("\n".join(["text,label,work", *rows]), encoding="utf-8")
    first, again = (downstream.read_tasks([f"{tmp_path / 'big.csv'}:text:label:work"], SCRIPT)[0] for _ in range(2))
    assert len(first.documents) == 2000
    assert first.documents == again.documents
    assert (first.parts == again.parts).all()
    assert abs((first.parts == "test").mean() - 0.25) < 0.02
    for key in ("group", "text"):
        sides = {}
        for row, part in zip(first.documents, first.parts, strict=True):
            sides.setdefault(getattr(row, key), set()).add(part)
        assert {len(found) for found in sides.values()} == {1}, key


def test_tables_of_the_form_that_glue_and_jglue_have_are_read_as_the_page_says(tmp_path):
    lines = [f"it 's \"a charming film {n}\t{n % 2}\n" for n in range(60)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")
    records = ({"sentence": f"文「{n}」", "label": ["positive", "negative"][n % 2]} for n in range(60))
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "train-v1.0.json").write_text(text, encoding="utf-8")
    given = [f"SST-2={tmp_path / 'train.tsv'}:sentence:label", f"MARC-ja={tmp_path / 'train-v1.0.json'}:sentence:label"]
    first, second = downstream.read_tasks(given, SCRIPT)
    assert (first.name, second.name) == ("SST-2", "MARC-ja")
    assert (first.labels, second.labels) == (["0", "1"], ["negative", "positive"])
    assert first.documents[1].text == "it 's \"a charming film 1"


# ---- the probe -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told_apart(tmp_path_factory):
    """A table whose labels are told by one of two words, and one whose labels tell nothing."""
    draw = np.random.default_rng(0)
    words = [["料理", "野球"][n % 2] for n in range(120)]
    texts = [f"{word}の話を{draw.integers(100)}回した。" for word in words]
    folder = tmp_path_factory.mktemp("tables")
    by_word = table_of(folder, zip(texts, words, strict=True))
    by_chance = table_of(folder, zip(texts, draw.integers(2, size=120), strict=True), "chance.csv")
    return [f"{by_word}:text:label", f"{by_chance}:text:label"]


def trained(family, tokenizer, attention="sdpa"):
    name = families.family(family).default_objective
    models = new_models(
        family,
        name,
        Layout(64, "isolated", tokenizer.cls_token_id, tokenizer.sep_token_id, 0),
        vocabulary=len(tokenizer),
        dropout=0.1,
    )
    settings = objectives.objective(name).Settings()
    return objectives.trained(name, families.family(family), models, attention, settings).train()


CPU = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False), print=print)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "electra", "gpt2"])
def test_the_probe_finds_what_is_there_and_leaves_everything_as_it_was(family, tokenizer_dir, told_apart):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tasks = downstream.with_rows(downstream.read_tasks(told_apart, SCRIPT), tokenizer, 64)
    objective = trained(family, tokenizer)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    (by_word, words), (by_chance, _) = downstream.probe(CPU, objective, tasks, lambda: False)
    assert torch.equal(torch.get_rng_state(), state)
    assert objective.training
    assert all(module.training for module in objective.modules())
    assert same_bits(objective.state_dict(), before)
    assert by_word["probe_table_accuracy"] > 0.95
    assert by_chance["probe_chance_accuracy_low"] < 0.5 < by_chance["probe_chance_accuracy_high"]
    assert by_word["probe_table_chance"] == 0.5
    assert 0.4 < by_word["probe_table_majority"] < 0.6
    assert f"accuracy {by_word['probe_table_accuracy']:.1%} (" in words


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_states_are_those_of_a_padded_batch_with_a_mask(family, tokenizer_dir, told_apart):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    task = downstream.with_rows(downstream.read_tasks(told_apart[:1], SCRIPT), tokenizer, 64)[0]
    objective = trained(family, tokenizer).eval()
    found = downstream.mean_states(downstream._states(objective), task.rows, task.owners, task.around, 120)
    batch = tokenizer([row.text for row in task.documents], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = objective.models[""].base_model(**batch).last_hidden_state
    text = batch["attention_mask"].clone()
    text[:, 0] = 0
    text[torch.arange(120), batch["attention_mask"].sum(1) - 1] = 0
    expected = (hidden * text[..., None]).sum(1) / text.sum(1, keepdim=True)
    assert len({len(row) for row in task.rows}) > 1
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_curves_show_what_the_probes_said(tmp_path, monkeypatch):
    records = [{"step": step, "probe_topics_accuracy": 0.2 + step / 100} for step in (0, 10, 20)]
    records += [{"step": step, "eval_loss": 5.0, "eval_accuracy": 0.1} for step in (10, 20)]
    records += [{"step": step, "loss": 5.0, "learning_rate": 1e-3} for step in (5, 10, 15, 20)]
    text = "".join(json.dumps(record) + "\n" for record in sorted(records, key=lambda record: record["step"]))
    (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes[1].get_lines()))
    draw_curves(tmp_path)
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn}
    assert lines["probe topics"] == [[0, 20], [10, pytest.approx(30)], [20, pytest.approx(40)]]
    assert lines["accuracy"] == [[10, 10], [20, 10]]


def test_a_task_that_fails_is_said_once_and_a_stop_gives_nothing(tokenizer_dir, told_apart, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tasks = downstream.with_rows(downstream.read_tasks(told_apart, SCRIPT), tokenizer, 64)
    objective = trained("bert", tokenizer)
    assert downstream.probe(CPU, objective, tasks, lambda: True) is None
    with torch.no_grad():
        objective.models[""].get_input_embeddings().weight[:] = math.nan
    assert downstream.probe(CPU, objective, tasks, lambda: False) == []
    assert downstream.probe(CPU, objective, tasks, lambda: False) == []
    assert capsys.readouterr().out.count("warning: the probe of task table failed") == 1


# ---- the fine-tuning, with scripts that stand in for the real ones ---------------------------------------------------

STAND_IN = """
import json, os, sys
from pathlib import Path
assert not {"RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & {*os.environ}
table = Path(sys.argv[1])
(table.parent / "table_training").mkdir(exist_ok=True)
number = {"value": 0.75, "interval": [0.5, 0.9]}
metrics = {"accuracy": number, "macro_f1": number}
baseline = {"name": "TF-IDF of characters", "metrics": metrics}
report = {"levels": {"document": {"metrics": metrics}}, "baselines": [baseline]}
(table.parent / "table_report").mkdir(exist_ok=True)
(table.parent / "table_report" / "run_1.json").write_text(json.dumps(report))
with open(table.parents[2] / "calls.txt", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def finetune(tmp_path, told_apart, monkeypatch):
    """Calls `downstream.finetune` with a stand-in for the scripts: what was logged, and whether it was stopped."""
    for name in ("finetune_classifier.py", "analyze_results.py"):
        (tmp_path / name).write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    tasks = downstream.read_tasks(told_apart[:1], tmp_path / "my.py")
    logged = []
    accelerator = SimpleNamespace(log=lambda record, step: logged.append((step, record)), print=print)

    def call(step=9, stop_requested=lambda: False):
        return logged, downstream.finetune(accelerator, tasks, tmp_path, tmp_path / "my.py", step, 128, stop_requested)

    return call


def test_a_fine_tuning_is_logged_once_for_a_step_and_stands_in_the_card(finetune, tmp_path, capsys):
    assert finetune()[1] is False
    logged, _ = finetune()
    assert [step for step, _ in logged] == [9]
    assert logged[0][1]["finetuned_table_accuracy_low"] == 0.5
    (record,) = log_of(tmp_path)
    assert record == {"step": 9, **logged[0][1]}
    classifier, report = (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines()
    assert f"--model_name_or_path={tmp_path / 'final'}" in classifier
    assert report == str(tmp_path / "eval_tasks" / "table" / "table.sqlite")
    lines = (tmp_path / "eval_tasks" / "table" / "table.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["part"] for line in lines} == {"train", "validation", "test"}
    assert "accuracy 75.0% (50.0% to 90.0%)" in downstream.card_rows(tmp_path)["finetuned, task table"]
    assert "finetuned table: accuracy 75.0%" in capsys.readouterr().out
    assert [step for step, _ in finetune(step=10)[0]] == [9, 10]


def test_a_fine_tuning_that_fails_or_is_stopped_ends_nothing(finetune, tmp_path, capsys):
    (tmp_path / "finetune_classifier.py").write_text("raise SystemExit('no memory')", encoding="utf-8")
    assert finetune() == ([], False)
    said = capsys.readouterr().out
    assert "warning: the fine-tuning on task table failed" in said
    assert "output.txt" in said
    assert "no memory" in (tmp_path / "eval_tasks" / "table" / "output.txt").read_text(encoding="utf-8")
    (tmp_path / "finetune_classifier.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    asked = iter([False, False])
    assert finetune(stop_requested=lambda: next(asked, True)) == ([], True)
    (tmp_path / "finetune_classifier.py").write_text(STAND_IN, encoding="utf-8")
    assert len(finetune()[0]) == 1


# ---- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common(store_dir, workspace):
    (workspace / "tiny.json").write_text(json.dumps({"bert-test": TINY_PRESET}), encoding="utf-8")
    given = ["--dataset_dir", store_dir, "--parameter_file", workspace / "tiny.json", "--model_type", "bert-test"]
    given += ["--tracker", "none", "--hidden_dropout", 0.1, "--max_steps", 8, "--eval_every", 2, "--eval_rows", 8]
    return [*given, "--logging_steps", 4]


def probed(run_dir):
    return [record["step"] for record in log_of(run_dir) if "probe_topics_accuracy" in record]


def test_a_run_with_tasks_has_the_bits_of_one_without(common, workspace):
    run_script("run_pretraining.py", *common, "--model_dir", workspace / "without", "--stop_at_step", 4)
    given = [*common, "--model_dir", workspace / "with", "--eval_task", TOPICS]
    done = run_script("run_pretraining.py", *given, "--stop_at_step", 4)
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(workspace / run / "checkpoint-4" / name) for run in ("without", "with"))
        assert same_bits(one, other)
    assert "task topics: 295 documents (175 for training, 46 for choice, 74 for judging), 8 labels" in done.stdout
    assert probed(workspace / "with") == [0, 2, 4]
    run_script("run_pretraining.py", *given, "--stop_at_step", 5, "--do_continue")
    assert probed(workspace / "with") == [0, 2, 4]


def test_a_mistake_and_shards_are_refused_before_anything_is_made(common, workspace):
    for given, said in ((["--eval_task", f"{TOPICS}s"], "no column 'articles'"), (["--shard"], "with --shard")):
        more = ["--eval_task", TOPICS] if given == ["--shard"] else []
        done = run_script("run_pretraining.py", *common, "--model_dir", workspace / "none", *given, *more, check=False)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (workspace / "none").exists()


@pytest.mark.slow
def test_a_whole_run_ends_with_a_classifier_of_each_task(common, workspace):
    run_dir = workspace / "whole"
    given = [*common, "--model_dir", run_dir, "--eval_task", TOPICS]
    done = run_script("run_pretraining.py", *given)
    assert "finetuned topics: accuracy" in done.stdout
    last = log_of(run_dir)[-1]
    assert last["step"] == 8
    assert last["finetuned_topics_accuracy_low"] <= last["finetuned_topics_accuracy"]
    card = (run_dir / "final" / "README.md").read_text(encoding="utf-8")
    assert "| finetuned, task topics | accuracy" in card
    assert "; before training" in card
    assert (run_dir / "eval_tasks" / "topics" / "table_trained_model" / "model.safetensors").exists()
    again = run_script("run_pretraining.py", *given, "--do_continue")
    assert "finetuned topics" not in again.stdout
    assert "| finetuned, task topics | accuracy" in (run_dir / "final" / "README.md").read_text(encoding="utf-8")
