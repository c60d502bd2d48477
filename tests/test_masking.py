import numpy as np
import pytest

from lmscripts.data.masking import MaskingPlan, mask_rows, prediction_slots, row_keys

LENGTH, MASK_ID = 128, 4


def make_rows(num_rows, mean_word=1.5, seed=0, real=None):
    """Rows with [CLS] and [SEP], words of random length, and optionally an empty end."""
    random = np.random.default_rng(seed)
    ids = random.integers(10, 2000, (num_rows, LENGTH)).astype(np.int32)
    content = np.zeros((num_rows, LENGTH), bool)
    end = LENGTH - 1 if real is None else 1 + real
    content[:, 1:end] = True
    starts = (random.random((num_rows, LENGTH)) < 1 / mean_word) & content
    starts[:, 1] = True
    return ids, content, starts


def plan(probability=0.15, unit="word", content=LENGTH - 2, **other):
    ids = np.arange(10, 2000, dtype=np.int32)
    return MaskingPlan(probability, prediction_slots(probability, content), MASK_ID, ids, unit, **other)


def keys(num_rows, seed=1, epoch=0):
    return row_keys(seed, np.full(num_rows, epoch), np.arange(num_rows))


def chosen(masks, shape):
    flags = np.zeros(shape, bool)
    row, slot = np.nonzero(masks.weights)
    flags[row, masks.positions[row, slot]] = True
    return flags


# Shares of words of 1, 2, ... tokens.
VOCABULARIES = {
    "single": [1],
    "wordpiece": [0.66, 0.22, 0.08, 0.03, 0.01],
    "unigram": [0.42, 0.32, 0.14, 0.08, 0.04],
    "character": [0.28, 0.37, 0.16, 0.09, 0.05, 0.03, 0.02],
}


def make_text(num_rows, length, vocabulary, seed=0):
    """Rows of words of a vocabulary, every third of two documents with [SEP] and [CLS] between them."""
    random = np.random.default_rng(seed)
    ids = random.integers(10, 2000, (num_rows, length)).astype(np.int32)
    content = np.ones(ids.shape, bool)
    content[:, [0, -1]] = False
    middle = random.integers(4, length - 6, num_rows)[::3]
    content[::3][np.arange(middle.size), middle] = content[::3][np.arange(middle.size), middle + 1] = False
    shares = VOCABULARIES[vocabulary]
    ends = np.cumsum(1 + random.choice(len(shares), ids.size, p=shares))
    starts = np.zeros(ids.size, bool)
    starts[ends[ends < ids.size]] = True
    starts = starts.reshape(ids.shape) & content
    starts[:, 1:] |= content[:, 1:] & ~content[:, :-1]
    return ids, content, starts


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("length", [128, 512])
def test_masked_share_is_the_budget(unit, vocabulary, length):
    num_rows = 10_000 if length == 128 else 2_500
    ids, content, starts = make_text(num_rows, length, vocabulary)
    masks = mask_rows(ids, content, starts, keys(num_rows), plan(unit=unit, content=length - 2))
    flags = chosen(masks, ids.shape)
    assert not (flags & ~content).any()
    assert abs(flags.sum() / content.sum() / 0.15 - 1) < 0.005
    assert (flags.sum(1) <= np.ceil(0.15 * content.sum(1))).all()
    assert flags.sum() == masks.weights.sum()


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("mean_word", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("real", [19, 60])
def test_masked_share_of_short_rows(unit, mean_word, real):
    ids, content, starts = make_rows(10_000, mean_word, real=real)
    flags = chosen(mask_rows(ids, content, starts, keys(10_000), plan(unit=unit)), ids.shape)
    # Short rows of long words cannot always fill their budget: no word may be cut for it.
    tolerance = 0.1 if real == 19 and unit != "token" and mean_word > 1 else 0.005
    assert abs(flags.sum() / content.sum() / 0.15 - 1) < tolerance


@pytest.mark.parametrize("unit", ["word", "span"])
def test_no_word_is_half_masked_and_every_token_is_as_likely(unit):
    ids, content, starts = make_rows(5_000, 2.0)
    flags = chosen(mask_rows(ids, content, starts, keys(5_000), plan(unit=unit)), ids.shape)
    word = np.cumsum(starts, axis=1) + 1000 * np.arange(5_000)[:, None]
    whole, masked = np.bincount(word[content]), np.bincount(word[flags], minlength=word.max() + 1)
    assert set(np.unique(masked[masked > 0] == whole[masked > 0])) == {True}
    by_position = flags[:, 1:-1].mean(0)
    assert abs(by_position - 0.15).max() < 0.03  # four standard errors are 0.02


def test_labels_and_positions_restore_the_original():
    ids, content, starts = make_rows(200)
    masks = mask_rows(ids, content, starts, keys(200), plan())
    restored = masks.input_ids.copy()
    row, slot = np.nonzero(masks.weights)
    restored[row, masks.positions[row, slot]] = masks.labels[row, slot]
    assert np.array_equal(restored, ids)
    for positions, weights in zip(masks.positions, masks.weights):
        used = positions[weights > 0]
        assert len(set(used.tolist())) == used.size


def test_corruption_is_80_10_10():
    ids, content, starts = make_rows(10_000)
    masks = mask_rows(ids, content, starts, keys(10_000), plan())
    flags = chosen(masks, ids.shape)
    seen, original = masks.input_ids[flags], ids[flags]
    assert abs((seen == MASK_ID).mean() - 0.8) < 0.005
    kept = seen == original
    assert abs(kept.mean() - 0.1) < 0.005
    random = seen[(seen != MASK_ID) & ~kept]
    assert random.min() >= 10
    assert random.max() < 2000
    assert abs(random.mean() - 1005) < 10
    assert np.array_equal(masks.input_ids[~flags], ids[~flags])


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_masks_depend_on_seed_epoch_and_row_alone(unit):
    ids, content, starts = make_text(300, LENGTH, "unigram")
    content[5, 90:] = starts[5, 90:] = False
    every = plan(unit=unit, draws=True)
    whole = mask_rows(ids, content, starts, keys(300), every)
    for part in (np.array([299, 5, 77]), np.array([5]), np.arange(300)[::-1]):
        alone = mask_rows(ids[part], content[part], starts[part], keys(300)[part], every)
        for name in ("input_ids", "positions", "labels", "weights", "draws"):
            assert np.array_equal(getattr(alone, name), getattr(whole, name)[part])
    for other in (keys(300, seed=2), keys(300, epoch=1)):
        different = mask_rows(ids, content, starts, other, every)
        assert not np.array_equal(different.input_ids, whole.input_ids)
        assert not np.array_equal(different.draws, whole.draws)


def spans_of(starts, content, row_keys):
    """(B, T) number of the span that each token is in."""
    from lmscripts.data import masking

    begin = masking._divide_into_spans(starts, content, row_keys) > 0
    return begin, np.cumsum(begin).reshape(begin.shape) - 1


def test_rows_are_divided_into_spans_of_whole_words():
    _, content, starts = make_text(4_000, 512, "wordpiece")
    begin, span = spans_of(starts, content, keys(4_000))
    assert not (begin & ~starts).any()
    of_document = content.copy()
    of_document[:, 1:] &= ~content[:, :-1]
    assert begin[of_document].all()  # no span goes from one document into the next
    words = np.bincount(span[starts])
    assert words.max() == 10
    # SpanBERT: geometric with p = 0.2 up to 10 words. The last spans of the documents are cut.
    wanted = 0.2 * 0.8 ** np.arange(10)
    assert abs(np.bincount(words, minlength=11)[1:] / words.size - wanted / wanted.sum()).max() < 0.007
    again, _ = spans_of(starts, content, keys(4_000, epoch=1))
    assert not np.array_equal(begin, again)


def test_spans_are_taken_whole_but_for_the_last():
    ids, content, starts = make_text(4_000, 512, "wordpiece")
    masks = mask_rows(ids, content, starts, keys(4_000), plan(unit="span", content=510))
    flags = chosen(masks, ids.shape)
    _, span = spans_of(starts, content, keys(4_000))
    whole, taken = np.bincount(span[starts]), np.bincount(span[starts & flags])
    whole = whole[: taken.size]
    cut = (taken > 0) & (taken < whole)
    row_of_span = np.zeros(whole.size, int)
    row_of_span[span[flags]] = np.nonzero(flags)[0]
    cuts = np.bincount(row_of_span[cut], minlength=4_000)
    assert cuts.max() > 0
    assert (cuts <= 1).mean() > 0.8  # further ones only where a word did not fit into what was left
    assert 3.3 < taken[taken > 0].mean() < 3.8


def test_a_span_is_corrupted_alike_with_a_random_token_for_each_of_its_tokens():
    ids, content, starts = make_text(10_000, LENGTH, "wordpiece")
    masks = mask_rows(ids, content, starts, keys(10_000), plan(unit="span"))
    flags = chosen(masks, ids.shape)
    _, span = spans_of(starts, content, keys(10_000))
    kept, masked = masks.input_ids == ids, masks.input_ids == MASK_ID
    kind = np.where(masked, 0, np.where(kept, 2, 1))[flags]
    number = span[flags]
    size = np.bincount(number)
    share = [np.bincount(number, kind == k)[size > 0] / size[size > 0] for k in range(3)]
    assert set(np.unique(share[0])) == {0.0, 1.0}
    # A random token may be by chance the original: then it looks kept.
    mixed = ~np.isin(share[1], (0.0, 1.0))
    assert mixed.mean() < 0.001
    for k, wanted in enumerate((0.8, 0.1, 0.1)):
        assert abs(share[k].mean() - wanted) < 0.01
        assert abs((kind == k).mean() - wanted) < 0.01
    random = masks.input_ids[flags][kind == 1]
    neighbours = number[kind == 1][1:] == number[kind == 1][:-1]
    assert (random[1:] == random[:-1])[neighbours].mean() < 0.01
    assert abs(random.mean() - 1005) < 15


def test_draws_are_uniform_and_asked_for():
    ids, content, starts = make_rows(5_000)
    assert mask_rows(ids, content, starts, keys(5_000), plan()).draws is None
    masks = mask_rows(ids, content, starts, keys(5_000), plan(draws=True))
    draws = masks.draws[masks.weights > 0].astype(np.float64)
    assert masks.draws.dtype == np.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(np.histogram(draws, 20, (0, 1))[0] / draws.size - 0.05).max() < 0.003
    seen = masks.input_ids[chosen(masks, ids.shape)] == MASK_ID
    order = np.argsort(masks.positions + LENGTH * np.arange(5_000)[:, None] + 1e9 * (masks.weights == 0), axis=None)
    draws = masks.draws.reshape(-1)[order][: seen.size]
    assert abs(draws[seen].mean() - draws[~seen].mean()) < 0.01  # independent of the corruption


@pytest.mark.parametrize(("mask_share", "random_share"), [(0.85, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_other_shares(mask_share, random_share):
    """ELECTRA: 85 % [MASK], the others unchanged, all predicted."""
    ids, content, starts = make_rows(10_000)
    other = plan(mask_share=mask_share, random_share=random_share)
    masks = mask_rows(ids, content, starts, keys(10_000), other)
    flags = chosen(masks, ids.shape)
    assert abs(flags.sum() / content.sum() / 0.15 - 1) < 0.005
    assert abs((masks.input_ids[flags] == MASK_ID).mean() - mask_share) < 0.005
    assert abs((masks.input_ids[flags] == ids[flags]).mean() - (1 - mask_share - random_share)) < 0.005
    row, slot = np.nonzero(masks.weights)
    assert np.array_equal(masks.labels[row, slot], ids[row, masks.positions[row, slot]])


def test_an_unknown_unit_is_an_error():
    with pytest.raises(ValueError, match="'words'"):
        plan(unit="words")


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("length", [100, 128])
def test_chosen_words_are_those_of_the_slow_definition(unit, length):
    """Positions in the row's order, each proposing the word or span that starts there: written out token by token."""
    from lmscripts.counters import hash_counters, small_permutations, unit_interval
    from lmscripts.data import masking

    ids, content, starts = make_text(300, length, "character")
    row_key = keys(300)
    flags = chosen(mask_rows(ids, content, starts, row_key, plan(unit=unit)), ids.shape)
    if unit == "token":
        starts = content
    span_begins, span = spans_of(starts, content, row_key)
    order = small_permutations(row_key ^ masking._WORDS, 7, 128)
    draw = unit_interval(hash_counters(row_key, masking._BUDGET))
    backwards = hash_counters(row_key, masking._SIDE) >> np.uint64(63)
    for row in range(300):
        left = int(np.floor(0.15 * content[row].sum() + draw[row]))
        expected = set()
        for position in order[row].tolist():
            words = []
            if position < length and (span_begins if unit == "span" else starts)[row, position]:
                words = [position]
            if words and unit == "span":
                words = np.flatnonzero(starts[row] & (span[row] == span[row, position])).tolist()
            for start in reversed(words) if backwards[row] else words:
                end = start + 1
                while content[row, end] and not starts[row, end]:
                    end += 1
                if end - start <= left:
                    expected |= set(range(start, end))
                    left -= end - start
        assert expected == set(np.flatnonzero(flags[row]).tolist())


@pytest.mark.parametrize("length", [16, 48, 100, 512])
def test_other_row_lengths(length):
    random = np.random.default_rng(0)
    ids = random.integers(10, 2000, (4000, length)).astype(np.int32)
    content = np.ones(ids.shape, bool)
    starts = random.random(ids.shape) < 0.8
    starts[:, 0] = True
    masks = mask_rows(ids, content, starts, keys(4000), plan(0.3, content=length))
    flags = chosen(masks, ids.shape)
    assert abs(flags.mean() / 0.3 - 1) < 0.005
    by_position = flags.mean(0)
    assert abs(by_position - 0.3).max() < 0.05


def test_pairs_of_tokens_are_chosen_independently():
    """With words of one token, two positions are chosen together as often as in a draw without replacement."""
    ids = np.full((40_000, 32), 50, np.int32)
    content = np.ones(ids.shape, bool)
    flags = chosen(mask_rows(ids, content, content, keys(40_000), plan(0.25, content=32)), ids.shape)
    together = (flags.T.astype(float) @ flags) / 40_000
    off_diagonal = together[~np.eye(32, dtype=bool)]
    assert abs(off_diagonal.mean() - 8 / 32 * 7 / 31) < 0.001
    assert off_diagonal.std() < 0.004


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("empty", [[2], [0, 1, 2, 3]])
def test_rows_without_text_have_no_targets(unit, empty):
    ids, content, starts = make_rows(4)
    content[empty] = False
    starts[empty] = False
    masks = mask_rows(ids, content, starts, keys(4), plan(unit=unit))
    assert masks.weights[empty].sum() == 0
    assert np.array_equal(masks.input_ids[empty], ids[empty])


def test_limits_are_errors():
    ids = np.zeros((1, 70_000), np.int32)
    flags = np.ones(ids.shape, bool)
    with pytest.raises(ValueError, match="65536"):
        mask_rows(ids, flags, flags, keys(1), plan())
