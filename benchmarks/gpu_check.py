"""What a GPU does with lmscripts, in fifteen minutes at most: does it work, how fast is it, and where does the time go.

    python benchmarks/gpu_check.py --output_file gpu.jsonl --work_dir work
    python benchmarks/gpu_table.py gpu.jsonl

Writes one JSON line for each item as soon as it is done, so that a run that is cut off has what it measured; the same
command again with the same file goes on with what is missing. The most valuable items come first; one whose estimate
does not fit into what is left of `--minutes` is skipped, and a line says so. Each item has a process of its own, which
begins with the imports behind it: what ends one, be it an illegal memory access, ends no other.

Speeds are those of scripts/run_pretraining.py itself, on generated text with Zipf's frequencies and document lengths
as of articles: its own log gives tokens per second, MFU and memory, medians of three windows of ten steps after ten.
"eager" is without `torch.compile`. Precision bf16, no dropout, all rows of a step in one forward pass. In further steps
host synchronisations are counted, and kernels profiled; "idle" is the part of a step (timed without the profiler) in
which no kernel ran.

What has to be there: torch, transformers and accelerate with what they need; pytest (first item), psutil, matplotlib
and jsonargparse. Images made for training often lack the last. No network, no datasets, no MeCab. What can be made on
another machine beforehand, where all of it is installed:

    python benchmarks/gpu_check.py --prepare --work_dir work

writes the token stores and a copy of jsonargparse to the folder (about 15 MB), which is then carried along; without
it the stores are made first. On a CPU, in two minutes, with tiny models: `--smoke`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]
PRELOADED = ["torch._dynamo", "accelerate", "lmscripts.training.log", "lmscripts.models.building"]
PRELOADED += [f"transformers.models.{family}.modeling_{family}" for family in ("bert", "electra", "gpt2", "modernbert")]
FAMILIES = ("bert", "electra", "modernbert", "gpt2")
WINDOW, WINDOWS = 10, 3  # steps between log lines, and how many of these count
SMALL, LARGE = 1024, 50_304  # vocabularies: of a smoke test, and of GPT-2
TOKENS = (2_500_000, 60_000)  # of a store, and of one of a smoke test
NEVER = 1_000_000  # steps
FRESH = ("re-initialize CUDA", "initialization error", "sees no GPU")  # where a fork was not good enough


class Bench(NamedTuple):
    """Where artefacts lie, and whether sizes are those of a CPU."""

    work_dir: Path
    smoke: bool = False

    def vocabulary(self, model: str) -> int:
        """Entries of the vocabulary of a model, by which its store is called."""
        return SMALL if self.smoke else LARGE if model.startswith("gpt2") else 32_768


class Item(NamedTuple):
    """One line of the output: its name, about how many seconds it takes, and what gives its figures."""

    name: str
    seconds: float
    run: Callable[..., dict[str, Any]]
    arguments: dict[str, Any] = {}


# ---- what is measured ----------------------------------------------------------------------------------------------


def machine(bench: Bench) -> dict[str, Any]:
    """What this is, and what a large matrix product reaches here."""
    import torch

    from lmscripts.training.log import versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts: dict[str, Any] = {"commit": commit.stdout.strip(), "cores": os.cpu_count(), "versions": versions()}
    if not torch.cuda.is_available():
        if [*Path("/dev").glob("nvidia[0-9]*")]:
            raise RuntimeError("there is an NVIDIA device, but torch sees no GPU")
        return facts | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds, _ = timed(lambda: matrix @ matrix, bench)
    return facts | {
        "device": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "product_tflops": 2 * 8192**3 / seconds / 1e12,
    }


def timed(call: Callable[[], object], bench: Bench) -> tuple[float, float]:
    """Median seconds of a call, of ten after three (of two in a smoke test), and the most memory of the GPU in GiB."""
    import torch

    on_gpu, times = torch.cuda.is_available(), list[float]()
    for _ in range(3 if bench.smoke else 13):
        began = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1 if bench.smoke else 3 :]), torch.cuda.max_memory_allocated() / 2**30


def stores(bench: Bench) -> dict[str, Any]:
    """Token stores of generated text, one for each size of vocabulary; those that are there are left."""
    from lmscripts.data.preparation import Source, prepare_store

    made = {}
    for vocabulary in sorted({bench.vocabulary(family) for family in FAMILIES}):
        folder = bench.work_dir / f"store-{vocabulary}"
        if not folder.exists():
            text, tokenizer = write_text(bench.work_dir, vocabulary, TOKENS[bench.smoke])
            prepare_store(Source((str(text),), tokenizer, validation_fraction=0.02), folder, 1)
            text.unlink()
            shutil.rmtree(tokenizer)
        made[str(vocabulary)] = json.loads((folder / "manifest.json").read_text())["parts"]["train"]["tokens"]
    return {"tokens": made}


def write_text(folder: Path, vocabulary: int, tokens: int) -> tuple[Path, Path]:
    """Made-up text, one sentence a line with a blank line between documents, and a tokenizer that has its words.

    The frequency of a word is that of its rank (Zipf); half of the documents are shorter than 300 words, a few are of
    thousands; sentences have 24.
    """
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = np.array([f"w{number}" for number in range(vocabulary - len(special))])
    model = models.WordLevel({piece: number for number, piece in enumerate([*special, *words])}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))
    made.save_pretrained(folder / f"tokenizer-{vocabulary}")
    random = np.random.default_rng(vocabulary)
    shares = np.cumsum(1 / (np.arange(words.size) + 2.7))
    drawn = words[np.searchsorted(shares, random.random(tokens) * shares[-1])]
    lengths = np.clip(random.lognormal(np.log(300), 1.0, tokens // 100), 10, 20_000).astype(np.int64)
    file = folder / f"text-{vocabulary}.txt"
    with file.open("w") as out:
        for document in np.split(drawn, np.cumsum(lengths)[np.cumsum(lengths) < tokens]):
            out.writelines(" ".join(document[at : at + 24]) + "\n" for at in range(0, document.size, 24))
            out.write("\n")
    return file, folder / f"tokenizer-{vocabulary}"


def marked_tests(bench: Bench) -> dict[str, Any]:
    """The tests that need a GPU."""
    files = [file for file in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in file.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rf", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")
    return {"tests": done.stdout.strip().splitlines()[-1].strip("= ")}


def pretrain(bench: Bench, name: str, model: str, *more: Any, watched: Any = None) -> dict[str, Any]:
    """Run scripts/run_pretraining.py in the folder NAME, which is new unless the run is continued."""
    from watching import run_script

    run_dir = bench.work_dir / name
    if "--do_continue" not in more:
        shutil.rmtree(run_dir, ignore_errors=True)
    store = bench.work_dir / f"store-{bench.vocabulary(model)}"
    arguments = ["--dataset_dir", store, "--model_dir", run_dir, "--model_type", model]
    return run_script("run_pretraining.py", [*arguments, "--tracker", "none", *more], watched)


def short(bench: Bench, steps: int, options: Sequence[str]) -> list[Any]:
    """Options of a run of a tiny model that goes on to its end."""
    rows = 8 if bench.smoke else 32
    often = ["--warmup_steps", 2, "--logging_steps", 2, "--eval_rows", rows]
    return ["--batch_size", rows, "--max_steps", steps, *often, "--precision", *options]


def tiny(bench: Bench, model: str, options: Sequence[str], steps: int) -> dict[str, Any]:
    """A whole run: the loss must be a number, and fall."""
    from lmscripts.training.log import read_log

    pretrain(bench, "run", model, *short(bench, steps, options))
    records = read_log(bench.work_dir / "run" / "log.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    if None in losses or losses[-1] >= losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses}")
    return {"first_loss": losses[0], "last_loss": losses[-1], "held_out_loss": held_out[-1]}


def resumed(bench: Bench, model: str, options: Sequence[str]) -> dict[str, Any]:
    """How far a run that was stopped halfway and continued ends from one that was not."""
    from safetensors.torch import load_file

    options = short(bench, 8, options)
    pretrain(bench, "whole", model, *options)
    pretrain(bench, "halves", model, *options, "--stop_at_step", 4)
    pretrain(bench, "halves", model, *options, "--do_continue")
    differences = []
    for file in (bench.work_dir / "whole" / "final").rglob("*.safetensors"):
        theirs = load_file(bench.work_dir / "halves" / file.relative_to(bench.work_dir / "whole"))
        differences += [(a.float() - theirs[name].float()).abs().max().item() for name, a in load_file(file).items()]
    return {"same_bits": max(differences) == 0, "largest_difference": max(differences)}


def speed(bench: Bench, model: str, length: int, rows: int, options: Sequence[Any], *, save: bool) -> dict[str, Any]:
    """Steps of run_pretraining.py: milliseconds, tokens, utilisation, memory, and where the time goes."""
    from watching import Watched

    from lmscripts.training.log import read_log

    every = 2 if bench.smoke else WINDOW
    run_dir = bench.work_dir / "run"
    watched = Watched(every, every * (1 + WINDOWS), run_dir, save)
    sizes = ["--sequence_length", length, "--batch_size", rows]
    often = ["--max_steps", NEVER, "--logging_steps", every, "--save_steps", watched.save_step, "--eval_every", NEVER]
    seen = pretrain(bench, "run", model, *sizes, *options, *often, watched=watched)
    records = [record for record in read_log(run_dir / "log.jsonl") if "tokens_per_second" in record][: 1 + WINDOWS]
    tokens = [(after["tokens"] - before["tokens"]) / every for before, after in pairwise(records)]
    times = [1000 * some / record["tokens_per_second"] for some, record in zip(tokens, records[1:])]
    names = ("tokens_per_second", "mfu", "gpu_memory_gib")
    figures = {name: [record[name] for record in records[1:] if name in record] for name in names}
    found = {"ms_per_step": statistics.median(times), "ms_from": min(times), "ms_to": max(times)}
    found |= {name: statistics.median(values) for name, values in figures.items() if values}
    if "synchronisations" in seen:  # on a GPU
        found["idle"] = max(0.0, 1 - seen["busy_ms"] / found["ms_per_step"])
    return found | seen


def loss(
    bench: Bench, logits: int, vocabulary: int, positions: int, width: int, compiled: bool = False
) -> dict[str, Any]:
    """Forward and backward of the loss over a vocabulary, in pieces of so many logits."""
    import torch

    from lmscripts.models.cross_entropy import chunked_cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = torch.randn(positions, width, device=device, requires_grad=True)
    matrix = torch.randn(vocabulary, width, device=device).mul_(0.02).requires_grad_()
    how = {"compiled": True} if compiled else {}
    labels, weights = torch.randint(vocabulary, (positions,), device=device), torch.ones(positions, device=device)

    def step() -> None:
        states.grad = matrix.grad = None
        with torch.autocast(device, torch.bfloat16):
            pieces = max(1, logits // vocabulary)
            sums = chunked_cross_entropy(states, matrix, None, labels, weights, positions_at_once=pieces, **how)
        sums[0].backward()

    seconds, memory = timed(step, bench)
    return {"ms": 1000 * seconds, "tflops": 6 * positions * vocabulary * width / seconds / 1e12, "memory_gib": memory}


def segments(bench: Bench, padded: int, rows: int, length: int, heads: int) -> dict[str, Any]:
    """Forward and backward of causal varlen attention where 4 documents a row stand among so many padded sequences."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from lmscripts.models.attention import attention_inputs, use_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = rows * length
    ends = torch.arange(padded + 1, dtype=torch.int32, device=device).mul_(length // 4).clamp_(max=total)
    shape = (rows, heads, length, 64)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    batch = {"segment_ends": ends, "input_ids": torch.zeros(rows, length, dtype=torch.int64, device=device)}
    inputs = attention_inputs("varlen", batch, torch.bfloat16)
    attend, module = ALL_ATTENTION_FUNCTIONS[use_attention("varlen")], torch.nn.Module()
    module.is_causal = True

    def step() -> None:
        query.grad = key.grad = value.grad = None
        attend(module, query, key, value, **inputs)[0].float().sum().backward()

    seconds, memory = timed(step, bench)
    return {"ms": 1000 * seconds, "memory_gib": memory}


# ---- the items, the most valuable first ----------------------------------------------------------------------------


Case = tuple[str, int, int]  # preset, positions of a row, rows of a step


def items(smoke: bool) -> list[Item]:
    """All items of a run."""
    begin = [Item("machine", 20, machine), Item("stores", 40, stores), Item("tests marked gpu", 60, marked_tests)]
    if smoke:
        cases = [(f"{family}-tiny", 64, 8) for family in FAMILIES]
        wholes = [*map(whole, FAMILIES, ["bf16"] * 4, [10] * 4), stopped("electra", "no", "--deterministic")]
        speeds = [speeds_of(cases[0], "by default", save=True), *(speeds_of(case, "eager") for case in cases[1:])]
        return [*begin, *wholes, *speeds, loss_of(14, SMALL, 64, 32), segments_of(128, 2, 64, 2)]  # to compile is slow
    bert, gpt2, electra = ("bert-base", 512, 128), ("gpt2-small", 1024, 32), ("electra-small", 128, 1024)
    main: list[Case] = [bert, gpt2, electra, ("modernbert-base", 512, 128)]
    rest: list[Case] = [("bert-base", 512, 32), ("electra-small", 128, 128)]
    rest += [("gpt2-small", 1024, 16), ("gpt2-small", 1024, 64)]
    begin += [whole(family, "bf16") for family in FAMILIES]
    begin += [speeds_of(case, "eager") for case in main] + [speeds_of(case, "compiled", save=True) for case in main]
    begin += [speeds_of(bert, "by default"), stopped("bert", "bf16"), stopped("electra", "bf16", "--deterministic")]
    begin += [loss_of(power, size) for power, size in [(24, LARGE), (27, LARGE), (29, LARGE), (27, 50_257)]]
    begin += [loss_of(27, LARGE, compiled=True)]
    begin += [segments_of(padded) for padded in (128, 2048, 32_768)]
    begin += [whole("bert", "fp16"), whole("electra", "fp16"), whole("bert", "no")]
    begin += [speeds_of(case, "eager") for case in rest] + [speeds_of(case, "compiled") for case in rest]
    return [*begin, speeds_of(bert, "compiled", "--hidden_dropout", 0.1), speeds_of(gpt2, "by default")]


def whole(family: str, precision: str, steps: int = 30) -> Item:
    """A run of a tiny model to its end."""
    values = {"model": f"{family}-tiny", "options": [precision], "steps": steps}
    return Item(f"{family}-tiny {precision}", 15, tiny, values)


def stopped(family: str, precision: str, *more: str) -> Item:
    """A run that is stopped halfway and continued."""
    name = " ".join([f"{family}-tiny {precision}", *more, "stopped and continued"])
    return Item(name, 40, resumed, {"model": f"{family}-tiny", "options": [precision, *more]})


def speeds_of(case: Case, way: str, *more: Any, save: bool = False) -> Item:
    """Steps of a model: eager, compiled, or as run_pretraining.py does it where nobody says how."""
    model, length, rows = case
    how = [] if way == "by default" else ["--precision", "bf16", "--hidden_dropout", 0, "--micro_batch_size", rows]
    how += {"eager": ["--no_compile"], "compiled": ["--compile"]}.get(way, [])
    name = " ".join([f"{model} T={length} B={rows} {way}", *map(str, more)])
    values = {"model": model, "length": length, "rows": rows, "options": [*how, *more], "save": save}
    return Item(name, 20 if way == "eager" else 70, speed, values)


def loss_of(power: int, vocabulary: int, positions: int = 32 * 1024, width: int = 768, compiled: bool = False) -> Item:
    """The loss of 32 rows of GPT-2."""
    values = {"logits": 1 << power, "vocabulary": vocabulary, "positions": positions, "width": width}
    name = f"loss, 2^{power} logits at once, vocabulary {vocabulary:,}{', compiled' * compiled}"
    return Item(name, 30 if compiled else 8, loss, values | {"compiled": compiled})


def segments_of(padded: int, rows: int = 32, length: int = 1024, heads: int = 12) -> Item:
    """The attention of a layer of GPT-2."""
    values = {"padded": padded, "rows": rows, "length": length, "heads": heads}
    return Item(f"varlen attention, {padded:,} sequences", 8, segments, values)


# ---- one process for each ------------------------------------------------------------------------------------------


def run_items(
    todo: Sequence[Item], bench: Bench, minutes: float, write: Callable[[dict[str, Any]], None], preloaded: list[str]
) -> None:
    """Run items one after another, each in a process of its own, and write what each gave.

    Where a fork of a process with the imports behind it cannot use the GPU, all begin anew from there on.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that to import is not to begin with CUDA
    began, context = time.monotonic(), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    for item in todo:
        left = 60 * minutes - (time.monotonic() - began)
        if item.seconds > left:
            write({"item": item.name, "status": "skipped", "estimate": item.seconds, "left": round(max(0.0, left))})
            continue
        patience = left if bench.smoke else min(left, 60 + 4 * item.seconds)
        result = run_item(context, item, bench, patience)
        if any(words in result.get("error", "") for words in FRESH) and context.get_start_method() != "spawn":
            context = multiprocessing.get_context("spawn")
            result = run_item(context, item, bench, min(patience, 60 * minutes - (time.monotonic() - began)))
        write(result)


def run_item(context: Any, item: Item, bench: Bench, patience: float) -> dict[str, Any]:
    """What an item gave, or what ended it; nothing that it started is left."""
    log = bench.work_dir / "output.txt"
    ours, theirs = context.Pipe(duplex=False)
    process, began = context.Process(target=_work, args=(item, bench, log, theirs)), time.monotonic()
    log.write_text("")
    process.start()
    theirs.close()
    try:
        ready = wait([ours, process.sentinel], patience)
        try:
            result = ours.recv() if ready and ours.poll(1) else None
        except EOFError:
            result = None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if result is None:
        why = f"ended with {process.exitcode}" if ready else f"not done after {patience:.0f} s"
        result = {"status": "failed" if ready else "late", "error": why}
    if "error" in result:
        result["error"] += f": {_last_words(log)}"
    return {"item": item.name, "seconds": time.monotonic() - began, "estimate": item.seconds} | result


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-500:]


def _work(item: Item, bench: Bench, log: Path, connection: Any) -> None:
    """In the process of an item."""
    os.setpgrp()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        connection.send({"status": "ok", **item.run(bench, **item.arguments)})
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}", flush=True)
        connection.send({"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]})


# ---- the command ---------------------------------------------------------------------------------------------------


def copy_packages(folder: Path) -> None:
    """What images made for training lack, and is plain Python: it may be copied."""
    from importlib import metadata

    for file in metadata.files("jsonargparse") or []:
        if ".." not in file.parts and file.suffix != ".pyc":
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_file", type=Path, default=Path("gpu.jsonl"), help="one JSON line an item")
    parser.add_argument("--work_dir", type=Path, default=Path("gpu_check"), help="for stores and runs")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--smoke", action="store_true", help="tiny models, on a CPU too")
    parser.add_argument("--prepare", action="store_true", help="only make what can be carried to another machine")
    options = parser.parse_args()
    from gpu_table import read

    bench = Bench(options.work_dir.resolve(), options.smoke)
    bench.work_dir.mkdir(parents=True, exist_ok=True)
    packages = bench.work_dir / "packages"
    sys.path.append(str(packages))  # after all that is installed here
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", ""), str(packages)])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Locks of processes that were ended are cleared away at the end, of which nobody has to know.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    todo = items(options.smoke)
    if options.prepare:
        copy_packages(packages)
        print(next(item for item in todo if item.name == "stores").run(bench, **todo[1].arguments))
        return
    earlier = read(options.output_file)
    done = {result["item"] for result in earlier if result["status"] == "ok" and result["item"] != "machine"}
    was = next((result.get("device") for result in earlier if result["item"] == "machine"), None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the item's processes end too

    def write(result: dict[str, Any]) -> None:
        if result["item"] == "machine":
            result["planned"] = [item.name for item in todo]
            if was not in (None, result.get("device")):
                raise SystemExit(f"{options.output_file} is of {was}, this is {result.get('device')}: name another")
        line = json.dumps(result)
        with options.output_file.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")  # the line before may have been cut off
            file.flush()
            os.fsync(file.fileno())
        print(line if len(line) < 400 else line[:400] + "...", flush=True)

    run_items([item for item in todo if item.name not in done], bench, options.minutes, write, PRELOADED)


if __name__ == "__main__":
    main()
