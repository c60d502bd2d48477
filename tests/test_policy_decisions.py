"""Lines of decisions to a store: the parser against a slow one, hostile lines, duplicates, the split, equal bytes."""

import bz2
import gzip
import json
import lzma
import random
import shutil

import numpy as np
import pytest
import zstandard
from conftest import run_script
from test_policy_schema import SMALL

from lmscripts.data import decision_preparation as preparation
from lmscripts.data.decision_preparation import DecisionSource, prepare_decisions
from lmscripts.data.decisions import MISSING, check_decisions, open_decisions, parse, record_in_words
from lmscripts.data.schema import Schema, load_schema
from lmscripts.errors import UserError
from lmscripts.text.report import TextReport

V1 = load_schema("kanachan-v1")
GOLDEN = (
    b"210101-00000000-0000-0000-0000-000000000000\t2,6,7,11,14,31,272,282,289,303,310,322,331,344,352,353,354,358,362,370,"
    b"394,398,438,439,445,461,462,477,516\t0,0,25000,25000,25000,25000\t0\t0,4,8,12,20,48,52,96,104,108,120,136\t11\t"
    b"16,-1000,-1000,-1000,3000,1,2,3,0,1,31200,15"
)
PACK = {
    "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress,
}  # fmt: skip


def changed(column, text):
    cells = GOLDEN.split(b"\t")
    cells[column] = text
    return b"\t".join(cells)


def line(game, number, winner=16):
    """A valid record; of two with the same game and number only the first of the results may differ."""
    rng = random.Random(number)
    events = ",".join(str(rng.randrange(5, 2165)) for _ in range(rng.randrange(0, 40)))
    record = changed(0, f"game-{game}".encode()).split(b"\t")
    record[2] = f"{number % 7},0,{number},2500{number % 10},-300,0".encode()
    record[3] = f"0,{events}".rstrip(",").encode()
    record[5] = str(rng.randrange(12)).encode()
    record[6] = f"{winner},{-number},3,4,5,1,2,3,0,1,31200,15".encode()
    return b"\t".join(record)


LINES = [line(number // 10, number) for number in range(300)]


def text(lines):
    return b"".join(each + b"\n" for each in lines)


def source(*files, schema=V1, **settings):
    return DecisionSource(tuple(map(str, files)), schema, **{"validation_share": 0.2, **settings})


def made(folder, lines, **settings):
    path = folder / "decisions.txt"
    path.write_bytes(text(lines))
    return prepare_decisions(source(path, **settings), folder / "store", 1)


def content(store):
    return {path.relative_to(store): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


# ---- the parser ----


def test_a_line_that_is_known():
    part, bad = parse([GOLDEN], V1)
    assert not bad
    cells = [list(map(int, cell.split(b","))) for cell in GOLDEN.split(b"\t")[1:]]
    assert part.counts.tolist() == [[29, 1, 12]]
    assert part.ids.tolist() == [*cells[0], 527, *(527 + 2166 + each for each in cells[3])]
    assert (part.ids.dtype, part.counts.dtype, part.numeric.dtype) == (np.uint16, np.uint8, np.float32)
    assert part.numeric.tolist() == [cells[1]]
    assert part.labels.tolist() == [11]
    assert part.extra.tolist() == [cells[5]]
    assert part.lengths(np.array([0])).tolist() == [29 + 6 + 1 + 12]
    words = record_in_words(part, 0, V1)
    assert "    discard 7s" in words
    assert "  > discard 5z" in words
    assert "progression: round begins" in words


def slow(lines, schema):
    """What the text says, number by number."""
    records = []
    for each in lines:
        cells = each.split(b"\t")
        ids, numbers, extra = [], [], []
        for field, cell in zip(schema.fields, cells, strict=True):
            found = [] if field.kind == "id" or not cell else list(map(int, cell.split(b",")))
            if field.num_ids:
                ids += [schema.first_id(field) + number for number in found]
            elif field.kind == "numeric":
                numbers += found
            elif field.kind == "extra":
                extra += found + [MISSING] * (field.max_length - len(found))
            elif field.kind == "label":
                label = found[0]
        records.append((ids, numbers, label, extra))
    return records


def listed(part):
    ids = [part.ids[a:b].tolist() for a, b in zip(part.offsets, part.offsets[1:])]
    return list(zip(ids, part.numeric.tolist(), part.labels.tolist(), part.extra.tolist(), strict=True))


def test_many_lines_are_what_they_say():
    part, bad = parse(LINES, V1)
    assert not bad
    assert listed(part) == slow(LINES, V1)
    assert len(set(part.games.tolist())) == 30


def test_columns_in_any_order_with_several_of_a_kind():
    schema = Schema.from_json(
        {**SMALL, "fields": [*SMALL["fields"][3:], {"name": "who", "kind": "id"}, *SMALL["fields"][:3]]}
    )
    lines = [b"1,4\t1\t7,-8\t5\ta,b\t0,5\t-3,1234567\t8,0,8", b"2\t0\t\t-5\tc\t3\t0,9999\t"]
    part, bad = parse(lines, schema)
    assert not bad
    assert listed(part) == slow(lines, schema)
    assert part.extra.tolist() == [[7, -8, MISSING, 5], [MISSING, MISSING, MISSING, -5]]
    assert part.counts.tolist() == [[2, 2, 3], [1, 1, 0]]


def test_a_line_of_the_successor():
    """Its summary of the round is known afterwards only, and has no fixed length."""
    schema = load_schema("kanachan-v2")
    line = b"g\t2,6,10,71,75,78,100,160,340,480\t0,1,25000,24000,25000,26000\t0,9\t4,136\t1\t3,17\t1,2,3,4,5,6,7,8"
    part, bad = parse([line], schema)
    assert not bad
    assert listed(part) == slow([line], schema)
    assert part.extra.tolist() == [[3, 17, *[MISSING] * 5, 1, 2, 3, 4, 5, 6, 7, 8, *[MISSING] * 4]]
    assert record_in_words(part, 0, schema)[-2:] == ["round summary: 3, 17", "results: 1, 2, 3, 4, 5, 6, 7, 8"]


HOSTILE = {
    "too few fields": b"abc",
    "field 0 (game) is empty": changed(0, b""),
    "field 1 (features) is empty": changed(1, b""),
    "field 3 (progression) is empty": changed(3, b""),
    "field 5 (label) is empty": changed(5, b""),
    "too many fields": GOLDEN + b"\t1",
    "element twice: 3 behind 3": changed(1, b"3,3"),
    "not ascending: 3 behind 4": changed(1, b"4,3"),
    "-1, not 0 to 525": changed(1, b"-1,3"),
    "526, not 0 to 525": changed(1, b"526"),
    "2165, not 0 to 2164": changed(3, b"0,2165"),
    "546, not 0 to 545": changed(4, b"3,546"),
    "not ascending: 4 behind 8": changed(4, b"8,4"),
    "element twice: 4 behind 4": changed(4, b"4,4,5"),
    "no whole number: '1.5'": changed(1, b"1.5"),
    "no whole number: '1e3'": changed(3, b"0,1e3"),
    "no whole number: ' 1'": changed(1, b" 1"),
    "no whole number: '+1'": changed(1, b"+1"),
    "no whole number: ''": changed(1, b"1,,2"),
    "no whole number: '-'": changed(2, b"1,2,3,4,5,-"),
    "no whole number: '１'": changed(1, "１".encode()),
    r"no whole number: '\x00'": changed(1, b"\0"),
    "no whole number: '25\ufffd'": changed(1, b"25\xff"),
    "too many digits": changed(1, b"00000000001"),
    "out of range: 99999999999": changed(2, b"1,2,3,4,5,99999999999"),
    "out of range: 9999999999": changed(1, b"9" * 500),
    "out of range: -2147483648": changed(6, b"-2147483648" + b",0" * 11),
    "34, not 1 to 33": changed(1, b",".join(b"%d" % number for number in range(34))),
    "114, not 1 to 113": changed(3, b",".join([b"0"] * 114)),
    "2, not 6": changed(2, b"1,2"),
    "12, where there are 12 candidates (0 to 11)": changed(5, b"12"),
    "field 5 (label) is out of range: -1": changed(5, b"-1"),
    "field 5 (label) has the wrong number of elements": changed(5, b"1,2"),
    "1, not 12": changed(6, b"1"),
}


def test_every_bad_line_is_found_among_good_ones_and_says_why():
    lines = [each for bad in HOSTILE.values() for each in (GOLDEN, bad)]
    part, bad = parse(lines, V1)
    assert [row.line for row in bad] == list(range(2, len(lines) + 1, 2))
    for row, words in zip(bad, HOSTILE, strict=True):
        assert words in str(row.error("x.txt")).replace(": each", ""), words
    assert listed(part) == slow([GOLDEN], V1) * len(HOSTILE)
    for each in HOSTILE.values():  # alone, as a player asks
        part, bad = parse([each], V1)
        assert (part.num_records, len(bad)) == (0, 1)


def test_the_fast_way_and_the_exact_one_agree_on_damaged_lines():
    rng = random.Random(3)
    letters = b"0123456789,\t-. e"
    for number in range(60):
        lines = [bytearray(LINES[number + place]) for place in range(20)]
        for each in lines:
            for _ in range(rng.randrange(3)):
                each[rng.randrange(len(each))] = rng.choice(letters)
        part, bad = parse(list(map(bytes, lines)), V1)
        wrong = {row.line - 1 for row in bad}
        assert listed(part) == slow([bytes(each) for n, each in enumerate(lines) if n not in wrong], V1)


# ---- the store ----


@pytest.fixture(scope="module")
def whole(workspace):
    return made(workspace, LINES)


def test_a_game_is_in_one_part_only_and_nothing_is_lost(whole):
    parts = [whole.part(name) for name in ("train", "validation")]
    assert not set(parts[0].games.tolist()) & set(parts[1].games.tolist())
    assert 0 < parts[1].num_records < 150
    found = [record for part in parts for record in listed(part)]
    assert sorted(found) == sorted(slow(LINES, V1))
    facts = whole.manifest["parts"]
    assert facts["train"]["games"] + facts["validation"]["games"] == 30


@pytest.mark.parametrize("packed", PACK)
def test_the_bytes_depend_on_the_text_alone(tmp_path, whole, packed, monkeypatch):
    monkeypatch.setattr(preparation, "_BLOCK", 5000)
    for number, lines in enumerate((LINES[:100], LINES[100:])):
        (tmp_path / f"{number}.txt{packed}").write_bytes(PACK[packed](text(lines)))
    store = prepare_decisions(source(tmp_path), tmp_path / "store", 2 if packed == ".gz" else 1)
    assert content(store.folder) == content(whole.folder)


def test_a_finished_store_is_known_again_and_none_is_overwritten(tmp_path):
    store = made(tmp_path, LINES)
    before = content(store.folder)
    assert made(tmp_path, LINES).fingerprint == store.fingerprint
    with pytest.raises(UserError, match="another text or with other options"):
        made(tmp_path, LINES, validation_share=0.3)
    with pytest.raises(UserError, match="another text or with other options"):
        made(tmp_path, LINES[1:])
    assert content(store.folder) == before
    shutil.rmtree(store.folder)
    store.folder.mkdir()
    with pytest.raises(UserError, match="not a decision store"):
        made(tmp_path, LINES)


def test_a_decision_printed_once_for_each_winner_is_kept_once(tmp_path):
    """Also far apart, as in a file that was shuffled; what is alike in another game or was chosen otherwise stays."""
    again = [line(number // 10, number, winner=10) for number in range(0, 300, 3)]
    other_game = [line(99, 5)]
    other_choice = LINES[7].split(b"\t")
    other_choice[5] = b"%d" % ((int(other_choice[5]) + 1) % 12)
    lines = [*LINES, *again, *again[:7], *other_game, b"\t".join(other_choice)]
    random.Random(1).shuffle(lines)
    (tmp_path / "a").mkdir()
    store = made(tmp_path / "a", lines)
    facts = store.manifest["parts"].values()
    assert sum(part["duplicates"] for part in facts) == 107
    assert sum(part["records"] for part in facts) == 302
    parts = [store.part(name) for name in ("train", "validation")]
    kept = sorted(record[:3] for part in parts for record in listed(part))
    assert kept == sorted(record[:3] for record in slow([*LINES, *other_game, b"\t".join(other_choice)], V1))
    (tmp_path / "b").mkdir()
    store = made(tmp_path / "b", lines, keep_duplicates=True)
    assert sum(part["records"] for part in store.manifest["parts"].values()) == 409


def test_duplicates_are_found_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_KEYS", 16)
    monkeypatch.setattr(preparation, "_RECORDS", 8)
    store = made(tmp_path, [*LINES, *LINES[::2]])
    facts = store.manifest["parts"]
    assert sum(part["duplicates"] for part in facts.values()) == 150
    assert sum(part["records"] for part in facts.values()) == 300
    assert sum(part["games"] for part in facts.values()) == 30


def test_a_hash_that_two_decisions_share_does_not_lose_one(tmp_path, monkeypatch):
    from lmscripts.data import decisions

    monkeypatch.setattr(decisions, "_hash", lambda text: 7)
    store = made(tmp_path, LINES, validation_share=0.0)
    assert store.manifest["parts"]["train"]["records"] == 300


def test_without_an_id_nothing_is_a_duplicate(tmp_path):
    lines = [b"0,5\t3,4\t8\t1,4\t1\t\t7"] * 5
    store = made(tmp_path, lines, schema=Schema.from_json(SMALL), validation_share=0.0)
    assert store.manifest["parts"]["train"]["records"] == 5


def test_a_validation_file_of_its_own(tmp_path):
    (tmp_path / "held_out.txt").write_bytes(text(LINES[95:120]))
    store = made(tmp_path, LINES[:100], validation_files=(str(tmp_path / "held_out.txt"),))
    facts = store.manifest["parts"]
    assert (facts["train"]["records"], facts["validation"]["records"]) == (100, 25)
    assert store.sentences()[0].startswith("warning: 1 of the 3 held-out games of")


# ---- hostile files ----


def test_bad_lines_are_counted_and_named_or_a_reason_to_stop(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(text([GOLDEN, *HOSTILE.values(), b"", GOLDEN, b"\r"]) + GOLDEN[:150])
    report = TextReport()
    store = prepare_decisions(source(path, validation_share=0.0), tmp_path / "store", 1, report)
    said = "\n".join(report.sentences())
    assert f"{len(HOSTILE) + 1} records could not be read" in said
    assert f"too few fields, at {path}:2: 1, where kanachan-v1 has 7" in said
    assert "2 blank lines" in said
    assert store.manifest["parts"]["train"]["records"] == 1  # the line that is good stands there twice
    with pytest.raises(UserError, match=rf"{path}:2: too few fields"):
        prepare_decisions(source(path, on_bad_row="fail"), tmp_path / "other", 1)
    with pytest.raises(UserError, match="35 bad lines out, which --on_bad_row fail does not allow"):
        prepare_decisions(source(path, validation_share=0.0, on_bad_row="fail"), tmp_path / "store", 1)
    assert not (tmp_path / "other").exists()


def test_what_a_file_that_is_cut_off_still_has(tmp_path):
    whole = text(LINES)
    (tmp_path / "a.txt").write_bytes(whole[:-60])
    with pytest.raises(UserError, match=r"a\.txt:300: .*the file ends within this line"):
        prepare_decisions(source(tmp_path / "a.txt", on_bad_row="fail"), tmp_path / "s", 1)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(whole)[:-3000])
    report = TextReport()
    store = prepare_decisions(source(tmp_path / "b.txt.gz"), tmp_path / "s", 1, report)
    records = [record for name in ("train", "validation") for record in listed(store.part(name))]
    assert 0 < len(records) < 300
    assert sorted(records) == sorted(slow(LINES[: len(records)], V1))
    assert "1 files are damaged or cut off" in report.sentences()[1]
    with pytest.raises(UserError, match=r"b\.txt\.gz is damaged or cut off"):
        prepare_decisions(source(tmp_path / "b.txt.gz", on_bad_row="fail"), tmp_path / "t", 1)


def test_marks_and_line_ends_do_not_matter(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(LINES))
    store = prepare_decisions(source(path), tmp_path / "store", 1)
    (tmp_path / "plain").mkdir()
    plain = made(tmp_path / "plain", LINES)
    for name in ("train", "validation"):
        assert listed(store.part(name)) == listed(plain.part(name))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "there is no decision in x.txt"),
        (b"\n\n", "there is no decision in x.txt; 2 blank lines"),
        (b"x" * 3_000_000, "too few fields"),
        ("\n".join(["abc\tdef"] * 9).encode("utf-16"), "UTF-16; convert it first"),
        (gzip.compress(GOLDEN, mtime=0), "packed with gzip: let its name end in .gz"),
        (GOLDEN.replace(b"\t", b" "), "1 x too few fields"),
    ],
    ids=["nothing", "blank lines", "one long line", "UTF-16", "packed", "no tabs"],
)
def test_a_file_that_is_none_of_ours(tmp_path, data, words):
    (tmp_path / "x.txt").write_bytes(data)
    done = run_script(
        "prepare_annotations.py", "--input-file", tmp_path / "x.txt", "--output-dir", tmp_path / "s", check=False
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_store_that_was_changed_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = made(tmp_path, LINES).folder
    check_decisions(open_decisions(folder))
    labels = folder / "train" / "labels.bin"
    data = bytearray(labels.read_bytes())
    data[0] ^= 1
    labels.write_bytes(data)
    with pytest.raises(UserError, match=r"labels\.bin has hash"):
        check_decisions(open_decisions(folder))
    labels.write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"labels\.bin has \d+ bytes"):
        open_decisions(folder)
    shutil.copy(folder / "schema.json", tmp_path / "schema.json")
    schema = json.loads((folder / "schema.json").read_text())
    schema["fields"][2]["scales"][5] = 1
    (folder / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(UserError, match="fingerprint is not that of its text, schema and options"):
        open_decisions(folder)


# ---- the command ----


def test_the_command_and_a_look_inside(tmp_path):
    path = tmp_path / "decisions.txt"
    path.write_bytes(text([*LINES, LINES[0].replace(b"\t16,", b"\t10,"), b"oops"]))
    options = ["--training-data", path, "--output-dir", tmp_path / "store", "--validation-share", 0.2]
    said = run_script("prepare_annotations.py", *options, "--num-workers", 1).stdout
    assert "1 decisions repeat one of the same game" in said
    assert "1 x too few fields, at" in said
    assert "nothing was done" in run_script("prepare_annotations.py", *options).stdout
    said = run_script("prepare_annotations.py", "--output_dir", tmp_path / "store", "--inspect", 2).stdout
    assert said.count("progression: round begins") == 2
    assert "every file has the hash" in said
    assert run_script("prepare_annotations.py", "--input_file", path, "--inspect").stdout.count("  > ") == 3
    for useless in (["--validation_share", 0.1], ["--output_dir", tmp_path / "store"]):
        refused = run_script("prepare_annotations.py", "--input_file", path, "--inspect", *useless, check=False)
        assert "has no effect with --inspect" in refused.stderr
    refused = run_script("prepare_annotations.py", "--inspect", check=False)
    assert (refused.returncode, refused.stderr.count("--input_file is missing")) == (2, 1)


def test_validation_data_without_a_decision_is_refused(tmp_path):
    (tmp_path / "good.txt").write_bytes(GOLDEN + b"\n")
    (tmp_path / "bad.txt").write_bytes(changed(4, b"-1") + b"\n")
    how = {"schema": None, "validation_share": 0.0, "num_workers": 1, "on_bad_row": "skip"}
    files = [[str(tmp_path / name)] for name in ("good.txt", "bad.txt")]
    with pytest.raises(UserError, match=r"bad\.txt: no decision to validate on; .*out of range"):
        preparation.open_parts(*files, tmp_path / "run", **how)
    assert preparation.open_parts(files[0], [], tmp_path / "run", **how).held_out is None
