"""Order of rows and counter-based randomness: pure functions of a seed, never a generator with a state.

Every random decision of the project is a 64-bit hash of what it is about (seed, epoch, row, position). So which
process computes it, and when, cannot change it; and a run is continued by knowing one integer, the rows consumed.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 6


def splitmix64(values: U64) -> U64:
    """Finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijective mix of 64-bit integers, elementwise."""
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def stream_key(*parts: int) -> int:
    """One 64-bit key from a sequence of integers; any change of any part gives an unrelated key."""
    key = 0
    for part in parts:
        # The mix of `splitmix64` in plain integers: for single numbers it is much faster than arrays.
        mixed = ((key ^ (part & _MASK)) + _GOLDEN) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        key = mixed ^ (mixed >> 31)
    return key


def hash_counters(keys: U64, counters: U64) -> U64:
    """Uniform 64-bit integers for (key, counter) pairs; keys and counters are arrays and broadcast."""
    return splitmix64(keys + (counters + np.uint64(1)) * np.uint64(_GOLDEN))


def hash32(keys: U64, counters: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Uniform 32-bit integers for (64-bit key, counter) pairs; keys and counters are arrays and broadcast.

    The 32-bit mixer lowbias32 (C. Wellons, "Prospecting for hash functions", 2018), keyed in two places. Several
    times faster than `hash_counters` on many tokens.
    """
    mixed = keys.astype(np.uint32) + counters * np.uint32(0x9E3779B9)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x7FEB352D)
    mixed ^= (keys >> np.uint64(32)).astype(np.uint32)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x846CA68B)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def small_permutations(keys: U64, bits: int, count: int) -> NDArray[np.uint16]:
    """The first `count` images of N keyed permutations of range(2**bits), without a table.

    Four rounds of adding, multiplying by an odd number and folding the upper bits down, all invertible modulo
    2**bits, with numbers from the key.

    Args:
        keys: (N,) 64-bit keys.
        bits: at most 16.
        count: at most 2**bits.

    Returns:
        (N, count), no number twice in a row.
    """
    mask, fold = np.uint16((1 << bits) - 1), np.uint16((bits + 1) // 2)
    rounds = hash_counters(keys[:, None], np.arange(2, dtype=np.uint64)).view(np.uint16)  # (N, 8)
    added, factors = np.ascontiguousarray(rounds[:, ::2].T), np.ascontiguousarray(rounds[:, 1::2].T) | np.uint16(1)
    # Keys side by side: `count` is small, so loops over the keys are the longer ones.
    images = np.arange(count, dtype=np.uint16)[:, None] + added[0]
    for number in range(4):
        if number:
            images += added[number]
        images *= factors[number]
        images &= mask
        images ^= images >> fold
    return np.ascontiguousarray(images.T)


def unit_interval(bits: U64) -> NDArray[np.float64]:
    """Map 64-bit integers to floats in [0, 1), using the top 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(indices: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Pseudorandom permutation of range(size) without a table.

    A Feistel network on the digits of an index to two bases, about the square root of `size` each, with cycle walking
    for the values outside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", generalized Feistel). Fewer
    than one value in sqrt(size) is outside, so nearly every index takes one pass. Memory and time per index are
    constant, and any position of any epoch can be asked for directly.

    Returns:
        (N,) images of (N,) indices, each in [0, size); different indices have different images.
    """
    if size < 1:
        raise ValueError(f"a permutation needs a positive size, got {size}")
    bases = _bases(size)
    values = _feistel(np.asarray(indices, np.int64).astype(np.uint64), *bases, key)
    while (outside := np.flatnonzero(values >= size)).size:
        values[outside] = _feistel(values[outside], *bases, key)
    return values.astype(np.int64)


@lru_cache(maxsize=64)
def _bases(size: int) -> tuple[np.uint64, np.uint64]:
    """Two numbers near sqrt(size) whose product is at least `size` and hardly more."""
    root = isqrt(size - 1) + 1
    low = min(range(root, root + root // 4 + 1)[:64], key=lambda base: -size % base)
    return np.uint64(low), np.uint64(-(-size // low))


def _feistel(values: U64, low_base: np.uint64, high_base: np.uint64, key: int) -> U64:
    """One pass over values in [0, low_base * high_base), both bases below 2**32."""
    left, right = np.divmod(values, low_base)[::-1]
    for number, round_key in enumerate(_round_keys(key)):
        base = (low_base, high_base)[number % 2]  # of `left`
        left += ((splitmix64(right + round_key) >> np.uint64(32)) * base) >> np.uint64(32)
        left -= base * (left >= base)
        left, right = right, left
    return right * low_base + left


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[U64, ...]:
    return tuple(np.array([stream_key(key, number)], np.uint64) for number in range(_FEISTEL_ROUNDS))


def split_shares(total: int, weights: list[int]) -> list[int]:
    """Divide `total` rows in proportion to integer weights; the shares are whole and sum to `total`.

    The cut points are the rounded cumulative sums, so equal weights differ by at most one row.
    """
    if not weights or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(f"shares need weights of zero or more that are not all zero, got {weights}")
    whole = sum(weights)
    cuts = [(2 * total * passed + whole) // (2 * whole) for passed in itertools.accumulate(weights, initial=0)]
    return [end - start for start, end in itertools.pairwise(cuts)]
