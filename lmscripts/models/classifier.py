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
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmscripts.data.folding import FoldSettings
from lmscripts.errors import UserError, shortened
from lmscripts.files import file_sha256
from lmscripts.models.building import recompute_activations
from lmscripts.models.checks import check_padding, random_ids
from lmscripts.models.dropout import install, probe
from lmscripts.models.finding import checkpoint_place, find_model, list_checkpoints, read_state, run_of
from lmscripts.models.fitting import longest_input
from lmscripts.models.loading import check_vocabulary, load_model, read_config, tokenizer_of
from lmscripts.models.pretrained import dropouts, set_dropout
from lmscripts.tokenizer.encoder import Encoder

KEY = "lmscripts_classifier"
AGGREGATES = ("mean_probabilities", "mean_logits", "max", "token_weighted")  # see `lmscripts.evaluation.judging`
_FORMAT = 1
_ALSO_NEW = ("pooler.",)  # of a body: a layer that serves the head alone and that language models are saved without
_LONGEST = 512


@dataclass(frozen=True)
class Source:
    """A model to begin with, found and looked at; nothing of it is loaded yet.

    Attributes:
        load_from: what `from_pretrained` is given: a folder, or a name on the Hub.
        longest: tokens of its longest input; None where nothing says.
    """

    name: str
    load_from: str
    config: Any
    encoder: Encoder
    longest: int | None
    notices: list[str]

    def weights(self) -> str:
        """What tells these weights from others, wherever they lie: a hash; the name of those on the Hub."""
        files = (file for file in sorted(Path(self.load_from).glob("*")) if file.suffix in (".safetensors", ".bin"))
        return " ".join(file_sha256(file)[:12] for file in files) or self.load_from


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
        UserError: there is none, it has no tokenizer or another model's, or it is kept for a classifier's training.
    """
    check_no_training(name)
    place, notices = find_model(name)
    load_from = str(place) if Path(name).expanduser().is_dir() else name
    config = read_config(place)
    encoder = tokenizer_of(load_from, place, tokenizer_dir)
    if (size := getattr(config, "vocab_size", None)) is not None:
        check_vocabulary(encoder, size, place)
    said = int(encoder.tokenizer.model_max_length)
    lengths = [length for length in (longest_input(config), said if 0 < said < 10**9 else None) if length is not None]
    return Source(name, load_from, config, encoder, min(lengths, default=None), notices)


def check_no_training(name: str) -> None:
    """Refuse the folder of a classifier's training and what lies in it, which look like a classifier and are none.

    The newest checkpoint is not the best one, nothing is calibrated, and LoRA's additions stand in layers of their own.
    """
    place = Path(name).expanduser().absolute()
    run = run_of(place) if checkpoint_place(place) is not None or place.name.startswith("best-") else place
    if any(map(_trains_classifier, [place, *list_checkpoints(run)])):
        trained = run.with_name(f"{run.name.removesuffix('_training')}_trained_model")
        raise UserError(
            f"{name} belongs to the training of a classifier, whose checkpoints are neither the best weights nor "
            f"calibrated: {'take' if trained.is_dir() else 'end the training with --do_continue, which writes'} "
            f"{trained}"
        )


def _trains_classifier(checkpoint: Path) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # what is damaged is looked at elsewhere
        return bool(read_state(checkpoint, "fixed")["fixed"].keys() >= {"folds", "labels", "aggregate"})
    return False


def fold_settings(source: Source, max_length: int | None, **others: Any) -> FoldSettings:
    """Settings of folding, with the length that the model reads where none is given (at most 512); never longer."""
    if max_length is not None and source.longest is not None and max_length > source.longest:
        raise UserError(f"--max_length {max_length} is more than {source.name} reads, which is {source.longest} tokens")
    return FoldSettings(max_length=max_length or min(source.longest or _LONGEST, _LONGEST), **others)


def padding_id(encoder: Encoder) -> int:
    """The token that rows are filled up with; that of the end of a text, or a UserError, where there is none for it."""
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
    lora_rank: int | None = None,
    recompute: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """The model with a head for the labels, in training mode and float32, and sentences for the user.

    What is new comes from the seed. The dropout is that of hidden states, attention weights and the head; None keeps
    the model's. From scratch the architecture alone is taken. With a rank of LoRA its additions alone are trained.
    Activations may be computed again for the gradient, see `lmscripts.models.building.recompute_activations`.

    Raises:
        UserError: no weights, weights that do not fill the model's body, a configuration of which no classifier can be
            made, or a model that padding confuses.
    """
    config, auto = source.config, AutoModelForSequenceClassification
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
    try:
        fresh = auto.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # of a type without classifiers, or of a configuration that lacks something
        raise UserError(
            f"transformers makes no classifier of the type {config.model_type} as config.json of {source.name} has it "
            f"({shortened(error)})"
        ) from error
    if from_scratch:
        model, said = fresh, [f"the model has the architecture of {source.name}, and fresh weights"]
    else:
        model, new = _load(source, config)
        if is_classifier and had != (list(labels), len(labels)):
            new |= {name for name, _ in fresh.named_parameters() if not in_body(model, name)}
        with torch.no_grad():
            for name in new:
                model.get_parameter(name).copy_(fresh.get_parameter(name))
        said = [f"the head of {source.name} was made for the same labels, and is taken over"]
        said = [f"the head for {len(labels)} labels is new: {', '.join(sorted(new))}"] if new else said
    check_padding(model, source.encoder, config.pad_token_id, source.longest)
    said += [*_drop_by_rows(model), *(add_lora(model, lora_rank) if lora_rank else [])]
    if recompute:
        recompute_activations({"": model})
    return model.train(), said


def _drop_by_rows(model: Any) -> list[str]:
    """Let the dropout of a classifier be drawn by rows, see `lmscripts.models.dropout`; what it is, in a sentence."""
    hidden, of_weights = dropouts(model.config)
    install([model], of_weights > 0)
    said = f"dropout of hidden states {hidden:g}, of attention weights {of_weights:g}"
    ids = random_ids(model, 46).view(2, 23)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    drops, by_rows = probe(model.train(), 2, lambda: model(**given).logits)
    if by_rows or not drops:
        return [said]
    by_torch = f"torch itself draws that of a {model.config.model_type}, otherwise for every number of processes"
    return [f"{said}; {by_torch}; not so --dropout 0"]


def _load(source: Source, config: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model with the saved weights, and the names of what they lack."""
    auto, may_be_new = AutoModelForSequenceClassification, lambda model, name: not in_body(model, name)
    model, info = load_model(source.load_from, auto, config, may_be_new=may_be_new)
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def operations_per_token(model: PreTrainedModel) -> float:
    """Floating-point operations of a training step: 6 for each weight of a matrix that a token meets, and no scores."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return 6.0 * sum(p.numel() for p in model.parameters() if p.ndim > 1 and p not in tables)


def in_body(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter belongs to the part that a language model brings along, and not to the head."""
    inside = name.removeprefix(f"{model.base_model_prefix}.")
    return inside != name and not inside.startswith(_ALSO_NEW)


# ---- LoRA: small additions to a frozen model, in its own layers, are trained and added to it at the end --------------


def add_lora(model: PreTrainedModel, rank: int) -> list[str]:
    """Freeze the body and train low-rank additions to its layers (arXiv:2106.09685), and the head as a whole.

    The layers are those that peft knows for the type of the model; of a type that it does not know, all linear ones.
    Without the package, or layers that it can add to, there is a UserError.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
    except ImportError:
        raise UserError("--lora_rank needs the package peft: pip install peft") from None
    head = {name for name, _ in model.named_parameters() if not in_body(model, name)}
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    known = model.config.model_type in KNOWN
    layers = None if known else [name for name in linear if in_body(model, f"{name}.weight")]
    try:
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers)
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise UserError(f"peft cannot add to a {model.config.model_type}: {' '.join(str(error).split())}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.replace(".base_layer", "") in head)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = f" in all {len(layers)} linear layers of the body" if layers else ""
    return [f"LoRA of rank {rank}{where}: {trained:,} of {model.num_parameters():,} weights are trained"]


def merge_lora(model: PreTrainedModel) -> None:
    """Add the low-rank additions, if there are any, to the layers, so that the model is as transformers knows it."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.get_base_layer())


# ---- a classifier's own folder -----------------------------------------------------------------------------------


def read_settings(config: Any, longest: int | None) -> tuple[ClassifierSettings, list[str]]:
    """How a saved classifier wants to be used, and a sentence where its configuration does not say.

    Raises:
        UserError: what the configuration says cannot be used.
    """
    stored, notices = getattr(config, KEY, None), []
    if stored is None:
        stored = ClassifierSettings(FoldSettings(max_length=min(longest or _LONGEST, _LONGEST))).as_json()
        stored["multi_label"] = config.problem_type == "multi_label_classification"
        said = f"config.json has no {KEY}: rows of {stored['folds']['max_length']} tokens, {stored['aggregate']}, "
        notices = [f"{said}temperature 1{' and thresholds of 0.5' if stored['multi_label'] else ''} are taken"]
    try:
        values = {name: stored[name] for name in ("aggregate", "temperature", "thresholds", "multi_label")}
        values["separator"] = stored.get("separator", "|")
        settings = ClassifierSettings(FoldSettings(**stored["folds"]), **values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json: {KEY} cannot be used ({type(error).__name__}: {error})") from error
    if problem := _problem(settings, config.num_labels, longest):
        raise UserError(f"config.json: {KEY} says {problem}, which cannot be used")
    if settings.multi_label and settings.thresholds is None:
        settings = replace(settings, thresholds=(0.5,) * config.num_labels)
    return settings, notices


def _problem(settings: ClassifierSettings, num_labels: int, longest: int | None) -> str:
    """The first setting that cannot be used, in words; empty where all can. Any type may have come from JSON."""
    folds, thresholds = settings.folds, settings.thresholds
    kinds = {field.name: (type(field.default),) for field in fields(FoldSettings)} | {"most_folds": (int, type(None))}
    fits = {name: type(getattr(folds, name)) in allowed for name, allowed in kinds.items()}
    fits["aggregate"] = settings.aggregate in AGGREGATES
    fits["temperature"] = _is_number(settings.temperature) and settings.temperature > 0
    fits["multi_label"] = isinstance(settings.multi_label, bool)
    fits["separator"] = isinstance(settings.separator, str) and bool(settings.separator)
    if wrong := [name for name, fit in fits.items() if not fit]:
        return f"{wrong[0]} {(vars(folds) | vars(settings))[wrong[0]]!r:.60}"
    if longest is not None and folds.max_length > longest:
        return f"rows of {folds.max_length} tokens, while the model reads {longest}"
    if thresholds is None:
        return ""
    if not (settings.multi_label and isinstance(thresholds, (list, tuple)) and len(thresholds) == num_labels):
        return f"thresholds {thresholds!r:.60} with multi_label {settings.multi_label} and {num_labels} labels"
    beyond = [each for each in thresholds if not (_is_number(each) and 0 <= each <= 1)]
    return f"a threshold of {beyond[0]!r:.60}" if beyond else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def label_names(config: Any) -> list[str]:
    """Names of the labels in the order of their logits."""
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def open_classifier(name: str) -> tuple[PreTrainedModel, Source, ClassifierSettings, list[str]]:
    """A saved classifier in evaluation mode, its origin, its settings, and sentences for the user.

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
