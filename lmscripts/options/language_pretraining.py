"""Names of the older Japanese scripts (language-pretraining), as arguments of `lmscripts.options.parsing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    },
    "renamed_values": {"tokenizer_type": {"sentencepiece": "unigram"}, "word_tokenizer": {"basic": "whitespace"}},
    "accepted_unused": {
        "language": "--word_tokenizer says how the text is cut into words, whatever the language",
        "pretokenized_prefix": "segmented text is written to --intermediate_dir only",
        "ignore_max_byte_error": "lines beyond Sudachi's limit are cut at sentence ends",
        "disable_tqdm": "without a terminal plain lines are printed",
    },
}
