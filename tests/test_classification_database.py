"""The SQLite file of a task: built once, whole or not at all, by one process, whatever happens to it."""

import contextlib
import csv
import fcntl
import json
import os
import random
import resource
import runpy
import signal
import sqlite3
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import pytest
from conftest import PATIENCE, ROOT, SAMPLE
from transformers import BertConfig

from lmscripts.data import labelled_build, labelled_store
from lmscripts.data.folding import Folder, FoldSettings
from lmscripts.data.labelled_build import database_of, open_or_build
from lmscripts.data.labelled_rows import read_parts
from lmscripts.data.labelled_store import SCHEMA, Database
from lmscripts.data.splits import SplitSettings
from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.text.records import TableOptions
from lmscripts.tokenizer.encoder import Encoder, load_encoder

FOLDS = FoldSettings(max_length=32)
SPLIT = SplitSettings()


def write_table(path, number=60, seed=1, labels=("good", "bad"), extra=()):
    """A table of real sentences with a group column."""
    choose = random.Random(seed)
    lines = [line for line in (SAMPLE / "articles.txt").read_text(encoding="utf-8").splitlines() if len(line) > 10]
    rows = [
        (place, "\n".join(choose.choices(lines, k=choose.randint(1, 4))), labels[place % len(labels)], f"w{place // 3}")
        for place in range(number)
    ]
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text", "label", "work"), *rows, *extra])
    return path


@pytest.fixture(scope="module")
def encoder(tokenizer_dir):
    return load_encoder(tokenizer_dir)


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "leanings.csv")


def dump(path):
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return list(connection.iterdump())


def query(path, sql, *values):
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, values).fetchall()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def calls(monkeypatch, encoder):
    """Counts what any way into the tokenizer is asked to tokenise."""
    counted = []
    kind, encode, call = type(encoder.tokenizer), Encoder.encode, type(encoder.tokenizer).__call__
    monkeypatch.setattr(Encoder, "encode", lambda self, lines: counted.append(len(lines)) or encode(self, lines))
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **k: counted.append(1) or call(self, *a, **k))
    return counted


# ---- what is in it ----


def test_everything_of_the_table_is_in_the_file(table, encoder):
    options = TableOptions(id="id", group="work")
    made = open_or_build(table, encoder, FOLDS, SPLIT, options)
    assert made.path == table.with_suffix(".sqlite") == database_of(table)
    assert sorted(files(table.parent)) == ["leanings.csv", "leanings.sqlite"]
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert made.labels() == ["bad", "good"]
    stored = query(made.path, "SELECT doc_id, name, text, grp FROM documents ORDER BY doc_id")
    assert stored == [(n, row["id"], row["text"], row["work"]) for n, row in enumerate(rows)]
    parts = dict(query(made.path, "SELECT doc_id, part FROM split_members WHERE split_id = ?", made.split_id))
    expected = Folder(encoder, FOLDS)([row["text"] for row in rows])
    for part in ("train", "validation", "test"):
        read = made.read_folds(part)
        assert read.ids.dtype == np.int32
        wanted = [(n, f) for n, folds in enumerate(expected) if parts[n] == part for f in folds]
        assert read.doc_ids.tolist() == [n for n, _ in wanted]
        assert read.offsets.tolist() == [0, *np.cumsum([len(f.ids) for _, f in wanted]).tolist()]
        assert read.ids.tolist() == [number for _, f in wanted for number in f.ids.tolist()]
        for name in ("idx", "n", "char_start", "char_end"):
            assert getattr(read, name).tolist() == [getattr(f, name) for _, f in wanted]
        doc_ids, truth = made.read_labels(part)
        assert doc_ids.tolist() == sorted(n for n in parts if parts[n] == part)
        assert truth.shape == (len(doc_ids), 2)
        assert truth.sum(1).tolist() == [1] * len(doc_ids)
        assert [made.labels()[number] for number in truth.argmax(1)] == [rows[n]["label"] for n in doc_ids]
        assert made.read_texts(doc_ids[::-1]) == [rows[n]["text"] for n in doc_ids[::-1]]
    assert any("train: 48 documents" in line for line in made.split_sentences())
    assert made.documents_without_rows() == []


def test_groups_and_equal_texts_stay_together(tmp_path, encoder):
    copies = [(f"c{n}", text, "good", f"c{n}") for n, text in enumerate(["同じ文です。", "同じ 文です。"] * 4)]
    copies += [("d1", "ＡＢＣ文", "bad", "w1"), ("d2", "ABC文", "bad", "w9")]
    table = write_table(tmp_path / "t.csv", 90, extra=copies)
    made = open_or_build(table, encoder, FOLDS, SPLIT, TableOptions(group="work"))
    sql = "SELECT text, grp, group_concat(DISTINCT part) FROM documents JOIN split_members USING (doc_id) "
    sql += "GROUP BY text, grp"
    seen = {}
    for text, group, parts in query(made.path, sql):
        assert "," not in parts
        normal = "".join(unicodedata.normalize("NFKC", text).split())
        assert seen.setdefault(("text", normal), parts) == parts or normal == "同じ文です。"
        assert seen.setdefault(("group", group), parts) == parts


def test_several_labels_and_files_of_parts(tmp_path, encoder):
    table = write_table(tmp_path / "train.csv", 40, labels=("a|b", "b", "a"))
    test = write_table(tmp_path / "test.csv", 10, seed=2, labels=("a", "b|a"))
    options, given = TableOptions(separator="|"), SplitSettings(method="given")
    made = open_or_build(table, encoder, FOLDS, given, options, part_files={"test": test})
    assert made.path.name == "train.sqlite"
    doc_ids, truth = made.read_labels("test")
    assert doc_ids.tolist() == list(range(40, 50))
    assert truth.tolist() == [[True, False], [True, True]] * 5
    assert 3 <= len(made.read_labels("validation")[0]) <= 5
    assert open_or_build(table, encoder, FOLDS, given, options, part_files={"test": test}).done[0].startswith("found")
    with pytest.raises(UserError, match=r"train train\.csv.*test test\.csv .*now"):
        open_or_build(table, encoder, FOLDS, given, options, part_files={"test": table})


def test_documents_of_no_label_are_documents_where_there_may_be_several(tmp_path, encoder):
    table = write_table(tmp_path / "t.csv", 60, labels=("a|b", "", "a"))
    made = open_or_build(table, encoder, FOLDS, SPLIT, TableOptions(separator="|"))
    assert made.meta()["num_documents"] == 60
    without = 0
    parts, _ = read_parts(made, balanced=False, multi_label=True, count_documents_once=True)
    for read, part, size in zip(parts.values(), ("train", "validation", "test"), (48, 6, 6), strict=True):
        doc_ids, truth = made.read_labels(part)
        assert len(doc_ids) == size
        for doc_id, has in zip(doc_ids, truth.tolist(), strict=True):
            assert has == ([True, True], [False, False], [True, False])[doc_id % 3]
        assert read.doc_ids.tolist() == doc_ids.tolist()
        without += int((read.truth.sum(1) == 0).sum())
    assert without == 20
    assert "no label 16 (80.0%)" in made.split_sentences()[0]


def test_an_sqlite_file_keeps_the_parts_that_its_table_gave(tmp_path, encoder):
    """Otherwise documents for testing are trained on as soon as the file is named instead of the table."""
    table = tmp_path / "t.csv"
    lines = [f"sentence {n},{'ab'[n % 2]},{('train', 'dev', 'test')[n // 4 % 3]}" for n in range(36)]
    table.write_text("text,label,part\n" + "\n".join(lines), encoding="utf-8")
    given = SplitSettings(method="given")
    first = open_or_build(table, encoder, FOLDS, given, TableOptions(split="part"))
    again = open_or_build(first.path, encoder, FOLDS, SPLIT)
    assert (again.split_id, again.split, again.done[0][:9]) == (first.split_id, given, "found all")
    other = open_or_build(first.path, encoder, FOLDS, SplitSettings(seed=5, train=0.5, validation=0.1, test=0.4))
    for part in ("train", "validation", "test"):
        read = [made.read_labels(part)[0].tolist() for made in (first, other)]
        assert read[0] == read[1]
        assert len(read[0]) == 12

    train, test = write_table(tmp_path / "train.csv", 40), write_table(tmp_path / "test.csv", 20, seed=2)
    first = open_or_build(train, encoder, FOLDS, given, part_files={"test": test})
    again = open_or_build(first.path, encoder, FOLDS, SPLIT)
    assert again.read_labels("test")[0].tolist() == list(range(40, 60))
    whole = open_or_build(table, encoder, FOLDS, SPLIT, database=tmp_path / "whole.sqlite")
    assert open_or_build(whole.path, encoder, FOLDS, SPLIT).split == SPLIT


def test_the_same_file_for_another_part_is_another_source(tmp_path, encoder):
    table, more = write_table(tmp_path / "train.csv", 40), write_table(tmp_path / "v.csv", 20, seed=2)
    given = SplitSettings(method="given")
    open_or_build(table, encoder, FOLDS, given, part_files={"validation": more})
    with pytest.raises(UserError, match=r"validation v\.csv \(sha256 .*now the source is .* test v\.csv \(sha256"):
        open_or_build(table, encoder, FOLDS, given, part_files={"test": more})
    renamed = more.rename(tmp_path / "w.csv")
    assert open_or_build(table, encoder, FOLDS, given, part_files={"validation": renamed}).done[0].startswith("found")


def test_what_stands_in_a_table_is_data_and_nothing_else(tmp_path, encoder):
    texts = [
        "'); DROP TABLE documents; --",
        '"; DELETE FROM labels; --',
        "<script>alert(1)</script>",
        "{0} %s $x ?",
        "x",
    ]
    labels = ["<script>", "a' OR '1'='1", "😀", "..", "NULL"]
    table = tmp_path / "strange name; 100% #1?.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((t + f" {n}", b) for n in range(8) for t, b in zip(texts, labels))]
        )
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    assert sorted(made.labels()) == sorted(labels)
    assert len(made.read_texts(range(40))) == 40
    assert made.read_texts([0]) == ["'); DROP TABLE documents; -- 0"]


def test_bad_rows_are_kept_with_their_reason_and_may_be_refused_later(tmp_path, encoder):
    table = write_table(tmp_path / "t.csv", extra=[("1", "", "good", ""), ("2", "text", "", ""), ("3", "short")])
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    assert [row[2] for row in made.bad_rows()] == ["empty text", "empty label", "too few fields"]
    assert made.meta()["num_bad_rows"] == 3
    assert "3 bad rows" in made.done[0]
    with pytest.raises(UserError, match="leaves 3 bad rows out"):
        open_or_build(table, encoder, FOLDS, SPLIT, TableOptions(on_bad_row="fail"))


def test_bad_rows_and_repairs_are_told_with_file_and_line_also_of_a_file_that_is_found(tmp_path, encoder):
    table = write_table(tmp_path / "train.csv", 40, extra=[("1", "", "good", ""), *[("3", "short")] * 7])
    test = write_table(tmp_path / "test.csv", 10, seed=2, extra=[("4", "a\0b", "good", ""), ("5", "", "bad", "")])
    build = partial(open_or_build, table, encoder, FOLDS, SplitSettings(method="given"), part_files={"test": test})
    lines = [len((tmp_path / name).read_text(encoding="utf-8").splitlines()) for name in ("train.csv", "test.csv")]
    first = lines[0] - 7
    for made in (build(), build()):
        short, empty, repaired = made.reading_sentences()
        named = ", ".join(f"train.csv:{line}" for line in range(first + 1, first + 6))
        assert short == f"left out 7 rows, too few fields: {named}, ... (the first: 2 where the header has 4)"
        assert empty == (
            f"left out 2 rows, empty text: train.csv:{first}, test.csv:{lines[1]} (the first: nothing in 'text')"
        )
        assert repaired == "put right 1 nul characters"
    assert query(made.path, "SELECT DISTINCT file FROM documents WHERE doc_id >= 40") == [("test.csv",)]


def test_documents_without_a_token_are_told(tmp_path, encoder):
    table = write_table(tmp_path / "t.csv", extra=[("1", "\u200b\ufeff", "good", "")])
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    made_of = encoder.encode(["\u200b\ufeff"]).lengths[0]
    assert made.documents_without_rows() == ([] if made_of else [60])


# ---- used again ----


def test_the_second_opening_makes_no_call_of_the_tokenizer_and_no_lock(table, encoder, calls, monkeypatch):
    open_or_build(table, encoder, FOLDS, SPLIT)
    assert sum(calls) >= 60
    calls.clear()
    before = files(table.parent)
    monkeypatch.setattr(labelled_build, "only_builder", None)  # nothing is locked, so that a read-only folder serves
    for source in (table, table.with_suffix(".sqlite")):
        again = open_or_build(source, encoder, FOLDS, SPLIT)
        assert isinstance(again, Database)
        assert again.done[0].startswith("found")
        assert len(again.read_folds("train").doc_ids)
    assert calls == []
    assert files(table.parent) == before
    fresh = load_encoder(encoder.folder)
    assert open_or_build(table, fresh, FOLDS, SPLIT).tok_id == again.tok_id
    assert calls == []


def test_another_length_or_split_is_added_and_the_rest_stays(table, encoder, calls):
    first = open_or_build(table, encoder, FOLDS, SPLIT)
    before = dump(first.path)
    calls.clear()
    assert open_or_build(table, encoder, FOLDS, SplitSettings(train=80, validation=10, test=10)).split_id == 1
    other_split = open_or_build(first.path, encoder, FOLDS, SplitSettings(seed=7))
    assert calls == []
    assert (other_split.tok_id, other_split.split_id) == (first.tok_id, 2)
    longer = open_or_build(table, encoder, FoldSettings(max_length=48, overlap=6), SplitSettings(seed=7))
    assert sum(calls) >= 60
    assert (longer.tok_id, longer.split_id) == (2, 2)
    after = set(dump(first.path))
    assert all(line in after for line in before)
    rows = [replace(longer, tok_id=tok_id).read_folds("train") for tok_id in (1, 2)]
    assert [np.diff(each.offsets).max() for each in rows] == [32, 48]
    assert set(rows[0].doc_ids) == set(rows[1].doc_ids)
    calls.clear()
    assert open_or_build(table, encoder, FOLDS, SPLIT).done == (f"found all in {first.path}",)
    assert calls == []


def test_another_tokenizer_is_another_tokenization(table, encoder, tmp_path_factory):
    from test_tokenization import make_folder, words_of

    other = load_encoder(make_folder(tmp_path_factory.mktemp("other") / "tok", "character", words_of("none")))
    open_or_build(table, encoder, FOLDS, SPLIT)
    assert open_or_build(table, other, FOLDS, SPLIT).tok_id == 2
    assert open_or_build(table, encoder, FOLDS, SPLIT).tok_id == 1


def test_another_source_is_refused_with_both_hashes_or_replaced(table, encoder):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    run = made.start_run("r", {}, {}, model_dir="m")
    old = made.meta()["sha256"]["leanings.csv"][:16]
    write_table(table, 66)
    before = files(table.parent)
    with pytest.raises(UserError, match=rf"{old}.*now the source.*sha256.*1 runs in it would be lost") as raised:
        open_or_build(table, encoder, FOLDS, SPLIT)
    assert files(table.parent) == before
    with pytest.raises(UserError, match=r"run 1 \(r\) is training with .*wait"):  # in this process, which lives
        open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True)
    assert files(table.parent) == before
    made.end_run(run, "stopped")
    new = open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True)
    assert new.meta()["num_documents"] == 66
    assert new.meta()["sha256"]["leanings.csv"][:16] in str(raised.value)
    assert open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True).done[0].startswith("found")


@pytest.mark.parametrize("as_database", [False, True])
def test_other_options_are_refused_with_both_values(table, encoder, as_database):
    open_or_build(table, encoder, FOLDS, SPLIT, TableOptions(group="work"))
    source = table.with_suffix(".sqlite") if as_database else table
    with pytest.raises(UserError, match="group 'work' and now 'id'"):
        open_or_build(source, encoder, FOLDS, SPLIT, TableOptions(group="id"))
    if as_database:  # what is not said is taken from the file
        assert open_or_build(source, encoder, FOLDS, SPLIT).done[0].startswith("found")
    else:
        with pytest.raises(UserError, match="group 'work' and now ''"):
            open_or_build(source, encoder, FOLDS, SPLIT)


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, encoder):
    table = write_table(tmp_path / "t.csv", 700)
    seen = []
    alone = open_or_build(table, encoder, FOLDS, SPLIT, database=tmp_path / "a.sqlite", progress=seen.append)
    shared = open_or_build(table, encoder, FOLDS, SPLIT, database=tmp_path / "b.sqlite", num_workers=2)
    assert dump(alone.path) == dump(shared.path)
    assert sum(seen) == 700
    assert len(seen) > 2


# ---- files that are not ours, or damaged ----


def foreign_files(folder, good):
    data = good.read_bytes()
    other = folder / "other.tmp"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE precious(value)")
        connection.execute("INSERT INTO precious VALUES (1)")
        connection.commit()
    unnamed = folder / "unnamed.tmp"
    with contextlib.closing(sqlite3.connect(unnamed)) as connection:
        connection.executescript(SCHEMA)
    contents = {
        "other": (other.read_bytes(), "another program", False),
        "without our id": (unnamed.read_bytes(), "another program", False),
        "text": (b"text,label\na,b\n" * 40, "no SQLite file", False),
        "empty": (b"", "no SQLite file", False),
        "newer": (data[:60] + (3).to_bytes(4, "big") + data[64:], "schema version 3, and this version reads 2", True),
        "older": (data[:60] + (1).to_bytes(4, "big") + data[64:], "schema version 1, and this version reads 2", True),
        "truncated": (data[: len(data) // 2], "truncated or damaged", True),
        "no tables": (data[:100] + bytes(3996) + data[4096:], "truncated or damaged", True),
    }
    other.unlink()
    unnamed.unlink()
    return contents


@pytest.mark.parametrize(
    "kind", ["other", "without our id", "text", "empty", "newer", "older", "truncated", "no tables"]
)
def test_foreign_older_and_damaged_files_are_refused_and_untouched(table, encoder, kind):
    good = open_or_build(table, encoder, FOLDS, SPLIT).path
    data, said, may_be_replaced = foreign_files(table.parent, good)[kind]
    good.write_bytes(data)
    before = files(table.parent)
    for source in (table, good):
        with pytest.raises(UserError, match=said) as raised:
            open_or_build(source, encoder, FOLDS, SPLIT)
        assert str(good) in str(raised.value)
        assert "\n" not in str(raised.value)
        assert files(table.parent) == before
    with pytest.raises(UserError, match=said):
        Database(good).meta()
    if may_be_replaced:
        assert open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True).done[0].startswith("built")
    else:
        with pytest.raises(UserError, match=said):
            open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True)
        assert files(table.parent) == before


def damaged_files(made):
    """Ruined pages of folded rows and of texts, and a flipped bit in each of the columns that are read from there."""
    data = made.path.read_bytes()
    (ids,) = query(made.path, "SELECT ids FROM folds WHERE fold_id = 40")[0]
    (size,) = query(made.path, "PRAGMA page_size")[0]
    place = data.index(ids)
    page = place // size * size
    yield "page", data[:page] + b"\xff" * size + data[page + size :]
    page = data.index(made.read_texts([100])[0][:9].encode()) // size * size
    yield "page of texts", data[:page] + b"\xff" * size + data[page + size :]
    for name, at in (("ids", place + 8), ("char_end", place - 1), ("row_check", place + len(ids) + 1)):
        yield name, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def read_all(made):
    parts = ("train", "validation", "test")
    ids = [made.read_folds(part).ids.tolist() for part in parts]
    return ids, made.read_texts(range(made.meta()["num_documents"]))


def test_damage_within_is_found_and_overwrite_repairs_it(tmp_path, encoder):
    table = write_table(tmp_path / "t.csv", 200)
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    expected, seen = read_all(made), []
    for name, data in list(damaged_files(made)):
        made.path.write_bytes(data)
        with pytest.raises(UserError, match=r"truncated or damaged.*--overwrite") as raised:
            read_all(open_or_build(table, encoder, FOLDS, SPLIT))
        assert "\n" not in str(raised.value)
        made.path.write_bytes(data)
        again = open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True)
        assert again.done[0].startswith("built"), name
        assert read_all(again) == expected
        assert open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True).done[0].startswith("found")
        seen.append(name)
    assert len(seen) == 5
    with contextlib.closing(sqlite3.connect(made.path)) as connection:
        connection.execute("UPDATE tokenizations SET vocab_size = 10")
        connection.commit()
    with pytest.raises(UserError, match="of a vocabulary of 10"):
        read_all(made)


def test_an_sqlite_file_alone_is_not_told_to_be_built_again_from_itself(table, encoder):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    with pytest.raises(UserError, match="from the table that it was made from"):
        open_or_build(made.path, encoder, FOLDS, SPLIT, overwrite=True)
    with pytest.raises(UserError, match=r"delimiter.*leave that out, or give the table.*leanings\.csv") as raised:
        open_or_build(made.path, encoder, FOLDS, SPLIT, TableOptions(delimiter=";"))
    assert "overwrite" not in str(raised.value)


def test_places_that_cannot_be(tmp_path, table, encoder):
    for source, said, more in (
        (tmp_path / "missing.sqlite", "there is no file", {}),
        (tmp_path / "missing.csv", "does not exist", {}),
        (tmp_path, "is a folder", {}),
        (table, "no SQLite file", {"database": table}),
        (table, "cannot be written", {"database": tmp_path / "no" / "such" / "x.sqlite"}),
        (table, "is a folder", {"database": tmp_path}),
        (table, "validation and test", {"part_files": {"holdout": table}}),
    ):
        before = files(table.parent)
        with pytest.raises(UserError, match=said):
            open_or_build(source, encoder, FOLDS, SPLIT, **more)
        assert files(table.parent) == before


GOOD_ROWS = "".join(f"sentence {n},{'ab'[n % 2]}\n" for n in range(30))
HOSTILE = {
    "empty": "", "header only": "text,label\n", "one row": "text,label\na,b\n", "blank lines": "\n\n\n",
    "one class": "text,label\n" + "a,b\n" * 30, "rare class": f"text,label\n{GOOD_ROWS}x,c\n",
    "no label column": "text,other\n" + GOOD_ROWS, "no text column": "body,label\n" + GOOD_ROWS,
    "no header": GOOD_ROWS, "twice the column": "text,label,label\n" + GOOD_ROWS.replace("\n", ",x\n"),
    "open quote": (f'text,label\n{GOOD_ROWS}"open,a\n{GOOD_ROWS}', {"on_bad_row": "fail"}),
    "latin-1": f"text,label\n{GOOD_ROWS}café,a\n".encode("latin-1"),
    "cp932": f"text,label\n{GOOD_ROWS}日本語,a\n".encode("cp932"),
    "utf-16 without a mark": f"text,label\n{GOOD_ROWS}".encode("utf-16-le"),
    "cut utf-16": f"text,label\n{GOOD_ROWS}".encode("utf-16")[:-1], "binary": bytes(range(256)) * 40,
    "only empty texts": "text,label\n" + ",a\n,b\n" * 9, "only empty labels": "text,label\n" + "a,\n" * 9,
    "every row short": "text,label\n" + "a\n" * 9, "every row long": "text,label\n" + "a,b,c,d\n" * 9,
    "all one text": "text,label\n" + "same,a\nsame,b\n" * 9, "three documents": "text,label\na,x\nb,y\nc,x\nd,y\n" * 5,
    "no label that was given": ("text,label\n" + GOOD_ROWS, {"labels": ("x", "y")}),
    "a given label without rows": ("text,label\n" + GOOD_ROWS, {"labels": ("a", "b", "c")}),
    "group column missing": ("text,label\n" + GOOD_ROWS, {"group": "work"}),
    "one group": ("text,label,g\n" + GOOD_ROWS.replace("\n", ",same\n"), {"group": "g"}),
    "bad row to fail at": (f"text,label\n{GOOD_ROWS},a\n", {"on_bad_row": "fail"}),
    "unknown part": ("text,label,p\n" + GOOD_ROWS.replace("\n", ",later\n"), {"split": "p"}),
    "no label column asked for": ("text,label\n" + GOOD_ROWS, {"label": ""}),
    "text only of what no tokenizer takes": "text,label\n" + "\0,a\n\0,b\n" * 9,
    "nothing but a field": "x" * 300_000, "a line of dashes only": "---------\n",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_one_sentence_and_leaves_nothing(tmp_path, encoder, name):
    data, options = HOSTILE[name] if isinstance(HOSTILE[name], tuple) else (HOSTILE[name], {})
    table = tmp_path / "t.csv"
    table.write_bytes(data if isinstance(data, bytes) else data.encode())
    before = files(tmp_path)
    with pytest.raises(UserError) as raised:
        open_or_build(table, encoder, FOLDS, SPLIT, TableOptions(**options))
    assert "\n" not in str(raised.value)
    assert 20 < len(str(raised.value)) < 600
    assert files(tmp_path) == before


def test_a_table_that_changes_while_it_is_read_is_refused(table, encoder, monkeypatch):
    read = labelled_build.read_table

    def growing(path, options, repairs):
        yield from read(path, options, repairs)
        with open(path, "a", encoding="utf-8") as file:
            file.write("99,late,good,w\n")

    monkeypatch.setattr(labelled_build, "read_table", growing)
    with pytest.raises(UserError, match="changed while it was read"):
        open_or_build(table, encoder, FOLDS, SPLIT)
    assert sorted(files(table.parent)) == ["leanings.csv"]


def test_what_is_stored_is_the_hash_of_what_was_read_after_the_wait_for_another_process(table, encoder, monkeypatch):
    lock = labelled_build.only_builder

    @contextlib.contextmanager
    def changed_meanwhile(path):
        write_table(table, 66, seed=5)
        with lock(path):
            yield

    monkeypatch.setattr(labelled_build, "only_builder", changed_meanwhile)
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    assert made.meta()["num_documents"] == 66
    assert made.meta()["sha256"] == {"leanings.csv": file_sha256(table)}
    monkeypatch.undo()
    assert open_or_build(table, encoder, FOLDS, SPLIT).done[0].startswith("found")
    write_table(table)
    with pytest.raises(UserError, match="was made from"):
        open_or_build(table, encoder, FOLDS, SPLIT)


def test_settings_that_make_no_sense_are_refused_before_a_table_is_read(table, encoder, monkeypatch):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    before = dump(made.path)
    monkeypatch.setattr(labelled_build, "read_table", None)
    new = {"database": table.with_name("new.sqlite")}
    for more in ({}, new):
        with pytest.raises(UserError, match=r"sum to 1\.5"):
            open_or_build(table, encoder, FOLDS, SplitSettings(train=1.3), **more)
        with pytest.raises(UserError, match="no room for text"):
            open_or_build(table, encoder, FoldSettings(max_length=2), SplitSettings(seed=5), **more)
    assert dump(made.path) == before  # nothing is added unless all of it can be
    assert not new["database"].exists()


# ---- several processes, and death ----

DRIVER = """
import json, os, random, signal, sqlite3, sys, time
from pathlib import Path
from lmscripts.data.labelled_build import open_or_build
from lmscripts.data.splits import SplitSettings
from lmscripts.data.labelled_store import Database
from lmscripts.data.folding import FoldSettings
from lmscripts.tokenizer.encoder import load_encoder

task, table, tokenizer = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
encoder = load_encoder(tokenizer)
target = table.with_suffix(".sqlite")
FOLDS, LONGER, SPLIT = FoldSettings(max_length=32), FoldSettings(max_length=48), SplitSettings()

def child(folds, report=None, **more):
    process = os.fork()
    if not process:
        try:
            made = open_or_build(table, encoder, folds, SPLIT, **more)
            if report:
                report.write_text(made.done[0])
            os._exit(0)
        except BaseException as error:
            print("child:", repr(error), flush=True)
            os._exit(1)
    return process

def duration(folds):
    start = time.monotonic()
    assert os.waitpid(child(folds), 0)[1] == 0
    return time.monotonic() - start

def state():
    connection = sqlite3.connect(f"file:{target}?mode=ro", uri=True, timeout=300)
    counts = [connection.execute("SELECT count(*) FROM documents").fetchone()[0]]
    counts += [connection.execute("SELECT count(*) FROM split_members").fetchone()[0]]
    folds = connection.execute("SELECT tok_id, count(*), sum(length(ids)) FROM folds GROUP BY tok_id").fetchall()
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    return counts, folds
"""

TOGETHER = (
    DRIVER
    + """
def round_of(kill):
    reports = [table.with_name(f"report{n}") for n in range(3)]
    children = [child(FOLDS, report) for report in reports]
    if kill:
        building = target.with_name(f".{target.name}.building")
        while not building.exists():
            time.sleep(0.001)
        time.sleep(0.05)
        owner = None
        for number in children:  # the one that has the file open is the builder
            paths = [f"/proc/{number}/fd/{fd}" for fd in os.listdir(f"/proc/{number}/fd")]
            links = [os.path.realpath(path) for path in paths]  # one may be closed by now
            owner = number if str(building) in links else owner
        os.kill(owner, signal.SIGKILL)
    codes = [os.waitpid(number, 0)[1] for number in children]
    said = [report.read_text().split()[0] for report in reports if report.exists()]
    for report in reports:
        report.unlink(missing_ok=True)
    result = [sorted(codes), sorted(said), sorted(p.name for p in table.parent.iterdir()), state()]
    target.unlink()
    return result

print(json.dumps([round_of(False), round_of(True)]))
"""
)

KILLED_BUILDING = (
    DRIVER
    + """
moment, seen = random.Random(3), []
whole = duration(FOLDS)
expected = state()
target.unlink()
for number in range(12):
    process = child(FOLDS)
    time.sleep(whole * (number + moment.random()) / 11)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    if target.exists():
        assert state() == expected
        seen.append("whole")
        target.unlink()
    else:
        seen.append("nothing")
assert duration(FOLDS) and state() == expected
print(json.dumps([seen, sorted(p.name for p in table.parent.iterdir())]))
"""
)

KILLED_ADDING = (
    DRIVER
    + """
import shutil
moment, seen = random.Random(4), []
duration(FOLDS)
before = state()
copy = table.with_name("copy")
shutil.copy2(target, copy)
whole = duration(LONGER)
expected = state()
for number in range(12):
    shutil.copy2(copy, target)
    process = child(LONGER)
    # Half of the kills in the last tenth, where the file itself is written.
    share = 0.9 + 0.15 * moment.random() if number % 2 else moment.random()
    end = time.monotonic() + whole * share
    while time.monotonic() < end:  # readers see the old or the new
        made = Database(target, 2, 1).read_folds("train")
        assert len(made.doc_ids) == 0 or len(set(made.doc_ids)) > 100
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    rows = Database(target, 1, 1).read_folds("train")  # undoes what was left half done
    found = state()
    assert found in (before, expected), (found, before, expected)
    seen.append("old" if found == before else "new")
    journal = target.with_name(target.name + "-journal")
    journal.unlink(missing_ok=True)
shutil.copy2(copy, target)
copy.unlink()
assert duration(LONGER) and state() == expected
print(json.dumps([seen, sorted(p.name for p in table.parent.iterdir())]))
"""
)


def drive(program, tmp_path, tokenizer_dir, number):
    table = write_table(tmp_path / "t.csv", number)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, "task", str(table), str(tokenizer_dir)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_of_three_processes_one_builds_and_another_does_when_it_is_killed(tmp_path, tokenizer_dir):
    together, killed = drive(TOGETHER, tmp_path, tokenizer_dir, 900)
    codes, said, names, _ = together
    assert (codes, said) == ([0, 0, 0], ["built", "found", "found"])
    assert names == ["t.csv", "t.sqlite"]
    codes, said, names, state = killed
    assert (codes, said) == ([0, 0, 9], ["built", "found"])
    assert (names, state) == (["t.csv", "t.sqlite"], together[3])


@pytest.mark.slow
def test_a_builder_killed_at_any_moment_leaves_nothing_or_the_whole(tmp_path, tokenizer_dir):
    seen, names = drive(KILLED_BUILDING, tmp_path, tokenizer_dir, 1200)
    assert Counter(seen)["nothing"] >= 6
    assert names == ["t.csv", "t.sqlite"]


def test_one_killed_while_it_adds_leaves_the_old_or_the_new(tmp_path, tokenizer_dir):
    seen, names = drive(KILLED_ADDING, tmp_path, tokenizer_dir, 1200)
    assert Counter(seen)["old"] >= 5
    assert names == ["t.csv", "t.sqlite"]


def test_what_a_killed_writer_left_half_done_is_undone(table, encoder):
    """A transaction that has reached the file and its journal, but was never committed."""
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    before = dump(made.path)
    process = os.fork()
    if not process:
        connection = sqlite3.connect(made.path, isolation_level=None)
        connection.execute("PRAGMA cache_size = 2")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE documents SET text = text || 'spoilt' || hex(zeroblob(3000))")
        os._exit(9)
    os.waitpid(process, 0)
    journal = made.path.with_name("leanings.sqlite-journal")
    assert journal.stat().st_size > 0
    assert b"spoilt" in made.path.read_bytes()
    assert open_or_build(made.path, encoder, FOLDS, SPLIT).done[0].startswith("found")
    assert dump(made.path) == before
    assert not journal.exists()


@pytest.mark.parametrize("adding", [False, True])
def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(tmp_path, encoder, adding):
    table = write_table(tmp_path / "t.csv", 300)
    size = open_or_build(table, encoder, FOLDS, SPLIT).path.stat().st_size
    if not adding:
        database_of(table).unlink()
    before, report = files(tmp_path), tmp_path.with_name(f"{tmp_path.name}.report")
    process = os.fork()
    if not process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192 if adding else size - 8192, resource.RLIM_INFINITY))
        try:
            open_or_build(table, encoder, FoldSettings(max_length=16) if adding else FOLDS, SPLIT)
            said = "nothing"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        report.write_text(said)
        os._exit(0)
    os.waitpid(process, 0)
    assert report.read_text().startswith("UserError: ")
    assert "t.sqlite" in report.read_text()
    assert files(tmp_path) == before


def test_workers_end_when_their_builder_is_killed(tmp_path, tokenizer_dir):
    table = write_table(tmp_path / "t.csv", 3000)
    program = f"""
from lmscripts.data.labelled_build import open_or_build
from lmscripts.data.splits import SplitSettings
from lmscripts.data.folding import FoldSettings
if __name__ == "__main__":
    open_or_build({str(table)!r}, {str(tokenizer_dir)!r}, FoldSettings(max_length=32), SplitSettings(), num_workers=2)
"""
    (tmp_path / "build.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(tmp_path / "build.py")], env=environment)
    workers, deadline = [], time.monotonic() + PATIENCE
    while len(workers) < 3 and time.monotonic() < deadline:  # two workers and the tracker of resources
        workers = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert len(workers) == 3
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []
    assert not database_of(table).exists()


# ---- from the options of the script ----


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("model")
    encoder.tokenizer.save_pretrained(folder)
    BertConfig(vocab_size=encoder.vocab_size, max_position_embeddings=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_task(model_dir):
    """The script's own function, for a table and options by their names."""
    script = runpy.run_path(str(ROOT / "scripts" / "finetune_classifier.py"))

    def call(table, **changed):
        options = script["Options"](input_file=str(table), model_name_or_path=str(model_dir), max_length=32, **changed)
        return script["open_task"](options)

    return call


def test_what_an_sqlite_file_holds_is_checked_like_the_options(tmp_path, open_task):
    table = write_table(tmp_path / "t.csv", 40, labels=("a|b", "b", "a"))
    several = open_task(table, separator="|")
    for metric in ("mcc", "balanced_accuracy"):
        with pytest.raises(UserError, match=f"--metric {metric} is for one label a row"):
            open_task(several.database.path, metric=(metric,))
    part = tmp_path / "p.csv"
    lines = [f"sentence {n},{'ab'[n % 2]},{('train', 'train', 'test')[n % 3]}" for n in range(60)]
    part.write_text("text,label,part\n" + "\n".join(lines), encoding="utf-8")
    task = open_task(part, split_column="part", validation_share=0.2)
    again = open_task(task.database.path, validation_share=0.2)
    assert (again.database.split, again.database.split_id) == (task.database.split, task.database.split_id)
    assert len(again.database.read_labels("validation")[0]) == 8
    assert any("were given their parts" in line for line in again.database.sentences())
    with pytest.raises(UserError, match=r"leave out --train_share 0\.1 and --test_share 0\.8"):
        open_task(task.database.path, train_share=0.1, test_share=0.8)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"split_column": "part", "train_share": 0.1, "test_share": 0.8}, "--train_share 0.1 and --test_share 0.8"),
        ({"test_file": "x.csv", "test_share": 0.2}, "leave out --test_share 0.2"),
        ({"validation_file": "x.csv", "validation_share": 0.3}, "leave out --validation_share 0.3"),
        ({"split_column": "part", "validation_share": 0.3}, ""),
        ({"train_share": 0.7, "test_share": 0.2}, ""),
    ],
)
def test_shares_beside_given_parts_are_refused(changed, said):
    options = runpy.run_path(str(ROOT / "scripts" / "finetune_classifier.py"))["Options"]
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        options(input_file="t.csv", model_name_or_path="m", **changed)


def test_a_log_is_never_written_into_a_table_or_found_impossible_at_the_end(table, open_task, monkeypatch):
    monkeypatch.chdir(table.parent)
    other, before = write_table(table.with_name("v.csv"), 9), files(table.parent)
    for logfile, said in (
        (table, "table or database"),
        ("leanings.sqlite", "table or database"),
        ("v.csv", "table or database"),
        ("mine.db", "table or database"),
        ("nodir/x.log", "no folder nodir"),
        (table.parent, "is a folder"),
    ):
        changed = {"logfile": str(logfile), "validation_file": str(other), "database": "mine.db"}
        with pytest.raises(UserError, match=f"--logfile .*{said}"):
            open_task(table, **changed)
        assert files(table.parent) == before
    assert open_task(table, logfile="x.log").database.labels() == ["bad", "good"]


def test_labels_are_shown_bounded_and_without_control_characters(tmp_path, open_task):
    labels = ["a\nb\x1b[31m", "x" * 5000, *(f"name {n}" for n in range(40))]
    table = write_table(tmp_path / "t.csv", 42 * 4, labels=labels, extra=[("1", "text", "", "")])
    task = open_task(table)
    assert sorted(task.database.labels()) == sorted(labels)
    said = task.database.sentences()
    assert all(line.isprintable() and len(line) < 2000 for line in said)
    assert "left out 1 rows, empty label: t.csv:" in "\n".join(said)
    assert any("42 labels" in line and "and 22 more" in line for line in said)


def test_what_a_table_says_of_its_labels_and_bad_rows_is_said_whole(tmp_path, open_task):
    rows = [(f"x{n}", f"text {n}", label, "") for n, label in enumerate(["Bad", "bad\u200b"] * 4)]
    rows += [("s", "a", "b", "c", "d")]
    said = open_task(write_table(tmp_path / "t.csv", 40, extra=rows)).database.sentences()
    place = len((tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()) + 1 - len(rows)
    (beware,) = [line for line in said if line.startswith("beware: '")]
    assert f"'Bad' (4 rows, first t.csv:{place}, U+0042)" in beware
    assert f"'bad\\u200b' (4 rows, first t.csv:{place + 1}, U+0062, U+200B)" in beware
    (left_out,) = [line for line in said if line.startswith("left out")]
    assert left_out.endswith("(the first: 5 where the header has 4; a text with ',' in it must stand in quotes)")
    lists = write_table(tmp_path / "l.csv", 40, labels=("['x', 'y']", "['y']"))
    with pytest.raises(UserError, match=r"no row that can be used; .*l\.csv:2: .*'x', 'y'.*--separator"):
        open_task(lists)


def test_a_label_that_only_the_test_table_has_is_named_with_its_line(tmp_path, open_task):
    table, test = write_table(tmp_path / "t.csv", 40), write_table(tmp_path / "e.csv", 9, labels=("good", "bad", "odd"))
    with pytest.raises(UserError, match=r"1 of 3 labels .*'odd' \(3, first e\.csv:\d+\).*--labels"):
        open_task(table, test_file=str(test))
    task = open_task(table, test_file=str(test), labels=("bad", "good"))
    assert "left out 3 rows, unknown label: e.csv:" in "\n".join(task.database.sentences())


def test_a_column_for_each_label_is_a_task_with_several_labels(tmp_path, open_task):
    rows = [(f"text {n}", n % 2, int(n % 3 == 0), "true") for n in range(30)]
    with open(tmp_path / "t.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "odd", "third", "all"), *rows])
    task = open_task(tmp_path / "t.csv", label_columns=("third", "odd", "all"))
    assert (task.multi_label, task.database.labels()) == (True, ["third", "odd", "all"])
    truth = dict(zip(*(found.tolist() for found in task.database.read_labels("train"))))
    assert all(flags == [n % 3 == 0, n % 2 == 1, True] for n, flags in truth.items())
    again = open_task(task.database.path)
    assert (again.multi_label, again.meta["options"]["label_columns"]) == (True, ["third", "odd", "all"])


# ---- runs ----


def test_what_a_run_gives_comes_back(table, encoder):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    options = {"learning_rate": 1e-4, "name": "日本"}
    run = made.start_run("first", options, {"parameters": 5}, model_dir=table.parent / "m")
    other = made.start_run("second", {}, {}, model_dir="m")
    made.write_epoch(run, 1, 10, "validation", {"loss": 0.5, "accuracy": np.float32(0.25)})
    made.write_epoch(run, 1, 12, "validation", {"loss": 0.4})  # repeated after a resume
    made.write_epoch(run, 2, 20, "validation", {"loss": float("nan")})
    sql = "SELECT epoch, step, part, metric, value FROM epochs WHERE run_id = ? ORDER BY epoch, metric"
    assert query(made.path, sql, run.run_id) == [
        (1, 10, "validation", "accuracy", 0.25),
        (1, 12, "validation", "loss", 0.4),
        (2, 20, "validation", "loss", None),
    ]
    probabilities, logits = np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([[-1.0, 1.0], [0.0, 0.0]])
    made.write_predictions(run, "test", "document", [3, 4], None, probabilities, logits)
    made.write_predictions(run, "test", "fragment", np.array([3, 3]), np.array([0, 1]), probabilities, logits)
    made.write_predictions(other, "test", "document", [3], None, probabilities[:1], logits[:1])
    sql = "SELECT doc_id, fold_idx, probabilities, logits FROM predictions WHERE run_id = ? AND level = ?"
    stored = query(made.path, sql, run.run_id, "document")
    assert [row[:2] for row in stored] == [(3, -1), (4, -1)]
    assert np.array_equal(np.frombuffer(stored[0][2], "<f4"), probabilities[0])
    assert [row[:2] for row in query(made.path, sql, run.run_id, "fragment")] == [(3, 0), (3, 1)]
    made.write_test_metrics(run, "document", {"accuracy": 0.9})
    made.end_run(run, "done", {"seconds": 3})
    sql = "SELECT name, options, facts, status, ended > started FROM runs WHERE run_id = ?"
    (row,) = query(made.path, sql, run.run_id)
    facts = {"seconds": 3, "key": run.key}
    assert (row[0], json.loads(row[1]), json.loads(row[2]), *row[3:]) == ("first", options, facts, "done", 1)
    assert query(made.path, "SELECT status FROM runs WHERE run_id = ?", other.run_id) == [("running",)]
    records = made.read_runs()
    assert [(each["name"], each["options"], each["status"]) for each in records] == [
        ("first", options, "done"),
        ("second", {}, "running"),
    ]
    assert (records[0]["folding"]["max_length"], records[0]["split"]["seed"]) == (32, 1)
    assert [each["value"] for each in made.read_epochs(run.run_id)] == [0.25, 0.4, None]
    assert made.read_test_metrics(run.run_id) == {("document", "accuracy"): 0.9}
    assert [row[:2] for row in made.read_predictions(run.run_id, "test", "fragment")] == [(3, 0), (3, 1)]
    assert made.read_document(3)["text"] == made.read_texts([3])[0]
    assert made.read_document(3)["spans"][0][0] == 0
    with pytest.raises(ValueError, match="longer"):
        made.write_predictions(run, "test", "document", [3], None, probabilities, logits)
    again = open_or_build(table, encoder, FoldSettings(max_length=20), SPLIT)
    assert query(again.path, "SELECT count(*) FROM predictions") == [(5,)]


def test_nothing_is_written_into_the_entry_of_another_run(table, encoder):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    origin, about = made.origin(), {"model_dir": "m"}
    run = made.start_run("A", {}, {}, **about, origin=origin)
    made.path.unlink()
    write_table(table, 66)
    again = open_or_build(table, encoder, FOLDS, SPLIT)
    assert again.start_run("B", {}, {}, **about).run_id == run.run_id
    before, shares = dump(made.path), np.ones((1, 2))
    for write in (
        lambda: made.write_epoch(run, 1, 10, "train", {"loss": 0.5}),
        lambda: made.write_test_metrics(run, "document", {"accuracy": 0.9}),
        lambda: made.write_predictions(run, "test", "document", [3], None, shares, shares),
        lambda: made.end_run(run, "done", {}),
        lambda: made.read_places(run),
    ):
        with pytest.raises(UserError, match=r"leanings\.sqlite was built again since run 1 .*--do_continue"):
            write()
    assert not made.go_on_with_run(run)
    with pytest.raises(UserError, match="was built again while this run was about to begin"):
        made.start_run("A", {}, {}, **about, origin=origin)
    assert dump(made.path) == before


@pytest.mark.parametrize("swapped", ["tokenization", "split"])
def test_a_run_does_not_begin_with_another_tokenization_or_split_of_its_number(table, encoder, swapped):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    origin = made.origin()
    made.path.unlink()
    folds, split = (FoldSettings(max_length=20), SPLIT) if swapped == "tokenization" else (FOLDS, SplitSettings(seed=9))
    open_or_build(table, encoder, folds, split)
    open_or_build(table, encoder, FOLDS, SPLIT)
    with pytest.raises(UserError, match="about to begin"):
        made.start_run("A", {}, {}, model_dir="m", origin=origin)


def run_elsewhere(made, name, folder, *, wait=False):
    """Enter a run in a process of its own, which then waits or dies without a word; returns its number."""
    told, tell = os.pipe()
    process = os.fork()
    if not process:
        made.start_run(name, {}, {}, model_dir=folder)
        os.write(tell, b"!")
        if wait:
            time.sleep(600)
        os._exit(9)
    os.read(told, 1)
    if not wait:
        os.waitpid(process, 0)
    return process


def test_a_run_whose_process_is_gone_was_killed_and_holds_nobody_up(table, encoder):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    run_elsewhere(made, "r1", "mine")
    run_elsewhere(made, "r2", "others")
    third = made.start_run("r3", {}, {}, model_dir="mine")
    fourth = made.start_run("again", {}, {}, model_dir="mine")
    states = [status for (status,) in query(made.path, "SELECT status FROM runs ORDER BY run_id")]
    assert states == ["killed", "running", "running", "running"]  # the third is of this process, which lives

    write_table(table, 66)
    with pytest.raises(UserError, match="run 3"):
        open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True)
    for run in (third, fourth):
        made.end_run(run, "stopped")
    process = run_elsewhere(made, "r5", "elsewhere", wait=True)
    with pytest.raises(UserError, match=r"run 5 \(r5\) is training with .*wait"):
        open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True).meta()["num_documents"] == 66
    assert sorted(files(table.parent)) == ["leanings.csv", "leanings.sqlite"]


def test_a_run_goes_on_in_one_process_at_a_time(table, encoder):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    run = made.start_run("r", {}, {}, model_dir="m")
    process = os.fork()
    if not process:
        with contextlib.suppress(UserError):
            labelled_store._runs_here.clear()  # as in a process that knows nothing of this one
            made.go_on_with_run(run)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    made.end_run(run, "stopped")
    assert made.go_on_with_run(run)
    assert query(made.path, "SELECT status, ended FROM runs") == [("running", None)]
    made.end_run(run, "done")


def leave_a_log(path):
    """What a tool leaves that opens a file in WAL mode, changes all texts in it and is killed."""
    process = os.fork()
    if not process:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute("UPDATE documents SET text = 'old ' || text")
        os._exit(9)
    os.waitpid(process, 0)
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0


@pytest.mark.parametrize("removed", [False, True])
def test_what_another_program_left_beside_a_file_is_not_played_back_into_the_new_one(table, encoder, removed):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    leave_a_log(made.path)
    if removed:
        made.path.unlink()
    write_table(table, 66, seed=5)
    fresh = open_or_build(table, encoder, FOLDS, SPLIT, database=table.with_name("fresh.sqlite"))
    again = open_or_build(table, encoder, FOLDS, SPLIT, overwrite=not removed)
    assert dump(again.path) == dump(fresh.path)
    assert sorted(files(table.parent)) == ["fresh.sqlite", "leanings.csv", "leanings.sqlite"]


def test_the_old_file_is_whole_until_the_new_one_takes_its_place(table, encoder, monkeypatch):
    """Also one whose last changes are still beside it: they must not go before it goes."""
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    leave_a_log(made.path)
    expected = made.read_texts(range(60))
    assert all(text.startswith("old ") for text in expected)
    write_table(table, 66, seed=5)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True)
    assert made.read_texts(range(60)) == expected


def test_a_new_file_is_read_again_and_compared_with_what_was_written(table, encoder, monkeypatch):
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    leave_a_log(made.path)
    monkeypatch.setattr(labelled_store, "_remove_side_files", lambda path: None)
    write_table(table, 66, seed=5)
    with pytest.raises(UserError, match=r"not what was just written|truncated or damaged"):
        open_or_build(table, encoder, FOLDS, SPLIT, overwrite=True)


@pytest.mark.parametrize("kind", ["EXCLUSIVE", "IMMEDIATE"])
def test_a_file_that_another_program_holds_is_a_sentence_within_seconds(table, encoder, monkeypatch, kind):
    """Nothing is written then; results of a run that has begun wait longer."""
    made = open_or_build(table, encoder, FOLDS, SPLIT)
    run = made.start_run("r", {}, {}, model_dir="m")
    before, other = files(table.parent), {"max_length": 16}
    monkeypatch.setattr(labelled_store, "_BUSY_SECONDS", 0.2)
    monkeypatch.setattr(labelled_store, "_PATIENT_SECONDS", 10_000.0)  # longer than a test may take
    with contextlib.closing(sqlite3.connect(made.path, isolation_level=None)) as connection:
        connection.execute(f"BEGIN {kind}")
        for settings, more in ((FOLDS, {}), (replace(FOLDS, **other), {}), (FOLDS, {"overwrite": True})):
            if kind == "EXCLUSIVE" or settings != FOLDS:
                with pytest.raises(UserError, match=r"leanings\.sqlite cannot be used now .*another program"):
                    open_or_build(table, encoder, settings, SPLIT, **more)
        monkeypatch.setattr(labelled_store, "_PATIENT_SECONDS", 2.0)
        start = time.monotonic()
        with pytest.raises(UserError, match="another program"):
            made.write_epoch(run, 1, 1, "train", {"loss": 1.0})
        assert time.monotonic() - start > 1.9
        connection.execute("ROLLBACK")
    made.end_run(run, "done")
    assert files(table.parent).keys() >= before.keys() - {path for path in before if path.endswith(".lock")}


def test_what_a_killed_builder_left_goes_and_what_a_living_one_needs_stays(table, encoder):
    open_or_build(table, encoder, FOLDS, SPLIT)
    clean = files(table.parent)
    left = [table.with_name(f".leanings.sqlite.{end}") for end in ("lock", "building", "0123456789abcdef.lock")]
    for path in left:
        path.touch()
    with open(left[0], encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_or_build(table, encoder, FOLDS, SPLIT)
        assert [path.exists() for path in left] == [True, True, False]
    open_or_build(table, encoder, FOLDS, SPLIT)
    assert files(table.parent) == clean


def test_ids_that_stand_twice_and_texts_that_are_no_texts_to_others_are_told(tmp_path, encoder):
    extra = [("7", "nan", "good", "x1"), ("8", "N/A", "bad", "x2"), ("7", "もう一つの文章です。", "bad", "x3")]
    table = write_table(tmp_path / "t.csv", extra=extra)
    options = TableOptions(id="id")
    said = open_or_build(table, encoder, FOLDS, SPLIT, table=options).sentences()
    assert any(line.startswith("beware: 2 ids stand in several rows each, first 7 in 3, t.csv:") for line in said)
    (line,) = [line for line in said if "missing value, first" in line]
    assert line.startswith("beware: 2 texts are words for a missing value, first nan at t.csv:")
    plain = open_or_build(write_table(tmp_path / "p.csv"), encoder, FOLDS, SPLIT, table=options).sentences()
    assert not any("several rows" in line or "missing value" in line for line in plain)
