"""What a model learnt of the invented world: each question's choices are compared by what the model expects.

    python sample_data/ask.py MODEL_DIR demo_output/world/questions.jsonl

Nothing but transformers. An encoder says how likely each choice is in the place of [MASK]; a decoder, how likely the
whole sentence is. Chance is one over the number of choices; a guess is the commonest answer to questions of that kind.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, logging

EXAMPLES = 8
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
        sum(float(places[len(span)][begin + place, token]) for place, token in enumerate(span)) / len(span)
        for span in spans
    ]


def by_sentence(model: Any, tokenizer: Any, filled: list[list[int]]) -> list[float]:
    """Log-probability of each of the filled sentences, given the token that begins a text."""
    rows = [[tokenizer.bos_token_id, *row] if row[0] != tokenizer.bos_token_id else row for row in filled]
    found = log_likely(model, tokenizer, rows)
    return [float(one[torch.arange(len(row) - 1), row[1:]].sum()) for one, row in zip(found, rows)]


def main() -> None:
    """Ask, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model with its tokenizer")
    parser.add_argument("questions", help="questions.jsonl of world.py")
    parser.add_argument("--output_file", help="every question with the model's answer, as JSON lines")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(given.model)
    is_decoder = any("Causal" in name or "LMHead" in name for name in config.architectures or [])
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = (AutoModelForCausalLM if is_decoder else AutoModelForMaskedLM).from_pretrained(given.model).eval()
    with open(given.questions, encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]

    common = {kind: Counter(q["answer"] for q in questions if q["kind"] == kind).most_common(1)[0][0]
              for kind in {q["kind"] for q in questions}}  # fmt: skip
    right: dict[str, list[tuple[bool, float, bool]]] = defaultdict(list)
    for question in questions:
        filled = [tokenizer(question["text"].replace("[MASK]", choice))["input_ids"] for choice in question["choices"]]
        scores = (by_sentence if is_decoder else by_mask)(model, tokenizer, filled)
        question["said"] = question["choices"][max(range(len(scores)), key=scores.__getitem__)]
        is_right = question["said"] == question["answer"]
        outcome = (is_right, 1 / len(scores), common[question["kind"]] == question["answer"])
        for row in (question["kind"], question["group"], "all"):
            right[row].append(outcome)
    if given.output_file:
        with open(given.output_file, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)

    for question in questions[:: -(-len(questions) // EXAMPLES)]:
        is_right = question["said"] == question["answer"]
        print(f"{question['text']}  ->  {question['said']}" + ("" if is_right else f"   (true: {question['answer']})"))
    print(f"\n{'facts':<16}{'questions':>10}{'right':>8}{'guess':>8}{'chance':>8}")
    groups = [name for name in ("said so", "said otherwise", "worked out") if name in right]
    for name in [*sorted({q["kind"] for q in questions}), *groups, "all"]:
        shares = (sum(column) / len(right[name]) for column in (list(part) for part in zip(*right[name])))
        print(f"{name:<16}{len(right[name]):>10}" + "".join(f"{share:>8.0%}" for share in shares))


if __name__ == "__main__":
    main()
