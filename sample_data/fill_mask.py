"""Three fill-mask examples with nothing but transformers: python sample_data/fill_mask.py MODEL_DIR."""

import sys

from transformers import logging, pipeline

SENTENCES = ("昆布を[MASK]に浸す。", "列車は次の[MASK]に着いた。", "夜空に[MASK]が見える。")

logging.disable_progress_bar()
fill = pipeline("fill-mask", model=sys.argv[1], top_k=3)
for sentence in SENTENCES:
    answers = ", ".join(f"{answer['token_str']} ({answer['score']:.0%})" for answer in fill(sentence))
    print(f"{sentence}  ->  {answers}")
