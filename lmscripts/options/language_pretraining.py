"""Names of the older Japanese scripts (language-pretraining), as arguments of `lmscripts.options.parsing`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmscripts.options.parsing import option

_SAVED = "the tokenizer's folder says it"
_LIKE_MASK = "a tokenizer made here has [UNK], [SEP], [PAD], [CLS] and [MASK]; another one's folder names its own"
# Of both scripts that read a tokenizer.
_READING: dict[str, Mapping[str, str]] = {
    "renamed": {"tokenizer_name_or_path": "tokenizer_dir"},
    "accepted_unused": {
        **dict.fromkeys(("tokenizer_class", "mecab_option", "sudachi_split_mode", "sudachi_dict_type"), _SAVED),
        **{f"{name}_token [{name.upper()}]": _SAVED for name in ("unk", "sep", "pad", "cls", "mask")},
        "do_lower_case false": _SAVED,
        "language": _SAVED,
        "load_from_hub": "a name that is no folder is looked for on the Hub",
        "ignore_max_byte_error": "lines beyond Sudachi's limit are cut at sentence ends",
        "cache_dir": "HF_HOME says where downloads are kept",
    },
    "refused": {
        **{f"{name}_token": _LIKE_MASK for name in ("unk", "sep", "pad", "cls", "mask")},
        "do_lower_case": "a tokenizer is not changed while it is read: give the folder of one that lowers text",
        "sp_model_kwargs": "a tokenizer is not changed while it is read",
        **dict.fromkeys(
            ("sudachi_config_path", "sudachi_resource_dir"),
            "train_tokenizer.py --sudachi_dict names one of Sudachi's own dictionaries; there is no other",
        ),
    },
}
_MASKS = "masks are drawn while training, anew in every epoch"
PREPARATION: dict[str, Mapping[str, str]] = {  # of create_datasets.py
    "renamed": {**_READING["renamed"], "dataset_dir": "output_dir", "num_proc": "num_workers"},
    "accepted_unused": {
        **_READING["accepted_unused"],
        **dict.fromkeys(("word_tokenizer_type", "subword_tokenizer_type", "mecab_dic"), _SAVED),
        "input_corpus": "a store has the name of --output_dir; nothing is downloaded, the text is that of --input_file",
        "max_length": "a store serves every length: run_pretraining.py --sequence_length",
        "dataset_type": "a store serves every objective: run_pretraining.py --objective",
        "mask_style": f"{_MASKS}: run_pretraining.py --do_whole_word_mask masks whole words",
        "mlm_probability": f"{_MASKS}: run_pretraining.py --mask_probability",
    },
    "refused": _READING["refused"],
}
_LAUNCH_FILE = "the file of `accelerate launch --config_file` says how processes work together"
_JOB = "--do_continue goes on from the newest checkpoint of --model_dir, --start_from with --carry_over from another's"
PRETRAINING: dict[str, Mapping[str, Any]] = {
    "renamed": {
        **_READING["renamed"],
        "mecab_dic_type": "mecab_dic",
        "subword_tokenizer_type": "tokenizer_type",
        "block_size": "sequence_length",
    },
    "renamed_values": {
        "word_tokenizer_type": {"basic": "whitespace"},
    },
    "accepted_unused": {
        **_READING["accepted_unused"],
        "disable_overwrite_cache": "a token store is reused whenever text, tokenizer and options are the same",
        "overwrite_cache": "a token store is made anew whenever text, tokenizer or options changed",
        "local_rank": "the launcher tells each process its place",
        "run_name": "the run is named by --model_dir",
        "is_dataset_masked false": _MASKS,
        "use_deepspeed false": _LAUNCH_FILE,
        "deepspeed_bucket_size": _LAUNCH_FILE,
    },
    "refused": {
        **_READING["refused"],
        **{f"word_tokenizer_type {name}": "no tokenizer here cuts words so" for name in ("juman", "spacy-luw")},
        "resume_from_checkpoint": _JOB,
        "is_dataset_masked": f"{_MASKS}, and a store holds none: leave it out",
        "use_deepspeed": f"{_LAUNCH_FILE}, such as accelerate_configs/fsdp2_bf16.yaml: leave it out",
    },
}
_ANALYSERS = "--word_tokenizer mecab and sudachi are there for Japanese, whitespace for other languages"
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
        "spm_model_type unigram": "that is --tokenizer_type sentencepiece",
        "spm_split_by_whitespace": "no piece is larger than a word of --word_tokenizer",
        "spm_pretokenize_boundary_constraint": "no piece is larger than a word of --word_tokenizer",
        "spm_disable_add_dummy_prefix": "nor had it any there",
    },
    "refused": {
        "word_tokenizer juman": _ANALYSERS,
        "word_tokenizer spacy-luw": _ANALYSERS,
        "spm_split_by_whitespace false": "no piece is larger than a word of --word_tokenizer",
        "spm_model_type": "give --tokenizer_type unigram, sentencepiece_bpe, wordpiece or character instead",
        **{name: _READING["refused"][name] for name in ("sudachi_config_path", "sudachi_resource_dir")},
    },
}
_Kind = Literal["wordpiece", "unigram", "bpe", "character", "sentencepiece", "sentencepiece_bpe"]


@dataclass(frozen=True)
class OlderNames:
    """Options of pretraining that say what is said elsewhere now."""

    GROUP = "older names"
    fp16_type: int | None = option(None, help="1 to 3 = --precision fp16, 0 = the Accelerate config's")
    tokenizer_type: _Kind | None = option(None, help="the tokenizer says it; compared with that")
    mecab_dic: str | None = option(None, help="the same")
    word_tokenizer_type: Literal["mecab", "sudachi", "whitespace", "none"] | None = option(None, help="the same")
    bert_config_file: str | None = option(None, help="JSON of a BERT's sizes, which count instead of the preset's")
