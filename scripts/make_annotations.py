"""Write made-up decisions whose choices follow a rule that can be learnt, to try the policy scripts without data.

python scripts/make_annotations.py --output_file made.txt --num_records 20000 --rule sequence
python scripts/make_annotations.py --output_file answers.txt --schema sample_data/offered_answers.json

Record number n of a seed is always the same, so a large set can be made in parts: `--first_record` on each machine.
Rules and schemas: docs/policy.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmscripts.errors import UserError, user_errors
from lmscripts.options import check_numbers, option, parse_options

if TYPE_CHECKING:
    from lmscripts.data.schema import Schema

RECORDS_AT_ONCE = 8192


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    output_file: str = option(help="text, one record a line", short="o", writes="file")
    num_records: int = option(10_000, help="records to write")
    rule: Literal["draw", "numeric", "sequence", "random"] = option(
        "draw", help="what decides: an entry of the set, two numbers, the first event, or chance"
    )
    schema: str = option("kanachan-v1", help="name of a built-in schema, or a JSON file")
    seed: int = option(1, help="of everything; another one makes other records")
    first_record: int = option(0, help="number of the first one")
    num_workers: int = option(1, help="processes; the records do not depend on it", most=1024)
    overwrite: bool = option(False, help="replace the output file")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is written."""
        check_numbers(vars(self), positive=("num_records",), not_negative=("first_record", "num_workers"))


def main() -> None:
    """Parse, then write blocks of records in their order."""
    options = parse_options(Options, description=__doc__ or "")
    with user_errors(only_words=True):
        write(options)


def write(options: Options) -> None:
    """Write the whole file, or none."""
    from lmscripts.data.schema import load_schema
    from lmscripts.files import new_text
    from lmscripts.text.reading import format_of
    from lmscripts.workers import in_order

    path = Path(options.output_file)
    if compression := format_of(path.name)[1]:
        raise UserError(f"{path} would be text under a name that ends with {compression}: write it, then compress it")
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} exists already; nothing was changed. Give another name, or --overwrite")
    schema = load_schema(options.schema)
    made = partial(text_of, schema, options.seed, options.rule)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_text(path) as file:
        for text in in_order(made, blocks(options.first_record, options.num_records), options.num_workers):
            file.write(text)
    print(f"{options.num_records:,} records of {schema.name} by the rule {options.rule} are in {path}")


def blocks(first: int, number: int) -> Iterator[tuple[int, int]]:
    """First record and number of records of each piece of work."""
    for begin in range(first, first + number, RECORDS_AT_ONCE):
        yield begin, min(RECORDS_AT_ONCE, first + number - begin)


def text_of(schema: Schema, seed: int, rule: str, block: tuple[int, int]) -> str:
    """Lines of one block."""
    from lmscripts.data.synthetic_decisions import generate

    first, number = block
    return "".join(f"{line}\n" for line in generate(schema, number, seed, rule, first))


if __name__ == "__main__":
    main()
