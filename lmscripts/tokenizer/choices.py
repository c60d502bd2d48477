"""The options of train_tokenizer.py: what they mean together, and what is refused before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.options.checks import check_numbers
from lmscripts.text.corpus import is_plain
from lmscripts.text.words import WordTokenizer, make_segmenter
from lmscripts.tokenizer.folder import check_combination, library_versions
from lmscripts.tokenizer.lossless import CAUSAL_SPECIAL_TOKENS, check_causal
from lmscripts.tokenizer.training import SPECIAL_TOKENS, VocabularySettings

CAUSAL_DEFAULTS = {"tokenizer_type": "unigram", "word_tokenizer": "none", "normalization": "none"}
# What does not decide the tokenizer, and what a training does not read.
_ELSEWHERE = ("input_file", "model_dir", "overwrite", "intermediate_dir", "num_files", "num_workers")
_NOT_TRAINING = ("extend_tokenizer_dir", "new_words_file", "from_sentencepiece")


def with_defaults_of_objective(options: Any, origins: dict[str, str]) -> Any:
    """The options with the defaults of a causal model where its objective was chosen and they were not given."""
    if options.objective != "causal":
        return options
    changes = {name: value for name, value in CAUSAL_DEFAULTS.items() if origins[name] == "default"}
    return dataclasses.replace(options, **changes)


def refuse(origins: dict[str, str], why: str, *names: str) -> None:
    """Refuse options that were given although they would change nothing.

    Raises:
        UserError: names the first one and says `why`.
    """
    for name in names:
        if origins[name] != "default":
            raise UserError(f"--{name} has no effect {why}; leave it out")


def refuse_useless(options: Any, origins: dict[str, str], paths: Sequence[Path]) -> None:
    """Refuse options of the training that the other options, or the formats of the text, leave without effect.

    Raises:
        UserError: names the first one.
    """
    for analyser in ("mecab", "sudachi"):
        if options.word_tokenizer != analyser:
            names = [name for name in origins if name.startswith(f"{analyser}_")]
            refuse(origins, f"with --word_tokenizer {options.word_tokenizer}", *names)
    # The defaults themselves are let through: older command lines give them with every type.
    for kind, name in (("unigram", "min_frequency"), ("bpe", "limit_alphabet")):
        if options.tokenizer_type == kind and getattr(options, name) != getattr(type(options), name):
            refuse(origins, f"with --tokenizer_type {kind}", name)
    plain = [is_plain(str(path), options.input_format or "") for path in paths]
    if all(plain):
        refuse(origins, "where all input is plain text", "text_column", "delimiter", "quotes", "on_bad_line")
    if not any(plain):
        refuse(origins, "where no input is plain text", "document_format")


def word_settings(options: Any) -> WordTokenizer:
    """How lines are cut into words; tried once here, so that a missing dictionary is known at once.

    Raises:
        UserError: an analyser or dictionary is missing, or no tokenizer does this.
    """
    words = WordTokenizer(
        kind=options.word_tokenizer,
        dictionary=options.mecab_dic,
        option=options.mecab_option,
        sudachi_split_mode=options.sudachi_split_mode,
        sudachi_dictionary=options.sudachi_dict,
        normalization=options.normalization,
    )
    if options.objective == "causal":
        check_causal(options.tokenizer_type, words)
    check_combination(options.tokenizer_type, words)
    make_segmenter(words)
    return words


def vocabulary_settings(options: Any) -> VocabularySettings:
    """What the vocabulary is to be.

    Raises:
        UserError: a number makes no sense.
    """
    check_numbers(vars(options), positive=("model_max_length",), not_negative=("num_files", "num_workers"))
    settings = VocabularySettings(
        size=options.vocab_size,
        min_frequency=options.min_frequency,
        limit_alphabet=options.limit_alphabet,
        num_unused=options.num_unused_tokens,
        multiple=options.pad_vocab_to_multiple_of,
        special_tokens=CAUSAL_SPECIAL_TOKENS if options.objective == "causal" else SPECIAL_TOKENS,
    )
    settings.room()
    return settings


def request_of(options: Any, source: str, words: WordTokenizer) -> str:
    """Hash of all that decides the tokenizer: text, options, dictionary and libraries, not folders or processes."""
    chosen = {name: value for name, value in vars(options).items() if name not in (*_ELSEWHERE, *_NOT_TRAINING)}
    if options.objective == "masked":
        del chosen["objective"]  # so that tokenizers of earlier versions are known again
    for name in ("delimiter", "quotes", "input_format"):  # likewise
        if chosen[name] == getattr(type(options), name):
            del chosen[name]
    facts = [source, chosen, words.description(), library_versions(words)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
