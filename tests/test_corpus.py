"""Text in: files, splits, repairs."""

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from lmscripts.errors import UserError, user_errors
from lmscripts.text import reading as text_reading
from lmscripts.text.corpus import (
    Span,
    TextReport,
    batches,
    find_files,
    plan_spans,
    read_documents,
    source_fingerprint,
    spread_sample,
)
from lmscripts.text.records import corpus_table

SAMPLE = Path(__file__).parent.parent / "sample_data"
DOCUMENTS = [[f"文書{number}の文{line}。" for line in range(number % 4 + 1)] for number in range(30)]
TEXT = "\n\n".join("\n".join(document) for document in DOCUMENTS) + "\n"


def read(path, report=None, *, document_per_line=False, keep_spaces=False, **table):
    form = {"document_per_line": document_per_line, "keep_spaces": keep_spaces}
    return list(read_documents([Span(str(path))], report or TextReport(), corpus_table(**table), **form))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- which files ----


def test_files_patterns_and_folders(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.jsonl.gz", "sub/.hidden.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "x")
    names = [path.relative_to(tmp_path).as_posix() for path in find_files([str(tmp_path)])]
    assert names == ["a.txt", "b.txt", "sub/c.jsonl.gz"]
    assert [path.name for path in find_files([str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])] == ["a.txt", "b.txt"]
    assert [path.name for path in find_files([str(tmp_path / "notes.md")])] == ["notes.md"]


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing.txt", "*.csv", "empty"):
        with pytest.raises(UserError, match=name.replace("*", r"\*")):
            find_files([str(tmp_path / name)])


@pytest.mark.skipif(os.geteuid() == 0, reason="runs for ordinary users: root reads everything")
def test_unreadable_file_is_named(tmp_path):
    write(tmp_path / "secret.txt", "x").chmod(0)
    with pytest.raises(UserError, match=r"secret\.txt cannot be read"):
        find_files([str(tmp_path / "secret.txt")])


def test_fingerprint_follows_content_and_cuts(tmp_path):
    first, second = write(tmp_path / "1.txt", "ab"), write(tmp_path / "2.txt", "c")
    before = source_fingerprint([first, second])
    assert before == source_fingerprint([str(first), str(second)])
    write(first, "a"), write(second, "bc")
    assert source_fingerprint([first, second]) != before


# ---- splits ----


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 20, 200])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_splits_together_are_the_whole(tmp_path, num_splits, line_end):
    cut = len(TEXT) // 3
    cut = TEXT.index("\n\n", cut) + 2
    paths = [write(tmp_path / "a.txt", TEXT[:cut].replace("\n", line_end)), write(tmp_path / "b.txt", "")]
    paths.append(tmp_path / "c.txt.gz")
    paths[-1].write_bytes(gzip.compress(TEXT[cut:].encode()))
    paths.append(write(tmp_path / "d.txt", TEXT.replace("\n", line_end)))
    plan = plan_spans(paths, num_splits)
    assert len(plan) == num_splits
    parts = [list(read_documents(spans, TextReport())) for spans in plan]
    assert [document for part in parts for document in part] == DOCUMENTS + DOCUMENTS


def test_splits_have_about_equal_bytes(tmp_path):
    path = write(tmp_path / "a.txt", TEXT * 100)
    sizes = [sum(span.end - span.start for span in spans) for spans in plan_spans([path], 4)]
    assert sum(sizes) == path.stat().st_size
    assert max(sizes) - min(sizes) < 400


@pytest.mark.parametrize("num_splits", [1, 3, 50])
def test_document_per_line(tmp_path, num_splits):
    path = write(tmp_path / "a.txt", "一つ。\n二つ。\n\n三つ。\n四つ。")
    plan = plan_spans([path], num_splits, document_per_line=True)
    report = TextReport()
    documents = [document for spans in plan for document in read_documents(spans, report, document_per_line=True)]
    assert documents == [["一つ。"], ["二つ。"], ["三つ。"], ["四つ。"]]
    assert (report.num_files, report.num_documents, report.num_sentences) == (1, 4, 4)


def test_splits_of_files_without_text(tmp_path):
    paths = [write(tmp_path / "a.txt", ""), write(tmp_path / "b.txt", "\n \n\n")]
    assert [list(read_documents(spans, TextReport())) for spans in plan_spans(paths, 3)] == [[], [], []]


def test_sample_data_splits():
    path = SAMPLE / "articles.txt"
    whole = read(path)
    for num_splits in (2, 13):
        parts = [read_documents(spans, TextReport()) for spans in plan_spans([path], num_splits)]
        assert [document for part in parts for document in part] == whole
    sample = spread_sample([path], 100)
    lines = [line for document in whole for line in document]
    assert len(sample) == 100
    assert [line for line in lines if line in set(sample)] == sample
    assert len(spread_sample([path], 10**6)) == len(lines)


# ---- formats ----


def compress(path, data):
    return {
        ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress,
    }[path.suffix](data)  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "tsv", "parquet"])
def test_every_format(tmp_path, kind, suffix):
    plain = tmp_path / f"a.{kind}"
    texts = ["\n".join(document) for document in DOCUMENTS]
    if kind == "txt":
        write(plain, TEXT)
    elif kind == "jsonl":
        write(plain, "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": texts}), plain)
    else:
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, dialect="excel-tab" if kind == "tsv" else "excel")
            writer.writerows([["id", "text"], *([1, text] for text in texts)])
    path = plain
    if suffix:
        path = plain.with_name(plain.name + suffix)
        path.write_bytes(compress(path, plain.read_bytes()))
    assert read(path) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_truncated_archive_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.txt{suffix}"
    noise = "\n".join(json.dumps(os.urandom(50).hex()) for _ in range(3000))
    data = compress(path, noise.encode())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.txt.* damaged"):
        read(path)
    path.write_bytes(b"this is no archive" * 10)
    with pytest.raises(UserError, match=r"cut\.txt.* damaged"):
        read(path)


def test_two_zstandard_frames(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress("一\n\n".encode()) + zstandard.compress("二\n".encode()))
    assert read(path) == [["一"], ["二"]]


def test_csv_keeps_na_and_null(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\nNA,1\nnull,2\n"a, ""b""\nc",3\n')
    assert read(path) == [["NA"], ["null"], ['a, "b"', "c"]]


def test_missing_column_names_the_columns(tmp_path):
    for name, content in (("a.csv", "id,body\n1,x\n"), ("a.jsonl", '{"id": 1, "body": "x"}\n')):
        path = write(tmp_path / name, content)
        with pytest.raises(UserError, match=r"'text'.*'body'"):
            read(path)
        assert read(path, column="body") == [["x"]]


def test_bad_records(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"text": "x"}\n{"text": \n\n[1]\n{"text": 5}\n{"text": null}\n{"text": "\\ud800y"}\n'
    )
    report = TextReport()
    assert read(path, report) == [["x"], ["\ufffdy"]]
    assert report.changes == {"bad_records_dropped": 3, "records_without_text": 1, "half_characters": 1}
    assert f"{path}:2" in "\n".join(report.sentences())
    with pytest.raises(UserError, match=r"a\.jsonl:2: no JSON record"):
        read(path, on_bad_row="fail")


def test_hub_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return [{"body": "一。\n二。"}, {"body": None}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    paths = find_files([f"hub:someone/texts@{'a' * 40}:ja:test:body"])
    plan = plan_spans(paths, 3)
    assert [d for spans in plan for d in read_documents(spans, TextReport())] == [["一。", "二。"]]
    assert asked == [(("someone/texts", "ja"), {"split": "test", "revision": "a" * 40, "streaming": True})]


# ---- hostile text ----


def test_byte_order_mark_line_ends_and_control_characters(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeff一\x00つ。\r\n二\x01つ\tx。\r\r三つ。\n \u3000\n四つ。".encode())
    report = TextReport()
    assert read(path, report) == [["一つ。", "二 つ\tx。"], ["三つ。"], ["四つ。"]]
    assert report.changes == {"byte_order_marks": 1, "nul_characters": 1, "control_characters": 1}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, line_end):
    assert read(write(tmp_path / "a.txt", TEXT.replace("\n", line_end))) == DOCUMENTS


def test_line_ends_across_blocks(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", TEXT.replace("\n", "\r\n"))
    for limit in (50, 51, 52, 53):
        with path.open("rb") as file:
            lines = list(text_reading.text_lines(file, limit=limit))
        text = "".join(line + "\n" * ends for line, ends in lines)
        assert text == TEXT


def test_invalid_utf8_is_repaired_and_placed(tmp_path):
    lines = [f"よい文です{number}。".encode() for number in range(100)]
    lines[70] = b"\xe3\x81abc\xff"
    path = write(tmp_path / "a.txt", b"\n".join(lines) + b"\n\n" + b"\n".join(lines))
    reports = []
    for spans in plan_spans([path], 2):
        reports.append(TextReport())
        list(read_documents(spans, reports[-1]))
    reports[0].merge(reports[1])
    assert reports[0].changes == {"invalid_utf8_lines": 2}
    assert reports[0].examples["invalid_utf8_lines"] == [f"{path}:71", f"{path}:172"]
    assert read(path)[0][70] == "\ufffdabc\ufffd"
    restored = TextReport.from_dict(json.loads(json.dumps(reports[0].as_dict())))
    assert restored.sentences() == reports[0].sentences()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp932", "euc-jp"])
def test_other_encodings_are_refused(tmp_path, encoding):
    path = write(tmp_path / "old.txt", ("これは古い文字コードのテキストです。\n" * 20).encode(encoding))
    with pytest.raises(UserError, match=r"old\.txt.*iconv -f"):
        read(path)


def test_huge_line_is_cut_at_sentence_ends(tmp_path):
    sentence = "とても長い行の中の一文です。"
    path = write(tmp_path / "a.txt", sentence * 60_000 + "\n次の行。\n\n" + "x" * (1 << 20) + "あ" * 10)
    report = TextReport()
    first, second = read(path, report)
    assert all(line.endswith("。") for line in first)
    assert "".join(first) == sentence * 60_000 + "次の行。"
    assert "".join(second) == "x" * (1 << 20) + "あ" * 10
    assert max(len(line.encode()) for line in first + second) <= 1 << 20
    assert report.changes["long_lines_cut"] == 3
    assert "\ufffd" not in "".join(second)


def test_huge_document_goes_on_as_a_new_one(tmp_path):
    line = "あ" * 5000 + "\n"
    path = write(tmp_path / "a.txt", line * 1500)
    report = TextReport()
    documents = read(path, report)
    assert [sum(map(len, document)) * 3 <= 1 << 24 for document in documents] == [True, True]
    assert sum(map(len, documents)) == 1500
    assert report.changes == {"long_documents_cut": 1}
    table = write(tmp_path / "a.jsonl", json.dumps({"text": line * 1500}))
    assert read(table) == documents


def test_memory_stays_flat(tmp_path):
    """A 50 MB line and 50 MB of short documents are read within a few megabytes."""
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        for _ in range(500):
            file.write(b"\n\n" + b"word " * 20_000)
    program = (
        "import resource, sys; from lmscripts.text.corpus import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count = sum(1 for _ in read_documents([Span(sys.argv[1])], TextReport()))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    output = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, output.stdout.split())
    assert count == 503  # the line is a document of 48 lines, in three pieces
    assert kilobytes < 70_000


def test_batches():
    grouped = list(batches(iter(DOCUMENTS), batch_bytes=200))
    assert [document for group in grouped for document in group] == DOCUMENTS
    sizes = [sum(len(line.encode()) for document in group for line in document) for group in grouped]
    assert min(sizes[:-1]) >= 200
    assert max(sizes) < 320


# ---- errors ----


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("two\nlines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "/x/y"), "/x/y: No such file or directory"),
        (
            OSError(28, "No space left on device", "/x/y"),
            "/x/y: No space left on device; what is half written is removed, free some space and run the same again",
        ),
        (KeyboardInterrupt(), "stopped from the keyboard"),
    ],
)
def test_user_errors_end_in_one_sentence(capsys, error, sentence):
    with pytest.raises(SystemExit) as ended, user_errors():
        raise error
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), user_errors():
        _ = 1 // 0


CODE = "def f(x):\n    if x:\n        return 1  \n\n\n\treturn\u30002"


@pytest.mark.parametrize("keep", [False, True])
def test_white_space_is_kept_where_it_is_asked_for(tmp_path, keep):
    """Indentation, line ends and empty lines are part of what a causal model learns; masked ones read sentences."""
    record = tmp_path / "code.jsonl"
    record.write_text(json.dumps({"text": f"\n \n{CODE}\n\n"}) + "\n" + json.dumps({"text": " \n "}) + "\n")
    plain = tmp_path / "code.txt"
    plain.write_bytes(CODE.replace("\n\n\n", "\n \t\n").encode() + b"\n")
    lines = CODE.split("\n")
    if keep:
        assert read(record, keep_spaces=True) == [lines]
        assert read(plain, keep_spaces=True) == [lines[:3], lines[5:]]  # a blank line ends a document of a text file
        assert spread_sample([record, plain], 99, keep_spaces=True) == [*lines, *lines[:3], *lines[5:]]
    else:
        stripped = ["def f(x):", "if x:", "return 1", "return\u30002"]
        assert read(record) == [stripped]
        assert read(plain) == [stripped[:3], stripped[3:]]


def test_a_long_line_that_is_cut_keeps_its_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_reading.text_lines, "__defaults__", (None, 64))
    line = "  " + "word " * 40 + " "
    (tmp_path / "long.txt").write_text(line + "\n")
    assert "".join(read(tmp_path / "long.txt", keep_spaces=True)[0]) == line


# ---- tables of a corpus: the reader of the classifier ----


def test_bad_rows_are_counted_by_reason_and_never_merged_into_others(tmp_path):
    """A quote that nothing closes, a field too many or too few, bytes of another encoding, the header once more."""
    rows = ["id\ttext\turl", "1\tfirst\tu1", '2\t"quoted" at once\tu2', '3\t"open\tu3', "4\tfourth\tu4", "5\tshort"]
    rows += ["6\tone\ttoo\tmany", "id\ttext\turl", "7\tlast\tu7"]
    path = write(tmp_path / "a.tsv", "\n".join(rows).encode() + b"\n8\tcaf\xe9\tu8\n")
    report = TextReport()
    assert read(path, report) == [["first"], ["fourth"], ["last"]]
    once = ("too few fields", "too many fields", "header repeated", "cannot be decoded")
    assert report.reasons == {"stray quote": 2, **dict.fromkeys(once, 1)}
    assert report.changes == {"bad_records_dropped": 6}
    told = "\n".join(report.sentences())
    assert f"6 records could not be read and were left out (first at {path}:3, {path}:4, {path}:6" in told
    assert f"2 x stray quote, at {path}:3: the quote that opens a field in line 3" in told
    assert "--no_quotes" in told
    assert f"1 x header repeated, at {path}:8" in told
    again = TextReport.from_dict(json.loads(json.dumps(report.as_dict())))
    again.merge(report)
    assert again.reasons["stray quote"] == 4
    assert f"4 x stray quote, at {path}:3" in "\n".join(again.sentences())
    with pytest.raises(UserError, match=r"a\.tsv:3: stray quote: .*--no_quotes"):
        read(path, on_bad_row="fail")
    assert read(path, quotes=False)[1:3] == [['"quoted" at once'], ['"open']]


def test_one_stray_quote_costs_one_record_of_two_thousand(tmp_path):
    rows = [f"{number},text {number}" for number in range(2000)]
    rows[10] = '10,"text 10'
    report = TextReport()
    documents = read(write(tmp_path / "a.csv", "id,text\n" + "\n".join(rows) + "\n"), report)
    assert documents == [[f"text {number}"] for number in range(2000) if number != 10]
    assert report.reasons == {"stray quote": 1}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_the_delimiter_is_found_or_given(tmp_path, name, delimiter):
    data = f"id{delimiter}text\n1{delimiter}eins\n2{delimiter}zwei: 3\n".encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert read(path) == [["eins"], ["zwei: 3"]]
    path = write(tmp_path / "colon.csv", "id:text\n1:eins, zwei\n")
    assert read(path, delimiter=":") == [["eins, zwei"]]
    with pytest.raises(UserError, match=r"no column 'text'; it has 'id:text'"):
        read(path)


def test_tables_of_a_spreadsheet_and_of_an_old_mac(tmp_path):
    assert read(write(tmp_path / "sep.csv", "sep=|\r\nid|text\r\n1|a; b, c\r\n")) == [["a; b, c"]]
    assert read(write(tmp_path / "mac.csv", 'id,text\r1,eins\r2,"zwei\rdrei"\r')) == [["eins"], ["zwei", "drei"]]
    assert read(write(tmp_path / "cell.csv", "id,text\n1,eins\rzwei\n2,drei\n")) == [["eins", "zwei"], ["drei"]]
    report = TextReport()
    assert read(write(tmp_path / "two.csv", "\ufefftext\na\n\ufefftext\nb\n"), report) == [["a"], ["b"]]
    assert report.changes == {"byte_order_marks": 2, "bad_records_dropped": 1}


def test_marks_and_lines_that_nobody_sees(tmp_path):
    """A byte order mark of a file that was put behind another; a line of U+200B ends a document, and is counted."""
    report = TextReport()
    path = write(tmp_path / "a.txt", "eins\n\n\ufeffzwei\n\u200b\ndrei\n")
    assert read(path, report) == [["eins"], ["zwei"], ["drei"]]
    assert report.changes == {"byte_order_marks": 1, "invisible_lines": 1}
    for unseen in ("\u2060", "\u200c\u200d", "\u00ad", "\u200e \u200b", "\u3164", "\u3000", "\x0b", "\x85"):
        assert read(write(tmp_path / "b.txt", f"eins\n{unseen}\nzwei\n")) == [["eins"], ["zwei"]], repr(unseen)
    assert read(write(tmp_path / "c.txt", "a\u200bb\n\u200d👩\u200d👩\n")) == [["a\u200bb", "\u200d👩\u200d👩"]]
    assert [d for spans in plan_spans([path], 9) for d in read_documents(spans, TextReport())] == read(path)


def test_characters_in_two_halves_are_joined(tmp_path):
    """As Java and Oracle write them; half of one alone is no UTF-8."""
    report, halves = TextReport(), "😀".encode("utf-16-be").hex()
    two = b"".join(chr(int(half, 16)).encode("utf-8", "surrogatepass") for half in (halves[:4], halves[4:]))
    (tmp_path / "a.txt").write_bytes(b"eins " + two * 2 + b"\nzwei " + two[:3] + b"!\n")
    assert read(tmp_path / "a.txt", report) == [["eins 😀😀", "zwei \ufffd\ufffd\ufffd!"]]
    assert report.changes == {"joined_halves": 2, "invalid_utf8_lines": 1}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "iso-2022-jp"])
@pytest.mark.parametrize("name", ["articles.txt", "english.txt"])
def test_encodings_without_a_mark_are_named(tmp_path, encoding, name):
    text = (SAMPLE / name).read_text(encoding="utf-8") + "漢字\n"
    (tmp_path / "it's.txt").write_bytes(text.encode(encoding, "ignore"))
    with pytest.raises(UserError, match=rf"is {encoding.upper()}; .* iconv -f {encoding} -t UTF-8 '.*it'\"'\"'s.txt'"):
        read(tmp_path / "it's.txt")


def test_what_is_no_text_is_called_so(tmp_path):
    for number, data in enumerate(
        (bytes(9000), random.Random(1).randbytes(9000), b"\x89PNG\r\n" + bytes(range(256)) * 9)
    ):
        (tmp_path / f"{number}.txt").write_bytes(data)
        with pytest.raises(UserError, match=r"\.txt is no text: "):
            read(tmp_path / f"{number}.txt")


def test_spaces_before_a_text_in_a_table_are_kept_where_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.csv", "text,id\n  return x,1\n  '5\" wide',2\n")
    assert read(path, keep_spaces=True) == [["  return x"], ["  '5\" wide'"]]


# ---- what a file is, by its content ----

RECORDS = '\n{"id": 1, "text": "eins"}\n\n{"id": 2, "text": "zwei"}\n{"text": \n'


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.txt", "a", "a.csv", "a.jsonl"])
def test_json_lines_are_json_lines_whatever_the_suffix(tmp_path, name):
    path = write(tmp_path / name, RECORDS.encode() if not name.endswith("gz") else gzip.compress(RECORDS.encode()))
    report = TextReport()
    assert [d for spans in plan_spans([path], 3) for d in read_documents(spans, report)] == [["eins"], ["zwei"]]
    assert report.reasons == {"no JSON record": 1}
    assert report.changes["json_lines_files"] == (name != "a.jsonl")
    assert name == "a.jsonl" or "--input_format txt" in report.sentences()[1]
    as_it_stands = read(path, input_format="txt")
    assert as_it_stands[0] == ['{"id": 1, "text": "eins"}']
    plan = plan_spans([path], 3, input_format="txt")
    table = corpus_table(input_format="txt")
    assert [d for spans in plan for d in read_documents(spans, TextReport(), table)] == as_it_stands


def test_a_long_first_record_is_one(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"text": "eins " * 30_000}) + "\n" + json.dumps({"text": "zwei"}))
    assert [document[0][:4] for document in read(path)] == ["eins", "zwei"]


@pytest.mark.parametrize(
    "text",
    ['{"text": 1} is a record\nand prose', '{"text": "x"}\nand prose', "{curly} words", "[1] a note", "<b>bold</b> x"],
)
def test_prose_stays_prose(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text)) == [text.splitlines()]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.json", '[{"text": "eins"}]', r"JSON array.*jq -c .*--input_format txt"),
        ("a.jsonl", '[\n {"text": "eins"}\n]', r"JSON array"),
        ("a.json", '{\n "text": "eins"\n}', r"JSON object.*--input_format txt"),
        ("a.html", "<!DOCTYPE html><p>eins</p>", r"markup.*--input_format txt"),
        ("a.txt", '\ufeff <?xml version="1.0"?><x/>', r"markup"),
        ("a.csv", b"PK\x03\x04" + bytes(99), r"office file \(\.xlsx, \.docx\) or a zip archive"),
        ("a.txt", gzip.compress(b"eins", mtime=0), r"gzip: let its name end in \.gz"),
        ("a.txt", b"%PDF-1.7 ...", r"PDF"),
        ("a.txt.gz", gzip.compress(bytes(257) + b"ustar" + bytes(99), mtime=0), r"tar archive"),
    ],
)
def test_what_is_no_text_is_refused_by_what_it_is(tmp_path, name, data, said):
    path = write(tmp_path / name, data)
    with pytest.raises(UserError, match=rf"{name} is .*{said}"):
        read(path)
    if "input_format" in said:
        assert read(path, input_format="txt") == [[line.strip() for line in data.splitlines()]]


def test_files_that_a_folder_leaves_out_are_told(tmp_path):
    for name in ("a.txt", "b.json", "notes.md", ".hidden", "sub/c.xlsx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "x")
    report = TextReport()
    assert find_files([str(tmp_path)], report) == [tmp_path / "a.txt"]
    told = "3 files of a folder were left out for their names; name those that are text on the line (first at"
    assert f"{told} {tmp_path}/b.json" in report.sentences()[1]
    assert len(find_files([str(tmp_path), str(tmp_path / "a.txt")], report)) == 1
    assert f"1 files were named more than once and read once (first at {tmp_path}/a.txt)" in report.sentences()


def test_the_command_that_converts_is_quoted(tmp_path):
    (tmp_path / "two words").mkdir()
    path = write(tmp_path / "two words" / "alt;.txt", ("これは古い文字コードのテキストです。\n" * 20).encode("euc-jp"))
    with pytest.raises(UserError, match=rf"iconv -f euc-jp -t UTF-8 '{path}' > '{path}\.utf8\.txt'"):
        read(path)


def test_a_sample_of_very_long_lines_is_bounded(tmp_path):
    """Twenty thousand lines of a megabyte would be twenty gigabytes in memory."""
    line = "あ" * 300_000
    (tmp_path / "t.txt").write_text("\n\n".join([line] * 60), encoding="utf-8")
    lines = spread_sample([tmp_path / "t.txt"], 20_000)
    assert 50 <= len(lines) <= 60
    assert all(len(each.encode()) <= 1 << 15 and line.startswith(each) for each in lines)
    (tmp_path / "s.txt").write_text("\n".join(["い" * 1000] * 60_000), encoding="utf-8")
    assert sum(map(len, spread_sample([tmp_path / "s.txt"], 60_000))) < (1 << 26) + 200 * 1000
