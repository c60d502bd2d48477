"""analyze_results.py as a user runs it: what it writes, that the numbers are right, and what it refuses."""

import csv
import io
import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, run_script
from sklearn import metrics as reference
from test_classification_report import execute, sentences, single, write_database

from lmscripts.errors import UserError
from lmscripts.evaluation import comparison

QUICK = ("--resamples", 200)


def run_here(name, *arguments, check=True, standard_input=b""):
    """As `run_script`, in this process, which has the heavy imports behind it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = [str(ROOT / "scripts" / name), *map(str, arguments)]
    stdin = io.TextIOWrapper(io.BytesIO(standard_input))
    with mock.patch.multiple(sys, argv=words, stdin=stdin, stdout=out, stderr=err):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    assert not check or code == 0, err.getvalue()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def analyze(*arguments, check=True):
    return run_here("analyze_results.py", *arguments, *QUICK, check=check)


def numbers_in(folder, name="run_1"):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"), parse_constant=refuse)


class Page(HTMLParser):
    """Tags, attributes and text of a page; open tags have to be closed in order."""

    EMPTY = ("meta", "img", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = "<script>alert(1)</script>"
LABELS = ("=left", HOSTILE, "$right_{")


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """A report of two runs on data that tries to be markup, formula and mathematics."""
    folder = tmp_path_factory.mktemp("analysed")
    texts, truth, _ = single(150)
    texts = [f"{text} <img src=http://example.org/x.png onerror=alert(1)> & {HOSTILE}" for text in texts]
    runs = ({"name": f"{HOSTILE} run", "facts": {"temperature": 1.5, "note": HOSTILE}}, {"skill": 0.3})
    file = write_database(folder / "leanings.sqlite", texts, truth, LABELS, runs=runs)
    before = file.read_bytes()
    done = analyze(file, "--run", 1, "--other_run", 2)
    assert file.read_bytes() == before
    return file, folder / "leanings_report", done.stdout


def test_what_lies_there_afterwards(analysed):
    _, folder, said = analysed
    names = {path.name.removeprefix("run_1_and_2") for path in folder.iterdir()}
    images = {f"_{name}.png" for name in ("training", "calibration", "coverage", "confusion")}
    assert names == {".html", ".json", "_wrong.csv", "_confusion.csv", *images}
    assert all((folder / f"run_1_and_2{name}").read_bytes().startswith(b"\x89PNG") for name in images)
    assert "Balanced accuracy" in said
    assert str(folder / "run_1_and_2.html") in said


def test_numbers_are_those_of_the_predictions(analysed):
    file, folder, _ = analysed
    numbers = numbers_in(folder, "run_1_and_2")
    run = comparison.read_run(file, 1)
    for level in ("document", "fragment"):
        test, found = run.predictions["test", level], numbers["levels"][level]
        truth, decided = test.truth.argmax(1), test.probabilities.argmax(1)
        assert found["rows"] == len(truth)
        assert found["metrics"]["accuracy"]["value"] == pytest.approx((truth == decided).mean())
        assert found["metrics"]["mcc"]["value"] == pytest.approx(reference.matthews_corrcoef(truth, decided))
        assert found["confusion"] == reference.confusion_matrix(truth, decided).tolist()
        for number in found["metrics"].values():
            assert number["interval"][0] <= number["value"] <= number["interval"][1]
    assert numbers["levels"]["fragment"]["rows"] > numbers["levels"]["document"]["rows"] == 30
    assert sum(numbers["split"]["train"]["labels"]) == numbers["split"]["train"]["documents"] == 105
    assert [row["name"] for row in numbers["baselines"]] == [
        "most frequent label",
        "TF-IDF of characters",
        "TF-IDF of words",
    ]
    calibration = numbers["calibration"]
    assert calibration["before"]["ece"] != calibration["after"]["ece"]
    assert sum(one["count"] for one in calibration["after"]["bins"]) == 30
    assert numbers["coverage"][0]["accuracy"] == numbers["levels"]["document"]["metrics"]["accuracy"]["value"]


def test_two_runs_are_compared_on_the_same_documents(analysed):
    file, folder, said = analysed
    found = numbers_in(folder, "run_1_and_2")["comparison"]
    runs = [comparison.read_run(file, number).predictions["test", "document"] for number in (1, 2)]
    right = [run.probabilities.argmax(1) == run.truth.argmax(1) for run in runs]
    assert found["difference"]["accuracy"]["value"] == pytest.approx(right[0].mean() - right[1].mean())
    assert found["mcnemar"]["only_first"] == int((right[0] & ~right[1]).sum())
    assert found["first"] == numbers_in(folder, "run_1_and_2")["levels"]["document"]["metrics"]
    assert "McNemar" in said


def test_the_page_needs_nothing_and_runs_nothing(analysed):
    _, folder, _ = analysed
    text = (folder / "run_1_and_2.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "form", "base"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "src", "xlink:href") or value.startswith("#"), value
        assert "url(" not in (value or "") or "url(#" in value
    assert "default-src 'none'" in text
    targets = {value[1:] for name, value in page.attributes if name == "href" and not value.startswith("#m")}
    assert targets <= {value for name, value in page.attributes if name == "id"}
    assert HOSTILE in "".join(page.text)  # as text
    assert HOSTILE not in text
    sections = re.findall("<h2>(.*?)</h2>", text)
    assert len(sections) == 12
    assert "prefers-color-scheme:dark" in text


def test_wrong_documents_are_all_in_the_table_under_their_labels(analysed):
    file, folder, _ = analysed
    with open(folder / "run_1_and_2_wrong.csv", encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    test = comparison.read_run(file, 1).predictions["test", "document"]
    wrong = test.doc_ids[test.probabilities.argmax(1) != test.truth.argmax(1)]
    assert sorted(int(row["doc_id"]) for row in rows) == wrong.tolist() != []
    sure = [float(row["probability"]) for row in rows]
    assert sure == sorted(sure, reverse=True)
    assert {row[name] for row in rows for name in ("true", "predicted")} == {*LABELS}


def test_the_fragment_that_decided_is_shown(analysed):
    file, folder, _ = analysed
    numbers = numbers_in(folder, "run_1_and_2")
    run = comparison.read_run(file, 1)
    first = next(wrong for wrong in numbers["wrong"] if len(wrong["fragments"]) > 1)
    assert first["fragments"][first["decisive"]] == max(first["fragments"])
    place = run.database.read_document(first["doc_id"])
    start, end = place["spans"][first["decisive"]]
    page = Page((folder / "run_1_and_2.html").read_text(encoding="utf-8"))
    assert place["text"][start:end] in page.text


def write_results(folder, name, **facts):
    """What a run leaves beside its database, as far as it is read here."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}_train_test_stats.json").write_text(json.dumps(facts))
    for table in ("predictions", "fragments"):
        (folder / f"{name}_testset_{table}.csv").write_text("")
    return [folder / f"{name}{suffix}" for suffix in comparison.RESULTS]


def test_results_of_a_run_lead_to_that_run_wherever_they_lie(tmp_path):
    """The newest run was reported whichever was named, and another name or folder than the database's found none."""
    texts, truth, _ = single()
    runs = ({"name": "first", "facts": {"key": "a"}}, {"name": "second", "facts": {"key": "b"}})
    file = write_database(tmp_path / "leanings.sqlite", texts, truth, runs=runs)
    for path in (
        *write_results(tmp_path, "leanings", run=1, database="leanings.sqlite", key="a"),
        *write_results(tmp_path / "out", "other", run=1, database="../leanings.sqlite", key="a"),
        *write_results(tmp_path / "old", "older", run=1, database=str(file)),
    ):
        assert comparison.read_results(path).record["name"] == "first"
        assert comparison.read_results(path, 1).database.path == file
        with pytest.raises(UserError, match=r"is of run 1, but --run asks for 2"):
            comparison.read_results(path, 2)
    arguments = ("--no_baselines", "--output_dir", tmp_path / "report", "--level", "fragment")
    analyze(tmp_path / "out" / "other_testset_predictions.csv", tmp_path / "leanings.sqlite", *arguments)
    numbers = numbers_in(tmp_path / "report", "run_1_and_2")
    assert (numbers["run"]["name"], numbers["comparison"]["run"]["name"]) == ("first", "second")
    bins = numbers["calibration"]["after"]["bins"]
    assert sum(one["count"] for one in bins) == numbers["levels"]["fragment"]["rows"]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"run": 1, "database": "leanings.sqlite", "key": "z"}, "is of another run than run 1"),
        ({"run": 1, "database": "gone.sqlite"}, r"gone\.sqlite, which is not there"),
        ({"run": 7, "database": "leanings.sqlite"}, "run 7 in .* is not there"),
        ({"run": True, "database": "leanings.sqlite"}, "does not say of which run"),
        ({}, "does not say of which run"),
        (None, "stats.json, which says of which run"),
        ("no JSON", "does not say of which run"),
    ],
)
def test_results_of_a_run_that_is_not_there_are_refused(tmp_path, facts, said):
    texts, truth, _ = single(20)
    write_database(tmp_path / "leanings.sqlite", texts, truth)
    _, table, _ = write_results(tmp_path, "leanings", **(facts if isinstance(facts, dict) else {}))
    if facts is None:
        (tmp_path / "leanings_train_test_stats.json").unlink()
    elif isinstance(facts, str):
        (tmp_path / "leanings_train_test_stats.json").write_text(facts)
    with pytest.raises(UserError, match=said):
        comparison.read_results(table)


def test_documents_of_a_group_are_drawn_together(tmp_path):
    """Six authors whose texts are right or wrong together: intervals by text would be far too narrow."""
    texts, truth, _ = single(150)
    file = write_database(tmp_path / "x.sqlite", texts, truth)
    settings = ("--run", 1, "--no_baselines")
    said = analyze(file, *settings, "--output_dir", tmp_path / "alone").stdout
    assert "p is too small" not in said
    execute(file, "UPDATE documents SET grp = (doc_id - 120) / 5 WHERE doc_id >= 120")
    sure = [np.array([p, (1 - p) / 2, (1 - p) / 2], "<f4").tobytes() for p in (0.8, 0.1)]
    for doc_id in range(120, 150):
        execute(file, "DELETE FROM document_labels WHERE doc_id = ?", doc_id)
        execute(file, "INSERT INTO document_labels VALUES (?, 0)", doc_id)
        wrong = int((doc_id - 120) // 5 % 2)
        execute(file, "UPDATE predictions SET probabilities = ? WHERE doc_id = ?", sure[wrong], doc_id)
    execute(file, "UPDATE document_labels SET label_id = 1 WHERE doc_id = 120")
    said = analyze(file, *settings, "--output_dir", tmp_path / "grouped").stdout
    assert "30 test documents are of 6 groups" in said
    assert "p is too small" in said
    for level in ("document", "fragment"):
        found = numbers_in(tmp_path / "grouped")["levels"][level]
        assert (found["documents"], found["units"]) == (30, 6)
        assert np.diff(found["metrics"]["accuracy"]["interval"]) > 0.6  # 0.36 and less by document
    page = (tmp_path / "grouped" / "run_1.html").read_text(encoding="utf-8")
    assert "30 test documents in 6 groups" in page
    assert "6 groups here: go by the intervals" in page


def test_very_many_labels_have_a_picture_and_every_cell_in_a_table(tmp_path):
    texts = sentences(300)
    truth = [[n % 50] for n in range(300)]
    file = write_database(tmp_path / "x.sqlite", texts, truth, tuple(f"label {n}" for n in range(50)))
    analyze(file, "--no_baselines", "--output_dir", tmp_path)
    page = (tmp_path / "run_1.html").read_text(encoding="utf-8")
    (source,) = [value for name, value in Page(page).attributes if name == "src"]
    assert source.startswith("data:image/png;base64,")
    assert "img-src data:" in page
    with open(tmp_path / "run_1_confusion.csv", encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    matrix = numbers_in(tmp_path)["levels"]["document"]["confusion"]
    assert sum(int(row["documents"]) for row in rows) == 60
    for row in rows:
        own, given = (int(row[name].removeprefix("label ")) for name in ("true", "predicted"))
        assert matrix[own][given] == int(row["documents"])
        assert float(row["share of the true label"]) == pytest.approx(matrix[own][given] / sum(matrix[own]), abs=1e-6)


def test_several_labels(tmp_path):
    texts = sentences(80)
    random = np.random.default_rng(1)
    truth = [np.flatnonzero(random.random(3) < 0.4).tolist() for _ in texts]
    facts = {"thresholds": [0.4, 0.5, 0.6]}
    file = write_database(tmp_path / "tags.sqlite", texts, truth, multi_label=True, runs=({"facts": facts}, {}))
    analyze(file, "--run", 1, "--output_dir", tmp_path)
    numbers = numbers_in(tmp_path)
    test = comparison.read_run(file, 1).predictions["test", "document"]
    decided = test.probabilities >= [0.4, 0.5, 0.6]
    found = numbers["levels"]["document"]
    assert found["metrics"]["subset_accuracy"]["value"] == pytest.approx((decided == test.truth).all(1).mean())
    assert found["metrics"]["micro_f1"]["value"] == pytest.approx(
        reference.f1_score(test.truth, decided, average="micro")
    )
    assert "confusion" not in found
    page = (tmp_path / "run_1.html").read_text(encoding="utf-8")
    Page(page)
    assert "Confusions" not in page
    row = re.search(r"<tr><td>left</td>(.*?)</tr>", page[page.index("rightly not given") :]).group(1)
    four = [int(cell) for cell in re.findall(r"<td class=\"n\">(\d+)</td>", row)]
    matrix = reference.confusion_matrix(test.truth[:, 0], decided[:, 0])
    assert four == [matrix[1, 1], matrix[0, 1], matrix[1, 0], matrix[0, 0]]
    said = analyze(file, "--run", 2, "--no_baselines", "--output_dir", tmp_path).stdout
    assert "tuned on its validation documents" in said


def test_little_and_lopsided_data_is_said_and_does_no_harm(tmp_path):
    """Labels that no test document has, one test document, no fragments, no epochs, no logits."""
    texts, truth, _ = single(5)
    truth[-1] = [1]
    file = write_database(tmp_path / "small.sqlite", texts, truth, fragments=False)
    execute(file, "DELETE FROM epochs")
    execute(file, "UPDATE predictions SET logits = NULL")
    said = analyze(file, "--output_dir", tmp_path).stdout
    assert "No test document has the label 'left' or 'right'" in said
    assert "one test document: no interval" in said
    numbers = numbers_in(tmp_path)
    assert numbers["calibration"]["before"] is None
    assert numbers["levels"]["document"]["metrics"]["accuracy"]["interval"] is None
    Page((tmp_path / "run_1.html").read_text(encoding="utf-8"))


def test_a_run_that_does_not_decide_and_one_that_was_short_are_told(tmp_path):
    texts, truth, _ = single()
    runs = ({"facts": {"best_epoch": 3}}, {"facts": {"best_epoch": 2}})
    file = write_database(tmp_path / "x.sqlite", texts, truth, runs=runs)
    execute(
        file, "UPDATE predictions SET probabilities = ? WHERE run_id = 2", np.array([0.2, 0.5, 0.3], "<f4").tobytes()
    )
    settings = ("--no_baselines", "--output_dir", tmp_path)
    short, still = (analyze(file, "--run", number, *settings).stdout for number in (1, 2))
    assert "The best epoch was the last one" in short
    assert "no test document another label than 'neutral'" in still
    assert "another label than" not in short
    assert "The best epoch" not in still


def test_tables_for_spreadsheets_are_asked_for(tmp_path):
    texts, truth, _ = single()
    file = write_database(tmp_path / "x.sqlite", texts, truth, ("=a", "-b", "@c"), runs=({"skill": 0.1},))
    for name, more in (("exact", ()), ("safe", ("--spreadsheet_safe",))):
        analyze(file, "--no_baselines", "--output_dir", tmp_path / name, *more)
    for table in ("wrong", "confusion"):
        exact, safe = ((tmp_path / name / f"run_1_{table}.csv").read_text("utf-8") for name in ("exact", "safe"))
        assert safe == "\ufeff" + re.sub("(?<![0-9a-z])(?=[=@]|-b)", "'", exact)
        assert "=a" in exact


def test_what_the_run_wrote_down_is_checked(tmp_path):
    texts, truth, _ = single()
    file = write_database(tmp_path / "x.sqlite", texts, truth)
    execute(file, "INSERT INTO test_metrics VALUES (1, 'document', 'accuracy', 0.123)")
    execute(file, "DELETE FROM predictions WHERE doc_id = 59")
    said = analyze(file, "--no_baselines", "--output_dir", tmp_path).stdout
    assert "wrote down accuracy 0.1230 of documents; its predictions give" in said
    assert "1 of 12 documents of the test part have no prediction" in said


def test_the_same_command_writes_the_same_report(tmp_path):
    texts, truth, _ = single()
    file = write_database(tmp_path / "x.sqlite", texts, truth)
    run_script("analyze_results.py", file, "--output_dir", tmp_path / "a", *QUICK)
    analyze(file, "--output_dir", tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path):
    texts, truth, _ = single()
    file = write_database(tmp_path / "x.sqlite", texts, truth)
    other = write_database(tmp_path / "y.sqlite", [*texts[:-1], "another text"], truth)
    (tmp_path / "x.csv").write_text("text,label\n")
    for arguments, said in (
        ((file, other), "only runs on the same test documents can be compared"),
        ((file, "--other_run", 1), "both are run 1"),
        ((file, file, file), "not 3"),
        ((tmp_path / "x.csv",), "look for"),
        ((tmp_path / "none.sqlite",), "there is no file"),
        ((file, "--resamples", 0), "resamples"),
        ((), "missing --input_file"),
    ):
        done = run_here("analyze_results.py", *arguments, check=False)
        assert done.returncode == 2, arguments
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*_report"))
