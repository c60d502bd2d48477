"""Families of models, one file each; a family is built when its file is here.

A family whose presets the parameter file has, NAME-tiny among them, and whose file is here can be trained. An encoder
takes most of it from `lmscripts.models.encoder`, a decoder from `lmscripts.models.decoder`; begin with a copy of
`bert.py`. B rows of T tokens in layers H wide; slots are (N,) places in the B * T. In each file the same names:

    heads              objective -> {subfolder it is saved in: class of transformers}; "" is the model's own folder
    pretrained_heads   the same for models to go on from, all of whose weights must be there
    may_be_new         objective -> how the names of those begin that need not be there
    default_objective  what a preset of the family is trained on where nobody says it
    defaults           option -> default of the family where it is not everybody's
    preset_keys        keys of its presets beside everybody's, `lmscripts.options.presets.FamilyKeys`
    config             (preset, vocab_size, layout, part) -> configuration of the new model of a subfolder, from
                       `Preset.layer_sizes()` and the ids of a `lmscripts.data.packing.Layout`
    join               (models) -> None: lets models of one training share what they share
    fit                (model, name, layout) -> (model, sentences): room for the rows
    adopt              (model, layout, like) -> sentences: ids of the rows into the configuration
    attention          (model, path, batch, dtype) -> arguments of `encode` that keep documents apart
    encode             (model, input_ids, positions, attention, slots) -> last hidden states, (B, T, H); of a model that
                       was narrowed (N, H), those at the slots
    predict            (model, hidden) -> logits (..., V) of its head on hidden states (..., H)
    narrow             (model) -> None: the last layer computes no more than `encode` is asked for, where it can
    pair_scores        (models, hidden) -> scores of pairs; only where there is a head for them
    flops              (model, sequence_length, slots) -> operations of a training step per position; no slots: of
                       a head that looks at every position
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lmscripts.errors import UserError
from lmscripts.options.presets import FamilyKeys


def names() -> tuple[str, ...]:
    """Families that are built."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


def family(name: str) -> Any:
    """The module of a family; a UserError where none is built."""
    if name not in names():
        raise UserError(f"models of the family {name} cannot be trained yet, only {', '.join(names())}")
    return import_module(f"{__name__}.{name}")


def architectures(name: str, objective: str, *, pretrained: bool = False) -> dict[str, Any]:
    """Classes of transformers by the subfolder that each is saved in, in the order in which they are built.

    Those to go on from may be others. A UserError where the family has no heads for this objective.
    """
    import transformers

    module = family(name)
    heads: Mapping[str, Mapping[str, str]] = module.pretrained_heads if pretrained else module.heads
    if objective not in heads:
        raise UserError(f"--objective {objective} has no head in the family {name}, which has {', '.join(heads)}")
    return {part: getattr(transformers, head) for part, head in heads[objective].items()}


def preset_keys() -> dict[str, FamilyKeys]:
    """What presets of each built family say beside what every preset says."""
    return {name: family(name).preset_keys for name in names()}
