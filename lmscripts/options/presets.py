"""Model presets from `parameter.json`: sizes, schedule, batch, checked all at once before any data is read.

The file keeps the published format (keys with dashes, `batch-size` per node, `generator-size` as a fraction,
`flozen-layers` beside `frozen-layers`). Added are `comment`, and that a key may be spelt with underscores.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError

# By the start of the preset's name, longest first where one begins another.
FAMILIES = {
    "electra-": "electra",
    "roberta-": "roberta",
    "debertav3-": "debertav3",
    "debertav2-": "debertav2",
    "deberta-": "deberta",
    "modernbert-": "modernbert",
    "bert-": "bert",
    "gpt2-": "gpt2",
}
BUILT_FAMILIES = ("bert", "roberta", "electra", "gpt2")

_SIZE_KEYS = ("number-of-layers", "hidden-size", "ffn-inner-hidden-size", "attention-heads")
_ELECTRA_SIZE_KEYS = ("embedding-size", "generator-size")
_SCHEDULE_KEYS = ("warmup-steps", "learning-rate", "batch-size", "train-steps")
_OPTIONAL_KEYS = (
    "comment",
    "save-steps",
    "logging-steps",
    "accumulation-steps",
    "mask-percent",
    "frozen-layers",
    "fp16-type",
    "bf16",
)
_PRETRAINED_KEY = "pretrained-model-name-or-path"
_PRETRAINED_ELECTRA_KEYS = (
    "pretrained-generator-model-name-or-path",
    "pretrained-discriminator-model-name-or-path",
)
_ATTENTION_TYPES = ("p2c", "c2p")


@dataclass(frozen=True)
class Preset:
    """One model of the parameter file.

    The sizes are None where they come from a pretrained model. Rows are sequences of `sequence_length` tokens.
    """

    name: str
    family: str
    layers: int | None
    hidden_size: int | None
    heads: int | None
    ffn_size: int | None
    sequence_length: int | None
    embedding_size: int | None  # width of the token embeddings where it differs from hidden_size (ELECTRA)
    generator_fraction: Fraction | None  # width of the generator over that of the discriminator
    position_attention_types: tuple[str, ...]  # DeBERTa
    mask_probability: float
    learning_rate: float
    warmup_steps: int
    batch_size: int  # rows of one optimizer step over all nodes
    node_batch_sizes: dict[int, int] | None  # share of each node, or None on a single node
    accumulation_steps: int
    train_steps: int
    save_steps: int
    logging_steps: int
    fp16_type: int  # 0 for full precision; 1, 2 and 3 all mean float16 with loss scaling
    bf16: bool
    frozen_layers: int  # -1 trains everything; n freezes the embeddings and the first n layers
    pretrained_model: str | None
    pretrained_generator: str | None
    pretrained_discriminator: str | None

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


def family_of(name: str) -> str:
    """The architecture that a preset's name begins with.

    Raises:
        UserError: the name begins with none of `FAMILIES`.
    """
    for prefix, family in FAMILIES.items():
        if name.startswith(prefix):
            return family
    starts = ", ".join(FAMILIES)
    raise UserError(f"the preset name {name!r} does not say its family; it has to begin with one of {starts}")


def load_preset(parameter_file: str | Path, name: str, families: Sequence[str] = BUILT_FAMILIES) -> Preset:
    """Reads and checks one preset.

    Args:
        parameter_file: JSON file in the published format.
        name: preset, for example "bert-base".
        families: architectures that the caller can train.

    Raises:
        UserError: the file cannot be read, the preset is not in it, its family is not among `families`, or keys are
            missing, unknown or wrong; all of these keys are named at once.
    """
    presets = _read_json(parameter_file)
    names = [key for key in presets if key != "comment"]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        answer = f"did you mean {_listed(near, 'or')}?" if near else f"it has {_listed(names, 'and')}"
        raise UserError(f"{parameter_file} has no preset {name!r}; {answer}")
    family = family_of(name)
    if family not in families:
        raise UserError(
            f"{parameter_file}, preset {name}: models of the family {family} cannot be trained yet, "
            f"only {_listed(families, 'and')}"
        )
    if not isinstance(presets[name], dict):
        raise UserError(f"{parameter_file}, preset {name} must be an object with keys, not {presets[name]!r}")
    reader = _Reader(presets[name], family)
    preset = reader.preset(name)
    if reader.problems:
        raise UserError(f"{parameter_file}, preset {name}: {'; '.join(reader.problems)}")
    return preset


class _Reader:
    """Takes values out of one preset and collects everything that is wrong with it."""

    def __init__(self, entries: dict[str, Any], family: str) -> None:
        self.family = family
        self.problems: list[str] = []
        self.values: dict[str, Any] = {}
        self._collect(entries)

    def _collect(self, entries: dict[str, Any]) -> None:
        """One value per key, whichever way it is spelt; reports keys that are missing, unknown or without effect."""
        spelled: dict[str, str] = {}
        for key, value in entries.items():
            name = key.replace("_", "-").replace("flozen-layers", "frozen-layers")
            if name in spelled:
                self.problems.append(f"{spelled[name]} and {key} mean the same; give one of them")
            spelled[name] = key
            self.values[name] = value
        electra, deberta = self.family == "electra", self.family.startswith("deberta")
        pretrained = (*(_PRETRAINED_ELECTRA_KEYS if electra else (_PRETRAINED_KEY,)),)
        sizes = (*_SIZE_KEYS, *(_ELECTRA_SIZE_KEYS if electra else ()))
        position = ("pos-att-type",) if deberta else ()
        self.continues = any(key in self.values for key in pretrained)
        if self.continues:
            required, optional = (*pretrained, *_SCHEDULE_KEYS), ("sequence-length", *_OPTIONAL_KEYS)
            without_effect = [key for key in (*sizes, *position) if key in self.values]
        else:
            required = (*sizes, "sequence-length", *_SCHEDULE_KEYS, *(("mask-percent",) if electra else ()))
            optional, without_effect = (*_OPTIONAL_KEYS, *position), []
        known = (*required, *optional, *without_effect)
        if missing := [key for key in required if key not in self.values]:
            self.problems.append(f"missing {_keys(missing)}")
        if unknown := [key for key in self.values if key not in known]:
            candidates = [key for key in (*required, *optional) if key not in self.values]
            answers = [spelled[key] + _near_key(key, candidates) for key in unknown]
            self.problems.append(f"unknown {_keys(answers)}")
        if without_effect:
            self.problems.append(f"no effect, as the sizes are those of the pretrained model: {_keys(without_effect)}")

    def preset(self, name: str) -> Preset:
        """The preset; only to be used when `problems` is empty afterwards."""
        batch_size, node_batch_sizes = self._batch_sizes()
        preset = Preset(
            name=name,
            family=self.family,
            layers=self._whole("number-of-layers", None, 1),
            hidden_size=self._whole("hidden-size", None, 1),
            heads=self._whole("attention-heads", None, 1),
            ffn_size=self._whole("ffn-inner-hidden-size", None, 1),
            sequence_length=self._whole("sequence-length", None, 8),
            embedding_size=self._whole("embedding-size", None, 1),
            generator_fraction=self._fraction(),
            position_attention_types=self._attention_types(),
            mask_probability=self._number("mask-percent", 15, 100) / 100,
            learning_rate=self._number("learning-rate", 1, math.inf),
            warmup_steps=self._whole("warmup-steps", 0, 0),
            batch_size=batch_size,
            node_batch_sizes=node_batch_sizes,
            accumulation_steps=self._whole("accumulation-steps", 1, 1),
            train_steps=self._whole("train-steps", 1, 1),
            save_steps=self._whole("save-steps", 50000, 1),
            logging_steps=self._whole("logging-steps", 5000, 1),
            fp16_type=self._whole("fp16-type", 0, 0, 3),
            bf16=self._boolean("bf16"),
            frozen_layers=self._whole("frozen-layers", -1, -1),
            pretrained_model=self._text(_PRETRAINED_KEY),
            pretrained_generator=self._text(_PRETRAINED_ELECTRA_KEYS[0]),
            pretrained_discriminator=self._text(_PRETRAINED_ELECTRA_KEYS[1]),
        )
        self._check_comment()
        self._check_together(preset)
        return preset

    def _check_together(self, preset: Preset) -> None:
        """What must hold between several values, looked at only where each of them is right alone."""
        if self.problems:
            return
        hidden, heads, fraction = preset.hidden_size, preset.heads, preset.generator_fraction
        if hidden is not None and heads is not None and hidden % heads:
            self.problems.append(f"hidden-size {hidden} is not divisible by attention-heads {heads}")
        if fraction is not None:
            widths = {"hidden-size": hidden, "attention-heads": heads, "ffn-inner-hidden-size": preset.ffn_size}
            for key, width in widths.items():
                if (fraction * (width or 0)).denominator != 1:
                    self.problems.append(f"generator-size {fraction} of {key} {width} is not a whole number")
        if preset.warmup_steps > preset.train_steps:
            self.problems.append(f"warmup-steps {preset.warmup_steps} exceeds train-steps {preset.train_steps}")
        if preset.fp16_type and preset.bf16:
            self.problems.append(f"fp16-type {preset.fp16_type} and bf16 true exclude each other")
        if preset.layers is not None and preset.frozen_layers > preset.layers:
            self.problems.append(f"frozen-layers {preset.frozen_layers} exceeds number-of-layers {preset.layers}")

    def _whole(self, key: str, default: Any, least: int, most: int | None = None) -> Any:
        value = self.values.get(key, default)
        if key in self.values and not _is_whole(value, least, most):
            bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
            self.problems.append(f"{key} must be a whole number {bounds}, not {json.dumps(value)}")
        return value

    def _number(self, key: str, default: float, limit: float) -> float:
        """A number above 0 and below the limit; a wrong one is reported and replaced."""
        value = self.values.get(key, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < limit:
            return float(value)
        below = f" and below {limit}" if math.isfinite(limit) else ""
        self.problems.append(f"{key} must be a number above 0{below}, not {json.dumps(value)}")
        return default

    def _boolean(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self.problems.append(f"{key} must be true or false, not {json.dumps(value)}")
        return bool(value)

    def _text(self, key: str) -> str | None:
        value = self.values.get(key)
        if key in self.values and not (isinstance(value, str) and value.strip()):
            self.problems.append(f"{key} must be the name or the folder of a model, not {json.dumps(value)}")
        return value if isinstance(value, str) else None

    def _check_comment(self) -> None:
        if not _is_comment(self.values.get("comment", "")):
            self.problems.append("comment must be a text or a list of texts")

    def _fraction(self) -> Fraction | None:
        """`"1/4"`, or a number such as 0.25: above 0 and at most 1."""
        if "generator-size" not in self.values:
            return None
        value = self.values["generator-size"]
        try:
            fraction = Fraction(str(value)) if not isinstance(value, bool) else Fraction(0)
        except (ValueError, ZeroDivisionError):
            fraction = Fraction(0)
        if not 0 < fraction <= 1:
            self.problems.append(f'generator-size must be a fraction such as "1/4", at most 1, not {json.dumps(value)}')
        return fraction

    def _attention_types(self) -> tuple[str, ...]:
        """`["p2c", "c2p"]` or `"p2c|c2p"`."""
        value = self.values.get("pos-att-type", list(_ATTENTION_TYPES))
        kinds = value.split("|") if isinstance(value, str) else value
        if not isinstance(kinds, list) or not all(kind in _ATTENTION_TYPES for kind in kinds):
            self.problems.append(f"pos-att-type must be a list of {_listed(_ATTENTION_TYPES, 'and')}, not {value!r}")
            return ()
        return tuple(kinds) if self.family.startswith("deberta") else ()

    def _batch_sizes(self) -> tuple[int, dict[int, int] | None]:
        """Rows of a step in all, and per node where the keys are node numbers from 0 on."""
        value = self.values.get("batch-size", {"-1": 1})
        if not isinstance(value, dict) or not value:
            form = 'must be {"-1": rows} or {"0": rows of node 0, "1": rows of node 1, ...}'
            self.problems.append(f"batch-size {form}, not {json.dumps(value)}")
            return 1, None
        wrong = {key: rows for key, rows in value.items() if not _is_whole(rows, 1, None)}
        if wrong:
            self.problems.append(f"batch-size must be whole numbers of at least 1, not {json.dumps(wrong)}")
        elif list(value) == ["-1"]:
            return int(value["-1"]), None
        elif "-1" in value:
            self.problems.append(f'batch-size has "-1" (a single node) beside node numbers: {json.dumps(value)}')
        elif sorted(value) != sorted(str(node) for node in range(len(value))):
            expected = _listed([f'"{node}"' for node in range(len(value))], "and")
            self.problems.append(f"batch-size must number its nodes {expected}, not {_listed(value, 'and')}")
        else:
            return sum(value.values()), {node: int(value[str(node)]) for node in range(len(value))}
        return 1, None


def _read_json(parameter_file: str | Path) -> dict[str, Any]:
    """The file's object; a key that stands twice is an error instead of silently the last one."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
            neighbours = _listed([key for key in dict.fromkeys(keys) if key not in twice][:3], "and")
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
    if not isinstance(content, dict):
        raise UserError(f"{parameter_file} must be an object of presets, not {type(content).__name__}")
    if not _is_comment(content.get("comment", "")):
        raise UserError(f"{parameter_file}: comment must be a text or a list of texts")
    return content


def _is_whole(value: Any, least: int, most: int | None) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value >= least and (most is None or value <= most)


def _is_comment(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(line, str) for line in value))


def _near_key(key: str, candidates: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, candidates, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _keys(names: Sequence[str]) -> str:
    return f"key{'s' if len(names) > 1 else ''} {_listed(names, 'and')}"


def _listed(items: Iterable[str], conjunction: str) -> str:
    words = list(items)
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
