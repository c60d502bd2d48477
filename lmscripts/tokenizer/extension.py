"""New words in the place of the unused tokens of a tokenizer, and what it takes for two tokenizers to fit each other.

Further pretraining on the text of a field gains from words of that field that are single tokens. The entries
`[unusedN]` are free for them: every other token keeps its id, the vocabulary keeps its size, and the embeddings of a
pretrained model stay where they are (`models.pretrained.adopt_tokenizer` gives the new ones a sensible start).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.text.words import mecab_dictionary_version
from lmscripts.tokenizer.encoder import UNUSED, Encoder, load_encoder
from lmscripts.tokenizer.folder import FOLDER_FILES, RECORD_FILE, REPORT_FILE, read_record, write_json
from lmscripts.tokenizer.report import check_encoder

# What transformers takes where the settings of an analyser are silent.
_MECAB_DEFAULTS = {"mecab_dic": "unidic_lite", "mecab_option": None, "normalize_text": True}
_SUDACHI_DEFAULTS = {"sudachi_split_mode": "A", "sudachi_dict_type": "core", "normalize_text": True}
_SUDACHI_DEFAULTS |= {"trim_whitespace": False, "sudachi_projection": None}
_JUMANPP_DEFAULTS = {"normalize_text": True, "trim_whitespace": False}


@dataclass(frozen=True)
class Extension:
    """What is to become of a tokenizer.

    Attributes:
        encoder: the tokenizer as it is.
        words: new word, as encoding will see it -> id of the unused token that makes room for it.
        known: words of the file that the vocabulary has already.
        repeated: lines of the file that give a word a second time.
        num_left: unused tokens that stay.
        request: hash of all that decides the result.
    """

    encoder: Encoder
    words: dict[str, int]
    known: tuple[str, ...]
    repeated: int
    num_left: int
    request: str


def plan_extension(tokenizer_dir: Path, words_file: Path) -> Extension:
    """Which new word takes which unused token: those of the file in their order, by rising id.

    Args:
        tokenizer_dir: a tokenizer of ours, or any local folder with a WordPiece or character vocabulary.
        words_file: UTF-8, one word a line; empty lines are passed over.

    Raises:
        UserError: the folder or file cannot be used, a line is no word, nothing is new, or the unused tokens are
            fewer than the new words.
    """
    encoder = load_encoder(tokenizer_dir)
    characters_only = _check_kind(encoder)
    tokenizer = encoder.tokenizer
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    # A token that the tokenizer cuts out of the text before anything else cannot be renamed in the vocabulary alone.
    free = [number for number in encoder.reserved_ids if number not in tokenizer.added_tokens_decoder]
    seen: Counter[str] = Counter()
    for number, line in enumerate(_read_lines(words_file), start=1):
        if line.strip():
            seen[_as_encoded(tokenizer, line.strip(), f"{words_file}, line {number}", characters_only)] += 1
    new = [word for word in seen if word not in vocabulary]
    if not new:
        raise UserError(f"{words_file} holds no word that the vocabulary of {tokenizer_dir} does not have already")
    if len(new) > len(free):
        raise UserError(f"{words_file} holds {len(new)} new words, but {tokenizer_dir} has {len(free)} unused tokens")
    return Extension(
        encoder=encoder,
        words=dict(zip(new, free)),
        known=tuple(word for word in seen if word in vocabulary),
        repeated=seen.total() - len(seen),
        num_left=len(free) - len(new),
        request=hashlib.sha256(json.dumps([encoder.fingerprint, new]).encode()).hexdigest(),
    )


def _check_kind(encoder: Encoder) -> bool:
    """Whether the vocabulary holds single characters only; refuses vocabularies that need more than an entry."""
    tokenizer = encoder.tokenizer
    if type(tokenizer).__name__ == "BertJapaneseTokenizer":
        kind = tokenizer.subword_tokenizer_type if tokenizer.do_subword_tokenize else "wordpiece"
    else:
        kind = type(tokenizer.backend_tokenizer.model).__name__.lower() if tokenizer.is_fast else "slow"
    if kind not in ("wordpiece", "character"):
        raise UserError(
            f"new words can be put into a WordPiece or character vocabulary, but that of {encoder.folder} is "
            f"{type(tokenizer).__name__} ({kind}), where a word needs a score or merges besides its entry"
        )
    return bool(kind == "character")


def _read_lines(words_file: Path) -> list[str]:
    try:
        return words_file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{words_file}, line {line} is not UTF-8 text; convert it with iconv") from error


def _as_encoded(tokenizer: Any, word: str, place: str, characters_only: bool) -> str:
    """A word as it stands in a line that was normalised for encoding."""
    if any(letter.isspace() or unicodedata.category(letter) == "Cc" for letter in unicodedata.normalize("NFKC", word)):
        raise UserError(f"{place}: {word!r} holds white space or control characters; a new word must be one word")
    parts = [word]
    if word not in tokenizer.all_special_tokens:
        if not tokenizer.is_fast:
            parts = tokenizer.word_tokenizer.tokenize(word) if tokenizer.do_word_tokenize else parts
        elif tokenizer.backend_tokenizer.normalizer is not None:
            # BERT's normaliser puts spaces around Chinese characters; such a word will be reported as cut.
            parts = tokenizer.backend_tokenizer.normalizer.normalize_str(word).split()
    encoded = "".join(parts)
    if not encoded:
        raise UserError(f"{place}: nothing is left of {word!r} once it is normalised as text is")
    if UNUSED.fullmatch(encoded) or encoded.startswith("##"):
        raise UserError(f"{place}: {encoded} is written like an unused token or the rest of a word, not like a word")
    if characters_only and len(encoded) > 1:
        raise UserError(f"{place}: {encoded} can never be one token, as this tokenizer cuts text into characters")
    return encoded


# ---- writing ----


def write_extension(extension: Extension, folder: Path) -> list[str]:
    """Write the extended tokenizer and check that nothing but the new words changed.

    Args:
        extension: from `plan_extension`.
        folder: exists and is empty.

    Returns:
        Sentences for the user: what is new, what was known, which words the tokenizer would still cut.

    Raises:
        UserError: the vocabulary is in no file that can be changed, or the result is not what it should be.
    """
    source = extension.encoder.folder
    for name in sorted(FOLDER_FILES - {REPORT_FILE, RECORD_FILE, "config.yaml"}):
        if (source / name).is_file():  # the report measured another vocabulary
            shutil.copyfile(source / name, folder / name)
    changed = [_change_lines(folder / "vocab.txt", extension), _change_json(folder / "tokenizer.json", extension)]
    if not any(changed):
        raise UserError(f"{source} has neither vocab.txt nor tokenizer.json, so its vocabulary cannot be changed")
    _name_class(folder / "tokenizer_config.json", extension.encoder.tokenizer)
    earlier = read_record(source) or {"vocab_size": extension.encoder.vocab_size}
    step = {"tokenizer": extension.encoder.fingerprint, "new_words": extension.words}
    steps = [*earlier.get("extensions", []), step]
    write_json(folder / RECORD_FILE, {**earlier, "request": extension.request, "extensions": steps})
    return [*_sentences(extension), *_check_result(extension, folder)]


def _unused_of(extension: Extension) -> dict[str, str]:
    """Unused token -> the word that takes its place."""
    tokens = {number: token for token, number in extension.encoder.tokenizer.get_vocab().items()}
    return {tokens[number]: word for word, number in extension.words.items()}


def _change_lines(file: Path, extension: Extension) -> bool:
    """Rename the entries of a vocab.txt, if it is there; a line's number is its id."""
    if not file.is_file():
        return False
    names = {token: f"{word}\n" for token, word in _unused_of(extension).items()}
    with file.open(encoding="utf-8") as lines:  # as transformers reads it
        text = "".join(names.get(line.rstrip("\n"), line) for line in lines)
    file.write_text(text, encoding="utf-8", newline="\n")
    return True


def _change_json(file: Path, extension: Extension) -> bool:
    """Rename the entries of the vocabulary in a tokenizer.json, if it is there."""
    if not file.is_file():
        return False
    names = _unused_of(extension)
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    content["model"]["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    write_json(file, content)
    return True


def _name_class(file: Path, tokenizer: Any) -> None:
    """Without the config.json of a model beside it the folder itself has to say what tokenizer it holds."""
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "tokenizer_class" not in settings:
        name = type(tokenizer).__name__
        settings["tokenizer_class"] = "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name
        write_json(file, settings)


def _check_result(extension: Extension, folder: Path) -> list[str]:
    """Compare the written tokenizer with the earlier one; sentences about words that do not come out as one token."""
    before, after = extension.encoder, load_encoder(folder)
    names = _unused_of(extension)
    expected = {names.get(token, token): number for token, number in before.tokenizer.get_vocab().items()}
    if after.tokenizer.get_vocab() != expected or after.special_ids != before.special_ids:
        raise UserError(f"{before.folder} names its tokens in more places than its vocabulary; it cannot be extended")
    if difference := segmentation_difference(before.tokenizer, after.tokenizer):
        raise UserError(f"the extended copy of {before.folder} would cut text in another way: {difference}")
    words = list(extension.words)
    lines = [*words, *(f"{first}{second}" for first, second in itertools.pairwise(words)), *expected]
    check_encoder(after, lines)
    rows = after.encode(words).rows()
    cut = [word for word, row in zip(words, rows) if row.tolist() != [extension.words[word]]]
    sentences = [f"checked: {len(lines):,} lines have the same ids through AutoTokenizer"]
    if cut:
        sentences.append(
            f"warning: {len(cut)} of the {len(words)} new words ({', '.join(cut[:3])}) do not come out as one token "
            "even where they stand alone, as text is cut into words before; they will hardly be met"
        )
    return sentences


def _sentences(extension: Extension) -> list[str]:
    ids = sorted(extension.words.values())
    place = f"between id {ids[0]} and id {ids[-1]}; {extension.num_left} are left"
    sentences = [f"{len(ids)} new words took the place of unused tokens, {place}"]
    if known := extension.known:
        sentences.append(f"{len(known)} words were in the vocabulary already ({', '.join(known[:3])})")
    if extension.repeated:
        sentences.append(f"{extension.repeated} lines give a word a second time")
    return sentences


# ---- comparing ----


def segmentation_settings(tokenizer: Any) -> dict[str, Any]:
    """What decides how a tokenizer of transformers cuts text, apart from the entries of its vocabulary.

    Values are plain and those that take effect: settings that are not written down appear with their defaults.
    """
    if type(tokenizer).__name__ == "BertJapaneseTokenizer":
        return {"tokenizer": "BertJapaneseTokenizer", **_japanese_settings(tokenizer)}
    if not tokenizer.is_fast:
        return {"tokenizer": type(tokenizer).__name__, "do_lower_case": getattr(tokenizer, "do_lower_case", None)}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = {name: value for name, value in backend["model"].items() if name != "vocab"}
    steps = {name: backend[name] for name in ("normalizer", "pre_tokenizer")}
    return {"tokenizer": "of tokenizer.json", "subwords": model.pop("type"), **steps, **model}


def _japanese_settings(tokenizer: Any) -> dict[str, Any]:
    words = tokenizer.word_tokenizer_type if tokenizer.do_word_tokenize else "none"
    subwords = tokenizer.subword_tokenizer_type if tokenizer.do_subword_tokenize else "none"
    settings: dict[str, Any] = {"word_tokenizer_type": words, "subword_tokenizer_type": subwords}
    settings["do_lower_case"] = tokenizer.do_lower_case and words != "none"
    if words == "mecab":
        settings |= _MECAB_DEFAULTS | (tokenizer.mecab_kwargs or {})
        settings["mecab_option"] = settings["mecab_option"] or ""
        if settings["mecab_dic"] is None:  # a dictionary is known by its content, not by its folder
            settings["mecab_option"] = re.sub(r"""-[dr]\s*("[^"]*"|'[^']*'|\S+)\s*""", "", settings["mecab_option"])
            settings["mecab_dic"] = mecab_dictionary_version(tokenizer.mecab_kwargs)
    elif words == "sudachi":
        settings |= _SUDACHI_DEFAULTS | (tokenizer.sudachi_kwargs or {})
    elif words == "jumanpp":
        settings |= _JUMANPP_DEFAULTS | (tokenizer.jumanpp_kwargs or {})
    return settings


def segmentation_difference(first: Any, second: Any) -> str:
    """The first setting in which two tokenizers cut text differently, with both values; empty when there is none."""
    one, other = (_flat(segmentation_settings(tokenizer)) for tokenizer in (first, second))
    for name in [*one, *(name for name in other if name not in one)]:
        if one.get(name) != other.get(name):
            return f"{name} is {_short(one.get(name))} and {_short(other.get(name))}"
    return ""


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
