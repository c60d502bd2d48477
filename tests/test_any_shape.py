"""The result does not depend on the shape of the cluster: 1, 2, 2+1 and 3+1+2 processes, no disk in common.

Every node is started by launch.py in a folder of its own, which holds its own copy of the inputs under relative names:
what another node has, or writes, is not there for it.
"""

import json
import random
import shutil
import subprocess
import sys

import pytest
from cluster import launch_nodes
from conftest import PATIENCE, ROOT, TINY_PRESET, free_port
from runs import log_of, losses

pytestmark = pytest.mark.slow

SHAPES = ([1], [2], [2, 1], [3, 1, 2])
ELECTRA = {**TINY_PRESET, "embedding-size": 16, "generator-size": "1/2", "mask-percent": 15}
PRESETS = {"bert-test": TINY_PRESET, "gpt2-test": TINY_PRESET, "electra-test": ELECTRA}
PRETRAINING = ["--dataset_dir", "inputs/store", "--parameter_file", "inputs/presets.json", "--tracker", "none"]
PRETRAINING += ["--max_steps", 6, "--batch_size", 21, "--hidden_dropout", 0.1, "--model_dir", "run", "--model_type"]
CLASSIFIER = ["inputs/topics.csv", "--model_name_or_path", "inputs/bert", "--output_dir", "run", "--tracker", "none"]
CLASSIFIER += ["--dropout", 0.1, "--epochs", 1, "--batch_size", 13, "--max_length", 32, "--logging_steps", 1]
RUNS = {
    "masked": ["run_pretraining.py", *PRETRAINING, "bert-test", "--do_whole_word_mask", "--attention_dropout", 0.1],
    "causal": ["run_pretraining.py", *PRETRAINING, "gpt2-test"],
    "muon": ["run_pretraining.py", *PRETRAINING, "gpt2-test", "--optimizer", "muon"],
    "electra": ["run_pretraining.py", *PRETRAINING, "electra-test"],
    "pairs": ["run_pretraining.py", *PRETRAINING, "bert-test", "--objective", "sentence_pairs"],
    "classifier": ["finetune_classifier.py", *CLASSIFIER],
}


@pytest.fixture(scope="module")
def inputs(store_dir, tokenizer_dir, workspace):
    """What every machine has a copy of."""
    from test_finetune_classifier import tiny_bert

    folder = workspace / "inputs"
    folder.mkdir()
    shutil.copytree(store_dir, folder / "store")
    tiny_bert(folder / "bert", tokenizer_dir)
    (folder / "presets.json").write_text(json.dumps(PRESETS), encoding="utf-8")
    draw = random.Random(1)
    rows = [f"{''.join(draw.choices('駅列車星月水鍋', k=5 + n % 40))},{'ab'[n % 2]}" for n in range(60)]
    (folder / "topics.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    return folder


def run_on(counts, what, inputs, folder):
    """A run on as many nodes as there are counts; the folder of its main machine."""
    for node in range(len(counts)):
        shutil.copytree(inputs, folder / f"node{node}" / "inputs")
    launch_nodes(counts, *RUNS[what], node_dir=folder / "node{}")
    others = [path.name for node in range(1, len(counts)) for path in (folder / f"node{node}").iterdir()]
    assert "run" not in others
    return folder / "node0" / "run"


@pytest.mark.parametrize("what", RUNS)
def test_any_shape_gives_what_one_process_gives(what, inputs, tmp_path):
    one, *others = [run_on(counts, what, inputs, tmp_path / f"{len(counts)}-{sum(counts)}") for counts in SHAPES]
    log = next(one.rglob("log.jsonl")).parent
    assert len({step for step, _ in losses(log)}) >= 5
    for other, counts in zip(others, SHAPES[1:], strict=True):
        theirs = next(other.rglob("log.jsonl")).parent
        a, b = losses(log), losses(theirs)
        assert a.keys() == b.keys()
        most = max(abs(a[key] - b[key]) for key in a)
        seen, theirs_seen = ([record.get("tokens") for record in log_of(place)] for place in (log, theirs))
        print(f"{what} {counts}: losses differ by at most {most:.1e} in {len(a)} numbers")
        assert most <= 1e-5, counts
        assert seen == theirs_seen  # every row once: as many real tokens after every step


@pytest.mark.launch
def test_lines_of_the_older_launcher_run_as_written(inputs, tmp_path):
    """Two nodes on the loopback address, with the document's options of torch.distributed.launch and of the script."""
    port, started = free_port(), []
    sizes = {**TINY_PRESET, "batch-size": {"0": 5, "1": 3}, "train-steps": 4}
    for node in range(2):
        shutil.copytree(inputs, tmp_path / f"node{node}" / "share")
        presets = tmp_path / f"node{node}" / "parameter.json"
        presets.write_text(json.dumps({"bert-base": sizes}), encoding="utf-8")
        shutil.copy(ROOT / "sample_data" / "articles.txt", tmp_path / f"node{node}" / "share" / "corpus.txt")
        line = f"""-m torch.distributed.launch --nproc_per_node=2 --nnodes=2 --node_rank={node} --master_addr=127.0.0.1
            --master_port={port} {ROOT}/scripts/run_pretraining.py --input_file ./share/corpus.txt
            --tokenizer_dir ./share/bert/ --model_dir ./model/bert/ --parameter_file parameter.json
            --model_type bert-base --fp16_type 0 --tokenizer_type wordpiece --mecab_dic_type ipadic
            --node_rank {node} --local_rank 0 --do_whole_word_mask --do_continue --disable_overwrite_cache"""
        with open(tmp_path / f"log{node}", "wb") as log:
            folder, words = tmp_path / f"node{node}", [sys.executable, *line.split()]
            started.append(subprocess.Popen(words, cwd=folder, stdout=log, stderr=log))
    for node, process in enumerate(started):
        assert process.wait(timeout=PATIENCE) == 0, (tmp_path / f"log{node}").read_text()
    assert "rows of a step [3, 2, 2, 1]" in (tmp_path / "log0").read_text()
    assert (tmp_path / "node0" / "model" / "bert" / "final" / "model.safetensors").exists()
    assert not (tmp_path / "node1" / "model" / "bert" / "final").exists()
