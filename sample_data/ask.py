"""What a model learnt of the invented world: each question's choices are compared by what the model expects.

    python sample_data/ask.py MODEL_DIR demo_output/world/questions.jsonl --beside OTHER_MODEL_DIR

Nothing but transformers. An encoder says how likely each choice is in the place of [MASK]; a decoder, how likely the
whole sentence is on a line of its own. Chance is one over the number of choices; a guess is the commonest answer to
questions of that kind. The first table has one question of each kind and group, the one in the middle of them.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections import Counter, defaultdict
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, logging

GROUPS = ("said so", "said otherwise", "worked out")
AT_ONCE = 256  # sentences


def log_likely(model: Any, tokenizer: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """(T, V) log-probabilities at each place of each row of ids."""
    found = []
    for first in range(0, len(rows), AT_ONCE):
        part = rows[first : first + AT_ONCE]
        longest = max(map(len, part))
        ids = torch.tensor([row + [tokenizer.pad_token_id or 0] * (longest - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        found += [one[: len(row)].log_softmax(-1) for one, row in zip(logits, part)]
    return found


def num_alike(rows: list[list[int]]) -> int:
    """How many ids at the beginning all rows have in common."""
    alike = (len(set(column)) == 1 for column in zip(*rows))
    return next((place for place, same in enumerate(alike) if not same), min(map(len, rows)))


def by_mask(model: Any, tokenizer: Any, filled: list[list[int]]) -> list[float]:
    """Mean log-probability of the tokens in which each of the filled sentences differs from the others."""
    begin = num_alike(filled)
    end = num_alike([row[:begin:-1] for row in filled])
    spans = [row[begin : len(row) - end] for row in filled]
    lengths = sorted({len(span) for span in spans})
    row = filled[0]
    asked = [row[:begin] + [tokenizer.mask_token_id] * length + row[len(row) - end :] for length in lengths]
    places = dict(zip(lengths, log_likely(model, tokenizer, asked)))
    return [
        sum(float(places[len(span)][begin + place, token]) for place, token in enumerate(span)) / max(1, len(span))
        for span in spans  # none where the tokenizer knows none of the choices, which are one to it
    ]


def by_sentence(model: Any, tokenizer: Any, filled: list[list[int]]) -> list[float]:
    """Log-probability of each of the filled sentences after its first token, which is the end of the line before."""
    found = log_likely(model, tokenizer, filled)
    return [float(one[torch.arange(len(row) - 1), row[1:]].sum()) for one, row in zip(found, filled)]


def answers(folder: str, questions: list[dict[str, Any]]) -> list[str]:
    """The choice that a model finds the most likely, for each question."""
    config = AutoConfig.from_pretrained(folder)
    is_decoder = any("Causal" in name or "LMHead" in name for name in config.architectures or [])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = (AutoModelForCausalLM if is_decoder else AutoModelForMaskedLM).from_pretrained(folder).eval()
    score, before = (by_sentence, "\n") if is_decoder else (by_mask, "")
    found = []
    for question in questions:
        texts = [before + question["text"].replace("[MASK]", choice) for choice in question["choices"]]
        scores = score(model, tokenizer, [tokenizer(t, add_special_tokens=not is_decoder)["input_ids"] for t in texts])
        found.append(question["choices"][max(range(len(scores)), key=scores.__getitem__)])
    return found


def padded(text: str, width: int) -> str:
    """A text filled up to a width on a screen, where Chinese and Japanese characters take two places."""
    return text + " " * (width - sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))


def show_examples(questions: list[dict[str, Any]], said: list[str]) -> None:
    """One question of each kind and group, what the model said, what is true."""
    of = defaultdict(list)
    for question, answer in zip(questions, said):
        of[question["kind"], question["group"]].append((question, answer))
    rows = [("question", "the model says", "true", "", "how the text has it")]
    for (_, group), asked in of.items():
        question, answer = asked[len(asked) // 2]
        verdict = "right" if answer == question["answer"] else "wrong"
        rows.append((question["text"], answer, question["answer"], verdict, group))
    for question, answer, true, verdict, group in rows:
        print(padded(question, 50), padded(answer, 16), padded(true, 12), padded(verdict, 6), group)


def show_shares(questions: list[dict[str, Any]], columns: dict[str, list[str]]) -> None:
    """The share right of each column of answers by kind and by group, beside a guess and chance."""
    common = {kind: Counter(q["answer"] for q in questions if q["kind"] == kind).most_common(1)[0][0]
              for kind in {q["kind"] for q in questions}}  # fmt: skip
    columns = columns | {"a guess": [common[question["kind"]] for question in questions]}
    shares: dict[str, list[list[float]]] = defaultdict(list)
    for question, *said in zip(questions, *columns.values()):
        outcome = [float(answer == question["answer"]) for answer in said] + [1 / len(question["choices"])]
        for row in (question["kind"], question["group"], "all"):
            shares[row].append(outcome)
    print(f"\n{'facts':<16}{'questions':>10}" + "".join(f"{name:>11}" for name in [*columns, "chance"]))
    for name in [*sorted({q["kind"] for q in questions}), *(name for name in GROUPS if name in shares), "all"]:
        means = [sum(column) / len(shares[name]) for column in zip(*shares[name])]
        print(f"{name:<16}{len(shares[name]):>10}" + "".join(f"{mean:>11.0%}" for mean in means))


def main() -> None:
    """Ask, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with its tokenizer")
    parser.add_argument("questions", help="questions.jsonl of world.py")
    parser.add_argument(
        "--beside", help="another model, such as plain_way.py made, to have its share beside this one's"
    )
    parser.add_argument("--output_file", help="every question with the model's answer, as JSON lines")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with open(given.questions, encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    columns = {"right": answers(given.model, questions)}
    if given.beside:
        columns["beside"] = answers(given.beside, questions)
    if given.output_file:
        with open(given.output_file, "w", encoding="utf-8") as file:
            for question, said in zip(questions, columns["right"]):
                file.write(json.dumps(question | {"said": said}, ensure_ascii=False) + "\n")
    show_examples(questions, columns["right"])
    show_shares(questions, columns)


if __name__ == "__main__":
    main()
