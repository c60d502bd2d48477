"""Options as text: what a file holds, YAML to write, and types, values and help in words."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Union

import yaml

from lmscripts.errors import UserError

LINE = "command line"
_LARGEST = 1 << 20
_NULLS = ("", "~", "null", "Null", "NULL")


class Flag(NamedTuple):
    """An option of a script: the field of a dataclass, with its type resolved and its metadata opened."""

    name: str
    hint: Any
    default: Any
    help: str
    required: bool = False
    group: str = ""
    short: str = ""
    positional: bool = False
    most: float = 10**12
    writes: str = ""

    @property
    def one_value(self) -> Any:
        """The type of one value; of a tuple that of its elements."""
        members = (self.hint, *typing.get_args(self.hint))
        return next((typing.get_args(member)[0] for member in members if typing.get_origin(member) is tuple), self.hint)

    @property
    def is_tuple(self) -> bool:
        """Whether it takes several values."""
        return self.one_value is not self.hint

    @property
    def kinds(self) -> set[Any]:
        """The types that one value may have."""
        return _alternatives(self.hint)

    @property
    def choices(self) -> list[str]:
        """The values to choose from, where the type names them."""
        return [str(choice) for kind in self.kinds if typing.get_origin(kind) is Literal for choice in kind.__args__]

    def described(self) -> str:
        """What one value has to be, in words."""
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
        return listed([*self.choices, *(text for kind, text in words.items() if kind in self.kinds)], "or")

    def explained(self) -> str:
        """The help with the choices and the default."""
        only = "or" if self.kinds & {int, float, str} else "one of"
        notes = [f"{only} {', '.join(self.choices)}"] if self.choices else []
        if self.required:
            notes.append("required")
        elif self.default not in (None, (), ""):
            notes.append(f"default: {shown(self.default)}")
        return self.help + (f" ({'; '.join(notes)})" if notes else "")


def _alternatives(hint: Any) -> set[Any]:
    """The members of a union, the elements of a tuple."""
    if typing.get_origin(hint) in (Union, types.UnionType, tuple):
        return set().union(*(_alternatives(member) for member in typing.get_args(hint) if member is not ...))
    return {hint}


def by_group(flags: Iterable[Flag]) -> dict[str, list[Flag]]:
    """The options under their headings."""
    groups: dict[str, list[Flag]] = {}
    for flag in flags:
        groups.setdefault(flag.group or "options", []).append(flag)
    return groups


@dataclasses.dataclass(frozen=True)
class Entry:
    """An option as it stands on the line or in a file.

    Attributes:
        key: the name, as spelt until older names are replaced.
        values: as written: texts, None for null, lists and mappings of these; empty for a flag without a value.
        label: the words for it in an error.
        origin: `LINE` or the file's name.
        line: of the file; None on the command line.
        is_list: it is a list in the file, be it of a single value.
        written: all of it as it was written, once its name is known.
    """

    key: str
    values: list[Any]
    label: str
    origin: str = LINE
    line: int | None = None
    is_list: bool = False
    written: str = ""

    @property
    def shown(self) -> str:
        """All values as one would type them."""
        return " ".join("null" if value is None else str(value) for value in self.values)

    def check_flat(self) -> None:
        """Refuse what is nested.

        Raises:
            UserError: a value is a list or a mapping.
        """
        if any(isinstance(value, (list, dict)) for value in self.values):
            raise UserError(f"{self.label} must be a value or a list of values")


# ---- files -------------------------------------------------------------------------------------------------------


def read_yaml(file_name: str, blocks: Collection[str] = ()) -> list[Entry]:
    """The lines `option: value` of a YAML file; a value may be a list.

    The nodes are read instead of PyYAML's values, so that `1e-4` is a number, `no` a text and 12:30 not 750 when
    the option says so: a value means the same in a file and on the command line.

    Args:
        file_name: the file.
        blocks: keys that may hold keys: `block: {key: value}` is `block.key: value`.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        with open(file_name, "rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UserError(f"{file_name} has over {_LARGEST:,} bytes: it is no file of options")
        node = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.SafeLoader)
        if _size(node, {}) > _LARGEST:
            raise UserError(f"{file_name} stands for over {_LARGEST:,} values, as its aliases multiply")
        if not isinstance(node, (yaml.MappingNode, types.NoneType)):
            raise UserError(f"{file_name} must hold lines of the form `option: value`")
        return list(_entries(node, "", file_name, blocks)) if node else []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8 text")
        raise UserError(f"--config {file_name} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", "a control character is not allowed")
        raise UserError(f"{file_name}{place}: not valid YAML ({problem})") from error
    except RecursionError as error:  # an anchor inside of itself
        raise UserError(f"{file_name} is nested too deeply") from error


def _entries(root: yaml.MappingNode, prefix: str, file_name: str, blocks: Collection[str]) -> Iterator[Entry]:
    """The keys of a mapping, none twice; blocks are opened."""
    seen = set()
    for key_node, node in root.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        label = f"{file_name}, line {line}: {key}"
        if key in seen:
            raise UserError(f"{label} stands in the file a second time")
        seen.add(key)
        if key in ("compute_environment", "distributed_type"):
            raise UserError(f"{file_name} is a file for Accelerate: give it to `accelerate launch --config_file`")
        if key in blocks and isinstance(node, yaml.MappingNode):
            yield from _entries(node, f"{key}.", file_name, blocks)
            continue
        value = _plain(node, label)
        if key in blocks and value is not None:
            raise UserError(f"{label} must hold indented lines of the form `option: value`")
        elif key not in blocks:
            is_list = isinstance(value, list)
            entry = Entry(key, value if is_list else [value], label, file_name, line, is_list)
            if key.split(".")[0] not in blocks:
                entry.check_flat()
            yield entry


def plain_value(text: str) -> Any:
    """A list or a mapping that stands on the command line; any other text as it is.

    Raises:
        UserError: it begins like a list or a mapping and is none.
    """
    if not text.startswith(("[", "{")):
        return text
    try:
        return _plain(yaml.compose(text, Loader=yaml.SafeLoader), text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{text} is not valid YAML") from error


def _size(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values that a node stands for, with its aliases written out, each of which is counted but once."""
    if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) and id(node) not in known:
        members = [value for _, value in node.value] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_size(member, known) for member in members)
    return known.get(id(node), 1)


def _plain(node: yaml.Node | None, label: str) -> Any:
    """A node as texts, None for null, lists and mappings of these."""
    if isinstance(node, yaml.MappingNode):
        plain: dict[str, Any] = {}
        for key, value in node.value:
            if str(key.value) in plain:
                raise UserError(f"{label}: {key.value} stands there a second time in line {key.start_mark.line + 1}")
            plain[str(key.value)] = _plain(value, label)
        return plain
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, label) for item in node.value]
    if not isinstance(node, yaml.ScalarNode) or (node.style is None and node.value in _NULLS):
        return None
    return node.value


def to_yaml(flags: Iterable[Flag], values: Mapping[str, Any]) -> str:
    """One commented line per option; a required option without a value stands there as a comment to fill in."""
    lines: list[str] = []
    for heading, members in by_group(flags).items():
        lines += ["", f"# ---- {heading} ----"] if lines or heading != "options" else []
        for flag in members:
            lines += ["", *textwrap.wrap(flag.explained(), 100, initial_indent="# ", subsequent_indent="# ")]
            if flag.name in values or not flag.required:
                lines.append(f"{flag.name}: {_yaml_value(values.get(flag.name, flag.default))}")
            else:
                lines.append(f"# {flag.name}:")
    return "\n".join(lines).strip() + "\n"


def _yaml_value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml_value(item) for item in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_./][\w./-]*", value):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a YAML string
    return str(yaml.safe_dump(value)).removesuffix("...\n").strip()


# ---- words -------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as one would type it, in quotation marks only where it would be hard to see."""
    if isinstance(value, str):
        value = value if len(value) <= 100 else f"{value[:60]}... ({len(value):,} characters)"
        return value if value.split() == [value] else repr(value)
    return " ".join(shown(item) for item in value) if isinstance(value, tuple) else _yaml_value(value)


def listed(items: Iterable[Any], conjunction: str) -> str:
    """Words as a list: a, b or c."""
    words = [str(item) for item in items]
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def normal(name: str) -> str:
    """A name of an option with underscores: dashes are the same."""
    return name.replace("-", "_")


def nearest(word: str, known: Iterable[str], dashes: str = "") -> str:
    """`did you mean --x?` where the word is a name that is misspelt or begun; nothing where it is another name."""
    name, candidates = normal(word.lstrip("-–—")), list(known)
    longer = [candidate for candidate in candidates if candidate.startswith(name)]
    near = longer if len(longer) == 1 else []
    near = near or difflib.get_close_matches(name, [c for c in candidates if _misspelt(name, c)], n=1)
    return f"did you mean {dashes}{near[0]}?" if near else ""


def _misspelt(name: str, meant: str) -> bool:
    """Whether each word of one is like the word of the other at its place, or all letters are the same."""
    words, others = (re.split(r"[_.-]", text) for text in (name, meant))
    pairs = zip(words, others, strict=False)
    alike = all(difflib.SequenceMatcher(None, *pair).ratio() > 0.65 for pair in pairs)
    return (alike and len(words) == len(others)) or "".join(words) == "".join(others)
