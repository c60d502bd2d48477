"""Training of vocabularies from files of words (joined by single spaces, one sentence a line) or of plain text.

Each function gives the same result in every process: whatever depends on the order of a hash table or on the number
of threads inside the training libraries is fixed here beforehand. Memory grows with the number of different words,
not with the text; text that is not cut into words is sampled instead.

The vocabulary always starts with the special tokens, PAD being id 0, and [unused0] ... [unusedN-1].

Vocabularies for causal models are lossless: decoding gives every text back, character for character, so that bits per
byte are those of the text and a model can learn line ends, tabs, runs of spaces, half and full width. There the
unigram vocabulary is trained by sentencepiece, as the trainer of `tokenizers` loses the byte fallback, and then taken
apart: the mark U+2581 becomes the space that it stood for, so that no character of a text has a second meaning, and
characters that have to be there get the entries that sentencepiece did not give them.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lmscripts.errors import UserError
from lmscripts.tokenizer.encoder import UNUSED

TokenizerType = Literal["wordpiece", "unigram", "bpe", "character", "sentencepiece_bpe"]
# What sentencepiece trains: by the probability of pieces, or by joins of characters.
SENTENCEPIECE_TYPES = ("unigram", "sentencepiece_bpe")

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CAUSAL_SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
MAX_WORD_CHARACTERS = 100  # WordPiece gives [UNK] for longer words
LONG_WORDS_ADVICE = "take --tokenizer_type unigram, which cuts them, or a --word_tokenizer that does"

MAX_COUNTED_WORDS = 8_000_000
MAX_SAMPLE_BYTES = 1 << 26
MAX_SAMPLE_LINE = 4096
# The result of sentencepiece depends on the number of threads, so it is not taken from the machine.
_SENTENCEPIECE_THREADS = 4

PRINTABLE_ASCII = "".join(map(chr, range(0x21, 0x7F)))
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Text that reads like a byte or a special token, "<0x0A>", must never be taken for it. All its characters are in the
# vocabulary with a logarithm of probability of -20 or so; this is far below a sum of a few of them.
_NEVER = -10_000.0
# Characters that sentencepiece keeps for itself in its training text: its mark of a space, that of an unknown character
# (it leaves out lines that hold one), and what separates columns.
_SENTENCEPIECE_MARKS = "\u2581\u2585\t\x00"
# What `decoders.ByteFallback` reads as a byte: hexadecimal digits of both cases, also behind a sign.
_READ_AS_BYTE = re.compile("<0x[0-9A-Fa-f+][0-9A-Fa-f]>")
_LEAST_COVERAGE = 0.98  # sentencepiece refuses less
# Characters of a text below which sentencepiece may find nothing at all.
_LITTLE_TEXT = 10_000


@dataclass(frozen=True)
class VocabularySettings:
    """What a vocabulary is to be.

    Attributes:
        size: entries, special and unused ones included.
        min_frequency: pairs (wordpiece, bpe) or characters (character) that are rarer are left out.
        limit_alphabet: number of different characters that are kept, the most frequent ones.
        character_coverage: of `SENTENCEPIECE_TYPES`, instead: as many as cover this share of the text; 0 for none.
        num_unused: number of [unusedN] entries behind the special tokens.
        multiple: the size is filled up to a multiple of this with further [unusedN]; 0 leaves it.
        causal: lossless, with `CAUSAL_SPECIAL_TOKENS`.
    """

    size: int = 32768
    min_frequency: int = 2
    limit_alphabet: int = 6129
    num_unused: int = 10
    multiple: int = 64
    causal: bool = False
    character_coverage: float = 0.0

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The first entries: pad, unknown, beginning and end of a text, in this order, and others."""
        return CAUSAL_SPECIAL_TOKENS if self.causal else SPECIAL_TOKENS

    def facts(self) -> dict[str, Any]:
        """The settings as plain values, for the record of a tokenizer; the usual special tokens are not mentioned."""
        facts = {name: value for name, value in asdict(self).items() if name != "character_coverage" or value}
        return facts | {"special_tokens": self.special_tokens} if facts.pop("causal") else facts

    def reserved(self) -> list[str]:
        """The special and unused entries at the beginning."""
        return [*self.special_tokens, *(f"[unused{number}]" for number in range(self.num_unused))]

    def fill_up(self, num_entries: int) -> list[str]:
        """The [unusedN] entries that bring `num_entries` to a multiple."""
        missing = -num_entries % self.multiple if self.multiple else 0
        return [f"[unused{self.num_unused + number}]" for number in range(missing)]

    def room(self) -> int:
        """Entries that are left for text; a UserError where there are none."""
        room = self.size - len(self.special_tokens) - self.num_unused
        if room < 1:
            raise UserError(
                f"a vocabulary of {self.size} entries has no room beside {len(self.special_tokens)} special tokens "
                f"and {self.num_unused} unused ones; give a larger --vocab_size"
            )
        return room


@dataclass(frozen=True)
class Trained:
    """A trained vocabulary.

    Attributes:
        pieces: all entries in the order of their ids, special, unused and fill-up entries included.
        merges: for both kinds of bpe, the pairs in the order in which they are joined.
        scores, sentencepiece: of `SENTENCEPIECE_TYPES`, a score per entry (0 for reserved ones), for unigram the
            logarithm of a probability, and the model in sentencepiece's own format.
        num_characters, num_text_characters: different characters that are kept, and in the text.
        num_long_words, long_words_share: words that WordPiece leaves out for their length, and how much of the
            characters of all words they are.
    """

    pieces: list[str]
    merges: Sequence[tuple[str, str]] = ()
    scores: Sequence[float] = ()
    sentencepiece: bytes = b""
    num_characters: int = 0
    num_text_characters: int = 0
    num_long_words: int = 0
    long_words_share: float = 0.0

    def remarks(self, settings: VocabularySettings) -> list[str]:
        """Sentences about where the vocabulary differs from what was asked for."""
        full_size = settings.size + len(settings.fill_up(settings.size))
        sentences = []
        if len(self.pieces) < full_size:
            sentences.append(
                f"the vocabulary has {len(self.pieces):,} entries, not {full_size:,}: the text, the minimum frequency "
                "and the limit of the alphabet support no more"
            )
        if filling := sum(map(bool, map(UNUSED.fullmatch, self.pieces))) - settings.num_unused:
            sentences.append(
                f"{filling} further [unusedN] fill the vocabulary up to a multiple of {settings.multiple}; "
                "--pad_vocab_to_multiple_of 0 leaves them out"
            )
        if self.num_characters < self.num_text_characters:
            sentences.append(
                f"the vocabulary keeps the {self.num_characters:,} most frequent of the {self.num_text_characters:,} "
                "different characters of the text"
            )
        if self.num_long_words:
            sentences.append(
                f"warning: {self.num_long_words:,} words are longer than {MAX_WORD_CHARACTERS} characters, "
                f"{self.long_words_share:.2%} of the characters of the text; WordPiece gives its unknown token for "
                f"each, and they were left out here: {LONG_WORDS_ADVICE}"
            )
        return sentences


# ---- counting ----


def read_lines(files: Sequence[Path]) -> Iterator[str]:
    """Lines of the files without their line feed."""
    for path in files:
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from (line.rstrip("\n") for line in file)


def sampled_lines(files: Sequence[Path]) -> Iterable[str]:
    """Non-empty lines, cut at MAX_SAMPLE_LINE characters; of a large text, a fixed sample of about MAX_SAMPLE_BYTES.

    A line is chosen by its own hash, so the sample does not depend on the files or their number.
    """
    total = sum(path.stat().st_size for path in files)
    share = min(1.0, MAX_SAMPLE_BYTES / max(total, 1))
    for line in read_lines(files):
        if line and zlib.crc32(line.encode()) < share * 2**32:
            for start in range(0, len(line), MAX_SAMPLE_LINE):
                yield line[start : start + MAX_SAMPLE_LINE]


def count_words(files: Sequence[Path]) -> Counter[str]:
    """How often each word occurs, words being separated by white space.

    Beyond MAX_COUNTED_WORDS different words those seen once so far are forgotten; as the lines come in the order of
    the corpus, that does not depend on how it was split into files.
    """
    counts: Counter[str] = Counter()
    for line in read_lines(files):
        counts.update(line.split())
        if len(counts) > MAX_COUNTED_WORDS:
            counts = Counter({word: count for word, count in counts.items() if count > 1})
    return counts


def count_characters(words: Counter[str]) -> Counter[str]:
    """How often each character occurs."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    return counts


def most_frequent(counts: Counter[str], number: int) -> list[str]:
    """The `number` most frequent entries; equal counts in the order of their code points."""
    return [entry for entry, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]]


# ---- the four kinds ----


def train_vocabulary(
    tokenizer_type: TokenizerType, files: Sequence[Path], settings: VocabularySettings, *, segmented: bool
) -> Trained:
    """Train one of the kinds, for a causal model bpe or unigram, on UTF-8 text with one sentence a line.

    Where the lines are words joined by spaces, `segmented`, no piece crosses a word.

    Raises:
        UserError: no text, or no such vocabulary can be made from it.
    """
    if not any(line.strip() for line in read_lines(files)):
        raise UserError("the input holds no text: every file is empty or blank")
    if tokenizer_type in SENTENCEPIECE_TYPES and not settings.causal:
        return _train_sentencepiece(files, settings, segmented, tokenizer_type.removeprefix("sentencepiece_"))
    ways = {"wordpiece": _train_wordpiece, "character": _train_character, "bpe": _train_bpe}
    trained = ways.get(tokenizer_type, _train_lossless_unigram)(files, settings)
    return replace(trained, pieces=[*trained.pieces, *settings.fill_up(len(trained.pieces))])


def _train_wordpiece(files: Sequence[Path], settings: VocabularySettings) -> Trained:
    """WordPiece: joins of pairs by frequency, `##` before whatever continues a word.

    The trainer of `tokenizers` numbers the `##` characters in the order of a hash table and so gives another
    vocabulary in each run; here they are numbered beforehand.
    """
    room = settings.room()
    words = count_words(files)
    long = Counter({word: count for word, count in words.items() if len(word) > MAX_WORD_CHARACTERS})
    total, in_long = (sum(len(word) * count for word, count in each.items()) for each in (words, long))
    for word in long:
        del words[word]
    if not words:
        raise UserError(
            f"every word of the text is longer than {MAX_WORD_CHARACTERS} characters, for which WordPiece gives its "
            f"unknown token: {LONG_WORDS_ADVICE}"
        )
    characters, inside = count_characters(words), {letter for word in words for letter in word[1:]}
    alphabet = most_frequent(characters, settings.limit_alphabet)
    # Each character takes an entry, and another one where it continues a word.
    entries = itertools.accumulate(1 + (character in inside) for character in alphabet)
    alphabet = sorted(alphabet[: sum(number <= room for number in entries)])
    continued = sorted("##" + character for character in alphabet if character in inside)
    fixed = [*settings.reserved(), *alphabet, *continued]

    model = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(continuing_subword_prefix="##", **_limits(settings, fixed, alphabet))
    if long:  # the time for a word grows with the square of its length
        short = (
            " ".join(word for word in line.split() if len(word) <= MAX_WORD_CHARACTERS) for line in read_lines(files)
        )
        model.train_from_iterator(short, trainer)
    else:
        model.train([str(path) for path in files if path.stat().st_size], trainer)
    pieces = [piece for piece, _ in sorted(model.get_vocab().items(), key=itemgetter(1))]
    return Trained(
        pieces,
        num_characters=len(alphabet),
        num_text_characters=len(characters),
        num_long_words=long.total(),
        long_words_share=in_long / total,
    )


def _train_character(files: Sequence[Path], settings: VocabularySettings) -> Trained:
    """One entry for each of the most frequent characters."""
    characters = count_characters(count_words(files))
    frequent = Counter({key: count for key, count in characters.items() if count >= settings.min_frequency})
    alphabet = most_frequent(frequent, min(settings.limit_alphabet, settings.room()))
    pieces = [*settings.reserved(), *alphabet]
    return Trained(pieces, num_characters=len(alphabet), num_text_characters=len(characters))


def _train_bpe(files: Sequence[Path], settings: VocabularySettings) -> Trained:
    """Byte-level BPE as in GPT-2: no text is unknown, and decoding gives it back."""
    if settings.room() < 256:
        raise UserError(
            f"byte-level BPE needs {settings.size - settings.room() + 256} entries for the 256 bytes and the special "
            f"tokens; --vocab_size is {settings.size}"
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(**_limits(settings, [*settings.reserved(), *alphabet], alphabet))
    model.train_from_iterator(sampled_lines(files), trainer)
    merges = [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    return Trained([piece for piece, _ in sorted(model.get_vocab().items(), key=itemgetter(1))], merges=merges)


def _limits(settings: VocabularySettings, fixed: list[str], alphabet: list[str]) -> dict[str, Any]:
    """What the trainers of `tokenizers` are told: the first entries, and no character beside those of the alphabet."""
    sizes = {"vocab_size": settings.size, "min_frequency": settings.min_frequency, "special_tokens": fixed}
    return {**sizes, "initial_alphabet": alphabet, "limit_alphabet": len(alphabet), "show_progress": False}


def _train_sentencepiece(files: Sequence[Path], settings: VocabularySettings, segmented: bool, kind: str) -> Trained:
    """A model of sentencepiece, trained on word counts, or on a sample of lines of unsegmented text."""
    units = count_words(files) if segmented else Counter(sampled_lines(files))
    seen: Counter[str] = Counter()
    for unit, count in units.items():  # what transformers does to a word before sentencepiece sees it
        for start in range(0, len(unit), MAX_SAMPLE_LINE):  # it would leave longer ones out
            part = unit[start : start + MAX_SAMPLE_LINE]
            seen[" ".join(part.split()).replace("``", '"').replace("''", '"')] += count
    del seen[""]
    characters = count_characters(seen)
    limit = _num_covering(characters, settings.character_coverage) or settings.limit_alphabet
    # The mark of a word's beginning takes an entry too.
    alphabet = most_frequent(characters, min(limit, settings.room() - 1))
    if len(alphabet) < (needed := _num_covering(characters, _LEAST_COVERAGE)):
        raise UserError(
            f"--vocab_size {settings.size} and --limit_alphabet {settings.limit_alphabet} leave {len(alphabet):,} "
            f"characters of this text, but {kind} needs those that are {_LEAST_COVERAGE:.0%} of it: {needed:,} "
            f"characters, so at least --vocab_size {settings.size - settings.room() + 1 + needed}"
            + (f" and --limit_alphabet {needed} (or --character_coverage {_LEAST_COVERAGE})" if limit < needed else "")
        )
    return _run_sentencepiece(seen, settings, characters, alphabet, model_type=kind)


def _num_covering(characters: Counter[str], share: float) -> int:
    """How many of the most frequent characters are this share of the text."""
    sums = itertools.accumulate(characters[each] for each in most_frequent(characters, len(characters)))
    return sum(number < share * characters.total() for number in sums) + (share > 0)


def _run_sentencepiece(
    units: Counter[str],
    settings: VocabularySettings,
    characters: Counter[str],
    alphabet: list[str],
    model_type: str = "unigram",
    **more: Any,
) -> Trained:
    """A vocabulary of sentencepiece, unigram or bpe, from words or lines and how often each occurs.

    Of their characters, also counted, those of the alphabet are kept; `more` are options of sentencepiece's trainer.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    special: dict[str, Any] = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
    special |= dict(zip(("pad_piece", "unk_piece", "bos_piece", "eos_piece"), settings.special_tokens))
    covered = sum(characters[character] for character in alphabet) / characters.total()
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "counts.tsv")
        with table.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{unit}\t{count}\n" for unit, count in sorted(units.items()))
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(table),
                input_format="tsv",
                model_writer=model,
                model_type=model_type,
                vocab_size=settings.size,
                hard_vocab_limit=False,
                character_coverage=1.0 if len(alphabet) == len(characters) else covered,
                normalization_rule_name="identity",
                max_sentence_length=4 * MAX_SAMPLE_LINE + 16,
                num_threads=_SENTENCEPIECE_THREADS,
                **special,
                control_symbols=settings.reserved()[4:],
                minloglevel=2,
                **more,
            )
        except RuntimeError as error:
            raise UserError(
                f"sentencepiece cannot make a {model_type} vocabulary of {settings.size} entries from this text: give "
                "another --vocab_size, or more text"
            ) from error
    proto: Any = getattr(sentencepiece_model_pb2, "ModelProto").FromString(model.getvalue())  # noqa: B009 (made at run time)
    for entry in settings.fill_up(len(proto.pieces)):
        proto.pieces.add(piece=entry, score=0.0, type=proto.SentencePiece.CONTROL)
    proto.trainer_spec.ClearField("input")  # the name of a temporary file
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return Trained(
        [entry.piece for entry in proto.pieces],
        scores=[entry.score for entry in proto.pieces],
        merges=merges_by_score(proto) if model_type == "bpe" else (),
        sentencepiece=proto.SerializeToString(deterministic=True),
        num_characters=len(alphabet),
        num_text_characters=len(characters),
    )


def merges_by_score(proto: Any) -> list[tuple[str, str]]:
    """The joins of a model of sentencepiece: of two neighbours of which it has the whole, by the score of that."""
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    pairs = ((score, piece[:place], piece[place:]) for piece, score in scores.items() for place in range(1, len(piece)))
    merges = [(-score, ids[one], ids[two], (one, two)) for score, one, two in pairs if one in scores and two in scores]
    return [pair for *_, pair in sorted(merges)]


# ---- a lossless unigram vocabulary ----


def _train_lossless_unigram(files: Sequence[Path], settings: VocabularySettings) -> Trained:
    """A unigram vocabulary (arXiv:1804.10959) in which spaces are spaces and rare characters are their bytes.

    The space and printable ASCII are always kept, whether the text has them or not: text that reads like a special
    token or a byte is made of them. Of a text too small for sentencepiece only the characters are kept.
    """
    fixed = settings.size - settings.room() + len(BYTE_PIECES) + 1 + len(PRINTABLE_ASCII)
    if settings.size <= fixed:
        raise UserError(
            f"a lossless unigram vocabulary needs more than {fixed} entries for the special tokens, the 256 bytes and "
            f"printable ASCII; --vocab_size is {settings.size}"
        )
    units = _parts(Counter(sampled_lines(files)), _SENTENCEPIECE_MARKS)
    characters = count_characters(units)
    frequent = most_frequent(characters, min(settings.limit_alphabet, settings.size - fixed))
    kept = {" ", *PRINTABLE_ASCII, *frequent}
    # sentencepiece refuses a text of which the alphabet covers less than 98 %, so it gets that which is covered.
    scores = _train_pieces(_parts(units, characters.keys() - kept), settings)
    # For some texts it leaves out required characters that do not occur. They come last and score below every other
    # piece, and the worst pieces of several characters make room for them, as in a smaller vocabulary.
    missing = sorted(kept - scores.keys())
    lowest = min(scores.values(), default=0.0) - 1.0
    several = sorted((score, piece) for piece, score in scores.items() if len(piece) > 1)
    for _, piece in several[: max(0, len(scores) + len(missing) - settings.room() + len(BYTE_PIECES))]:
        del scores[piece]
    scores |= dict.fromkeys(missing, lowest)
    reserved = [*settings.reserved(), *BYTE_PIECES]
    filling = settings.fill_up(len(reserved) + len(scores))
    return Trained(
        [*reserved, *scores, *filling],
        scores=[*[_NEVER] * len(reserved), *scores.values(), *[_NEVER] * len(filling)],
        num_characters=len(characters.keys() & kept),
        num_text_characters=len(characters),
    )


def _parts(units: Counter[str], separators: Iterable[str]) -> Counter[str]:
    """What stands between the separators, and how often."""
    separator = re.compile("|".join(map(re.escape, sorted(separators))) or "(?!)")
    parts: Counter[str] = Counter()
    for unit, count in units.items():
        for part in separator.split(unit):
            parts[part] += count
    del parts[""]
    return parts


def _train_pieces(units: Counter[str], settings: VocabularySettings) -> dict[str, float]:
    """The ordinary pieces that sentencepiece finds, the best ones first, with the logarithms of their probabilities."""
    characters = count_characters(units)
    if not characters:
        return {}
    spaces = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
    more: dict[str, Any] = {"byte_fallback": True, "required_chars": PRINTABLE_ASCII + "\u2581", **spaces}
    try:
        trained = _run_sentencepiece(units, settings, characters, list(characters), **more)
    except UserError:
        if characters.total() < _LITTLE_TEXT:
            return {}
        raise
    return {
        piece.replace("\u2581", " "): score
        for piece, score in zip(trained.pieces, trained.scores, strict=True)
        if piece not in settings.special_tokens and not (UNUSED.fullmatch(piece) or _READ_AS_BYTE.fullmatch(piece))
    }
