"""Tiny new models of every family, without a tokenizer."""

import torch
from conftest import ROOT

from lmscripts.models import families, pretrained
from lmscripts.models.attention import use_attention
from lmscripts.options.presets import load_preset

VOCABULARY = 512


def tiny_preset(family):
    """The preset of a family that is made for tests."""
    return load_preset(ROOT / "parameter.json", f"{family}-tiny", families.preset_keys())


def new_models(family, objective, layout, path="sdpa", seed=3, dropout=0.0, vocabulary=VOCABULARY):
    """Models of the tiny preset of a family by subfolder, joined as `building.build` joins them."""
    preset, module = tiny_preset(family), families.family(family)
    torch.manual_seed(seed)
    models = {}
    for part, head in families.architectures(family, objective).items():
        config = module.config(preset, vocabulary, layout, part)
        pretrained.set_dropout(config, dropout, 0.0)
        config._attn_implementation = use_attention(path)
        models[part] = head(config)
    module.join(models)
    return models
