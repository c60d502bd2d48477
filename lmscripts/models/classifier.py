"""The model of a classifier: from any pretrained model, with a head for the labels, and back from its own folder.

What is needed to use it besides the weights stands in config.json under one key, `lmscripts_classifier`: how texts are
folded, how the answers of the rows are combined, the temperature, and for several labels their thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lmscripts.data.folding import FoldSettings
from lmscripts.errors import UserError, shortened
from lmscripts.models.checks import check_padding
from lmscripts.models.finding import checkpoint_step, find_model, list_checkpoints, read_state
from lmscripts.models.fitting import longest_input
from lmscripts.models.loading import check_vocabulary, load_model, read_config, tokenizer_of
from lmscripts.models.pretrained import set_dropout
from lmscripts.tokenizer.encoder import Encoder

KEY = "lmscripts_classifier"
AGGREGATES = ("mean_probabilities", "mean_logits", "max", "token_weighted")  # see `lmscripts.evaluation.aggregate`
_FORMAT = 1
_ALSO_NEW = ("pooler.",)  # of a body: a layer that serves the head alone and that language models are saved without
_LONGEST = 512


@dataclass(frozen=True)
class Source:
    """A model to begin with, found and looked at; nothing of it is loaded yet.

    Attributes:
        name: as it was given.
        load_from: what `from_pretrained` is given: a folder, or a name on the Hub.
        config: its configuration.
        encoder: its tokenizer.
        longest: tokens of its longest input; None where nothing says.
        notices: sentences for the user.
    """

    name: str
    load_from: str
    config: Any
    encoder: Encoder
    longest: int | None
    notices: list[str]


@dataclass(frozen=True)
class ClassifierSettings:
    """What a classifier's folder says besides its weights.

    Attributes:
        folds: how texts become rows.
        aggregate: how the answers of the rows of a text are combined.
        temperature: divides the logits of a document before they become probabilities.
        thresholds: of each label, where a text may have several; None otherwise.
        multi_label: whether it may.
        separator: stands between the names of several labels in tables.
    """

    folds: FoldSettings
    aggregate: str = "mean_probabilities"
    temperature: float = 1.0
    thresholds: tuple[float, ...] | None = None
    multi_label: bool = False
    separator: str = "|"

    def as_json(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"format": _FORMAT, **asdict(self)}


# ---- finding -----------------------------------------------------------------------------------------------------


def find_source(name: str, tokenizer_dir: str | None = None) -> Source:
    """Find a model's folder (of a run its final/) or name on the Hub, with configuration and tokenizer.

    Raises:
        UserError: there is none, it has no tokenizer, the tokenizer is that of another model, or it is what a
            classifier's training keeps for itself.
    """
    check_no_training(name)
    place, notices = find_model(name)
    load_from = str(place) if Path(name).expanduser().is_dir() else name
    config = read_config(place)
    encoder = tokenizer_of(load_from, place, tokenizer_dir)
    if (size := getattr(config, "vocab_size", None)) is not None:
        check_vocabulary(encoder, size, place)
    return Source(name, load_from, config, encoder, _longest(config, encoder), notices)


def check_no_training(name: str) -> None:
    """Refuse the folder of a classifier's training and what lies in it, which look like a classifier and are none.

    The newest checkpoint is not the best one, nothing is calibrated, and LoRA's additions stand in layers of their own.

    Raises:
        UserError: it is one; with the folder of the trained model that belongs to it.
    """
    place = Path(name).expanduser().absolute()
    is_part = checkpoint_step(place) is not None or place.name.startswith("best-")
    run = place.parent if is_part else place
    if any(map(_trains_classifier, [place, *list_checkpoints(run)])):
        trained = run.with_name(f"{run.name.removesuffix('_training')}_trained_model")
        raise UserError(
            f"{name} belongs to the training of a classifier, whose checkpoints are neither the best weights nor "
            f"calibrated: {'take' if trained.is_dir() else 'end the training with --do_continue, which writes'} "
            f"{trained}"
        )


def _trains_classifier(checkpoint: Path) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # what is damaged is looked at elsewhere
        return bool(read_state(checkpoint)["fixed"].keys() >= {"folds", "labels", "aggregate"})
    return False


def _longest(config: Any, encoder: Encoder) -> int | None:
    """Tokens of the longest input by the position embeddings and by what the tokenizer says."""
    said = int(encoder.tokenizer.model_max_length)
    found = (longest_input(config), said if 0 < said < 10**9 else None)
    return min((length for length in found if length is not None), default=None)


def fold_settings(source: Source, max_length: int | None, **others: Any) -> FoldSettings:
    """Settings of folding, with the length that the model reads where none is given, at most 512.

    Raises:
        UserError: rows would be longer than the model's longest input.
    """
    longest = source.longest
    if max_length is not None and longest is not None and max_length > longest:
        raise UserError(f"--max_length {max_length} is more than {source.name} reads, which is {longest} tokens")
    return FoldSettings(max_length=max_length or min(longest or _LONGEST, _LONGEST), **others)


def padding_id(encoder: Encoder) -> int:
    """The token that rows are filled up with; the end-of-text token where a tokenizer has none for it.

    Raises:
        UserError: it has neither.
    """
    found = encoder.pad_id if encoder.pad_id is not None else encoder.eos_id
    if found is None:
        raise UserError(f"the tokenizer {encoder.folder} has neither a padding nor an end-of-text token to fill rows")
    return found


# ---- building ----------------------------------------------------------------------------------------------------


def build_classifier(
    source: Source,
    labels: Sequence[str],
    settings: ClassifierSettings,
    *,
    seed: int,
    dropout: float | None = None,
    from_scratch: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """The model with a head for the labels.

    Args:
        source: the model to begin with.
        labels: names of the K labels.
        settings: written into its configuration.
        seed: of what is new.
        dropout: of hidden states, attention weights and the head; None keeps the model's.
        from_scratch: take its architecture alone, with fresh weights.

    Returns:
        The model in training mode, in float32, and sentences for the user.

    Raises:
        UserError: no weights, weights that do not fill the model's body, a configuration of which no classifier can be
            made, or a model that padding confuses.
    """
    config, notices = source.config, []
    had = [config.id2label.get(number) for number in range(len(labels))], config.num_labels
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    config.id2label, config.label2id = dict(enumerate(labels)), {name: n for n, name in enumerate(labels)}
    config.problem_type = "multi_label_classification" if settings.multi_label else "single_label_classification"
    config.pad_token_id = padding_id(source.encoder)
    setattr(config, KEY, settings.as_json())
    if dropout is not None:
        set_dropout(config, dropout, dropout)
        for name in ("classifier_dropout", "classifier_dropout_prob", "summary_last_dropout", "pooler_dropout"):
            if hasattr(config, name):
                setattr(config, name, dropout)
    torch.manual_seed(seed)
    fresh = _fresh(source, config)
    if from_scratch:
        check_padding(fresh, source.encoder, config.pad_token_id, source.longest)
        return fresh.train(), [f"the model has the architecture of {source.name}, and fresh weights"]
    model, missing = _load(source, config)
    same = had == (list(labels), len(labels))
    new = set(missing)
    if is_classifier and not same:
        new |= {name for name, _ in fresh.named_parameters() if not in_body(model, name)}
    with torch.no_grad():
        for name in new:
            model.get_parameter(name).copy_(fresh.get_parameter(name))
    if new:
        notices.append(f"the head for {len(labels)} labels is new: {', '.join(sorted(new))}")
    else:
        notices.append(f"the head of {source.name} was made for the same labels, and is taken over")
    check_padding(model, source.encoder, config.pad_token_id, source.longest)
    return model.train(), notices


def _fresh(source: Source, config: Any) -> PreTrainedModel:
    """The model with fresh weights."""
    auto: Any = AutoModelForSequenceClassification
    try:
        model: PreTrainedModel = auto.from_config(config)
    except ValueError as error:
        raise UserError(f"transformers has no classifier of the type {config.model_type} ({source.name})") from error
    except Exception as error:  # whatever a configuration that lacks something makes the model raise
        raise UserError(
            f"no classifier can be made as config.json of {source.name} says ({shortened(error)})"
        ) from error
    return model


def _load(source: Source, config: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model with the saved weights, and the names of what they lack."""
    auto, may_be_new = AutoModelForSequenceClassification, lambda model, name: not in_body(model, name)
    model, info = load_model(source.load_from, auto, config, may_be_new=may_be_new)
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def in_body(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter belongs to the part that a language model brings along, and not to the head."""
    return name.startswith(f"{model.base_model_prefix}.") and not _serves_head(model, name)


def _serves_head(model: PreTrainedModel, name: str) -> bool:
    return name.removeprefix(f"{model.base_model_prefix}.").startswith(_ALSO_NEW)


# ---- a classifier's own folder -----------------------------------------------------------------------------------


def read_settings(config: Any, longest: int | None) -> tuple[ClassifierSettings, list[str]]:
    """How a saved classifier wants to be used, and a sentence where its configuration does not say.

    Raises:
        UserError: what the configuration says cannot be used.
    """
    stored = getattr(config, KEY, None)
    multi_label = config.problem_type == "multi_label_classification"
    if stored is None:
        thresholds = (0.5,) * config.num_labels if multi_label else None
        settings = ClassifierSettings(
            FoldSettings(max_length=min(longest or _LONGEST, _LONGEST)), thresholds=thresholds, multi_label=multi_label
        )
        said = f"config.json has no {KEY}: rows of {settings.folds.max_length} tokens, {settings.aggregate}, "
        return settings, [f"{said}temperature 1{' and thresholds of 0.5' if multi_label else ''} are taken"]
    try:
        values = {name: stored[name] for name in ("aggregate", "temperature", "thresholds", "multi_label")}
        separator = stored.get("separator", "|")
        settings = ClassifierSettings(FoldSettings(**stored["folds"]), separator=separator, **values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json: {KEY} cannot be used ({type(error).__name__}: {error})") from error
    if problem := _problem(settings, config.num_labels, longest):
        raise UserError(f"config.json: {KEY} says {problem}, which cannot be used")
    if settings.multi_label and settings.thresholds is None:
        settings = replace(settings, thresholds=(0.5,) * config.num_labels)
    return settings, []


def _problem(settings: ClassifierSettings, num_labels: int, longest: int | None) -> str:
    """The first setting that cannot be used, in words; empty where all can. Any type may have come from JSON."""
    folds, thresholds = settings.folds, settings.thresholds
    for field in fields(FoldSettings):
        value = getattr(folds, field.name)
        allowed = (int, type(None)) if field.name == "most_folds" else (type(field.default),)
        if type(value) not in allowed:
            return f"{field.name} {value!r:.60}"
    if longest is not None and folds.max_length > longest:
        return f"rows of {folds.max_length} tokens, while the model reads {longest}"
    if settings.aggregate not in AGGREGATES:
        return f"aggregate {settings.aggregate!r:.60}"
    if not (_is_number(settings.temperature) and settings.temperature > 0):
        return f"temperature {settings.temperature!r:.60}"
    if not isinstance(settings.multi_label, bool):
        return f"multi_label {settings.multi_label!r:.60}"
    if not (isinstance(settings.separator, str) and settings.separator):
        return f"separator {settings.separator!r:.60}"
    if thresholds is None:
        return ""
    if not (settings.multi_label and isinstance(thresholds, (list, tuple)) and len(thresholds) == num_labels):
        return f"thresholds {thresholds!r:.60} with multi_label {settings.multi_label} and {num_labels} labels"
    wrong = [each for each in thresholds if not (_is_number(each) and 0 <= each <= 1)]
    return f"a threshold of {wrong[0]!r:.60}" if wrong else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def label_names(config: Any) -> list[str]:
    """Names of the labels in the order of their logits."""
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def open_classifier(name: str) -> tuple[PreTrainedModel, Source, ClassifierSettings, list[str]]:
    """A saved classifier in evaluation mode, with its tokenizer and its settings.

    Returns:
        The model, where it comes from, its settings, and sentences for the user.

    Raises:
        UserError: it is no classifier, or its head is missing.
    """
    source = find_source(name)
    if not any("SequenceClassification" in each for each in source.config.architectures or []):
        saved_as = ", ".join(source.config.architectures or ["a model without a head"])
        raise UserError(f"{name} is no classifier but {saved_as}: train one from it with finetune_classifier.py")
    settings, notices = read_settings(source.config, source.longest)
    model, missing = _load(source, source.config)
    if missing:
        raise UserError(f"{name} lacks {sorted(missing)[0]}, or has it in another shape: its answers would be random")
    check_padding(model, source.encoder, padding_id(source.encoder), source.longest)
    return model.train(False), source, settings, [*source.notices, *notices]
