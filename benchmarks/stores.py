"""Stores at scale: making one from text, the index of its rows, memory, and rows that are not in memory yet.

    python benchmarks/stores.py text   --text corpus.txt --tokenizer_dir tokenizer
    python benchmarks/stores.py memory --text corpus.txt --tokenizer_dir tokenizer
    python benchmarks/stores.py index  --store store --documents 10000000
    python benchmarks/stores.py cold   --store store --documents 3000000

text: what `prepare_corpus.py --num_workers 1` does to the lines of a text against what `run_mlm --line_by_line` does:
`datasets` reads the text and maps the tokenizer of transformers over it, in batches of 1,000 lines, and writes Arrow.
Both load their tokenizer within the clock, write to the disk, and use one process and one thread; the tokens are
counted and must be as many. memory: the largest process of `prepare_corpus.py` on the text once, twice, four times.
index, cold: on a made-up store of short documents, which has the tokenizer of a real one. index: makes the index of
its rows; the memory of the process is that with no page of a file counted. cold: reads batches of rows in random order
after the system was told to forget the files, with and without asking for a batch's rows at once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import numpy as np
import psutil
from paired import compare

from lmscripts.data import arrays, token_store
from lmscripts.data.packing import Layout, open_rows
from lmscripts.data.preparation import Source, prepare_store
from lmscripts.data.token_store import EncodedBatch, open_store

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "memory", "index", "cold"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer_dir", type=Path)
    parser.add_argument("--store", type=Path, help="a real store, for its tokenizer")
    parser.add_argument("--work_dir", type=Path, help="where stores are made; default: a temporary folder")
    parser.add_argument("--megabytes", type=float, default=8, help="of text; read again from its start if it has less")
    parser.add_argument("--documents", type=int, default=10_000_000, help="of the made-up store")
    parser.add_argument("--mean_tokens", type=int, default=20, help="of its documents")
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        {"text": text, "memory": memory, "index": index, "cold": cold}[options.what](options, Path(folder))


# ---- text --------------------------------------------------------------------------------------------------------


def write_text(options: argparse.Namespace, file: Path, times: int = 1) -> float:
    """The first megabytes of the text so many times; returns its megabytes."""
    lines = options.text.read_bytes().splitlines(keepends=True)
    left = options.megabytes * 1e6
    with file.open("wb") as out:
        for _ in range(times):
            while left > 0:
                for line in lines:
                    out.write(line)
                    if (left := left - len(line)) <= 0:
                        break
            left = options.megabytes * 1e6
            out.write(b"\n\n")
    return file.stat().st_size / 1e6


def text(options: argparse.Namespace, folder: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    size = write_text(options, folder / "text.txt")

    def ours(pair: int) -> int:
        source = Source((str(folder / "text.txt"),), options.tokenizer_dir, line_ends="drop")
        parts = prepare_store(source, folder / f"store{pair}", num_workers=1).manifest["parts"]
        return sum(part["tokens"] for part in parts.values())

    def theirs(pair: int) -> int:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_dir, local_files_only=True)

        def encode(examples: dict[str, list[str]]) -> Any:
            lines = [line.strip() for line in examples["text"] if line and not line.isspace()]
            return tokenizer(lines, return_special_tokens_mask=True, add_special_tokens=False, verbose=False)

        lines = datasets.Dataset.from_text(str(folder / "text.txt"), cache_dir=str(folder / f"cache{pair}"))
        mapped = lines.map(encode, batched=True, remove_columns=["text"])
        return sum(len(ids) for batch in mapped.data["input_ids"].chunks for ids in batch)

    def check(ours: int, theirs: int) -> None:
        if ours != theirs:
            raise SystemExit(f"{ours:,} tokens and {theirs:,}")

    pairs = compare(ours, theirs, options.pairs, check)
    print(f"{size:.1f} MB of text, {options.pairs} pairs, as many tokens")
    print(pairs.report(size, "MB"))


def memory(options: argparse.Namespace, folder: Path) -> None:
    for times in (1, 2, 4):
        size = write_text(options, folder / "text.txt", times)
        command = [sys.executable, ROOT / "scripts" / "prepare_corpus.py", "--input_file", folder / "text.txt"]
        command += ["--tokenizer_dir", options.tokenizer_dir, "--output_dir", folder / f"store{times}"]
        process = subprocess.Popen([*map(str, command), "--num_workers", "2"], stdout=subprocess.DEVNULL)
        peaks: dict[str, int] = {}
        while process.poll() is None:
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    kind = "main" if each.pid == process.pid else "worker"
                    peaks[kind] = max(peaks.get(kind, 0), each.memory_info().rss)
                except psutil.Error:
                    continue
            time.sleep(0.1)
        print(f"{size:7.1f} MB: " + ", ".join(f"{kind} {peak / 1e6:,.0f} MB" for kind, peak in peaks.items()))


# ---- made-up stores ----------------------------------------------------------------------------------------------


def make_store(real: Path, folder: Path, documents: int, mean_tokens: int) -> None:
    """A valid store of random tokens, with the tokenizer of a real one and nothing held out."""
    manifest = json.loads((real / "manifest.json").read_text(encoding="utf-8"))
    folder.mkdir()
    shutil.copytree(real / "tokenizer", folder / "tokenizer")
    writers = {name: token_store._PartWriter(folder / name) for name in ("train", "validation")}
    random = np.random.default_rng(0)
    for begin in range(0, documents, 100_000):
        number = min(100_000, documents - begin)
        sizes = random.integers(1, 2 * mean_tokens, number)
        total = int(sizes.sum())
        ids = random.integers(0, manifest["tokenizer"]["vocab_size"], total, manifest["dtype"])
        starts = random.random(total, np.float32) < 0.8
        of_documents = np.stack([sizes, np.ones_like(sizes), 4 * sizes, sizes, 0 * sizes], 1)
        nothing = np.zeros(number, np.bool_)
        batch = EncodedBatch(ids, starts, sizes.astype(np.uint32), of_documents, nothing, np.zeros(number, np.uint64))
        writers["train"].append(batch, ~nothing)
    manifest["parts"] = {name: writer.close() for name, writer in writers.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


class Anonymous(threading.Thread):
    """Watches the memory of this process that is no page of a file, in bytes, above what it is at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.begun = 0, self.now()
        self.start()

    @staticmethod
    def now() -> int:
        """The bytes at this moment."""
        found = psutil.Process().memory_info()
        return int(found.rss - found.shared)

    def run(self) -> None:
        """Look a hundred times a second."""
        while True:
            self.peak = max(self.peak, self.now() - self.begun)
            time.sleep(0.01)


def index(options: argparse.Namespace, folder: Path) -> None:
    for packing in ("isolated", "contiguous"):
        for documents in (options.documents // 4, options.documents):
            if not (place := folder / str(documents)).exists():
                make_store(options.store, place, documents, options.mean_tokens)
            store, watched = open_store(place), Anonymous()
            cpu, wall = time.process_time(), time.perf_counter()
            rows = open_rows(store, "train", Layout(options.sequence_length, packing, 2, 3, 0))  # type: ignore[arg-type]
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            print(
                f"{packing}: {documents:,} documents, {rows.real_tokens:,} tokens, {rows.num_rows:,} rows: "
                f"{cpu:.1f} CPU s, {wall:.1f} s, {watched.peak / 1e6:,.0f} MB more memory"
            )


def cold(options: argparse.Namespace, folder: Path) -> None:
    make_store(options.store, place := folder / "store", options.documents, options.mean_tokens)
    store = open_store(place)
    layout = Layout(options.sequence_length, "isolated", 2, 3, 0)
    open_rows(store, "train", layout)
    os.sync()
    has_faults = SimpleNamespace(getrusage=resource.getrusage, RUSAGE_THREAD=resource.RUSAGE_THREAD)

    def read(asks: bool, seed: int) -> int:
        rows = open_rows(store, "train", layout)
        assert rows is not None
        arrays.resource = has_faults if asks else SimpleNamespace()  # type: ignore[assignment]
        order = np.random.default_rng(seed).permutation(rows.num_rows)[: 10 * 256].reshape(10, 256)
        return sum(int(rows.read(batch).ids.sum(dtype=np.int64)) for batch in order)

    def forget() -> None:
        for file in place.rglob("*.bin"):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    seconds: dict[str, list[tuple[float, int]]] = {}
    for pair in range(options.pairs):
        found = set()
        for asks in (True, False) if pair % 2 else (False, True):
            for state in ("cold", "warm"):
                if state == "cold":
                    forget()
                begun, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
                found.add(read(asks, pair))
                kind = f"{state}, {'asked for' if asks else 'not asked'}"
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
                seconds.setdefault(kind, []).append((time.perf_counter() - begun, faults))
        assert len(found) == 1
    size = sum(file.stat().st_size for file in place.rglob("*.bin")) / 1e6
    print(f"10 batches of 256 rows of {options.sequence_length} from a store of {size:,.0f} MB")
    print("seconds of each pair (and how often the disk was waited for)")
    for kind, times in sorted(seconds.items()):
        print(f"{kind:<18}", "  ".join(f"{each:.2f} ({faults:,})" for each, faults in times))


if __name__ == "__main__":
    main()
