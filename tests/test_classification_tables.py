"""Labelled tables: every format and oddity read right, every bad row counted with its line, never a row lost unseen."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from lmscripts.classification.records import BadRow, TableOptions
from lmscripts.classification.tables import check_classes, order_labels, read_table
from lmscripts.errors import UserError

ROWS = [
    ("今日は晴れ、散歩した。", "good"),
    ('He said "no",\nand left.', "bad"),
    ("  padded  ", "good"),
    ("x\ty;z|w", "bad"),
]
CLEAN = [(text.strip(), label) for text, label in ROWS]
DOCUMENT = """text,                          label
-------------------------------------
Beat my Republican opponent!  ,left
Democrats want you to...      ,right
Buy this toothpaste!...       ,neutral
"Beat my Republican opponent! She will remove stop signs from your neighborhood.", left
"""


def read(path, **options):
    """(good rows as (text, labels), bad rows as (line, reason), repairs)."""
    repairs = Counter()
    rows = list(read_table(path, TableOptions(**options), repairs))
    good = [(row.text, row.labels) for row in rows if not isinstance(row, BadRow)]
    return good, [(row.line, row.reason) for row in rows if isinstance(row, BadRow)], repairs


def csv_text(rows, delimiter=",", header=("text", "label"), end="\r\n"):
    import io

    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=end).writerows([header, *rows])
    return file.getvalue()


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_delimiters_encodings_and_line_ends_are_found(tmp_path, delimiter, encoding, end):
    path = write(tmp_path / "t.csv", csv_text(ROWS, delimiter, end=end).encode(encoding))
    good, bad, _ = read(path)
    assert (good, bad) == ([(text, (label,)) for text, label in CLEAN], [])


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_formats_and_compressions(tmp_path, kind, packed):
    import zstandard

    plain = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"label": [b for _, b in ROWS], "text": [a for a, _ in ROWS]}), plain)
    elif kind == "jsonl":
        plain.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in ROWS))
    else:
        plain.write_text(csv_text(ROWS, "," if kind == "csv" else "\t"), newline="")
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
    path = write(tmp_path / f"u.{kind}{packed}", pack[packed](plain.read_bytes()))
    assert read(path)[:2] == ([(text, (label,)) for text, label in CLEAN], [])


def test_the_table_of_the_document(tmp_path):
    good, bad, repairs = read(write(tmp_path / "leanings.csv", DOCUMENT))
    assert [labels for _, labels in good] == [("left",), ("right",), ("neutral",), ("left",)]
    assert good[0][0] == "Beat my Republican opponent!"
    assert good[3][0].endswith("from your neighborhood.")
    assert (bad, repairs["lines_of_dashes"]) == ([], 1)


def test_the_given_encoding_is_taken(tmp_path):
    for encoding in ("cp932", "euc-jp", "utf-16-le"):
        path = write(tmp_path / "t.csv", csv_text(ROWS[:2]).encode(encoding))
        assert read(path, encoding=encoding)[0] == [(text, (label,)) for text, label in CLEAN[:2]]


def test_further_columns_and_several_labels(tmp_path):
    header = ("id", "text", "label", "work", "part")
    rows = [("7", "a", "x | y|x", "w1", "Dev"), ("8", "b", "|y|", "", "training"), ("", "c", "z", "w1", "TEST")]
    path = write(tmp_path / "t.csv", csv_text(rows, header=header))
    found = list(read_table(path, TableOptions(id="id", group="work", split="part", separator="|")))
    assert [row.labels for row in found] == [("x", "y"), ("y",), ("z",)]
    assert [(row.name, row.group, row.part) for row in found] == [
        ("7", "w1", "validation"),
        ("8", None, "train"),
        (None, "w1", "test"),
    ]
    path = write(tmp_path / "t.jsonl", '{"text": "a", "label": ["x", "y"]}\n{"text": "b", "label": 3}\n')
    assert read(path, separator="|")[0] == [("a", ("x", "y")), ("b", ("3",))]
    assert read(path)[1] == [(1, "label of the wrong kind")]


def test_line_numbers_are_those_of_an_editor_also_behind_quoted_line_ends(tmp_path):
    text = 'text,label\n"one\ntwo\nthree",a\n\nshort\n"x\r\ny",b\n,a\nlong,a,c,d\nfine,b,,\n'
    good, bad, _ = read(write(tmp_path / "t.csv", text))
    assert [text for text, _ in good] == ["one\ntwo\nthree", "x\r\ny", "fine"]
    assert bad == [(6, "too few fields"), (9, "empty text"), (10, "too many fields")]


@pytest.mark.parametrize(
    ("line", "reason", "options"),
    [
        ("t,maybe", "unknown label", {"labels": ("a", "b")}),
        ("t,1.0", "unknown label", {"labels": ("0", "1")}),
        (" \u3000 ,a", "empty text", {}),
        ("t,  ", "empty label", {}),
        ("t, | ", "empty label", {"separator": "|"}),
        ("t", "too few fields", {}),
        ("t,a,b", "too many fields", {}),
        (b"caf\xe9,a", "cannot be decoded", {"encoding": "utf-8"}),
    ],
)
def test_bad_rows_are_counted_or_stop_everything(tmp_path, line, reason, options):
    line = line if isinstance(line, bytes) else line.encode()
    last = b"last,%s\n" % (options.get("labels", ["a"])[0]).encode()
    path = write(tmp_path / "t.csv", b"text,label\n" + last + line + b"\n" + last)
    good, bad, _ = read(path, **options)
    assert (len(good), bad) == (2, [(3, reason)])
    with pytest.raises(UserError, match=rf"t\.csv:3: {reason}") as raised:
        read(path, on_bad_row="fail", **options)
    assert "\n" not in str(raised.value)


def test_a_part_that_is_none_is_a_bad_row(tmp_path):
    path = write(tmp_path / "t.csv", "text,label,part\na,x,train\nb,x,holdout\n")
    assert read(path, split="part")[1] == [(3, "unknown part")]


def test_json_records_that_are_none(tmp_path):
    lines = ['{"text": "a", "label": "x"}', "{", "[1]", '{"label": "x"}', '{"text": 5, "label": "x"}', "",
             '{"text": "half \\ud800 and \\u0000", "label": true}', "[" * 100_000]  # fmt: skip
    good, bad, repairs = read(write(tmp_path / "t.jsonl", "\n".join(lines)))
    assert good == [("a", ("x",)), ("half \ufffd and", ("true",))]
    assert [line for line, _ in bad] == [2, 3, 4, 5, 8]
    assert (repairs["nul_characters"], repairs["half_characters"]) == (1, 1)


def test_nul_and_fields_beyond_the_limit_of_csv(tmp_path):
    huge = "語" * 200_000
    good, bad, repairs = read(write(tmp_path / "t.csv", f"text,label\na\0b,x\n{huge},y\n"))
    assert good == [("ab", ("x",)), (huge, ("y",))]
    assert (bad, repairs["nul_characters"]) == ([], 1)


@pytest.mark.parametrize(
    ("name", "data", "options", "said"),
    [
        ("missing.csv", None, {}, "does not exist"),
        ("t.csv", b"", {}, "is empty"),
        ("t.csv", b"\n\n  \n", {}, "is empty"),
        ("t.csv", "txt,label\na,b\n", {}, r"no column 'text'.*did you mean 'txt'\?.*--text"),
        ("t.csv", "text,labels\na,b\n", {}, r"no column 'label'.*did you mean 'labels'\?"),
        ("t.csv", "text,label,text\na,b,c\n", {}, "'text' more than once"),
        ("t.csv", 'text,label\n"never closed,a\nb,c\nd,e\n', {}, r"t\.csv:2: the quote .* line 4"),
        ("t.csv", b"text,label\ncaf\xe9,a\n", {}, r"t\.csv:2: byte 4 of the line is 0xE9.*--encoding"),
        ("t.csv", csv_text(ROWS).encode("cp932"), {}, r"--encoding with .*cp932"),
        ("t.csv", csv_text(ROWS).encode("utf-16-le"), {}, "utf-16-le"),
        ("t.csv", csv_text(ROWS).encode("utf-16")[:-1], {}, "is not utf-16"),
        ("t.txt", "text,label\na,b\n", {}, r"end in \.csv"),
        ("t.csv", "text,label\na,b\n", {"encoding": "klingon"}, "no encoding 'klingon'"),
        ("t.csv", "text,label\na,b\n", {"delimiter": ",,"}, "one character"),
        ("t.csv", "text,label\na,b\n", {"labels": ("a", "a")}, "must differ"),
        ("t.csv", "text,label\na,b\n", {"label": "text"}, "columns of their own"),
        ("t.csv.gz", gzip.compress(b"text,label\n" + os.urandom(9999))[:-40], {"encoding": "latin-1"}, "damaged"),
        ("t.parquet", b"PAR1 is not enough", {}, "not a parquet file"),
        ("t.jsonl", '{"body": "a", "label": "b"}\n', {}, "no column 'text'"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_sentence(tmp_path, name, data, options, said):
    path = tmp_path / name
    if data is not None:
        write(path, data)
    with pytest.raises(UserError, match=said) as raised:
        read(path, **options)
    assert "\n" not in str(raised.value)
    assert name in str(raised.value) or options


def test_quotes_may_mean_nothing(tmp_path):
    path = write(tmp_path / "t.tsv", 'text\tlabel\n"never closed\ta\nb\tc\n')
    assert read(path, quotes=False)[0] == [('"never closed', ("a",)), ("b", ("c",))]


def test_labels_are_ordered():
    assert order_labels(Counter(b=1, a=2), TableOptions()) == ["a", "b"]
    assert order_labels(Counter({"10": 1, "9": 1, "-1": 1}), TableOptions()) == ["-1", "9", "10"]
    assert order_labels(Counter({"10": 1, "9": 1, "x": 1}), TableOptions()) == ["10", "9", "x"]
    assert order_labels(Counter(b=1, a=2), TableOptions(labels=("b", "a"))) == ["b", "a"]


@pytest.mark.parametrize(
    ("counts", "number", "said"),
    [
        ({}, 0, "no row that can be used; left out: 3 x unknown label"),
        ({"a": 5}, 5, "every row .* 'a'"),
        ({"a": 5, "b": 0}, 5, "every row .* 'a'"),
        ({"a": 5, "b": 1, "c": 2}, 8, r"fewer than 2 rows: 'b' \(1\)"),
    ],
)
def test_tables_from_which_nothing_can_be_learnt(counts, number, said):
    with pytest.raises(UserError, match=said):
        check_classes("t.csv", Counter(counts), number, Counter({"unknown label": 3}), "label")


def test_memory_does_not_grow_with_the_table(tmp_path):
    """Reading twenty times as many rows takes no more memory."""
    program = """
import sys
from lmscripts.classification.records import TableOptions
from lmscripts.classification.tables import read_table
number = sum(1 for _ in read_table(sys.argv[1], TableOptions()))
# Not ru_maxrss, which begins with what the parent held.
print(number, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    peaks = []
    for number in (2_000, 40_000):
        path = write(tmp_path / f"{number}.csv", "text,label\n" + ("some words " * 60 + ",a\n") * number)
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        rows, peak = map(int, done.stdout.split())
        assert rows == number
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 8_000  # KiB; the larger table has 26 MB
