"""The report of a classifier: what it reads from a database, what it draws, and what data cannot do to it."""

import csv
import hashlib
import io
import json
import re
import sqlite3
from itertools import pairwise

import numpy as np
import pytest

from lmscripts.data.labelled_store import APPLICATION_ID, SCHEMA, SCHEMA_VERSION, opened
from lmscripts.errors import UserError
from lmscripts.evaluation import baselines, charts, comparison, judging, report

WORDS = ("beat", "my", "opponent", "she", "will", "remove", "stop", "signs", "buy", "this", "vote", "now")


def sentences(count, seed=0):
    """Texts of one to three sentences in which a word or two depend on the label."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 6 * (1 + number % 3))) + f" {number}." for number in range(count)]


def write_database(
    file,
    texts,
    truth,
    labels=("left", "neutral", "right"),
    *,
    runs=({},),
    multi_label=False,
    fragments=True,
    spans=None,
    seed=0,
):
    """A database as a training leaves it; the last 20 % of the documents are test, 10 % before them validation.

    Args:
        truth: for each document a list of label numbers.
        runs: for each run what differs: name, status, options, facts, skill (of 1), parts (with predictions).
        spans: for each document its fragments as (start, end).
    """
    spans = spans or [cut(len(text)) for text in texts]
    count, num_labels = len(texts), len(labels)
    connection = sqlite3.connect(file)
    connection.executescript(
        f"{SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};PRAGMA application_id = {APPLICATION_ID};"
    )
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)",
        [
            ("source", "leanings.csv"),
            ("sha256", json.dumps({"leanings.csv": hashlib.sha256("".join(texts).encode()).hexdigest()})),
            ("multi_label", json.dumps(multi_label)),
            ("num_documents", json.dumps(count)),
        ],
    )
    connection.executemany("INSERT INTO labels VALUES (?, ?)", list(enumerate(labels)))
    rows = [(n, n + 2, text, hashlib.sha256(text.encode()).digest()) for n, text in enumerate(texts)]
    connection.executemany("INSERT INTO documents(doc_id, line, text, text_hash) VALUES (?, ?, ?, ?)", rows)
    connection.executemany(
        "INSERT INTO document_labels VALUES (?, ?)", [(n, label) for n, own in enumerate(truth) for label in own]
    )
    settings = json.dumps({"sequence_length": 128, "unit": "words"})
    insert = "INSERT INTO tokenizations(tok_id, tokenizer, fingerprint, settings) VALUES "
    connection.execute(f"{insert}(1, 'tokenizers/ipadic', 'abc123', ?)", (settings,))
    for n, own in enumerate(spans):
        for idx, (start, end) in enumerate(own):
            connection.execute(
                "INSERT INTO folds(tok_id, doc_id, idx, n, char_start, char_end) VALUES (1, ?, ?, ?, ?, ?)",
                (n, idx, len(own), start, end),
            )
    connection.execute("INSERT INTO splits VALUES (1, ?)", (json.dumps({"method": "stratified", "seed": 3631}),))
    test, validation = count - max(1, count // 5), count - max(1, count // 5) - count // 10
    members = [(1, n, "test" if n >= test else "validation" if n >= validation else "train") for n in range(count)]
    connection.executemany("INSERT INTO split_members VALUES (?, ?, ?)", members)
    connection.execute("INSERT INTO bad_rows(line, reason, raw) VALUES (7, 'unknown label', 'x')")
    for run_id, run in enumerate(runs, 1):
        random = np.random.default_rng(seed + run_id)
        write_run(connection, run_id, run, truth, spans, members, num_labels, multi_label, fragments, random)
    connection.commit()
    connection.close()
    return file


def cut(length, longest=80):
    pieces = max(1, -(-length // longest))
    bounds = [round(n * length / pieces) for n in range(pieces + 1)]
    return list(pairwise(bounds))


def write_run(connection, run_id, run, truth, spans, members, num_labels, multi_label, fragments, random):
    options = json.dumps({"learning_rate": 2e-5, "epochs": 3, **run.get("options", {})})
    facts = json.dumps(run.get("facts", {"temperature": 1.5}))
    record = (run_id, run.get("name", "bert"), options, facts, 1, 1, "runs/bert", 1.7e9, 1.7e9 + 61)
    connection.execute(
        "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*record, run.get("status", "finished"))
    )
    for epoch in (1, 2, 3):
        for part, factor in (("train", 1.0), ("validation", 1.2)):
            values = {"loss": factor / epoch, "accuracy": 1 - 0.3 * factor / epoch}
            for metric, value in values.items():
                connection.execute(
                    "INSERT INTO epochs VALUES (?, ?, ?, ?, ?, ?)", (run_id, epoch, epoch * 10, part, metric, value)
                )
    rows = []
    for _, n, part in members:
        if part not in run.get("parts", ("validation", "test")):
            continue
        target = np.isin(np.arange(num_labels), truth[n]).astype(float)
        sure = run.get("skill", 1.0) * 3.0 * (target - 0.5)
        logits = sure + random.normal(0, 1.6, (len(spans[n]), num_labels))
        if fragments:
            rows += [(run_id, part, "fragment", n, i, *blobs(row, multi_label)) for i, row in enumerate(logits)]
        rows.append((run_id, part, "document", n, -1, *blobs(logits.mean(0), multi_label)))
    connection.executemany("INSERT INTO predictions VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def blobs(logits, multi_label, temperature=1.5):
    scaled = logits / temperature
    powers = np.exp(scaled - scaled.max())
    probabilities = 1 / (1 + np.exp(-scaled)) if multi_label else powers / powers.sum()
    return probabilities.astype("<f4").tobytes(), logits.astype("<f4").tobytes()


def single(count=60, **changes):
    random = np.random.default_rng(4)
    return sentences(count), [[int(label)] for label in random.integers(0, 3, count)], changes


@pytest.fixture
def database(tmp_path):
    texts, truth, _ = single()
    return write_database(tmp_path / "leanings.sqlite", texts, truth)


def execute(file, sql, *values):
    with sqlite3.connect(file) as connection:
        connection.execute(sql, values)
    connection.close()


# ---- reading -----------------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(database):
    before = database.read_bytes()
    run = comparison.read_run(database)
    assert {part: len(doc_ids) for part, doc_ids in run.parts.items()} == {"train": 42, "validation": 6, "test": 12}
    test = run.predictions["test", "document"]
    assert test.doc_ids.tolist() == list(range(48, 60))
    np.testing.assert_allclose(test.probabilities.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(test.truth.sum(1), 1)
    powers = np.exp(test.logits / 1.5)
    np.testing.assert_allclose(powers / powers.sum(1, keepdims=True), test.probabilities, atol=1e-6)
    assert run.record["options"]["epochs"] == 3
    assert (run.record["tokenizer"], run.record["split"]["seed"]) == ("tokenizers/ipadic", 3631)
    assert not run.multi_label
    assert run.database.read_texts([3, 1])[1] == sentences(60)[1]
    assert database.read_bytes() == before


def test_nobody_writes_through_a_reader(database):
    with pytest.raises(UserError, match="readonly"), opened(database) as connection:
        connection.execute("DELETE FROM runs")


def test_the_newest_finished_run_is_taken(tmp_path):
    texts, truth, _ = single()
    runs = ({"name": "old"}, {"name": "new"}, {"name": "broken", "status": "running"})
    file = write_database(tmp_path / "x.sqlite", texts, truth, runs=runs)
    assert comparison.read_run(file).record["name"] == "new"
    assert comparison.read_run(file, 1).record["name"] == "old"
    with pytest.raises(UserError, match=r"run 3 in .* is running; finished runs: 1, 2"):
        comparison.read_run(file, 3)
    with pytest.raises(UserError, match=r"run 9 in .* is not there"):
        comparison.read_run(file, 9)


def test_several_labels_are_noticed(tmp_path):
    texts, truth, _ = single()
    truth[5] = [0, 2]
    assert comparison.read_run(write_database(tmp_path / "a.sqlite", texts, truth, multi_label=True)).multi_label
    file = write_database(tmp_path / "b.sqlite", texts, single()[1], multi_label=True)
    assert comparison.read_run(file).multi_label  # one label each, by chance: the sigmoids say so


def spoil(file, how):
    if how == "text":
        file.write_text("text,label\nbuy this,left\n" * 100)
    elif how == "foreign":
        file.unlink()
        execute(file, "CREATE TABLE songs(title)")
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:20_000])
    elif how == "missing":
        file.unlink()
    else:
        execute(file, how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "there is no file"),
        ("text", "no SQLite file"),
        ("foreign", "an SQLite file of another program"),
        ("cut", "truncated or damaged"),
        ("PRAGMA user_version = 1", "has schema version 1, and this version reads 2"),
        ("UPDATE runs SET facts = '{'", r"is truncated or damaged \(facts of run 1: "),
        ("UPDATE predictions SET doc_id = 0 WHERE doc_id = 48", "document 0 is not in that part of the split"),
        ("DELETE FROM runs", "holds 0 runs, none of them finished"),
        ("UPDATE runs SET status = 'failed'", "holds 1 runs, none of them finished"),
        ("DELETE FROM predictions", "run 1 in .* has no predictions for test documents"),
        ("UPDATE predictions SET probabilities = x'00000000'", "must be 3 numbers, .* not 1 numbers"),
        ("UPDATE predictions SET probabilities = NULL", "must be 3 numbers, .* not None"),
        ("UPDATE predictions SET probabilities = x'0000c07f0000c07f0000c07f'", "not finite numbers"),
    ],
)
def test_what_is_no_result_is_refused_in_a_sentence(database, how, said):
    spoil(database, how)
    with pytest.raises(UserError, match=said) as caught:
        comparison.read_run(database)
    assert "\n" not in str(caught.value)
    assert str(database) in str(caught.value) or "run 1" in str(caught.value)


# ---- comparing ---------------------------------------------------------------------------------------------------


def test_documents_are_found_again_in_another_database(tmp_path):
    """The same test texts under other numbers, with other numbers of the labels."""
    texts, truth, _ = single()
    first = comparison.read_run(write_database(tmp_path / "a.sqlite", texts, truth))
    order = [*range(48), *np.random.default_rng(0).permutation(np.arange(48, 60)).tolist()]
    renamed = {0: 2, 1: 0, 2: 1}
    other = [[renamed[truth[n][0]]] for n in order]
    names = ("neutral", "right", "left")
    file = write_database(tmp_path / "b.sqlite", [texts[n] for n in order], other, names)
    second = comparison.read_run(file)
    places = comparison.places_of_same(first, second)
    own = first.database.read_texts(first.predictions["test", "document"].doc_ids)
    assert second.database.read_texts(second.predictions["test", "document"].doc_ids[places]) == own


def test_units_are_what_a_split_keeps_together(database):
    """Groups, equal texts and names, one through the other; the rest stand alone."""
    run = comparison.read_run(database)
    doc_ids = run.predictions["test", "document"].doc_ids
    assert comparison.units_of(run, doc_ids).tolist() == list(range(12))
    for sql in (
        "UPDATE documents SET grp = 'a' WHERE doc_id IN (48, 50)",
        "UPDATE documents SET text_hash = x'00' WHERE doc_id IN (50, 52)",
        "UPDATE documents SET name = 'n' WHERE doc_id IN (52, 59)",
        "UPDATE documents SET grp = 'b' WHERE doc_id IN (49, 51)",
    ):
        execute(database, sql)
    units = comparison.units_of(run, doc_ids)
    assert units.max() + 1 == 12 - 3 - 1
    assert len({*units[[0, 2, 4, 11]]}) == len({*units[[1, 3]]}) == 1
    assert len({*units.tolist()} - {units[0], units[1]}) == 6


def test_a_document_with_a_label_that_was_missed_is_shown(tmp_path):
    texts, truth, _ = single()
    truth[-1] = [0, 2]
    file = write_database(tmp_path / "x.sqlite", texts, truth, multi_label=True)
    run = comparison.read_run(file)
    test, fragments = run.predictions["test", "document"], run.predictions["test", "fragment"]
    decided = test.truth.copy()
    decided[-1] = [True, True, False]
    for row, missed in (([0.9, 0.55, 0.01], True), ([0.9, 0.995, 0.01], False)):
        test.probabilities[-1] = row
        every, shown = report.find_mistakes(run, decided, 5)
        label = 2 if missed else 1
        assert [(m["doc_id"], m["label"], m["missed"]) for m in every] == [(59, run.labels[label], missed)]
        assert (every[0]["true"], every[0]["predicted"]) == (["left", "right"], ["left", "neutral"])
        of_label = fragments.probabilities[fragments.doc_ids == 59, label]
        assert every[0]["decisive"] == (of_label.argmin() if missed else of_label.argmax())
        page = wrong_document(shown[0])
        what = '<span class="bad">right</span> missed <small>1.0 %' if missed else "wrongly given <small>99.5 %"
        assert what in page
        assert "given left, neutral, in truth" in page
    numbers = {"multi_label": True, "wrong": every, "run": {"options": {"separator": ";"}}}
    assert report.wrong_table(numbers)[1][:5] == [59, "left;right", "left;neutral", "neutral", False]


def test_the_first_of_every_confusion_is_shown_before_the_second_of_any(tmp_path):
    """All texts that were shown could be of one kind, which taught little about the others."""
    texts, truth, _ = single()
    run = comparison.read_run(write_database(tmp_path / "x.sqlite", texts, truth, runs=({"skill": 0.1},)))
    test = run.predictions["test", "document"]
    decided = np.eye(3, dtype=bool)[test.probabilities.argmax(1)]
    every, shown = report.find_mistakes(run, decided, 100)
    kinds = [(*mistake["true"], mistake["label"]) for mistake in every]
    assert len(set(kinds)) < len(kinds)
    assert [mistake["rank"] for mistake in shown] == sorted(mistake["rank"] for mistake in shown)
    first = [mistake for mistake in shown if not mistake["rank"]]
    assert [mistake["doc_id"] for mistake in first] == [
        every[kinds.index(kind)]["doc_id"] for kind in dict.fromkeys(kinds)
    ]
    assert len(report.find_mistakes(run, decided, 2)[1]) == 2


def test_other_test_documents_are_refused(tmp_path):
    texts, truth, _ = single()
    first = comparison.read_run(write_database(tmp_path / "a.sqlite", texts, truth))
    changed = [*texts[:-1], "something else"]
    other = comparison.read_run(write_database(tmp_path / "b.sqlite", changed, truth))
    with pytest.raises(UserError, match=r"12 documents, .* on 12, and 11 are the same"):
        comparison.places_of_same(first, other)
    relabelled = [*truth[:-1], [(truth[-1][0] + 1) % 3]]
    other = comparison.read_run(write_database(tmp_path / "c.sqlite", texts, relabelled))
    with pytest.raises(UserError, match="same texts with other labels"):
        comparison.places_of_same(first, other)
    other = comparison.read_run(write_database(tmp_path / "d.sqlite", texts, truth, ("left", "middle", "right")))
    with pytest.raises(UserError, match="'middle'"):
        comparison.places_of_same(first, other)


def test_baselines_learn_from_the_training_part_alone(tmp_path):
    """A word that decides in the training part is learnt; the test part's own labels are of no help."""
    texts = [f"{'red' if n % 2 else 'blue'} thing number {n}" for n in range(100)]
    truth = [[n % 2] for n in range(80)] + [[1 - n % 2] for n in range(80, 100)]
    run = comparison.read_run(write_database(tmp_path / "a.sqlite", texts, truth, ("blue", "red")))
    found, seen = baselines.baseline_decisions(run, 1000, 0)
    assert (sorted(found), seen) == (
        ["TF-IDF of characters", "TF-IDF of words"],
        70,
    )
    for decided in found.values():
        assert (
            decided == run.predictions["test", "document"].truth
        ).mean() == 0  # wrong in every one, as it was taught
    assert baselines.baseline_decisions(run, 10, 0)[1] == 10


def test_the_most_frequent_labels():
    train = np.array([[1, 0], [0, 1], [0, 1]], bool)
    assert baselines.majority_decisions(train, 2).tolist() == [[False, True]] * 2


def test_words_are_for_text_with_spaces():
    assert baselines.has_spaces(["buy this toothpaste now"])
    assert not baselines.has_spaces(["吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"])


def test_baselines_of_one_label_and_of_empty_texts():
    train = np.array([[True, False]] * 3)
    for texts in (["a b", "a b", "a c"], ["", "", ""]):
        found = baselines.tfidf_decisions(texts, train, ["a b"], words=False, multi_label=False)
        assert found.tolist() == [[True, False]]
        assert baselines.tfidf_decisions(texts, train, ["x"], words=True, multi_label=True).tolist() == [[True, False]]


# ---- HTML and CSV ------------------------------------------------------------------------------------------------


def wrong_document(document):
    shown = report.environment().get_template("pieces.html").module.wrong_document(document)
    return " ".join(shown.split())


ODD = ("=1+1", "-a", "＝1+1", 'say "x", y', "a\rb", "\r", "a\nb", "\t=1", " left ", "", "'=x", "吾輩", "\ufeffx")


def test_what_a_program_reads_is_what_was_written():
    """Labels and ids that begin with = + - @ had an apostrophe before them, and joined with nothing."""
    rows = [[text, number, "-1.5"] for number, text in enumerate(ODD)]
    text = report.csv_text(rows)
    assert list(csv.reader(io.StringIO(text, newline=""))) == [[str(cell) for cell in row] for row in rows]
    assert report.csv_text(rows[:1]) == "=1+1,0,-1.5\n"


def test_a_file_for_spreadsheets_begins_with_its_mark():
    assert report.csv_text([["a", 1]], True) == "\ufeffa,1\n"
    assert report.csv_text([["=a", 1]], True, begins_file=False) == "'=a,1\n"


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-cmd|' /C calc'!A0", "@SUM(1)", "\t=1", "\r=1", "\n=1", "=HYPERLINK(1)", "＝1+1", "－x"]
)
def test_no_cell_is_a_formula(text):
    (row,) = csv.reader(io.StringIO(report.csv_text([[text]], True, begins_file=False), newline=""))
    assert row == [f"'{text}"]


@pytest.mark.parametrize("value", [-1.5, 3, "-1.5", "+2", "-1e-3", "left", "a=b", "", None, "1+1", "吾輩"])
def test_numbers_and_plain_text_stay(value):
    assert report.csv_text([[value, ""]], True, begins_file=False) == report.csv_text([[value, ""]])


@pytest.mark.parametrize(
    ("truth", "given", "said"),
    [
        ([[1, 0], [0, 1]], [[1, 0], [1, 0]], "another label than 'a'"),
        ([[1, 0], [0, 1]], [[0, 0], [0, 0]], "any label"),
        ([[1, 0], [0, 1]], [[0, 0], [0, 1]], "another label than 'b'"),
        ([[1, 0], [0, 1]], [[0, 1], [1, 0]], None),
        ([[1, 0], [1, 0]], [[1, 0], [1, 0]], None),
        ([[0, 0], [1, 0]], [[1, 0], [1, 0]], None),
    ],
)
def test_a_run_that_gives_all_documents_one_label_is_told(truth, given, said):
    found = judging.told_apart(np.array(truth, bool), np.array(given, bool), ["a", "b"])
    assert found == ([f"The run gives no test document {said}: it does not tell them apart."] if said else [])


def test_markup_in_data_is_text():
    hostile = "<script>alert(1)</script>&\"'\x00\ud800"
    shown = report.environment().from_string('<p title="{{ x }}">{{ x }}</p>').render(x=hostile)
    assert shown.count("<") == 2
    assert shown.count('"') == 2
    assert shown.count("\N{REPLACEMENT CHARACTER}") == 4
    shown.encode("utf-8")


WRONG = {
    **{"doc_id": 17, "file": None, "line": 19, "name": "speech <7>", "true": ["left"], "predicted": ["<b>right"]},
    **{"label": "<b>right", "missed": False, "probability": 0.97, "true_probability": 0.01},
    **{"fragments": [0.2, 0.99, 0.5], "decisive": 1},
}


def test_the_decisive_fragment_is_marked_where_it_stands():
    text = "a < b. " * 40 + "THE <i>PART</i> THAT DECIDED" + " and more" * 100
    start = text.index("THE")
    span = (start, text.index(" and"))
    shown = wrong_document({**WRONG, "text": text, "span": span})
    assert "<mark>THE &lt;i&gt;PART&lt;/i&gt; THAT DECIDED</mark>" in shown
    assert "fragment 2 of 3" in shown
    assert "speech &lt;7&gt;" in shown
    assert "<b>" not in shown
    assert shown.count("<mark>") == 2  # in the excerpt and in the whole text
    whole = re.findall(r"<blockquote>(.*?)</blockquote>", shown, re.DOTALL)[1]
    assert len(re.sub(r"</?mark>", "", whole).replace("&lt;", "<").replace("&gt;", ">")) == len(text)


def test_japanese_text_says_so_and_a_long_one_is_cut():
    shown = wrong_document({**WRONG, "text": "吾輩は猫である。" * 5000, "span": (8, 16)})
    assert '<blockquote lang="ja">' in shown
    assert "first 20,000 characters" in shown
    assert len(shown) < 25_000


def test_a_span_outside_of_the_text_is_harmless():
    shown = wrong_document({**WRONG, "text": "short", "span": (100, 200)})
    assert "short" in shown
    assert "<mark>" not in shown


def test_charts_take_the_colours_of_the_page_and_do_not_clash():
    epochs = [{"epoch": n, "part": "train", "metric": "loss", "value": 1 / n} for n in (1, 2)]
    bins = [{"low": 0.0, "high": 0.5, "count": 3, "confidence": 0.4, "accuracy": 0.3}]
    bins += [{"low": 0.5, "high": 1.0, "count": 0, "confidence": None, "accuracy": None}]
    training = charts.draw_training(epochs)
    drawn = [training, charts.draw_calibration(None, {"bins": bins, "ece": 0.1})]
    drawn.append(charts.draw_coverage([0.5, 1.0], [1.0, 0.8], "documents"))
    for svg, png in drawn:
        assert png.startswith(b"\x89PNG")
        assert "currentColor" in svg
        assert charts.INK not in svg
        assert "http" not in svg
    ids = [name for svg, _ in drawn for name in re.findall(r' id="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))
    assert charts.draw_training(epochs) == training  # the same bytes every time
    assert charts.draw_training([]) is None


@pytest.mark.parametrize("names", [("$x^$", "$\\frac{"), ("猫", "\U0001f408"), ("<b>", "a" * 200)])
def test_any_name_of_a_label_can_be_drawn(names):
    assert charts.draw_confusion([[3, 1], [0, 0]], names, "documents").startswith(b"\x89PNG")


def test_names_that_no_font_has_are_told_with_the_numbers_that_stand_for_them(monkeypatch):
    monkeypatch.setattr(charts, "_installed_fonts", lambda: ["DejaVu Sans"])
    assert charts.without_font(("left", "café", "Ж")) == []
    (said,) = charts.without_font(("left", "猫", "right", "犬" * 100))
    assert "2 labels" in said
    assert "'猫' 'label 1'" in said
    assert charts._drawable(("left", "猫")) == ["left", "label 1"]


def test_a_correlation_has_an_axis_of_its_own():
    epochs = [{"epoch": n, "part": "validation", "metric": metric, "value": -0.1 * n}
              for n in (1, 2) for metric in ("loss", "mcc", "macro_f1")]  # fmt: skip
    svg, _ = charts.draw_training(epochs)
    assert [svg.count(f">{axis}<") for axis in ("loss (nats)", "macro f1", "correlation", "share")] == [1, 1, 1, 0]


@pytest.mark.parametrize("number", [40, 200])
def test_many_labels_have_a_picture_without_numbers(number):
    names = [f"l{n}" for n in range(number)]
    picture = charts.draw_confusion(np.eye(number, dtype=int).tolist(), names, "documents")
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[place : place + 4], "big") for place in (16, 20))
    assert max(width, height) < 2500
