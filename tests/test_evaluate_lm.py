"""Whole evaluations: right, the same bits for any number of processes, and never of a model that nobody trained."""

import gzip
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256

import pytest
import torch
from conftest import PATIENCE, ROOT, SAMPLE, TINY_PRESET, launch, run_script
from runs import log_of
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

BLOCK = 64
EARLIER = json.dumps({"format": "lmscripts evaluation"})  # a result that may be replaced


@pytest.fixture(scope="module")
def text(workspace):
    """Twelve articles with the dirt that files have: a byte order mark, CRLF, spaces, several blank lines."""
    articles = (SAMPLE / "articles.txt").read_text(encoding="utf-8").strip().split("\n\n")[:12]
    file = workspace / "held_out.txt"
    articles[3] = articles[3].replace("\n", "  \n\u3000")
    file.write_bytes(("\ufeff\n" + "\n\n\n".join(articles) + "\n").replace("\n", "\r\n").encode())
    return file


@pytest.fixture(scope="module")
def causal_tokenizer(workspace):
    folder = workspace / "causal_tokenizer"
    arguments = ["--input_file", SAMPLE / "articles.txt", "--model_dir", folder, "--objective", "causal"]
    arguments += ["--tokenizer_type", "bpe", "--vocab_size", "1000"]
    run_script("train_tokenizer.py", *arguments, "--word_tokenizer", "none", "--normalization", "none")
    return folder


def save_model(folder, tokenizer_dir, family, trained=True):
    """A small model with its tokenizer; a trained one has other weights than initialisation gives."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": BLOCK, "vocab_size": len(tokenizer)}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=3))
    else:
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        model = BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=BLOCK, vocab_size=len(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * trained)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(workspace, causal_tokenizer):
    return save_model(workspace / "gpt2", causal_tokenizer, "gpt2")


@pytest.fixture(scope="module")
def bert(workspace, tokenizer_dir):
    return save_model(workspace / "bert", tokenizer_dir, "bert")


def evaluate(model, text, output, *more, **how):
    arguments = ["--model_dir", model, "--input_file", text, "--output_file", output, *more]
    done = run_script("evaluate_lm.py", *arguments, **how)
    return done, json.loads(output.read_text(encoding="utf-8")) if done.returncode == 0 else None


# ---- causal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [BLOCK // 4, BLOCK])
def test_causal_figures_equal_plain_transformers_document_by_document(gpt2, text, tmp_path, stride):
    _, result = evaluate(gpt2, text, tmp_path / "result.json", "--stride", stride)
    tokenizer = AutoTokenizer.from_pretrained(gpt2, local_files_only=True)
    model = GPT2LMHeadModel.from_pretrained(gpt2, local_files_only=True).eval()
    raw = text.read_bytes()
    documents = [[]]
    for line in raw.decode("utf-8-sig").split("\n"):
        if line.strip():
            documents[-1].append(line.removesuffix("\r"))
        elif documents[-1]:
            documents.append([])
    documents = ["\n".join(lines) for lines in documents if lines]
    nats = targets = right = 0
    for document in documents:
        # Line by line, as the store encodes.
        lines = document.replace("\n", "\n\0").split("\0")
        tokens = [n for line in lines for n in tokenizer(line, add_special_tokens=False)["input_ids"]]
        inputs, wanted, done = [2, *tokens], [*tokens, 3], 0
        for begin in range(0, len(inputs), stride):
            if done == len(inputs):
                break
            window = inputs[begin : begin + BLOCK]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0, done - begin :]
            labels = torch.tensor(wanted[done : begin + len(window)])
            nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
            targets += len(labels)
            done = begin + len(window)
    metrics, counts = result["metrics"], result["counts"]
    assert len(documents) == counts["documents"] == 12
    assert targets == counts["targets"] == counts["tokens"] + 12
    assert metrics["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-4)
    assert metrics["accuracy"] == right / targets
    assert counts["raw_bytes"] == len(raw)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(raw), rel=1e-5)
    assert counts["text_bytes"] == sum(len(d.encode()) + 1 for d in documents) < len(raw)
    assert metrics["bits_per_text_byte"] > metrics["bits_per_byte"]
    assert result["text"] == [{"file": text.name, "bytes": len(raw), "sha256": sha256(raw).hexdigest()}]
    weights = (gpt2 / "model.safetensors").read_bytes()
    assert result["model"]["weights_sha256"] == {"model.safetensors": sha256(weights).hexdigest()}
    assert result["untrained"] is False


def test_the_form_of_the_file_changes_nothing_but_its_bytes(alone, gpt2, text, tmp_path):
    packed = tmp_path / "held_out.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    _, found = evaluate(gpt2, packed, tmp_path / "packed.json", *MORE["gpt2"], "--num_workers", "2")
    expected = json.loads(alone["gpt2"].read_text(encoding="utf-8"))
    assert found["metrics"] == expected["metrics"]
    assert found["counts"] == expected["counts"]


# ---- any number of processes -------------------------------------------------------------------------------------

MORE = {"gpt2": ["--stride", "40"], "bert": ["--pseudo_perplexity", "--max_documents", "2"]}


@pytest.fixture(scope="module")
def alone(workspace, gpt2, bert, text):
    """Results of one process, to which the environment offers two threads."""
    files = {family: workspace / f"result-{family}.json" for family in MORE}
    for family, model in (("gpt2", gpt2), ("bert", bert)):
        evaluate(model, text, files[family], *MORE[family], env={"OMP_NUM_THREADS": "2"})
    return files


@pytest.mark.launch
@pytest.mark.parametrize(("family", "processes"), [("gpt2", 2), ("gpt2", 3), ("bert", 3)])
def test_result_has_the_same_bits_for_any_number_of_processes(request, alone, text, tmp_path, family, processes):
    file, temporary = tmp_path / "result.json", tmp_path / "temporary"
    temporary.mkdir()
    arguments = ["--model_dir", request.getfixturevalue(family), "--input_file", text, "--output_file", file]
    environment = {"TMPDIR": str(temporary)}
    arguments += MORE[family]
    done = launch("cpu_2proc.yaml", "evaluate_lm.py", *arguments, processes=processes, env=environment)
    assert file.read_bytes() == alone[family].read_bytes()
    assert done.stdout.count("the numbers are in") == 1
    assert not list(temporary.glob("lmscripts*"))


# ---- runs of run_pretraining.py ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_the_figures_of_a_run_are_those_of_its_last_evaluation(workspace, tokenizer_dir, text, tmp_path, family):
    """The same text, the same rows, the same masks: what training said of its held-out text comes out again."""
    preset = (
        {**TINY_PRESET, "embedding-size": 16, "generator-size": "1/2", "mask-percent": 15}
        if family == "electra"
        else TINY_PRESET
    )
    (tmp_path / "presets.json").write_text(json.dumps({f"{family}-test": preset}), encoding="utf-8")
    run_dir = tmp_path / "run"
    arguments = ["--parameter_file", tmp_path / "presets.json", "--model_type", f"{family}-test", "--tracker", "none"]
    arguments += ["--input_file", SAMPLE / "articles.txt", "--validation_file", text, "--tokenizer_dir", tokenizer_dir]
    run_script("run_pretraining.py", *arguments, "--model_dir", run_dir, "--micro_batch_size", "8")
    logged = [record for record in log_of(run_dir) if "eval_loss" in record][-1]
    done, result = evaluate(run_dir, text, tmp_path / "result.json", "--require_trained")
    assert "is the folder of a run: final is taken" in done.stdout
    names = [name for name in logged if name.startswith("eval_") and name.removeprefix("eval_") in result["metrics"]]
    assert len(names) == (7 if family == "electra" else 2)
    for name in names:
        assert result["metrics"][name.removeprefix("eval_")] == pytest.approx(logged[name], rel=1e-5), name


# ---- no model is scored that nobody trained ----------------------------------------------------------------------


def test_a_random_model_is_never_scored_silently(causal_tokenizer, text, tmp_path):
    """The older system did: it passed over the checkpoint and evaluated what initialisation had made."""
    earlier = tmp_path / "result.json"
    earlier.write_text(EARLIER, encoding="utf-8")
    model = save_model(tmp_path / "model", causal_tokenizer, "gpt2", trained=False)

    done, _ = evaluate(model, text, earlier, "--require_trained", check=False)
    assert done.returncode == 2
    assert "was never trained" in done.stderr
    assert earlier.read_text(encoding="utf-8") == EARLIER

    done, result = evaluate(model, text, earlier)
    assert "THIS MODEL WAS NEVER TRAINED" in done.stdout
    assert result["untrained"] is True
    assert len(result["untrained_because"]) == 1

    (model / "model.safetensors").unlink()
    before = earlier.read_text(encoding="utf-8")
    done, _ = evaluate(model, text, earlier, check=False)
    assert done.returncode == 2
    assert "holds no weights" in done.stderr
    assert "Traceback" not in done.stderr
    assert earlier.read_text(encoding="utf-8") == before


# ---- what is refused, and how it ends ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments", "sentence"),
    [
        ("gpt2", ["--block_size", "65"], "--block_size 65 is longer than the 64 positions of"),
        ("gpt2", ["--mask_unit", "word"], "--mask_unit word has no effect on a causal model (gpt2)"),
        ("bert", ["--stride", "8"], "--stride 8 has no effect on a masked language model (bert)"),
        (
            "bert",
            ["--output_file", "/nowhere/result.json"],
            "/nowhere/result.json cannot be written: /nowhere is no",
        ),
        ("bert", ["--block_size", "9"], "--block_size 9 is too short on a masked language model (bert): it must be at"),
        ("bert", ["--text_column", "body"], "--text_column body has no effect: only .txt files are given"),
        ("bert", ["--precision", "fp16"], "--precision fp16 needs a GPU"),
        ("bert", ["--max_documents", "3"], "--max_documents 3 has no effect without --pseudo_perplexity"),
    ],
)
def test_what_is_refused(request, text, family, arguments, sentence):
    if "fp16" in arguments and torch.cuda.is_available():
        pytest.skip("runs where there is no GPU")
    model = request.getfixturevalue(family)
    done = run_script("evaluate_lm.py", "--model_dir", model, "--input_file", text, *arguments, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_text_without_a_document_is_refused(gpt2, tmp_path):
    (tmp_path / "blank.txt").write_bytes(b"\n \r\n\n")
    done, _ = evaluate(gpt2, tmp_path / "blank.txt", tmp_path / "result.json", check=False)
    assert done.returncode == 2
    assert "holds no text: 5 bytes" in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_weights_that_are_no_numbers_give_no_result(gpt2, text, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(gpt2, local_files_only=True)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] = float("nan")
    shutil.copytree(gpt2, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    done, _ = evaluate(tmp_path / "model", text, tmp_path / "result.json", check=False)
    assert done.returncode == 2
    assert f"loss of {tmp_path / 'model'} is nan" in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_a_signal_leaves_nothing_behind(gpt2, text, tmp_path):
    """Also the earlier result stays as it was."""
    temporary, output = tmp_path / "temporary", tmp_path / "result.json"
    temporary.mkdir()
    output.write_text(EARLIER, encoding="utf-8")
    arguments = [
        "--model_dir",
        gpt2,
        "--input_file",
        text,
        "--output_file",
        output,
        "--stride",
        "1",
        "--batch_size",
        "1",
    ]
    command = [sys.executable, str(ROOT / "scripts" / "evaluate_lm.py"), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not list(temporary.glob("*/token_store-*/manifest.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM; no result was written" in errors
    assert not list(temporary.glob("lmscripts*"))
    assert output.read_text(encoding="utf-8") == EARLIER
