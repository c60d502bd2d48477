"""Options of a script: one frozen dataclass, one field = one option = one YAML key.

The types are checked by jsonargparse. What it leaves to argparse's habits is done here: the command line beats the
file wherever it stands, older names still work and say the new one, a misspelt name is answered with the nearest
right one, and every mistake is one sentence and exit code 2. Nothing heavy is imported: `--help` must be quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar, Union

import jsonargparse
import yaml

from lmscripts.errors import UserError

MISSING = dataclasses.MISSING
OptionsType = TypeVar("OptionsType")
Names = Mapping[str, str]
RawValue = str | None  # None is a YAML null

Entry = tuple[str, list[RawValue], str]  # name as spelt, values as written, the words for it in an error

_LINE = "command line"
_NONE: Mapping[str, Any] = types.MappingProxyType({})
_NULLS = ("", "~", "null", "Null", "NULL")


def option(default: Any = MISSING, *, help: str, required: bool = False, group: str = "") -> Any:
    """One option of a script; the field's name is the option's name and its YAML key.

    Args:
        default: the value when neither the line nor a file gives one; without it the option is required.
        help: one sentence for `--help` and for the comment in the saved YAML.
        required: the line or a file has to give it, even though the field has a default.
        group: heading in `--help` and in the YAML.
    """
    metadata = {"help": help, "required": required or default is MISSING, "group": group}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def parse_options(
    options_class: type[OptionsType],
    *,
    description: str,
    argv: Sequence[str] | None = None,
    renamed: Names = _NONE,
    renamed_values: Mapping[str, Names] = _NONE,
    accepted_unused: Names = _NONE,
) -> OptionsType:
    """Options from the command line, over those of `--config file.yaml`, over the defaults.

    Ends the process after `--help` and `--print_config` (exit code 0) and a mistake (one sentence, exit code 2).

    Args:
        options_class: frozen dataclass whose fields are made by `option`.
        description: what the script does, for `--help`.
        argv: words of the command line without the program; `sys.argv[1:]` when None.
        renamed: older name -> its name now. `no_x` is the opposite of the boolean `x`.
        renamed_values: option (name now) -> {older value: its name now}.
        accepted_unused: older name -> a sentence that says why it is not needed any more.
    """
    older_names = {"renamed": renamed, "renamed_values": renamed_values, "accepted_unused": accepted_unused}
    return parse_options_with_origin(options_class, description=description, argv=argv, **older_names)[0]


def parse_options_with_origin(
    options_class: type[OptionsType],
    *,
    description: str,
    argv: Sequence[str] | None = None,
    **older_names: Mapping[str, Any],
) -> tuple[OptionsType, dict[str, str]]:
    """As `parse_options`, and for each option where it comes from: "command line", the file's name, or "default".

    With the origins a script can refuse an option that was given but would be ignored.
    """
    reader = _Reader(options_class, **older_names)
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        if "-h" in words or "--help" in words:
            _say(reader.help_text(description), sys.stdout)
            sys.exit(0)
        given = reader.collect(_split_words(words), _LINE)
        built_in = {name: given.pop(name).value for name in reader.built_in if name in given}
        if built_in.get("config") is not None:
            given = {**reader.collect(_read_yaml(built_in["config"]), built_in["config"]), **given}
        _say("".join(f"{notice}\n" for notice in dict.fromkeys(reader.notices)), sys.stderr)
        values = {name: item.value for name, item in given.items()}
        if built_in.get("print_config"):
            _say(_to_yaml(options_class, values), sys.stdout)
            sys.exit(0)
        required = {name for name, field in reader.fields.items() if field.metadata["required"]}
        if missing := [f"--{name}" for name in reader.fields if name in required - given.keys()]:
            raise UserError(f"missing {_listed(missing, 'and')} (on the line or in the file of --config)")
        origins = {name: given[name].origin if name in given else "default" for name in reader.fields}
        return options_class(**values), origins
    except UserError as error:
        # Under a launcher every process parses the same line; one of them speaks on each node.
        _say(f"{Path(sys.argv[0]).name}: error: {error}\n", sys.stderr, rank_variable="LOCAL_RANK")
        sys.exit(2)


def dump_options(options: Any) -> str:
    """YAML text of all options, each under its help as a comment; `--config` with that text gives them back."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return _to_yaml(type(options), values)


@dataclasses.dataclass(frozen=True)
class _EveryScript:
    """Options of every script, for the line alone."""

    help: bool = option(False, help="print this and exit", group="every script")
    config: str | None = option(None, help="YAML file of options; the command line wins", group="every script")
    print_config: bool = option(False, help="print all options as YAML and exit", group="every script")


@dataclasses.dataclass(frozen=True)
class _Given:
    """One option as it was given: its name and all of it as they were written, what it means, where it stands."""

    spelled: str
    written: str
    value: Any
    origin: str


class _Reader:
    """Collects typed values from the line and from a file; a mistake is a UserError with one sentence."""

    def __init__(
        self,
        options_class: type[Any],
        renamed: Names = _NONE,
        renamed_values: Mapping[str, Names] = _NONE,
        accepted_unused: Names = _NONE,
    ) -> None:
        self.fields = {field.name: field for field in dataclasses.fields(options_class)}
        self.built_in = {field.name: field for field in dataclasses.fields(_EveryScript)}
        self.hints = {**typing.get_type_hints(_EveryScript), **typing.get_type_hints(options_class)}
        self.renamed = {_normal(old): _normal(new) for old, new in renamed.items()}
        self.renamed_values = {_normal(name): values for name, values in renamed_values.items()}
        self.accepted_unused = {_normal(name): reason for name, reason in accepted_unused.items()}
        negations = [f"no_{name}" for name in self.fields if bool in _alternatives(self.hints[name])]
        self.known = [*self.fields, *negations, *self.renamed, *self.accepted_unused]
        self.notices: list[str] = []
        self.parser = self._typed_parser()

    def _typed_parser(self) -> jsonargparse.ArgumentParser:
        """Types and help of every field; what is required is checked after line and file are merged."""
        usage = "%(prog)s [--config FILE.yaml] [--option VALUE ...]"
        parser = jsonargparse.ArgumentParser(usage=usage, add_help=False, exit_on_error=False)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter  # jsonargparse's own repeats types and defaults
        groups: dict[str, Any] = {}
        for name, field in {**self.fields, **self.built_in}.items():
            heading = field.metadata["group"] or "options"
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            hint, text = self.hints[name], _help_with_default(field, self.hints[name]).replace("%", "%%")
            if hint is bool:
                prefix: Any = None if name in self.built_in else "no_"
                action = jsonargparse.ActionYesNo(no_prefix=prefix)
                groups[heading].add_argument(f"--{name}", action=action, default=False, help=text)
            else:
                metavar = f"{'CHOICE' if _choices(hint) else 'VALUE'}{' ...' if _is_tuple(hint) else ''}"
                groups[heading].add_argument(f"--{name}", type=hint, default=None, help=text, metavar=metavar)
        return parser

    def help_text(self, description: str) -> str:
        """The answer to `--help`."""
        self.parser.description = description
        older = [f"--{old} (now --{new})" for old, new in self.renamed.items()]
        if older := older + [f"--{old} (no effect any more)" for old in self.accepted_unused]:
            self.parser.epilog = textwrap.fill("Older names that are still accepted: " + ", ".join(older) + ".", 78)
        return str(self.parser.format_help())

    def collect(self, entries: Sequence[Entry], origin: str) -> dict[str, _Given]:
        """What stands on the command line, or in a file."""
        dashes, kind = ("--", "unknown option") if origin == _LINE else ("", f"{origin}: unknown key")
        known = [*self.known, *(self.built_in if origin == _LINE else ())]
        unknown = [name for name in dict.fromkeys(entry[0] for entry in entries) if _normal(name) not in known]
        if unknown:
            near = [_nearest(name, known, dashes) for name in unknown]
            answers = [f"{dashes}{name}{hint and f' ({hint})'}" for name, hint in zip(unknown, near)]
            raise UserError(f"{kind}{'s' if len(answers) > 1 else ''} {_listed(answers, 'and')}")
        given: dict[str, _Given] = {}
        for spelled, raw, label in entries:
            self._take(given, _normal(spelled), raw, origin, label)
        return given

    def _take(self, collected: dict[str, _Given], spelled: str, raw: list[RawValue], origin: str, label: str) -> None:
        """Adds one entry of the line or the file to what was collected from there."""
        name = self.renamed.get(spelled, spelled)
        if name in self.accepted_unused:
            self.notices.append(f"--{spelled} has no effect: {self.accepted_unused[name]}")
            return
        if spelled in self.renamed:
            self.notices.append(f"--{spelled} is now --{name}")
        if name in self.hints:
            value = self._convert(name, raw, origin, label)
        else:
            name = name.removeprefix("no_")
            value = not self._convert(name, raw, origin, label)
        before, written = collected.get(name), " ".join([f"--{spelled}", *map(str, raw)])
        if before is not None and _is_tuple(self.hints[name]) and before.spelled == spelled:
            value = (before.value or ()) + (value or ())
        elif before is not None and before.value != value:
            place = "" if origin == _LINE else f"{origin}: "
            raise UserError(f"{place}{name} is given twice: {before.written} and {written}; give one")
        collected[name] = _Given(spelled, written, value, origin)

    def _convert(self, name: str, raw: list[RawValue], origin: str, label: str) -> Any:
        """Checks what was written against the type of the field."""
        hint, on_line = self.hints[name], origin == _LINE
        new_values: Mapping[Any, str] = self.renamed_values.get(name, {})
        self.notices += [f"--{name} {old} is now --{name} {new_values[old]}" for old in raw if old in new_values]
        raw = [new_values.get(item, item) for item in raw]
        if types.NoneType in _alternatives(hint) and (raw == [None] or (on_line and raw == ["null"])):
            return None
        if bool in _alternatives(hint) and on_line and not raw:
            return True
        if not raw and (on_line or not _is_tuple(hint)):
            raise UserError(f"{label} needs a value")
        if len(raw) > 1 and not _is_tuple(hint):
            raise UserError(f"{label} takes one value, not {len(raw)} ({_listed(raw, 'and')})")
        for item in raw:
            if not self._typed(name, [item] if _is_tuple(hint) else item)[0]:
                near = _nearest(str(item), [str(choice) for choice in _choices(hint)])
                raise UserError(f"{label} must be {_describe(hint)}, not {_shown(item)}{near and f'; {near}'}")
        return self._typed(name, raw if _is_tuple(hint) else raw[0])[1]

    def _typed(self, name: str, raw: RawValue | list[RawValue]) -> tuple[bool, Any]:
        """(accepted, value) of what jsonargparse makes of it."""
        alternatives = _alternatives(self.hints[name])
        written = raw if isinstance(raw, list) else [raw]
        if None in written:
            return False, None
        if alternatives <= {str, types.NoneType}:  # verbatim: "null" in quotation marks is a text in a file
            return True, tuple(written) if isinstance(raw, list) else raw
        if alternatives & {int, float} and any(":" in str(item) for item in written):
            return False, None  # YAML 1.1, with which jsonargparse reads numbers, takes 12:30 for 750
        try:
            value = self.parser.parse_object({name: raw}, defaults=False)[name]
        except argparse.ArgumentError:
            return False, None
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, float)]
        return all(map(math.isfinite, numbers)), value


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _split_words(words: Sequence[str]) -> list[Entry]:
    """The options in the order of the line; whatever follows an option up to the next `--` is its value."""
    entries: list[Entry] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            entries.append((name, [value] if equals else [], f"--{name}"))
        elif entries and word != "--":
            entries[-1][1].append(word)
        else:
            raise UserError(f"unexpected {word!r}: every option starts with two dashes")
    return entries


def _read_yaml(file_name: str) -> list[Entry]:
    """The lines `option: value` of a YAML file; a value may be a list.

    The nodes are read instead of PyYAML's values, so that `1e-4` is a number, `no` a text and 12:30 not 750 when
    the option says so: a value means the same in a file and on the command line.
    """
    try:
        node = yaml.compose(Path(file_name).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8 text")
        raise UserError(f"--config {file_name} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", "a control character is not allowed")
        raise UserError(f"{file_name}{place}: not valid YAML ({problem})") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{file_name} must hold lines of the form `option: value`")
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        label = f"{file_name}, line {key_node.start_mark.line + 1}: {key}"
        if key in ("compute_environment", "distributed_type"):
            raise UserError(f"{file_name} is a file for Accelerate: give it to `accelerate launch --config_file`")
        if key in entries:
            raise UserError(f"{label} stands in the file a second time")
        items = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise UserError(f"{label} must be a value or a list of values")
        raw = [None if item.style is None and item.value in _NULLS else item.value for item in items]
        entries[key] = (key, raw, label)
    return list(entries.values())


def _to_yaml(options_class: type[Any], values: Mapping[str, Any]) -> str:
    """One commented line per option; a required option without a value stands there as a comment to fill in."""
    hints = typing.get_type_hints(options_class)
    lines, heading = [], "options"
    for field in dataclasses.fields(options_class):
        if (field.metadata["group"] or "options") != heading:
            heading = field.metadata["group"] or "options"
            lines += ["", f"# ---- {heading} ----"]
        comment = _help_with_default(field, hints[field.name])
        lines += ["", *textwrap.wrap(comment, 100, initial_indent="# ", subsequent_indent="# ")]
        if field.name in values or not field.metadata["required"]:
            lines.append(f"{field.name}: {_yaml_value(values.get(field.name, field.default))}")
        else:
            lines.append(f"# {field.name}:")
    return "\n".join(lines).strip() + "\n"


def _yaml_value(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml_value(item) for item in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_./][\w./-]*", value):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a YAML string
    return str(yaml.safe_dump(value)).removesuffix("...\n").strip()


def _is_tuple(hint: Any) -> bool:
    return any(typing.get_origin(member) is tuple for member in (hint, *typing.get_args(hint)))


def _alternatives(hint: Any) -> set[Any]:
    """The types that one value may have: the members of a union, the elements of a tuple."""
    if typing.get_origin(hint) in (Union, types.UnionType, tuple):
        return set().union(*(_alternatives(member) for member in typing.get_args(hint) if member is not ...))
    return {hint}


def _choices(hint: Any) -> list[Any]:
    literals = [member for member in _alternatives(hint) if typing.get_origin(member) is Literal]
    return [choice for literal in literals for choice in typing.get_args(literal)]


def _describe(hint: Any) -> str:
    """What one value has to be, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    alternatives = _alternatives(hint)
    names = [str(choice) for choice in _choices(hint)]
    return _listed(names + [text for kind, text in words.items() if kind in alternatives], "or")


def _help_with_default(field: dataclasses.Field[Any], hint: Any) -> str:
    notes = [f"one of {', '.join(str(choice) for choice in _choices(hint))}"] if _choices(hint) else []
    if field.metadata["required"]:
        notes.append("required")
    elif field.default not in (None, (), ""):
        notes.append(f"default: {_shown(field.default)}")
    return str(field.metadata["help"]) + (f" ({'; '.join(notes)})" if notes else "")


def _shown(value: Any) -> str:
    """A value as one would type it, in quotation marks only where it would be hard to see."""
    if isinstance(value, str):
        return value if value.split() == [value] else repr(value)
    return " ".join(_shown(item) for item in value) if isinstance(value, tuple) else _yaml_value(value)


def _listed(items: Iterable[Any], conjunction: str) -> str:
    words = [str(item) for item in items]
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _nearest(word: str, known: Iterable[str], dashes: str = "") -> str:
    """`did you mean --x?`, or nothing where no name is near."""
    name = _normal(word.lstrip("-–—"))
    longer = [candidate for candidate in known if candidate.startswith(name)]
    near = longer if len(longer) == 1 else difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {dashes}{near[0]}?" if near else ""


def _say(text: str, stream: TextIO, rank_variable: str = "RANK") -> None:
    """Writes from the first process only where a launcher started several."""
    if os.environ.get(rank_variable, "0") == "0":
        stream.write(text)
        stream.flush()
