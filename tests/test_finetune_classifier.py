"""Fine-tuning a classifier: whole commands, any number of processes, any stop, and what the files then say."""

import csv
import gc
import html
import json
import os
import re
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import types
from dataclasses import replace

import forked
import numpy as np
import pytest
import torch
from conftest import ROOT, forget_accelerator, launch, run_script
from runs import kill_tree, same_bits, wait_for_step
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM

from lmscripts.data import labelled_rows
from lmscripts.data.folding import FoldSettings
from lmscripts.data.labelled_build import open_or_build
from lmscripts.data.labelled_store import FoldRows
from lmscripts.data.splits import SplitSettings
from lmscripts.data.steps import ByLength, step_batches
from lmscripts.errors import UserError
from lmscripts.evaluation import classifier_run
from lmscripts.evaluation.classifier_run import ResultFiles, card_text, write_tables
from lmscripts.evaluation.judging import RowAnswers, calibrate, document_logits, judge
from lmscripts.models.classifier import (
    AGGREGATES,
    KEY,
    ClassifierSettings,
    build_classifier,
    find_source,
    open_classifier,
    read_settings,
)
from lmscripts.objectives import labels as by_labels
from lmscripts.objectives.module import Objective
from lmscripts.text.records import TableOptions
from lmscripts.training.card import About

SCRIPT = "finetune_classifier.py"
COMMON = ["--group_column", "article", "--max_length", 32, "--epochs", 3, "--learning_rate", 5e-3, "--tracker", "none"]
COMMON += ["--batch_size", 16, "--micro_batch_size", 8]


def tiny_bert(folder, tokenizer_dir):
    """A BERT of 2 layers x 32 as pretraining saves it, without pooler."""
    shutil.copytree(tokenizer_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.1, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(workspace, tokenizer_dir):
    return tiny_bert(workspace / "tiny_bert", tokenizer_dir)


WORDS = {"料理": ("昆布", "水", "鍋", "湯"), "天文": ("星", "月", "地球", "空"), "鉄道": ("駅", "列車", "線", "車")}
OTHERS = ("これ", "が", "の", "は", "とても", "人", "今日", "多い", "時", "また")


@pytest.fixture(scope="module")
def table(workspace):
    """Short and long texts of three labels, told apart by a third of their words; four of them make a group."""
    random, lines = np.random.default_rng(4), ["text,label,article"]
    for number in range(96):
        label = list(WORDS)[number % 3]
        about = label if number % 7 else "鉄道"  # so that nobody can be right about all of them
        words = [str(random.choice(WORDS[about] if random.random() < 0.35 else OTHERS)) for _ in range(5 + number % 60)]
        lines.append(f"{''.join(words)}。,{label},{number // 12 * 3 + number % 3}")
    path = workspace / "topics.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(workspace, table, bert):
    """A whole run with the model's dropout: its folder and what it printed."""
    folder = workspace / "trained"
    log = ["-f", workspace / "trained.log"]
    done = run_script(SCRIPT, table, "--model_name_or_path", bert, *COMMON, "--output_dir", folder, *log)
    return folder, done.stdout


@pytest.fixture(scope="module")
def one_process(workspace, table, bert, trained):
    """A whole run on one process, with the database that is there by then, and with dropout, which is drawn by rows."""
    folder = workspace / "one"
    done = run_script(SCRIPT, table, "--model_name_or_path", bert, *COMMON, "--output_dir", folder, "--dropout", 0.1)
    return folder, done.stdout


@pytest.fixture
def here(monkeypatch, capsys):
    """The script in this process, where torch is loaded already: seconds less than a process of its own."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in signals}

    def forget():
        gc.collect()  # of an earlier run, which would hold the lock of its folder
        forget_accelerator()

    def call(*arguments, code=0):
        forget()
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
        ended = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / SCRIPT), run_name="__main__")
        except SystemExit as end:
            ended = end.code
        said = capsys.readouterr()
        assert ended == code, said
        return said.out if code == 0 else said.err

    yield call
    forget()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def predictions(folder, name="topics_testset_predictions.csv"):
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def statistics(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "topics_train_test_stats.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def numbers(value, path=""):
    """All numbers of nested values, by their path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {path: value} if isinstance(value, (int, float)) else {}
    for key, item in items:
        found |= numbers(item, f"{path}/{key}")
    return found


def same_results(first, second, tolerance):
    """Two folders hold the same predictions and the same metrics."""
    rows, others = predictions(first), predictions(second)
    assert len(rows) == len(others) > 5
    for row, other in zip(rows, others, strict=True):
        for name, cell in row.items():
            if name.startswith("probability"):
                assert float(cell) == pytest.approx(float(other[name]), abs=tolerance + 1e-6)  # of rounding
            else:
                assert cell == other[name]
    for key in ("Training", "Testing"):
        found, expected = (numbers(statistics(folder)[key]) for folder in (first, second))
        assert found == pytest.approx(expected, abs=tolerance)


def test_a_run_leaves_a_model_tables_numbers_and_a_database_for_the_report(trained, table, workspace):
    folder, said = trained
    assert "the head for" in said
    assert "is new" in said
    assert (workspace / "trained.log").read_text(encoding="utf-8").splitlines()[0] in said
    model = AutoModelForSequenceClassification.from_pretrained(folder / "topics_trained_model")
    AutoTokenizer.from_pretrained(folder / "topics_trained_model")
    stats = statistics(folder)
    own = model.config.lmscripts_classifier
    assert own["temperature"] == stats["temperature"]
    assert own["folds"]["max_length"] == 32
    assert [epoch["epoch"] for epoch in stats["Training"]] == [1, 2, 3]
    assert stats["Training"][2]["Training Loss"] < stats["Training"][0]["Training Loss"]
    assert stats["Testing"]["Test Accuracy"] > 0.5
    assert not os.path.isabs(stats["database"])
    assert (folder / stats["database"]).resolve() == table.with_suffix(".sqlite").resolve()
    with sqlite3.connect(folder / stats["database"]) as connection:
        (facts,) = connection.execute("SELECT facts FROM runs WHERE run_id = ?", (stats["run"],)).fetchone()
    assert json.loads(facts)["key"] == stats["key"]
    assert 0.1 < stats["temperature"] < 10  # so that whoever forgets it gives other probabilities
    assert {"Test Loss", "Test Accuracy", "Matthews corrcoef"} <= stats["Testing"].keys()

    done = run_script(
        "analyze_results.py", table.with_suffix(".sqlite"), "--run", stats["run"], "--resamples", 20,
        "--baselines", "false", "--output_dir", workspace / "report",
    )  # fmt: skip
    report = json.loads((workspace / "report" / f"run_{stats['run']}.json").read_text(encoding="utf-8"))
    assert report["levels"]["document"]["metrics"]["accuracy"]["value"] == stats["Testing"]["Test Accuracy"]
    assert report["calibration"]["temperature"] == stats["temperature"]
    assert "wrote down" not in done.stdout  # the run's own metrics are those of its predictions


def test_every_test_document_stands_once_in_order_with_its_truth(trained, table):
    rows = predictions(trained[0])
    with sqlite3.connect(table.with_suffix(".sqlite")) as connection:
        sql = "SELECT d.doc_id, d.line, l.name FROM documents d JOIN document_labels USING (doc_id) "
        sql += "JOIN labels l USING (label_id) JOIN split_members m USING (doc_id) JOIN runs r USING (split_id) "
        sql += "WHERE m.part = 'test' AND r.run_id = ? ORDER BY 1"
        expected = connection.execute(sql, (statistics(trained[0])["run"],)).fetchall()
    assert [(int(row["document"]), int(row["line"]), row["true_label"]) for row in rows] == expected
    names = [name for name in rows[0] if name.startswith("probability of ")]
    for row in rows:
        best = max(names, key=lambda name: float(row[name]))
        assert row["prediction"] == best.removeprefix("probability of ")
    fragments = predictions(trained[0], "topics_testset_fragments.csv")
    assert len(fragments) == sum(int(row["fragments"]) for row in rows) > len(rows)


def test_a_document_is_the_aggregate_of_its_fragments_by_plain_transformers(trained, table):
    folder = trained[0]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "topics_trained_model").eval()
    temperature = statistics(folder)["temperature"]
    longest = max(predictions(folder), key=lambda row: int(row["fragments"]))
    with sqlite3.connect(table.with_suffix(".sqlite")) as connection:
        sql = "SELECT ids FROM folds WHERE doc_id = ? ORDER BY idx"
        rows = [np.frombuffer(ids, "<i4") for (ids,) in connection.execute(sql, (longest["document"],))]
    assert len(rows) == int(longest["fragments"]) >= 2
    with torch.no_grad():
        answers = [model(torch.from_numpy(row.astype(np.int64))[None]).logits.softmax(-1)[0] for row in rows]
    mean = torch.stack(answers).mean(0)
    expected = (mean.log() / temperature).softmax(-1)
    found = [float(longest[f"probability of {name}"]) for name in model.config.id2label.values()]
    assert found == pytest.approx(expected.tolist(), abs=2e-6)


def test_predict_classifier_says_of_the_test_documents_what_the_run_said(trained, table, tmp_path):
    model = trained[0] / "topics_trained_model"
    run_script("predict_classifier.py", "--model_dir", model, "--input_file", table, "-o", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        by_line = {row["line"]: row for row in csv.DictReader(file)}
    assert len(by_line) == len(table.read_text(encoding="utf-8").splitlines()) - 1
    for row in predictions(trained[0]):
        for name in (name for name in row if name.startswith("probability")):
            assert float(by_line[row["line"]][name]) == pytest.approx(float(row[name]), abs=3e-6)


def test_two_uneven_processes_give_the_same_and_tokenise_nothing_again(one_process, workspace, table, bert):
    folder, said = one_process
    assert "found all in" in said
    assert "built" not in said
    two = workspace / "two"
    arguments = [table, "--model_name_or_path", bert, *COMMON, "--output_dir", two, "--dropout", 0.1]
    done = launch("cpu_2proc.yaml", SCRIPT, *arguments, "--process_shares", 3, 1)
    assert "rows of each process: [12, 4]" in done.stdout
    assert "found all in" in done.stdout
    same_results(two, folder, 1e-6)


def test_killed_in_the_middle_and_continued_gives_the_same_bits(trained, table, bert, tmp_path):
    folder = tmp_path / "killed"
    arguments = [table, "--model_name_or_path", bert, *COMMON, "--output_dir", folder, "--save_steps", 2]
    command = [sys.executable, str(ROOT / "scripts" / SCRIPT), *map(str, arguments)]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        process = forked.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        wait_for_step(process, folder / "topics_training", 4)
        kill_tree(process)
        process.wait()
    assert not (folder / "topics_trained_model").exists()
    refused = run_script(SCRIPT, *arguments, check=False)
    assert refused.returncode == 2
    assert "--do_continue" in refused.stderr
    done = run_script(SCRIPT, *arguments, "--do_continue")
    assert "going on from" in done.stdout
    model = "topics_trained_model/model.safetensors"
    assert same_bits(load_file(folder / model), load_file(trained[0] / model))
    same_results(folder, trained[0], 0)
    with sqlite3.connect(table.with_suffix(".sqlite")) as connection:
        run_id = statistics(folder)["run"]
        assert connection.execute("SELECT status FROM runs WHERE run_id = ?", (run_id,)).fetchone() == ("done",)


def fragile_metric(folder):
    """A metric's script that works when it is tried, and never again."""
    path = folder / "fragile.py"
    path.write_text(
        """
import datasets
import evaluate

class Fragile(evaluate.Metric):
    def _info(self):
        flags = datasets.List(datasets.Value("int32"))
        features = datasets.Features({"predictions": flags, "references": flags})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        if hasattr(self, "was_tried"):
            raise ValueError("it is broken")
        self.was_tried = True
        return {"share": 1.0}
""",
        encoding="utf-8",
    )
    return path


def test_several_labels_a_document(bert, here, tmp_path):
    table = tmp_path / "many.csv"
    lines = ["text,label"]
    for number in range(60):
        names = [name for bit, name in enumerate(("酒", "米", "海")) if (number % 7 + 1) >> bit & 1]
        lines.append(f"{number}番の話は{'と'.join(names)}についての短い文である。,{'|'.join(names)}")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ["--separator", "|", "--class_weights", "balanced", "--label_smoothing", 0.1]
    options += ["--metric", "average_precision", "accuracy", fragile_metric(tmp_path)]
    said = here(table, "--model_name_or_path", bert, *COMMON[2:], *options, "--validation_share", 0.1)
    log = (tmp_path / "many_training" / "log.jsonl").read_text(encoding="utf-8")
    assert json.loads(log.splitlines()[-1])["validation_average_precision"] > 0
    for told in (
        "average_precision 0.",
        "fragile undefined",
        "beware: ",
        "fragile.py could not be computed: it is broken",
    ):
        assert told in said
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "many_trained_model").config
    assert config.problem_type == "multi_label_classification"
    stats = json.loads((tmp_path / "many_train_test_stats.json").read_text(encoding="utf-8"))
    assert stats["thresholds"] == config.lmscripts_classifier["thresholds"]
    assert len(stats["thresholds"]) == 3
    assert {"subset_accuracy", "micro_f1", "macro_f1"} <= stats["Testing"]["document"].keys()
    rows = predictions(tmp_path, "many_testset_predictions.csv")
    columns = [[[float(row[f"probability of {name}"]) for name in config.id2label.values()] for row in rows]]
    columns += [[[name in row["true_label"].split("|") for name in config.id2label.values()] for row in rows]]
    further = average_precision_score(*reversed(columns))
    assert stats["Testing"]["document"]["average_precision"] == pytest.approx(further, abs=1e-6)
    assert stats["Testing"]["document"]["fragile"] is None
    for row in rows:
        shares = [float(row[f"probability of {name}"]) for name in config.id2label.values()]
        given = [name for name, p, t in zip(config.id2label.values(), shares, stats["thresholds"]) if p >= t]
        assert row["prediction"] == "|".join(given)
    found = run_script("analyze_results.py", tmp_path / "many.sqlite", "--resamples", 20, "--baselines", "false")
    assert f"average_precision {further:.4f}, fragile undefined" in found.stdout
    report = next(tmp_path.glob("**/*.html")).read_text(encoding="utf-8")
    assert re.search(rf"average_precision</td><td[^>]*>{further:.4f}", report)


def test_patience_ends_a_run_that_learns_nothing_and_fresh_weights_are_said(table, bert, here, tmp_path):
    arguments = [table, "--model_name_or_path", bert, *COMMON[:4], "--tracker", "none", "--output_dir", tmp_path]
    arguments += ["--from_scratch", "--epochs", 9, "--learning_rate", 1e-9, "--patience", 2, "--batch_size", 32]
    said = here(*arguments, "--aggregate", "max", "--test_share", 0, "--train_share", 0.9)
    assert "fresh weights" in said
    assert "no test part" in said
    assert "predictions" not in said  # there is no such file,
    assert "analyze_results" not in said  # and nothing to report
    assert not list(tmp_path.glob("*_testset_*"))
    assert len(statistics(tmp_path)["Training"]) == 3
    assert statistics(tmp_path)["best_epoch"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "topics_trained_model")
    learned = load_file(bert / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, learned)


def test_lora_leaves_an_ordinary_model_whose_other_weights_are_untouched(table, bert, here, tmp_path):
    pytest.importorskip("peft")
    arguments = [table, "--model_name_or_path", bert, *COMMON, "--output_dir", tmp_path, "--lora_rank", 2]
    here(*arguments, "--stop_at_step", 3)
    here(*arguments, "--do_continue")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "topics_trained_model")
    learned = load_file(bert / "model.safetensors")
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, learned.get(name, tensor))
    }
    attention = [f"bert.encoder.layer.{layer}.attention.self" for layer in (0, 1)]
    assert changed == {f"{place}.{name}.weight" for place in attention for name in ("query", "value")}


def test_preparing_alone_makes_the_database_that_a_run_takes_in_place_of_the_table(table, bert, here, tmp_path):
    shutil.copy(table, tmp_path / "topics.csv")
    model = ["--model_name_or_path", bert, "--max_length", 32, "--fold_unit", "words", "--max_words", 12]
    said = here(tmp_path / "topics.csv", *model, "-p", "-f", tmp_path / "log")
    with sqlite3.connect(tmp_path / "topics.sqlite") as connection:
        (folding,) = connection.execute("SELECT settings FROM tokenizations").fetchone()
    assert (json.loads(folding)["unit"], json.loads(folding)["max_words"]) == ("words", 12)
    assert "built" in said
    assert (tmp_path / "log").read_text(encoding="utf-8") == said
    assert sorted(path.name for path in tmp_path.glob("topics*")) == ["topics.csv", "topics.sqlite"]
    (tmp_path / "topics.csv").unlink()
    said = here(tmp_path / "topics.sqlite", *model, "--dry_run", "-e", 5)
    assert "found all in" in said
    assert "5 epochs of" in said
    assert re.search(r"^time: about \d+ (s|min), guessed from [\d,]+ GFLOP/s", said, re.MULTILINE)
    said = here(tmp_path / "topics.sqlite", *model, "--dry_run", "-e", 10**9)
    assert re.search(r"^time: about [\d,]+ days, guessed .*; fewer --epochs", said, re.MULTILINE)
    assert [path.name for path in tmp_path.glob("topics*")] == ["topics.sqlite"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max_length", 65], "65"),
        (["--label", "lable", "--database", "{tmp}/new.sqlite"], "did you mean 'label'"),
        (["--process_shares", 1, 1], "2 process shares were given for 1 processes"),
        (["--patience", 1, "--validation_share", 0, "--train_share", 0.9], "--patience needs a validation part"),
        (["--label_smoothing", 1.5], "label_smoothing"),
        (["--lora_rank", 4, "--from_scratch"], "give one of them"),
        (["--metric", "mcc", "--validation_share", 0, "--train_share", 0.9], "--metric mcc chooses the best epoch"),
        (["--run_name", "../outside"], "--output_dir"),
        (["--separator", "|", "--metric", "mcc"], "one label a row"),
        (["--metric", "mcro_f1"], "did you mean 'macro_f1'? --metric takes macro_f1, accuracy,"),
        (["--metric", "roc_auc"], "--metric roc_auc is not for this table (3 labels, one a document)"),
        (["--aggregate", "median"], "mean_probabilities"),
        (["--keep_last", 0], "keep_last"),
        (["--model_name_or_path", "no/such/folder/here"], "no/such/folder/here"),
        (["--label_columns", "a", "--separator", "|"], "leave out --label, --labels and --separator"),
        (["--label_columns", "a", "work", "--database", "{tmp}/new.sqlite"], "no column 'a'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(arguments, sentence, table, bert, here, tmp_path):
    given = [] if "--model_name_or_path" in arguments else ["--model_name_or_path", bert]
    given += ["--group_column", "article", "--output_dir", tmp_path / "out"]
    arguments = [str(argument).format(tmp=tmp_path) for argument in arguments]
    said = here(table, *given, *arguments, code=2)
    assert sentence in said
    assert "error: " in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_users_of_the_older_scripts_write_and_look_for(table, bert, here, tmp_path, monkeypatch):
    """Four words a row, the screen as log, weights for torch.load; a second run is refused before a model is built."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_name_or_path", bert, *COMMON[:2], "-e", 1, "--sequence_length", 32, "--max_words", 4]
    arguments += ["--tracker", "none", "--output_dir", tmp_path, "--database", tmp_path / "own.sqlite"]
    said = here(table, *arguments, "-f", "stdout", "--torch_save", "--run_name", "topics")
    assert not (tmp_path / "stdout").exists()
    assert "--logfile is for a file" in said
    assert "beware: The best epoch was the last one" in said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "topics_trained_model")
    assert same_bits(torch.load(tmp_path / "topics_trained_model.sav"), model.state_dict())
    assert {"true_label", "prediction"} <= predictions(tmp_path)[0].keys()
    fragments = predictions(tmp_path, "topics_testset_fragments.csv")
    assert max(int(row["char_end"]) - int(row["char_start"]) for row in fragments) < 20
    monkeypatch.setattr("lmscripts.models.classifier.build_classifier", None)
    said = here(table, *arguments, "--run_name", "topics", code=2)
    assert "topics_trained_model is there already" in said
    said = here(table, *arguments[2:], "--model_name_or_path", tmp_path / "topics_trained_model.sav", code=2)
    assert f"is a file, not a folder: give the folder of the model, a checkpoint or a run, such as {tmp_path}" in said


def test_without_a_model_that_of_the_older_script_is_asked_for(table, here, monkeypatch, tmp_path):
    def asked(name, tokenizer):
        raise UserError(f"asked for {name}")

    monkeypatch.setattr("lmscripts.models.classifier.find_source", asked)
    assert here(table, "-p", "--database", tmp_path / "x.sqlite", code=2) == "error: asked for bert-base-uncased\n"


def test_text_that_the_tokenizer_does_not_know_is_told(bert, here, tmp_path):
    rows = "".join(f"星 Ж {n} ภาษา,{'ab'[n % 2]}\n" for n in range(40))
    (tmp_path / "t.csv").write_text("text,label\n" + rows, encoding="utf-8")
    said = here(tmp_path / "t.csv", "--model_name_or_path", bert, "--tracker", "none", "--dry_run")
    assert "% of the tokens for training are unknown to the model" in said


def test_a_run_that_ends_with_an_error_does_not_stand_as_running(table, bert, here, tmp_path):
    arguments = ["--model_name_or_path", bert, *COMMON[:4], "--tracker", "none", "--output_dir", tmp_path]
    arguments += ["--database", tmp_path / "own.sqlite", "--learning_rate", 1e30, "--max_grad_norm", 0]
    assert "finite" in here(table, *arguments, code=2)
    with sqlite3.connect(tmp_path / "own.sqlite") as connection:
        assert connection.execute("SELECT status FROM runs").fetchall() == [("failed",)]


# ---- pieces ------------------------------------------------------------------------------------------------------


def some_part(num_documents=40, seed=3):
    random = np.random.default_rng(seed)
    n = random.integers(1, 5, num_documents)
    doc_ids, idx = np.repeat(np.arange(num_documents) * 2, n), np.concatenate([np.arange(k) for k in n])
    offsets = np.append(0, np.cumsum(random.integers(3, 60, len(idx))))
    ids = random.integers(5, 99, offsets[-1]).astype(np.int32)
    folds = FoldRows(ids, offsets, doc_ids, idx, np.repeat(n, n), idx, idx)
    truth = np.eye(3, dtype=bool)[random.integers(0, 3, num_documents)]
    owners = np.repeat(np.arange(num_documents), n)
    return labelled_rows.Part(
        folds, np.arange(num_documents) * 2, truth, owners, (1 / np.repeat(n, n)).astype(np.float32)
    )


@pytest.mark.parametrize("weights", [[1], [3, 1], [2, 0, 5]])
def test_processes_share_the_rows_of_a_step_and_an_idle_one_weighs_nothing(weights):
    part = some_part()
    order, make = ByLength(part.lengths, 9, 5), labelled_rows.batch_maker(part, 0)
    settings = {"micro_batch_size": 4, "first": 2, "stop": 30}
    steps = [
        list(step_batches(order, make, **settings, shares=weights, process=process)) for process in range(len(weights))
    ]
    whole = list(step_batches(order, make, **settings, shares=[1], process=0))
    for number, (_, expected) in enumerate(whole):
        counts = [each[number][1] for each in steps]
        assert {k: sum(c[k] for c in counts) for k in expected} == pytest.approx(expected)
        for process, weight in enumerate(weights):
            micro, own = steps[process][number]
            assert len(micro) >= 1
            assert sum(float(b["weights"].sum()) for b in micro) == pytest.approx(own["weight"], abs=1e-6)
            assert (weight > 0) or (own["loss"] == own["weight"] == 0 and micro[0]["weights"].tolist() == [0.0])
            assert all(b["attention_mask"].sum(1).max() == b["input_ids"].shape[1] for b in micro)


def test_documents_count_once_and_padding_is_never_attended():
    part = some_part()
    assert part.weights.sum() == pytest.approx(len(part.doc_ids))
    batch = labelled_rows.collate(part, np.array([0, 5, 9]), 0)
    assert batch["attention_mask"].sum(1).tolist() == part.lengths[[0, 5, 9]].tolist()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert (batch["input_ids"][batch["attention_mask"] == 1] > 0).all()


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("how", AGGREGATES)
def test_aggregates_by_their_definition(how, multi_label):
    logits, owners = np.random.default_rng(1).normal(size=(5, 3)), np.array([0, 0, 2, 2, 2])
    tokens = np.array([5, 1, 2, 2, 9])
    settings = ClassifierSettings(FoldSettings(), how, multi_label=multi_label)
    found = document_logits(logits, owners, 3, tokens, settings)
    assert np.isnan(found[1]).all()
    squash = torch.sigmoid if multi_label else lambda values: values.softmax(-1)
    rows = torch.from_numpy(logits)
    for owner in (0, 2):
        mine = rows[owners == owner]
        weights = torch.from_numpy(tokens[owners == owner]).double()[:, None]
        expected = {
            "mean_probabilities": squash(mine).mean(0),
            "mean_logits": squash(mine.mean(0)),
            "max": squash(mine).max(0).values,
            "token_weighted": (squash(mine) * weights).sum(0) / weights.sum(),
        }[how]
        expected = expected if multi_label else expected / expected.sum()
        assert torch.allclose(squash(torch.from_numpy(found[owner])), expected, atol=1e-7)


def objective_of(settings):
    return Objective(by_labels, None, {"": torch.nn.Identity()}, "sdpa", settings)


def test_losses_are_those_of_torch():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    one = torch.nn.functional.one_hot(labels, 4).float()
    several = (torch.rand(6, 4) > 0.5).float()
    objective = objective_of(by_labels.Settings(multi_label=False, label_smoothing=0.2))
    losses, right = by_labels.row_losses(objective, logits, one)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    assert torch.allclose(losses, expected)
    assert right.tolist() == (logits.argmax(1) == labels).float().tolist()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    objective = objective_of(by_labels.Settings(multi_label=True, positive_weights=weights.numpy()))
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=weights, reduction="none")(logits, several).mean(1)
    assert torch.allclose(by_labels.row_losses(objective, logits, several)[0], expected)


def test_with_smoothing_the_weight_of_a_rare_label_does_not_ask_for_it_where_it_is_not():
    settings = by_labels.Settings(True, label_smoothing=0.1, positive_weights=np.float32([99.0, 1.0]))
    share = torch.linspace(0.001, 0.999, 999)
    logits = torch.logit(share)[:, None].expand(-1, 2)
    for has, wanted in ((0.0, 0.05), (1.0, 0.95)):
        losses, _ = by_labels.row_losses(objective_of(settings), logits, torch.full((999, 2), has))
        assert share[losses.argmin()].item() == pytest.approx(wanted, abs=2e-3)


def test_over_an_epoch_a_document_of_many_rows_pulls_as_much_as_one_of_a_single_row():
    random, n = np.random.default_rng(0), np.repeat([1, 20], [600, 40])
    owners = np.repeat(np.arange(len(n)), n)
    lengths = np.where(n[owners] == 1, random.integers(5, 30, len(owners)), 64)  # so that long texts share batches
    idx = np.concatenate([np.arange(k) for k in n])
    ids = np.ones(lengths.sum(), np.int32)
    folds = FoldRows(ids, np.append(0, np.cumsum(lengths)), owners, idx, n[owners], idx, idx)
    truth, pulls = np.eye(2, dtype=bool)[np.arange(len(n)) % 2], np.zeros(len(n))
    part = labelled_rows.Part(folds, np.arange(len(n)), truth, owners, (1 / n[owners]).astype(np.float32))
    order, num_epochs, losses = ByLength(part.lengths, 32, 1), 6, torch.nn.Parameter(torch.zeros(len(owners)))
    rows = [order.rows(np.arange(*order.bounds(step)))[0] for step in range(num_epochs * order.per_epoch)]
    settings = {"shares": [1], "process": 0, "micro_batch_size": 10, "first": 0, "stop": len(rows)}
    steps = step_batches(order, labelled_rows.batch_maker(part, 0), **settings)
    objective = objective_of(by_labels.Settings(multi_label=False))
    for mine, (micro, targets) in zip(rows, steps, strict=True):
        weights = torch.cat([batch["weights"] for batch in micro])
        objective.loss({"loss": (losses[mine.tolist()] * weights).sum()}, targets).backward()
    np.add.at(pulls, owners, losses.grad.numpy() / num_epochs)
    assert pulls[n == 20].mean() == pytest.approx(pulls[n == 1].mean(), rel=0.05)  # by the step's own sum: 20 times


def test_a_step_of_rows_that_weigh_less_than_one_is_their_weighted_mean():
    """The last step of an epoch may be a single row of a long text."""
    objective, losses = objective_of(by_labels.Settings(multi_label=False)), torch.tensor(3.0)
    assert objective.loss({"loss": losses * 0.05}, {"loss": 0.05}).item() == pytest.approx(3.0)


def test_balanced_weights_let_every_label_count_alike():
    truth = np.eye(3, dtype=bool)[np.repeat([0, 1, 2], [6, 3, 1])]
    weights = labelled_rows.balanced_weights(truth, multi_label=False)
    assert (weights * truth.sum(0)).tolist() == pytest.approx([10 / 3] * 3)
    assert labelled_rows.balanced_weights(truth, multi_label=True).tolist() == pytest.approx([4 / 6, 7 / 3, 9])


def test_a_head_is_new_unless_it_was_made_for_the_same_labels(bert, tmp_path):
    def build(source, labels, seed):
        settings = ClassifierSettings(FoldSettings(max_length=32))
        return build_classifier(find_source(str(source)), labels, settings, seed=seed)

    model, said = build(bert, ["a", "b"], 1)
    again, _ = build(bert, ["a", "b"], 1)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert "is new: bert.pooler" in said[0]
    learned = load_file(bert / "model.safetensors")
    assert all(torch.equal(t, learned[n]) for n, t in model.state_dict().items() if n in learned)
    shutil.copytree(bert, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    same, said = build(tmp_path / "model", ["a", "b"], 2)
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert "taken over" in said[0]
    for labels in (["a", "c"], ["a", "b", "c"]):
        other, said = build(tmp_path / "model", labels, 2)
        assert not torch.equal(other.classifier.weight[:2], model.classifier.weight)
        assert "is new" in said[0]


def test_weights_that_do_not_fill_the_body_are_refused(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "model")
    kept = load_file(bert / "model.safetensors")
    del kept["bert.encoder.layer.1.output.dense.weight"]
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    source = find_source(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"layer\.1\.output\.dense\.weight"):
        build_classifier(source, ["a", "b"], ClassifierSettings(FoldSettings(max_length=32)), seed=1)


def test_a_temperature_that_the_validation_part_cannot_tell_is_left_at_one():
    part, settings = some_part(), ClassifierSettings(FoldSettings())
    right = RowAnswers(4.0 * part.truth[part.owners], np.zeros(part.num_rows))
    exported, said = calibrate(right, part, settings)
    assert exported.temperature == 1.0
    assert "temperature 1 is kept" in said[0]
    wrong = (part.owners < 8)[:, None]
    some_wrong = RowAnswers(np.where(wrong, np.roll(right.logits, 1, axis=1), right.logits), right.losses)
    exported, said = calibrate(some_wrong, part, settings)
    assert exported.temperature != 1.0
    assert not said


# ---- what a run keeps --------------------------------------------------------------------------------------------


def build(source, bert, database, **options):
    encoder = find_source(str(bert)).encoder
    return open_or_build(source, encoder, FoldSettings(max_length=32), SplitSettings(), database=database, **options)


def runs_of(database):
    with sqlite3.connect(database.path) as connection:
        return connection.execute("SELECT run_id, name, status FROM runs ORDER BY run_id").fetchall()


def test_a_continued_run_takes_over_no_row_but_its_own(table, bert, tmp_path):
    options, path = {"table": TableOptions(group="article")}, tmp_path / "own.sqlite"
    database = build(table, bert, path, **options)
    about = (tmp_path / "model", {}, {}, database.origin())
    state = classifier_run.ClassifierProgress()
    state.run_id, state.key = classifier_run.open_run(database, state, "A", *about)
    record = {"epoch": 1, "step": 5, "train": {"loss": 2.0}, "validation": {"loss": 1.5, "mcc": None}}
    state.history = [record]
    database.end_run(state.entry, "stopped")
    assert classifier_run.open_run(database, state, "A", *about) == (state.run_id, state.key)
    assert runs_of(database) == [(1, "A", "running")]

    path.unlink()
    database = build(table, bert, path, **options)
    other = classifier_run.open_run(database, classifier_run.ClassifierProgress(), "B", *about)
    assert other[0] == state.run_id
    assert other[1] != state.key
    database.end_run(other, "done")
    number, key = classifier_run.open_run(database, state, "A", *about)
    assert runs_of(database) == [(1, "B", "done"), (2, "A", "running")]
    assert (number, key) not in [(state.run_id, state.key), other]
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT run_id, epoch, part, metric, value FROM epochs").fetchall()
    assert rows == [(2, 1, "train", "loss", 2.0), (2, 1, "validation", "loss", 1.5)]  # with what came before


@pytest.mark.parametrize("name", ["close_epoch", "finish"])
def test_a_run_whose_database_is_built_anew_meanwhile_stops_and_writes_nothing(
    name, table, bert, here, tmp_path, monkeypatch
):
    lines = table.read_text(encoding="utf-8").splitlines()[:49]
    mine, path, out = tmp_path / "mine.csv", tmp_path / "own.sqlite", tmp_path / "out"
    mine.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = [
        mine,
        "--model_name_or_path",
        bert,
        "--max_length",
        32,
        "--tracker",
        "none",
        "--output_dir",
        out,
        "-e",
        1,
    ]
    usual, seen = getattr(classifier_run, name), []

    def with_another_database(*given):
        path.unlink()
        for number, old in enumerate(WORDS):
            lines[1:] = [line.replace(f",{old},", f",{'zyx'[number]},") for line in lines[1:]]
        (tmp_path / "other.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        database = build(tmp_path / "other.csv", bert, path)
        database.start_run("B", {}, {}, model_dir="b")
        seen.append(path.read_bytes())
        return usual(*given)

    monkeypatch.setattr(classifier_run, name, with_another_database)
    said = here(*arguments, "--database", path, code=2)
    assert "own.sqlite was built again since run 1 was entered there" in said
    assert said.count("error: ") == 1
    assert [path.read_bytes()] == seen  # the other run's entry, untouched
    assert [file.name for file in out.iterdir()] == ["own_training"]

    monkeypatch.setattr(classifier_run, name, usual)
    go_on = ["--database", tmp_path / "again.sqlite", "--run_name", "own", "--do_continue"]  # as the sentence says
    assert ("going on from" in here(*arguments, *go_on)) == (name == "finish")
    rows = predictions(out, "own_testset_predictions.csv")
    assert {row["true_label"] for row in rows} <= set(WORDS)
    assert [column for column in rows[0] if column.startswith("prob")] == [f"probability of {n}" for n in sorted(WORDS)]


def test_what_a_killed_process_left_beside_the_results_goes_and_nothing_else(tmp_path):
    files, long = ResultFiles(tmp_path, "k"), ResultFiles(tmp_path, "k" * 40)
    left = tmp_path / ".k_train_test_stats.json.4a3ae9ca"
    of_others = [tmp_path / ".k_train_test_stats.json.mine", tmp_path / ".kk_train_test_stats.json.4a3ae9ca"]
    cut_off = tmp_path / f".{'k' * 40}.4a3ae9ca"  # of any run whose name begins so
    for path in (left, *of_others, cut_off, files.statistics):
        path.touch()
    files.remove_leftovers()
    long.remove_leftovers()
    assert set(tmp_path.iterdir()) == {*of_others, cut_off, files.statistics}
    os.utime(cut_off, (1, 1))
    long.remove_leftovers()
    assert set(tmp_path.iterdir()) == {*of_others, files.statistics}


def test_a_card_shows_names_as_they_are(tmp_path):
    hostile = "<script>alert(1)</script> a|b *c* [d](e) `f` \\"
    options = "# ---- data ----\n\n# what it is\nlabel: |\n  ```\n  <img>\n"
    model = types.SimpleNamespace(config=types.SimpleNamespace(model_type="bert"))
    card = card_text("x <b>", {"labels": hostile}, options, About(), tmp_path, model, "base", {"mcc": 0.5})
    (row,) = (line for line in card.splitlines() if line.startswith("| labels"))
    assert not set("<>*`[]\\") & set(row)
    assert html.unescape(row) == f"| labels | {hostile} |"
    assert "# x &lt;b&gt;" in card
    assert card.rstrip().endswith("</summary>\n\n````yaml\nlabel: |\n  ```\n  <img>\n````\n\n</details>")


def several_labels(part):
    """The same part, with one label more on every third document."""
    truth = part.truth.copy()
    truth[::3, 0] = True
    return replace(part, truth=truth)


def test_of_several_labels_an_epoch_is_judged_as_the_model_would_be_exported(table, bert, tmp_path):
    part, settings = several_labels(some_part()), ClassifierSettings(FoldSettings(), multi_label=True)
    database = build(table, bert, tmp_path / "own.sqlite", table=TableOptions(group="article"))
    # All labels above one half, and told apart without a mistake by a higher threshold.
    answers = RowAnswers(1.0 + 3.0 * part.truth[part.owners], np.ones(part.num_rows))
    run = database.start_run("A", {}, {}, model_dir="m")
    assert judge(answers, part, settings).document["macro_f1"] < 0.8
    record = classifier_run.close_epoch(database, run, 1, 7, {"loss": 1.0}, part, answers, settings)
    assert record["validation"]["macro_f1"] == 1.0
    exported, _ = calibrate(answers, part, settings)
    assert judge(answers, part, exported).document == record["validation"]


def test_a_metric_that_the_validation_part_cannot_tell_is_said_before_training_and_never_better():
    part = some_part()
    one_class = replace(part, truth=np.eye(3, dtype=bool)[np.zeros(len(part.doc_ids), int)])
    for metric in ("macro_f1", "accuracy", "balanced_accuracy", "mcc", "loss"):
        assert classifier_run.check_metric(metric, "macro_f1", part, False) == []
    for metric in ("macro_f1", "accuracy", "loss"):
        assert classifier_run.check_metric(metric, "macro_f1", several_labels(part), True) == []
    (said,) = classifier_run.check_metric("mcc", "macro_f1", one_class, False)
    assert "mcc cannot be computed" in said
    assert "1 of the 3 labels" in said

    settings = ClassifierSettings(FoldSettings())
    found = judge(RowAnswers(np.eye(3)[part.owners % 3], np.ones(part.num_rows)), one_class, settings).document
    found = {name: value if np.isfinite(value) else None for name, value in found.items()}
    state = classifier_run.ClassifierProgress(history=[{}] * 5)
    assert not state.is_better("mcc", classifier_run.value_of(found, "mcc"))
    assert not state.is_better("mcc", float("nan"))
    assert not state.is_stale(1)  # nothing says that the last epochs were worse
    assert state.is_better("accuracy", classifier_run.value_of(found, "accuracy"))


def test_names_that_hold_a_bar_are_parted_by_the_separator_of_the_table(tmp_path):
    part, settings = some_part(), ClassifierSettings(FoldSettings(), multi_label=True, separator=";")
    truth = part.truth.copy()
    truth[:, :2] = True
    part = replace(part, truth=truth)
    judged = judge(RowAnswers(4.0 * truth[part.owners] - 2.0, np.ones(part.num_rows)), part, settings)
    files = ResultFiles(tmp_path, "topics")
    tuned = replace(settings, thresholds=(0.5,) * 3)
    places = {doc_id: (doc_id, "") for doc_id in part.doc_ids.tolist()}
    write_tables(files, places, part, judged, ["a|a", "b|b", "c"], tuned)
    for name in ("topics_testset_predictions.csv", "topics_testset_fragments.csv"):
        for row in predictions(tmp_path, name):
            assert row["true_label"] == row["prediction"]
            assert row["true_label"].split(";")[:2] == ["a|a", "b|b"]


def test_the_folder_of_a_training_is_no_classifier_and_the_right_one_is_named(trained, tmp_path):
    folder = trained[0] / "topics_training"
    inside = [next(folder.glob("checkpoint-*")), next(folder.glob("best-*"))]
    for place in (folder, *inside):
        for look in (find_source, open_classifier):
            with pytest.raises(UserError, match=r"take .*topics_trained_model$"):
                look(str(place))
    shutil.copytree(folder, tmp_path / "alone_training")
    with pytest.raises(UserError, match=r"--do_continue, which writes .*alone_trained_model$"):
        find_source(str(tmp_path / "alone_training"))
    find_source(str(trained[0] / "topics_trained_model"))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": "2.5"}, "temperature '2.5'"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": 0}, "temperature 0"),
        ({"thresholds": [float("nan"), 0.5, 0.5]}, "a threshold of nan"),
        ({"thresholds": [0.5, "0.5", 0.5]}, "a threshold of '0.5'"),
        ({"thresholds": [0.5, 0.5]}, "3 labels"),
        ({"thresholds": 0.5}, "thresholds 0.5"),
        ({"multi_label": "no"}, "multi_label 'no'"),
        ({"multi_label": False}, "multi_label False"),
        ({"aggregate": ["max"]}, r"aggregate \['max'\]"),
        ({"separator": ""}, "separator ''"),
        ({"folds": {"max_length": 4096}}, "rows of 4096 tokens, while the model reads 64"),
        ({"folds": {"max_length": 31.5}}, "max_length 31.5"),
        ({"folds": {"max_length": 32, "balance": "no"}}, "balance 'no'"),
        ({"folds": {"length": 32}}, "length"),
        ({"folds": None}, "cannot be used"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(wrong, sentence):
    config = BertConfig(num_labels=3, problem_type="multi_label_classification")
    good = ClassifierSettings(FoldSettings(max_length=32), thresholds=(0.5, 0.4, 1.0), multi_label=True)
    stored = json.loads(json.dumps(good.as_json()))
    setattr(config, KEY, stored)
    assert read_settings(config, 64)[0] == replace(good, thresholds=[0.5, 0.4, 1.0])
    setattr(config, KEY, {**stored, **wrong})
    with pytest.raises(UserError, match=sentence) as refused:
        read_settings(config, 64)
    assert len(str(refused.value)) < 300
