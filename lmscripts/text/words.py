"""Words of a line of text: MeCab, Sudachi, white space and punctuation, or none.

The words are those of transformers' `BertJapaneseTokenizer` (its `MecabTokenizer` and `SudachiTokenizer`), so that a
vocabulary is trained on what encoding will see. MeCab is asked for one string of words (`-Owakati`) instead of one
Python object for each word; the lines for which that string does not show the words exactly take the slow way.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import itertools
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lmscripts.errors import UserError
from lmscripts.text.reading import pieces

Segmenter = Callable[[str], list[str]]

# name of the dictionary -> how to install it
MECAB_DICTIONARIES = {
    "ipadic": "pip install ipadic",
    "unidic_lite": "pip install unidic-lite",
    "unidic": "pip install unidic && python -m unidic download",
}
SUDACHI_MAX_BYTES = 49149

# In the wakati string a word with white space looks like two, trailing white space is lost, and MeCab stops at NUL.
_INEXACT = re.compile(r"[\s\x00]")
_NUMERAL_RUN = re.compile(r"[0-9]*[〇一二三四五六七八九十百千万億兆][一-鿿々]{6,}")


@dataclass(frozen=True)
class WordTokenizer:
    """How a line is cut into words.

    Attributes:
        kind: "mecab", "sudachi", "whitespace" (white space, and every punctuation mark is a word, as in BERT) or
            "none" (white space only; the text is taken as it is).
        dictionary: for mecab: "ipadic", "unidic_lite", "unidic" or the folder of a compiled dictionary.
        option: for mecab: further options, for example "-u user.dic".
        sudachi_split_mode: "A" (short words) to "C" (long words).
        sudachi_dictionary: "small", "core" or "full".
        normalization: "nfkc" or "none".
    """

    kind: Literal["mecab", "sudachi", "whitespace", "none"] = "mecab"
    dictionary: str = "ipadic"
    option: str = ""
    sudachi_split_mode: Literal["A", "B", "C"] = "A"
    sudachi_dictionary: Literal["small", "core", "full"] = "core"
    normalization: Literal["nfkc", "none"] = "nfkc"

    def mecab_kwargs(self) -> dict[str, Any]:
        """The `mecab_kwargs` of `BertJapaneseTokenizer` that mean the same."""
        normalize = {} if self.normalization == "nfkc" else {"normalize_text": False}
        option = {"mecab_option": self.option} if self.option else {}
        if self.dictionary in MECAB_DICTIONARIES:
            return {"mecab_dic": self.dictionary, **option, **normalize}
        folder = Path(self.dictionary).expanduser().resolve()
        settings_file = folder / "mecabrc"
        place = f'-d "{folder}" -r "{settings_file if settings_file.exists() else "/dev/null"}"'
        return {"mecab_dic": None, "mecab_option": f"{place} {self.option}".strip(), **normalize}

    def sudachi_kwargs(self) -> dict[str, Any]:
        """The `sudachi_kwargs` of `BertJapaneseTokenizer` that mean the same."""
        normalize = {} if self.normalization == "nfkc" else {"normalize_text": False}
        return {
            "sudachi_split_mode": self.sudachi_split_mode,
            "sudachi_dict_type": self.sudachi_dictionary,
            "trim_whitespace": True,  # white space is no word
            **normalize,
        }

    def description(self) -> dict[str, Any]:
        """Settings that matter for this kind, with the version of the dictionary, as plain values."""
        settings = asdict(self)
        used = {"mecab": ("dictionary", "option"), "sudachi": ("sudachi_split_mode", "sudachi_dictionary")}
        chosen = {name: settings[name] for name in ("kind", "normalization", *used.get(self.kind, ()))}
        if self.kind == "mecab":
            chosen["dictionary_version"] = mecab_dictionary_version(self.mecab_kwargs())
        if self.kind == "sudachi":
            chosen["dictionary_version"] = _version(f"sudachidict_{self.sudachi_dictionary}")
        return chosen


def make_segmenter(settings: WordTokenizer) -> Segmenter:
    """A function from a line (without line ends) to its words.

    Raises:
        UserError: the analyser or its dictionary is not there; with the command that installs it.
    """
    if settings.kind == "mecab":
        if settings.dictionary not in MECAB_DICTIONARIES and not Path(settings.dictionary).expanduser().is_dir():
            known = ", ".join(MECAB_DICTIONARIES)
            raise UserError(f"the MeCab dictionary must be {known} or a folder, not {settings.dictionary!r}")
        if settings.option and not settings.option.startswith("-"):
            raise UserError(f'{settings.option!r} is no option of MeCab; give a settings file as "-r FILE"')
        return mecab_segmenter(settings.mecab_kwargs())
    if settings.kind == "sudachi":
        return sudachi_segmenter(settings.sudachi_kwargs())
    normalize = _normalizer(settings.normalization == "nfkc")
    if settings.kind == "none":
        return lambda line: normalize(line).split()
    from tokenizers.pre_tokenizers import BertPreTokenizer

    cut = BertPreTokenizer().pre_tokenize_str
    return lambda line: [word for word, _ in cut(normalize(line))]


def _normalizer(nfkc: bool) -> Callable[[str], str]:
    return (lambda line: unicodedata.normalize("NFKC", line)) if nfkc else (lambda line: line)


# ---- MeCab ----


def mecab_segmenter(mecab_kwargs: dict[str, Any]) -> Segmenter:
    """The words of transformers' `MecabTokenizer(**mecab_kwargs)`, without its lower-casing.

    Raises:
        UserError: fugashi or the dictionary is missing.
    """
    tagger = _mecab_tagger(mecab_kwargs)
    normalize = _normalizer(bool(mecab_kwargs.get("normalize_text", True)))
    parse, inexact = tagger.parse, _INEXACT.search

    def words_of_nodes(line: str) -> list[str]:
        return [word.surface for word in tagger(normalize(line))]

    def words_of_string(line: str) -> list[str]:
        text = normalize(line)
        if inexact(text):
            return [word.surface for word in tagger(text)]
        words: list[str] = parse(text).split(" ")
        return words if words != [""] else []

    options = shlex.split(mecab_kwargs.get("mecab_option") or "")
    switches = {word[:2] for word in options if word.startswith("-")}
    # Anything but dictionaries (output formats, n-best, ...) may change the string, never the nodes.
    return words_of_string if switches <= {"-d", "-r", "-u"} else words_of_nodes


def _mecab_tagger(mecab_kwargs: dict[str, Any]) -> Any:
    try:
        import fugashi
    except ImportError as error:
        raise UserError("MeCab needs the package fugashi: pip install fugashi") from error
    name = mecab_kwargs.get("mecab_dic", "unidic_lite")  # the default of transformers
    option = mecab_kwargs.get("mecab_option") or ""
    if name is not None:
        folder = _dictionary_folder(name)
        option = f'-d "{folder}" -r "{folder / "mecabrc"}" {option}'
    try:
        return fugashi.GenericTagger(f"{option} -Owakati")
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"MeCab does not start with the options {option.strip()!r}: the folder must hold a compiled dictionary "
            "(sys.dic, matrix.bin, dicrc)"
        ) from error


def _dictionary_folder(name: str) -> Path:
    if name not in MECAB_DICTIONARIES:
        known = ", ".join(MECAB_DICTIONARIES)
        raise UserError(f"the MeCab dictionary {name!r} is not one of {known}")
    try:
        folder = Path(importlib.import_module(name).DICDIR)
    except ImportError as error:
        raise UserError(f"the MeCab dictionary {name} is not installed: {MECAB_DICTIONARIES[name]}") from error
    if not folder.is_dir():
        raise UserError(f"the MeCab dictionary {name} has not been downloaded: {MECAB_DICTIONARIES[name]}")
    return folder


def mecab_dictionary_version(mecab_kwargs: dict[str, Any]) -> str:
    """Version of the dictionary's package; for a folder, a hash that changes with its content."""
    name = mecab_kwargs.get("mecab_dic", "unidic_lite")
    if name is not None:
        return _version(name)
    words = shlex.split(mecab_kwargs.get("mecab_option") or "")
    folders = [word for switch, word in itertools.pairwise(words) if switch == "-d"]
    system = Path(folders[-1], "sys.dic") if folders else None
    if system is None or not system.is_file():
        return "unknown"
    digest = hashlib.sha256(str(system.stat().st_size).encode())
    with system.open("rb") as file:
        digest.update(file.read(1 << 20))
    return f"sys.dic {digest.hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---- Sudachi ----


def sudachi_segmenter(sudachi_kwargs: dict[str, Any]) -> Segmenter:
    """The words of transformers' `SudachiTokenizer(**sudachi_kwargs)`, without its lower-casing.

    A line beyond Sudachi's limit of 49,149 bytes, which transformers cannot segment at all, is cut at sentence ends.

    Raises:
        UserError: SudachiPy or the dictionary is missing.
    """
    mode, dictionary = sudachi_kwargs.get("sudachi_split_mode", "A"), sudachi_kwargs.get("sudachi_dict_type", "core")
    try:
        from sudachipy import dictionary as sudachi_dictionary
        from sudachipy import tokenizer as sudachi_tokenizer

        split_mode = getattr(sudachi_tokenizer.Tokenizer.SplitMode, mode)
        loaded = sudachi_dictionary.Dictionary(
            config_path=sudachi_kwargs.get("sudachi_config_path"),
            resource_dir=sudachi_kwargs.get("sudachi_resource_dir"),
            dict=dictionary,
        )
        make = getattr(loaded, "tokenizer", loaded.create)  # `create` is the older name
        tagger = make(split_mode, projection=sudachi_kwargs.get("sudachi_projection"))
    except ImportError as error:
        raise UserError(
            f"Sudachi needs SudachiPy and the dictionary {dictionary}: pip install SudachiPy sudachidict_{dictionary}"
        ) from error
    normalize = _normalizer(bool(sudachi_kwargs.get("normalize_text", True)))
    trim = bool(sudachi_kwargs.get("trim_whitespace", False))

    def segment(line: str) -> list[str]:
        text = normalize(line)
        words = [word.surface() for piece in pieces(text, SUDACHI_MAX_BYTES) for word in tagger.tokenize(piece)]
        return [trimmed for word in words if (trimmed := word.strip())] if trim else words

    return segment


# ---- a known fault of ipadic ----


def numeral_runs(words: Iterable[str]) -> list[str]:
    """Words that look like a known fault of ipadic: a kanji numeral with a run of seven or more kanji in one word.

    ipadic takes 四 in 第3四半期連結会計期間末日満期手形 for the start of an unknown number and gives the whole run
    as one word, depending on what follows. Real words of that shape exist: `make_is_unknown` tells them apart.
    """
    return [word for word in words if _NUMERAL_RUN.fullmatch(word)]


def make_is_unknown(settings: WordTokenizer) -> Callable[[str], bool]:
    """A function that says whether MeCab's dictionary lacks a word (the word is no entry of its own)."""
    tagger = _mecab_tagger(settings.mecab_kwargs())

    def is_unknown(word: str) -> bool:
        nodes = list(tagger(word))
        return len(nodes) != 1 or bool(nodes[0].is_unk)

    return is_unknown
