"""An invented world in consistent sentences, and questions about it that can be checked.

    python sample_data/world.py --output_dir demo_output/world --language ja --megabytes 6

Writes corpus.txt (one sentence a line, a blank line between documents) and questions.jsonl: a sentence with [MASK], the
answer, what else it could be, and how the text has it:

    said so         the sentence itself is in the text, many times
    said otherwise  the fact is in the text, but never in the words of the question
    worked out      the fact is not in the text, but follows from others: a mother's mother, the price of several

Towns, people, trades, prices and seasons are drawn from a seed; the words are in world_ja.yaml and world_en.yaml.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SAID_SO, OTHERWISE, WORKED_OUT = "said so", "said otherwise", "worked out"
OPENS = 0.1  # share of documents that begin with a sentence on what they are about
FILLS = 0.1  # share of sentences that say nothing of the world
LEAVES = 0.4  # share of sentences after which one comes to another subject
COUNTS = range(2, 7)  # of goods that are bought together
PRICES = range(2, 13)


@dataclass(frozen=True)
class Fact:
    """One thing that is true: of whom, what kind, the answer, and what else a sentence about it may need."""

    subject: str
    kind: str
    answer: str
    words: dict[str, Any]
    group: str  # how the text has it


class World:
    """Facts by subject, the subjects that one comes to from another, and what each kind of fact could be."""

    def __init__(self, language: dict[str, Any], people: int, draw: random.Random) -> None:
        """Draw everything; the same seed gives the same world."""
        self.language, self._draw = language, draw
        self.facts: dict[str, list[Fact]] = {}
        self.linked: dict[str, list[str]] = {}
        self.choices: dict[str, list[str]] = {}
        self._towns()
        self._people(people)
        self._seasons()
        self._goods()
        self._told = [fact for facts in self.facts.values() for fact in facts if fact.group != WORKED_OUT]

    def _add(self, kind: str, known: dict[str, tuple[str, dict[str, Any]]], choices: list[str], *unsaid: str) -> None:
        """Facts of a kind, subject -> (answer, words); of some of them the text says less.

        Args:
            kind: of the facts.
            known: by what tells them apart; the words name the subject first.
            choices: all answers that this kind can have.
            unsaid: groups that a quarter of the facts each belong to.
        """
        keys = sorted(known)
        self._draw.shuffle(keys)
        self.choices[kind] = choices
        for place, key in enumerate(keys):
            answer, words = known[key]
            subject = str(next(iter(words.values())))
            group = ([*unsaid] + [SAID_SO] * (4 - len(unsaid)))[place % 4]
            self.facts.setdefault(subject, []).append(Fact(subject, kind, answer, words, group))

    def _towns(self) -> None:
        towns, draw = self.language["towns"], self._draw
        months = [str(month) for month in self.language["months"]]
        for kind, choices in (
            ("product", self.language["products"]),
            ("land", self.language["lands"]),
            ("month", months),
        ):
            self._add(kind, {town: (draw.choice(choices), {"town": town}) for town in towns}, choices, OTHERWISE)

    def _people(self, number: int) -> None:
        language, draw = self.language, self._draw
        parts = language["names"]
        names = [first + second for first in parts["first"] for second in parts["second"]]
        draw.shuffle(names)
        people = names[:number]
        trades = {person: draw.choice(language["trades"]) for person in people}
        homes = {person: draw.choice(language["towns"]) for person in people}
        mothers = {person: draw.choice(people[:place]) for place, person in enumerate(people) if place >= number // 4}
        known = {p: (t, {"person": p, "work": language["works"][t]}) for p, t in trades.items()}
        self._add("trade", known, language["trades"], OTHERWISE)
        self._add("home", {p: (h, {"person": p}) for p, h in homes.items()}, language["towns"], OTHERWISE)
        self._add("mother", {p: (m, {"person": p}) for p, m in mothers.items()}, sorted(people), OTHERWISE)
        grand = {p: (mothers[m], {"person": p}) for p, m in mothers.items() if m in mothers}
        self._add("grandmother", grand, sorted(people), OTHERWISE, WORKED_OUT)
        towns = language["towns"]
        self.linked |= {town: [neighbour] for town, neighbour in zip(towns, [*towns[1:], towns[0]])}
        for person in people:
            self.linked[person] = [homes[person], *([mothers[person]] if person in mothers else [])]
            self.linked[homes[person]].append(person)

    def _seasons(self) -> None:
        things, draw, seasons = self.language["season_things"], self._draw, self.language["seasons"]
        each = -(-len(things) // len(seasons))  # they stand in the order of the seasons
        of = {thing: seasons[place // each] for place, thing in enumerate(things)}
        self._add("season", {thing: (of[thing], {"thing": thing}) for thing in things}, seasons, OTHERWISE)
        for thing in things:
            self.linked[thing] = [other for other in things if of[other] == of[thing]] + [draw.choice(things)]

    def _goods(self) -> None:
        goods, draw = self.language["goods"], self._draw
        prices = {name: draw.choice(PRICES) for name in goods}
        known = {n: (str(p), {"goods": n, "unit": goods[n]}) for n, p in prices.items()}
        self._add("price", known, [str(price) for price in PRICES], OTHERWISE)
        several = {
            f"{name} {count}": (
                str(price * count),
                {"goods": name, "unit": goods[name], "price": price, "count": count},
            )
            for name, price in prices.items()
            for count in COUNTS
        }
        products = sorted({price * count for price in PRICES for count in COUNTS})
        self._add("cost", several, [str(product) for product in products], OTHERWISE, WORKED_OUT)
        for name in goods:
            self.linked[name] = [other for other in goods if other != name] or [name]

    def sentence(self, fact: Fact) -> str:
        """A fact in one of the ways in which the text may say it."""
        relation = self.language["relations"][fact.kind]
        ways = [*relation["say"], *([relation["ask"]] * 2 if fact.group == SAID_SO else [])]
        return self._capital(self._draw.choice(ways).format(mask=fact.answer, answer=fact.answer, **fact.words))

    def document(self, longest: int) -> list[str]:
        """Sentences that begin with any fact and go on with its subject, or one that has to do with it."""
        draw, language = self._draw, self.language
        fact = draw.choice(self._told)
        subject, said, lines = fact.subject, set[int](), list[str]()
        if draw.random() < OPENS:
            lines.append(self._capital(draw.choice(language["openings"]).format(subject=subject)))
        for _ in range(draw.randint(1, longest)):
            said.add(id(fact))
            lines.append(self.sentence(fact))
            if draw.random() < FILLS:
                lines.append(draw.choice(language["fillers"]))
            if draw.random() < LEAVES:
                subject = draw.choice(self.linked[subject])
            left = [f for f in self.facts[subject] if id(f) not in said and f.group != WORKED_OUT]
            if not left:
                break
            fact = draw.choice(left)
        return lines

    def questions(self) -> list[dict[str, Any]]:
        """Every fact as a question."""
        asked = []
        for fact in (fact for facts in self.facts.values() for fact in facts):
            text = self._capital(self.language["relations"][fact.kind]["ask"].format(mask="[MASK]", **fact.words))
            question = {"kind": fact.kind, "group": fact.group, "text": text, "answer": fact.answer}
            asked.append(question | {"choices": self.choices[fact.kind]})
        return asked

    @staticmethod
    def _capital(sentence: str) -> str:
        return sentence[0].upper() + sentence[1:]


def main() -> None:
    """Draw a world, write its text and its questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--language", default="ja", choices=("ja", "en"))
    parser.add_argument("--megabytes", type=float, default=6.0, help="of text")
    parser.add_argument("--people", type=int, default=80, metavar="N", help="4 to 144")
    parser.add_argument("--towns", type=int, default=16, metavar="N", help="2 to 16")
    parser.add_argument("--goods", type=int, default=10, metavar="N", help="1 to 10")
    parser.add_argument("--things", type=int, default=16, choices=(4, 8, 16), help="that have a season")
    parser.add_argument("--longest", type=int, default=8, help="sentences of a document on facts, at most")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for name, (fewest, most) in {"people": (4, 144), "towns": (2, 16), "goods": (1, 10)}.items():
        if not fewest <= getattr(given, name) <= most:
            parser.error(f"--{name} must be from {fewest} to {most}, got {getattr(given, name)}")
    if given.longest < 1:
        parser.error(f"--longest must be 1 or more, got {given.longest}")
    language = yaml.safe_load(Path(__file__).with_name(f"world_{given.language}.yaml").read_text(encoding="utf-8"))
    language["towns"] = language["towns"][: given.towns]
    language["goods"] = dict([*language["goods"].items()][: given.goods])
    language["season_things"] = language["season_things"][
        :: 16 // given.things
    ]  # they stand in the order of the seasons
    world = World(language, given.people, random.Random(given.seed))
    given.output_dir.mkdir(parents=True, exist_ok=True)
    size, documents = 0, 0
    with (given.output_dir / "corpus.txt").open("w", encoding="utf-8", newline="\n") as corpus:
        while size < given.megabytes * 1e6:
            text = "\n".join(world.document(given.longest)) + "\n\n"
            size, documents = size + len(text.encode()), documents + 1
            corpus.write(text)
    questions = world.questions()
    with (given.output_dir / "questions.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    print(f"{given.output_dir}: {documents:,} documents, {size / 1e6:.1f} MB of text, {len(questions):,} questions")


if __name__ == "__main__":
    main()
