"""Options of a script: one frozen dataclass, one field = one option = one YAML key.

The types are checked by jsonargparse. What it leaves to argparse's habits is done here: the command line beats the
file wherever it stands, older names still work and say the new one, a misspelt name is answered with the nearest
right one, and every mistake is one sentence and exit code 2. Nothing heavy is imported: `--help` must be quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import jsonargparse

from lmscripts.errors import UserError
from lmscripts.options.foreign import LINE, ForeignOptions, Translation, Written
from lmscripts.options.yaml_text import (
    Entry,
    alternatives,
    choices,
    describe,
    help_with_default,
    is_tuple,
    listed,
    nearest,
    normal,
    plain_value,
    read_yaml,
    shown,
    to_yaml,
)

MISSING = dataclasses.MISSING
OptionsType = TypeVar("OptionsType")
Names = Mapping[str, str]
RawValue = str | None  # None is a YAML null
Beneath = Callable[[Mapping[str, tuple[Any, bool]], Callable[[str], dict[str, Any]]], Mapping[str, Any]]

_NONE: Mapping[str, Any] = types.MappingProxyType({})


def option(
    default: Any = MISSING,
    *,
    help: str,
    required: bool = False,
    group: str = "",
    short: str = "",
    positional: bool = False,
) -> Any:
    """One option of a script; the field's name is the option's name and its YAML key.

    Args:
        default: the value when neither the line nor a file gives one; without it the option is required.
        help: one sentence for `--help` and for the comment in the saved YAML.
        required: the line or a file has to give it, even though the field has a default.
        group: heading in `--help` and in the YAML.
        short: a letter that stands for it on the line, after one dash.
        positional: words of the line that belong to no option are its values.
    """
    metadata: dict[str, Any] = {"help": help, "required": required or default is MISSING, "group": group}
    metadata |= {"short": short, "positional": positional}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def parse_options(
    options_class: type[OptionsType],
    *,
    description: str,
    argv: Sequence[str] | None = None,
    renamed: Names = _NONE,
    renamed_values: Mapping[str, Names] = _NONE,
    accepted_unused: Names = _NONE,
    foreign: Translation | None = None,
    one_of: Collection[Collection[str]] = (),
    beneath: Beneath | None = None,
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
        foreign: a module that translates the keys of another system, as `lmscripts.options.lightning` does.
        one_of: options of which one is given; where it stands on the line it replaces any that the file has.
        beneath: gets what was given, name to value and whether it stands on the line, and a function that reads a file
            of options; returns values that count instead of the defaults, and instead of what was given.
    """
    older: dict[str, Any] = {"renamed": renamed, "renamed_values": renamed_values, "accepted_unused": accepted_unused}
    older |= {"foreign": foreign, "one_of": one_of, "beneath": beneath}
    return parse_options_with_origin(options_class, description=description, argv=argv, **older)[0]


def parse_options_with_origin(
    options_class: type[OptionsType],
    *,
    description: str,
    argv: Sequence[str] | None = None,
    beneath: Beneath | None = None,
    **older_names: Any,
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
        given = reader.collect(reader.split_words(words), LINE)
        built_in = {name: given.pop(name).value for name in reader.built_in if name in given}
        in_file: dict[str, _Given] = {}
        if (file_name := built_in.get("config")) is not None:
            in_file = reader.collect(read_yaml(file_name, reader.blocks), file_name)
        given = reader.merge(given, in_file)
        if beneath is not None:
            given = reader.lay_under(given, beneath)
        _say("".join(f"{notice}\n" for notice in dict.fromkeys(reader.notices)), sys.stderr)
        values = {name: item.value for name, item in given.items()}
        if built_in.get("print_config"):
            _say(to_yaml(options_class, values), sys.stdout)
            sys.exit(0)
        required = {name for name, field in reader.fields.items() if field.metadata["required"]}
        if missing := [f"--{name}" for name in reader.fields if name in required - given.keys()]:
            raise UserError(f"missing {listed(missing, 'and')} (on the line or in the file of --config)")
        origins = {name: given[name].origin if name in given else "default" for name in reader.fields}
        return options_class(**values), origins
    except UserError as error:
        # Under a launcher every process parses the same line; one of them speaks on each node.
        _say(f"{Path(sys.argv[0]).name}: error: {error}\n", sys.stderr, rank_variable="LOCAL_RANK")
        sys.exit(2)


def dump_options(options: Any) -> str:
    """YAML text of all options, each under its help as a comment; `--config` with that text gives them back."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return to_yaml(type(options), values)


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
        foreign: Translation | None = None,
        one_of: Collection[Collection[str]] = (),
    ) -> None:
        self.fields = {field.name: field for field in dataclasses.fields(options_class)}
        self.built_in = {field.name: field for field in dataclasses.fields(_EveryScript)}
        self.hints = {**typing.get_type_hints(_EveryScript), **typing.get_type_hints(options_class)}
        self.renamed = {normal(old): normal(new) for old, new in renamed.items()}
        self.renamed_values = {normal(name): values for name, values in renamed_values.items()}
        self.accepted_unused = {normal(name): reason for name, reason in accepted_unused.items()}
        self.foreign = foreign
        self.one_of = one_of
        foreign_keys = tuple(foreign.KEYS) if foreign else ()
        self.blocks = {key.split(".")[0] for key in foreign_keys if "." in key}
        self.foreign_given: dict[str, Written] = {}
        self.foreign_in_file = False
        negations = [f"no_{name}" for name in self.fields if bool in alternatives(self.hints[name])]
        self.own = [*self.fields, *negations, *self.renamed, *self.accepted_unused]
        self.known = [*self.own, *foreign_keys]
        self.notices: list[str] = []
        self.parser = self._typed_parser()

    def _typed_parser(self) -> jsonargparse.ArgumentParser:
        """Types and help of every field; what is required is checked after line and file are merged."""
        usage = "%(prog)s [--config FILE.yaml] [--option VALUE ...]"
        if first := next((name for name, field in self.fields.items() if field.metadata["positional"]), ""):
            usage = usage.replace("%(prog)s", f"%(prog)s {first.upper()}")
        parser = jsonargparse.ArgumentParser(usage=usage, add_help=False, exit_on_error=False)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter  # jsonargparse's own repeats types and defaults
        groups: dict[str, Any] = {}
        for name, field in {**self.fields, **self.built_in}.items():
            heading = field.metadata["group"] or "options"
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            hint, text = self.hints[name], help_with_default(field, self.hints[name]).replace("%", "%%")
            text += f" (also -{field.metadata['short']})" if field.metadata["short"] else ""
            if hint is bool:
                prefix: Any = None if name in self.built_in else "no_"
                action = jsonargparse.ActionYesNo(no_prefix=prefix)
                groups[heading].add_argument(f"--{name}", action=action, default=False, help=text)
            else:
                metavar = f"{'CHOICE' if choices(hint) else 'VALUE'}{' ...' if is_tuple(hint) else ''}"
                groups[heading].add_argument(f"--{name}", type=hint, default=None, help=text, metavar=metavar)
        return parser

    def split_words(self, words: Sequence[str]) -> list[Entry]:
        """The options in the order of the line; what follows an option up to the next one are its values."""
        own = {name: field.metadata for name, field in self.fields.items()}
        shorts = {f"-{metadata['short']}": name for name, metadata in own.items() if metadata["short"]}
        positional = next((name for name, metadata in own.items() if metadata["positional"]), None)
        entries: list[Entry] = []
        for word in words:
            if word.startswith("--") and len(word) > 2:
                name, equals, value = word[2:].partition("=")
                entries.append(Entry(name, [value] if equals else [], f"--{name}"))
            elif word in shorts:
                entries.append(Entry(shorts[word], [], word))
            elif positional is not None and not (entries and self._takes(entries[-1], word)):
                entries.append(Entry(positional, [word], positional))
            elif entries and word != "--":
                entries[-1].values.append(word)
            else:
                raise UserError(f"unexpected {word!r}: every option starts with two dashes")
        return entries

    def _takes(self, entry: Entry, word: str) -> bool:
        """Whether a word can be a value of the option before it; else it belongs to the positional option."""
        name = self.renamed.get(normal(entry.key), normal(entry.key))
        hint = self.hints.get(name)
        if hint is None or is_tuple(hint):
            return hint is not None or name not in self.own
        if bool in alternatives(hint):
            return not entry.values and self._typed(name, word)[0]
        return not entry.values

    def help_text(self, description: str) -> str:
        """The answer to `--help`."""
        self.parser.description = description
        older = [f"--{old} (now --{new})" for old, new in self.renamed.items()]
        if older := older + [f"--{old} (no effect any more)" for old in self.accepted_unused]:
            self.parser.epilog = textwrap.fill("Older names that are still accepted: " + ", ".join(older) + ".", 78)
        if self.foreign:
            keys = listed(sorted({key.split(".")[0] + ".*" * ("." in key) for key in self.foreign.KEYS}), "and")
            also = textwrap.fill(f"Files and options of {self.foreign.SYSTEM} are accepted too: {keys}.", 78)
            self.parser.epilog = "\n\n".join(filter(None, (self.parser.epilog, also)))
        return str(self.parser.format_help())

    def collect(self, entries: Sequence[Entry], origin: str) -> dict[str, _Given]:
        """What stands on the command line, or in a file."""
        dashes, kind = ("--", "unknown option") if origin == LINE else ("", f"{origin}: unknown key")
        known = [*self.known, *(self.built_in if origin == LINE else ())]
        unknown: dict[str, Entry] = {}
        for entry in entries:
            if normal(entry.key) not in known:
                unknown.setdefault(entry.key, entry)
        if unknown:
            answers = []
            for name, entry in unknown.items():
                place, near = f" in line {entry.line}" if entry.line else "", nearest(name, known, dashes)
                answers.append(f"{dashes}{name}{place}{near and f' ({near})'}")
            raise UserError(f"{kind}{'s' if len(answers) > 1 else ''} {listed(answers, 'and')}")
        given: dict[str, _Given] = {}
        for entry in entries:
            spelled = normal(entry.key)
            if spelled in self.own or spelled in self.built_in:
                self._take(given, spelled, entry.values, origin, entry.label)
            else:
                self._set_aside(spelled, entry, origin)
        return given

    def merge(self, on_line: dict[str, _Given], in_file: dict[str, _Given]) -> dict[str, _Given]:
        """The line over the file, each with what the keys of the other system mean, over that system's defaults."""
        defaults: dict[str, _Given] = {}
        if self.foreign and self.foreign_given:
            own = {name: item.value for name, item in {**in_file, **on_line}.items()}
            old = ForeignOptions(self.foreign_given, own, self.foreign_in_file, [*on_line])
            self.foreign.translate(old)
            self.notices += old.notices
            for name, values, sources in old.meanings:
                place = next((source for source in sources if source.origin == LINE), sources[0])
                value = self._convert(name, values, place.origin, place.label)
                written = " and ".join(f"{source.key} {source.shown}" for source in sources)
                self._keep(on_line if place.origin == LINE else in_file, name, _Given("", written, value, place.origin))
            for name, text in old.defaults.items():
                defaults[name] = _Given("", text, self._convert(name, [text], "default", name), "default")
        decided = {name for name, item in on_line.items() if item.value is not None}
        replaced = {name for group in self.one_of if decided & {*group} for name in group}
        return {**defaults, **{n: item for n, item in in_file.items() if n not in replaced}, **on_line}

    def lay_under(self, given: dict[str, _Given], beneath: Beneath) -> dict[str, _Given]:
        """What was given, over the options of the run that this one goes on from where there is one."""
        explicit = {n: (item.value, item.origin == LINE) for n, item in given.items() if item.origin != "default"}
        under = beneath(explicit, lambda file: {n: i.value for n, i in self.collect(read_yaml(file), file).items()})
        return {**given, **{name: _Given(name, "", value, "the run before") for name, value in under.items()}}

    def _set_aside(self, key: str, entry: Entry, origin: str) -> None:
        """Keeps a key of the other system for its translation; the line is read before the file and stays."""
        values, is_list = entry.values or [None], entry.is_list
        self.foreign_in_file |= origin != LINE
        if origin == LINE:
            values = [None if text == "null" else plain_value(text) for text in entry.values]
            is_list = len(values) == 1 and isinstance(values[0], list)
            values = values[0] or [None] if is_list else values
        written, before = Written(key, values, entry.label, origin, is_list), self.foreign_given.get(key)
        if before and before.origin == origin and (before.values, before.is_list) != (values, is_list):
            raise UserError(f"{key} is given twice: {before.shown} and {written.shown}; give one")
        if before is None:
            self.foreign_given[key] = written

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
        written = " ".join([f"--{spelled}", *("null" if item is None else item for item in raw)])
        self._keep(collected, name, _Given(spelled, written, value, origin))

    def _keep(self, collected: dict[str, _Given], name: str, item: _Given) -> None:
        """Adds a value; one that is already there from the same place has to be the same, or goes on with a list."""
        before = collected.get(name)
        if before is not None and is_tuple(self.hints[name]) and before.spelled == item.spelled != "":
            item = dataclasses.replace(item, value=(before.value or ()) + (item.value or ()))
        elif before is not None and before.value != item.value:
            place = "" if item.origin == LINE else f"{item.origin}: "
            raise UserError(f"{place}{name} is given twice: {before.written} and {item.written}; give one")
        collected[name] = item

    def _convert(self, name: str, raw: list[RawValue], origin: str, label: str) -> Any:
        """Checks what was written against the type of the field."""
        hint, on_line = self.hints[name], origin == LINE
        new_values: Mapping[Any, str] = self.renamed_values.get(name, {})
        self.notices += [f"--{name} {old} is now --{name} {new_values[old]}" for old in raw if old in new_values]
        raw = [new_values.get(item, item) for item in raw]
        if types.NoneType in alternatives(hint) and (raw == [None] or (on_line and raw == ["null"])):
            return None
        if bool in alternatives(hint) and on_line and not raw:
            return True
        if not raw and (on_line or not is_tuple(hint)):
            raise UserError(f"{label} needs a value")
        if len(raw) > 1 and not is_tuple(hint):
            raise UserError(f"{label} takes one value, not {len(raw)} ({listed(raw, 'and')})")
        for item in raw:
            if not self._typed(name, [item] if is_tuple(hint) else item)[0]:
                near = nearest(str(item), [str(choice) for choice in choices(hint)])
                raise UserError(f"{label} must be {describe(hint)}, not {shown(item)}{near and f'; {near}'}")
        return self._typed(name, raw if is_tuple(hint) else raw[0])[1]

    def _typed(self, name: str, raw: RawValue | list[RawValue]) -> tuple[bool, Any]:
        """(accepted, value) of what jsonargparse makes of it."""
        kinds = alternatives(self.hints[name])
        written = raw if isinstance(raw, list) else [raw]
        if None in written:
            return False, None
        if kinds <= {str, types.NoneType}:  # verbatim: "null" in quotation marks is a text in a file
            return True, tuple(written) if isinstance(raw, list) else raw
        if kinds & {int, float} and any(":" in str(item) for item in written):
            return False, None  # YAML 1.1, with which jsonargparse reads numbers, takes 12:30 for 750
        try:
            value = self.parser.parse_object({name: raw}, defaults=False)[name]
        except argparse.ArgumentError:
            return False, None
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, float)]
        return all(map(math.isfinite, numbers)), value


def _say(text: str, stream: TextIO, rank_variable: str = "RANK") -> None:
    """Writes from the first process only where a launcher started several."""
    if os.environ.get(rank_variable, "0") == "0":
        stream.write(text)
        stream.flush()
