"""How a decoder goes on from a text.

Each draw is a hash of the seed, the prompt, the number of the sample and the place in the text, see
`lmscripts.counters`. So a text does not depend on what is sampled beside it, and torch's random numbers are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lmscripts.counters import hash_counters, stream_key, unit_interval
from lmscripts.objectives.replaced import sample

_SAMPLES = 0x5A3B  # stream of draws


@dataclass(frozen=True)
class Sampling:
    """How texts are sampled.

    Attributes:
        max_new_tokens: at most, fewer where the model has no room or the text ends.
        temperature: logits are divided by it; 0 takes the likeliest token always.
        top_k: of so many likeliest tokens; 0 of all.
        top_p: of the likeliest that together have so much probability (arXiv:1904.09751, section 3.1).
        seed: of the draws.
    """

    max_new_tokens: int = 40
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def chooser(self, prompt: Sequence[int], samples: Sequence[int]) -> Any:
        """Makes of (N, T) ids and (N, V) scores those with one token left for each numbered sample: its choice."""
        if not self.temperature:
            return LogitsProcessorList()
        steps: list[Any] = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        steps += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        steps += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        keys = [stream_key(_SAMPLES, self.seed, number, *map(int, prompt)) for number in samples]
        return LogitsProcessorList([*steps, _Draw(np.array(keys, np.uint64))])


class _Draw(LogitsProcessor):
    """Leaves one token of each row, drawn by its probability."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self._keys = keys

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        place = np.array([input_ids.shape[1]], np.uint64)
        draws = torch.from_numpy(unit_interval(hash_counters(self._keys, place)).astype(np.float32))
        chosen = sample(scores.float(), draws.clamp_(max=1 - 2**-24).to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _Heard:
    """What `generate` calls a streamer: it is given the prompt, and then each token."""

    def __init__(self, hear: Callable[[int], None]) -> None:
        self._hear, self._is_prompt = hear, True

    def put(self, value: Tensor) -> None:
        for number in [] if self._is_prompt else value.reshape(-1).tolist():
            self._hear(number)
        self._is_prompt = False

    def end(self) -> None:
        """There is nothing to close."""


@torch.no_grad()
def go_on(
    model: Any,
    prompt: Sequence[int],
    samples: Sequence[int],
    how: Sampling,
    end_id: int,
    longest: int | None = None,
    hear: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The ids that follow a prompt, without those at the end of the text, of each numbered sample.

    Args:
        model: any causal model, in evaluation mode; what its folder says of generation is not heeded.
        prompt: ids, at least one.
        samples: numbers of the samples, which go through the model together.
        how: how they are drawn.
        end_id: of what ends a text.
        longest: tokens that the model reads at most; None for any number.
        hear: is called with each token of a single sample as soon as it is there.
    """
    length = min(len(prompt) + how.max_new_tokens, longest or 10**9)
    bare: Any = GenerationConfig
    settings = bare(max_length=length, do_sample=False, eos_token_id=end_id, pad_token_id=end_id)
    inputs = torch.tensor([list(prompt)] * len(samples), device=model.device)
    own, model.generation_config = model.generation_config, bare()
    try:
        rows = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=settings,
            logits_processor=how.chooser(prompt, samples),
            streamer=_Heard(hear) if hear else None,
        )
    finally:
        model.generation_config = own
    return [until(row[len(prompt) :], end_id) for row in rows.tolist()]


def until(ids: list[int], end_id: int) -> list[int]:
    """Ids up to the first that ends a text."""
    return ids[: ids.index(end_id)] if end_id in ids else ids


def text_after(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ids that follow a prompt, with the space before it if there is one."""
    begun, whole = (
        str(tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (prompt, [*prompt, *ids])
    )
    if whole.startswith(begun):
        return whole[len(begun) :]
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
