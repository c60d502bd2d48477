"""Sentence pairs: how they are drawn and packed, and runs on them."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_PRESET, launch, run_script
from runs import largest_difference, log_of, same_bits, weights
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification

from lmscripts import objectives
from lmscripts.data.packing import Layout
from lmscripts.data.pairs import Pair, PairSettings, document_pairs, open_pairs, truncated
from lmscripts.data.token_store import open_store
from lmscripts.errors import UserError
from lmscripts.models.families import family
from lmscripts.objectives.sentence_pairs import Settings

LAYOUT = Layout(64, "isolated", 2, 3, 0)


def drawn(sentences, most_tokens, settings, below, share, other):
    """The pairs of a document whose random numbers are written down beforehand; every one of them has to be used."""
    numbers, shares = iter(below), iter(share)

    def next_below(n):
        if n == 1 << 53:  # of a share
            return int(next(shares) * n)
        number = next(numbers)
        assert 0 <= number < n
        return number

    pairs = list(document_pairs(sentences, most_tokens, settings, next_below, other))
    assert next(numbers, None) is None
    assert next(shares, None) is None
    return pairs


def nothing(size):
    raise AssertionError("no other document was to be asked")


SENTENCES = [(100, 4), (104, 3), (107, 5)]


def test_worked_example_of_what_came_next():
    # Target 10: all 12 tokens are gathered, cut behind the second sentence (1 + 1), B is what came next (0.9). A has 7
    # tokens and B 5, so A loses two: one at its front (1), one at its back (0).
    pairs = drawn(SENTENCES, 10, PairSettings(), [1, 1, 0], [0.5, 0.9], nothing)
    assert pairs == [Pair((101, 5), (107, 5), 0, 2)]


def test_worked_example_of_a_negative_whose_sentences_are_put_back():
    asked = []

    def other(size):
        asked.append(size)
        return 500, 8

    # Cut behind the first sentence (1 + 0), negative (0.2): B is to have 10 - 4 tokens and gets 8, of which two are cut
    # (0 at the back, 1 at the front). The other two sentences make the next pair, of which both parts are as they were.
    pairs = drawn(SENTENCES, 10, PairSettings(), [0, 0, 1, 0], [0.5, 0.2, 0.9], other)
    assert asked == [6]
    assert pairs == [Pair((100, 4), (501, 6), 1, 2), Pair((104, 3), (107, 5), 0, 0)]


def test_shorter_target_is_drawn_once_for_a_document():
    # 0.05 < 0.1: the target is 2 + 1 tokens for all pairs; each sentence is longer, so each is a pair with a negative.
    pairs = drawn(SENTENCES, 10, PairSettings(), [1], [0.05], lambda size: (500, size))
    assert [pair.a for pair in pairs] == SENTENCES
    assert [pair.b for pair in pairs] == [(500, 1)] * 3
    assert {pair.label for pair in pairs} == {1}


def test_of_equal_parts_the_second_is_cut():
    assert truncated((0, 3), (10, 3), 5, lambda n: 0) == ((0, 3), (10, 2))
    assert truncated((0, 3), (10, 3), 4, lambda n: 1) == ((1, 2), (11, 2))


def test_order_exchanges_halves_and_divides_a_single_sentence():
    order = PairSettings(task="order")
    assert drawn(SENTENCES, 20, order, [0], [0.5, 0.4], nothing) == [Pair((104, 8), (100, 4), 1, 0)]
    assert drawn([(100, 4)], 20, order, [1], [0.5, 0.6], nothing) == [Pair((100, 2), (102, 2), 0, 0)]
    # Of a single token nothing can be said, but it is not lost.
    assert drawn([(100, 1)], 20, order, [], [0.5, 0.6], nothing) == [Pair((100, 1), (101, 0), -1, 0)]


# ---- of a store ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(store_dir):
    return open_store(store_dir)


def document_of(part, token):
    return int(np.searchsorted(part.document_tokens, token, side="right")) - 1


def test_negatives_are_of_other_documents_and_half_of_what_could_be_either(store):
    rows = open_pairs(store, "train", LAYOUT, PairSettings(passes=3))
    part, labels = rows.part, rows.label
    documents = np.array([[document_of(part, start) for start in pair] for pair in rows.segment_start])
    assert (documents[labels == 1, 0] != documents[labels == 1, 1]).all()
    positive = rows.segment_start[labels == 0]
    ends = positive[:, 0] + rows.segment_length[labels == 0, 0]
    assert (documents[labels == 0, 0] == documents[labels == 0, 1]).all()
    assert (positive[:, 1] >= ends).all()
    assert 0.5 <= labels.mean() < 0.75  # chunks of one sentence have no second part of their own
    assert rows.facts["negatives"] == int(labels.sum())
    # No token is dropped in silence: what the first parts and the true second parts do not hold is counted.
    assert (rows.segment_length.sum(1) <= LAYOUT.sequence_length - 3).all()
    assert rows.real_tokens == int(rows.segment_length.sum())
    order = open_pairs(store, "train", LAYOUT, PairSettings(task="order"))
    assert order.real_tokens + order.facts["cut_tokens"] == part.tokens.size
    assert abs((order.label == 1).mean() - 0.5) < 0.1


def test_pairs_do_not_depend_on_when_they_are_drawn_and_passes_differ(store, tmp_path):
    once, thrice = (open_pairs(store, "train", LAYOUT, PairSettings(passes=n)) for n in (1, 3))
    again = open_pairs(store, "train", LAYOUT, PairSettings(passes=1))
    assert np.array_equal(once.segment_start, again.segment_start)
    first, all_pairs = ({tuple(map(int, row)) for row in rows.segment_start} for rows in (once, thrice))
    assert first <= all_pairs
    assert len(all_pairs) > 2 * len(first)


@pytest.mark.parametrize("task", ["next", "order"])
def test_rows_hold_whole_pairs_apart_from_each_other(store, task):
    rows = open_pairs(store, "train", LAYOUT, PairSettings(task=task, short_share=0.5))
    assert rows.fill() > 0.85
    numbers = np.arange(rows.num_rows)
    laid_out, more = rows.read_pairs(numbers)
    assert int(laid_out.content.sum()) == rows.real_tokens
    assert more["pair_weights"].sum() == (rows.label >= 0).sum()
    seen = 0
    for row in range(rows.num_rows):
        for number, pair in enumerate(range(int(rows.first_segment[row]), int(rows.first_segment[row + 1]))):
            (a, b), (a_size, b_size) = rows.segment_start[pair], rows.segment_length[pair]
            tokens = rows.part.tokens
            expected = [2, *tokens[a : a + a_size], 3, *tokens[b : b + b_size], 3]
            here = laid_out.segments[row] == number
            assert laid_out.ids[row][here].tolist() == expected
            assert laid_out.positions[row][here].tolist() == list(range(len(expected)))
            assert more["token_types"][row][here].tolist() == [0] * (a_size + 2) + [1] * (b_size + 1)
            assert laid_out.ids[row][more["pair_places"][row, number]] == 2
            assert more["pair_labels"][row, number] == max(0, rows.label[pair])
            seen += 1
    assert seen == rows.facts["pairs"]


def test_one_document_has_no_negatives(tmp_path, tokenizer_dir):
    (tmp_path / "one.txt").write_text("今日はよい天気だ。\n散歩に出かけよう。\n川まで歩いた。\n", encoding="utf-8")
    arguments = ["--input_file", "one.txt", "--tokenizer_dir", tokenizer_dir, "--output_dir", "store"]
    run_script("prepare_corpus.py", *arguments, "--validation_fraction", 0, cwd=tmp_path)
    store = open_store(tmp_path / "store")
    with pytest.raises(UserError, match=r"has 1 document: .*--pair_task order"):
        open_pairs(store, "train", LAYOUT, PairSettings())
    assert open_pairs(store, "train", LAYOUT, PairSettings(task="order")).num_rows


def test_pairs_that_see_each_other_are_refused(store):
    with pytest.raises(UserError, match="--packing contiguous is not for pairs"):
        objectives.objective("sentence_pairs").rows(store, "train", None, 64, "contiguous", Settings())


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def presets(workspace):
    file = workspace / "presets.json"
    file.write_text(json.dumps({"bert-t": TINY_PRESET, "roberta-t": TINY_PRESET}), encoding="utf-8")
    return file


def arguments(store_dir, presets, run_dir, *more, family="bert"):
    shared = ["--dataset_dir", store_dir, "--parameter_file", presets, "--model_type", f"{family}-t"]
    shared += ["--model_dir", run_dir, "--objective", "sentence_pairs", "--hidden_dropout", 0, "--logging_steps", 1]
    return [*shared, "--do_whole_word_mask", *more]


@pytest.fixture(scope="module")
def bert(workspace, store_dir, presets):
    done = run_script("run_pretraining.py", *arguments(store_dir, presets, workspace / "bert"))
    return workspace / "bert", done.stdout


def test_a_run_saves_both_heads_and_says_what_its_pairs_are(bert):
    run_dir, said = bert
    assert all(words in said for words in ("pairs, ", "% negative; ", " tokens cut off"))
    model = AutoModelForPreTraining.from_pretrained(run_dir / "final")
    assert type(model).__name__ == "BertForPreTraining"
    assert type(AutoModelForMaskedLM.from_pretrained(run_dir / "final")).__name__ == "BertForMaskedLM"
    record = log_of(run_dir)[-1]
    assert {"eval_masked_loss", "eval_pair_loss", "eval_pair_accuracy"} <= record.keys()
    assert record["eval_loss"] == pytest.approx(record["eval_masked_loss"] + record["eval_pair_loss"])


def test_scores_are_those_that_plain_transformers_gives_a_pair_alone(bert, store):
    model = AutoModelForPreTraining.from_pretrained(bert[0] / "final").eval()
    rows = open_pairs(store, "train", LAYOUT, PairSettings(task="order", short_share=0.9, passes=2))
    row = int(np.argmax(np.diff(rows.first_segment)))
    kind = objectives.objective("sentence_pairs")
    trained = objectives.trained("sentence_pairs", family("bert"), {"": model}, "sdpa", Settings()).eval()
    laid_out, more = rows.read_pairs(np.array([row]))
    alone = []
    for number in range(int(np.diff(rows.first_segment)[row])):
        here = laid_out.segments[0] == number
        ids, types = (torch.from_numpy(a[0][here].astype(np.int64))[None] for a in (laid_out.ids, more["token_types"]))
        alone.append(model(input_ids=ids, token_type_ids=types).seq_relationship_logits[0])
    batch = {"input_ids": torch.from_numpy(laid_out.ids), "position_ids": torch.from_numpy(laid_out.positions)}
    batch |= {"segments": torch.from_numpy(laid_out.segments)}
    inputs = trained.attention_inputs(model, batch) | {"token_type_ids": torch.from_numpy(more["token_types"])}
    places = torch.from_numpy(more["pair_places"][0])
    with torch.no_grad():
        hidden = trained.family.encode(model, batch["input_ids"], batch["position_ids"], inputs, places)
        scores = trained.family.pair_scores({"": model}, hidden)[: len(alone)]
    assert len(alone) > 1
    assert (scores - torch.stack(alone)).abs().max() < 1e-5
    assert kind.PARTS[""] == "model"


def test_roberta_keeps_its_head_for_pairs_in_a_folder_of_its_own(workspace, store_dir, presets):
    run_dir = workspace / "roberta"
    run_script("run_pretraining.py", *arguments(store_dir, presets, run_dir, "--pair_task", "order", family="roberta"))
    model = AutoModelForMaskedLM.from_pretrained(run_dir / "final")
    head = AutoModelForSequenceClassification.from_pretrained(run_dir / "final" / "pairs")
    assert same_bits(dict(model.roberta.named_parameters()), dict(head.roberta.named_parameters()))


@pytest.mark.parametrize(("family", "new"), [("bert", "bert.pooler.dense.bias"), ("roberta", "classifier.dense.bias")])
def test_a_masked_model_goes_on_with_pairs(family, new, workspace, store_dir, presets):
    """The head for pairs is new, which is said; all else begins as it was."""
    given = arguments(store_dir, presets, workspace / f"masked_{family}", family=family)
    given[given.index("sentence_pairs")] = "masked"
    run_script("run_pretraining.py", *given, "--max_steps", 2)
    model, run_dir = workspace / f"masked_{family}" / "final", workspace / f"masked_then_pairs_{family}"
    more = ["--pretrained_model_name_or_path", model, "--learning_rate", 1e-9, "--max_steps", 1]
    done = run_script("run_pretraining.py", *arguments(store_dir, presets, run_dir, *more, family=family))
    assert f"new, as {model} has none: {new}" in done.stdout
    before, after = load_file(model / "model.safetensors"), load_file(run_dir / "final" / "model.safetensors")
    assert all(torch.allclose(after[name], tensor, atol=1e-7) for name, tensor in before.items())
    if family == "roberta":  # and on from there its head for pairs is its own
        again = run_script(
            "run_pretraining.py",
            *arguments(store_dir, presets, workspace / "again", "--max_steps", 1, family=family),
            "--pretrained_model_name_or_path",
            run_dir / "final",
        )
        assert "has none" not in again.stdout


def test_stopped_and_continued_ends_at_the_same_bits(workspace, bert, store_dir, presets):
    run_dir = workspace / "stopped"
    run_script("run_pretraining.py", *arguments(store_dir, presets, run_dir, "--stop_at_step", 5))
    run_script("run_pretraining.py", *arguments(store_dir, presets, run_dir, "--do_continue"))
    assert same_bits(weights(run_dir), weights(bert[0]))


@pytest.mark.launch
def test_uneven_processes_and_accumulation_give_what_one_process_gives(workspace, bert, store_dir, presets):
    run_dir = workspace / "uneven"
    more = ("--process_shares", 3, 1, "--micro_batch_size", 3)
    launch("cpu_2proc.yaml", "run_pretraining.py", *arguments(store_dir, presets, run_dir, *more))
    assert largest_difference(weights(run_dir), weights(bert[0])) < 1e-6


def test_another_family_and_options_of_pairs_elsewhere_are_refused(store_dir, workspace, presets):
    given = arguments(store_dir, presets, workspace / "none")
    done = run_script("run_pretraining.py", *given[:-1], "--objective", "masked", "--pair_passes", 2, check=False)
    assert done.returncode == 2
    done = run_script("run_pretraining.py", *given[6:], *given[:2], "--model_type", "gpt2-tiny", check=False)
    assert done.returncode == 2
    assert "--objective sentence_pairs has no head in the family gpt2" in done.stderr
