"""Made-up records of decisions whose choices follow a rule: to try a schema, test a trainer, show that it learns.

Every number of a record is a hash of the seed, the record's number and what it is for, so that record 7 is the same
whether it is made alone, in a block or on another machine. Two schemas have a maker here: `kanachan-v1`, and
`offered-answers`, which `docs/policy.md` makes from scratch. Both follow the same rules, each in its own words:

- `draw`: what is chosen stands among the set (the drawn tile; the product that was bought);
- `numeric`: two candidates, decided by which of two numbers is larger (the own score; the days of warranty);
- `sequence`: what came first in the event sequence (the first discard of the round; the first question);
- `random`: any candidate, so that nothing can be learnt beyond the number of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lmscripts.counters import U64, hash_counters, stream_key
from lmscripts.errors import UserError

if TYPE_CHECKING:
    from lmscripts.data.schema import Schema

RULES = ("draw", "numeric", "sequence", "random")
RECORDS_PER_GAME = 64
_BLOCK = 512  # records that are made at once
_ABSENT = 1 << 30  # sorts behind every id

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


def generate(schema: Schema, number: int, seed: int, rule: str, first: int = 0) -> Iterator[str]:
    """Lines, without line ends, of the records `first` to `first + number` of a seed.

    Raises:
        UserError: nothing here makes records of this schema, or there is no such rule.
    """
    if schema.name not in _MAKERS:
        raise UserError(f"records of the schema {schema.name!r} cannot be made up, only of {', '.join(_MAKERS)}")
    if rule not in RULES:
        raise UserError(f"there is no rule {rule!r}, only {', '.join(RULES)}")
    for begin in range(first, first + number, _BLOCK):
        records = np.arange(begin, min(begin + _BLOCK, first + number), dtype=np.uint64)
        yield from _lines(_MAKERS[schema.name](_Draws(records, seed), rule), records, seed)


def _lines(columns: list[Ints], records: U64, seed: int) -> Iterator[str]:
    """Text of columns of (N, width) numbers, of which the absent ones are left out, behind the id of the game."""
    counts = [(column < _ABSENT).sum(axis=1).tolist() for column in columns]
    for place, row in enumerate(zip(*(column.tolist() for column in columns))):
        fields = [",".join(map(str, values[: count[place]])) for values, count in zip(row, counts)]
        game = int(records[place]) // RECORDS_PER_GAME
        key = f"{stream_key(seed, game):016x}"
        yield "\t".join((f"210101-{game % (1 << 32):08x}-{key[:4]}-{key[4:8]}-{key[8:12]}-{key[12:]}00000000", *fields))


@dataclass(frozen=True)
class _Draws:
    """Random numbers of N records; `numbers` (N,) are the records, or what several of them have in common."""

    numbers: U64
    seed: int

    def bits(self, purpose: str, width: int = 1) -> U64:
        """(N, width) hashes."""
        keys = hash_counters(np.array([stream_key(self.seed, *purpose.encode())], np.uint64), self.numbers)
        return hash_counters(keys[:, None], np.arange(width, dtype=np.uint64))

    def many(self, most: int, purpose: str, width: int) -> Ints:
        """(N, width) whole numbers below `most`."""
        return (((self.bits(purpose, width) >> np.uint64(32)) * np.uint64(most)) >> np.uint64(32)).astype(np.int64)

    def below(self, most: int, purpose: str) -> Ints:
        """(N,) whole numbers below `most`."""
        return self.many(most, purpose, 1)[:, 0]

    def order(self, width: int, purpose: str) -> Ints:
        """(N, width) permutations of range(width)."""
        return self.bits(purpose, width).argsort(axis=1)

    def of_games(self) -> _Draws:
        """The numbers that the records of a game have in common."""
        return _Draws(self.numbers // np.uint64(RECORDS_PER_GAME), self.seed)


def _choice(draws: _Draws, rule: str, candidates: Ints, right: Ints) -> Ints:
    """(N, 1) place of the candidate `right` (N,) among sorted ones (N, K), or any place by the rule `random`."""
    counts = (candidates < _ABSENT).sum(axis=1)
    random = draws.bits("label")[:, 0] % counts.astype(np.uint64)
    found = (candidates < right[:, None]).sum(axis=1)
    return np.asarray(random if rule == "random" else found, np.int64)[:, None]


# ---- kanachan-v1: a simplified round of mahjong ------------------------------------------------------------------
#
# Tiles come from one shuffled wall, so none is seen more often than it exists; turns, draws and riichi are those of the
# game. What is simplified: the player whose decision it is neither calls nor declares; which tiles of their hands the
# others call with is made up; the only candidates are discards, or passing and a pon.

# Physical tiles 0..135, those of a code side by side: one of each red five, three of its plain fives, four of others.
_COPIES = np.array([1 if code in (0, 10, 20) else 3 if code in (5, 15, 25) else 4 for code in range(37)])
_FIRST_COPY = np.concatenate([[0], _COPIES.cumsum()])
_CODES = np.repeat(np.arange(37), _COPIES)
_PLAIN = np.flatnonzero(_COPIES == 4)
# Triplets by the code of the tile that is called: 5 of three plain fives, 6 with the red one in the hand, 7 for it.
_PENG = np.array([11 * s + [6, 0, 1, 2, 3, 4, 7, 8, 9, 10][n] for s in range(3) for n in range(10)] + [*range(33, 40)])
# Runs by the number of the tile that is called, 0 for a red five: which of a suit's thirty it may complete.
_CALLED_FOR = (
    [13, 15, 17],
    [0],
    [1, 2],
    range(3, 7),
    range(7, 12),
    [12, 14, 16],
    range(18, 23),
    range(23, 27),
    [27, 28],
    [29],
)
_CHI = np.array([np.resize(list(runs), 60) for runs in _CALLED_FOR])
_DRAWN, _DORA, _DISCARDS = 13, 14, 19  # places in the wall behind the hand
_MOST_EVENTS, _MOST_CALLS = 113, 12
_SKIP, _PON = 221, 312


def _mahjong(draws: _Draws, rule: str) -> list[Ints]:
    reacts = np.full(len(draws.numbers), rule == "numeric")
    if rule == "random":
        reacts = draws.below(2, "reacts") == 1
    tile = _PLAIN[draws.below(len(_PLAIN), "tile")]
    wall = _wall(draws, tile, reacts, rule)
    table = _play(draws, wall, reacts, least=4 if rule == "sequence" else 0)
    hand = np.sort(wall[:, :_DRAWN], axis=1)
    scores = _scores(draws, table)

    own_turn = ~reacts
    # The dealer's fourteenth tile counts as drawn, but its discard is written as one from the hand.
    drawn_discard = 4 * wall[:, _DRAWN] + 2 * (table.events[:, 1] < _ABSENT)
    discards = _distinct(np.concatenate([4 * hand, drawn_discard[:, None]], axis=1))
    call = _PON + 40 * ((table.last - table.seat - 1) % 4) + _PENG[tile]
    answers = np.full_like(discards, _ABSENT)
    answers[:, :2] = np.stack([np.full_like(call, _SKIP), call], axis=1)
    candidates = np.sort(np.where(own_turn[:, None], discards, answers), axis=1)
    right = np.where(reacts, np.where(scores[:, 0] > scores[:, 1], _SKIP, call), drawn_discard)
    if rule == "sequence":
        right = 4 * tile
    numbers = np.concatenate([draws.below(6, "ben")[:, None], table.sticks[:, None], 100 * scores], axis=1)
    return [
        _sparse(draws, wall, hand, table, own_turn),
        numbers,
        table.events,
        candidates,
        _choice(draws, rule, candidates, right),
        _results(draws, numbers, table.seat),
    ]


def _wall(draws: _Draws, tile: Ints, reacts: Mask, rule: str) -> Ints:
    """(N, 136) codes of tiles: 13 of the hand, the drawn one, 5 dora indicators, then the discards in their order.

    Who reacts has two of `tile` in the hand and sees a third one (at the place of the drawn one); by the rule
    `sequence` one is in the hand and one is the first discard.
    """
    wall = draws.order(136, "wall")
    rows = np.arange(len(wall))

    def put(copy: int, place: int, where: Mask) -> None:
        physical = _FIRST_COPY[tile] + copy
        there = (wall == physical[:, None]).argmax(axis=1)
        wall[rows[where], there[where]] = wall[where, place]
        wall[where, place] = physical[where]

    if rule == "sequence":
        put(0, 0, ~reacts)
        put(1, _DISCARDS, ~reacts)
    elif reacts.any():
        for copy, place in enumerate((0, 1, _DRAWN)):
            put(copy, place, reacts)
    return _CODES[wall]


def _distinct(numbers: Ints) -> Ints:
    """(N, W) the numbers of each row in ascending order, each once."""
    ordered = np.sort(numbers, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = _ABSENT
    return np.sort(ordered, axis=1)


@dataclass
class _Table:
    """N rounds up to the decision; seats are absolute, the decision is that of `seat`."""

    seat: Ints
    dealer: Ints
    events: Ints  # (N, 113)
    last: Ints  # who discarded last
    left: Ints  # tiles that are left in the wall
    declared: Mask  # (N, 4) riichi, by seat
    doras: Ints
    sticks: Ints


def _play(draws: _Draws, wall: Ints, reacts: Mask, least: int) -> _Table:
    """Let the four play until it is the turn of the one whose decision it is, or another has discarded what is called.

    All records take their next discard at the same time.
    """
    size, rows = len(wall), np.arange(len(wall))
    seat, dealer = draws.below(4, "seat"), draws.below(4, "dealer")
    length = 24 + draws.many(19, "length", 2).sum(axis=1)  # discards of the whole round
    stop = np.maximum(least, draws.below(1 << 20, "stop") * length >> 20)
    riichi_from, luck = draws.many(120, "riichi", 4), draws.many(1000, "luck", 80)
    whose, hands = draws.many(3, "whose", 80), draws.many(60, "hands", 80)
    events, counts = np.full((size, _MOST_EVENTS), _ABSENT), np.ones(size, np.int64)
    events[:, 0] = 0
    actor, last, taken, doras = dealer.copy(), dealer.copy(), np.zeros(size, np.int64), np.ones(size, np.int64)
    declared, opened, calls = np.zeros((size, 4), bool), np.zeros((size, 4), bool), np.zeros(size, np.int64)
    after_call, playing = np.zeros(size, bool), np.ones(size, bool)

    def write(event: Ints, where: Mask) -> None:
        events[rows[where], counts[where]] = event[where]
        counts[where] += 1

    for step in range(80):
        ready, others = step >= stop, actor != seat
        playing &= ~ready | reacts | others
        if not playing.any():
            break
        final = playing & ready & reacts & others
        tile = np.where(final, wall[:, _DRAWN], wall[:, _DISCARDS + step])
        before = declared[rows, actor]
        declares = playing & others & ~before & ~opened[rows, actor] & (step >= 12 + riichi_from[rows, actor])
        from_draw = before | (((luck[:, step] & 1) == 1) & ~after_call & (step > 0))
        write(5 + 148 * actor + 4 * tile + 2 * from_draw + declares, playing)
        declared[rows, actor] |= declares
        taken += playing & ~after_call
        last = np.where(playing, actor, last)
        playing &= ~final

        # One in eleven discards is called, not shortly before the decision: the wall would not suffice.
        chance = luck[:, step] >> 1
        next_one, any_one = (actor + 1) % 4, (actor + 1 + whose[:, step]) % 4
        chi = (chance < 20) & (tile < 30)
        caller = np.where(chi, next_one, any_one)
        called = playing & (step + 1 < stop) & (chance < 45) & (calls < _MOST_CALLS)
        called &= (caller != seat) & ~declared[rows, caller]
        kan = called & ~chi & (chance == 44) & (doras < 5)
        relative = (actor - caller - 1) % 4
        run = 30 * (tile // 10) + _CHI[tile % 10, hands[:, step]]
        event = np.where(chi, 597 + 90 * caller + run, 957 + 120 * caller + 40 * relative + _PENG[tile])
        write(np.where(kan, 1437 + 111 * caller + 37 * relative + tile, event), called)
        opened[rows, caller] |= called
        calls, doras, after_call = calls + called, doras + kan, called & ~kan
        actor = np.where(called, caller, next_one)
    carried = draws.below(2, "carried")
    left = 70 - taken - ~reacts
    return _Table(seat, dealer, events, last, left, declared, doras, declared.sum(axis=1) + carried)


def _scores(draws: _Draws, table: _Table) -> Ints:
    """(N, 4) hundreds of points: self, right, across, left; with the sticks on the table they make 1,000.

    The own score and that of the right differ by 500 points or more.
    """
    own = 180 + draws.below(140, "own")
    lead = (15 + draws.below(95, "lead")) * (2 * draws.below(2, "ahead") - 1)
    rest = 1000 - 2 * own + lead
    across = rest // 2 + draws.below(121, "across") - 60
    scores = np.stack([own, own - lead, across, rest - across], axis=1)
    seats = (table.seat[:, None] + np.arange(4)) % 4
    scores -= 10 * np.take_along_axis(table.declared, seats, axis=1)
    scores[:, 2] -= 10 * (table.sticks - table.declared.sum(axis=1))
    return scores


def _sparse(draws: _Draws, wall: Ints, hand: Ints, table: _Table, own_turn: Mask) -> Ints:
    """(N, 33) ids of the set. The ranks are apart from the scores, or they would tell what the numeric rule asks."""
    games = draws.of_games()
    players = np.arange(4)
    seats = (table.seat[:, None] + players) % 4
    grades = np.take_along_axis(games.many(16, "grade", 4), seats, axis=1)
    doras = 18 + 37 * np.arange(5) + wall[:, _DORA:_DISCARDS]
    same = np.zeros_like(hand)
    for place in range(1, hand.shape[1]):  # copies of a tile take its first slots
        same[:, place] = np.where(hand[:, place] == hand[:, place - 1], same[:, place - 1] + 1, 0)
    single = [games.below(5, "room"), 5 + games.below(2, "style"), 7 + table.seat, 11 + draws.below(3, "wind")]
    single += [14 + table.dealer, 203 + table.left, np.where(own_turn, 489 + wall[:, _DRAWN], _ABSENT)]
    several = [np.where(np.arange(5) < table.doras[:, None], doras, _ABSENT), 273 + 20 * players + grades]
    several += [289 + 20 * players + draws.order(4, "rank"), 353 + _FIRST_COPY[hand] + same]
    return np.sort(np.concatenate([np.stack(single, axis=1), *several], axis=1), axis=1)


def _results(draws: _Draws, numbers: Ints, seat: Ints) -> Ints:
    """(N, 12) how it ended: the one with most points wins from all, so that the own gain can be learnt, too."""
    scores, ben = numbers[:, 2:], numbers[:, :1]
    wins = np.arange(4) == scores.argmax(axis=1)[:, None]
    gains = np.where(wins, 3000 + 300 * ben, -1000 - 100 * ben)
    seats = (seat[:, None] + np.arange(4)) % 4
    by_rank = np.argsort(-4 * (scores + gains) + seats, axis=1)  # of equal ones the first seat
    ranks = np.argsort(by_rank, axis=1)
    final = np.take_along_axis(draws.of_games().order(4, "final rank"), seat[:, None], axis=1)
    points = np.array([41200, 28500, 19100, 11200])[final]
    gradings = np.array([90, 35, -15, -110])[final]
    return np.concatenate([draws.many(19, "end", 1), gains, ranks, final, points, gradings], axis=1)


# ---- offered-answers: customers of a shop ------------------------------------------------------------------------

_PRODUCTS, _TOPICS = 8, 6
_OFFER, _FREE, _PAID = _TOPICS, _TOPICS + _PRODUCTS, _TOPICS + _PRODUCTS + 1  # answers behind the explanations


def _offered_answers(draws: _Draws, rule: str) -> list[Ints]:
    size = len(draws.numbers)
    product = draws.below(_PRODUCTS, "product")
    tags = np.where(draws.many(3, "tags", 2) == 0, [13, 14], _ABSENT)
    customer = np.stack([product, 8 + draws.below(2, "plan"), 10 + draws.below(3, "channel")], axis=1)
    days, lead = 30 + draws.below(700, "days"), (30 + draws.below(300, "lead")) * (2 * draws.below(2, "ahead") - 1)
    warranty = np.maximum(0, days + lead)

    # Questions, pages that were looked at and answers that were given, about the topics; it begins with a question.
    count = 1 + draws.below(23, "events") * (1 + draws.below(4, "short")) // 4
    events = draws.many(3 * _TOPICS, "event", 24)
    events[:, 0] %= _TOPICS
    events[np.arange(24) >= count[:, None]] = _ABSENT

    right = {"draw": _OFFER + product, "numeric": np.where(days < warranty, _FREE, _PAID), "sequence": events[:, 0]}
    candidates = draws.order(_TOPICS, "topics")[:, :5]
    if rule in ("draw", "random"):
        candidates = _OFFER + draws.order(_PRODUCTS, "products")[:, :5]
    several = 2 + draws.below(4, "offered")
    candidates[np.arange(5) >= several[:, None]] = _ABSENT
    wanted = right.get(rule, candidates[:, 0])
    missing = ~(candidates == wanted[:, None]).any(axis=1)
    candidates[missing, 0] = wanted[missing]
    if rule == "numeric":
        candidates = np.tile([_FREE, _PAID], (size, 1))
    candidates = np.sort(candidates, axis=1)
    label = _choice(draws, rule, candidates, wanted)
    return [
        np.sort(np.concatenate([customer, tags], axis=1), axis=1),
        np.stack([days, warranty], axis=1),
        events,
        candidates,
        label,
        5 - np.minimum(4, count // 5)[:, None],  # a long conversation leaves nobody glad
    ]


_MAKERS: dict[str, Callable[[_Draws, str], list[Ints]]] = {"kanachan-v1": _mahjong, "offered-answers": _offered_answers}
