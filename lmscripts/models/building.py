"""Model families, one file each, all with the same names: config, architecture, num_positions, encode, layers, predict.

A model is a dictionary of transformers models by the subfolder they are saved in: most families have one, "", while
ELECTRA has the discriminator, "", and the generator, "generator".
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmscripts.data.packing import Layout
from lmscripts.errors import UserError
from lmscripts.models import bert, decoders, electra, fitting, gpt2, pretrained, roberta
from lmscripts.models.attention import VARLEN, AttentionPath
from lmscripts.options.presets import Preset
from lmscripts.training.checkpoint import CHECKSUMS, find_damage

FAMILIES: dict[str, ModuleType] = {"bert": bert, "roberta": roberta, "electra": electra, "gpt2": gpt2}
DECODERS = ("gpt2",)  # families whose positions see only what stands before them
Models = dict[str, PreTrainedModel]


def build(
    preset: Preset,
    tokenizer: Any,
    layout: Layout,
    *,
    like: Path | None = None,
    seed: int,
    attn_implementation: str,
    hidden_dropout: float,
    attention_dropout: float,
) -> tuple[Models, list[str]]:
    """The models of a preset: freshly initialised, or loaded from where the preset says and made to fit.

    Args:
        preset: sizes of the layers or names of pretrained models; layers to freeze.
        tokenizer: of the text, from transformers.
        layout: of the longest rows; decides the number of positions and the special ids.
        like: checkpoint of a run that is continued: models with pretrained weights are only shaped like its own.
        seed: decides the initial weights, on every process alike.
        attn_implementation: from `lmscripts.models.attention.use_attention`.
        hidden_dropout: of the hidden states.
        attention_dropout: of the attention weights.

    Returns:
        The models by subfolder, and sentences for the user.

    Raises:
        UserError: a pretrained model cannot be loaded, does not fit the tokenizer or the rows, or would not keep
            documents apart; too many layers to freeze.
    """
    settings = {"attn_implementation": attn_implementation, "hidden_dropout": hidden_dropout}
    settings["attention_dropout"] = attention_dropout  # type: ignore[assignment]
    names = pretrained_names(preset)
    torch.manual_seed(seed)
    notices: list[str] = []
    if names and like is not None:
        models = _shaped(preset, like, settings)
    elif names:
        models, notices = _load(preset, names, tokenizer, layout, settings)
    else:
        models = _new(preset, len(tokenizer), layout, settings)
    for subfolder, model in models.items():
        fitting.fuse_activations(model)
        if preset.frozen_layers >= 0:
            frozen = fitting.freeze(model, preset.frozen_layers)
            parts = f"embeddings (of new words too) and {preset.frozen_layers} layers"
            notices.append(f"{frozen:,} parameters of {subfolder or 'the model'} are frozen: {parts}")
    if preset.family in DECODERS:
        notices += decoders.set_ids(models[""], layout, like)
        if names:
            path: AttentionPath = "varlen" if attn_implementation == VARLEN else attn_implementation  # type: ignore[assignment]
            decoders.check_isolation(models[""], path, layout.packing)
            said = f"--hidden_dropout {hidden_dropout} has no effect on a {models[''].config.model_type}"
            if hidden_dropout and like is None and not decoders.drops_something(models[""], path):
                notices += [said] * (said not in notices)
    return models, notices


def attention_paths(preset: Preset, like: Path | None = None) -> tuple[AttentionPath, ...]:
    """The ways to compute attention that the models of a preset have, the fastest first.

    Args:
        preset: may name a pretrained decoder of any type.
        like: checkpoint of a run that is continued.

    Raises:
        UserError: transformers has no causal model of this type.
    """
    if not preset.pretrained_model or preset.family not in DECODERS:
        return ("varlen", "sdpa", "eager")
    name = preset.pretrained_model if like is None else str(like)
    return decoders.attention_paths(decoders.causal_class(name, pretrained.load_config(name, AutoModelForCausalLM)))


def pretrained_names(preset: Preset) -> dict[str, str]:
    """Where each model of a preset is to be loaded from, by subfolder; empty for models that begin anew."""
    names = {"generator": preset.pretrained_generator, "": preset.pretrained_discriminator or preset.pretrained_model}
    return {subfolder: name for subfolder, name in names.items() if name}


def origin(preset: Preset) -> str:
    """The pretrained models that a preset begins with, in words; empty for none."""
    return " and ".join(pretrained_names(preset).values())


def num_parameters(models: Models) -> int:
    """Parameters of all models, those that are shared counted once."""
    return sum(p.numel() for p in {id(p): p for model in models.values() for p in model.parameters()}.values())


def architectures(preset: Preset) -> dict[str, Any]:
    """Classes of transformers by subfolder."""
    family = FAMILIES[preset.family]
    found = {"": AutoModelForCausalLM if preset.pretrained_model and preset.family in DECODERS else family.architecture}
    return found | ({"generator": family.generator_architecture} if preset.family == "electra" else {})


def _new(preset: Preset, vocab_size: int, layout: Layout, settings: dict[str, Any]) -> Models:
    family, models = FAMILIES[preset.family], {}
    for subfolder, architecture in architectures(preset).items():
        configure = family.generator_config if subfolder else family.config
        models[subfolder] = architecture(_with_settings(configure(preset, vocab_size, layout), settings))
    if "generator" in models:
        electra.share_embeddings(models["generator"], models[""])
    return models


def _shaped(preset: Preset, like: Path, settings: dict[str, Any]) -> Models:
    """Models as in a checkpoint, whose weights are to be loaded later."""
    models = {}
    for subfolder, architecture in architectures(preset).items():
        try:
            config = getattr(architecture, "config_class", AutoConfig).from_pretrained(like / subfolder)
        except (OSError, ValueError) as error:
            raise UserError(f"{like} cannot be continued: {str(error).splitlines()[0]}") from None
        make: Any = architecture.from_config if architecture is AutoModelForCausalLM else architecture
        models[subfolder] = make(_with_settings(config, settings))
    if "generator" in models:
        electra.share_embeddings(models["generator"], models[""])
    return models


def _with_settings(config: Any, settings: dict[str, Any]) -> Any:
    pretrained.set_dropout(config, settings["hidden_dropout"], settings["attention_dropout"])
    config._attn_implementation = settings["attn_implementation"]
    return config


def _load(
    preset: Preset, names: dict[str, str], tokenizer: Any, layout: Layout, settings: dict[str, Any]
) -> tuple[Models, list[str]]:
    for name in names.values():
        if (Path(name) / CHECKSUMS).is_file() and (damage := find_damage(Path(name))):
            raise UserError(f"the pretrained model {name} is damaged: {damage}")
    models: dict[str, Any] = {
        subfolder: pretrained.load_pretrained(names[subfolder], architecture, **settings)
        for subfolder, architecture in architectures(preset).items()
    }
    positions, notices = FAMILIES[preset.family].num_positions(layout), []
    if "generator" in models:
        theirs, ours = (models[name].electra.embeddings.state_dict() for name in ("generator", ""))
        if any(theirs[name].shape != tensor.shape for name, tensor in ours.items()):
            raise UserError(f"{names['generator']} and {names['']} have embeddings of other shapes: no ELECTRA pair")
        if not all(torch.equal(theirs[name], tensor) for name, tensor in ours.items()):
            notices.append(f"the embeddings of {names['generator']} differ: those of {names['']} are taken for both")
        electra.share_embeddings(models["generator"], models[""])
    if preset.family in DECODERS:
        models[""], notices = decoders.fit_rows(models[""], names[""], layout)
    for model in models.values():
        before = decoders.longest_input(model.config)
        if preset.family not in DECODERS and fitting.lengthen_positions(model, positions):
            notices.append(f"{before:,} position embeddings were lengthened to {positions:,}")
        dropouts = settings["hidden_dropout"], settings["attention_dropout"]
        notices += pretrained.set_dropout(model.config, *dropouts)  # as they are; it says what has no effect
    notices += pretrained.adopt_tokenizer([*models.values()], names[""], tokenizer)
    return models, list(dict.fromkeys(notices))
