"""Schemas of decisions: the built-in ones, ids in words, and what a faulty schema is told."""

import json
import subprocess
import sys

import pytest

from lmscripts.data.schema import Schema, builtin_names, load_schema
from lmscripts.errors import UserError

SMALL = {
    "name": "answers",
    "lists": {"colour": ["red", "green"]},
    "fields": [
        {"name": "seen", "kind": "set", "vocab_size": 6, "max_length": 3, "ranges": [
            {"first": 0, "name": "light", "digits": ["colour", ["", "blinking"]]},
            {"first": 4, "name": "hour", "digits": [2]},
        ]},
        {"name": "sizes", "kind": "numeric", "max_length": 2, "scales": [1, 100]},
        {"name": "events", "kind": "sequence", "vocab_size": 9, "min_length": 0, "max_length": 20},
        {"name": "answers", "kind": "candidates", "vocab_size": 5, "max_length": 4},
        {"name": "chosen", "kind": "label"},
        {"name": "notes", "kind": "extra", "min_length": 0, "max_length": 3},
        {"name": "result", "kind": "extra"},
    ],
    "value": {"field": "result", "index": 0, "scale": 10},
}  # fmt: skip


def test_the_older_format_is_built_in():
    schema = load_schema("kanachan-v1")
    assert builtin_names() == ("kanachan-v1", "kanachan-v2")
    assert [field.num_ids for field in schema.token_fields] == [527, 2166, 548]
    assert (schema.num_ids, schema.pad_id, schema.value_id) == (3241, 3240, 3239)
    assert (schema.max_positions, schema.num_numeric, schema.max_candidates) == (33 + 6 + 113 + 32 + 1, 6, 32)
    assert schema.scales == (1, 1, 1e4, 1e4, 1e4, 1e4)
    assert [field.max_length for field in load_schema("kanachan-v2").token_fields] == [29, 109, 32]


@pytest.mark.parametrize("name", builtin_names())
def test_ranges_leave_nothing_out(name):
    schema = load_schema(name)
    for field in schema.token_fields:
        gaps = [n for n in range(field.vocab_size) if not any(each.first <= n < each.end for each in field.ranges)]
        assert gaps == ([1, 2, 3, 4] if field.kind == "sequence" else [])  # set aside for draws, never written
        words = [schema.words(field, number) for number in range(field.vocab_size)]
        assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("kind", "number", "words"),
    [
        ("set", 10, "own seat 3"),
        ("set", 54, "dora indicator 1st 7z"),
        ("set", 55, "dora indicator 2nd 0m"),
        ("set", 272, "tiles left 69"),
        ("set", 288, "grade of self celestial"),
        ("set", 349, "place of left 1st"),
        ("set", 357, "hand 1m #4"),
        ("set", 525, "drawn 7z"),
        ("sequence", 0, "round begins"),
        ("sequence", 5 + 148 * 2 + 4 * 31 + 2, "discard seat 2 2z drawn"),
        ("sequence", 597 + 90 + 8, "chi seat 1 35m+4m"),
        ("sequence", 957 + 120 * 3 + 40 + 5, "pon seat 3 from across 05m+5m"),
        ("sequence", 2016, "concealed kan seat 3 7z"),
        ("sequence", 2164, "added kan seat 3 7z"),
        ("candidates", 138, "discard 5z drawn"),
        ("candidates", 221, "skip"),
        ("candidates", 545, "ron from the left"),
    ],
)
def test_ids_in_words(kind, number, words):
    schema = load_schema("kanachan-v1")
    assert schema.words(schema.field(kind), number) == words


def test_types_of_candidates():
    schema = load_schema("kanachan-v1")
    starts = (0, 148, 182, 219, 220, 221, 222, 312, 432, 543)
    types = [schema.type_of(number) for number in range(546)]
    assert [types.index(each) for each in dict.fromkeys(types)] == list(starts)


def test_a_schema_of_ones_own(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(SMALL))
    schema = load_schema(path)
    assert Schema.from_json(schema.as_json()) == schema
    assert [schema.words(schema.fields[0], number) for number in range(6)] == [
        "light red", "light red blinking", "light green", "light green blinking", "hour 0", "hour 1",
    ]  # fmt: skip
    assert schema.words(schema.fields[2], 3) == "events 3"
    assert schema.type_of(1) == "answers"
    assert [schema.first_id(field) for field in schema.token_fields] == [0, 7, 17]
    assert (schema.num_ids, schema.value_id, schema.pad_id) == (24, 22, 23)
    assert (schema.value.index, schema.num_extra) == (3, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("fields"), "has no fields"),
        (lambda s: s.update(feilds=[]), "unknown key feilds"),
        (lambda s: s["fields"].pop(3), "0 columns of the kind candidates"),
        (lambda s: s["fields"].append(s["fields"][4]), "2 columns of the kind label"),
        (lambda s: s["fields"][0].update(kind="bag"), "kind bag; there are id, set"),
        (lambda s: s["fields"][0].update(vocab_size=-3), "vocab_size is -3"),
        (lambda s: s["fields"][0].update(vocab_size=5), "range 1 (hour) is 4 to 5"),
        (lambda s: s["fields"][0]["ranges"][1].update(first=3), "must lie between 4"),
        (lambda s: s["fields"][0]["ranges"][0].update(digits=["colours"]), "names the list colours; there are colour"),
        (lambda s: s["fields"][1].update(scales=[1]), "for each of 2 numbers"),
        (lambda s: s["fields"][1].update(scales=[1, 0]), "a scale that is not 0"),
        (lambda s: s["fields"][2].update(min_length=21), "21 to 20 numbers"),
        (lambda s: s["fields"][3].update(reserved=0), "VALUE token"),
        (lambda s: s["fields"][4].update(max_length=2), "cannot have"),
        (lambda s: s["fields"][4].update(name="seen"), "two columns named seen"),
        (lambda s: s["value"].update(index=1), "which no extra field has"),
        (lambda s: s["fields"][2].update(max_length=99999), "possible"),
    ],
)
def test_what_is_wrong_with_a_schema_is_said(tmp_path, change, words):
    content = json.loads(json.dumps(SMALL))
    change(content)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_schema(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_a_schema_that_is_not_there():
    with pytest.raises(UserError, match="no schema kanachan-v3: give a JSON file, or one of kanachan-v1, kanachan-v2"):
        load_schema("kanachan-v3")


def test_nothing_heavy_is_imported():
    program = "import sys, lmscripts.data.schema as s; s.load_schema('kanachan-v1')\n"
    program += "assert not {'numpy', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True)
