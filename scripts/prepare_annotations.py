"""Turn annotated decisions into a decision store, which every training run of a policy can read.

python scripts/prepare_annotations.py --input_file annotations --output_dir decisions
python scripts/prepare_annotations.py --input_file annotations --inspect 3
python scripts/prepare_annotations.py --output_dir decisions --inspect

Text: a decision a line, as a schema says (kanachan-v1, or a JSON file of your own); files, patterns and folders, each
file also .gz .xz .bz2 .zst. The store depends on the text alone, not on its files or the number of processes.
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
from lmscripts.options import check_numbers, check_useless, option, parse_options_with_origin

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmscripts.data.decision_preparation import DecisionSource
    from lmscripts.data.decisions import DecisionPart, DecisionStore
    from lmscripts.data.schema import Schema

SHOWN = 3
RENAMED = {
    "training_data": "input_file",
    "validation_data": "validation_file",
    "validation_fraction": "validation_share",
}


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    input_file: tuple[str, ...] = option((), help="text files, patterns or folders")
    output_dir: str | None = option(None, help="where the store will be", writes="folder")
    schema: str = option("kanachan-v1", help="what the columns are: kanachan-v1, kanachan-v2 or a JSON file")
    num_workers: int = option(2, help="processes that parse; the store does not depend on it", most=1024)
    validation_share: float | None = option(None, help="share of the games held out by a hash of their id; 0.01")
    validation_file: tuple[str, ...] = option((), help="held-out text of its own instead")
    keep_duplicates: bool = option(False, help="keep decisions that a game has more than once (one for each winner)")
    on_bad_row: Literal["skip", "fail"] = option("skip", help="leave bad lines out and count them, or stop")
    inspect: bool | int = option(False, help=f"print so many records in words ({SHOWN} without a number), and exit")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is read."""
        check_numbers(vars(self), not_negative=("num_workers", "inspect"))
        if self.validation_file:
            check_useless(vars(self), "with --validation_file", "validation_share")


def main() -> None:
    """Parse, then build or inspect."""
    options, origins = parse_options_with_origin(Options, description=__doc__ or "", renamed=RENAMED)
    with user_errors(only_words=True):
        if not options.input_file and (options.inspect is False or not options.output_dir):
            raise UserError("--input_file is missing (or give --output_dir STORE --inspect)")
        if options.inspect is not False:
            used = ("inspect", *(("input_file", "schema", "on_bad_row") if options.input_file else ("output_dir",)))
            if ignored := [n for n, origin in origins.items() if origin == "command line" and n not in used]:
                raise UserError(f"--{ignored[0]} has no effect with --inspect, which only looks")
            inspect(options, SHOWN if options.inspect is True else options.inspect)
            return
        if not options.output_dir:
            raise UserError("--output_dir is missing")
        build(options)


def source_of(options: Options) -> DecisionSource:
    """What the store is made of."""
    from lmscripts.data.decision_preparation import DecisionSource
    from lmscripts.data.schema import load_schema

    return DecisionSource(
        input_files=options.input_file,
        schema=load_schema(options.schema),
        validation_share=0.01 if options.validation_share is None else options.validation_share,
        validation_files=options.validation_file,
        keep_duplicates=options.keep_duplicates,
        on_bad_row=options.on_bad_row,
    )


def build(options: Options) -> None:
    """Build the store, or say that it is there already."""
    from lmscripts.data.decision_preparation import prepare_decisions
    from lmscripts.text.report import TextReport

    output, began, report = Path(str(options.output_dir)), time.monotonic(), TextReport()
    source, there = source_of(options), output.exists()
    with progress_bar() as progress:
        store = prepare_decisions(source, output, options.num_workers, report, progress)
    seconds, parts = time.monotonic() - began, store.manifest["parts"]
    if there:
        print(f"{output} holds this text with this schema and these options already; nothing was done")
    else:
        records = sum(part["records"] + part["duplicates"] for part in parts.values())
        print(f"{report.num_bytes / 1e6:,.1f} MB of text in {seconds:,.1f} s, {records / seconds:,.0f} records/s")
        print("".join(f"{sentence}\n" for sentence in report.sentences()[1:]), end="")
    print_parts(store)
    print("".join(f"{sentence}\n" for sentence in store.sentences()), end="")
    if not parts["validation"]["records"] and source.validation_share > 0:
        print(
            f"no game fell into the validation part at --validation_share {source.validation_share}: training on this "
            "store will have no held-out figures"
        )
    print(f"next: {command('train_policy')} --training-data {output} --output-prefix runs")


@contextmanager
def progress_bar() -> Iterator[Callable[[int], None]]:
    """A bar on a terminal."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        yield lambda size: bar.update(size) and None


def print_parts(store: DecisionStore) -> None:
    """A table of what is in a store."""
    names = ("records", "games", "tokens", "duplicates")
    print(f"{'part':<12}" + "".join(f"{name:>14}" for name in names))
    for part, facts in store.manifest["parts"].items():
        print(f"{part:<12}" + "".join(f"{facts[name]:>14,}" for name in names))


def inspect(options: Options, number: int) -> None:
    """Print records of text, or of a store whose hashes are checked, in words."""
    from lmscripts.data.decision_preparation import first_records
    from lmscripts.data.decisions import open_decisions, verify_decisions
    from lmscripts.text.report import TextReport

    if options.input_file:
        source, report = source_of(options), TextReport()
        print_records(first_records(source, number, report), number, source.schema)
        print("".join(f"{sentence}\n" for sentence in report.sentences()[1:]), end="")
        return
    store = open_decisions(Path(str(options.output_dir)))
    print(f"store        {store.fingerprint[:16]}, schema {store.schema.name}")
    print_parts(store)
    print("".join(f"{sentence}\n" for sentence in store.sentences()), end="")
    print_records(store.part("train"), number, store.schema)
    verify_decisions(store)
    print("\nevery file has the hash that the manifest states")


def print_records(part: DecisionPart, number: int, schema: Schema) -> None:
    """Print some records of a part, from all over it."""
    from lmscripts.data.decisions import record_in_words

    shown = min(number, part.num_records)
    for row in (place * part.num_records // shown for place in range(shown)):
        print(f"\nrecord {row} of {part.num_records:,}, {schema.name}")
        print("\n".join(f"  {line}" for line in record_in_words(part, row, schema)))


if __name__ == "__main__":
    main()
