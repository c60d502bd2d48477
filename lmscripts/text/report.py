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
    "byte_order_marks": "{n} byte order marks at the start of a file were removed",
    "invalid_utf8_lines": "{n} lines held bytes that are not UTF-8; each was replaced by U+FFFD",
    "nul_characters": "{n} NUL characters were removed",
    "control_characters": "{n} control characters were replaced by spaces",
    "long_lines_cut": "{n} cuts were made in lines longer than 1 MiB",
    "long_documents_cut": "{n} cuts were made in documents longer than 16 MiB; the rest went on as a new document",
    "bad_records_dropped": "{n} records could not be read and were left out",
    "records_without_text": "{n} records had no text and were left out",
}


@dataclass
class TextReport:
    """What was read, what was repaired and what was left out. Bytes are those of the kept sentences in UTF-8."""

    num_files: int = 0
    num_documents: int = 0
    num_sentences: int = 0
    num_characters: int = 0
    num_bytes: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def count(self, kind: str, number: int = 1, place: Place | None = None) -> None:
        """Add to one kind of repair or drop (a key of `SENTENCES`); `place` is asked for the first few only."""
        self.changes[kind] += number
        places = self.examples.setdefault(kind, [])
        if place is not None and len(places) < MAX_EXAMPLES:
            places.append(place())

    def add_document(self, lines: list[str]) -> None:
        """Count one document that is handed on."""
        self.num_documents += 1
        self.num_sentences += len(lines)
        for line in lines:
            self.num_characters += len(line)
            self.num_bytes += len(line.encode())

    def merge(self, other: TextReport) -> None:
        """Add the counts of a report over other spans of the same corpus."""
        self.num_files += other.num_files
        self.num_documents += other.num_documents
        self.num_sentences += other.num_sentences
        self.num_characters += other.num_characters
        self.num_bytes += other.num_bytes
        self.changes.update(other.changes)
        for kind, places in other.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + places)[:MAX_EXAMPLES]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; `from_dict` is the inverse."""
        return {
            "files": self.num_files,
            "documents": self.num_documents,
            "sentences": self.num_sentences,
            "characters": self.num_characters,
            "bytes": self.num_bytes,
            "changes": dict(sorted(self.changes.items())),
            "examples": {kind: list(places) for kind, places in sorted(self.examples.items()) if places},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TextReport:
        """A report from what `as_dict` gave."""
        return cls(
            num_files=values["files"],
            num_documents=values["documents"],
            num_sentences=values["sentences"],
            num_characters=values["characters"],
            num_bytes=values["bytes"],
            changes=Counter(values["changes"]),
            examples={kind: list(places) for kind, places in values["examples"].items()},
        )

    def sentences(self) -> list[str]:
        """One line for what was read, and one for each kind of repair or drop that occurred."""
        lines = [
            f"read {self.num_files:,} files: {self.num_documents:,} documents, {self.num_sentences:,} sentences, "
            f"{self.num_characters:,} characters, {self.num_bytes:,} bytes"
        ]
        for kind, sentence in SENTENCES.items():
            if number := self.changes.get(kind, 0):
                places = self.examples.get(kind, [])
                where = f" (first at {', '.join(places)})" if places else ""
                lines.append(sentence.format(n=f"{number:,}") + where)
        return lines
