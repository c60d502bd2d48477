"""Ask a policy what it would choose: a line of JSON for each record, in their order, as soon as the record has come.

python scripts/predict_policy.py --model runs/mine --input_file records.txt.gz --output_file answers.jsonl --words
my_game_client | python scripts/predict_policy.py --model runs/mine --top 3

A record is a line of the model's schema. What is known only afterwards (the choice, the extra numbers) may be empty, a
question mark, or left out at the end of the line. A line that is no record gets an answer that says what is wrong with
it, and the exit code is 1 when there was one.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lmscripts.errors import UserError, leave, user_errors
from lmscripts.files import text_output
from lmscripts.options import check_numbers, option, parse_options

SOME_WRONG = 1  # exit code


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model: str = option(help="folder of a policy, a snapshot, or the folder of a run")
    input_file: str = option("-", help="records, also compressed; - is standard input, answered as it comes")
    output_file: str = option("-", help="JSON lines; - is standard output", short="o", writes="file")
    overwrite: bool = option(False, help="replace the output file")
    words: bool = option(False, help="say candidates in the words of the schema, too")
    top: int | None = option(None, help="say the likeliest candidates only, so many; default: all", most=10**6)
    batch_size: int = option(256, help="records of a forward pass, where so many are there", most=10**6)

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is read."""
        check_numbers(vars(self), positive=("batch_size", "top"))


def main() -> None:
    """Parse, answer, write."""
    options = parse_options(Options, description=__doc__ or "", renamed={"model_dir": "model"})
    with user_errors():
        predict(options)


def predict(options: Options) -> None:
    """Read, answer and write what has come; ends the process."""
    target = None if options.output_file == "-" else Path(options.output_file)
    if target is not None and target.exists() and not options.overwrite:
        raise UserError(f"{target} is there already: give another --output_file, or --overwrite to replace it")

    import torch
    from transformers import logging

    from lmscripts.data.schema import Schema
    from lmscripts.evaluation.decisions import answer_lines
    from lmscripts.models.saved import open_policy
    from lmscripts.objectives import choice
    from lmscripts.text.reading import lines_as_they_come

    with opened_input(options.input_file) as source:
        logging.disable_progress_bar()
        saved = open_policy(options.model)
        untrained = [f"{saved.name} was never trained ({'; '.join(saved.untrained)})"] if saved.untrained else []
        print("".join(f"{notice}\n" for notice in [*saved.notices, *untrained]), end="", file=sys.stderr)
        model: Any = saved.models[""].to("cuda" if torch.cuda.is_available() else "cpu")
        schema = Schema.from_json(model.config.schema)
        objective = choice.trained(model, choice.Settings(value=model.config.value_head))
        line = wrong = 0
        with text_output(target) as file:
            for lines in lines_as_they_come(source, options.batch_size):
                for answer in answer_lines(objective, schema, lines, options.words):
                    line += 1
                    wrong += "error" in answer
                    if "candidates" in answer:
                        answer["candidates"] = answer["candidates"][: options.top]
                    file.write(json.dumps({"line": line, **answer}, ensure_ascii=False) + "\n")
                file.flush()
    where = "" if target is None else f", in {target}"
    print(f"{line:,} lines, {wrong:,} of them no records{where}", file=sys.stderr)
    leave(SOME_WRONG if wrong else 0)


@contextlib.contextmanager
def opened_input(name: str) -> Iterator[IO[bytes]]:
    """Standard input, or a file, which has to hold text."""
    from lmscripts.text.reading import check_file, kind_of, opened

    if name == "-":
        yield sys.stdin.buffer
        return
    check_file(name, "input")
    kind_of(name, "txt")
    with opened(name) as file:
        yield file


if __name__ == "__main__":
    main()
