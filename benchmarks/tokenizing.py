"""Tokenising in one process: lmscripts' encoder against BertJapaneseTokenizer of transformers, on the same lines.

    python benchmarks/tokenizing.py --text corpus.txt --tokenizer_dir tokenizer

Every pair takes lines that neither way has seen. The encoder keeps the ids of each word it met, so before the clock
starts it reads `--warm_lines` other lines, as it will have after the first seconds of a real corpus; `--warm_lines 0`
shows it cold. BertJapaneseTokenizer is called with 1,000 lines at a time, without special tokens and asked for nothing
but ids. The ids of every line are compared.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from paired import compare
from transformers import AutoTokenizer

from lmscripts.tokenizer.encoder import load_encoder

BATCH = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="one sentence a line")
    parser.add_argument("--tokenizer_dir", type=Path, required=True, help="a BertJapaneseTokenizer")
    parser.add_argument("--lines", type=int, default=3_000, help="lines of a pair")
    parser.add_argument("--warm_lines", type=int, default=30_000, help="lines the encoder reads before")
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()

    with options.text.open(encoding="utf-8") as file:
        lines = [stripped for line in file if (stripped := line.strip())]
    random.Random(0).shuffle(lines)
    if len(lines) < options.warm_lines + options.pairs * options.lines:
        raise SystemExit(f"{options.text} has {len(lines):,} lines, too few for these options")
    warm, fresh = lines[: options.warm_lines], lines[options.warm_lines :]
    encoder = load_encoder(options.tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_dir, local_files_only=True)
    encoder.encode(warm)

    def of_pair(pair: int) -> list[str]:
        return fresh[pair * options.lines : (pair + 1) * options.lines]

    def theirs(pair: int) -> list[list[int]]:
        taken, ids = of_pair(pair), []
        for start in range(0, len(taken), BATCH):
            ids += tokenizer(
                taken[start : start + BATCH],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        return ids

    def check(ours, theirs) -> None:
        for mine, other in zip(ours.rows(), theirs, strict=True):
            if mine.tolist() != other:
                raise SystemExit(f"different ids: {mine.tolist()} and {other}")

    pairs = compare(lambda pair: encoder.encode(of_pair(pair)), theirs, options.pairs, check)
    size = sum(len(line.encode()) for pair in range(options.pairs) for line in of_pair(pair)) / options.pairs / 1e6
    print(f"{options.pairs} pairs of {options.lines:,} lines ({size:.2f} MB), {options.warm_lines:,} lines read before")
    print(f"ids equal on all {options.pairs * options.lines:,} lines")
    print(pairs.report(size, "MB"))


if __name__ == "__main__":
    main()
