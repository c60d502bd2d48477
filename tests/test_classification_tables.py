"""Labelled tables: every format and oddity read right, every bad row counted with its line, never a row lost unseen."""

import bz2
import csv
import encodings.aliases
import gzip
import io
import json
import lzma
import math
import random
import re
import subprocess
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, cpu_seconds_below

from lmscripts.errors import UserError
from lmscripts.text.csv_rows import csv_rows
from lmscripts.text.labels import check_classes, doubts, in_words, items_of, order_labels, quoted
from lmscripts.text.records import BadRow, TableOptions, read_table

NOISE = random.Random(0).randbytes(999)

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


def test_a_line_of_excel_names_the_delimiter(tmp_path):
    path = write(tmp_path / "t.csv", "sep=;\r\ntext;label\r\na,b;x\r\n;y\r\n")
    assert read(path)[:2] == ([("a,b", ("x",))], [(4, "empty text")])


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
        ('"No" means no,a', "stray quote", {}),
        ('"never closed,a', "stray quote", {}),
        ("t", "too few fields", {}),
        ("t,a,b", "too many fields", {}),
        (" text ,label", "header repeated", {}),
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


@pytest.mark.parametrize("on_bad_row", ["skip", "fail"])
def test_with_several_labels_an_empty_cell_is_an_answer_and_a_missing_one_is_none(tmp_path, on_bad_row):
    path = write(tmp_path / "t.csv", "text,label\none,x|y\nnone,\nnor this, | \n")
    assert read(path, separator="|", on_bad_row=on_bad_row)[:2] == (
        [("one", ("x", "y")), ("none", ()), ("nor this", ())],
        [],
    )
    rows = [{"text": "a", "label": []}, {"text": "b", "label": ""}, {"text": "c", "label": [" "]}]
    missing = [{"text": "d", "label": None}, {"text": "e"}, {"text": "f", "label": math.nan}]
    path = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, [*rows, *missing])))
    good, bad, _ = read(path, separator="|")
    assert good == [("a", ()), ("b", ()), ("c", ())]
    assert bad == [(4, "empty label"), (5, "empty label"), (6, "empty label")]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [[], None]}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", separator="|")[:2] == ([("a", ())], [(2, "empty label")])
    path = write(tmp_path / "short.csv", "text,label\none,x\nno cell\n")
    assert read(path, separator="|")[1] == [(3, "too few fields")]


def test_what_is_missing_or_no_text_never_becomes_a_label_or_a_group(tmp_path):
    """NaN is no value; bytes, and lists with holes or lists in them, are no labels; an element is one label."""
    nan, path = math.nan, tmp_path / "t.parquet"
    groups = pyarrow.array([nan, 1.5, nan, None], pyarrow.float64())
    table = {"text": list("abcd"), "label": [1.0, nan, 0.0, None], "group": groups}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    found = list(read_table(path, TableOptions(group="group")))
    assert [(row.labels, row.group) for row in found if not isinstance(row, BadRow)] == [
        (("1.0",), None),
        (("0.0",), None),
    ]
    assert [(row.line, row.reason) for row in found if isinstance(row, BadRow)] == [
        (2, "empty label"),
        (4, "empty label"),
    ]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [b"x", None], "id": [b"7", b"8"]}), path)
    assert read(path)[:2] == ([], [(1, "label of the wrong kind"), (2, "empty label")])
    assert read(path, separator="|")[1][0] == (1, "label of the wrong kind")
    assert read(path, id="id", label="")[1] == [(1, "id of the wrong kind"), (2, "id of the wrong kind")]
    labels = [
        ["a|x", "b"],
        ["a", None],
        ["a", nan],
        ["a", ["b"]],
        ["a", {}],
        {"a": 1},
        [1, True, " a "],
        ["a", "", "a"],
    ]
    lines = [json.dumps({"text": "t", "label": label}) for label in labels]
    good, bad, _ = read(write(tmp_path / "t.jsonl", "\n".join(lines)), separator="|")
    assert [labels for _, labels in good] == [("a|x", "b"), ("1", "true", "a"), ("a",)]
    assert bad == [(line, "label of the wrong kind") for line in range(2, 7)]
    lines = ['{"text": NaN, "label": "x"}', '{"text": "t", "label": NaN}', '{"text": "t", "label": ["x"]}']
    bad = read(write(tmp_path / "t.jsonl", "\n".join(lines)))[1]
    assert bad == [(1, "empty text"), (2, "empty label"), (3, "label of the wrong kind")]


def test_columns_without_a_name_at_the_end_may_be_missing(tmp_path):
    text = "text,label,, \nx,a\ny,b,\nz,a,note,other\nw\nv,a,,,more\n"
    good, bad, _ = read(write(tmp_path / "t.csv", text))
    assert good == [("x", ("a",)), ("y", ("b",)), ("z", ("a",))]
    assert bad == [(5, "too few fields"), (6, "too many fields")]


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
        ("t.csv", 'text,"label\na,b\nc,d\n', {}, r"t\.csv:1: the quote .* line 3;.*--no_quotes.*header"),
        ("t.csv", b"text,label\ncaf\xe9,a\n", {}, r"t\.csv:2: byte 4 of the line is 0xE9.*--encoding"),
        ("t.csv", csv_text(ROWS).encode("cp932"), {}, r"--encoding with .*cp932"),
        ("t.csv", csv_text(ROWS).encode("utf-16-le"), {}, "utf-16-le"),
        ("t.csv", csv_text(ROWS).encode("utf-16")[:-1], {}, "is not utf-16"),
        ("t.txt", "text,label\na,b\n", {}, r"end in \.csv"),
        ("t.csv", "text,label\na,b\n", {"encoding": "klingon"}, "no encoding of text 'klingon'"),
        ("t.csv", "text,label\na,b\n", {"encoding": "a\0b"}, "no encoding of text"),
        ("t.csv", "text,label\na,b\n", {"delimiter": ",,"}, "one character"),
        ("t.csv", "text,label\na,b\n", {"labels": ("a", "a")}, "must differ"),
        ("t.csv", "text,label\na,b\n", {"label": "text"}, "columns of their own"),
        (
            "t.csv.gz",
            gzip.compress(b"text,label\n" + random.Random(0).randbytes(999), mtime=0)[:-40],
            {"encoding": "latin-1"},
            "damaged",
        ),
        ("t.parquet", b"PAR1 is not enough", {}, "not a parquet file"),
        ("t.jsonl", '{"body": "a", "label": "b"}\n', {}, "no column 'text'"),
        ("t.jsonl", '[{"text": "a", "label": "b"}]\n', {}, "is one JSON array"),
        ("t.csv", b"PK\x03\x04 is a workbook", {}, "is an office file"),
        ("t.csv", "sep=;\n", {}, "is empty"),
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


def test_every_encoding_reads_a_table_or_is_refused_in_a_sentence(tmp_path):
    """Python knows codecs that turn bytes into bytes, and others without a use here; none may end in a traceback."""
    path, refused = write(tmp_path / "t.csv", "text,label\na,b\n"), {}
    for encoding in sorted({*encodings.aliases.aliases.values(), "idna", "punycode", "undefined", "unicode_escape"}):
        try:
            read(path, encoding=encoding)
        except UserError as error:
            refused[encoding] = str(error)
    assert max(map(len, refused.values())) < 500
    assert {"hex_codec", "rot_13", "base64_codec", "zlib_codec", "bz2_codec", "utf_16"} <= set(refused)
    assert not set(refused) & {"utf_8", "latin_1", "cp932", "euc_jp", "cp1252", "koi8_r", "gb18030"}


def test_messages_stay_short_and_on_one_line_whatever_the_labels_are(tmp_path):
    huge = [f"{letter}\n\x1b[31m{letter}" * 100_000 for letter in "abcdefgh"]
    many = tuple(f"label {number}" for number in range(5000))
    reasons = Counter({"unknown label": 3})
    with pytest.raises(UserError, match="and 3 more") as few:
        check_classes("t.csv", Counter(huge), 8, reasons, "label")
    with pytest.raises(UserError, match="every row") as one:
        check_classes("t.csv", Counter({huge[0]: 9}), 9, reasons, "label")
    path = write(tmp_path / "t.jsonl", json.dumps({"text": "t", "label": huge[0], "part": huge[1]}))
    with pytest.raises(UserError, match=r"unknown label.*'label 19' and 4,980 more") as unknown:
        read(path, labels=many, on_bad_row="fail")
    with pytest.raises(UserError, match="unknown part") as part:
        read(path, split="part", on_bad_row="fail")
    with pytest.raises(UserError, match="must differ") as twice:
        read(path, labels=(*huge, huge[0]))
    for raised in (few, one, unknown, part, twice):
        assert len(str(raised.value)) < 1500
        assert str(raised.value).isprintable()
    (bad,) = read_table(path, TableOptions(labels=tuple(huge[1:]), split=""))
    assert len(bad.details) < 1000
    assert len(bad.raw) <= 200
    assert in_words(["a", "b\n"], quoted) == r"'a', 'b\n'"


def test_thousands_of_unknown_labels_are_answered_in_no_time(tmp_path):
    """The nearest known label is sought among few and short ones only, and once for each that is unknown."""
    for known, unknown in ((5000, 2000), (3, 5)):
        names = tuple(f"{number} is the label" for number in range(known))
        rows = "".join(f"t,{number % unknown} was the label{'x' * (known > 3) * 99}\n" for number in range(10_000))
        with cpu_seconds_below(10):
            bad = read(write(tmp_path / "t.csv", "text,label\n" + rows), labels=names)[1]
        assert len(bad) == 10_000


def test_rows_with_quotes_are_those_of_csv_wherever_it_finds_no_fault():
    """Against Python's reader in strict mode, on texts of few characters, which are full of quotes, right and wrong."""
    choose, found = random.Random(5), Counter()
    for _ in range(20_000):
        text = "".join(choose.choices(["a", " ", ",", '"', '""', "\n"], [2, 1, 3, 2, 1, 2], k=choose.randint(1, 20)))
        ours = list(csv_rows(iter(text.splitlines(keepends=True)), ",", True))
        try:
            theirs = [row for row in csv.reader(io.StringIO(text), skipinitialspace=True, strict=True) if row]
        except csv.Error:
            # White space behind a closing quote is the one fault that is none here.
            assert '" ' in text or any(row.stray_from for row in ours), text
            found["fault"] += 1
            continue
        # Without quotes around it a field keeps its first spaces here, which are the indentation of a text of a corpus.
        assert [[field.lstrip(" ") for field in row.fields] for row in ours] == [
            [field.lstrip(" ") for field in row] for row in theirs
        ], text
        assert not any(row.stray_from for row in ours)
        found["quoted" if '"' in text else "plain"] += 1
    assert min(found["fault"], found["quoted"]) > 2000


def test_a_stray_quote_costs_its_own_row_only(tmp_path):
    """Every good row comes out whatever stands before it, and every bad one is counted with its line."""
    good_rows = [
        ("plain {},a", "plain {}"),
        ('"in quotes, {}",b', "in quotes, {}"),
        ('"two\nlines {}",a', "two\nlines {}"),
        ('"blank behind {}" \t ,b', "blank behind {}"),
        ('5" wide {},a', '5" wide {}'),
        ('so called "x" {},a', 'so called "x" {}'),
        ('"""doubled"" {}",b', '"doubled" {}'),
        ('{}, "b"', "{}"),
        ("{},a,", "{}"),
    ]
    stray_rows = ['"No" means no {},a', '"opens only {},b', 'x {},"opens late', '"" {},a', '"{}']
    choose = random.Random(7)
    for _ in range(100):
        rows, expected, strays, line = [], [], [], 2
        for number in range(30):
            if choose.random() < 0.25:
                rows.append(choose.choice(stray_rows).format(number))
                strays.append(line)
            else:
                row, text = choose.choice(good_rows)
                rows.append(row.format(number))
                expected.append(text.format(number))
            line += rows[-1].count("\n") + 1
        good, bad, _ = read(write(tmp_path / "t.csv", "text,label\n" + "\n".join(rows) + "\n"))
        assert [text for text, _ in good] == expected, rows
        assert set(strays) <= {line for line, _ in bad}


def test_a_stray_quote_is_named_with_the_lines_that_it_would_have_swallowed(tmp_path):
    rows = "".join(f"row {number},a\n" for number in range(200))
    text = f'text,label\n"a\nb","c,d\n"start quote only,a\n{rows}"last one" is fine,b\nz,a\n"open,b\nend,a\n'
    path = write(tmp_path / "t.csv", text)
    found = list(read_table(path, TableOptions()))
    assert [row.text for row in found if not isinstance(row, BadRow)] == [f"row {n}" for n in range(200)] + ["z", "end"]
    bad = [row for row in found if isinstance(row, BadRow)]
    assert [(row.line, row.details.split(";")[0].removeprefix("the quote that opens a field in ")) for row in bad] == [
        (2, "line 3 closes in the midst of a field in line 4"),
        (4, "line 4 closes in the midst of a field in line 205"),
        (205, "line 205 closes in the midst of a field in line 205"),
        (207, "line 207 is not closed up to line 208"),
    ]
    assert all("--no_quotes" in row.details for row in bad)
    with pytest.raises(UserError, match=r"t\.csv:2: stray quote: .* --no_quotes"):
        read(path, on_bad_row="fail")


def test_thousands_of_stray_quotes_are_read_in_no_time():
    """The lines behind a quote that does not close are read twice, not once for every such quote."""
    rows = ['"a ""b"",x\n', '"",y\n', '"opens,x\n', 'c ""d"",y\n', '"""",y\n'] * 20_000
    with cpu_seconds_below(10):
        assert sum(1 for _ in csv_rows(iter(rows), ",", True)) == len(rows)


def test_quotes_may_mean_nothing(tmp_path):
    path = write(tmp_path / "t.tsv", 'text\tlabel\n"never closed\ta\nb\tc\n')
    assert read(path, quotes=False)[0] == [('"never closed', ("a",)), ("b", ("c",))]


def test_labels_are_ordered():
    assert order_labels(Counter(b=1, a=2)) == ["a", "b"]
    assert order_labels(["10", "9", "-1", "2.50", ".5", "1e1", "10.0"]) == [
        "-1",
        ".5",
        "2.50",
        "9",
        "10",
        "10.0",
        "1e1",
    ]
    assert order_labels(["10", "9", "x"]) == ["10", "9", "x"]
    assert order_labels(["10", "9", "nan"]) == ["10", "9", "nan"]
    assert order_labels(["b", "a"], ("b", "a")) == ["b", "a"]


@pytest.mark.parametrize(
    "names",
    [
        ("Yes", "yes"), ("カナ", "ｶﾅ"), ("ABC", "ＡＢＣ"), ("in", "i\u200bn"), ("in", "in\u00ad"), ("on", "on."),
        ("7", "7.0"), ("7", "07"), ("①", "1"), ("caf\u00e9", "cafe\u0301"), ("left wing", "left_wing"), ("a", "\u0430"),
        ("x\u2060", "x"), ("東 京", "東京"), ("-1", "\u22121"), ("don't", "don\u2019t"),
    ],
)  # fmt: skip
def test_labels_that_look_alike_are_told_apart_by_code_points(names):
    """They stay labels of their own; the sentence has both, their rows, where they stand and in what they differ."""
    (said,) = doubts({name: (place + 2, f"t.csv:{place}") for place, name in enumerate((*names, "other"))})
    assert all(f"{name!r} ({place + 2} rows, first t.csv:{place}" in said for place, name in enumerate(names))
    assert "'other'" not in said
    assert all(
        f"U+{ord(sign):04X}" in said for name in names for sign in sorted({*name} - {*names[names[0] == name]})[:4]
    )


def test_labels_that_only_resemble_each_other_are_left_alone_and_missing_ones_are_shown():
    plain = ["+", "-", "A", "A+", "A-", "C#", "C", "1", "-1", "10", "1-0", "ハ", "バ", "re", "ré", "!", "?"]
    assert doubts(dict.fromkeys(plain, (2, "t.csv:2"))) == []
    (said,) = doubts({name: (3, f"t.csv:{place}") for place, name in enumerate(("pos", "N/A", "none"))})
    assert "'N/A' (3 rows, first t.csv:1) and 'none'" in said
    assert "--labels" in said
    assert "no regression" in doubts({"0.5": (2, ""), "1": (2, "")})[0]
    many = {f"{letter}{number}": (2, "") for letter in "aA" for number in range(50)}
    assert len(doubts(many)) == 9
    assert max(map(len, doubts({"a" * 10**5: (1, ""), "A" * 10**5: (1, "")}))) < 500


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ("['a', 'b c']", ["a", "b c"]), ('["a", "b"]', ["a", "b"]), ("[]", []), ("['it\\'s', \"x\"]", ["it's", "x"]),
        ("[1, 2.5]", ["1", "2.5"]), ('["\\u00e9/\\/"]', ["é//"]), ("['a',]", ["a"]), ("[NEG]", None), ("(1)", None),
        ("a", None), ("", None), ("[a, b]", None),
    ],
)  # fmt: skip
def test_cells_that_are_lists(cell, items):
    assert items_of(cell) == items


@pytest.mark.parametrize(
    "cell", ["['a' 'b']", "['a', None]", "['a', ['b']]", "{'a': 1}", "['a", "['a'; 'b']", "('a', 'b')"]
)
def test_cells_that_look_like_lists_are_bad_rows_with_the_cell_shown(tmp_path, cell):
    path = tmp_path / "t.jsonl"
    write(path, json.dumps({"text": "t", "label": f"{cell}]" if cell == "['a" else cell}))
    with pytest.raises(UserError, match=r"t\.jsonl:1: label of the wrong kind: 'label' is ") as raised:
        read(path, separator=",", on_bad_row="fail")
    assert repr(cell)[1:-1] in str(raised.value)


def test_lists_in_cells_are_read_where_several_labels_are_wanted_and_refused_where_one_is(tmp_path):
    rows = """a,"['x, y', 'z']"\nb,[]\nc,"[""x"", ""z""]"\nd,x|z\ne,"{x,z}"\n"""
    path = write(tmp_path / "t.csv", "text,label\n" + rows)
    good, bad, repairs = read(path, separator="|")
    assert good == [("a", ("x, y", "z")), ("b", ()), ("c", ("x", "z")), ("d", ("x", "z")), ("e", ("{x,z}",))]
    assert (bad, repairs["lists_of_labels_in_one_cell"]) == ([], 3)
    assert read(path, separator=",")[1] == [(6, "label of the wrong kind")]
    assert [line for line, _ in read(path)[1]] == [2, 3, 4]
    with pytest.raises(UserError, match=r"t\.csv:2: .*'x, y', 'z'.*--separator"):
        read(path, on_bad_row="fail")
    assert read(path, labels=("[]", "x|z"))[0] == [("b", ("[]",)), ("d", ("x|z",))]


def test_a_column_for_each_label(tmp_path):
    rows = "a,1,0\nb,0,0\nc,TRUE,yes\nd,1.0,0.0\ne,2,0\nf,1,\n"
    path = write(tmp_path / "t.csv", "text,second,first\n" + rows)
    good, bad, _ = read(path, label_columns=("first", "second"))
    assert good == [("a", ("second",)), ("b", ()), ("c", ("first", "second")), ("d", ("second",))]
    assert bad == [(6, "label second of the wrong kind"), (7, "empty label")]
    lines = [{"text": "a", "x": True, "y": 0}, {"text": "b", "x": None, "y": 1}]
    path = write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, lines)))
    assert read(path, label_columns=("x", "y"))[:2] == ([("a", ("x",))], [(2, "empty label")])
    with pytest.raises(UserError, match=r"no column 'z'.*--label_columns"):
        read(path, label_columns=("x", "z"))


def test_what_stands_between_tables_put_one_behind_the_other(tmp_path):
    """The header again is a bad row; in another order it stops the reading, as all rows behind it would be wrong."""
    path = write(tmp_path / "t.csv", "text,label,\nx,a\nText, LABEL\ny,b,\n")
    assert read(path)[:2] == ([("x", ("a",)), ("y", ("b",))], [(3, "header repeated")])
    path = write(tmp_path / "t.csv", "text,label,n\nx,a,1\ntext,n,label\ny,2,b\n")
    with pytest.raises(UserError, match=r"t\.csv:3: .*another order.*Cut the file"):
        read(path)
    path = write(tmp_path / "t.csv", "text\nx\nText\ntext\n")
    assert read(path, label="")[:2] == ([("x", ()), ("Text", ())], [(4, "header repeated")])


def test_line_ends_of_several_kinds_in_one_table(tmp_path):
    rows = [("a", "x"), ("b\r\nc", "y"), ("d\re", "x"), ("f", "y")]
    lines = ["text,label", *(f'"{text}",{label}' for text, label in rows)]
    for ends in ("\r\n\n\r\n", "\n\n\r\n\r\n", "\r\n\r\n\n", "\r\r\n\n\r"):
        mixed = re.findall("\r\n|\n|\r", ends + ends)
        data = "".join(line + end for line, end in zip(lines, mixed, strict=False)).encode()
        assert read(write(tmp_path / "t.csv", data))[0] == [(text, (label,)) for text, label in rows], ends


def test_an_id_comes_back_as_it_stands_and_trimmed_labels_are_counted(tmp_path):
    path = write(tmp_path / "t.csv", "id,text,label\n -1,x, a\n007 ,y,b\n =1+1,z,a\n,w,b\n")
    repairs = Counter()
    rows = list(read_table(path, TableOptions(id="id"), repairs))
    assert [row.name for row in rows] == [" -1", "007 ", " =1+1", None]
    assert (rows[0].labels, repairs["labels_with_white_space_around_them"]) == (("a",), 1)


@pytest.mark.parametrize(
    ("counts", "number", "said"),
    [
        ({}, 0, "no row that can be used; left out: 3 x unknown label"),
        ({"a": 5}, 5, "every row .* 'a'"),
        ({"a": 5, "b": 0}, 5, "every row of .* 'a'"),
        ({"a": 5}, 9, "every row with a label .* 'a'"),
        ({"a": 0, "b": 0}, 9, "no row of .* has a label"),
        ({"a": 5, "b": 1, "c": 2}, 8, r"1 of 3 labels .* fewer than 2 rows: 'b' \(1\); add rows"),
        ({"0.5": 5, "1.25": 1, "2": 2}, 8, "they are numbers, and classes are learnt here, no regression"),
    ],
)
def test_tables_from_which_nothing_can_be_learnt(counts, number, said):
    with pytest.raises(UserError, match=said):
        check_classes("t.csv", Counter(counts), number, Counter({"unknown label": 3}), "label")


def test_memory_does_not_grow_with_the_table(tmp_path):
    """Reading twenty times as many rows takes no more memory."""
    program = """
import sys
from lmscripts.text.records import TableOptions, read_table
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
