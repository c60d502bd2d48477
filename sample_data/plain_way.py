"""The plain way beside a run: what transformers' run_mlm and run_clm do, for as many seconds as the run took.

    python sample_data/plain_way.py --like demo_output/encoder --text corpus.txt --output_dir demo_output/plain

Same architecture, tokenizer, text, rows a step, length of rows and threads. What differs is what one gets with
`Trainer`: lines joined and cut into blocks (`group_texts`), single tokens masked, logits everywhere, its own AdamW. Its
rate is the preset's, which is forty times the default, rises over the run's warmup and falls to 0 with the seconds; of
its tokens 30 % are masked, twice the default: of 79 answers it knew 56 % then, and 37 % with the 50 % of a run of ours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
)


class Clock(TrainerCallback):
    """Ends training after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, 0.0

    def left(self, *_: Any) -> float:
        """Share of the seconds."""
        return max(0.0, 1 - (time.monotonic() - self.began) / self.seconds) if self.began else 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The clock runs from here."""
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Whether the seconds are over."""
        control.should_training_stop = self.left() == 0


def seconds_of(run: Path) -> float:
    """Seconds that the steps of a run took, without its start and its evaluations."""
    with (run / "log.jsonl").open(encoding="utf-8") as file:
        records = [record for record in map(json.loads, file) if "tokens_per_second" in record]
    tokens = [0, *(record["tokens"] for record in records)]
    return sum((after - before) / r["tokens_per_second"] for before, after, r in zip(tokens, tokens[1:], records))


def blocks_of(files: list[Path], tokenizer: Any, length: int, is_causal: bool) -> Dataset:
    """All lines joined, within a thousand of them, and cut into blocks, as `group_texts` does it."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines(keepends=is_causal) if line]
    rows = []
    for start in range(0, len(lines), 1000):
        ids = tokenizer(lines[start : start + 1000], add_special_tokens=not is_causal)["input_ids"]
        joined = list(chain.from_iterable(ids))
        rows += [joined[at : at + length] for at in range(0, len(joined) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * len(rows)})


def main() -> None:
    """Train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True, help="a finished run of run_pretraining.py")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="what its store was made of")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--mlm_probability", type=float, default=0.3, help="of a model with masks")
    parser.add_argument("--threads", type=int, default=2, help="as many as the run had processes")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    options = yaml.safe_load((given.like / "config.yaml").read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(given.like / "final")
    tokenizer = AutoTokenizer.from_pretrained(given.like / "final")
    is_causal = tokenizer.mask_token is None
    torch.manual_seed(options["seed"])
    model = (AutoModelForCausalLM if is_causal else AutoModelForMaskedLM).from_config(config)
    masked = {} if is_causal else {"mlm_probability": given.mlm_probability}
    clock = Clock(seconds_of(given.like))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options["batch_size"][0],
            learning_rate=given.learning_rate,
            max_steps=1_000_000,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=options["seed"],
            weight_decay=0.01,
        )
        trainer = Trainer(
            model,
            arguments,
            DataCollatorForLanguageModeling(tokenizer, mlm=not is_causal, **masked),
            blocks_of(given.text, tokenizer, options["sequence_length"][0], is_causal),
            callbacks=[clock],
        )
        warmup = options["warmup_steps"] or 1
        rate = lambda step: clock.left() * min(1.0, (step + 1) / warmup)  # noqa: E731
        trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), rate)
        trainer.train()
    model.save_pretrained(given.output_dir)
    tokenizer.save_pretrained(given.output_dir)
    print(f"{trainer.state.global_step:,} steps of Trainer in {clock.seconds:.0f} s: {given.output_dir}")


if __name__ == "__main__":
    main()
