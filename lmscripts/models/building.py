"""The models of a run: freshly initialised, loaded from elsewhere and made to fit, or shaped like a checkpoint's.

A model is a dictionary of transformers models by the subfolder they are saved in: most objectives have one, "", while
ELECTRA has the discriminator, "", and the generator, "generator".
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmscripts.data.packing import Layout
from lmscripts.errors import UserError
from lmscripts.models import attention, decoder, dropout, fitting, pretrained
from lmscripts.models.attention import AttentionPath
from lmscripts.models.checks import check_isolation, drops_something
from lmscripts.models.families import architectures, family, preset_keys
from lmscripts.models.finding import CHECKSUMS, find_checkpoint, find_damage
from lmscripts.models.loading import load_model, read_config
from lmscripts.options.presets import Preset, default_parameter_file, disagreements, load_preset

Models = dict[str, PreTrainedModel]


class Dropouts(NamedTuple):
    """Of hidden states and of attention weights, and the same in words."""

    hidden: float
    attention: float
    words: str = ""


_BY_TORCH = """torch itself draws the dropout of a {}, otherwise for every number of processes and of micro-batches;
--hidden_dropout 0 --attention_dropout 0 gives the same for all"""


def build(
    preset: Preset,
    objective: str,
    tokenizer: Any,
    layout: Layout,
    *,
    like: Path | None = None,
    seed: int,
    path: AttentionPath,
    dropouts: Dropouts,
    origin: Path | None = None,
) -> tuple[Models, list[str]]:
    """The models of a preset for an objective, each proved to keep documents apart (`lmscripts.models.checks`).

    The layout, of the longest rows, decides positions and special ids; the seed the initial weights, everywhere alike.
    In a run that is continued models with pretrained weights are only shaped like those of its checkpoint, `like`. New
    models have room for a multiple of 64 ids, for which GPUs multiply faster; those of weights from elsewhere as many
    as the checkpoint or run of their `origin`.

    Returns:
        The models by subfolder, and sentences for the user.

    Raises:
        UserError: a pretrained model is damaged or does not fit, documents see each other, too few layers to freeze.
    """
    hidden_dropout, attention_dropout, _ = dropouts
    names, module, models, notices = pretrained_names(preset), family(preset.family), Models(), list[str]()
    going_on, new = bool(names) and like is None, module.may_be_new.get(objective, ())
    torch.manual_seed(seed)
    for part, head in architectures(preset.family, objective, pretrained=bool(names)).items():
        if names:
            own = Path(names[""]) / part  # a head of its own on the same body
            names.setdefault(part, str(own) if own.is_dir() else names[""])
            config = read_config(names[part] if like is None else like / part, head)
        else:
            config = module.config(preset, _num_ids(tokenizer, like or origin), layout, part)
        without_effect = pretrained.set_dropout(config, hidden_dropout, attention_dropout)
        config._attn_implementation = attention.use_attention(path)
        models[part], said = _load(names[part], head, config, new) if going_on else (_shaped(head, config), [])
        notices += without_effect + said if going_on else []
    if going_on:
        notices += _fit(models, names, tokenizer, layout, module)
    module.join(models)
    bodies = {id(model.base_model): part for part, model in reversed(models.items())}  # heads may share one
    for part, model in models.items():
        fitting.fuse_activations(model)
        if preset.frozen_layers >= 0:
            frozen = fitting.freeze(model, preset.frozen_layers)
            whose = f"{frozen:,} parameters of {part or 'the model'} are frozen: embeddings (of new words too) and "
            notices.append(f"{whose}{preset.frozen_layers} layers")
        notices += module.adopt(model, layout, like and like / part)
        if not names and model.can_generate() and (more := _unknown_ids(model, tokenizer)):
            model.generation_config.suppress_tokens = more  # type: ignore[union-attr]
        if part in bodies.values():
            check_isolation(module, model, path, layout)
    dropout.install(models.values(), attention_dropout > 0)
    for part in bodies.values() if hidden_dropout or attention_dropout else ():
        notices += _said_of_dropout(module, models[part], path, hidden_dropout if going_on else 0.0)
    return models, list(dict.fromkeys(notices))


def _said_of_dropout(module: Any, model: PreTrainedModel, path: AttentionPath, hidden: float) -> list[str]:
    """Sentences where a dropout that was asked of a pretrained model has no effect, or is drawn by torch."""
    (drops, by_rows), kind = drops_something(module, model, path), model.config.model_type
    said = [f"--hidden_dropout {hidden} has no effect on a {kind}"] if hidden and not drops else []
    return said if by_rows else [*said, _BY_TORCH.format(kind)]


def _num_ids(tokenizer: Any, origin: Path | None) -> int:
    """Entries of the tokenizer, filled up to a multiple of 64; or as many as those of its origin have."""
    if origin is not None and len(tokenizer) % 64:
        with suppress(UserError):  # of what is no checkpoint, which is said where it is loaded
            place = origin if (origin / "config.json").is_file() else find_checkpoint(origin)[0]
            return int(read_config(place).vocab_size)
    return -(-len(tokenizer) // 64) * 64


def _unknown_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids of a model that stand for nothing, which it must not write."""
    return sorted(set(range(model.config.vocab_size)) - set(tokenizer.get_vocab().values()))


def choose_dropouts(preset: Preset, like: Path | None, hidden: float | None, attention: float | None) -> Dropouts:
    """Dropouts that are given; else those of the checkpoint `like` in a run that goes on; else the preset's, and 0."""
    of, words = (preset.hidden_dropout, 0.0), "the preset's"
    if like is not None:
        of, words = pretrained.dropouts(read_config(like)), "as it was"
    hidden, of_hidden = (of[0], words) if hidden is None else (hidden, "as given")
    attention, of_attention = (of[1], "as it was" if like else "") if attention is None else (attention, "as given")
    said = f"of hidden states {hidden:g} ({of_hidden}), of attention weights {attention:g}"
    return Dropouts(hidden, attention, said + (f" ({of_attention})" if of_attention else ""))


def read_preset(parameter_file: str | None, name: str) -> tuple[Preset, Any]:
    """A preset of a parameter file, the project's if none is named, and the module of its family.

    Raises:
        UserError: the file or the preset cannot be read.
    """
    preset = load_preset(parameter_file or default_parameter_file(), name, preset_keys())
    return preset, family(preset.family)


def recompute_activations(models: Mapping[str, PreTrainedModel]) -> None:
    """Compute activations again for the gradient instead of keeping them; a UserError for models that cannot."""
    for model in models.values():
        if not model.supports_gradient_checkpointing:
            raise UserError(f"--activation_checkpointing: transformers does not have that for a {type(model).__name__}")
        # The older name is deprecated, and versions of transformers before it have no other.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def choose_attention(
    preset: Preset,
    objective: str,
    wanted: str,
    *,
    device: str,
    precision: str,
    attention_dropout: float,
    like: Path | None = None,
) -> tuple[AttentionPath, list[str]]:
    """See `lmscripts.models.attention.choose_attention`; a pretrained decoder, or the checkpoint `like`, has any type.

    Returns:
        How attention is computed, and a sentence where the fastest way cannot be.

    Raises:
        UserError: the models do not have the wanted one, or transformers has no causal model of this type.
    """
    names, module = pretrained_names(preset), family(preset.family)
    heads = architectures(preset.family, objective, pretrained=bool(names))
    head = heads[""]
    if head is AutoModelForCausalLM:
        name = names[""] if like is None else str(like)
        head = decoder.causal_class(name, read_config(name, head))
    paths = attention.attention_paths(head)
    lacking = ""
    if device == "cuda" and precision in attention.HALF and "varlen" in paths:
        shape = Layout(8, "isolated", begin_id=None, end_id=0, pad_id=0)
        configs: list[Any] = [module.config(preset, 64, shape, part) for part in ([] if names else heads)]
        configs += [read_config(like)] if names and like else map(read_config, names.values())
        texts = [config.get_text_config(decoder=True) for config in configs]
        sizes = [getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads for text in texts]
        lacking = attention.kernel_lacks(sizes)
    path = attention.choose_attention(wanted, device, precision, attention_dropout, paths, lacking)
    return path, [f"attention {path}: {lacking}"] if lacking and not attention_dropout and wanted == "auto" else []


def as_asked(preset: Preset, objective: str, *, sizes: Mapping[str, Any], **given: Any) -> Preset:
    """The preset with what options say otherwise; a width alone makes the feed-forward layers four times as wide.

    Raises:
        UserError: pretrained models that the family has no use for, one half of a pair, sizes that have no effect or
            do not go together, or frozen layers that were never trained.
    """
    preset = replace(preset, **given)
    names, parts = pretrained_names(preset), architectures(preset.family, objective)
    pair = "generator" in parts
    if names and pair == (preset.pretrained_model is not None):
        raise UserError(
            f"the preset {preset.name} is of the family {preset.family}: ELECTRA goes on from a pretrained generator "
            "and discriminator, every other family from one pretrained model"
        )
    if names and pair and names.keys() != parts.keys():
        raise UserError("ELECTRA goes on from a pretrained generator and a pretrained discriminator: give both")
    if names and sizes:
        raise UserError(f"the sizes are those of {names['']}: leave out those that are given")
    if names:
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
    """Tokens that the pretrained model of a preset can read at once; None for one that does not say it."""
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


def _shaped(head: Any, config: Any) -> PreTrainedModel:
    """A new model, or one in the shape of a checkpoint whose weights are loaded later.

    Raises:
        UserError: this machine has not the memory for its weights.
    """
    make: Any = head.from_config if head is AutoModelForCausalLM else head
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        parameters = num_parameters({"": make(config)})
    if (size := 4 * parameters) > (there := psutil.virtual_memory().total):
        raise UserError(
            f"a model of these sizes has {parameters:,} parameters, which take {size / 2**30:,.0f} GiB; this machine "
            f"has {there / 2**30:,.0f} GiB of memory: give smaller sizes"
        )
    return make(config)  # type: ignore[no-any-return]


def _load(name: str, head: Any, config: Any, new: tuple[str, ...]) -> tuple[PreTrainedModel, list[str]]:
    """A pretrained model whose parameters that begin so may be missing, and a sentence where they are."""
    if (Path(name) / CHECKSUMS).is_file() and (damage := find_damage(Path(name))):
        raise UserError(f"the pretrained model {name} is damaged: {damage}")
    model, info = load_model(name, head, config, may_be_new=(lambda _, key: key.startswith(new)) if new else None)
    model.train()  # transformers hands it out with its dropout switched off
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    return model, [f"new, as {name} has none: {', '.join(missing)}"] if missing else []


def _fit(models: Models, names: Mapping[str, str], tokenizer: Any, layout: Layout, module: Any) -> list[str]:
    """Make room for the rows, join what shares its embeddings, look at the tokenizer; sentences for the user."""
    notices: list[str] = []
    tables = [model.base_model.get_submodule("embeddings").state_dict() for model in models.values() if len(models) > 1]
    for part, theirs in zip(models, tables, strict=False):
        if any(theirs[name].shape != tensor.shape for name, tensor in tables[0].items()):
            raise UserError(f"{names[part]} and {names['']} have embeddings of other shapes: no ELECTRA pair")
        if any(not theirs[name].equal(tensor) for name, tensor in tables[0].items()):
            notices.append(f"the embeddings of {names[part]} differ: those of {names['']} are taken for both")
    for part, model in models.items():
        models[part], said = module.fit(model, names[part], layout)
        notices += said
    module.join(models)
    return notices + pretrained.adopt_tokenizer([*models.values()], names[""], tokenizer)
