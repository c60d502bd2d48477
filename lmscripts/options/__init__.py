"""A dataclass becomes flags and YAML; the presets; the names of older systems, one file for each system.

Nothing heavy is imported, as `--help` must be quick: no torch, numpy or transformers, and of this package only
`errors` and `files`. What one script checks about its own options stands in that script, which finds here all it needs.
"""

from collections.abc import Mapping
from typing import Any

from lmscripts.options import kanachan, language_pretraining, lightning, nvidia_bert
from lmscripts.options.checks import check_numbers, check_useless, num_cpus, parse_duration, refuse_given
from lmscripts.options.language_pretraining import OlderNames
from lmscripts.options.parsing import Further, dump_options, option, parse_options, parse_options_with_origin
from lmscripts.options.presets import sizes_of_config

__all__ = [
    "EVALUATION",
    "POLICY",
    "PREPARATION",
    "PRETRAINING",
    "TOKENIZER",
    "Further",
    "OlderNames",
    "check_numbers",
    "check_useless",
    "dump_options",
    "num_cpus",
    "option",
    "parse_duration",
    "parse_options",
    "parse_options_with_origin",
    "refuse_given",
    "sizes_of_config",
]


def _together(*systems: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One table for a script, of what several systems call its options."""
    kinds = dict.fromkeys(kind for system in systems for kind in system)
    return {kind: {k: v for system in systems for k, v in system.get(kind, {}).items()} for kind in kinds}


PREPARATION = _together(language_pretraining.PREPARATION, nvidia_bert.PREPARATION)
TOKENIZER = _together(language_pretraining.TOKENIZER, lightning.TOKENIZER)
PRETRAINING = _together(language_pretraining.PRETRAINING, nvidia_bert.PRETRAINING)
PRETRAINING |= {"foreign": lightning, "one_of": [lightning.LENGTHS]}
POLICY = {**kanachan.POLICY, "foreign": kanachan}
EVALUATION = {**lightning.EVALUATION, "foreign": lightning.Evaluation, "of_run": ("model_dir",)}
