"""Label new texts with a classifier of finetune_classifier.py: one line of output for each text, in their order.

python scripts/predict_classifier.py --model_dir leanings_trained_model --input_file texts.csv --output_file out.csv
echo "Beat my opponent!" | python scripts/predict_classifier.py --model_dir leanings_trained_model
cat texts.jsonl | python scripts/predict_classifier.py --model_dir leanings_trained_model --input_format jsonl

Long texts are folded as in training, the answers of their rows combined, temperature and thresholds applied, all as the
model's config.json says. A text about which nothing can be said (an empty one) gets a line that says so.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmscripts.errors import UserError, user_errors
from lmscripts.files import text_output
from lmscripts.options import check_numbers, option, parse_options

if TYPE_CHECKING:
    from lmscripts.evaluation.applying import Answer, Text

TABLE_OPTIONS = ("text", "id_column", "delimiter", "quotes", "encoding")  # how the input is read


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model_dir: str = option(help="folder of the classifier")
    input_file: str = option("-", help="txt (one text a line), csv, tsv, jsonl or parquet; - is standard input")
    input_format: Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None = option(
        None, help="default: by the name of the input; standard input is txt"
    )
    output_file: str = option(
        "-", help="csv or jsonl by its name; - is standard output, as csv", short="o", writes="file"
    )
    output_format: Literal["csv", "jsonl"] | None = option(None, help="default: by the name of the output")
    spreadsheet_safe: bool = option(False, help="csv for a spreadsheet: no cell is a formula, with a BOM")
    text: str = option("text", help="column of the texts in a table", short="t")
    id_column: str | None = option(None, help="column that names a text; default: its line is its name")
    delimiter: str | None = option(None, help="of csv and tsv; default: found in the header")
    quotes: bool = option(True, help="csv: a field may stand in double quotes")
    encoding: str | None = option(None, help="of the input; default: UTF-8, or what a byte order mark says")
    batch_size: int = option(32, help="rows of a forward pass", most=10**9)
    texts_at_once: int = option(256, help="texts that are read before they are answered", most=10**6)
    bf16: bool = option(False, help="compute in bfloat16")
    overwrite: bool = option(False, help="replace the output file")

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is read."""
        check_numbers(vars(self), positive=("batch_size", "texts_at_once"))


def main() -> None:
    """Parse, answer, write."""
    options = parse_options(Options, description=__doc__ or "")
    with user_errors():
        predict(options)


def predict(options: Options) -> None:
    """Read, answer and write, some hundred texts at a time."""
    target = None if options.output_file == "-" else Path(options.output_file)
    if target is not None and target.exists() and not options.overwrite:
        raise UserError(f"{target} is there already: give another --output_file, or --overwrite to replace it")
    if options.input_file != "-" and not Path(options.input_file).is_file():
        raise UserError(f"the input {options.input_file} is no file (seen from {Path.cwd()})")
    defaults = {field.name: field.default for field in fields(options) if field.name in TABLE_OPTIONS}
    given = {name: getattr(options, name) for name, default in defaults.items() if getattr(options, name) != default}
    is_json = options.output_format == "jsonl" or (options.output_format is None and is_json_name(options.output_file))

    import torch
    from transformers import logging

    from lmscripts.evaluation.applying import Classifier, check_input_options, read_texts
    from lmscripts.evaluation.report import csv_text
    from lmscripts.models.classifier import open_classifier
    from lmscripts.text.labels import shown
    from lmscripts.text.records import TableOptions

    check_input_options(options.input_file, options.input_format, given)
    names = {"id": options.id_column, "delimiter": options.delimiter, "encoding": options.encoding}
    names = {name: value or "" for name, value in names.items()}
    table = TableOptions(options.text, label="", quotes=options.quotes, **names)
    texts = read_texts(options.input_file, options.input_format or "", table)
    batches = iter(lambda: list(itertools.islice(texts, options.texts_at_once)), [])
    batches = itertools.chain([next(batches, [])], batches)  # a mistake in the input is said before anything is written
    if options.input_file == "-" and options.input_format is None:
        print("standard input is read as lines of text: give --input_format if it is a table", file=sys.stderr)
    logging.disable_progress_bar()
    model, source, settings, notices = open_classifier(options.model_dir)
    print("".join(f"{notice}\n" for notice in notices), end="", file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = Classifier(
        model, source, settings, batch_size=options.batch_size, device=device, autocast=options.bf16
    )
    with_names = options.id_column is not None
    num_texts, silent = 0, Counter[str]()
    first: dict[str, Text] = {}
    with text_output(target) as file:
        if not is_json:
            columns = [*head(with_names), *(f"probability of {label}" for label in classifier.labels)]
            file.write(csv_text([columns], options.spreadsheet_safe))
        for batch in batches:
            answers = classifier.answer(batch)
            for answer in answers:
                if is_json:
                    file.write(as_json(answer, classifier.labels))
                else:
                    row = as_row(answer, classifier.labels, with_names, settings.separator)
                    file.write(csv_text([row], options.spreadsheet_safe, begins_file=False))
            file.flush()
            num_texts += len(answers)
            silent.update(answer.note for answer in answers if answer.note)
            first = {answer.note: answer.text for answer in reversed(answers)} | first
    where = "" if target is None else f", in {target}"
    print(f"{num_texts:,} texts, {silent.total():,} of them without an answer{where}", file=sys.stderr)
    for note, number in silent.items():
        details = first[note].details and f": {shown(first[note].details, 400)}"
        print(f"{number:,} x {note}, first {options.input_file}:{first[note].line}{details}", file=sys.stderr)


def is_json_name(name: str) -> bool:
    """Whether a file is JSON lines by its name.

    Raises:
        UserError: it is neither that nor csv.
    """
    suffix = Path(name).suffix.lower()
    if name != "-" and suffix not in (".csv", ".jsonl"):
        raise UserError(
            f"the name of {name} does not say its format: end it in .csv or .jsonl, or give --output_format"
        )
    return suffix == ".jsonl"


# ---- lines -------------------------------------------------------------------------------------------------------


def head(with_names: bool) -> list[str]:
    """Columns before the probabilities."""
    return ["line", *(["name"] if with_names else []), "label", "fragments", "note"]


def as_row(answer: Answer, labels: list[str], with_names: bool, between: str) -> list[object]:
    """An answer as a row of CSV; labels of a text that has several stand with the separator of their table between."""
    names = [answer.text.name] if with_names else []
    shown = [f"{value:.6f}" for value in answer.probabilities] or [""] * len(labels)
    return [answer.text.line, *names, between.join(answer.labels), answer.num_fragments, answer.note, *shown]


def as_json(answer: Answer, labels: list[str]) -> str:
    """An answer as a line of JSON."""
    facts = {"line": answer.text.line, "name": answer.text.name, "labels": answer.labels}
    facts |= {"probabilities": dict(zip(labels, answer.probabilities)), "fragments": answer.num_fragments}
    return json.dumps(facts | ({"note": answer.note} if answer.note else {}), ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
