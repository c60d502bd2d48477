"""What a pretraining run is given: the preset and the text, put together with the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lmscripts.data.phases import BY_PHASE, Phase, by_phase
from lmscripts.data.preparation import Source, prepare_beside
from lmscripts.data.token_store import TokenStore, open_store
from lmscripts.errors import UserError
from lmscripts.models import DECODERS, decoders
from lmscripts.options.checks import check_useless
from lmscripts.options.presets import Preset, load_preset
from lmscripts.tokenizer.encoder import find_tokenizer, load_encoder
from lmscripts.training.checkpoint import look_for_whole
from lmscripts.training.folder import read_state

Options = TypeVar("Options")
# What the preset decides where no option does.
_FROM_PRESET = ("learning_rate", "warmup_steps", "save_steps", "logging_steps", "frozen_layers")
_SIZES = {"n_layer": "layers", "n_head": "heads", "n_embd": "hidden_size"}
_BETA2 = {"roberta": 0.98, "gpt2": 0.95}  # arXiv:1907.11692, section 3.1; arXiv:2005.14165, appendix B
# What must stay as it was when a run is continued.
_NOT_TO_CHANGE: tuple[str, ...] = ("model_type", "seed", "sequence_length", "packing", "mask_unit", "mask_probability")
_NOT_TO_CHANGE += ("phase_steps",)
_NOT_TO_CHANGE += ("batch_size", "optimizer", "weight_decay", "beta1", "beta2", "epsilon", "ema_decay", "frozen_layers")
_NOT_TO_CHANGE += ("generator_weight", "discriminator_weight", "z_loss")
_PRETRAINED = {
    "pretrained_model_name_or_path": "pretrained_model",
    "pretrained_generator_model_name_or_path": "pretrained_generator",
    "pretrained_discriminator_model_name_or_path": "pretrained_discriminator",
}


def open_inputs(options: Any, parameter_file: Path) -> tuple[Any, Preset, list[Phase]]:
    """The options with the preset's values where none were given, the preset with those of the options, the phases.

    A store is built here from text if need be: before the processes join, as it may take long.

    Args:
        options: of run_pretraining.py.
        parameter_file: the presets.

    Raises:
        UserError: preset, text or store cannot be used, or options contradict each other.
    """
    preset = load_preset(parameter_file, options.model_type)
    given = {field: getattr(options, name) for name, field in _PRETRAINED.items() if getattr(options, name)}
    preset = replace(preset, **given)
    if options.frozen_layers is not None:
        preset = replace(preset, frozen_layers=options.frozen_layers)
    preset = _resized(preset, options)
    _check_pretrained(preset, options.start_from)
    values: dict[str, Any] = {name: getattr(preset, name) for name in _FROM_PRESET}
    values |= {"beta2": _BETA2.get(preset.family, 0.999)}
    values |= {"eval_every": options.save_steps or preset.save_steps}
    values |= {
        "sequence_length": options.sequence_length or row_lengths(preset, options),
        "mask_probability": (preset.mask_probability,),
    }
    values |= {"batch_size": (preset.batch_size * preset.accumulation_steps,)}  # the older way to say it
    if options.decay_from is not None:  # everything of that checkpoint; `lmscripts.training.branch` made the schedule
        options = replace(options, start_from=options.decay_from, carry_over="everything", decay_from=None)
    elif not options.phase_steps:
        values |= {"max_steps": None if options.epochs else preset.train_steps}
    values |= {"mask_unit": "word" if options.do_whole_word_mask else "token"}
    options = replace(options, **{name: v for name, v in values.items() if getattr(options, name) in (None, ())})
    return options, preset, _phases(options)


def fixed_settings(options: Any, phases: Sequence[Phase]) -> dict[str, Any]:
    """What must stay as it was when a run is continued, name to value."""
    fixed = {name: getattr(options, name) for name in _NOT_TO_CHANGE}
    return fixed | {"token store": [phase.store.fingerprint for phase in phases]}


def objective_settings(options: Any, preset: Preset) -> dict[str, float]:
    """Settings of the family's objective: the weights of ELECTRA's terms (arXiv:2003.10555, section 3.3), the z-loss.

    Raises:
        UserError: an option was given that would have no effect.
    """
    electra = {"generator_weight": 1.0, "discriminator_weight": 50.0}
    causal = {"z_loss": 0.0}
    values, why = vars(options), f"on the family {preset.family}"
    if preset.family in DECODERS:
        check_useless(values, why, *electra)
        settings = causal
    else:
        check_useless(values, why, *causal, *(() if preset.family == "electra" else electra))
        settings = electra if preset.family == "electra" else {}
    return {n: default if values[n] is None else values[n] for n, default in settings.items()}


def _resized(preset: Preset, options: Any) -> Preset:
    """The preset of a decoder with the sizes that were given; its feed-forward layers are four times as wide."""
    names = [name for name in _SIZES if getattr(options, name) is not None]
    if preset.family not in DECODERS:
        check_useless(vars(options), f"on the family {preset.family}", *names)
        return preset
    masks = ("mask_unit", "mask_probability", "do_whole_word_mask")
    for name in (name for name in masks if getattr(options, name) not in (None, (), False)):
        raise UserError(f"--{name} has no effect on the family {preset.family}, which predicts every token")
    if names and preset.pretrained_model:
        raise UserError(f"--{names[0]} has no effect: the sizes are those of {preset.pretrained_model}")
    preset = replace(preset, **{_SIZES[name]: getattr(options, name) for name in names})
    if "n_embd" in names:
        preset = replace(preset, ffn_size=4 * options.n_embd)
    if preset.hidden_size and preset.heads and preset.hidden_size % preset.heads:
        raise UserError(f"--n_embd {preset.hidden_size} is not divisible by --n_head {preset.heads}")
    return preset


def _phases(options: Any) -> list[Phase]:
    steps: Sequence[int | None] = options.phase_steps or (options.max_steps,)
    settings = by_phase({name: getattr(options, name) for name in BY_PHASE}, len(steps))
    stores = _open_stores(options)
    if len({store.manifest["tokenizer"]["fingerprint"] for store in stores.values()}) > 1:
        raise UserError(f"the stores {' and '.join(map(str, stores))} were made with different tokenizers")
    phases = []
    for setting, number in zip(settings, steps, strict=True):
        store = stores[setting.pop("dataset_dir", "")]
        phases.append(Phase(store=store, steps=number, epochs=options.epochs, **setting))
    return phases


def _open_stores(options: Any) -> dict[str, TokenStore]:
    """The stores by the name that was given; "" for the one that is made of text here."""
    if bool(options.dataset_dir) == bool(options.input_file):
        raise UserError("give either --dataset_dir (a token store) or --input_file with --tokenizer_dir")
    if options.dataset_dir:
        wanted = load_encoder(find_tokenizer(options.tokenizer_dir)).fingerprint if options.tokenizer_dir else None
        return {name: open_store(Path(name), wanted) for name in dict.fromkeys(options.dataset_dir)}
    if options.tokenizer_dir is None:
        raise UserError("--input_file needs --tokenizer_dir")
    if options.dry_run:
        raise UserError("--dry_run reads a token store: give --dataset_dir (prepare_corpus.py makes one)")
    source = Source(
        options.input_file,
        find_tokenizer(options.tokenizer_dir),
        options.validation_fraction or 0.01,
        options.validation_file,
    )
    return {"": prepare_beside(source, Path(options.model_dir), options.num_workers or 2)}


def row_lengths(preset: Preset, options: Any) -> tuple[int, ...]:
    """Tokens of a row where no option says it.

    They are those of the run that is continued; else the preset's, but of a pretrained model that the options name no
    more than it reads at once.
    """
    if preset.sequence_length and not any(getattr(options, name) for name in _PRETRAINED):
        return (preset.sequence_length,)
    own = look_for_whole(Path(options.model_dir))[0] if options.do_continue else None
    if own is not None:
        return tuple(read_state(own)["fixed"]["sequence_length"])
    lengths = [length for length in (preset.sequence_length, _longest_input(preset)) if length]
    if not lengths:
        raise UserError(
            f"the model {preset.pretrained_model} does not say how long its input may be: give --sequence_length"
        )
    return (min(lengths),)


def _longest_input(preset: Preset) -> int | None:
    """Tokens that the pretrained model of a preset can read at once; None for a decoder that does not say it."""
    from transformers import AutoConfig

    name = preset.pretrained_discriminator or preset.pretrained_model or ""
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        raise UserError(f"the pretrained model {name} cannot be loaded: {str(error).splitlines()[0]}") from None
    if preset.family in DECODERS:
        return decoders.longest_input(config)
    positions = getattr(config, "max_position_embeddings", None)
    if config.model_type != preset.family or positions is None:
        raise UserError(f"the pretrained model {name} is a {config.model_type}, not a {preset.family}")
    return int(positions) - ((config.pad_token_id or 0) + 1 if preset.family == "roberta" else 0)


def _check_pretrained(preset: Preset, start_from: str | None) -> None:
    """Refuse pretrained models that the family has no use for, one half of a pair, and two beginnings at once."""
    electra = preset.family == "electra"
    pair = (preset.pretrained_generator, preset.pretrained_discriminator)
    if (preset.pretrained_model and electra) or (any(pair) and not electra):
        raise UserError(
            f"the preset {preset.name} is of the family {preset.family}: ELECTRA goes on from a pretrained generator "
            "and discriminator, every other family from one pretrained model"
        )
    if any(pair) and not all(pair):
        raise UserError("ELECTRA goes on from a pretrained generator and a pretrained discriminator: give both")
    if start_from is not None and any((*pair, preset.pretrained_model)):
        raise UserError(f"--start_from {start_from} and a pretrained model are both a beginning: give one of them")
    if not any((*pair, preset.pretrained_model)):
        preset.layer_sizes()  # complains about what is missing
        if preset.frozen_layers >= 0:
            raise UserError(f"--frozen_layers {preset.frozen_layers} would freeze layers that were never trained")
