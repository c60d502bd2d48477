"""The model card: what was trained, what was measured, how to use it, where it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from lmscripts.data.packing import Rows
from lmscripts.data.phases import PhasedData
from lmscripts.data.pretraining import PretrainingData
from lmscripts.data.stream import StreamRows
from lmscripts.models import DECODERS
from lmscripts.training.log import SHARES, read_log, versions

_FILL_MASK = """from transformers import pipeline

model = pipeline("fill-mask", model="PATH/TO/THIS/FOLDER")"""
_GENERATE = """from transformers import pipeline

model = pipeline("text-generation", model="PATH/TO/THIS/FOLDER")
print(model("...", do_sample=True, top_k=50, max_new_tokens=40)[0]["generated_text"])"""
_PAIR = """from transformers import AutoModelForPreTraining, pipeline

# A logit for each token, above 0 where it thinks that the token was replaced. This is the half to fine-tune.
discriminator = AutoModelForPreTraining.from_pretrained("PATH/TO/THIS/FOLDER")
generator = pipeline("fill-mask", model="PATH/TO/THIS/FOLDER/generator")"""


def model_card(
    title: str, origin: str, use: str, rows: dict[str, str], options_yaml: str, examples: list[str], task: str = ""
) -> str:
    """Text of a model card.

    Args:
        title: heading.
        origin: what the training began with; empty for nothing.
        use: Python lines that load it.
        rows: table of what was measured, name to value.
        options_yaml: the options that repeat the run.
        examples: lines to show, such as fill-mask answers.
        task: name of the folder's task in transformers' pipeline; empty for none.
    """
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    shown = "\n".join(f"- {example}" for example in examples)
    began = f"Trained further from {origin}" if origin else "Trained from scratch"
    return f"""---
library_name: transformers
{f"pipeline_tag: {task}" if task else "tags: [electra]"}
---

# {title}

{began} on raw text. Every number below was measured in this run.

| what | value |
|---|---|
{table}

## Examples

{shown}

## Use

```python
{use}
```

## Limits

The biases and gaps of the text are those of the model. The held-out text comes from the same corpus: how well the model
does on other text was not measured.

## How it was made

{used}; {sys.platform}

```yaml
{options_yaml.strip()}
```
"""


def pretraining_card(
    title: str, origin: str, family: str, data: PhasedData, log_file: Path, options_yaml: str, model_dir: Path
) -> str:
    """Model card of a pretrained model from its folder and the log of its run.

    Args:
        title: heading.
        origin: model or run that the training began with; empty for none.
        family: of the model.
        data: of the run.
        log_file: log.jsonl of the run.
        options_yaml: the options that repeat it.
        model_dir: folder with model and tokenizer.
    """
    causal = family in DECODERS
    shown_dir = model_dir / "generator" if family == "electra" else model_dir
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model: Any = auto.from_pretrained(shown_dir, local_files_only=True)
    records = read_log(log_file)
    trained = [record for record in records if "tokens_per_second" in record]
    rows = {"parameters": f"{model.num_parameters():,}"}
    if family == "electra":
        discriminator = AutoModelForPreTraining.from_pretrained(model_dir, local_files_only=True)
        rows = {"parameters of the discriminator": f"{discriminator.num_parameters():,}"}
        rows["parameters of the generator"] = f"{model.num_parameters():,} (the embeddings are the same)"
    for number, phase in enumerate(data.phases):
        name = f" of phase {number + 1}" if len(data.phases) > 1 else ""
        rows[f"text{name}"] = f"{phase.train.real_tokens:,} tokens"
        shape = f"{phase.batch_size} rows of {phase.layout.sequence_length} tokens"
        rows[f"training{name}"] = f"{phase.num_steps:,} steps of {shape}"
    if trained:
        rows["real tokens seen"] = f"{trained[-1]['tokens']:,.0f}"
        rows["speed"] = f"{median(record['tokens_per_second'] for record in trained):,.0f} real tokens/s"
    for record in [record for record in records if "eval_loss" in record][-1:]:
        for name in (name for name in record if name.startswith("eval_")):
            rows[f"held-out {name.removeprefix('eval_').replace('_', ' ')}"] = _shown(
                name, record[name], family != "electra"
            )
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    last = data.phases[-1]
    if causal:
        prompts = document_beginnings(last)
        examples, use, task = continuations(model, tokenizer, prompts), _GENERATE, "text-generation"
    else:
        source = last.held_out or last.train
        shown = source.read(np.arange(min(3, source.num_rows)))
        examples = fill_mask_examples(model, tokenizer, last, shown)
        use, task = (_PAIR, "") if family == "electra" else (_FILL_MASK, "fill-mask")
    return model_card(title, origin, use, rows, options_yaml, examples, task)


def _shown(name: str, value: float, single: bool) -> str:
    if name.endswith(SHARES):
        return f"{value:.2%}"
    if not name.endswith("loss"):
        return f"{value:,.4f}"
    return f"{value:.4f} nats per target" if single or name != "eval_loss" else f"{value:.4f} (weighted sum)"


def fill_mask_examples(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: PretrainingData, rows: Rows, most_tokens: int = 40
) -> list[str]:
    """For the first segment of each row, the model's three best answers for one of its words.

    Args:
        model: a masked language model from transformers.
        tokenizer: of the model.
        data: says which ids are special.
        rows: B rows of held-out text.
        most_tokens: tokens of each row to show.
    """
    if data.masking is None:
        raise ValueError("these rows are not masked")
    examples = []
    device = next(model.parameters()).device
    for ids, content, segments in zip(rows.ids, rows.content, rows.segments, strict=True):
        text = [int(i) for i in ids[content & (segments == 0)][:most_tokens]]
        if len(text) < 5:
            continue
        place = len(text) // 2
        answer, text[place] = text[place], data.masking.mask_id
        begin = [] if data.layout.begin_id is None else [data.layout.begin_id]
        inputs = torch.tensor([[*begin, *text, data.layout.end_id]], device=device)
        with torch.no_grad():
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, len(begin) + place]
        best = tokenizer.convert_ids_to_tokens(logits.topk(3).indices.tolist())
        right = tokenizer.convert_ids_to_tokens(answer)
        examples.append(f"{tokenizer.decode(text)} → {', '.join(best)} (the text has {right})")
    return examples


def document_beginnings(data: PretrainingData, number: int = 3, most_tokens: int = 12) -> list[NDArray[np.int64]]:
    """How documents begin: held-out ones, then those of the training text; again from the first where there are fewer.

    Args:
        data: of a causal model.
        number: of beginnings, P.
        most_tokens: tokens of each, the begin token among them; never more than half of the document.

    Returns:
        P arrays of (n,) ids.
    """
    found: list[NDArray[np.int64]] = []
    for source in (data.held_out, data.train):
        if not isinstance(source, StreamRows) or source.layout.begin_id is None:
            continue
        tokens, ends = source.part.tokens, source.part.document_tokens
        for document in range(min(number, source.part.num_documents)):
            begin, size = int(ends[document]), int(ends[document + 1] - ends[document])
            text = tokens[begin : begin + min(most_tokens - 1, -(-size // 2))]
            found.append(np.array([source.layout.begin_id, *text], np.int64))
    return list(islice(cycle(found), number))


def continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int64]],
    new_tokens: int = 40,
    seed: int = 0,
) -> list[str]:
    """How the model goes on from each prompt: sampled from its 50 likeliest tokens, always the same.

    Args:
        model: a causal language model from transformers.
        tokenizer: of the model.
        prompts: ids; a prompt that comes again is gone on from in another way.
        new_tokens: tokens to sample, at most.
        seed: of the sampling; the state of the generators outside is left alone.
    """
    examples = []
    longest = getattr(model.config, "max_position_embeddings", max(map(len, prompts), default=0) + new_tokens)
    for number, ids in enumerate(prompts):
        prompt = torch.from_numpy(ids[: longest // 2])
        length = min(prompt.numel() + new_tokens, longest)
        inputs = prompt[None].to(next(model.parameters()).device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed + number)
            settings = {"do_sample": True, "top_k": 50, "max_length": length, "pad_token_id": tokenizer.pad_token_id}
            written = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)[0].cpu()
        begun, added = (
            " ".join(str(tokenizer.decode(part, skip_special_tokens=True)).split())
            for part in (prompt, written[prompt.numel() :])
        )
        examples.append(f"{begun} **{added}**")
    return examples
