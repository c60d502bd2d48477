"""The models of a run: freshly initialised, loaded from elsewhere and made to fit, or shaped like a checkpoint's.

A model is a dictionary of transformers models by the subfolder they are saved in: most objectives have one, "", while
ELECTRA has the discriminator, "", and the generator, "generator".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmscripts.data.packing import Layout
from lmscripts.errors import UserError
from lmscripts.models import attention, decoder, fitting, pretrained
from lmscripts.models.attention import AttentionPath
from lmscripts.models.checks import check_isolation, drops_something
from lmscripts.models.families import architectures, family, preset_keys
from lmscripts.models.finding import CHECKSUMS, find_damage
from lmscripts.models.loading import read_config
from lmscripts.options.presets import Preset, default_parameter_file, disagreements, load_preset

Models = dict[str, PreTrainedModel]


def build(
    preset: Preset,
    objective: str,
    tokenizer: Any,
    layout: Layout,
    *,
    like: Path | None = None,
    seed: int,
    path: AttentionPath,
    hidden_dropout: float,
    attention_dropout: float,
) -> tuple[Models, list[str]]:
    """The models of a preset for an objective, each proved to keep documents apart (`lmscripts.models.checks`).

    Args:
        preset: sizes of the layers or names of pretrained models; layers to freeze.
        objective: its name.
        tokenizer: of the text, from transformers.
        layout: of the longest rows; decides the number of positions and the special ids.
        like: checkpoint of a run that is continued: models with pretrained weights are only shaped like its own.
        seed: decides the initial weights, on every process alike.
        path: how attention is computed.
        hidden_dropout: of the hidden states.
        attention_dropout: of the attention weights.

    Returns:
        The models by subfolder, and sentences for the user.

    Raises:
        UserError: a pretrained model cannot be loaded, does not fit the tokenizer or the rows, or would not keep
            documents apart; too many layers to freeze.
    """
    settings: dict[str, Any] = {"hidden_dropout": hidden_dropout, "attention_dropout": attention_dropout}
    settings["attn_implementation"] = attention.use_attention(path)
    names, module = pretrained_names(preset), family(preset.family)
    heads = architectures(preset.family, objective, pretrained=bool(names))
    torch.manual_seed(seed)
    notices: list[str] = []
    if names and like is not None:
        models = {part: _shaped(head, like / part, settings) for part, head in heads.items()}
    elif names:
        models, notices = _load(names, heads, tokenizer, layout, module, settings)
    else:
        configs = {part: module.config(preset, len(tokenizer), layout, part) for part in heads}
        models = {part: head(_with_settings(configs[part], settings)) for part, head in heads.items()}
    module.join(models)
    bodies = {id(model.base_model): part for part, model in reversed(models.items())}  # heads may share one
    for part, model in models.items():
        fitting.fuse_activations(model)
        if preset.frozen_layers >= 0:
            frozen = fitting.freeze(model, preset.frozen_layers, module.layers(model))
            parts = f"embeddings (of new words too) and {preset.frozen_layers} layers"
            notices.append(f"{frozen:,} parameters of {part or 'the model'} are frozen: {parts}")
        notices += module.adopt(model, layout, like and like / part)
        if part not in bodies.values():
            continue
        check_isolation(module, model, path, layout)
        if names and like is None and hidden_dropout and not drops_something(module, model, path):
            notices.append(f"--hidden_dropout {hidden_dropout} has no effect on a {model.config.model_type}")
    return models, list(dict.fromkeys(notices))


def read_preset(parameter_file: str | None, name: str) -> tuple[Preset, Any]:
    """A preset of a parameter file, the project's if none is named, and the module of its family.

    Raises:
        UserError: the file or the preset cannot be read.
    """
    preset = load_preset(parameter_file or default_parameter_file(), name, preset_keys())
    return preset, family(preset.family)


def recompute_activations(models: Mapping[str, PreTrainedModel]) -> None:
    """Let each layer compute its activations again for the gradient instead of keeping them.

    Raises:
        UserError: transformers cannot do that for a model.
    """
    for model in models.values():
        if not model.supports_gradient_checkpointing:
            raise UserError(f"--activation_checkpointing: transformers does not have that for a {type(model).__name__}")
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]


def choose_attention(
    preset: Preset,
    objective: str,
    wanted: str,
    *,
    device: str,
    precision: str,
    attention_dropout: float,
    like: Path | None = None,
) -> AttentionPath:
    """How attention is computed, see `lmscripts.models.attention.choose_attention`.

    Args:
        preset: may name a pretrained decoder of any type.
        objective: its name.
        wanted: "auto", or one of the paths.
        device: "cuda", "cpu".
        precision: "fp16", "bf16", "no".
        attention_dropout: of the attention weights.
        like: checkpoint of a run that is continued.

    Raises:
        UserError: the models do not have the wanted one, or transformers has no causal model of this type.
    """
    names = pretrained_names(preset)
    head = architectures(preset.family, objective, pretrained=bool(names))[""]
    if head is AutoModelForCausalLM:
        name = names[""] if like is None else str(like)
        head = decoder.causal_class(name, read_config(name, head))
    paths = attention.attention_paths(head)
    return attention.choose_attention(wanted, device, precision, attention_dropout, paths)


def as_asked(preset: Preset, objective: str, *, sizes: Mapping[str, Any], **given: Any) -> Preset:
    """The preset with what options say otherwise.

    Args:
        preset: from the parameter file.
        objective: its name.
        sizes: of the layers, by fields of the preset; a width alone makes the feed-forward layers four times as wide.
        given: other fields of the preset.

    Raises:
        UserError: pretrained models that the family has no use for, one half of a pair, sizes that have no effect or
            do not go together, or frozen layers that were never trained.
    """
    preset = replace(preset, **given)
    names, parts = pretrained_names(preset), architectures(preset.family, objective)
    if names and (len(parts) > 1) == (preset.pretrained_model is not None):
        raise UserError(
            f"the preset {preset.name} is of the family {preset.family}: ELECTRA goes on from a pretrained generator "
            "and discriminator, every other family from one pretrained model"
        )
    if names and names.keys() != parts.keys():
        raise UserError("ELECTRA goes on from a pretrained generator and a pretrained discriminator: give both")
    if names:
        if sizes:
            raise UserError(f"the sizes are those of {names['']}: leave out those that are given")
        return preset
    preset = replace(preset, **sizes)
    if "hidden_size" in sizes and "ffn_size" not in sizes:
        preset = replace(preset, ffn_size=4 * sizes["hidden_size"])
    if preset.hidden_size and preset.heads and preset.hidden_size % preset.heads:
        raise UserError(f"--n_embd {preset.hidden_size} is not divisible by --n_head {preset.heads}")
    if sizes and (problems := disagreements(preset)):
        raise UserError(f"the sizes that are given do not fit the preset {preset.name}: {'; '.join(problems)}")
    preset.layer_sizes()  # complains about what is missing
    if preset.frozen_layers >= 0:
        raise UserError(f"--frozen_layers {preset.frozen_layers} would freeze layers that were never trained")
    return preset


def longest_pretrained(preset: Preset) -> int | None:
    """Tokens that the pretrained model of a preset can read at once; None for one that does not say it.

    Raises:
        UserError: it cannot be loaded.
    """
    return fitting.longest_input(read_config(pretrained_names(preset)[""]))


def pretrained_names(preset: Preset) -> dict[str, str]:
    """Where each model of a preset is to be loaded from, by subfolder; empty for models that begin anew."""
    names = {"generator": preset.pretrained_generator, "": preset.pretrained_discriminator or preset.pretrained_model}
    return {subfolder: name for subfolder, name in names.items() if name}


def origin(preset: Preset) -> str:
    """The pretrained models that a preset begins with, in words; empty for none."""
    return " and ".join(pretrained_names(preset).values())


def num_parameters(models: Mapping[str, PreTrainedModel]) -> int:
    """Parameters of all models, those that are shared counted once."""
    return sum(p.numel() for p in {id(p): p for model in models.values() for p in model.parameters()}.values())


def _shaped(head: Any, folder: Path, settings: dict[str, Any]) -> PreTrainedModel:
    """A model as in a checkpoint, whose weights are to be loaded later."""
    make: Any = head.from_config if head is AutoModelForCausalLM else head
    model: PreTrainedModel = make(_with_settings(read_config(folder, head), settings))
    return model


def _with_settings(config: Any, settings: dict[str, Any]) -> Any:
    pretrained.set_dropout(config, settings["hidden_dropout"], settings["attention_dropout"])
    config._attn_implementation = settings["attn_implementation"]
    return config


def _load(
    names: dict[str, str], heads: dict[str, Any], tokenizer: Any, layout: Layout, module: Any, settings: dict[str, Any]
) -> tuple[Models, list[str]]:
    """Pretrained models with room for the rows, the tokenizer looked at; what shares its embeddings is joined."""
    for name in names.values():
        if (Path(name) / CHECKSUMS).is_file() and (damage := find_damage(Path(name))):
            raise UserError(f"the pretrained model {name} is damaged: {damage}")
    models: Models = {part: pretrained.load_pretrained(names[part], head, **settings) for part, head in heads.items()}
    notices = _check_pair(models, names) if len(models) > 1 else []
    module.join(models)
    for part, model in models.items():
        models[part], said = module.fit(model, names[part], layout)
        notices += said
        dropouts = settings["hidden_dropout"], settings["attention_dropout"]
        notices += pretrained.set_dropout(models[part].config, *dropouts)  # as they are; it says what has no effect
    notices += pretrained.adopt_tokenizer([*models.values()], names[""], tokenizer)
    return models, notices


def _check_pair(models: Models, names: dict[str, str]) -> list[str]:
    """Refuse two models whose embeddings cannot be one; says where they will be."""
    (first, theirs), (second, ours) = (
        (names[part], models[part].base_model.get_submodule("embeddings").state_dict()) for part in ("generator", "")
    )
    if any(theirs[name].shape != tensor.shape for name, tensor in ours.items()):
        raise UserError(f"{first} and {second} have embeddings of other shapes: no ELECTRA pair")
    if all(torch.equal(theirs[name], tensor) for name, tensor in ours.items()):
        return []
    return [f"the embeddings of {first} differ: those of {second} are taken for both"]
