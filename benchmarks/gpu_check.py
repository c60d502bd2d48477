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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]
PRELOADED = ["torch._dynamo", "accelerate", "lmscripts.training.log", "lmscripts.models.building"]
PRELOADED += [f"transformers.models.{family}.modeling_{family}" for family in ("bert", "electra", "gpt2", "modernbert")]
WINDOW, WINDOWS = 10, 3  # steps between log lines, and how many of these count
TOKENS = 2_500_000  # of a store
NEVER = 1_000_000  # steps
FRESH = ("re-initialize CUDA", "initialization error", "sees no GPU")  # where a fork was not good enough


class Bench(NamedTuple):
    """Where artefacts lie, and whether sizes are those of a CPU."""

    work_dir: Path
    smoke: bool = False

    def store(self, vocabulary: int) -> Path:
        return self.work_dir / f"store-{vocabulary}"


class Item(NamedTuple):
    """One line of the output: its name, about how many seconds it takes, and what gives its figures."""

    name: str
    seconds: float
    run: Callable[..., dict[str, Any]]
    arguments: dict[str, Any] = {}


# ---- what is measured ------------------------------------------------------------------------------------------------


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


def stores(bench: Bench, vocabularies: Sequence[int], tokens: int) -> dict[str, Any]:
    """Token stores of generated text, one for each size of vocabulary; those that are there are left."""
    from lmscripts.data.preparation import Source, prepare_store

    made = {}
    for vocabulary in vocabularies:
        folder = bench.store(vocabulary)
        if not folder.exists():
            text, tokenizer = write_text(bench.work_dir, vocabulary, tokens)
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
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in file.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rf", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")
    return {"tests": done.stdout.strip().splitlines()[-1].strip("= ")}


def pretrain(bench: Bench, name: str, model: str, vocabulary: int, *more: Any, watched: Any = None) -> dict[str, Any]:
    """Run scripts/run_pretraining.py in the folder NAME, which is new unless the run is continued."""
    from watching import run_script

    run_dir = bench.work_dir / name
    if "--do_continue" not in more:
        shutil.rmtree(run_dir, ignore_errors=True)
    arguments = ["--dataset_dir", bench.store(vocabulary), "--model_dir", run_dir, "--model_type", model]
    return run_script("run_pretraining.py", [*arguments, "--tracker", "none", *more], watched)


def short(steps: int, *more: Any) -> list[Any]:
    """Options of a run of a tiny model that goes on to its end."""
    return ["--max_steps", steps, "--warmup_steps", 2, "--logging_steps", 2, "--eval_rows", 32, *more]


def tiny(bench: Bench, model: str, vocabulary: int, precision: str, steps: int) -> dict[str, Any]:
    """A whole run: the loss must be a number, and fall."""
    from lmscripts.training.log import read_log

    pretrain(bench, "run", model, vocabulary, *short(steps, "--precision", precision))
    records = read_log(bench.work_dir / "run" / "log.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    if None in losses or losses[-1] >= losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses}")
    return {"first_loss": losses[0], "last_loss": losses[-1], "held_out_loss": held_out[-1]}


def resumed(bench: Bench, model: str, vocabulary: int, precision: str, *, deterministic: bool) -> dict[str, Any]:
    """How far a run that was stopped halfway and continued ends from one that was not."""
    from safetensors.torch import load_file

    options = short(8, "--precision", precision, *["--deterministic"] * deterministic)
    pretrain(bench, "whole", model, vocabulary, *options)
    pretrain(bench, "halves", model, vocabulary, *options, "--stop_at_step", 4)
    pretrain(bench, "halves", model, vocabulary, *options, "--do_continue")
    differences = []
    for file in (bench.work_dir / "whole" / "final").rglob("*.safetensors"):
        theirs = load_file(bench.work_dir / "halves" / file.relative_to(bench.work_dir / "whole"))
        differences += [(a.float() - theirs[name].float()).abs().max().item() for name, a in load_file(file).items()]
    return {"same_bits": max(differences) == 0, "largest_difference": max(differences)}


def speed(
    bench: Bench, model: str, vocabulary: int, length: int, rows: int, *, compiled: bool, save: bool, more: Sequence[Any]
) -> dict[str, Any]:
    """Steps of run_pretraining.py: milliseconds, tokens, utilisation, memory, and where the time goes."""
    from watching import Watched

    from lmscripts.training.log import read_log

    every = 2 if bench.smoke else WINDOW
    run_dir = bench.work_dir / "run"
    watched = Watched(every, every * (1 + WINDOWS), run_dir, save)
    sizes = ["--sequence_length", length, "--batch_size", rows, "--micro_batch_size", rows]
    how = ["--precision", "bf16", "--hidden_dropout", 0, "--compile" if compiled else "--no_compile", *more]
    often = ["--max_steps", NEVER, "--logging_steps", every, "--save_steps", watched.save_step, "--eval_every", NEVER]
    seen = pretrain(bench, "run", model, vocabulary, *sizes, *how, *often, watched=watched)
    records = [record for record in read_log(run_dir / "log.jsonl") if "tokens_per_second" in record][: 1 + WINDOWS]
    tokens = [(after["tokens"] - before["tokens"]) / every for before, after in zip(records, records[1:])]
    times = [1000 * some / record["tokens_per_second"] for some, record in zip(tokens, records[1:])]
    names = ("tokens_per_second", "mfu", "gpu_memory_gib")
    figures = {name: [record[name] for record in records[1:] if name in record] for name in names}
    found = {"ms_per_step": statistics.median(times), "ms_from": min(times), "ms_to": max(times)}
    found |= {name: statistics.median(values) for name, values in figures.items() if values}
    if "gpu_memory_gib" in found:
        found["idle"] = max(0.0, 1 - seen["busy_ms"] / found["ms_per_step"])
    return found | {"model": model, "length": length, "rows": rows, "compiled": compiled} | seen


def loss(bench: Bench, logits: int, vocabulary: int, positions: int, width: int) -> dict[str, Any]:
    """Forward and backward of the loss over a vocabulary, in pieces of so many logits."""
    import torch

    from lmscripts.models.cross_entropy import chunked_cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = torch.randn(positions, width, device=device, requires_grad=True)
    matrix = torch.randn(vocabulary, width, device=device).mul_(0.02).requires_grad_()
    labels, weights = torch.randint(vocabulary, (positions,), device=device), torch.ones(positions, device=device)

    def step() -> None:
        states.grad = matrix.grad = None
        with torch.autocast(device, torch.bfloat16):
            pieces = max(1, logits // vocabulary)
            total = chunked_cross_entropy(states, matrix, None, labels, weights, positions_at_once=pieces)[0]
        total.backward()

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
    query, key, value = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    batch = {"segment_ends": ends, "input_ids": torch.zeros(rows, length, dtype=torch.int64, device=device)}
    inputs = attention_inputs("varlen", batch, torch.bfloat16)
    attend, module = ALL_ATTENTION_FUNCTIONS[use_attention("varlen")], torch.nn.Module()
    module.is_causal = True

    def step() -> None:
        query.grad = key.grad = value.grad = None
        attend(module, query, key, value, **inputs)[0].float().sum().backward()

    seconds, memory = timed(step, bench)
    return {"ms": 1000 * seconds, "memory_gib": memory}


# ---- the items, the most valuable first ------------------------------------------------------------------------------


def items(smoke: bool) -> list[Item]:
    """All items of a run."""
    small, large = (1024, 1024) if smoke else (32_768, 50_304)
    sizes = {"bert": small, "electra": small, "modernbert": small, "gpt2": large}

    def speeds(cases: Iterable[tuple[str, int, int]], compiled: bool, save: bool = False, **named: Any) -> list[Item]:
        made = []
        for model, length, rows in cases:
            values = {"model": model, "vocabulary": sizes[model.split("-")[0]], "length": length, "rows": rows}
            name = f"{model} T={length} B={rows} {'compiled' if compiled else 'eager'}{named.get('words', '')}"
            values |= {"compiled": compiled, "save": save, "more": named.get("more", ())}
            made.append(Item(name, 70 if compiled else 20, speed, values))
        return made

    def tinies(models: Iterable[str], precision: str) -> list[Item]:
        each = {"precision": precision, "steps": 10 if smoke else 30}
        return [
            Item(f"{family}-tiny {precision}", 15, tiny, {"model": f"{family}-tiny", "vocabulary": sizes[family]} | each)
            for family in models
        ]

    def resumes(precision: str, deterministic: bool, models: Iterable[str]) -> list[Item]:
        each = {"precision": precision, "deterministic": deterministic}
        words = f"{precision}, killed and continued" + ", --deterministic" * deterministic
        return [
            Item(f"{family}-tiny {words}", 40, resumed, {"model": f"{family}-tiny", "vocabulary": sizes[family]} | each)
            for family in models
        ]

    first = [Item("machine", 20, machine)]
    first += [Item("stores", 40, stores, {"vocabularies": sorted({small, large}), "tokens": 60_000 if smoke else TOKENS})]
    first += [Item("tests marked gpu", 60, marked_tests)]
    piece = {"positions": 64, "width": 32} if smoke else {"positions": 32 * 1024, "width": 768}
    shape = {"rows": 2, "length": 64, "heads": 2} if smoke else {"rows": 32, "length": 1024, "heads": 12}
    losses = [(24, large), (27, large), (29, large), (27, 50_257)][: 1 if smoke else None]
    parts = [
        Item(f"loss, 2^{power} logits, vocabulary {size:,}", 8, loss, {"logits": 1 << power, "vocabulary": size} | piece)
        for power, size in losses
    ]
    parts += [
        Item(f"varlen attention, {padded:,} sequences", 8, segments, {"padded": padded} | shape)
        for padded in ((128,) if smoke else (128, 2048, 32_768))
    ]
    if smoke:
        tiny_models = [(f"{family}-tiny", 64, 8) for family in sizes]
        one = speeds(tiny_models[:1], True, more=("--n_layer", 1))
        runs = tinies(sizes, "bf16") + resumes("no", True, ["electra"])
        return first + runs + speeds(tiny_models[:1], False, True) + speeds(tiny_models[1:], False) + one + parts
    main = [("bert-base", 512, 128), ("gpt2-small", 1024, 32), ("electra-small", 128, 1024), ("modernbert-base", 512, 128)]
    rest = [("bert-base", 512, 32), ("electra-small", 128, 128), ("gpt2-small", 1024, 16), ("gpt2-small", 1024, 64)]
    first += tinies(sizes, "bf16") + speeds(main, False) + speeds(main, True, True)
    first += resumes("bf16", False, ["bert"]) + resumes("bf16", True, ["electra"])
    first += parts + tinies(["bert", "electra"], "fp16") + tinies(["bert"], "no")
    dropout = speeds(main[:1], True, words=", dropout 0.1", more=("--hidden_dropout", 0.1))
    return first + speeds(rest, False) + speeds(rest, True) + dropout


# ---- one process for each ----------------------------------------------------------------------------------------------


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
        result = run_item(context, item, bench, min(left, 60 + 4 * item.seconds))
        if any(words in result.get("error", "") for words in FRESH) and context.get_start_method() != "spawn":
            context = multiprocessing.get_context("spawn")
            left = 60 * minutes - (time.monotonic() - began)
            result = run_item(context, item, bench, max(1.0, min(left, 60 + 4 * item.seconds)))
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
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # what runs here runs as it would anywhere
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        connection.send({"status": "ok", **item.run(bench, **item.arguments)})
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}", flush=True)
        connection.send({"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]})


# ---- the command -------------------------------------------------------------------------------------------------------


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
    bench = Bench(options.work_dir.resolve(), options.smoke)
    bench.work_dir.mkdir(parents=True, exist_ok=True)
    packages = bench.work_dir / "packages"
    sys.path.append(str(packages))  # after all that is installed here
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", ""), str(packages)])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    todo = items(options.smoke)
    if options.prepare:
        copy_packages(packages)
        print(next(item for item in todo if item.name == "stores").run(bench, **todo[1].arguments))
        return
    earlier = [json.loads(line) for line in _whole_lines(options.output_file)]
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
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line if len(line) < 400 else line[:400] + "...", flush=True)

    run_items([item for item in todo if item.name not in done], bench, options.minutes, write, PRELOADED)


def _whole_lines(file: Path) -> list[str]:
    """Lines of an output, of which the last may have been cut off and is then removed."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        file.write_text("".join(lines[:-1]), encoding="utf-8")
    return [line for line in lines if line.endswith("\n")]


if __name__ == "__main__":
    main()
