"""Made-up decisions: valid by every rule of their format, deterministic, and decided by what their rule says."""

import collections
import itertools
import re

import numpy as np
import pytest
from conftest import ROOT, run_script

from lmscripts.data.decisions import parse
from lmscripts.data.schema import load_schema
from lmscripts.data.synthetic_decisions import RULES, generate
from lmscripts.errors import UserError

ANSWERS = str(ROOT / "sample_data" / "offered_answers.json")
KANACHAN = "kanachan-v1"
SCHEMAS = (KANACHAN, ANSWERS)


def made(schema, number, rule, seed=1, first=0):
    return list(generate(load_schema(schema), number, seed, rule, first))


def columns(line):
    game, *rest = line.split("\t")
    return [game, *([int(number) for number in field.split(",")] for field in rest)]


def chosen(line):
    fields = columns(line)
    return fields[4][fields[5][0]]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("rule", RULES)
def test_every_field_is_as_the_schema_says(schema, rule):
    fields = load_schema(schema).fields
    for line in made(schema, 700, rule):
        assert re.fullmatch(r"[\w-]+(\t-?\d+(,-?\d+)*){6}", line)
        for field, numbers in zip(fields, columns(line), strict=True):
            if field.kind == "id":
                continue
            assert field.min_length <= len(numbers) <= field.max_length
            if field.vocab_size:
                assert min(numbers) >= 0
                assert max(numbers) < field.vocab_size
            if field.kind in ("set", "candidates"):
                assert numbers == sorted(set(numbers))
            if field.kind == "label":
                assert 0 <= numbers[0] < len(columns(line)[4])


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("rule", RULES)
def test_the_parser_takes_every_record_and_loses_nothing(schema, rule):
    loaded, lines = load_schema(schema), made(schema, 500, rule)
    part, bad = parse([line.encode() for line in lines], loaded)
    assert not bad
    assert part.num_records == 500
    firsts = [loaded.first_id(field) for field in loaded.token_fields]
    for row, line in enumerate(lines):
        _, tokens, numbers, events, candidates, (label,), results = columns(line)
        ids = [first + number for first, column in zip(firsts, (tokens, events, candidates)) for number in column]
        assert part.ids[part.offsets[row] : part.offsets[row + 1]].tolist() == ids
        assert part.numeric[row].tolist() == numbers
        assert part.labels[row] == label
        assert part.extra[row].tolist() == results


FIRST_SLOTS = [
    0,
    1,
    5,
    9,
    13,
    17,
    20,
    24,
    28,
    32,
    36,
    37,
    41,
    45,
    49,
    53,
    56,
    60,
    64,
    68,
    72,
    73,
    77,
    81,
    85,
    89,
    92,
    96,
]
FIRST_SLOTS += [100, 104, 108, 112, 116, 120, 124, 128, 132, 136]


@pytest.mark.parametrize("rule", RULES)
def test_a_round_of_mahjong_holds_together(rule):
    """What the format asks beyond ranges: one id of each kind, slots from the front, points and ranks that add up."""
    groups = [(0, 5), (5, 7), (7, 11), (11, 14), (14, 18), (18, 55), (203, 273)]
    groups += [(273 + 20 * p + begin, 273 + 20 * p + end) for p in range(4) for begin, end in ((0, 16), (16, 20))]
    for line in made(KANACHAN, 700, rule):
        _, tokens, numbers, events, candidates, _, results = columns(line)
        assert all(sum(begin <= token < end for token in tokens) == 1 for begin, end in groups)
        assert sum(353 <= token < 489 for token in tokens) == 13
        for begin, end in itertools.pairwise(FIRST_SLOTS):
            slots = [token - 353 for token in tokens if begin <= token - 353 < end]
            assert slots == list(range(begin, begin + len(slots)))
        own_turn = max(tokens) >= 489
        discards = [event - 5 for event in events if 5 <= event < 597]
        assert events[0] == 0
        assert 0 not in events[1:]
        calls = [event for event in events if 597 <= event < 1437]
        kans = len([event for event in events if event >= 1437])
        left = next(token - 203 for token in tokens if 203 <= token < 273)
        # Each discard followed a draw, or a call; a kan draws once more.
        assert left == 70 - (len(discards) - len(calls)) - own_turn
        assert sum(18 <= token < 203 for token in tokens) == 1 + kans
        visible = collections.Counter(discard % 148 // 4 for discard in discards)
        visible.update(np.searchsorted(FIRST_SLOTS, [t - 353 for t in tokens if 353 <= t < 489], "right") - 1)
        visible.update(token - 489 for token in tokens if token >= 489)
        assert all(FIRST_SLOTS[tile] + number <= FIRST_SLOTS[tile + 1] for tile, number in visible.items())
        riichi = [discard for discard in discards if discard & 1]
        assert len({discard // 148 for discard in riichi}) == len(riichi)
        seat = next(token - 7 for token in tokens if 7 <= token < 11)
        last = discards[-1] // 148 if discards else None
        if own_turn:
            drawn = max(tokens) - 489
            tiles = {int(np.searchsorted(FIRST_SLOTS, t - 353, "right")) - 1 for t in tokens if 353 <= t < 489}
            assert candidates == sorted({4 * tile for tile in tiles} | {4 * drawn + 2 * (len(events) > 1)})
            assert last in (None, (seat - 1) % 4) or calls
        else:
            assert candidates[0] == 221
            assert (candidates[1] - 312) // 40 == (last - seat - 1) % 4
        assert sum(numbers[2:]) + 1000 * numbers[1] == 100_000
        assert numbers[1] >= len(riichi)
        assert len(results) == 12
        assert sum(results[1:5]) == 0
        assert sorted(results[5:9]) == [0, 1, 2, 3]


def test_event_sequences_are_as_long_as_real_ones():
    lengths = np.array([len(columns(line)[3]) for line in made(KANACHAN, 4000, "random")])
    assert 15 < lengths.mean() < 35
    assert lengths.max() <= 106
    assert np.percentile(lengths, 99) > 50


def test_labels_follow_the_rules_in_words():
    kanachan, answers = load_schema(KANACHAN), load_schema(ANSWERS)
    for rule in ("draw", "numeric", "sequence"):
        for line in made(KANACHAN, 300, rule):
            _, tokens, numbers, events, _, _, _ = columns(line)
            words = kanachan.words(kanachan.field("candidates"), chosen(line))
            if rule == "draw":
                tile = kanachan.words(kanachan.field("set"), max(tokens)).removeprefix("drawn ")
                assert words == f"discard {tile}{' drawn' * (len(events) > 1)}"
            elif rule == "numeric":
                assert (words == "skip") == (numbers[2] > numbers[3])
                assert numbers[2] != numbers[3]
            else:
                first = kanachan.words(kanachan.field("sequence"), events[1])
                assert words == f"discard {first.split()[3]}"
        for line in made(ANSWERS, 300, rule):
            _, tokens, numbers, events, _, _, _ = columns(line)
            words = answers.words(answers.field("candidates"), chosen(line))
            if rule == "draw":
                product = answers.words(answers.field("set"), tokens[0]).removeprefix("bought a ")
                assert words == f"offer parts for the {product}"
            elif rule == "numeric":
                assert words == "repair it " + (
                    "free of charge" if numbers[0] < numbers[1] else "at the customer's cost"
                )
            else:
                assert words == answers.words(answers.field("sequence"), events[0]).replace("asks about", "explain")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_record_depends_on_seed_and_number_alone(schema):
    whole = made(schema, 1200, "sequence")
    assert whole == [*made(schema, 37, "sequence"), *made(schema, 1163, "sequence", first=37)]
    assert whole[700] == made(schema, 1, "sequence", first=700)[0]
    assert len(set(whole)) == len(whole)
    assert made(schema, 1, "sequence", seed=2)[0] != whole[0]
    games = [line.split("\t")[0] for line in whole]
    assert len(set(games)) == 19
    assert games == sorted(games, key=games.index)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_random_labels_are_spread_evenly_over_the_candidates(schema):
    places = [(columns(line)[5][0], len(columns(line)[4])) for line in made(schema, 6000, "random")]
    for number in {number for _, number in places}:
        counts = np.bincount([place for place, of in places if of == number], minlength=number)
        expected = counts.sum() / number
        if expected > 20:
            assert ((counts - expected) ** 2 / expected).sum() < number + 6 * number**0.5, number


def test_the_sequence_rule_cannot_be_solved_without_the_sequence():
    """The right candidate among discards from the hand is any of them as far as set, numbers and candidates say.

    And not with a bag of events: most records have another discard, later, of a tile that is a candidate, too.
    """
    lines = made(KANACHAN, 6000, "sequence")
    places, decoys = collections.defaultdict(list), 0
    for line in lines:
        _, _, _, events, candidates, (label,), _ = columns(line)
        from_hand = [number for number in candidates if number % 4 == 0]
        places[len(from_hand)].append(from_hand.index(candidates[label]))
        decoys += any(
            (e - 5) % 148 // 4 * 4 in set(from_hand) - {candidates[label]} for e in events[2:] if 5 <= e < 597
        )
    assert decoys / len(lines) > 0.9
    for number, found in places.items():
        counts = np.bincount(found, minlength=number)
        if counts.sum() > 300:
            # Red fives and plain ones, four of the tiles, are never asked for: a little more for the others.
            assert counts.max() / counts.sum() < 1.6 / number, number
    answers = [columns(line) for line in made(ANSWERS, 6000, "sequence")]
    best = sum(max(collections.Counter(f[5][0] for f in answers if len(f[4]) == n).values()) for n in range(2, 6))
    assert best / len(answers) < sum(1 / len(f[4]) for f in answers) / len(answers) + 0.03


def test_the_numeric_rule_cannot_be_solved_without_the_numbers():
    """Neither by the ranks, which stand in the set, nor by the candidates."""
    by_rank = collections.defaultdict(list)
    for line in made(KANACHAN, 6000, "numeric"):
        tokens = set(columns(line)[1])
        own, right = (next(r for r in range(4) if 289 + 20 * p + r in tokens) for p in (0, 1))
        by_rank[own < right].append(columns(line)[5][0])
    assert all(abs(np.mean(labels) - 0.5) < 0.03 for labels in by_rank.values())


def test_what_cannot_be_made_is_said():
    with pytest.raises(UserError, match=r"kanachan-v2.*kanachan-v1, offered-answers"):
        made("kanachan-v2", 1, "draw")
    with pytest.raises(UserError, match=r"'best'.*draw, numeric, sequence, random"):
        made(KANACHAN, 1, "best")


def test_the_script_writes_the_same_in_parts_and_with_processes(tmp_path):
    run_script(
        "make_annotations.py", "-o", "new/whole.txt", "--num_records", "9000", "--num_workers", "2", cwd=tmp_path
    )
    run_script("make_annotations.py", "-o", "a.txt", "--num_records", "8500", cwd=tmp_path)
    run_script("make_annotations.py", "-o", "b.txt", "--num_records", "500", "--first_record", "8500", cwd=tmp_path)
    whole = (tmp_path / "new" / "whole.txt").read_bytes()
    assert whole == (tmp_path / "a.txt").read_bytes() + (tmp_path / "b.txt").read_bytes()
    done = run_script("make_annotations.py", "-o", "a.txt", "--num_records", "1", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "a.txt exists already; nothing was changed" in done.stderr
    assert len((tmp_path / "a.txt").read_text().splitlines()) == 8500
    done = run_script("make_annotations.py", "-o", "c.txt.gz", "--num_records", "1", cwd=tmp_path, check=False)
    assert (done.returncode, (tmp_path / "c.txt.gz").exists()) == (2, False)
    assert "c.txt.gz would be text under a name that ends with .gz" in done.stderr
