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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmscripts.errors import UserError
from lmscripts.files import file_sha256, new_folder
from lmscripts.text.records import in_words
from lmscripts.text.report import TextReport
from lmscripts.tokenizer.folder import copy_tokenizer
from lmscripts.workers import in_order

FORMAT_VERSION = 1
_FILES = ("tokens", "word_starts", "sentence_lengths", "document_tokens", "document_sentences", "document_bytes")


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
    """An opened store; see the module's docstring for the layout."""

    folder: Path
    manifest: dict[str, Any]

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

    def part(self, name: str) -> Part:
        """Memory-map one part, "train" or "validation"."""
        folder, described = self.folder / name, self.manifest["parts"][name]
        dtypes = {"tokens": self.manifest["dtype"], "word_starts": "uint8", "sentence_lengths": "uint32"}
        arrays = [
            _map(folder / f"{file}.bin", np.dtype(dtypes.get(file, "int64")), described["files"][file]["bytes"])
            for file in _FILES
        ]
        return Part(folder, *arrays)


def _map(path: Path, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Memory-map a file; an empty file, which cannot be mapped, gives an empty array."""
    if size == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))  # as a plain array, which numpy indexes faster


def store_fingerprint(source: str, tokenizer: str, settings: dict[str, Any]) -> str:
    """Fingerprint of a store from those of its source text and tokenizer and the options that change its content."""
    text = json.dumps([FORMAT_VERSION, source, tokenizer, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def open_store(folder: Path, tokenizer_fingerprint: str | None = None) -> TokenStore:
    """Open a store and check that it is whole and made with the expected tokenizer.

    Raises:
        UserError: no store there, another format version, a file missing or of the wrong size, another tokenizer.
    """
    manifest_file = folder / "manifest.json"
    if not manifest_file.is_file():
        raise UserError(f"{folder} is not a token store: it has no manifest.json; make one with prepare_corpus.py")
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        described = {name: part["files"] for name, part in manifest["parts"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest_file} is damaged ({error}); prepare the store again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has store format {version}, this program reads {FORMAT_VERSION}; prepare it again")
    for name, files in described.items():
        for file, facts in files.items():
            path = folder / name / f"{file}.bin"
            size = path.stat().st_size if path.is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path} {found}, the manifest says {facts['bytes']} bytes; prepare the store again")
    made_with = manifest["tokenizer"]["fingerprint"]
    if tokenizer_fingerprint is not None and tokenizer_fingerprint != made_with:
        raise UserError(
            f"the store {folder} was made with the tokenizer {made_with[:16]}, not with {tokenizer_fingerprint[:16]}; "
            "prepare a store with this tokenizer or use the one in the store"
        )
    return TokenStore(folder, manifest)


def verify_store(store: TokenStore) -> None:
    """Compare the hash of every file with the manifest.

    Raises:
        UserError: names the first file that differs, with both hashes.
    """
    for name, part in store.manifest["parts"].items():
        for file, facts in part["files"].items():
            path = store.folder / name / f"{file}.bin"
            found = file_sha256(path)
            if found != facts["sha256"]:
                raise UserError(
                    f"{path} has hash {found[:16]}, the manifest says {facts['sha256'][:16]}: it is damaged"
                )


# ---- building ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedBatch:
    """A batch of documents, encoded by a worker.

    Attributes:
        ids: (n,) uint16 or uint32. word_starts: (n,) bool. sentence_lengths: (s,) uint32.
        document_sizes: (d, 5) int64, tokens, sentences, raw bytes, characters but spaces, and how many of these are
            unknown to the tokenizer, of each document.
        in_validation: (d,) bool.
    """

    ids: NDArray[Any]
    word_starts: NDArray[np.bool_]
    sentence_lengths: NDArray[np.uint32]
    document_sizes: NDArray[np.int64]
    in_validation: NDArray[np.bool_]


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
        return EncodedBatch(
            encoded.ids.astype(self.dtype),
            encoded.word_starts,
            encoded.lengths.astype(np.uint32),
            np.stack([tokens, sentences, size, characters, np.minimum(unknown, characters)], axis=1),
            np.array([in_validation(document, self.validation_fraction) for document in documents], np.bool_),
        )


def in_validation(document: list[str], fraction: float) -> bool:
    """Whether a document belongs to the validation part: decided by a hash of its text alone.

    So identical documents fall on the same side, and a document keeps its side when the corpus grows.
    """
    if fraction <= 0:
        return False
    digest = hashlib.blake2b("\n".join(document).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class _PartWriter:
    """Appends documents to the files of one part."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in _FILES}
        self.hashes = {name: hashlib.sha256() for name in _FILES}
        self.sizes = dict.fromkeys(_FILES, 0)
        self.totals = np.zeros(5, np.int64)
        self.words = 0
        self.documents = 0
        self.open_bits = np.zeros(0, np.bool_)
        self._write("document_tokens", np.zeros(1, np.int64))
        self._write("document_sentences", np.zeros(1, np.int64))

    def _write(self, name: str, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array).tobytes()
        self.files[name].write(data)
        self.hashes[name].update(data)
        self.sizes[name] += len(data)

    def append(self, batch: EncodedBatch, wanted: NDArray[np.bool_]) -> None:
        """Append the documents of a batch that are wanted, of (d,)."""
        sizes = batch.document_sizes
        of_tokens, of_sentences = np.repeat(wanted, sizes[:, 0]), np.repeat(wanted, sizes[:, 1])
        sizes, word_starts = sizes[wanted], batch.word_starts[of_tokens]
        self._write("tokens", batch.ids[of_tokens])
        bits = np.concatenate([self.open_bits, word_starts])
        whole = bits.size // 8 * 8
        self._write("word_starts", np.packbits(bits[:whole], bitorder="little"))
        self.open_bits = bits[whole:]
        self._write("sentence_lengths", batch.sentence_lengths[of_sentences])
        ends = self.totals + np.cumsum(sizes, axis=0)
        self._write("document_tokens", ends[:, 0])
        self._write("document_sentences", ends[:, 1])
        self._write("document_bytes", sizes[:, 2])
        self.totals = self.totals + sizes.sum(0)
        self.words += int(word_starts.sum())
        self.documents += len(sizes)

    def close(self) -> dict[str, Any]:
        """Finish the files; returns the manifest's entry of this part."""
        self._write("word_starts", np.packbits(self.open_bits, bitorder="little"))
        for file in self.files.values():
            file.close()
        tokens, sentences, size, characters, unknown = (int(total) for total in self.totals)
        return {
            "documents": self.documents,
            "sentences": sentences,
            "words": self.words,
            "tokens": tokens,
            "text_bytes": size,
            "characters": characters,
            "unknown_characters": unknown,
            "files": {n: {"bytes": self.sizes[n], "sha256": self.hashes[n].hexdigest()} for n in _FILES},
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
        encode = _Encode(str(tokenizer_dir), dtype, settings["validation_fraction"], settings.get("line_ends"))
        for batch in in_order(encode, batches, num_workers, place=place):
            train.append(batch, ~batch.in_validation)
            validation.append(batch, batch.in_validation)
            progress(int(batch.document_sizes[:, 2].sum()))
        if validation_batches is not None:
            encode = _Encode(str(tokenizer_dir), dtype, 1.0, settings.get("line_ends"))
            for batch in in_order(encode, validation_batches, num_workers, place=place):
                validation.append(batch, batch.in_validation)
        parts = {"train": train.close(), "validation": validation.close()}
        if parts["train"]["tokens"] == 0:
            documents = {name: part["documents"] for name, part in parts.items()}
            raise _no_tokens(documents, described["source"]["files"], text_report())
        copy_tokenizer(tokenizer_dir, aside / "tokenizer")
        manifest = {
            "format": "lmscripts token store",
            "format_version": FORMAT_VERSION,
            **described,
            "dtype": dtype,
            "parts": parts,
            "text": text_report(),
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True)
        (aside / "manifest.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    return open_store(folder)
