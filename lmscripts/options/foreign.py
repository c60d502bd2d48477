"""Keys of another system that a script accepts beside its own options: what was written, and what it means here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lmscripts.errors import UserError

LINE = "command line"


class Translation(Protocol):
    """A module that knows the keys of another system."""

    @property
    def SYSTEM(self) -> str:
        """The other system in words, for `--help`."""

    @property
    def KEYS(self) -> Collection[str]:
        """All its keys; `block.key` is also read from a block of a YAML file."""

    def translate(self, old: ForeignOptions) -> None:
        """Say what was written means here, through the methods of `old`."""


@dataclass(frozen=True)
class Written:
    """A key of the other system as it was written.

    Attributes:
        key: its name.
        values: texts, None for null; lists and mappings where they were nested; empty for a flag without a value.
        label: the words for it in an error.
        origin: `LINE` or the file's name.
        is_list: it was written as a list, be it of a single value.
    """

    key: str
    values: list[Any]
    label: str
    origin: str
    is_list: bool = False

    @property
    def text(self) -> str:
        """Its only value.

        Raises:
            UserError: it has none, several, or a mapping.
        """
        if not self.values:
            raise UserError(f"{self.label} needs a value")
        if len(self.values) > 1 or not isinstance(self.values[0], str):
            raise UserError(f"{self.label} must be one value, not {self.shown}")
        return self.values[0]

    @property
    def shown(self) -> str:
        """All values as one would type them."""
        return " ".join("null" if value is None else str(value) for value in self.values)


class Meaning(NamedTuple):
    """A value of an option of this script, and the keys that it comes from."""

    name: str
    values: list[Any]
    sources: tuple[Written, ...]


class ForeignOptions:
    """What was given of another system's keys, for a `Translation` to say what it means here.

    Attributes:
        own: values of the script's own options that were given by their names here, on the line or in the file.
        in_file: the file has such keys, be it that the line has beaten them all.
        on_line: own options that were given on the line, by their names here.
        meanings: what the keys mean.
        defaults: values for own options that were not given in any way, as the other system had them.
        notices: sentences for the user.
    """

    def __init__(
        self, written: Mapping[str, Written], own: Mapping[str, Any], in_file: bool, on_line: Collection[str] = ()
    ) -> None:
        """Nothing is translated yet.

        Args:
            written: key to what was written; the command line has already beaten the file.
            own: see above.
            in_file: see above.
            on_line: see above.
        """
        self._written = {key: item for key, item in written.items() if item.values != [None]}
        self.own = own
        self.in_file = in_file
        self.on_line = on_line
        self.meanings: list[Meaning] = []
        self.defaults: dict[str, str] = {}
        self.notices: list[str] = []

    def get(self, key: str) -> Written | None:
        """What was written; None where the key was not given or is null, which is the same to the other system."""
        return self._written.get(key)

    def whole(self, key: str, default: int) -> int:
        """The value of a key as a whole number.

        Raises:
            UserError: it is something else, or not positive.
        """
        written = self.get(key)
        if written is None:
            return default
        if not written.text.isdecimal() or int(written.text) < 1:
            raise UserError(f"{written.label} must be a whole number greater than 0, not {written.text}")
        return int(written.text)

    def decided(self, *names: str) -> bool:
        """Whether one of these own options has been given, in whichever way."""
        return any(name in self.own or any(meaning.name == name for meaning in self.meanings) for name in names)

    def rename(self, key: str, name: str, value: str | None = None) -> None:
        """A key is an own option under another name, and with another value where one is given."""
        if (written := self.get(key)) is None:
            return
        if value is None and any(isinstance(item, (list, dict)) for item in written.values):
            raise UserError(f"{written.label} must be a value or a list of values, not {written.shown}")
        self._give(name, written.values if value is None else [value], written)
        self.notices.append(
            f"{key} is now --{name}" if value is None else f"{key} {written.shown} is now --{name} {value}"
        )

    def combine(self, keys: list[str], name: str, value: str, notice: str) -> None:
        """Several keys together are one own option."""
        self._give(name, [value], *(item for key in keys if (item := self.get(key)) is not None))
        self.notices.append(notice)

    def drop(self, key: str, reason: str) -> None:
        """A key is not needed here."""
        if self.get(key) is not None:
            self.notices.append(f"{key} has no effect: {reason}")

    def default(self, name: str, value: str, notice: str) -> None:
        """An own option that was not given in any way becomes what it was in the other system."""
        if not self.decided(name):
            self.defaults[name] = value
            self.notices.append(notice)

    def _give(self, name: str, values: list[Any], *sources: Written) -> None:
        self.meanings.append(Meaning(name, values, sources))
