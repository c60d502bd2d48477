"""New words in the place of the unused tokens of a tokenizer.

Further pretraining on the text of a field gains from words of that field that are single tokens. The entries
`[unusedN]` are free for them: every other token keeps its id, the vocabulary keeps its size, and the embeddings of a
pretrained model stay where they are (`models.pretrained.adopt_tokenizer` gives the new ones a sensible start).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmscripts.errors import UserError
from lmscripts.tokenizer.encoder import UNUSED, Encoder, load_encoder, model_kind, segmentation_difference
from lmscripts.tokenizer.folder import RECORD_FILE, TRANSFORMERS_FILES, read_record, write_json
from lmscripts.tokenizer.report import check_encoder


@dataclass(frozen=True)
class Extension:
    """What is to become of a tokenizer: `words` are the new words, as encoding will see them, with their ids."""

    encoder: Encoder
    words: dict[str, int]
    request: str  # hash of all that decides the result
    sentences: tuple[str, ...]  # for the user: what is new, what was known or repeated


def plan_extension(tokenizer_dir: Path, words_file: Path) -> Extension:
    """Which new word takes which unused token: those of the file, one a line, in their order by rising id.

    The tokenizer is one of ours, or any local folder with a WordPiece or character vocabulary.

    Raises:
        UserError: the folder or file cannot be used, a line is no word, nothing is new, or the unused tokens are
            fewer than the new words.
    """
    encoder = load_encoder(tokenizer_dir)
    tokenizer = encoder.tokenizer
    kind = model_kind(tokenizer)
    if kind not in ("wordpiece", "character"):
        raise UserError(
            f"new words can be put into a WordPiece or character vocabulary, but that of {tokenizer_dir} is "
            f"{type(tokenizer).__name__} ({kind}), where a word needs a score or merges besides its entry"
        )
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    # A token that the tokenizer cuts out of the text before anything else cannot be renamed in the vocabulary alone.
    free = [number for number in encoder.reserved_ids if number not in tokenizer.added_tokens_decoder]
    seen: Counter[str] = Counter()
    try:
        lines = words_file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{words_file}, line {number} is not UTF-8 text; convert it with iconv") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            seen[_as_encoded(tokenizer, line.strip(), f"{words_file}, line {number}", kind)] += 1
    new = [word for word in seen if word not in vocabulary]
    if not new:
        raise UserError(f"{words_file} holds no word that the vocabulary of {tokenizer_dir} does not have already")
    if len(new) > len(free):
        raise UserError(f"{words_file} holds {len(new)} new words, but {tokenizer_dir} has {len(free)} unused tokens")
    words = dict(zip(new, free))
    place = f"between id {free[0]} and id {free[len(new) - 1]}; {len(free) - len(new)} are left"
    sentences = [f"{len(new)} new words took the place of unused tokens, {place}"]
    if known := [word for word in seen if word in vocabulary]:
        sentences.append(f"{len(known)} words were in the vocabulary already ({', '.join(known[:3])})")
    if repeated := seen.total() - len(seen):
        sentences.append(f"{repeated} lines give a word a second time")
    request = hashlib.sha256(json.dumps([encoder.fingerprint, new]).encode()).hexdigest()
    return Extension(encoder, words, request, tuple(sentences))


def _as_encoded(tokenizer: Any, word: str, place: str, kind: str) -> str:
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
    if kind == "character" and len(encoded) > 1:
        raise UserError(f"{place}: {encoded} can never be one token, as this tokenizer cuts text into characters")
    return encoded


# ---- writing ----


def write_extension(extension: Extension, folder: Path) -> list[str]:
    """Write the extended tokenizer into an empty folder and check that nothing but the new words changed.

    Returns:
        Sentences for the user: what is new, what was known, which words the tokenizer would still cut.

    Raises:
        UserError: the vocabulary is in no file that can be changed, or the result is not what it should be.
    """
    source, tokenizer = extension.encoder.folder, extension.encoder.tokenizer
    for name in sorted(TRANSFORMERS_FILES):
        if (source / name).is_file():  # not the report, which measured another vocabulary
            shutil.copyfile(source / name, folder / name)
    words = {number: word for word, number in extension.words.items()}
    names = {token: words[number] for token, number in tokenizer.get_vocab().items() if number in words}
    if not _change_vocabulary(folder, names):
        raise UserError(f"{source} has neither vocab.txt nor tokenizer.json, so its vocabulary cannot be changed")
    # Without the config.json of a model beside it the folder itself has to say what tokenizer it holds.
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "tokenizer_class" not in settings:
        name = type(tokenizer).__name__
        write_json(file, settings | {"tokenizer_class": name.replace("TokenizersBackend", "PreTrainedTokenizerFast")})
    earlier = read_record(source) or {"vocab_size": extension.encoder.vocab_size}
    step = {"tokenizer": extension.encoder.fingerprint, "new_words": extension.words}
    steps = [*earlier.get("extensions", []), step]
    write_json(folder / RECORD_FILE, {**earlier, "request": extension.request, "extensions": steps})
    return [*extension.sentences, *_check_result(extension, folder, names)]


def _change_vocabulary(folder: Path, names: dict[str, str]) -> bool:
    """Rename entries of vocab.txt, where a line's number is its id, and of tokenizer.json; whether one is there."""
    lines, content = folder / "vocab.txt", folder / "tokenizer.json"
    if lines.is_file():
        with lines.open(encoding="utf-8") as file:  # as transformers reads it
            text = "".join(f"{word}\n" if (word := names.get(line.rstrip("\n"))) else line for line in file)
        lines.write_text(text, encoding="utf-8", newline="\n")
    if content.is_file():
        values = json.loads(content.read_text(encoding="utf-8"))
        vocabulary: dict[str, int] = values["model"]["vocab"]
        values["model"]["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
        write_json(content, values)
    return lines.is_file() or content.is_file()


def _check_result(extension: Extension, folder: Path, names: dict[str, str]) -> list[str]:
    """Compare the written tokenizer with the earlier one; sentences about words that do not come out as one token."""
    before, after = extension.encoder, load_encoder(folder)
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
