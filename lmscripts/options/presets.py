"""Model presets from `parameter.json`: sizes, schedule, batch, checked all at once before any data is read.

The file keeps the published format (keys with dashes, `batch-size` per node, `generator-size` as a fraction,
`flozen-layers` beside `frozen-layers`). Added are `comment`, and that a key may be spelt with underscores.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from lmscripts.errors import UserError
from lmscripts.files import project_folder
from lmscripts.options.yaml_text import listed, nearest, normal

Reader = Callable[[Any], Any]
MOST_TOKENS = 1 << 16  # of a row

# ---- how a value is read -----------------------------------------------------------------------------------------


def _checked(words: str, fits: Callable[[Any], bool], made: Reader = lambda value: value) -> Reader:
    """A reader of values that fit, and of what is made of them; any other must be what the words say."""

    def read(value: Any) -> Any:
        if not fits(value):
            raise ValueError(f"must be {words}, not {json.dumps(value)}")
        return made(value)

    return read


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _whole(least: int, most: int = 10**12) -> Reader:
    bounds = f"from {least} to {most}" if most < 10 else f"of at least {least}"
    whole = _checked(f"a whole number {bounds}", lambda value: _is_number(value, int) and value >= least)
    return lambda value: _checked(
        f"a whole number {bounds}" if most < 10 else f"at most {most:,}", lambda v: v <= most
    )(whole(value))


def _number(bounds: str, below: float, made: Reader) -> Reader:
    return _checked(f"a number {bounds}", lambda value: _is_number(value, int, float) and 0 < value < below, made)


def _fraction(value: Any) -> Fraction:
    """`"1/4"`, or a number such as 0.25: above 0 and at most 1."""
    text = "" if isinstance(value, bool) else str(value)
    try:  # Fraction would write an exponent out, however many digits that are
        fraction = Fraction(text if re.fullmatch(r"[\d./ ]{1,40}(e-?\d{1,2})?", text, re.ASCII) else 0)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    _checked('a fraction such as "1/4", at most 1', lambda _: 0 < fraction <= 1)(value)
    return fraction


def _rows_of_nodes(value: Any) -> dict[int, int]:
    """Rows of a step by the number of the node, in their order; -1 where there is a single one."""
    form = '{"-1": rows} or {"0": rows of node 0, "1": rows of node 1, ...}'
    _checked(form, lambda value: isinstance(value, dict) and bool(value))(value)
    wrong = {node: rows for node, rows in value.items() if not (_is_number(rows, int) and 1 <= rows <= 10**9)}
    _checked("whole numbers of at least 1", lambda wrong: not wrong)(wrong)
    if "-1" in value and len(value) > 1:
        raise ValueError(f'has "-1" (a single node) beside node numbers: {json.dumps(value)}')
    nodes = ["-1"] if "-1" in value else [str(node) for node in range(len(value))]
    if sorted(value) != sorted(nodes):
        numbered = listed([f'"{node}"' for node in nodes], "and")
        raise ValueError(f"must number its nodes {numbered}, not {listed(value, 'and')}")
    return {int(node): value[node] for node in nodes}


def _is_comment(value: Any) -> bool:
    return all(isinstance(line, str) for line in (value if isinstance(value, list) else [value]))


_truth = _checked("true or false", lambda value: isinstance(value, bool))
_model = _checked("the name or the folder of a model", lambda value: isinstance(value, str) and bool(value.strip()))
_comment = _checked("a text or a list of texts", _is_comment)
_rate = _number("above 0", math.inf, float)
_dropout = _checked("a number of at least 0 and below 1", lambda v: _is_number(v, int, float) and 0 <= v < 1, float)
_percent = _number("above 0 and below 100", 100, lambda value: value / 100)


# ---- presets -----------------------------------------------------------------------------------------------------


def key_of(key: str, read: Reader, default: Any = None, *, kind: str) -> Any:
    """A value of a preset: its key in the file, how it is read, and what it is where an optional key is not given.

    Of the kinds, sizes and the length are not required of a preset that goes on from a pretrained model, the schedule
    always is, and the family says which of its own kind it has (`FamilyKeys`).
    """
    return field(default=default, kw_only=True, metadata={"key": key, "read": read, "kind": kind})


@dataclass(frozen=True)
class Preset:
    """One model of the parameter file.

    The sizes are None where they come from a pretrained model. Rows are sequences of `sequence_length` tokens.

    Attributes:
        embedding_size: width of the token embeddings where it differs from hidden_size (ELECTRA).
        generator_fraction: width of the generator over that of the discriminator (ELECTRA).
        rows_of_nodes: rows of one optimizer step by the number of the node; -1 where there is a single one.
        fp16_type: 0 for full precision; 1, 2 and 3 all mean float16 with loss scaling.
        frozen_layers: -1 trains everything; n freezes the embeddings and the first n layers.
    """

    name: str
    family: str
    layers: int | None = key_of("number-of-layers", _whole(1, 1000), kind="size")
    hidden_size: int | None = key_of("hidden-size", _whole(1, 1_000_000), kind="size")
    ffn_size: int | None = key_of("ffn-inner-hidden-size", _whole(1, 10_000_000), kind="size")
    heads: int | None = key_of("attention-heads", _whole(1, 1_000_000), kind="size")
    sequence_length: int | None = key_of("sequence-length", _whole(8, MOST_TOKENS), kind="length")
    embedding_size: int | None = key_of("embedding-size", _whole(1, 1_000_000), kind="family")
    generator_fraction: Fraction | None = key_of("generator-size", _fraction, kind="family")
    warmup_steps: int = key_of("warmup-steps", _whole(0), kind="schedule")
    learning_rate: float = key_of("learning-rate", _rate, kind="schedule")
    rows_of_nodes: dict[int, int] = key_of("batch-size", _rows_of_nodes, kind="schedule")
    train_steps: int = key_of("train-steps", _whole(1), kind="schedule")
    comment: str | list[str] = key_of("comment", _comment, "", kind="optional")
    save_steps: int = key_of("save-steps", _whole(1), 50000, kind="optional")
    keep_last: int = key_of("keep-last", _whole(1), 20, kind="optional")  # checkpoints, as many as in the older scripts
    logging_steps: int = key_of("logging-steps", _whole(1), 5000, kind="optional")
    accumulation_steps: int = key_of("accumulation-steps", _whole(1), 1, kind="optional")
    hidden_dropout: float = key_of("hidden-dropout", _dropout, 0.1, kind="optional")
    mask_probability: float = key_of("mask-percent", _percent, 0.15, kind="optional")
    frozen_layers: int = key_of("frozen-layers", _whole(-1), -1, kind="optional")
    fp16_type: int = key_of("fp16-type", _whole(0, 3), 0, kind="optional")
    bf16: bool = key_of("bf16", _truth, False, kind="optional")
    pretrained_model: str | None = key_of("pretrained-model-name-or-path", _model, kind="family")
    pretrained_generator: str | None = key_of("pretrained-generator-model-name-or-path", _model, kind="family")
    pretrained_discriminator: str | None = key_of("pretrained-discriminator-model-name-or-path", _model, kind="family")

    @property
    def batch_size(self) -> int:
        """Rows of one optimizer step over all nodes."""
        return sum(self.rows_of_nodes.values())

    @property
    def node_batch_sizes(self) -> dict[int, int] | None:
        """Rows of each node, or None on a single node."""
        return None if -1 in self.rows_of_nodes else self.rows_of_nodes

    def layer_sizes(self) -> dict[str, Any]:
        """Sizes of the encoder under transformers' names.

        Raises:
            UserError: the preset has none, as it goes on from a pretrained model.
        """
        sizes = {"num_hidden_layers": self.layers, "hidden_size": self.hidden_size}
        sizes |= {"num_attention_heads": self.heads, "intermediate_size": self.ffn_size}
        if None in sizes.values():
            raise UserError(f"the preset {self.name} has no sizes: it goes on from a pretrained model")
        return sizes


_SIZES_OF_CONFIG = {"num_hidden_layers": "layers", "hidden_size": "hidden_size", "num_attention_heads": "heads"}
_SIZES_OF_CONFIG |= {"intermediate_size": "ffn_size"}
_FIXED = {"hidden_act": "gelu", "initializer_range": 0.02}
_SAID_ELSEWHERE = {
    "vocab_size": "the tokenizer's",
    "max_position_embeddings": "--sequence_length",
    "hidden_dropout_prob": "--hidden_dropout",
    "attention_probs_dropout_prob": "--attention_dropout",
}
_FIELDS = {key.metadata["key"]: key for key in fields(Preset) if key.metadata}


class FamilyKeys(NamedTuple):
    """What presets of a family say beside what every preset says.

    Attributes:
        required: keys that have to be there.
        pretrained: keys of the models to go on from; with one of them all are required, and sizes have no effect.
    """

    required: tuple[str, ...] = ()
    pretrained: tuple[str, ...] = ("pretrained-model-name-or-path",)


def default_parameter_file() -> Path:
    """The project's parameter.json, wherever the script stands.

    Raises:
        UserError: it is not there, as where only the folder of the package was copied.
    """
    file = project_folder() / "parameter.json"
    if not file.is_file():
        raise UserError(f"there are no presets in {file.parent}: say with --parameter_file where parameter.json is")
    return file


def load_preset(parameter_file: str | Path, name: str, families: Mapping[str, FamilyKeys]) -> Preset:
    """Reads and checks one preset.

    Args:
        parameter_file: JSON file in the published format.
        name: preset, for example "bert-base"; its family is what stands before the first dash.
        families: architectures that the caller can train, and what their presets say.

    Raises:
        UserError: the file cannot be read, the preset is not in it, its family is not among `families`, or keys are
            missing, unknown or wrong; all of these keys are named at once.
    """
    presets = _read_json(parameter_file)
    if "num_hidden_layers" in presets:
        raise UserError(f"{parameter_file} is the configuration of one model: --bert_config_file takes its sizes")
    names = [key for key in presets if key != "comment"]
    if name not in names:
        own = name.partition("-")[0]
        near = difflib.get_close_matches(name, [key for key in names if key.partition("-")[0] in (own, name)], n=3)
        answer = f"did you mean {listed(near, 'or')}?" if near else f"it has {listed(names, 'and')}"
        raise UserError(f"{parameter_file} has no preset {name!r}; {answer}")
    place, family, entries = f"{parameter_file}, preset {name}", name.partition("-")[0], presets[name]
    if family not in families:
        trained = listed(families, "and")
        raise UserError(f"{place}: models of the family {family} cannot be trained yet, only {trained}")
    if not isinstance(entries, dict):
        raise UserError(f"{place} must be an object with keys, not {entries!r}")
    given, problems = _by_their_names(entries, families[family])
    values: dict[str, Any] = {}
    for key, value in given.items():
        try:
            values |= {_FIELDS[key].name: _FIELDS[key].metadata["read"](value)} if key in _FIELDS else {}
        except ValueError as error:
            problems.append(f"{key} {error}")
    preset = Preset(name, family, **values)
    if problems := problems or disagreements(preset):
        raise UserError(f"{place}: {'; '.join(problems)}")
    return preset


def sizes_of_config(file: str) -> tuple[dict[str, int], str]:
    """Sizes from the configuration of a BERT, by fields of `Preset`, and a sentence on what of it is said elsewhere.

    Raises:
        UserError: the file cannot be read, a size is missing or none, or it asks for what no BERT here has.
    """
    values, sizes, problems = _read_json(file), {}, []
    for key, name in _SIZES_OF_CONFIG.items():
        try:
            sizes[name] = _whole(1)(values.get(key))
        except ValueError as error:
            problems.append(f"{key} {error}" if key in values else f"{key} is missing")
    problems += [
        f"{k} {values[k]!r} has no counterpart, only {v!r}" for k, v in _FIXED.items() if values.get(k, v) != v
    ]
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")
    elsewhere = [f"{key} {values[key]} ({where})" for key, where in _SAID_ELSEWHERE.items() if key in values]
    said = f"; not {listed(elsewhere, 'and')}" if elsewhere else ""
    return sizes, f"the sizes are those of {file}{said}"


def _by_their_names(entries: Mapping[str, Any], family: FamilyKeys) -> tuple[dict[str, Any], list[str]]:
    """The values by the published keys, whichever way they are spelt, and which are missing, unknown or useless."""
    spelled: dict[str, str] = {}
    problems: list[str] = []
    for key in entries:
        name = key.replace("_", "-").replace("flozen-layers", "frozen-layers")
        if name in spelled:
            problems.append(f"{spelled[name]} and {key} mean the same; give one of them")
        spelled[name] = key
    kinds: dict[str, list[str]] = {}
    for key, value in _FIELDS.items():
        kinds.setdefault(value.metadata["kind"], []).append(key)
    sized, optional, useless = [*kinds["size"], *family.required], kinds["optional"], []
    if any(key in spelled for key in family.pretrained):
        required, optional = [*family.pretrained, *kinds["schedule"]], [*kinds["length"], *optional]
        useless = [key for key in sized if key in spelled and key not in optional]
    else:
        required = [*kinds["size"], *kinds["length"], *kinds["schedule"], *family.required]
    if missing := [key for key in required if key not in spelled]:
        problems.append(f"missing {_keys(missing)}")
    if unknown := [key for key in spelled if key not in (*required, *optional, *useless)]:
        candidates = [key for key in (*required, *optional) if key not in spelled]
        near = {key: nearest(key, map(normal, candidates)).replace("_", "-") for key in unknown}
        answers = [spelled[key] + (f" ({near[key]})" if near[key] else "") for key in unknown]
        problems.append(f"unknown {_keys(answers)}")
    if useless:
        problems.append(f"no effect, as the sizes are those of the pretrained model: {_keys(useless)}")
    return {name: entries[key] for name, key in spelled.items()}, problems


def disagreements(preset: Preset) -> list[str]:
    """What must hold between several values, each of which is right alone."""
    hidden, heads, fraction = preset.hidden_size, preset.heads, preset.generator_fraction
    problems = []
    if hidden is not None and heads is not None and hidden % heads:
        problems.append(f"hidden-size {hidden} is not divisible by attention-heads {heads}")
    if fraction is not None:
        widths = {"hidden-size": hidden, "attention-heads": heads, "ffn-inner-hidden-size": preset.ffn_size}
        for key, width in widths.items():
            if (fraction * (width or 0)).denominator != 1:
                problems.append(f"generator-size {fraction} of {key} {width} is not a whole number")
    if preset.warmup_steps > preset.train_steps:
        problems.append(f"warmup-steps {preset.warmup_steps} exceeds train-steps {preset.train_steps}")
    if preset.fp16_type and preset.bf16:
        problems.append(f"fp16-type {preset.fp16_type} and bf16 true exclude each other")
    if preset.layers is not None and preset.frozen_layers > preset.layers:
        problems.append(f"frozen-layers {preset.frozen_layers} exceeds number-of-layers {preset.layers}")
    return problems


def _read_json(parameter_file: str | Path) -> dict[str, Any]:
    """The file's object; a key that stands twice is an error instead of silently the last one."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        count = Counter(key for key, _ in pairs)
        if twice := [key for key in count if count[key] > 1]:
            neighbours = listed([key for key in count if key not in twice][:3], "and")
            place = f" (beside {neighbours})" if neighbours else ""
            raise UserError(f"{parameter_file}: {_keys(twice)}{place} given twice in one object")
        return dict(pairs)

    try:
        text = Path(parameter_file).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=without_duplicates)
    except OSError as error:
        raise UserError(f"the parameter file {parameter_file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the parameter file {parameter_file} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{parameter_file}, {place}: not valid JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{parameter_file} cannot be read: nested too deeply, or a number of too many digits") from None
    if not isinstance(content, dict):
        raise UserError(f"{parameter_file} must be an object of presets, not {type(content).__name__}")
    if not _is_comment(content.get("comment", "")):
        raise UserError(f"{parameter_file}: comment must be a text or a list of texts")
    return content


def _keys(names: Sequence[str]) -> str:
    return f"key{'s' if len(names) > 1 else ''} {listed(names, 'and')}"
