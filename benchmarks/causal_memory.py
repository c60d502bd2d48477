"""Peak memory and time of one training step of GPT-2: lmscripts' objective against GPT2LMHeadModel(labels=...).

    python benchmarks/causal_memory.py --rows 4
    python benchmarks/causal_memory.py --rows 4 --layers 2 --width 128

Vocabulary of 50,304 and rows of 1,024 tokens, fp32, no dropout: forward, backward, clipping and fused AdamW. Every way
runs in a process of its own, from the same weights, in turn, several times. "step" is what torch has allocated at the
peak of a step beyond weights, gradients and moments, counted exactly from its profiler; "process" is the whole process
at its peak, as the kernel counts it. The losses must agree to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from lmscripts import objectives
from lmscripts.models.families import gpt2
from lmscripts.models.fitting import fuse_activations
from lmscripts.objectives import causal

WAYS = ("ours", "theirs")


def peak_allocated(step: Callable[[], object]) -> int:
    """Most bytes that a call holds at a time beyond what was there before it: all of it, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Three steps of one way: the first makes gradients and moments, one is timed, one is counted."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_layer": options.layers, "n_embd": options.width, "n_head": max(1, options.width // 64)}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50304, n_positions=1024, **sizes, **dropout)).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if options.way == "ours":
        fuse_activations(model)  # as run_pretraining.py does
    objective = objectives.trained("causal", gpt2, {"": model}, "sdpa", causal.Settings()).train()
    ids = torch.randint(0, 50304, (options.rows, 1024), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "position_ids": torch.arange(1024).expand(options.rows, -1)}
    batch["labels"] = ids.roll(-1, dims=1).reshape(-1)
    batch["weights"] = (torch.arange(1024) < 1023).float().repeat(options.rows)  # theirs predicts nothing at the end
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        if options.way == "ours":
            loss = objective(batch)["clm"] / (options.rows * 1023)
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.item()

    first = step()
    began = time.perf_counter()
    second = step()
    seconds = time.perf_counter() - began
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"first": first, "second": second, "seconds": seconds, "process": process}
    return found | {"step": peak_allocated(step)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows of 1,024 tokens in a step")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, both ways")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    print(f"{options.layers} layers x {options.width}, {options.rows} x 1,024 tokens, vocabulary 50,304, fp32")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.pairs):
        for way in WAYS:
            done = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    pairs = list(zip(found["ours"], found["theirs"], strict=True))
    worst = max(abs(ours[name] - theirs[name]) for ours, theirs in pairs for name in ("first", "second"))
    if worst > 1e-4:
        raise SystemExit(f"the losses differ by {worst:.1e}")
    for name, unit, digits in (("step", 2**30, "GiB"), ("process", 2**30, "GiB"), ("seconds", 1, "s")):
        ratios = sorted(ours[name] / theirs[name] for ours, theirs in pairs)
        ours, theirs = (statistics.median(result[name] / unit for result in found[way]) for way in WAYS)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(pairs)} pairs)"
        print(f"{name:<8} ours {ours:6.2f} {digits}   theirs {theirs:6.2f} {digits}   ratio {spread}")
    print(f"losses differ by at most {worst:.1e}")


if __name__ == "__main__":
    main()
