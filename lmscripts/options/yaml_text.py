"""Options as text: YAML files in and out, and types, values and help in words."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

import yaml

from lmscripts.errors import UserError

_NULLS = ("", "~", "null", "Null", "NULL")


class Entry(NamedTuple):
    """An option as it stands on the line or in a file.

    Attributes:
        key: the name as spelt.
        values: as written: a text, None for a YAML null; below a block also lists and mappings of these.
        label: the words for it in an error.
        line: of the file; None on the command line.
        is_list: it is a list in the file, be it of a single value.
    """

    key: str
    values: list[Any]
    label: str
    line: int | None = None
    is_list: bool = False


# ---- files -------------------------------------------------------------------------------------------------------


def read_yaml(file_name: str, blocks: Collection[str] = ()) -> list[Entry]:
    """The lines `option: value` of a YAML file; a value may be a list.

    The nodes are read instead of PyYAML's values, so that `1e-4` is a number, `no` a text and 12:30 not 750 when
    the option says so: a value means the same in a file and on the command line.

    Args:
        file_name: the file.
        blocks: keys that may hold keys: `block: {key: value}` is `block.key: value`, whose value may be nested.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        node = yaml.compose(Path(file_name).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{file_name} must hold lines of the form `option: value`")
        return list(_entries(node, file_name, blocks))
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


def plain_value(text: str) -> Any:
    """A list or a mapping that stands on the command line; any other text as it is.

    Raises:
        UserError: it begins like a list or a mapping and is none.
    """
    if not text.startswith(("[", "{")):
        return text
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _plain(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{text} is not valid YAML") from error


def to_yaml(options_class: type[Any], values: Mapping[str, Any]) -> str:
    """One commented line per option; a required option without a value stands there as a comment to fill in."""
    hints = typing.get_type_hints(options_class)
    lines, heading = [], "options"
    for field in dataclasses.fields(options_class):
        if (field.metadata["group"] or "options") != heading:
            heading = field.metadata["group"] or "options"
            lines += ["", f"# ---- {heading} ----"]
        comment = help_with_default(field, hints[field.name])
        lines += ["", *textwrap.wrap(comment, 100, initial_indent="# ", subsequent_indent="# ")]
        if field.name in values or not field.metadata["required"]:
            lines.append(f"{field.name}: {_yaml_value(values.get(field.name, field.default))}")
        else:
            lines.append(f"# {field.name}:")
    return "\n".join(lines).strip() + "\n"


def _entries(root: yaml.MappingNode, file_name: str, blocks: Collection[str]) -> Iterator[Entry]:
    """The entries of a file; its blocks are opened."""
    for key, key_node, value_node in _pairs(root, "", file_name):
        if key not in blocks:
            yield _entry(key, key_node, value_node, file_name, blocks)
        elif isinstance(value_node, yaml.MappingNode):
            for inner in _pairs(value_node, f"{key}.", file_name):
                yield _entry(*inner, file_name, blocks)
        elif _plain(value_node) is not None:
            place = f"{file_name}, line {key_node.start_mark.line + 1}"
            raise UserError(f"{place}: {key} must hold indented lines of the form `option: value`")


def _pairs(node: yaml.MappingNode, prefix: str, file_name: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """The keys of a mapping, each with its node and that of its value; none twice."""
    seen = set()
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise UserError(f"{file_name}, line {key_node.start_mark.line + 1}: {key} stands in the file a second time")
        seen.add(key)
        yield key, key_node, value_node


def _entry(key: str, key_node: yaml.Node, value_node: yaml.Node, file_name: str, blocks: Collection[str]) -> Entry:
    line = key_node.start_mark.line + 1
    label = f"{file_name}, line {line}: {key}"
    if key in ("compute_environment", "distributed_type"):
        raise UserError(f"{file_name} is a file for Accelerate: give it to `accelerate launch --config_file`")
    is_list = isinstance(value_node, yaml.SequenceNode)
    items = value_node.value if is_list else [value_node]
    if key.split(".")[0] not in blocks and not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise UserError(f"{label} must be a value or a list of values")
    return Entry(key, [_plain(item) for item in items], label, line, is_list)


def _plain(node: yaml.Node) -> Any:
    """A node as texts, None for null, lists and mappings of these."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return None if getattr(node, "style", None) is None and node.value in _NULLS else node.value


def _yaml_value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml_value(item) for item in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_./][\w./-]*", value):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a YAML string
    return str(yaml.safe_dump(value)).removesuffix("...\n").strip()


# ---- words -------------------------------------------------------------------------------------------------------


def is_tuple(hint: Any) -> bool:
    """Whether an option of this type takes several values."""
    return any(typing.get_origin(member) is tuple for member in (hint, *typing.get_args(hint)))


def alternatives(hint: Any) -> set[Any]:
    """The types that one value may have: the members of a union, the elements of a tuple."""
    if typing.get_origin(hint) in (Union, types.UnionType, tuple):
        return set().union(*(alternatives(member) for member in typing.get_args(hint) if member is not ...))
    return {hint}


def choices(hint: Any) -> list[Any]:
    """The values to choose from, where the type names them."""
    literals = [member for member in alternatives(hint) if typing.get_origin(member) is Literal]
    return [choice for literal in literals for choice in typing.get_args(literal)]


def describe(hint: Any) -> str:
    """What one value has to be, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    names = [str(choice) for choice in choices(hint)]
    return listed(names + [text for kind, text in words.items() if kind in alternatives(hint)], "or")


def help_with_default(field: dataclasses.Field[Any], hint: Any) -> str:
    """The help of an option with its choices and its default."""
    only = "or" if alternatives(hint) & {int, float, str} else "one of"
    notes = [f"{only} {', '.join(str(choice) for choice in choices(hint))}"] if choices(hint) else []
    if field.metadata["required"]:
        notes.append("required")
    elif field.default not in (None, (), ""):
        notes.append(f"default: {shown(field.default)}")
    return str(field.metadata["help"]) + (f" ({'; '.join(notes)})" if notes else "")


def shown(value: Any) -> str:
    """A value as one would type it, in quotation marks only where it would be hard to see."""
    if isinstance(value, str):
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
    """`did you mean --x?`, or nothing where no name is near."""
    name = normal(word.lstrip("-–—"))
    longer = [candidate for candidate in known if candidate.startswith(name)]
    near = longer if len(longer) == 1 else difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {dashes}{near[0]}?" if near else ""
