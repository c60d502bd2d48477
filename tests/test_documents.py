"""Command lines that users of the older system have: they run as they were written, through python or a launcher."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import forked
import pytest
from conftest import PATIENCE, ROOT, SAMPLE, TINY_PRESET, free_port

TRAIN_TOKENIZER = """
python train_tokenizer.py \
--input_file ./share/corpus.txt \
--model_dir ./share/tokenizer \
--intermediate_dir ./data/corpus_split/ \
--num_files 20 \
--mecab_dic_type ipadic \
--tokenizer_type wordpiece \
--vocab_size 32768 \
--min_frequency 2 \
--limit_alphabet 6129 \
--num_unused_tokens 10
"""
PRETRAIN = """
python run_pretraining.py \
--input_file ./share/corpus.txt \
--tokenizer_dir ./share/tokenizer/ \
--model_dir ./model/bert/ \
--parameter_file parameter.json \
--model_type bert-base \
--fp16_type 0 \
--tokenizer_type wordpiece \
--mecab_dic_type ipadic \
--do_whole_word_mask
"""
LAUNCHED = """
python -m torch.distributed.launch \
--nproc_per_node=2 --nnodes=1 --node_rank=0 --master_addr="127.0.0.1" \
--master_port=50916 run_pretraining.py \
--input_file ./share/corpus.txt \
--tokenizer_dir ./share/tokenizer/ \
--model_dir ./model/bert_launched/ \
--parameter_file parameter.json \
--model_type bert-base \
--fp16_type 0 \
--tokenizer_type wordpiece \
--mecab_dic_type ipadic \
--node_rank 0 \
--local_rank 0 \
--do_whole_word_mask
"""


EXTRACT = """
python extract_electra_model.py \
--input_dir ./model/electra/checkpoint-4 \
--output_dir ./model/electra/extracted-4 \
--parameter_file parameter.json \
--model_type electra-small \
--generator \
--discriminator
"""


def run_as_written(text, folder, launcher=None, forks=True):
    """Run a documented line in `folder`, forked or not; the scripts are those of the project, found by their path."""
    words = shlex.split(re.sub(r"(\w+\.py)", lambda found: str(ROOT / "scripts" / found.group(1)), text))
    words = [sys.executable, *words[1:]]
    if launcher is not None:
        words = [*launcher, *words[1:]]
    if forks:
        return forked.run(words, cwd=folder, timeout=PATIENCE)
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: ./share/corpus.txt and a parameter.json whose bert-base is small enough for a test."""
    folder = tmp_path_factory.mktemp("older")
    (folder / "share").mkdir()
    shutil.copy(SAMPLE / "articles.txt", folder / "share" / "corpus.txt")
    small = {**TINY_PRESET, "train-steps": 4}
    electra = {**small, "embedding-size": 16, "generator-size": "1/1", "mask-percent": 15}
    presets = {"bert-base": small, "electra-small": electra}
    (folder / "parameter.json").write_text(json.dumps(presets), encoding="utf-8")
    done = run_as_written(TRAIN_TOKENIZER, folder)
    assert done.returncode == 0, done.stderr
    assert "--mecab_dic_type is now --mecab_dic" in done.stderr + done.stdout
    return folder


def test_train_tokenizer(folder):
    assert len(list((folder / "data" / "corpus_split").glob("*.txt"))) == 20
    vocabulary = (folder / "share" / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert vocabulary[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]


def test_pretraining_and_going_on(folder):
    done = run_as_written(PRETRAIN, folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "model" / "bert" / "final" / "model.safetensors").exists()
    again = run_as_written(PRETRAIN + " --do_continue --disable_overwrite_cache", folder)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout


@pytest.mark.launch
def test_pretraining_through_accelerate(folder):
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")]
    done = run_as_written(PRETRAIN.replace("model/bert/", "model/bert_accelerate/"), folder, launcher, forks=False)
    assert done.returncode == 0, done.stderr
    assert "processes    2" in done.stdout


@pytest.mark.slow
@pytest.mark.launch
def test_pretraining_through_the_older_launcher(folder):
    done = run_as_written(LAUNCHED.replace("50916", str(free_port())), folder, forks=False)
    assert done.returncode == 0, done.stderr
    assert "processes    2" in done.stdout
    assert "--local_rank" in done.stderr + done.stdout
    assert (folder / "model" / "bert_launched" / "final" / "model.safetensors").exists()


def test_documented_node_map_decides_the_shares(folder):
    """The multi-node batch-size of the document, asked of one node only: refused with both lists of nodes."""
    preset = {**TINY_PRESET, "batch-size": {"0": 100, "1": 100, "2": 56}}
    (folder / "nodes.json").write_text(json.dumps({"bert-base": preset}), encoding="utf-8")
    done = run_as_written(PRETRAIN.replace("parameter.json", "nodes.json").replace("bert/", "nodes/"), folder)
    assert done.returncode == 2
    assert "[0, 1, 2]" in done.stderr
    assert "[0]" in done.stderr


@pytest.mark.launch
def test_electra_and_its_extraction(folder):
    """Through a launcher; the halves of the checkpoint then load without this package."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")]
    electra = PRETRAIN.replace("model/bert/", "model/electra/").replace("bert-base", "electra-small")
    done = run_as_written(electra, folder, launcher)
    assert done.returncode == 0, done.stderr
    assert "processes    2" in done.stdout
    done = run_as_written(EXTRACT, folder)
    assert done.returncode == 0, done.stderr
    program = """
import sys
sys.modules["lmscripts"] = None  # importing it would fail
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer
batch = AutoTokenizer.from_pretrained("generator")("水は[MASK]。", return_tensors="pt")
assert AutoModelForMaskedLM.from_pretrained("generator")(**batch).logits.shape[2] > 1000
assert AutoModelForPreTraining.from_pretrained("discriminator")(**batch).logits.shape == batch["input_ids"].shape
"""
    where = folder / "model" / "electra" / "extracted-4"
    done = forked.run([sys.executable, "-c", program], cwd=where, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
