"""A dataclass becomes flags and YAML; the presets; the names of older systems, one file for each system.

Nothing heavy is imported, as `--help` must be quick: no torch, numpy or transformers, and of this package only
`errors` and `files`. What one script checks about its own options stands in that script, which finds here all it needs.
"""

from typing import Any

from lmscripts.options import language_pretraining, lightning
from lmscripts.options.checks import check_numbers, check_useless, parse_duration, refuse_given
from lmscripts.options.language_pretraining import PREPARATION, TOKENIZER, OlderNames
from lmscripts.options.parsing import Further, dump_options, option, parse_options, parse_options_with_origin

__all__ = [
    "PREPARATION",
    "TOKENIZER",
    "Further",
    "OlderNames",
    "check_numbers",
    "check_useless",
    "dump_options",
    "lightning",
    "option",
    "parse_duration",
    "parse_options",
    "parse_options_with_origin",
    "refuse_given",
]
PRETRAINING: dict[str, Any] = {**language_pretraining.PRETRAINING}  # of both older systems that pretrain
PRETRAINING |= {"foreign": lightning, "one_of": [lightning.LENGTHS]}
