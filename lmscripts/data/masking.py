"""Choice of the tokens that a masked language model has to predict, and what the model sees in their place.

BERT's corruption (arXiv:1810.04805, section 3.1): of the chosen tokens 80 % become [MASK], 10 % a random token, 10 %
stay. Chosen are tokens, whole words (the whole-word models released with BERT, 2019) or spans of whole words (SpanBERT,
arXiv:1907.10529, section 3.1). Words are given by stored word starts, never guessed from the look of a token, so
wordpiece, unigram and character vocabularies behave alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lmscripts.counters import U64, hash32, hash_counters, small_permutations, stream_key, unit_interval
from lmscripts.errors import UserError

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int32]
IntArray64 = NDArray[np.int64]
Unit = Literal["token", "word", "span"]

# Purposes of the hashes: the same (seed, epoch, row) never feeds two decisions with the same numbers.
_WORDS, _CORRUPTION = np.uint64(stream_key(1)), np.uint64(stream_key(2))
_BUDGET, _SIDE = np.array([[stream_key(3)], [stream_key(7)]], np.uint64)
_SPANS, _REPLACEMENTS, _DRAWS = (np.uint64(stream_key(purpose)) for purpose in (4, 5, 6))

_MOST_WORDS, _SPAN_END = 10, 0.2  # words of the longest span, and parameter of the geometric distribution
# Quantiles of the words in a span: entry i is the length at the share i / 65536 of all spans.
_SPAN_SHARES = 1 - (1 - _SPAN_END) ** np.arange(_MOST_WORDS + 1)
_SPAN_WORDS = np.repeat(
    np.arange(1, _MOST_WORDS + 1, dtype=np.uint8),
    np.diff(np.round(_SPAN_SHARES / _SPAN_SHARES[-1] * 65536).astype(np.int64)),
)


@dataclass(frozen=True)
class MaskingPlan:
    """What is masked and how, the same for all rows of a run.

    Attributes:
        probability: share of the real tokens of a row to predict.
        slots: prediction slots per row, K; fixed so that batches keep one shape.
        mask_id: id of [MASK].
        replacement_ids: (R,) ids a random replacement is drawn from (no special or unused tokens).
        unit: what is chosen: single tokens, whole words, or spans of whole words.
        mask_share: share of the chosen tokens that become [MASK].
        random_share: share of the chosen tokens that become a random token.
        draws: also give a uniform random number for every slot.

    Raises:
        ValueError: there is no such unit.
    """

    probability: float
    slots: int
    mask_id: int
    replacement_ids: IntArray
    unit: Unit = "word"
    mask_share: float = 0.8
    random_share: float = 0.1
    draws: bool = False

    def __post_init__(self) -> None:
        if self.unit not in ("token", "word", "span"):
            raise ValueError(f"masks are chosen by token, word or span, not by {self.unit!r}")


@dataclass(frozen=True)
class Masks:
    """Masked rows. B rows, T tokens, K slots.

    Attributes:
        input_ids: (B, T) int32, what the model sees.
        positions: (B, K) int32, chosen positions in [0, T), in no special order; unused slots hold 0.
        labels: (B, K) int32, the original ids at the positions.
        weights: (B, K) float32, 1 for used slots and 0 for unused.
        draws: (B, K) float32 in [0, 1), the random number of the token at that position, whatever the batch; None
            where the plan asks for none.
    """

    input_ids: IntArray
    positions: IntArray
    labels: IntArray
    weights: NDArray[np.float32]
    draws: NDArray[np.float32] | None = None


def prediction_slots(probability: float, real_tokens: int) -> int:
    """Slots that no row of `real_tokens` tokens can overflow: its budget is rounded up or down at random."""
    return int(probability * real_tokens) + 1


def row_keys(seed: int, epochs: IntArray64, rows: IntArray64) -> U64:
    """(B,) hash keys of (seed, epoch, row)."""
    epoch_keys = hash_counters(np.array([stream_key(seed, 0x3A5C)], np.uint64), epochs.astype(np.uint64))
    return hash_counters(epoch_keys, rows.astype(np.uint64))


def mask_rows(ids: IntArray, content: BoolArray, word_starts: BoolArray, keys: U64, plan: MaskingPlan) -> Masks:
    """Choose tokens to predict and corrupt them.

    The budget of a row is probability x real tokens, rounded up or down at random so that its mean is exact. Words
    are taken in random order while they fit; a word longer than what is left of the budget is passed over. Only
    when no word is short enough does a row stay below its budget. No word is ever masked in part.

    With spans the words are taken span by span, in random order of the spans, so it is the last span that is cut short
    and the words behind it that fill what is left. What the model sees is decided once per span: all of it [MASK], all
    of it random tokens, or all of it unchanged. Deviation from SpanBERT: there spans are drawn one by one, anywhere in
    the text, and may run into earlier ones; here each row is first divided into spans, of the same lengths (geometric
    with p = 0.2 up to 10 words, mean 3.8) but ending with their document at the latest, and each is taken at most once.

    Args:
        ids: (B, T) original ids.
        content: (B, T) True at real text tokens (not at [CLS], [SEP], padding).
        word_starts: (B, T) True at the first token of each word; every run of content tokens begins with one.
        keys: (B,) from `row_keys`.
        plan: the settings.

    Raises:
        UserError: rows of more than 65536 tokens.
    """
    if ids.shape[1] > 1 << 16:
        raise UserError(f"rows may have at most 65536 tokens, got {ids.shape[1]}: give --sequence_length")
    starts = content if plan.unit == "token" else word_starts & content
    spans = _divide_into_spans(starts, content, keys) if plan.unit == "span" else None
    word, size, used = _choose_words(starts, content, spans, keys, plan)
    length = ids.shape[1]
    weights = np.arange(plan.slots, dtype=np.int32) < used[:, None]
    first = np.arange(0, ids.size, length)[:, None]
    flat = np.repeat(first, plan.slots, axis=1)
    flat[weights] = chosen = expand_ranges(word, size)
    positions = (flat - first).astype(np.uint32)
    labels = ids.take(flat)
    # What decides is the position of a token, or the number of its span within the row.
    decides = positions if spans is None else np.cumsum(spans > 0, axis=1, dtype=np.uint32).take(flat)
    seen = _corrupt(labels, keys, decides, positions, plan)
    corrupted = ids.copy()
    corrupted.reshape(-1)[chosen] = seen[weights]
    draws = None
    if plan.draws:
        draws = (hash32((keys ^ _DRAWS)[:, None], positions) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return Masks(corrupted, positions.view(np.int32), labels, weights.astype(np.float32), draws)


def expand_ranges(start: IntArray64, length: IntArray64) -> IntArray64:
    """Concatenation of range(start[i], start[i] + length[i]) for all i."""
    end = np.cumsum(length)
    return np.repeat(start - end + length, length) + np.arange(end[-1] if end.size else 0)


def _divide_into_spans(starts: BoolArray, content: BoolArray, keys: U64) -> NDArray[np.uint8]:
    """(B, T) words of the span that starts at each token, 0 for none; lengths are drawn one after the other."""
    words = starts.sum(1)
    pairs = hash32((keys ^ _SPANS)[:, None], np.arange((words.max(initial=0) + 1) // 2, dtype=np.uint32))
    end = np.cumsum(_SPAN_WORDS.take(pairs.view(np.uint16)), axis=1, dtype=np.int32)
    word_at = np.flatnonzero(starts)
    document = content.copy()  # where one begins
    document[:, 1:] &= ~content[:, :-1]
    begins = document.take(word_at)
    begins[(end + (np.cumsum(words) - words)[:, None])[end < words[:, None]]] = True
    first = np.flatnonzero(begins)
    spans = np.zeros(starts.shape, np.uint8)
    spans.reshape(-1)[word_at[first]] = np.diff(first, append=word_at.size)
    return spans


def _choose_words(
    starts: BoolArray, content: BoolArray, spans: NDArray[np.uint8] | None, keys: U64, plan: MaskingPlan
) -> tuple[IntArray64, IntArray64, IntArray]:
    """Choose words for each row's budget.

    The positions of a row are tried in a random order; those where a word starts propose that word, or those where a
    span starts the words of that span. The first few positions fill nearly every budget; for the other rows all
    positions are tried.

    Returns:
        Flat starts and lengths of the chosen words, row by row; and (B,) the tokens chosen in each row.
    """
    length = starts.shape[1]
    budget = plan.probability * np.bitwise_count(np.packbits(content, axis=1)).sum(1, dtype=np.uint32)
    budget = (budget + unit_interval(hash_counters(keys, _BUDGET))).astype(np.int32)
    ends = np.ones(starts.size + 1, np.bool_)  # where a word cannot go on: at its next start, or where content ends
    np.less_equal(content.reshape(-1), starts.reshape(-1), out=ends[:-1])
    # Spans are few and of very different lengths, so more positions are needed to fill a budget.
    tries = min(plan.slots * 5 // 4 + (8 if spans is None else 24), length)
    rows = np.arange(len(starts))
    # Of the word that starts at each token: 1 where it is one token long, 2 where it is longer; 0 where none starts.
    least = starts.reshape(-1).view(np.uint8) + (starts.reshape(-1) > ends[1:])

    def take(rows: IntArray64, tries: int, keys: U64, budget: IntArray) -> tuple[IntArray64, IntArray64, IntArray]:
        tried = small_permutations(keys ^ _WORDS, (length - 1).bit_length(), tries)
        flat = tried + (rows * length)[:, None]
        outside = tried >= length if length & (length - 1) else None
        if spans is not None:
            flat, outside = _words_of_spans(flat, outside, starts, spans, keys)
        size = _word_sizes(flat, outside, least, ends)
        taken, used = _fit(size, budget)
        words = np.flatnonzero(taken)
        return flat.take(words), size.take(words).astype(np.int64), used

    word, size, used = take(rows, tries, keys, budget)
    short = np.flatnonzero(used < budget)
    if short.size:
        more = take(short, 1 << (length - 1).bit_length(), keys[short], budget[short])
        full = np.repeat(used == budget, np.bincount(word // length, minlength=rows.size))
        word, size = np.concatenate([word[full], more[0]]), np.concatenate([size[full], more[1]])
        by_row = np.argsort(word // length, kind="stable")
        word, size, used[short] = word[by_row], size[by_row], more[2]
    return word, size, used


def _word_sizes(flat: IntArray64, outside: BoolArray | None, least: NDArray[np.uint8], ends: BoolArray) -> IntArray:
    """Lengths of the words that start at flat positions; 0 where none does, or `outside` says so."""
    size = least.take(flat, mode="wrap").astype(np.int32)
    if outside is not None:
        size[outside] = 0
    longer = np.flatnonzero(size > 1)
    reach = 2
    while longer.size:
        size.reshape(-1)[longer] = reach
        longer = longer[~ends[flat.reshape(-1)[longer] + reach]]
        reach += 1
    return size


def _words_of_spans(
    flat: IntArray64, outside: BoolArray | None, starts: BoolArray, spans: NDArray[np.uint8], keys: U64
) -> tuple[IntArray64, BoolArray]:
    """(B, N) flat starts of the words of the spans that start at (B, P) flat positions, and True where there is none.

    In half of the rows the words of a span come in the order of the text, in the other half backwards: what is cut off
    the last span is then no more often its end than its beginning.
    """
    num_words = spans.take(flat, mode="wrap").astype(np.int64)
    if outside is not None:
        num_words[outside] = 0
    proposed = np.flatnonzero(num_words)
    in_row, count = num_words.sum(1), num_words.take(proposed)
    number = np.cumsum(starts.reshape(-1), dtype=np.int32)
    word = number.take(flat.take(proposed)) - 1  # the first of each span
    step = np.where(hash_counters(keys, _SIDE) >> np.uint64(63), -1, 1).take(proposed // flat.shape[1])
    word += (step < 0) * (count - 1)
    within = expand_ranges(np.zeros_like(count), count)
    words: IntArray64 = np.flatnonzero(starts)[np.repeat(word, count) + np.repeat(step, count) * within]
    # The words of a row side by side, in the order of their spans.
    width = max(1, int(in_row.max(initial=0)))
    place = expand_ranges(np.arange(in_row.size) * width, in_row)
    side_by_side = np.zeros((in_row.size, width), np.int64)
    side_by_side.reshape(-1)[place] = words
    return side_by_side, np.arange(width) >= in_row[:, None]


def _fit(size: IntArray, budget: IntArray) -> tuple[BoolArray, IntArray]:
    """Take words, of (B, N) lengths or 0 for none, in order while they fit; those longer than what is left are passed.

    Returns:
        (B, N) True for the words taken, and (B,) the tokens taken.
    """
    total = np.cumsum(size, dtype=np.int32).reshape(size.shape)
    total -= total[:, :1] - size[:, :1]
    word = size > 0
    taken = (total <= budget[:, None]) & word
    used = np.zeros_like(budget)
    full = np.flatnonzero((total == budget[:, None]) & word) // size.shape[1]
    used[full] = budget[full]
    rows = np.flatnonzero(used < budget)
    used[rows] = (total[rows] * taken[rows]).max(1)
    while rows.size:
        # What did not fit is passed over; behind it the next words that are short enough are taken.
        left = (budget - used)[rows, None]
        rest = np.where(taken[rows] | (size[rows] > left), 0, size[rows])
        total = np.cumsum(rest, axis=1, dtype=np.int32)
        more = (rest > 0) & (total <= left)
        gain = (total * more).max(1)
        taken[rows] |= more
        used[rows] += gain
        rows = rows[(gain > 0) & (gain < left[:, 0])]
    return taken, used


def _corrupt(
    original: IntArray, keys: U64, decides: NDArray[np.uint32], positions: NDArray[np.uint32], plan: MaskingPlan
) -> IntArray:
    """(B, K) what the model sees at the chosen positions; `decides` says which random number of the row it is by."""
    draw = hash32((keys ^ _CORRUPTION)[:, None], decides)
    begin, end = int(plan.mask_share * 2**32), int((plan.mask_share + plan.random_share) * 2**32)
    seen = original + (np.int32(plan.mask_id) - original) * (draw < begin)  # quicker than a choice where it is random
    random = np.flatnonzero((draw >= begin) & (draw < end))
    if plan.unit != "span":
        # Where a draw falls between begin and end, its place there is the second random number.
        which, numbers = draw.take(random) - np.float64(begin), max(1, end - begin)
    else:
        which, numbers = hash32((keys ^ _REPLACEMENTS)[:, None], positions).take(random).astype(np.float64), 2**32
    which *= plan.replacement_ids.size / numbers
    seen.reshape(-1)[random] = plan.replacement_ids.take(which.astype(np.int64))
    return seen
