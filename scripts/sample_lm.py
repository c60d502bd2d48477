"""Ask a language model: a decoder goes on from a text, an encoder fills the masks in one.

python scripts/sample_lm.py --model_dir runs/gpt2 --prompt むかし --num_samples 3 --temperature 0.8
python scripts/sample_lm.py --model_dir runs/bert --prompt "今日は[MASK]がよい。" --top_k 3
python scripts/sample_lm.py --model_dir runs/gpt2 --input_file prompts.txt --output_file texts.jsonl

Without --prompt and --input_file, lines of standard input are answered as they are typed. The same seed gives the same
text for a prompt, whatever is asked beside it; a prompt that comes again is gone on from in another way. A line of
standard input that cannot be answered is told, and the exit code is 1 then.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from lmscripts import objectives
from lmscripts.errors import UserError, leave, user_errors
from lmscripts.files import text_output
from lmscripts.options import check_numbers, check_useless, option, parse_options

if TYPE_CHECKING:
    from lmscripts.models.saved import SavedModel

SOME_WRONG = 1  # exit code
BETWEEN = "---\n"  # texts on the screen


@dataclass(frozen=True)
class Options:
    """Every option of this script; one field is one flag and one YAML key."""

    model_dir: str = option(help="model folder, checkpoint, folder of a run, or a Hub name", required=True)
    prompt: tuple[str, ...] = option((), help="text to go on from, or with masks to fill; any number of them")
    input_file: str | None = option(None, help="prompts: txt (one a line), jsonl, csv, tsv or parquet; - is typed")
    input_format: Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None = option(
        None, help="default: by the name and content of the input"
    )
    text_column: str = option("text", help="of tables and JSON lines")
    output_file: str | None = option(
        None, help="JSON lines: prompt, sample, text; default: texts on the screen", short="o", writes="file"
    )
    overwrite: bool = option(False, help="replace the output file")
    tokenizer_dir: str | None = option(None, help="tokenizer, if the model folder has none")
    generator_dir: str | None = option(None, help="ELECTRA: the generator, if it is not in generator/")

    top_k: int | None = option(
        None,
        help="decoder: draw from so many likeliest tokens (50; 0 = all); encoder: say so many (5)",
        group="answers",
    )
    top_p: float | None = option(
        None, help="decoder: from the likeliest with so much probability together (1)", group="answers"
    )
    temperature: float | None = option(
        None, help="decoder: below 1 likelier tokens, 0 always the likeliest (1)", group="answers"
    )
    max_new_tokens: int | None = option(None, help="decoder: tokens of a text, at most (100)", group="answers")
    num_samples: int | None = option(None, help="decoder: texts for each prompt (1)", group="answers", most=10**6)
    seed: int | None = option(None, help="decoder: decides what is drawn (0)", group="answers", most=2**63 - 1)
    batch_size: int | None = option(
        None, help="decoder: texts of a prompt made at once for a file (16)", group="answers", most=10**6
    )

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is read."""
        positive = ("max_new_tokens", "num_samples", "batch_size", "top_p")
        check_numbers(vars(self), positive=positive, not_negative=("temperature", "top_k"))
        if self.top_p is not None and self.top_p > 1:
            raise UserError(f"--top_p must be at most 1, got {self.top_p}")
        if self.temperature == 0:
            why = "with --temperature 0, which always takes the likeliest token"
            check_useless(vars(self), why, "top_k", "top_p", "num_samples", "seed")
        if self.prompt and self.input_file:
            raise UserError(f"--prompt and --input_file {self.input_file} both say what is asked: give one")
        if self.input_file in (None, "-"):
            check_useless(vars(self), "without a file of prompts", *(["input_format"] if self.prompt else []))
        if self.output_file is None:
            check_useless(vars(self), "without --output_file, as texts on the screen come one by one", "batch_size")


def main() -> None:
    """Parse, ask, write."""
    options = parse_options(Options, description=__doc__ or "")
    with user_errors():
        ask(options)


def ask(options: Options) -> None:
    """Load the model, read prompts, write what it answers; ends the process."""
    target = None if options.output_file is None else Path(options.output_file)
    if target is not None and target.exists() and not options.overwrite:
        raise UserError(f"{target} is there already: give another --output_file, or --overwrite to replace it")

    import torch
    from transformers import logging

    from lmscripts.models.saved import open_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    scored = [name for name in objectives.names() if hasattr(objectives.objective(name), "SCORES")]
    saved = open_model(options.model_dir, scored, options.generator_dir, options.tokenizer_dir)
    untrained = [f"{saved.name} was never trained ({'; '.join(saved.untrained)})"] if saved.untrained else []
    print("".join(f"{notice}\n" for notice in [*saved.notices, *untrained]), end="", file=sys.stderr)
    for model in saved.models.values():
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    answer = fills(options, saved) if objectives.objective(saved.objective).SCORES == "masks" else texts(options, saved)
    prompts, wrong = read_prompts(options, saved), 0
    if not is_typed(options):
        prompts = iter(list(prompts))  # a mistake in one is said before any is answered
    elif sys.stdin.isatty():
        print("a prompt a line; Ctrl-D ends", file=sys.stderr)
    with text_output(target) as file:
        for text, ids in prompts:
            if isinstance(ids, UserError):
                print(f"error: {ids}", file=sys.stderr, flush=True)
                found: Any = [{"error": str(ids)}] if target else []
                wrong += 1
            else:
                found = answer(text, ids, file if target is None else None)
            if target is not None:
                file.writelines(json.dumps({"prompt": text, **each}, ensure_ascii=False) + "\n" for each in found)
            file.flush()
    leave(SOME_WRONG if wrong else 0)


# ---- prompts -----------------------------------------------------------------------------------------------------


def is_typed(options: Options) -> bool:
    """Whether prompts come one after another, each to be answered before the next one is there."""
    return not options.prompt and options.input_file in (None, "-")


def read_prompts(options: Options, saved: SavedModel) -> Iterator[tuple[str, list[int] | UserError]]:
    """Prompts with their ids; what is none is refused, but among those that are typed it has its error as answer."""
    from lmscripts.evaluation.applying import Text, read_texts
    from lmscripts.text.records import corpus_table

    kind, name = objectives.objective(saved.objective), options.input_file or "-"
    table = corpus_table(options.text_column)
    given = (Text(number, None, text) for number, text in enumerate(options.prompt, 1))
    for each in given if options.prompt else read_texts(name, options.input_format or "", table):
        if options.input_file and not each.text and not each.note and not is_typed(options):
            continue  # a blank line
        try:
            if each.note:
                raise UserError(each.note)
            ids: Any = kind.read(each.text, saved.encoder, saved.longest)
        except UserError as error:
            if not is_typed(options):
                raise UserError(str(error) if options.prompt else f"{name}:{each.line}: {error}") from None
            ids = error
        yield each.text, ids


# ---- answers -----------------------------------------------------------------------------------------------------

Answer = Callable[[str, list[int], TextIO | None], list[dict[str, Any]]]  # text, ids, the screen -> lines of JSON


def fills(options: Options, saved: SavedModel) -> Answer:
    """What an encoder puts into the masks of a text."""
    why = f"on an encoder ({saved.model_type}), which fills masks"
    check_useless(vars(options), why, "temperature", "top_p", "max_new_tokens", "num_samples", "seed", "batch_size")
    if options.top_k == 0:
        raise UserError("--top_k 0 of an encoder would say nothing: give the number of tokens to say")
    kind, tokenizer = objectives.objective(saved.objective), saved.encoder.tokenizer
    trained = objectives.trained(saved.objective, saved.family, saved.models, "sdpa", kind.Settings())
    trained.eval()

    def answer(text: str, ids: list[int], screen: TextIO | None) -> list[dict[str, Any]]:
        filled = kind.fill(trained, ids, tokenizer.mask_token_id, options.top_k or 5)
        masks = [[{"token": tokenizer.decode([i]), "probability": p} for i, p in best] for best in filled]
        if screen is not None:
            lines = ("  ".join(f"{each['token']} {each['probability']:.1%}" for each in best) for best in masks)
            screen.write("".join([f"{text}\n", *(f"  {line}\n" for line in lines)]))
        return [{"masks": masks}]

    return answer


def texts(options: Options, saved: SavedModel) -> Answer:
    """How a decoder goes on from a text."""
    from lmscripts.objectives.causal import boundary_ids
    from lmscripts.objectives.sampling import Sampling, go_on, text_after

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    how = Sampling(**{"max_new_tokens": 100, **given})
    tokenizer, model = saved.encoder.tokenizer, saved.models[""]
    end, number = boundary_ids(tokenizer)[1], options.num_samples or 1
    asked, told = Counter[tuple[int, ...]](), False

    def answer(text: str, ids: list[int], screen: TextIO | None) -> list[dict[str, Any]]:
        nonlocal told
        if saved.longest is not None and len(ids) + how.max_new_tokens > saved.longest and not told:
            told = True
            print(f"the model reads {saved.longest} tokens: texts end there at the latest", file=sys.stderr)
        first = asked[tuple(ids)]
        asked[tuple(ids)] += number
        at_once, found = 1 if screen is not None else options.batch_size or 16, list[dict[str, Any]]()
        for begin in range(first, first + number, at_once):
            samples, shown = range(begin, min(begin + at_once, first + number)), None
            if screen is not None:
                shown = Shown(screen, text, tokenizer, ids, is_first=sum(asked.values()) - number + begin == first)
            rows = go_on(model, ids, samples, how, end, saved.longest, shown and shown.hear)
            written = [text_after(tokenizer, ids, row) for row in rows]
            if shown is not None:
                shown.show(written[0], "\n")
            found += [{"sample": n + 1, "text": each} for n, each in zip(samples, written)]
        return found

    return answer


class Shown:
    """A text on the screen, as it grows."""

    def __init__(self, screen: TextIO, text: str, tokenizer: Any, prompt: list[int], is_first: bool) -> None:
        self.screen, self.tokenizer, self.prompt = screen, tokenizer, prompt
        self.ids, self.said = list[int](), ""
        screen.write(f"{'' if is_first else BETWEEN}{text}")

    def hear(self, number: int) -> None:
        """Show what a further token adds; a letter of several tokens when it is whole."""
        from lmscripts.objectives.sampling import text_after

        self.ids.append(number)
        self.show(text_after(self.tokenizer, self.prompt, self.ids).rstrip("\ufffd"))

    def show(self, text: str, end: str = "") -> None:
        """Show a text as far as it is not there yet."""
        self.screen.write((text[len(self.said) :] if text.startswith(self.said) else "") + end)
        self.screen.flush()
        self.said = text


if __name__ == "__main__":
    main()
