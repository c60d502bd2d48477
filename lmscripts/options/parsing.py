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
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import jsonargparse

from lmscripts.errors import UserError
from lmscripts.files import project_folder
from lmscripts.options.checks import check_value, num_cpus
from lmscripts.options.yaml_text import LINE, Entry, Flag, by_group, listed, nearest, normal, read_yaml, shown, to_yaml

MISSING = dataclasses.MISSING
Names = Mapping[str, str]
Given = dict[str, tuple[Any, Entry]]  # name to value, and how and where it was written
Beneath = Callable[[Mapping[str, tuple[Any, bool]], Callable[[str], dict[str, Any]]], Mapping[str, Any]]

_NONE: Mapping[str, Any] = types.MappingProxyType({})
_DEFAULT = "default"
_TRUTH = {"1": "true", "yes": "true", "t": "true", "0": "false", "no": "false", "f": "false"}
_EVERY_SCRIPT = (  # for the line alone
    Flag("help", bool, False, "print this and exit", group="every script"),
    Flag("config", str | None, None, "YAML file of options; the command line wins", group="every script"),
    Flag("print_config", bool, False, "print all options as YAML and exit", group="every script"),
)


class Further(NamedTuple):
    """What was said with the options of further dataclasses.

    Attributes:
        settings: one instance of each of the dataclasses.
        given: name to value of those that the line has, or a file with another value than the default.
    """

    settings: dict[type[Any], Any]
    given: dict[str, Any]


def option(
    default: Any = MISSING,
    *,
    help: str,
    required: bool = False,
    group: str = "",
    short: str = "",
    positional: bool = False,
    most: float = 10**12,
    writes: Literal["", "folder", "file"] = "",
) -> Any:
    """One option of a script; the field's name is the option's name and its YAML key.

    Args:
        default: the value when neither the line nor a file gives one; without it the option is required.
        help: one sentence for `--help` and for the comment in the saved YAML.
        required: the line or a file has to give it, even though the field has a default.
        group: heading in `--help` and in the YAML.
        short: a letter that stands for it on the line, after one dash.
        positional: words of the line that belong to no option are its values.
        most: the largest whole number that it may be, with either sign.
        writes: it names a folder or a file that is written, where that has to be possible.
    """
    metadata = {"help": help, "required": required or default is MISSING, "group": group, "short": short}
    metadata |= {"positional": positional, "most": most, "writes": writes}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


def parse_options(options_class: type[Any], *, more: Sequence[type[Any]] | None = None, **rest: Any) -> Any:
    """Options from the command line, over those of `--config file.yaml`, over the defaults.

    Ends the process after `--help` and `--print_config` (exit code 0) and a mistake (one sentence, exit code 2).

    With `more`, the fields of further dataclasses are options too. A field that several of them have is one option and
    has to be the same in all. Which of them is in use is known afterwards: `checks.refuse_given` is for the others.

    Args:
        options_class: frozen dataclass whose fields are made by `option`.
        more: frozen dataclasses of the same kind; the heading of their options is their `GROUP` or their module's name.
        rest: the arguments that follow, all of them by name.
        description: what the script does, for `--help`.
        argv: words of the command line without the program; `sys.argv[1:]` when None.
        renamed: older name -> its name now, or that name and a value. `no_x` is the opposite of the boolean `x`.
            In this table and the next two "name value" instead of a name is for that value alone; "true" for a flag.
        accepted_unused: older name -> a sentence that says why it is not needed any more.
        refused: name -> a sentence that says what to do instead.
        renamed_values: option (name now) -> {older value: its name now}.
        of_run: options that are read of a file that has the key `model_type`, the config.yaml of a pretraining run.
        foreign: a module that knows another system, as `lmscripts.options.lightning` does: its `SYSTEM` in words, its
            `KEYS` (`block.key` may stand in a block of a file), and `translate`, which turns entries with these keys
            into entries of the script's options; one of the origin "default" counts where no other has the option.
            It may have `WORDS`, names that can stand on the line as `name=value`, without dashes.
        one_of: options of which one is given; where it stands on the line it replaces any that the file has.
        beneath: gets what was given, name to value and whether it stands on the line, and a function that reads a file
            of options; returns values that count instead of the defaults, and instead of what was given.

    Returns:
        The options; with `more` also a `Further`.
    """
    options, further, _ = _parse(options_class, more or (), **rest)
    return options if more is None else (options, further)


def parse_options_with_origin(options_class: type[Any], **rest: Any) -> tuple[Any, dict[str, str]]:
    """As `parse_options`, and for each option where it comes from: "command line", the file's name, or "default".

    With the origins a script can refuse an option that was given but would be ignored.
    """
    return _parse(options_class, (), **rest)[::2]


def dump_options(*options: Any) -> str:
    """YAML text of all options, each under its help as a comment; `--config` with that text gives them back.

    Args:
        options: those of the script, then the instances of further dataclasses that are to be written down.
    """
    values = {name: value for instance in options for name, value in vars(instance).items()}
    return to_yaml(_flags(*map(type, options)).values(), values)


def _parse(
    options_class: type[Any],
    more: Sequence[type[Any]],
    *,
    description: str,
    argv: Sequence[str] | None = None,
    one_of: Collection[Collection[str]] = (),
    beneath: Beneath | None = None,
    **older_names: Any,
) -> tuple[Any, Further, dict[str, str]]:
    flags = _flags(options_class, *more)
    reader = _Reader(flags, **older_names)
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        _say(reader.help_text(description), sys.stdout)
        sys.exit(0)
    try:
        given, prints = reader.read(words, one_of)
        if beneath is not None:
            explicit = {n: (v, entry.origin == LINE) for n, (v, entry) in given.items() if entry.origin != _DEFAULT}
            under = beneath(explicit, reader.own_values)
            given |= {name: (value, Entry(name, [], name, "the run before")) for name, value in under.items()}
        workers, cpus = given.get("num_workers", (None,))[0], num_cpus()
        if isinstance(workers, int) and workers > cpus:
            reader.notices.append(
                f"--num_workers {workers} is more than the {cpus} CPUs there are: more of them cost time"
            )
        _say("".join(f"{notice}\n" for notice in dict.fromkeys(reader.notices)), sys.stderr)
        values = {name: value for name, (value, _) in given.items()}
        if prints:
            _say(to_yaml(flags.values(), values), sys.stdout)
            sys.exit(0)
        if missing := [f"--{name}" for name, flag in flags.items() if flag.required and name not in given]:
            took = (e for n, (_, e) in given.items() if flags[n].is_tuple and e.origin == LINE and e.values)
            taken = next((e for e in took if Path(e.values[-1] or "").is_file()), None)
            hint = f"; {taken.label} took {taken.values[-1]} for one of its values: write that first" if taken else ""
            raise UserError(f"missing {listed(missing, 'and')} (on the line or in the file of --config){hint}")

        for name, flag in flags.items():
            check_value(flag, values.get(name))

        def made(cls: type[Any]) -> Any:
            return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

        options, own = made(options_class), options_class.__dataclass_fields__
        said = {n for n, (value, entry) in given.items() if entry.origin == LINE or value != flags[n].default}
        further = Further({cls: made(cls) for cls in more}, {n: values[n] for n in flags if n in said - {*own}})
        return options, further, {name: given[name][1].origin if name in given else _DEFAULT for name in flags}
    except UserError as error:
        # Under a launcher every process parses the same line; one of them speaks on each node.
        _say(f"{Path(sys.argv[0]).name}: error: {error}\n", sys.stderr, rank_variable="LOCAL_RANK")
        sys.exit(2)


def _flags(own: type[Any], *more: type[Any]) -> dict[str, Flag]:
    """The options of a script's dataclass and of further ones; one that several have stands under all their headings.

    Raises:
        TypeError: two dataclasses have options of one name that differ.
    """
    flags: dict[str, Flag] = {}
    for cls in (own, *more):
        hints = typing.get_type_hints(cls)
        heading = "" if cls is own else getattr(cls, "GROUP", cls.__module__.rpartition(".")[2])
        for field in dataclasses.fields(cls):
            flag = Flag(field.name, hints[field.name], field.default, **field.metadata)
            flag = flag._replace(group=flag.group or heading)
            before = flags.setdefault(field.name, flag)
            if before._replace(group="") != flag._replace(group=""):
                raise TypeError(f"{cls.__module__}.{cls.__name__}: the option {field.name} differs from another one")
            if field.name not in own.__dataclass_fields__:
                headings = dict.fromkeys([*before.group.split(", "), heading])
                flags[field.name] = flag._replace(group=", ".join(headings))
    return flags


class _Reader:
    """Collects typed values from the line and from a file; a mistake is a UserError with one sentence."""

    def __init__(
        self,
        flags: Mapping[str, Flag],
        renamed: Names = _NONE,
        renamed_values: Mapping[str, Names] = _NONE,
        accepted_unused: Names = _NONE,
        refused: Names = _NONE,
        foreign: Any = None,
        of_run: Collection[str] = (),
    ) -> None:
        self.flags = {**flags, **{flag.name: flag for flag in _EVERY_SCRIPT}}
        tables = {"renamed": renamed, "unused": accepted_unused, "refused": refused}
        self.older = {_name_and_value(k): (kind, v) for kind, table in tables.items() for k, v in table.items()}
        self.renamed_values = {normal(name): values for name, values in renamed_values.items()}
        self.foreign, self.foreign_keys = foreign, foreign.KEYS if foreign else ()
        self.bare: Collection[str] = getattr(foreign, "WORDS", ())
        self.of_run = of_run
        self.own = [*flags, *(f"no_{name}" for name, flag in flags.items() if bool in flag.kinds)]
        self.known = {*self.own, *(name for name, _ in self.older)}
        self.notices: list[str] = []
        self.parser = self._typed_parser()

    def _typed_parser(self) -> jsonargparse.ArgumentParser:
        """Types and help of every option; what is required is checked after line and file are merged."""
        positional = next((f" {name.upper()}" for name, flag in self.flags.items() if flag.positional), "")
        usage = f"%(prog)s{positional} [--config FILE.yaml] [--option VALUE ...]"
        parser = jsonargparse.ArgumentParser(usage=usage, add_help=False, exit_on_error=False)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter  # jsonargparse's own repeats types and defaults
        for heading, flags in by_group(self.flags.values()).items():
            group = parser.add_argument_group(heading)
            for flag in flags:
                text = flag.explained().replace("%", "%%") + (f" (also -{flag.short})" if flag.short else "")
                metavar = f"{'CHOICE' if flag.choices else 'VALUE'}{' ...' if flag.is_tuple else ''}"
                how: dict[str, Any] = {"type": flag.one_value, "metavar": metavar}
                if flag.hint is bool:
                    prefix: Any = None if flag in _EVERY_SCRIPT else "no_"
                    how = {"action": jsonargparse.ActionYesNo(no_prefix=prefix)}
                group.add_argument(f"--{flag.name}", default=None, help=text, **how)
        return parser

    def help_text(self, description: str) -> str:
        """The answer to `--help`."""
        self.parser.description = description
        rows = [
            (" ".join(filter(None, key)), kind, text.partition("; ")[0]) for key, (kind, text) in self.older.items()
        ]
        renamed = [f"--{name} (now --{text})" for name, kind, text in rows if kind == "renamed"]
        unused = [f"--{name}" for name, kind, _ in rows if kind == "unused"]
        ends = ["Older names that are still accepted: " + ", ".join(renamed) + "."] if renamed else []
        ends += ["Accepted without effect: " + ", ".join(unused) + "."] if unused else []
        if self.foreign:
            keys = listed(sorted({key.split(".")[0] + ".*" * ("." in key) for key in self.foreign_keys}), "and")
            ends.append(f"Files and options of {self.foreign.SYSTEM} are accepted too: {keys}.")
        self.parser.epilog = "\n\n".join(textwrap.fill(text, 78) for text in ends)
        return str(self.parser.format_help())

    # ---- where options stand

    def read(self, words: Sequence[str], one_of: Collection[Collection[str]]) -> tuple[Given, bool]:
        """The line over the file over another system's defaults, and whether `--print_config` was given."""
        entries = self._by_their_names(self._line(words), "--", (flag.name for flag in _EVERY_SCRIPT))
        every = self.collect(entry for entry in entries if self.flags.get(entry.key) in _EVERY_SCRIPT)
        entries = [entry for entry in entries if entry.key not in every]
        file, prints = (every[name][0] if name in every else None for name in ("config", "print_config"))
        if file is not None:
            file = self._shipped(file)
            entries += self._file(file)
        if self.foreign:
            entries, notices = self.foreign.translate(entries)
            self.notices += notices
        on_line = self.collect(entry for entry in entries if entry.origin == LINE)
        in_file = self.collect(entry for entry in entries if entry.origin == file)
        defaults = self.collect(entry for entry in entries if entry.origin not in (LINE, file))
        decided = {name for name, (value, _) in on_line.items() if value is not None}
        replaced = {name for group in one_of if decided & {*group} for name in group}
        kept = {name: item for name, item in in_file.items() if name not in replaced}
        return {**defaults, **kept, **on_line}, bool(prints)

    def _shipped(self, file_name: str) -> str:
        """The project's own recipe where `recipes/NAME` is not in the current folder; it is said."""
        own = project_folder() / file_name
        if Path(file_name).parts[:1] != ("recipes",) or os.path.lexists(file_name) or not own.is_file():
            return file_name
        self.notices.append(f"--config {file_name} is not in this folder: {own} is taken")
        return str(own)

    def own_values(self, file_name: str) -> dict[str, Any]:
        """The script's own options in a file."""
        entries = [entry for entry in self._file(file_name) if normal(entry.key) in self.known]
        return {name: value for name, (value, _) in self.collect(entries).items()}

    def _file(self, file_name: str) -> list[Entry]:
        blocks = {key.split(".")[0] for key in self.foreign_keys if "." in key} - self.known
        entries = read_yaml(file_name, blocks)
        if self.of_run and any(normal(entry.key) == "model_type" for entry in entries):
            entries = [entry for entry in entries if normal(entry.key) in self.of_run]
            self.notices.append(f"{file_name} is of a pretraining run: only {listed(self.of_run, 'and')} is read of it")
        return self._by_their_names(entries, "")

    def _line(self, words: Sequence[str]) -> list[Entry]:
        """The options in the order of the line; what follows an option up to the next one are its values."""
        shorts = {f"-{flag.short}": name for name, flag in self.flags.items() if flag.short}
        positional = next((name for name, flag in self.flags.items() if flag.positional), None)
        entries: list[Entry] = []
        for word in words:
            name, equals, value = word.removeprefix("--").partition("=")
            if word.startswith("--") and len(word) > 2:
                entries.append(Entry(name, [value] if equals else [], f"--{name}"))
            elif equals and name in self.bare:
                entries.append(Entry(name, [value], name))
            elif word in shorts:
                entries.append(Entry(shorts[word], [], word))
            elif word.startswith("-") and self.older.get((word[1:], ""), ("",))[0] == "unused":
                entries.append(Entry(word[1:], [], word))
            elif positional is not None and not (entries and self._takes(entries[-1], word)):
                entries.append(Entry(positional, [word], positional))
            elif entries and word != "--":
                entries[-1].values.append(word)
            else:
                raise UserError(f"unexpected {word!r}: every option starts with two dashes")
        return entries

    def _takes(self, entry: Entry, word: str) -> bool:
        """Whether a word can be a value of the option before it; else it belongs to the positional option."""
        kind, text = self.older.get((normal(entry.key), ""), ("", ""))
        name = text if kind == "renamed" else normal(entry.key)
        if (flag := self.flags.get(name)) is None:
            return name not in self.known
        may_be = bool not in flag.kinds or self._typed(flag, word) is not MISSING
        return flag.is_tuple or (not entry.values and may_be)

    def _by_their_names(self, entries: Sequence[Entry], dashes: str, more: Iterable[str] = ()) -> list[Entry]:
        """The entries under the names of today, without those that have no effect now; unknown ones are refused."""
        known = {*self.known, *self.foreign_keys, *more}
        unknown = {entry.key: entry for entry in entries if normal(entry.key) not in known}
        answers, found = [], []
        for name, entry in unknown.items():
            place = f" in line {entry.line}" if entry.line else ""
            near = nearest(name, self.foreign_keys if "." in name else [*self.own, *more], dashes)
            answers.append(f"{dashes}{name}{place}{near and f' ({near})'}")
        kind = "unknown option" if dashes else f"{entries[0].origin}: unknown key" if entries else ""
        more_help = "" if all(answer.endswith("?)") for answer in answers) else " (--help lists all)"
        problems = [f"{kind}{'s' if len(answers) > 1 else ''} {listed(answers, 'and')}{more_help}"] if answers else []
        for entry in (entry for entry in entries if entry.key not in unknown):
            found += self._by_its_name(entry, problems)
        if problems:
            raise UserError("; ".join(problems))
        return found

    def _by_its_name(self, entry: Entry, problems: list[str]) -> list[Entry]:
        """An entry under its name of today; none where it has no effect or is refused, which joins the problems."""
        spelled = normal(entry.key)
        written = f"--{spelled} {entry.shown}".rstrip()
        entry = dataclasses.replace(entry, key=spelled, written=written)
        kind, text = self._older(entry)
        if kind == "renamed":
            option, _, remark = text.partition("; ")
            name, value = _name_and_value(option)
            self.notices.append(f"--{spelled} is now --{option}{remark and f': {remark}'}")
            entry = dataclasses.replace(entry, key=name, values=[value] if value else entry.values)
            kind, text = self._older(entry)
        if kind == "unused":
            self.notices.append(f"--{spelled} has no effect: {text}")
        elif kind == "refused":
            problems.append(f"{entry.origin}: " * (entry.origin != LINE) + f"{written} has no counterpart here: {text}")
        return [] if kind in ("unused", "refused") else [entry]

    def _older(self, entry: Entry) -> tuple[str, str]:
        """What the tables say of an option with its value, else of its name: kind and text, both empty for nothing."""
        word = entry.shown or "true"
        ways = (word, word.casefold(), _TRUTH.get(word.casefold(), word), "")
        return next((self.older[entry.key, way] for way in ways if (entry.key, way) in self.older), ("", ""))

    # ---- what they mean

    def collect(self, entries: Iterable[Entry]) -> Given:
        """The values of one place; a list may go on, any other option given twice has to be the same."""
        collected: Given = {}
        for entry in entries:
            name = entry.key if entry.key in self.flags else entry.key.removeprefix("no_")
            value: Any = self._convert(self.flags[name], entry)
            value = value if name == entry.key else not value
            if name in collected:
                first, before = collected[name]
                if self.flags[name].is_tuple and before.written.split()[0] == entry.written.split()[0]:
                    value = (*(first or ()), *(value or ()))
                elif first != value:
                    place = "" if entry.origin == LINE else f"{entry.origin}: "
                    raise UserError(f"{place}{name} is given twice: {before.written} and {entry.written}; give one")
            collected[name] = (value, entry)
        return collected

    def _convert(self, flag: Flag, entry: Entry) -> Any:
        """Checks what was written against the type of the option."""
        raw, on_line = entry.values, entry.origin == LINE
        new: Mapping[Any, str] = self.renamed_values.get(flag.name, {})
        self.notices += [f"--{flag.name} {old} is now --{flag.name} {new[old]}" for old in raw if old in new]
        raw = [new.get(item, item) for item in raw]
        if types.NoneType in flag.kinds and (raw == [None] or (on_line and raw == ["null"])):
            return None
        if bool in flag.kinds and on_line and not raw:
            return True
        if not raw and (on_line or not flag.is_tuple):
            raise UserError(f"{entry.label} needs a value")
        if len(raw) > 1 and not flag.is_tuple:
            raise UserError(f"{entry.label} takes one value, not {len(raw)} ({listed(raw, 'and')})")
        values = tuple(self._typed(flag, item) for item in raw)
        if MISSING in values:
            wrong = raw[values.index(MISSING)]
            near = nearest(str(wrong), flag.choices)
            raise UserError(f"{entry.label} must be {flag.described()}, not {shown(wrong)}{near and f'; {near}'}")
        return values if flag.is_tuple else values[0]

    def _typed(self, flag: Flag, text: str | None) -> Any:
        """What jsonargparse makes of a value; MISSING where it refuses it."""
        # YAML 1.1, with which jsonargparse reads numbers, takes 12:30 for 750 and 010 for 8; Python makes no number of
        # some thousand digits.
        odd = text is None or ":" in text or len(text) > 400 or re.match("[-+]?0[0-9xXbBoO_]", text)
        if text is None or (odd and flag.kinds & {int, float}):
            return MISSING
        if flag.kinds <= {str, types.NoneType}:  # verbatim: "null" in quotation marks is a text in a file
            return text
        try:
            value = self.parser.parse_object({flag.name: text}, defaults=False)[flag.name]
        except argparse.ArgumentError:
            return MISSING
        return MISSING if isinstance(value, float) and not math.isfinite(value) else value


def _name_and_value(text: str) -> tuple[str, str]:
    """Of a key of a table of older names."""
    name, _, value = text.partition(" ")
    return normal(name), value


def _say(text: str, stream: TextIO, rank_variable: str = "RANK") -> None:
    """Writes from the first process only where a launcher started several."""
    if os.environ.get(rank_variable, "0") == "0":
        stream.write(text)
        stream.flush()
