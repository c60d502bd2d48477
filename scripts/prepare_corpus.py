"""Turn text and a tokenizer into a token store, which every pretraining run can read.

python scripts/prepare_corpus.py --input_file corpus.txt --tokenizer_dir tokenizer --output_dir store
python scripts/prepare_corpus.py --inspect store

Text: .txt (one sentence a line, blank line between documents), .jsonl, .csv, .tsv, .parquet, each also .gz .xz .bz2
.zst; files, globs and folders. The store serves every sequence length and objective.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmscripts.errors import UserError, user_errors
from lmscripts.files import command
from lmscripts.options import PREPARATION, check_numbers, option, parse_options_with_origin

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmscripts.data.token_store import TokenStore


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    input_file: tuple[str, ...] = option((), help="text files, globs, folders, or hub:NAME[@REVISION]")
    tokenizer_dir: str | None = option(None, help="tokenizer folder, from train_tokenizer.py, or a Hub name")
    output_dir: str | None = option(None, help="where the store will be", writes="folder")
    num_workers: int = option(2, help="processes that tokenise; the store does not depend on it", most=1024)
    validation_fraction: float = option(0.01, help="share of the documents held out, by a hash of their text")
    validation_file: tuple[str, ...] = option((), help="held-out text of its own instead")
    max_documents: int | None = option(None, help="read no more than so many documents")
    document_per_line: bool = option(False, help=".txt files hold one document a line, not one sentence")
    text_column: str = option("text", help="column of tables and JSON lines that holds the text")
    delimiter: str | None = option(None, help="of csv and tsv; default: found in the header")
    quotes: bool = option(True, help="csv: a field may stand in double quotes")
    input_format: Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None = option(
        None, help="of every file; default: by its name, and JSON lines by their content"
    )
    line_ends: Literal["keep", "drop"] | None = option(
        None,
        help="and white space around lines: for the model to learn or not; default: keep if the tokenizer is causal",
    )
    inspect: str | None = option(None, help="print counts and rows of this store, check its hashes, and exit")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is read."""
        check_numbers(vars(self), positive=("max_documents",), not_negative=("num_workers",))


def main() -> None:
    """Parse, then build or inspect."""
    options, origins = parse_options_with_origin(Options, description=__doc__ or "", **PREPARATION)
    with user_errors(only_words=True):
        if options.inspect is not None:
            if ignored := [n for n, origin in origins.items() if origin == "command line" and n != "inspect"]:
                raise UserError(f"--{ignored[0]} has no effect with --inspect, which only looks")
            inspect(Path(options.inspect))
        else:
            build(options)


def build(options: Options) -> None:
    """Build the store, or say that it is there already."""
    given = {"--input_file": options.input_file, "--tokenizer_dir": options.tokenizer_dir}
    given["--output_dir"] = options.output_dir
    if missing := [name for name, value in given.items() if not value]:
        raise UserError(f"{missing[0]} is missing (or give --inspect STORE)")
    from lmscripts.data.preparation import Source, prepare_store
    from lmscripts.text.records import corpus_table
    from lmscripts.text.report import TextReport
    from lmscripts.tokenizer.encoder import find_tokenizer

    source = Source(
        input_files=options.input_file,
        tokenizer_dir=find_tokenizer(str(options.tokenizer_dir)),
        validation_fraction=options.validation_fraction,
        validation_files=options.validation_file,
        max_documents=options.max_documents,
        document_per_line=options.document_per_line,
        table=corpus_table(options.text_column, options.delimiter, options.quotes, options.input_format),
        line_ends=options.line_ends,
    )
    output, began = Path(str(options.output_dir)), time.monotonic()
    there = output.exists()
    with progress_bar() as progress:
        store = prepare_store(source, output, options.num_workers, progress)
    seconds = time.monotonic() - began
    parts = store.manifest["parts"]
    size = sum(part["text_bytes"] for part in parts.values())
    if there:
        print(f"{output} holds this text with this tokenizer and these options already; nothing was done")
    else:
        print(f"{size / 1e6:,.1f} MB of text in {seconds:,.1f} s, {size / 1e6 / seconds:,.2f} MB/s")
        for sentence in TextReport.from_dict(store.manifest["text"]).sentences():
            print(sentence)
    print_parts(store)
    print("".join(f"{sentence}\n" for sentence in store.sentences()), end="")
    if parts["validation"]["documents"] == 0 and options.validation_fraction > 0 and not options.validation_file:
        print(
            f"no document fell into the validation part at --validation_fraction {options.validation_fraction}: "
            "training on this store will have no held-out figures"
        )
    family = "bert"
    if store.manifest["options"].get("line_ends") == "keep":
        family = "gpt2"
        print("lines are in the store as they stand, with their white space and line feeds")
    print(
        f"next: {command('run_pretraining')} --dataset_dir {output} --model_type {family}-tiny "
        f"--model_dir runs/{family}"
    )


@contextmanager
def progress_bar() -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a plain line every ten seconds elsewhere."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(unit="B", unit_scale=True, disable=not terminal) as bar:
        done, said = 0, time.monotonic()

        def progress(size: int) -> None:
            nonlocal done, said
            bar.update(size)
            done += size
            if not terminal and time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"{done / 1e6:,.1f} MB of text tokenised", file=sys.stderr, flush=True)

        yield progress


def print_parts(store: TokenStore) -> None:
    """A table of what is in a store; "unknown" is the share of characters that the tokenizer does not know."""
    names = ("documents", "sentences", "words", "tokens", "text_bytes")
    print(f"{'part':<12}" + "".join(f"{name:>14}" for name in names) + f"{'unknown':>10}")
    for part, facts in store.manifest["parts"].items():
        share = store.unknown_share(part)
        shown = "-" if share is None else f"{share:.2%}"
        print(f"{part:<12}" + "".join(f"{facts[name]:>14,}" for name in names) + f"{shown:>10}")
    if (share := store.unknown_share()) is not None and share > 0.01:
        print(
            f"warning: {share:.1%} of the characters are unknown to the tokenizer; its unknown token stands for them "
            "in the store: train a tokenizer on text of this kind (train_tokenizer.py; unigram cuts long words, too)"
        )


def inspect(folder: Path) -> None:
    """Print counts and some text of a store and check every hash."""
    from lmscripts.data.token_store import open_store, verify_store
    from lmscripts.tokenizer.report import readable_pieces

    store = open_store(folder)
    manifest = store.manifest
    print(f"store        {store.fingerprint[:16]}, ids as {manifest['dtype']}")
    print(f"tokenizer    {manifest['tokenizer']['fingerprint'][:16]}, {manifest['tokenizer']['description']}")
    print(f"source       {manifest['source']['fingerprint'][:16]}, {len(manifest['source']['files'])} files")
    print_parts(store)
    print("".join(f"{sentence}\n" for sentence in store.sentences()), end="")
    tokenizer = store.load_tokenizer()
    part = store.part("train")
    print("\nthe first tokens of a few documents, | before each word:")
    for document in sorted({0, part.num_documents // 2, part.num_documents - 1}):
        start = int(part.document_tokens[document])
        end = min(int(part.document_tokens[document + 1]), start + 40)
        pieces = readable_pieces(tokenizer, part.tokens[start:end].tolist())
        starts = part.word_starts(start, end)
        text = "".join(("|" if begins else "·") + piece for piece, begins in zip(pieces, starts, strict=True))
        print(f"document {document}: {text}")
    verify_store(store)
    print("\nevery file has the hash that the manifest states")


if __name__ == "__main__":
    main()
