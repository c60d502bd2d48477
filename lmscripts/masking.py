"""Choice of the tokens that a masked language model has to predict, and what the model sees in their place.

BERT's corruption (arXiv:1810.04805, section 3.1) over whole words (the whole-word models released with
BERT, 2019): of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay. Words are given by stored
word starts, never guessed from the look of a token, so wordpiece, unigram and character vocabularies behave alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmscripts.order import U64, hash32, hash_counters, small_permutations, stream_key, unit_interval

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int32]
IntArray64 = NDArray[np.int64]

# Purposes of the hashes: the same (seed, epoch, row) never feeds two decisions with the same numbers.
_WORDS, _CORRUPTION = np.uint64(stream_key(1)), np.uint64(stream_key(2))
_BUDGET = np.array([stream_key(3)], np.uint64)


@dataclass(frozen=True)
class MaskingPlan:
    """What is masked and how, the same for all rows of a run.

    Attributes:
        probability: share of the real tokens of a row to predict.
        slots: prediction slots per row, K; fixed so that batches keep one shape.
        mask_id: id of [MASK].
        replacement_ids: (R,) ids a random replacement is drawn from (no special or unused tokens).
        whole_words: choose whole words (True) or single tokens.
        mask_share: share of the chosen tokens that become [MASK].
        random_share: share of the chosen tokens that become a random token.
    """

    probability: float
    slots: int
    mask_id: int
    replacement_ids: IntArray
    whole_words: bool
    mask_share: float = 0.8
    random_share: float = 0.1


@dataclass(frozen=True)
class Masks:
    """Masked rows. B rows, T tokens, K slots.

    Attributes:
        input_ids: (B, T) int32, what the model sees.
        positions: (B, K) int32, chosen positions in [0, T), in no special order; unused slots hold 0.
        labels: (B, K) int32, the original ids at the positions.
        weights: (B, K) float32, 1 for used slots and 0 for unused.
    """

    input_ids: IntArray
    positions: IntArray
    labels: IntArray
    weights: NDArray[np.float32]


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

    Args:
        ids: (B, T) original ids.
        content: (B, T) True at real text tokens (not at [CLS], [SEP], padding).
        word_starts: (B, T) True at the first token of each word; every run of content tokens begins with one.
        keys: (B,) from `row_keys`.
        plan: the settings.

    Raises:
        ValueError: rows of more than 65536 tokens.
    """
    if ids.shape[1] > 1 << 16:
        raise ValueError(f"rows may have at most 65536 tokens, got {ids.shape[1]}")
    starts = word_starts & content if plan.whole_words else content
    word, size, used = _choose_words(starts, content, keys, plan)
    length = ids.shape[1]
    weights = np.arange(plan.slots) < used[:, None]
    flat = np.repeat(np.arange(0, ids.size, length), plan.slots).reshape(weights.shape)
    flat[weights] = expand_ranges(word, size)
    positions = flat - np.arange(0, ids.size, length)[:, None]
    labels = ids.take(flat)
    seen = _corrupt(labels, keys, positions.astype(np.uint32), plan)
    corrupted = ids.copy()
    corrupted.reshape(-1)[flat[weights]] = seen[weights]
    return Masks(corrupted, positions.astype(np.int32), labels, weights.astype(np.float32))


def expand_ranges(start: IntArray64, length: IntArray64) -> IntArray64:
    """Concatenation of range(start[i], start[i] + length[i]) for all i."""
    end = np.cumsum(length)
    return np.repeat(start - end + length, length) + np.arange(end[-1] if end.size else 0)


def _choose_words(
    starts: BoolArray, content: BoolArray, keys: U64, plan: MaskingPlan
) -> tuple[IntArray64, IntArray64, IntArray]:
    """Choose words for each row's budget.

    The positions of a row are tried in a random order; those where a word starts propose that word. The first few
    positions fill nearly every budget; for the other rows all positions are tried.

    Returns:
        Flat starts and lengths of the chosen words, row by row; and (B,) the tokens chosen in each row.
    """
    length = starts.shape[1]
    budget = plan.probability * content.view(np.uint8).sum(1, dtype=np.uint32)
    budget = (budget + unit_interval(hash_counters(keys, _BUDGET))).astype(np.int32)
    ends = np.ones(starts.size + 1, np.bool_)  # where a word cannot go on
    np.logical_or(starts.reshape(-1), ~content.reshape(-1), out=ends[:-1])
    tries = min(plan.slots * 5 // 4 + 8, length)
    rows = np.arange(len(starts))
    word, size, used = _try_positions(rows, tries, starts, ends, keys, budget)
    short = np.flatnonzero(used < budget)
    if short.size:
        every = 1 << (length - 1).bit_length()
        more = _try_positions(short, every, starts, ends, keys[short], budget[short])
        full = np.repeat(used == budget, np.bincount(word // length, minlength=rows.size))
        word, size = np.concatenate([word[full], more[0]]), np.concatenate([size[full], more[1]])
        by_row = np.argsort(word // length, kind="stable")
        word, size, used[short] = word[by_row], size[by_row], more[2]
    return word, size, used


def _try_positions(
    rows: IntArray64, tries: int, starts: BoolArray, ends: BoolArray, keys: U64, budget: IntArray
) -> tuple[IntArray64, IntArray64, IntArray]:
    """Take the words that start at the first `tries` positions of each row's order, while they fit its budget.

    Returns:
        As `_choose_words`, for `rows`.
    """
    length = starts.shape[1]
    tried = small_permutations(keys ^ _WORDS, (length - 1).bit_length(), tries).astype(np.int64)
    flat = tried + (rows * length)[:, None]
    size = starts.take(flat, mode="clip").astype(np.int32)
    if length & (length - 1):
        size[tried >= length] = 0
    longer = np.flatnonzero((size > 0) & ~ends.take(flat + 1, mode="clip"))
    reach = 2
    while longer.size:
        size.reshape(-1)[longer] = reach
        longer = longer[~ends[flat.reshape(-1)[longer] + reach]]
        reach += 1
    taken, used = _fit(size, budget)
    return flat[taken], size[taken].astype(np.int64), used


def _fit(size: IntArray, budget: IntArray) -> tuple[BoolArray, IntArray]:
    """Take words in order while they fit, passing over those longer than what is left.

    Args:
        size: (B, N) lengths of the words in the order of trying; 0 for none.
        budget: (B,) tokens to choose.

    Returns:
        (B, N) True for the words taken, and (B,) the tokens taken.
    """
    total = np.cumsum(size, axis=1, dtype=np.int32)
    taken = (total <= budget[:, None]) & (size > 0)
    used = (total * taken).max(1)
    rows = np.flatnonzero(used < budget)
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


def _corrupt(original: IntArray, keys: U64, positions: NDArray[np.uint32], plan: MaskingPlan) -> IntArray:
    """(B, K) what the model sees at the chosen positions, decided token by token."""
    draw = hash32((keys ^ _CORRUPTION)[:, None], positions)
    begin, end = int(plan.mask_share * 2**32), int((plan.mask_share + plan.random_share) * 2**32)
    # Where a draw falls between begin and end, its place there is the second random number.
    which = (draw - np.uint32(begin)).astype(np.float64) * (plan.replacement_ids.size / max(1, end - begin))
    seen = np.where(draw < end, plan.replacement_ids.take(which.astype(np.int64), mode="clip"), original)
    return np.where(draw < begin, np.int32(plan.mask_id), seen)
