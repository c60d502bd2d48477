"""Runs that take turns, the clocks that stand still between turns, and the score that all runs share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmscripts.models import families


class Turns:
    """Runs jobs in threads, one at a time, each for a few seconds before the next has its turn."""

    def __init__(self, num_jobs: int, seconds: float) -> None:
        self.seconds = seconds
        self._waiting = list(range(num_jobs))
        self._changed = threading.Condition()

    def run(self, jobs: list[Callable[[], None]], num_threads: int) -> None:
        """Run the jobs to their ends; an error in one is raised here when all have ended.

        Args:
            jobs: as many as were announced.
            num_threads: that torch uses within each.
        """
        errors: list[BaseException] = []

        def work(number: int) -> None:
            torch.set_num_threads(num_threads)
            try:
                self._wait_for(number)
                jobs[number]()
            except BaseException as error:
                errors.append(error)
            with self._changed:
                self._waiting.remove(number)
                self._changed.notify_all()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def hand_over(self, number: int) -> None:
        """Let the others have their turns; comes back at this job's next."""
        with self._changed:
            self._waiting = [*self._waiting[1:], number]
            self._changed.notify_all()
        self._wait_for(number)

    def _wait_for(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == number)


@dataclass
class Watch:
    """Clocks of one run, stopped while it is scored or waits for its turn, and the scores so far.

    Attributes:
        score: of a model.
        limit: seconds of training.
        turns: of the runs that alternate; None for a run alone.
        number: of this run in them.
        curve: one entry per scoring: wall and cpu seconds of training, steps, real tokens, loss.
        real_tokens: text tokens trained on.
    """

    score: Callable[[Any], float]
    limit: float
    turns: Turns | None = None
    number: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    real_tokens: int = 0
    steps: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    due: float = 2.0
    turn_ends: float = 0.0

    def start(self) -> None:
        """Let the clocks run."""
        self.began = (time.perf_counter(), time.process_time())

    def after_step(self, model: Any) -> bool:
        """Score when it is time; True when the run is over. Scorings are 2 s apart at first, then an eighth."""
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]
        self.steps += 1
        over = self.wall >= self.limit
        if over or self.wall >= self.due:
            point = {"wall": round(self.wall, 3), "cpu": round(self.cpu, 3), "steps": self.steps}
            point |= {"real_tokens": self.real_tokens, "loss": round(self.score(model), 4)}
            self.curve.append(point)
            self.due = self.wall + max(2.0, self.wall / 8)
        if self.turns is not None and not over and self.wall >= self.turn_ends:
            self.turns.hand_over(self.number)
            self.turn_ends = self.wall + self.turns.seconds
        self.start()
        return over


class Scorer:
    """Mean cross-entropy per masked token on sentences that never change, one per row, the same for all ways."""

    def __init__(self, sentences: list[list[int]], tokenizer: Any, length: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        sentences = sorted((line[: length - 2] for line in sentences if line), key=len)
        self.batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.targets = 0
        for start in range(0, len(sentences), 64):
            rows = sentences[start : start + 64]
            ids = np.full((len(rows), len(rows[-1]) + 2), tokenizer.pad_token_id)
            chosen = np.zeros(ids.shape, np.bool_)
            for number, line in enumerate(rows):
                ids[number, : len(line) + 2] = [tokenizer.cls_token_id, *line, tokenizer.sep_token_id]
                chosen[number, 1 : len(line) + 1] = generator.random(len(line)) < 0.15
            seen = ids.copy()
            draw = generator.random(ids.shape)
            seen[chosen & (draw < 0.8)] = tokenizer.mask_token_id
            replaced = chosen & (draw >= 0.8) & (draw < 0.9)
            seen[replaced] = generator.integers(len(tokenizer.all_special_ids), len(tokenizer), int(replaced.sum()))
            attention = (ids != tokenizer.pad_token_id).astype(np.int64)
            flat = np.flatnonzero(chosen)
            arrays = (seen, attention, flat, ids.reshape(-1)[flat])
            self.batches.append(tuple(torch.from_numpy(array) for array in arrays))  # type: ignore[arg-type]
            self.targets += flat.size

    @torch.no_grad()
    def __call__(self, model: Any) -> float:
        """The score of a model, which is left in the mode it had."""
        was_training = model.training
        model.eval()
        total = 0.0
        for seen, attention, chosen, labels in self.batches:
            hidden = model.base_model(input_ids=seen, attention_mask=attention).last_hidden_state
            family = families.family(model.config.model_type)
            logits = family.predict(model, hidden.flatten(0, 1).index_select(0, chosen))
            total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        model.train(was_training)
        return total / self.targets
