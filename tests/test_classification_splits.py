"""Splits: nothing in two parts, shares kept, the same every time, and steady when rows are added."""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from lmscripts.data.splits import SplitDocument, SplitSettings, split_documents, split_report, text_hash
from lmscripts.errors import UserError


def random_documents(choose, number, labels=3, groups=0, copies=0.0, several=False):
    """Documents of skewed classes, in groups of very different sizes, some of them with the text of another."""
    documents, hashes = [], []
    for place in range(number):
        count = choose.randint(1, 3) if several else 1
        weights = [4**-label for label in range(labels)]
        classes = tuple(sorted(set(choose.choices(range(labels), weights, k=count))))
        text = choose.choice(hashes) if hashes and choose.random() < copies else text_hash(f"{choose.random()} {place}")
        hashes.append(text)
        group = f"g{int(groups * choose.random() ** 3)}" if groups and choose.random() < 0.8 else None
        documents.append(SplitDocument(classes, text, group))
    return documents


CASES = [
    {"number": 300}, {"number": 1000, "groups": 60}, {"number": 400, "copies": 0.5},
    {"number": 500, "groups": 30, "copies": 0.1}, {"number": 600, "several": True, "labels": 5, "groups": 100},
    {"number": 40, "labels": 2}, {"number": 12, "labels": 2},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_text_and_no_group_is_in_two_parts_and_training_sees_every_class(case):
    for seed in range(8):
        documents = random_documents(random.Random(seed), **case)
        parts = split_documents(documents, SplitSettings(seed=seed))
        seen = defaultdict(set)
        for document, part in zip(documents, parts, strict=True):
            seen[document.text_hash].add(part)
            if document.group is not None:
                seen[document.group].add(part)
        assert all(len(each) == 1 for each in seen.values())
        assert set(parts) == {"train", "validation", "test"}
        trained = {label for document, part in zip(documents, parts) if part == "train" for label in document.labels}
        assert trained == {label for document in documents for label in document.labels}
        assert not [
            line for line in split_report(documents, parts, ["a", "b", "c", "d", "e"]) if "more than one" in line
        ]


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.7, 0.2, 0.1), (0.34, 0.33, 0.33), (70, 20, 10), (0.9, 0.1, 0)])
def test_shares_are_kept_to_the_largest_group_of_a_class(shares):
    settings = SplitSettings(train=shares[0], validation=shares[1], test=shares[2])
    for seed in range(12):
        choose = random.Random(seed)
        groups = [
            (label, size) for label in range(3) for size in [choose.randint(1, 12) for _ in range(8 * (label + 1))]
        ]
        documents = [
            SplitDocument((label,), text_hash(f"{seed} {number} {place}"), f"g{number}")
            for number, (label, size) in enumerate(groups)
            for place in range(size)
        ]
        parts = split_documents(documents, settings)
        for label in range(3):
            rows = Counter(part for document, part in zip(documents, parts) if document.labels == (label,))
            largest = max(size for other, size in groups if other == label)
            for part, share in zip(("train", "validation", "test"), settings.shares()):
                assert abs(rows[part] - share * rows.total()) <= largest + 1e-6


def test_without_groups_shares_are_exact_to_a_row_and_every_class_keeps_them():
    documents = [SplitDocument((number % 4 == 0,), text_hash(str(number))) for number in range(1000)]
    parts = split_documents(documents, SplitSettings(train=0.7, validation=0.2, test=0.1))
    counts = Counter((document.labels, part) for document, part in zip(documents, parts))
    for label, number in (((True,), 250), ((False,), 750)):
        for part, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
            assert abs(counts[label, part] - share * number) <= 1
    names = ["no", "yes"]
    report = "\n".join(split_report([SplitDocument((int(d.labels[0]),), d.text_hash) for d in documents], parts, names))
    assert "train: 700 documents (70.0%)" in report
    assert "yes 25 (10.0%)" in report


def test_small_classes_reach_every_part_from_four_rows_on():
    for rows in (4, 5, 7):
        documents = [SplitDocument((label,), text_hash(f"{label} {row}")) for label in range(2) for row in range(rows)]
        parts = split_documents(documents, SplitSettings())
        assert len({(d.labels, part) for d, part in zip(documents, parts)}) == 6


@pytest.mark.parametrize(("classes", "rows"), [(5000, 3), (1000, 4), (300, 5), (200, 6), (100, 7), (40, 9), (3, 2)])
def test_many_small_classes_keep_the_shares_of_the_whole(classes, rows):
    """Rounded class by class, 1,000 classes of 4 rows were halved into 2,000, 1,000 and 1,000."""
    documents = [SplitDocument((c,), text_hash(f"{c} {row}")) for c in range(classes) for row in range(rows)]
    parts = split_documents(documents, SplitSettings(train=0.7, validation=0.2, test=0.1))
    counts = Counter(parts)
    for part, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        due = share * len(documents)
        assert abs(counts[part] - due) <= (22 + 0.2 * due if part == "train" else max(11, 0.11 * due))
    for label in (0, classes // 2, classes - 1):
        of_class = Counter(part for document, part in zip(documents, parts) if document.labels == (label,))
        assert of_class["train"] >= rows * 0.7 - 2
    if rows == 3:  # no class has four, so that none must be in every part
        assert counts == {"train": 10_500, "validation": 3000, "test": 1500}


def test_documents_of_one_id_are_one_document():
    documents = [SplitDocument((n % 2,), text_hash(str(n)), None, None, f"id {n // 5}") for n in range(400)]
    parts = split_documents(documents, SplitSettings())
    assert all(len(set(parts[first : first + 5])) == 1 for first in range(0, 400, 5))
    assert set(parts) == {"train", "validation", "test"}
    given = [
        SplitDocument(d.labels, d.text_hash, None, ("train", "test")[n % 5 == 0], d.name)
        for n, d in enumerate(documents)
    ]
    settings = SplitSettings(method="given", validation=0)
    report = split_report(given, split_documents(given, settings), ["a", "b"])
    assert "beware: 80 ids stand in more than one part" in report


def test_an_id_of_its_own_changes_nothing():
    documents = random_documents(random.Random(7), 300, groups=40, copies=0.1)
    named = [replace(document, name=f"{n}") for n, document in enumerate(documents)]
    assert split_documents(named, SplitSettings()) == split_documents(documents, SplitSettings())


def test_the_order_of_rows_means_nothing_and_the_seed_does():
    documents = random_documents(random.Random(1), 400, groups=40, copies=0.1)
    parts = dict(zip(documents, split_documents(documents, SplitSettings())))
    turned = list(reversed(documents))
    assert dict(zip(turned, split_documents(turned, SplitSettings()))) == parts
    assert dict(zip(documents, split_documents(documents, SplitSettings(seed=2)))) != parts


def test_rows_that_are_added_move_little():
    documents = random_documents(random.Random(4), 2000, groups=300)
    before = split_documents(documents, SplitSettings())
    more = documents + random_documents(random.Random(5), 40)
    after = split_documents(more, SplitSettings())[: len(before)]
    moved = sum(a != b for a, b in zip(before, after))
    assert moved <= 40  # another seed moves about 34 % of 2,000
    assert sum(a != b for a, b in zip(before, split_documents(documents, SplitSettings(seed=9)))) > 400


def test_texts_are_the_same_but_for_width_and_white_space():
    assert text_hash("ＡＢＣ　テスト\n です") == text_hash(" ABC ﾃｽﾄ です")
    assert text_hash("ABC") != text_hash("abc")
    assert text_hash("ab c") != text_hash("abc")


def test_groups_may_be_left_out_of_it_but_texts_never():
    one = text_hash("same")
    documents = [SplitDocument((n % 2,), text_hash(str(n)), "all one group") for n in range(100)]
    documents += [SplitDocument((n % 2,), one, f"g{n}") for n in range(9)]
    parts = split_documents(documents, SplitSettings(use_groups=False))
    assert len(set(parts[:100])) == 3
    assert len(set(parts[100:])) == 1


def test_a_class_that_stands_only_in_mixed_groups_is_still_trained_on():
    for seed in range(20):
        documents = [SplitDocument((0,), text_hash(f"a{n}"), f"g{n}") for n in range(10)]
        documents += [SplitDocument((label,), text_hash(f"{label}b{n}"), "mixed") for label in (1, 2) for n in range(3)]
        parts = split_documents(documents, SplitSettings(seed=seed, train=0.4, validation=0.3, test=0.3))
        assert "train" in {part for document, part in zip(documents, parts) if document.labels == (1,)}


def test_given_parts():
    given = ["train"] * 20 + ["test"] * 4 + ["validation"] * 4
    documents = [SplitDocument((n % 2,), text_hash(str(n)), None, part) for n, part in enumerate(given)]
    assert split_documents(documents, SplitSettings(method="given")) == given
    for share in (0.3, 30):
        with pytest.raises(UserError, match=f"4 documents were given .*--validation_share {share:g} has no effect"):
            split_documents(documents, SplitSettings(method="given", validation=share))
    assert split_documents(documents, SplitSettings(method="given", validation=0)) == given
    without = [d for d in documents if d.given_part != "validation"]
    parts = split_documents(without, SplitSettings(method="given", train=0.8, validation=0.2, test=0))
    assert parts[20:] == ["test"] * 4
    assert Counter(parts[:20]) == {"train": 16, "validation": 4}
    assert split_documents(without, SplitSettings(method="given", train=1, validation=0, test=0)) == given[:24]
    leak = [*documents, SplitDocument((0,), documents[0].text_hash, None, "test")]
    report = split_report(leak, split_documents(leak, SplitSettings(method="given")), ["a", "b"])
    assert "beware: 1 texts stand in more than one part" in report
    with pytest.raises(UserError, match="1 of 29 documents have no part"):
        split_documents([*documents, SplitDocument((0,), b"")], SplitSettings(method="given"))
    with pytest.raises(
        UserError, match=r"1 of 3 labels are in no document for training, of which there are 20: 2; .*--labels"
    ):
        split_documents([*documents, SplitDocument((2,), b"", None, "test")], SplitSettings(method="given"))


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.8, 0.1, 0.2), "sum to 1.1"),
        ((0.5, 0.1, 0.1), "sum to 0.7"),
        ((0, 0.5, 0.5), "more than 0 for training"),
        ((1.2, -0.1, -0.1), "0 or more"),
        ((float("nan"), 0.1, 0.1), "0 or more"),
    ],
)
def test_shares_that_make_no_sense(shares, said):
    documents = random_documents(random.Random(1), 50)
    with pytest.raises(UserError, match=said):
        split_documents(documents, SplitSettings(train=shares[0], validation=shares[1], test=shares[2]))


def test_too_few_documents_for_a_part_is_a_sentence():
    documents = [SplitDocument((n % 2,), text_hash(str(n)), f"g{n % 2}") for n in range(10)]
    with pytest.raises(UserError, match="10 documents in 2 groups of their own"):
        split_documents(documents, SplitSettings())


def test_only_the_share_for_validation_is_looked_at_where_parts_are_given():
    assert SplitSettings("given").shares() == (0.9, 0.1, 0.0)
    assert SplitSettings("given", validation=20).shares() == (0.8, 0.2, 0.0)
    for share in (1, -0.1, float("nan"), 100):
        with pytest.raises(UserError, match="share for validation"):
            SplitSettings("given", validation=share).shares()


def test_a_report_is_bounded_and_has_no_control_characters():
    names = ["a\nb\x1b[31m", "x" * 5000, *(f"name {n}" for n in range(200))]
    documents = [SplitDocument((n % 202,), text_hash(str(n))) for n in range(606)] + [SplitDocument((), b"")]
    report = split_report(documents, split_documents(documents, SplitSettings()), names)
    assert all(line.isprintable() and len(line) < 2500 for line in report)
    assert "and 182 more labels" in report[0]
    assert "no label 1 (100.0%)" in " ".join(report)


def test_conflicting_labels_are_reported():
    documents = random_documents(random.Random(1), 60, labels=2)
    documents += [SplitDocument((label,), text_hash("same"), None) for label in (0, 1)]
    report = split_report(documents, split_documents(documents, SplitSettings()), ["a", "b"])
    assert "beware: 1 texts occur with different labels" in report


def test_a_long_chain_of_groups_and_texts_is_one_unit():
    """Each text stands in two groups and each group holds two texts: nothing of it may be taken apart."""
    hashes = [text_hash(str(n)) for n in range(20_001)]
    documents = [SplitDocument((n % 2,), t, f"g{n}") for n, pair in enumerate(pairwise(hashes)) for t in pair]
    documents += [SplitDocument((n % 2,), text_hash(f"other {n}")) for n in range(1000)]
    parts = split_documents(documents, SplitSettings(train=0.9, validation=0.05, test=0.05))
    assert len(set(parts[:40_000])) == 1
