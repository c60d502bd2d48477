"""Words of a line of text: MeCab, Sudachi, white space and punctuation, or none.

The words are those of transformers' `BertJapaneseTokenizer` (its `MecabTokenizer` and `SudachiTokenizer`), so that a
vocabulary is trained on what encoding will see. MeCab is asked for one string of words (`-Owakati`) instead of one
Python object for each word; the lines for which that string does not show the words exactly take the slow way.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import re
import shlex
import unicodedata
from collections.abc import Callable
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
SUDACHI_DICTIONARIES = ("core", "full", "small")
SUDACHI_MAX_BYTES = 49149
# MeCab keeps the cost of a path in 31 bits, to which a word adds less than 2**16, and ends the process beyond. Every
# word has a character at least.
MECAB_MAX_CHARACTERS = 32767
# What transformers takes where the settings of an analyser are silent.
MECAB_DEFAULTS: dict[str, Any] = {"mecab_dic": "unidic_lite", "mecab_option": None, "normalize_text": True}
SUDACHI_DEFAULTS: dict[str, Any] = {
    **{"sudachi_split_mode": "A", "sudachi_dict_type": "core", "normalize_text": True, "trim_whitespace": False},
    **{"sudachi_projection": None, "sudachi_config_path": None, "sudachi_resource_dir": None},
}

# In the wakati string a word with white space looks like two, trailing white space is lost, and MeCab stops at NUL.
_INEXACT = re.compile(r"[\s\x00]")
_NUMERAL_RUN = re.compile(r"(?<![^ ])[0-9]*[〇一二三四五六七八九十百千万億兆][一-鿿々]{6,}(?![^ ])")


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

    def analyser_kwargs(self) -> dict[str, Any]:
        """The `mecab_kwargs` or `sudachi_kwargs` of `BertJapaneseTokenizer` that mean the same."""
        normalize = {} if self.normalization == "nfkc" else {"normalize_text": False}
        if self.kind == "sudachi":
            chosen = {"sudachi_split_mode": self.sudachi_split_mode, "sudachi_dict_type": self.sudachi_dictionary}
            return {**chosen, "trim_whitespace": True, **normalize}  # white space is no word
        option = {"mecab_option": self.option} if self.option else {}
        if self.dictionary in MECAB_DICTIONARIES:
            return {"mecab_dic": self.dictionary, **option, **normalize}
        folder = Path(self.dictionary).expanduser().resolve()
        settings_file = folder / "mecabrc"
        place = f'-d "{folder}" -r "{settings_file if settings_file.exists() else "/dev/null"}"'
        return {"mecab_dic": None, "mecab_option": f"{place} {self.option}".strip(), **normalize}

    def description(self) -> dict[str, Any]:
        """Settings that matter for this kind, with the version of the dictionary, as plain values."""
        settings = asdict(self)
        used = {"mecab": ("dictionary", "option"), "sudachi": ("sudachi_split_mode", "sudachi_dictionary")}
        chosen = {name: settings[name] for name in ("kind", "normalization", *used.get(self.kind, ()))}
        if self.kind == "mecab":
            chosen["dictionary_version"] = mecab_facts(self.analyser_kwargs())["dictionary_version"]
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
        return mecab_segmenter(settings.analyser_kwargs())
    if settings.kind == "sudachi":
        return sudachi_segmenter(settings.analyser_kwargs())
    normalize = _normalizer(settings.normalization == "nfkc")
    if settings.kind == "none":
        return lambda line: normalize(line).split()
    from tokenizers.pre_tokenizers import BertPreTokenizer

    cut = BertPreTokenizer().pre_tokenize_str
    return lambda line: [word for word, _ in cut(normalize(line))]


def _normalizer(nfkc: bool) -> Callable[[str], str]:
    return functools.partial(unicodedata.normalize, "NFKC") if nfkc else str


# ---- MeCab ----


def mecab_segmenter(mecab_kwargs: dict[str, Any]) -> Segmenter:
    """The words of transformers' `MecabTokenizer(**mecab_kwargs)`, without its lower-casing.

    A line beyond MECAB_MAX_CHARACTERS, on which MeCab may crash, is cut at sentence ends, else at spaces.
    """
    settings = MECAB_DEFAULTS | mecab_kwargs
    tagger, normalize = _mecab_tagger(settings), _normalizer(settings["normalize_text"])
    parse, inexact = tagger.parse, _INEXACT.search
    switches = {word[:2] for word in shlex.split(settings["mecab_option"] or "") if word.startswith("-")}
    # Anything but dictionaries (output formats, n-best, ...) may change the string, never the nodes.
    string_is_exact = switches <= {"-d", "-r", "-u"}

    def segment(line: str) -> list[str]:
        text = normalize(line)
        if len(text) > MECAB_MAX_CHARACTERS:
            return [word for piece in pieces(text, MECAB_MAX_CHARACTERS) for word in segment_piece(piece)]
        return segment_piece(text)

    def segment_piece(text: str) -> list[str]:
        if string_is_exact and not inexact(text):
            words: list[str] = parse(text).split()
            return words
        return [word.surface for word in tagger(text)]

    return segment


def _mecab_tagger(settings: dict[str, Any]) -> Any:
    try:
        import fugashi
    except ImportError as error:
        raise UserError("MeCab needs the package fugashi: pip install fugashi") from error
    name, option = settings["mecab_dic"], settings["mecab_option"] or ""
    if name is not None:
        try:
            folder = Path(importlib.import_module(name).DICDIR)
        except ImportError as error:
            raise UserError(f"the MeCab dictionary {name} is not installed: {MECAB_DICTIONARIES[name]}") from error
        if not folder.is_dir():
            raise UserError(f"the MeCab dictionary {name} has not been downloaded: {MECAB_DICTIONARIES[name]}")
        option = f'-d "{folder}" -r "{folder / "mecabrc"}" {option}'
    try:
        return fugashi.GenericTagger(f"{option} -Owakati")
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"MeCab does not start with the options {option.strip()!r}: the folder must hold a compiled dictionary "
            "(sys.dic, matrix.bin, dicrc)"
        ) from error


def mecab_facts(mecab_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The settings that are in effect, without the place of a folder, and the version of the dictionary's package.

    For a folder the version is a hash that changes with its content.
    """
    facts = MECAB_DEFAULTS | mecab_kwargs
    option = facts["mecab_option"] or ""
    if facts["mecab_dic"] is not None:
        version = _version(facts["mecab_dic"])
    else:
        folders = [word for switch, word in itertools.pairwise(shlex.split(option)) if switch == "-d"]
        version, system = "unknown", Path(folders[-1] if folders else "", "sys.dic")
        if folders and system.is_file():
            with system.open("rb") as file:
                content = str(system.stat().st_size).encode() + file.read(1 << 20)
            version = f"sys.dic {hashlib.sha256(content).hexdigest()[:16]}"
        option = re.sub(r"""-[dr]\s*("[^"]*"|'[^']*'|\S+)\s*""", "", option)
    return facts | {"mecab_option": option, "dictionary_version": version}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---- Sudachi ----


def sudachi_segmenter(sudachi_kwargs: dict[str, Any]) -> Segmenter:
    """The words of transformers' `SudachiTokenizer(**sudachi_kwargs)`, without its lower-casing.

    A line beyond Sudachi's limit of 49,149 bytes, which transformers cannot segment at all, is cut at sentence ends.
    """
    settings = SUDACHI_DEFAULTS | sudachi_kwargs
    dictionary, trim = settings["sudachi_dict_type"], settings["trim_whitespace"]
    normalize = _normalizer(settings["normalize_text"])
    try:
        from sudachipy import dictionary as sudachi_dictionary
        from sudachipy import tokenizer as sudachi_tokenizer

        loaded = sudachi_dictionary.Dictionary(
            config_path=settings["sudachi_config_path"],
            resource_dir=settings["sudachi_resource_dir"],
            dict=dictionary,
        )
        make = getattr(loaded, "tokenizer", loaded.create)  # `create` is the older name
        split_mode = getattr(sudachi_tokenizer.Tokenizer.SplitMode, settings["sudachi_split_mode"])
        tagger = make(split_mode, projection=settings["sudachi_projection"])
    except ImportError as error:
        there = [name for name in SUDACHI_DICTIONARIES if importlib.util.find_spec(f"sudachidict_{name}")]
        instead = f"; --sudachi_dict {there[0]} is installed" if there else ""
        raise UserError(
            f"Sudachi needs SudachiPy and the dictionary {dictionary}: pip install SudachiPy sudachidict_{dictionary}"
            f"{instead}"
        ) from error

    def segment(line: str) -> list[str]:
        text = normalize(line)
        words = [word.surface() for piece in pieces(text, SUDACHI_MAX_BYTES) for word in tagger.tokenize(piece)]
        return [trimmed for word in words if (trimmed := word.strip())] if trim else words

    return segment


# ---- a known fault of ipadic ----


def numeral_run_finder(settings: WordTokenizer) -> Callable[[str], list[str]]:
    """A function that finds, among words joined by spaces, those of a known fault of ipadic.

    ipadic takes 四 in 第3四半期連結会計期間末日満期手形 for the start of an unknown number and gives the whole run
    as one word, depending on what follows. Real words of that shape exist: these are entries of the dictionary.
    """
    if settings.kind != "mecab" or settings.dictionary != "ipadic":
        return lambda words: []
    tagger = _mecab_tagger(MECAB_DEFAULTS | settings.analyser_kwargs())

    def is_entry(word: str) -> bool:
        nodes = list(tagger(word))
        return len(nodes) == 1 and not nodes[0].is_unk

    return lambda words: [word for word in _NUMERAL_RUN.findall(words) if not is_entry(word)]
