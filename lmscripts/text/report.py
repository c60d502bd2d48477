"""What was read from a corpus, what was repaired and what was left out, with the first few places of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_EXAMPLES = 5

Place = Callable[[], str]

# What a reader may have to do to a text, as a sentence for people; {n} is the count.
SENTENCES = {
    "files_skipped": "{n} files of a folder were left out for their names; name those that are text on the line",
    "files_repeated": "{n} files were named more than once and read once",
    "splits_left": "{n} splits of a saved data set were left out, as only train is read; name their folders for others",
    "json_lines_files": "{n} files hold JSON lines and were read so; --input_format txt reads them as they stand",
    "byte_order_marks": "{n} byte order marks were removed",
    "invalid_utf8_lines": "{n} lines held bytes that are not UTF-8; each was replaced by U+FFFD",
    "joined_halves": "{n} characters in two halves (CESU-8) were joined",
    "half_characters": "{n} half characters (of escapes in JSON) were replaced by U+FFFD",
    "nul_characters": "{n} NUL characters were removed",
    "control_characters": "{n} control characters were replaced by spaces",
    "invisible_lines": "{n} lines of invisible characters alone (U+200B and the like) were taken for blank ones",
    "lines_of_dashes": "{n} lines of dashes under a header were left out",
    "long_lines_cut": "{n} cuts were made in lines longer than 1 MiB",
    "long_documents_cut": "{n} cuts were made in documents longer than 16 MiB; the rest went on as a new document",
    "bad_records_dropped": "{n} records could not be read and were left out",
    "records_without_text": "{n} records had no text and were left out",
    "blank_lines": "{n} blank lines were passed over",
    "damaged_files": "{n} files are damaged or cut off; what stands before the damage was read",
    "repeated_decisions": "{n} decisions repeat one of the same game and were left out; --keep_duplicates keeps them",
}
_NUMBERS = ("files", "documents", "sentences", "characters", "bytes")


@dataclass
class TextReport:
    """Bytes are those of the kept sentences in UTF-8; `examples` has the first places of each change and reason.

    `at` says the place that is being read.
    """

    num_files: int = 0
    num_documents: int = 0
    num_sentences: int = 0
    num_characters: int = 0
    num_bytes: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    at: Place = field(default=str, compare=False)

    def count(self, kind: str, number: int = 1, place: Place | None = None) -> None:
        """Add to one kind of repair or drop (a key of `SENTENCES`); `place` is asked for the first few only."""
        self.changes[kind] += number
        places = self.examples.setdefault(kind, [])
        if place is not None and len(places) < MAX_EXAMPLES:
            places.append(place())

    def count_bad(self, reason: str, details: str, place: Place) -> None:
        """Add a bad record."""
        self.count("bad_records_dropped", 1, place)
        if reason not in self.reasons:
            self.examples[reason] = [f"{place()}: {details}"]
        self.reasons[reason] += 1

    def add_document(self, lines: list[str], num_bytes: int) -> None:
        """Count one document that is handed on; `num_bytes` are those of its lines in UTF-8."""
        self.num_documents += 1
        self.num_sentences += len(lines)
        self.num_characters += sum(map(len, lines))
        self.num_bytes += num_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "at": str}  # a place belongs to the file that is open

    def merge(self, other: TextReport) -> None:
        """Add the counts of a report over other spans of the same corpus."""
        for name in _NUMBERS:
            setattr(self, f"num_{name}", getattr(self, f"num_{name}") + getattr(other, f"num_{name}"))
        self.changes.update(other.changes)
        self.reasons.update(other.reasons)
        for kind, places in other.examples.items():
            most = 1 if kind in self.reasons else MAX_EXAMPLES
            self.examples[kind] = (self.examples.get(kind, []) + places)[:most]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; `from_dict` is the inverse."""
        numbers = {name: getattr(self, f"num_{name}") for name in _NUMBERS}
        reasons = {"reasons": dict(sorted(self.reasons.items()))} if self.reasons else {}
        examples = {kind: list(places) for kind, places in sorted(self.examples.items()) if places}
        return numbers | {"changes": dict(sorted(self.changes.items())), **reasons, "examples": examples}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TextReport:
        """A report from what `as_dict` gave."""
        numbers = {f"num_{name}": values[name] for name in _NUMBERS}
        counters: dict[str, Any] = {name: Counter(values.get(name, {})) for name in ("changes", "reasons")}
        return cls(**numbers, **counters, examples=dict(values["examples"]))

    def sentences(self) -> list[str]:
        """One line for what was read, one for each kind of repair or drop that occurred, and one for each reason."""
        read = ", ".join(f"{getattr(self, f'num_{name}'):,} {name}" for name in _NUMBERS).replace("files,", "files:", 1)
        lines = [f"read {read}"]
        for kind, sentence in SENTENCES.items():
            if number := self.changes.get(kind, 0):
                places = self.examples.get(kind, [])
                where = f" (first at {', '.join(places)})" if places else ""
                lines.append(sentence.format(n=f"{number:,}") + where)
            if kind == "bad_records_dropped":
                of = self.reasons.most_common()
                lines += [f"  {number:,} x {reason}, at {self.examples[reason][0]}" for reason, number in of]
        return lines
