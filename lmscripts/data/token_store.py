"""The token store: a corpus as token ids on disk, memory-mapped, the same for every sequence length and objective.

A store is a folder:

    manifest.json              format version, fingerprints of source and tokenizer, options, counts, file hashes
    tokenizer/                 the tokenizer that made it
    train/, validation/        one folder per part, each with
      tokens.bin               uint16 or uint32, ids of all documents one after the other, no special tokens
      word_starts.bin          one bit per token (little endian), 1 at the first token of a word
      sentence_lengths.bin     uint32, tokens per sentence
      document_tokens.bin      int64 (documents + 1), offset of each document in tokens
      document_sentences.bin   int64 (documents + 1), offset of each document in sentences
      document_bytes.bin       int64, bytes of raw text of each document

Building streams through bounded memory, and the bytes do not depend on the number of worker processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscripts.data.arrays import ArrayWriter, check_hashes, check_sizes, map_array
from lmscripts.errors import UserError
from lmscripts.files import check_once, new_folder, read_json, user_cache
from lmscripts.text.labels import in_words
from lmscripts.text.report import TextReport
from lmscripts.tokenizer.encoder import fingerprint, load_tokenizer
from lmscripts.tokenizer.folder import copy_tokenizer
from lmscripts.workers import in_order

FORMAT_VERSION = 1
_FILES = ("tokens", "word_starts", "sentence_lengths", "document_tokens", "document_sentences", "document_bytes")
_PART = dict.fromkeys(("documents", "sentences", "words", "tokens", "text_bytes"), int)
_PART_FORM = {**_PART, "files": {name: {"bytes": int, "sha256": str} for name in _FILES}}
_FORM = {
    "fingerprint": str,
    "source": {"fingerprint": str, "files": [str]},
    "tokenizer": {"fingerprint": str, "description": str, "vocab_size": int},
    "options": dict,
    "dtype": ("uint16", "uint32"),
    "parts": {"train": _PART_FORM, "validation": _PART_FORM},
    "text": dict,
}
_FEW_DOCUMENTS = 10
_ALONE = 3.0  # seconds, in which a worker loads a tokenizer; a few MB of text are done by then
_BLOCK = 1 << 22  # numbers that are looked at together


@dataclass(frozen=True)
class Part:
    """One part (train or validation) of a store, memory-mapped. N tokens, D documents, S sentences.

    Attributes:
        tokens: (N,) uint16 or uint32.
        word_start_bits: (ceil(N / 8),) uint8, bit i % 8 of byte i // 8 belongs to token i.
        sentence_lengths: (S,) uint32.
        document_tokens: (D + 1,) int64 offsets into `tokens`.
        document_sentences: (D + 1,) int64 offsets into `sentence_lengths`.
        document_bytes: (D,) int64.
    """

    folder: Path
    tokens: NDArray[Any]
    word_start_bits: NDArray[np.uint8]
    sentence_lengths: NDArray[np.uint32]
    document_tokens: NDArray[np.int64]
    document_sentences: NDArray[np.int64]
    document_bytes: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """Number of documents, D."""
        return int(self.document_bytes.size)

    def word_starts(self, start: int, end: int) -> NDArray[np.bool_]:
        """(end - start,) word-start flags of the tokens [start, end)."""
        first = start // 8
        bits = np.unpackbits(self.word_start_bits[first : -(-end // 8)], bitorder="little")
        return bits[start - 8 * first : end - 8 * first].astype(np.bool_)


@dataclass(frozen=True)
class TokenStore:
    """An opened store; see the module's docstring for the layout.

    `whole` is how many times as large the text is of which this store holds a sample.
    """

    folder: Path
    manifest: dict[str, Any]
    whole: float = 1.0

    @property
    def fingerprint(self) -> str:
        """Hash of what the store was made from: source, tokenizer and options."""
        return str(self.manifest["fingerprint"])

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer folder inside the store."""
        return self.folder / "tokenizer"

    def unknown_share(self, name: str = "train") -> float | None:
        """Share of the characters of a part that the tokenizer does not know; None if an older store says nothing."""
        part = self.manifest["parts"][name]
        return part["unknown_characters"] / max(part["characters"], 1) if "unknown_characters" in part else None

    def sentences(self) -> list[str]:
        """What a user should know of its parts."""
        held_out, said = self.manifest["parts"]["validation"], list[str]()
        number = held_out["documents"]
        if trained_on := held_out.get("also_in_training", 0):
            said.append(
                f"warning: {trained_on:,} of the {number:,} held-out documents of {self.folder} are in the training "
                "text too: held-out figures tell less than they seem to"
            )
        if 0 < number < _FEW_DOCUMENTS:
            said.append(
                f"only {number} document{'s are' if number > 1 else ' is'} held out of {self.folder}: held-out figures "
                "speak of such text alone; a larger --validation_fraction, or --validation_file, gives more"
            )
        return said

    def load_tokenizer(self) -> Any:
        """The tokenizer in the store, from transformers.

        Raises:
            UserError: it cannot be loaded, or is not the one that made the store any more.
        """
        tokenizer, made_with = load_tokenizer(self.tokenizer_dir), self.manifest["tokenizer"]["fingerprint"]
        if (found := fingerprint(tokenizer)) != made_with:
            raise UserError(
                f"{self.tokenizer_dir} has the fingerprint {found[:16]}, the store was made with {made_with[:16]}: a "
                "file in it was changed; prepare the store again, or put the tokenizer back that made it"
            )
        return tokenizer

    def part(self, name: str) -> Part:
        """Memory-map one part, "train" or "validation"."""
        folder, described = self.folder / name, self.manifest["parts"][name]
        dtypes = {"tokens": self.manifest["dtype"], "word_starts": "uint8", "sentence_lengths": "uint32"}
        arrays = [
            map_array(folder / f"{file}.bin", np.dtype(dtypes.get(file, "int64")), described["files"][file]["bytes"])
            for file in _FILES
        ]
        return Part(folder, *arrays)


def store_fingerprint(source: str, tokenizer: str, settings: dict[str, Any]) -> str:
    """Fingerprint of a store from those of its source text and tokenizer and the options that change its content."""
    text = json.dumps([FORMAT_VERSION, source, tokenizer, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def open_store(folder: Path, tokenizer_fingerprint: str | None = None) -> TokenStore:
    """Open a store and check that it is whole and made with the expected tokenizer; for the content see `check_store`.

    Raises:
        UserError: no store there, another format version, a damaged manifest, a file missing or of the wrong size,
            another tokenizer.
    """
    manifest_file, way_out = folder / "manifest.json", "prepare the store again"
    if not manifest_file.is_file():
        raise UserError(f"{folder} is not a token store: it has no manifest.json; make one with prepare_corpus.py")
    version = read_json(manifest_file, {"format_version": int}, way_out)["format_version"]
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has store format {version}, this program reads {FORMAT_VERSION}; prepare it again")
    manifest = read_json(manifest_file, _FORM, way_out)
    made_with = manifest["tokenizer"]["fingerprint"]
    if manifest["fingerprint"] != store_fingerprint(manifest["source"]["fingerprint"], made_with, manifest["options"]):
        raise UserError(
            f"{manifest_file} is damaged (its fingerprint is not that of its source, tokenizer and options); {way_out}"
        )
    for name, part in manifest["parts"].items():
        check_sizes(folder / name, _sizes(part, manifest["dtype"]), part["files"], way_out)
    if tokenizer_fingerprint is not None and tokenizer_fingerprint != made_with:
        raise UserError(
            f"the store {folder} was made with the tokenizer {made_with[:16]}, not with {tokenizer_fingerprint[:16]}; "
            "prepare a store with this tokenizer or use the one in the store"
        )
    return TokenStore(folder, manifest)


def _sizes(part: dict[str, Any], dtype: str) -> dict[str, int]:
    """Bytes of each file of a part by its counts."""
    tokens, sentences, documents = (part[name] for name in ("tokens", "sentences", "documents"))
    offsets = 8 * (documents + 1)
    sizes = (np.dtype(dtype).itemsize * tokens, -(-tokens // 8), 4 * sentences, offsets, offsets, 8 * documents)
    return dict(zip(_FILES, sizes, strict=True))


def rows_folders(store: TokenStore) -> list[Path]:
    """Where what is kept beside a store may lie: in it, and where nobody may write there in the user's own cache."""
    rows = store.folder / "rows"
    if os.access(rows if rows.exists() else store.folder, os.W_OK):
        return [rows]
    return [user_cache() / "rows" / store.fingerprint[:16], rows]


def check_store(store: TokenStore) -> None:
    """As `verify_store`, but only where it was not done before on these very files."""
    files = [store.folder / name / f"{file}.bin" for name in store.manifest["parts"] for file in _FILES]
    note = rows_folders(store)[0] / "checked.json"
    check_once(note, [store.folder / "manifest.json", *files], lambda: verify_store(store))


def verify_store(store: TokenStore) -> None:
    """Compare the content of every file with the manifest; a bar on a terminal.

    Raises:
        UserError: names the first file that differs, with both hashes, or what cannot be in a store.
    """
    parts = store.manifest["parts"]
    check_hashes({store.folder / name: part["files"] for name, part in parts.items()}, "prepare the store again")
    for name, facts in parts.items():
        part, entries = store.part(name), store.manifest["tokenizer"]["vocab_size"]
        wrong = "" if _largest(part.tokens) < entries else f"holds ids beyond its {entries:,} entries"
        for file, items in (("document_tokens", facts["tokens"]), ("document_sentences", facts["sentences"])):
            if not _are_offsets(getattr(part, file), items):
                wrong = f"holds {file} that are no offsets"
        if _total(part.document_bytes) != facts["text_bytes"] or _total(part.sentence_lengths) != facts["tokens"]:
            wrong = "has other sums than its manifest says"
        if wrong:
            raise UserError(f"{part.folder} {wrong}: it is damaged; prepare the store again")


def _blocks(array: NDArray[Any], more: int = 0) -> Iterable[NDArray[Any]]:
    return (array[at : at + _BLOCK + more] for at in range(0, array.size, _BLOCK))


def _largest(array: NDArray[Any]) -> int:
    return max((int(block.max()) for block in _blocks(array)), default=0)


def _total(array: NDArray[Any]) -> int:
    return sum(int(block.sum(dtype=np.int64)) for block in _blocks(array))


def _are_offsets(array: NDArray[np.int64], items: int) -> bool:
    return array[0] == 0 and array[-1] == items and all((np.diff(block) >= 0).all() for block in _blocks(array, 1))


# ---- building ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of documents, encoded by a worker.

    Attributes:
        ids: (n,) uint16 or uint32. word_starts: (n,) bool. sentence_lengths: (s,) uint32.
        document_sizes: (d, 5) int64, tokens, sentences, raw bytes, characters but spaces, and how many of these are
            unknown to the tokenizer, of each document.
        in_validation: (d,) bool.
        hashes: (d,) uint64, of the text of each document.
    """

    ids: NDArray[Any]
    word_starts: NDArray[np.bool_]
    sentence_lengths: NDArray[np.uint32]
    document_sizes: NDArray[np.int64]
    in_validation: NDArray[np.bool_]
    hashes: NDArray[np.uint64]


Documents = list[list[str]]


class _Encode:
    """Encodes batches of documents in a worker process, which loads the tokenizer once."""

    def __init__(self, tokenizer_dir: str, dtype: str, validation_fraction: float, line_ends: str | None) -> None:
        self.tokenizer_dir, self.dtype, self.validation_fraction = tokenizer_dir, dtype, validation_fraction
        self.line_end = "\n" if line_ends == "keep" else ""  # encoded behind every line of a document but the last
        self.encoder: Any = None

    def __call__(self, documents: Documents) -> EncodedBatch:
        from lmscripts.tokenizer.encoder import load_encoder, num_filled

        if self.encoder is None:
            self.encoder = load_encoder(self.tokenizer_dir)
        ended = [[line + self.line_end for line in document[:-1]] + document[-1:] for document in documents]
        lines = [line for document in ended for line in document]
        encoded = self.encoder.encode(lines)
        unknown = np.append(0, np.cumsum(self.encoder.unknown_characters(lines, encoded)))
        sentences = np.array([len(document) for document in documents], np.int64)
        token_ends = np.concatenate([[0], np.cumsum(encoded.lengths)])
        sentence_ends = np.cumsum(sentences)
        tokens = token_ends[sentence_ends] - token_ends[sentence_ends - sentences]
        size = [sum(len(line.encode()) + 1 for line in document) for document in documents]
        characters = [sum(map(num_filled, document)) for document in documents]
        unknown = unknown[sentence_ends] - unknown[sentence_ends - sentences]
        hashes = [_hash(document) for document in documents]
        return EncodedBatch(
            encoded.ids.astype(self.dtype),
            encoded.word_starts,
            encoded.lengths.astype(np.uint32),
            np.stack([tokens, sentences, size, characters, np.minimum(unknown, characters)], axis=1),
            np.array([_is_held_out(number, self.validation_fraction) for number in hashes], np.bool_),
            np.array(hashes, np.uint64),
        )


def _hash(document: list[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\n".join(document).encode(), digest_size=8).digest(), "big")


def in_validation(document: list[str], fraction: float) -> bool:
    """Whether a document belongs to the validation part: decided by a hash of its text alone.

    So identical documents fall on the same side, and a document keeps its side when the corpus grows.
    """
    return _is_held_out(_hash(document), fraction)


def _is_held_out(number: int, fraction: float) -> bool:
    return number < fraction * 2**64


class _Overlap:
    """Counts held-out documents that are trained on too; memory for the held-out ones alone."""

    def __init__(self, held_out: list[NDArray[np.uint64]]) -> None:
        self.hashes, self.times = np.unique(np.concatenate([*held_out, np.zeros(0, np.uint64)]), return_counts=True)
        self.seen = np.zeros(self.hashes.size, np.bool_)

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Look at documents of the training part."""
        if self.hashes.size:
            places = np.minimum(np.searchsorted(self.hashes, hashes), self.hashes.size - 1)
            self.seen[places[self.hashes[places] == hashes]] = True

    def documents(self) -> int:
        """Held-out documents that were among them."""
        return int(self.times[self.seen].sum())


class _PartWriter:
    """Appends documents to the files of one part."""

    def __init__(self, folder: Path) -> None:
        self.files = ArrayWriter(folder, _FILES)
        self.totals = np.zeros(5, np.int64)
        self.words = 0
        self.documents = 0
        self.open_bits = np.zeros(0, np.bool_)
        self.files.write("document_tokens", np.zeros(1, np.int64))
        self.files.write("document_sentences", np.zeros(1, np.int64))

    def append(self, batch: EncodedBatch, wanted: NDArray[np.bool_]) -> None:
        """Append the documents of a batch that are wanted, of (d,)."""
        sizes = batch.document_sizes
        of_tokens, of_sentences = np.repeat(wanted, sizes[:, 0]), np.repeat(wanted, sizes[:, 1])
        sizes, word_starts = sizes[wanted], batch.word_starts[of_tokens]
        self.files.write("tokens", batch.ids[of_tokens])
        bits = np.concatenate([self.open_bits, word_starts])
        whole = bits.size // 8 * 8
        self.files.write("word_starts", np.packbits(bits[:whole], bitorder="little"))
        self.open_bits = bits[whole:]
        self.files.write("sentence_lengths", batch.sentence_lengths[of_sentences])
        ends = self.totals + np.cumsum(sizes, axis=0)
        self.files.write("document_tokens", ends[:, 0])
        self.files.write("document_sentences", ends[:, 1])
        self.files.write("document_bytes", sizes[:, 2])
        self.totals = self.totals + sizes.sum(0)
        self.words += int(word_starts.sum())
        self.documents += len(sizes)

    def close(self) -> dict[str, Any]:
        """Finish the files; returns the manifest's entry of this part."""
        self.files.write("word_starts", np.packbits(self.open_bits, bitorder="little"))
        tokens, sentences, size, characters, unknown = (int(total) for total in self.totals)
        return {
            "documents": self.documents,
            "sentences": sentences,
            "words": self.words,
            "tokens": tokens,
            "text_bytes": size,
            "characters": characters,
            "unknown_characters": unknown,
            "files": self.files.close(),
        }


def _no_tokens(documents: dict[str, int], files: list[str], report: dict[str, Any]) -> UserError:
    if documents["train"]:
        return UserError(f"the tokenizer makes no token of the {documents['train']:,} documents of the text")
    if documents["validation"]:
        return UserError(f"all {documents['validation']:,} documents fell to the validation part, none is for training")
    left_out = TextReport.from_dict(report).sentences()[1:] if report else []
    empty = f"{in_words(files)} {'is' if len(files) == 1 else 'are'} empty: no line with text"
    return UserError("; ".join([empty, *left_out]))


def build_store(
    folder: Path,
    batches: Iterable[Documents],
    *,
    tokenizer_dir: Path,
    described: dict[str, Any],
    validation_batches: Iterable[Documents] | None = None,
    num_workers: int = 1,
    text_report: Callable[[], dict[str, Any]] = dict,
    place: Callable[[Documents], Callable[[], str]] = lambda batch: str,
    progress: Callable[[int], None] = lambda _: None,
) -> TokenStore:
    """Encode documents into a store, written aside and renamed when it is whole.

    Args:
        folder: where the store will be; it must not exist.
        batches: lists of documents, each a list of lines, in the order of the corpus.
        tokenizer_dir: tokenizer folder, copied into the store.
        described: what the manifest says of "fingerprint", "source", "tokenizer" and "options". By these
            "validation_fraction" of the documents is held out by a hash, and "line_ends": "keep" encodes all lines of a
            document but the last with their line feed.
        validation_batches: documents of a validation part of their own.
        num_workers: processes that encode; the result does not depend on it.
        text_report: called at the end; what was read, repaired and dropped.
        place: see `in_order`.
        progress: called with the bytes of text of each finished batch.

    Raises:
        UserError: the folder exists, or no document was left for training.
    """
    dtype, settings = "uint16" if described["tokenizer"]["vocab_size"] <= 1 << 16 else "uint32", described["options"]
    with new_folder(folder) as aside:
        train, validation = _PartWriter(aside / "train"), _PartWriter(aside / "validation")

        def encoded(documents: Iterable[Documents], fraction: float) -> Iterator[EncodedBatch]:
            encode = _Encode(str(tokenizer_dir), dtype, fraction, settings.get("line_ends"))
            return in_order(encode, documents, num_workers, place=place, alone=_ALONE)

        held_out = []
        for batch in () if validation_batches is None else encoded(validation_batches, 1.0):
            validation.append(batch, batch.in_validation)
            held_out.append(batch.hashes)
        overlap = _Overlap(held_out)
        for batch in encoded(batches, settings["validation_fraction"]):
            train.append(batch, ~batch.in_validation)
            validation.append(batch, batch.in_validation)
            overlap.add(batch.hashes)
            progress(int(batch.document_sizes[:, 2].sum()))
        parts = {"train": train.close(), "validation": validation.close()}
        if trained_on := overlap.documents():
            parts["validation"]["also_in_training"] = trained_on
        if parts["train"]["tokens"] == 0:
            documents = {name: part["documents"] for name, part in parts.items()}
            raise _no_tokens(documents, described["source"]["files"], text_report())
        copy_tokenizer(tokenizer_dir, aside / "tokenizer")
        manifest = {"format": "lmscripts token store", "format_version": FORMAT_VERSION, "dtype": dtype}
        manifest |= described | {"parts": parts, "text": text_report()}
        text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True)
        (aside / "manifest.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    return open_store(folder)
