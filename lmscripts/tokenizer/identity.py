"""What makes a tokenizer of transformers the one it is: its fingerprint, and the settings by which it cuts text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lmscripts.text.words import SUDACHI_DEFAULTS, mecab_facts

_DEFAULTS = {"sudachi": SUDACHI_DEFAULTS, "jumanpp": {"normalize_text": True, "trim_whitespace": False}}


def is_bert_japanese(tokenizer: Any) -> bool:
    """Whether it is a `BertJapaneseTokenizer`, which importing would need its analysers."""
    return type(tokenizer).__name__ == "BertJapaneseTokenizer"


def model_kind(tokenizer: Any) -> str:
    """How words become pieces: wordpiece, unigram, bpe, character or sentencepiece; "slow" where nothing says it."""
    if is_bert_japanese(tokenizer):
        return str(tokenizer.subword_tokenizer_type) if tokenizer.do_subword_tokenize else "wordpiece"
    return type(tokenizer.backend_tokenizer.model).__name__.lower() if tokenizer.is_fast else "slow"


def fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of what decides the ids; paths, versions of transformers and padding do not."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    facts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "vocabulary": sorted(vocabulary.items(), key=lambda item: (item[1], item[0])),
        "special": [tokenizer.pad_token_id, *tokenizer.all_special_ids],
    }
    if getattr(tokenizer, "split_special_tokens", False):
        facts["special tokens are text"] = True
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        facts["backend"] = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    else:
        added = tokenizer.added_tokens_decoder
        facts["added"] = [[number, repr(token)] for number, token in sorted(added.items())]
    if is_bert_japanese(tokenizer):
        names = ["do_lower_case", "do_word_tokenize", "do_subword_tokenize", "word_tokenizer_type", "never_split"]
        names += ["subword_tokenizer_type", "sudachi_kwargs", "jumanpp_kwargs"]
        mecab = mecab_facts(tokenizer.mecab_kwargs or {}) if tokenizer.word_tokenizer_type == "mecab" else {}
        facts["words"] = [*(getattr(tokenizer, name) for name in names), *mecab.values()]
        if tokenizer.subword_tokenizer_type == "sentencepiece":
            model = tokenizer.subword_tokenizer.sp_model.serialized_model_proto()
            facts["sentencepiece"] = hashlib.sha256(model).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()


def segmentation_difference(first: Any, second: Any) -> str:
    """The first setting in which two tokenizers cut text differently, with both values; empty when there is none.

    The entries of their vocabularies are not compared. Settings that are not written down count with their defaults.
    """
    one, other = (_flat(_segmentation(tokenizer)) for tokenizer in (first, second))
    for name in dict.fromkeys([*one, *other]):
        if one.get(name) != other.get(name):
            return f"{name} is {_short(one.get(name))} and {_short(other.get(name))}"
    return ""


def _segmentation(tokenizer: Any) -> dict[str, Any]:
    """What decides how a tokenizer cuts text, as plain values."""
    if is_bert_japanese(tokenizer):
        words = tokenizer.word_tokenizer_type if tokenizer.do_word_tokenize else "none"
        arguments = getattr(tokenizer, f"{words}_kwargs", None) or {}
        return {
            "tokenizer": "BertJapaneseTokenizer",
            "word_tokenizer_type": words,
            "subword_tokenizer_type": tokenizer.subword_tokenizer_type if tokenizer.do_subword_tokenize else "none",
            "do_lower_case": tokenizer.do_lower_case and words != "none",
            **(mecab_facts(arguments) if words == "mecab" else _DEFAULTS.get(words, {}) | arguments),
        }
    if not tokenizer.is_fast:
        return {"tokenizer": type(tokenizer).__name__, "do_lower_case": getattr(tokenizer, "do_lower_case", None)}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {name: value for name, value in backend["model"].items() if name != "vocab"}
    steps = {name: backend[name] for name in ("normalizer", "pre_tokenizer")}
    return {"tokenizer": "of tokenizer.json", "subwords": model.pop("type"), **steps, **model}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots, so that a difference can be named exactly."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        steps = isinstance(value, list) and all(isinstance(step, dict) for step in value)
        inner = dict(enumerate(value)) if steps else value
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
