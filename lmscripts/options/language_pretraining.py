"""Names of the older Japanese scripts (language-pretraining), as arguments of `lmscripts.options.parsing`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmscripts.options.parsing import option

PREPARATION: dict[str, Mapping[str, Any]] = {"renamed": {"input_corpus": "input_file"}}
PRETRAINING: dict[str, Mapping[str, Any]] = {
    "renamed": {"mecab_dic_type": "mecab_dic", "block_size": "sequence_length"},
    "renamed_values": {"tokenizer_type": {"sentencepiece": "unigram"}},
    "accepted_unused": {
        "disable_overwrite_cache": "a token store is reused whenever text, tokenizer and options are the same",
        "overwrite_cache": "a token store is made anew whenever text, tokenizer or options changed",
        "local_rank": "the launcher tells each process its place",
        "run_name": "the run is named by --model_dir",
    },
}
TOKENIZER: dict[str, Mapping[str, Any]] = {
    "renamed": {
        "mecab_dic_type": "mecab_dic",
        "word_tokenizer_type": "word_tokenizer",
        "subword_tokenizer_type": "tokenizer_type",
        "sudachi_dict_type": "sudachi_dict",
        "document_format": "document_per_line",  # of earlier versions here
    },
    "renamed_values": {
        "word_tokenizer": {"basic": "whitespace"},
        "document_per_line": {"line": "true", "blank_line": "false"},
    },
    "accepted_unused": {
        "language": "--word_tokenizer says how the text is cut into words, whatever the language",
        "pretokenized_prefix": "segmented text is written to --intermediate_dir only",
        "ignore_max_byte_error": "lines beyond Sudachi's limit are cut at sentence ends",
        "disable_tqdm": "without a terminal plain lines are printed",
    },
}


@dataclass(frozen=True)
class OlderNames:
    """Options of pretraining that say what is said elsewhere now."""

    GROUP = "older names"
    fp16_type: int | None = option(None, help="1 to 3 = --precision fp16, 0 = the Accelerate config's")
    tokenizer_type: Literal["wordpiece", "unigram", "bpe", "character"] | None = option(
        None, help="the tokenizer says it; compared with that"
    )
    mecab_dic: str | None = option(None, help="the same")
