"""From text files and a tokenizer to a token store, or to the one that was made of them before."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lmscripts.data.token_store import Documents, TokenStore, build_store, open_store, store_fingerprint
from lmscripts.errors import UserError
from lmscripts.files import built_once, remove_leftovers
from lmscripts.text.corpus import (
    HUB,
    Span,
    batches,
    find_files,
    is_plain,
    plan_spans,
    read_documents,
    source_fingerprint,
)
from lmscripts.text.reading import format_of
from lmscripts.text.records import TEXTS, TableOptions
from lmscripts.text.report import TextReport
from lmscripts.tokenizer.encoder import Encoder, load_encoder
from lmscripts.tokenizer.report import keeps_line_feeds

_SAMPLE_BYTES = 4 << 20


@dataclass(frozen=True)
class Source:
    """What a store is made of.

    Attributes:
        input_files: files, globs or folders of text.
        tokenizer_dir: tokenizer folder.
        validation_fraction: share of documents held out by hash; ignored when there are validation files.
        validation_files: text of its own for the validation part.
        max_documents: read no more than so many documents of the input.
        document_per_line: .txt files hold one document a line instead of one sentence.
        table: how tables and JSON lines are read: column of the text, delimiter, quotes; and the format of all files.
        line_ends: "keep" encodes every line of a document as it stands, with the white space around it, and all but
            the last with their line feed; "drop" encodes lines alone. None keeps for a tokenizer without a mask token
            that gives line feeds back.
    """

    input_files: tuple[str, ...]
    tokenizer_dir: Path
    validation_fraction: float = 0.01
    validation_files: tuple[str, ...] = ()
    max_documents: int | None = None
    document_per_line: bool = False
    table: TableOptions = TEXTS
    line_ends: Literal["keep", "drop"] | None = None

    def options(self, encoder: Encoder) -> dict[str, Any]:
        """The options that change the content of the store; of `line_ends` only what is not "drop".

        Raises:
            UserError: line ends are to be kept by a tokenizer that loses them.
        """
        options = {
            "validation_fraction": 0.0 if self.validation_files else self.validation_fraction,
            "max_documents": self.max_documents,
            "document_per_line": self.document_per_line,
            "text_column": self.table.text,
        }
        for name in ("delimiter", "quotes", "format"):
            if (value := getattr(self.table, name)) != getattr(TEXTS, name):  # earlier stores know none of them
                options[name] = value
        keep = self.line_ends == "keep" or (self.line_ends is None and encoder.mask_id is None)
        if not keep:
            return options
        if not keeps_line_feeds(encoder):
            if self.line_ends is None:
                return options
            raise UserError(
                f"--line_ends keep: the tokenizer in {encoder.folder} does not give a line feed back; take --line_ends "
                "drop, or a tokenizer that was made with --objective causal"
            )
        return options | {"line_ends": "keep", "spaces": "keep"}


def describe_source(source: Source, *, sample: bool = False) -> dict[str, Any]:
    """What the manifest of the store that a source would give says of it; for a `sample`, the text is not hashed.

    Returns:
        The "fingerprint" of the store; facts of its "source" and its "tokenizer", with fingerprints of their own; the
        "options" that change its content.

    Raises:
        UserError: a file is missing or unreadable, the tokenizer does not load or does not suit the options, the
            fraction is not in [0, 1).
    """
    if not 0 <= source.validation_fraction < 1:
        raise UserError(f"--validation_fraction must be at least 0 and less than 1, got {source.validation_fraction}")
    train = find_files(source.input_files)
    held_out = find_files(source.validation_files) if source.validation_files else []
    encoder = load_encoder(str(source.tokenizer_dir))
    texts = ["sample" if sample else source_fingerprint(files) for files in (train, held_out) if files]
    text: dict[str, Any] = {
        "fingerprint": texts[0] if len(texts) == 1 else hashlib.sha256(" ".join(texts).encode()).hexdigest(),
        "files": [_name(path) for path in train],
        "validation_files": [_name(path) for path in held_out],
    }
    tokenizer = {
        "fingerprint": encoder.fingerprint,
        "description": encoder.description,
        "vocab_size": encoder.vocab_size,
    }
    options = source.options(encoder)
    if records := [path.name for path in (*train, *held_out) if _is_seen_as_records(path, source)]:
        options["json_lines"] = records  # an earlier store would have their braces as text
    found = store_fingerprint(text["fingerprint"], encoder.fingerprint, options)
    return {"fingerprint": found, "source": text, "tokenizer": tokenizer, "options": options}


def _name(path: Path) -> str:
    return str(path) if str(path).startswith(HUB) else path.name


def _is_seen_as_records(path: Path, source: Source) -> bool:
    named = source.table.format or format_of(path)[0] != "txt"
    return not named and not str(path).startswith(HUB) and not is_plain(str(path))


def _documents(spans: Sequence[Span], source: Source, keep_spaces: bool, report: TextReport) -> Iterator[Documents]:
    documents = read_documents(
        spans,
        report,
        source.table,
        document_per_line=source.document_per_line,
        keep_spaces=keep_spaces,
    )
    return batches(islice(documents, source.max_documents))


def prepare_store(
    source: Source, folder: Path, num_workers: int, progress: Callable[[int], None] = lambda _: None
) -> TokenStore:
    """Build the store of a source in `folder`, or open it if it stands there already.

    Raises:
        UserError: another store or anything else is at `folder`, or the source is unusable.
    """
    described = describe_source(source)
    if folder.exists():
        store = open_store(folder, described["tokenizer"]["fingerprint"])
        if store.fingerprint != described["fingerprint"]:
            raise UserError(
                f"the store {folder} was made from another text or with other options (its fingerprint is "
                f"{store.fingerprint[:16]}, this text and these options give {described['fingerprint'][:16]}); choose "
                "another folder"
            )
        return store
    remove_leftovers(folder)
    report = TextReport()
    held_out = find_files(source.validation_files, report) if source.validation_files else None
    keep_spaces = described["options"].get("spaces") == "keep"
    return build_store(
        folder,
        _documents(_spans(find_files(source.input_files, report)), source, keep_spaces, report),
        tokenizer_dir=source.tokenizer_dir,
        described=described,
        validation_batches=None if held_out is None else _documents(_spans(held_out), source, keep_spaces, report),
        num_workers=num_workers,
        text_report=report.as_dict,
        place=lambda batch: f"up to {report.at()}".__str__,
        progress=progress,
    )


def prepare_sample(source: Source) -> TokenStore:
    """A store of about 4 MB from 100 places of a source, or of a file where files cannot be cut; gone with the process.

    Raises:
        UserError: as `prepare_store`.
    """
    described = describe_source(source, sample=True)
    files, table = find_files(source.input_files), source.table
    plan = plan_spans(files, 100, document_per_line=source.document_per_line, input_format=table.format)
    places = [spans for spans in plan if spans]
    sizes = [sum((span.end or os.path.getsize(span.path)) - span.start for span in spans) for spans in places]
    every = max(1, round(sum(sizes) / _SAMPLE_BYTES))
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    spans = [span for spans in places[::every] for span in spans]
    keep_spaces = described["options"].get("spaces") == "keep"
    store = build_store(
        folder / "sample",
        _documents(spans, source, keep_spaces, TextReport()),
        tokenizer_dir=source.tokenizer_dir,
        described=described,
        num_workers=1,
    )
    return replace(store, whole=sum(sizes) / sum(sizes[::every]))


def _spans(files: Sequence[Path]) -> list[Span]:
    return [Span(str(path)) for path in files]


def prepare_beside(source: Source, run_dir: Path, num_workers: int) -> TokenStore:
    """The store of a source, beside a run's folder under a name with its fingerprint; see `files.built_once`."""
    folder = run_dir.parent / f"token_store-{describe_source(source)['fingerprint'][:12]}"
    return built_once(folder, lambda: prepare_store(source, folder, num_workers), lambda: open_store(folder))
