"""The lines of docs/using_the_models.md, each where its package is installed: `make test-related`."""

import json

import numpy as np
import pytest
import torch
from conftest import SAMPLE, run_script
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

TEXTS = ["だしは昆布とかつお節で取る。", "試合は延長に入った。最後の一球まで分からない。", "鍋"]


@pytest.fixture(scope="module")
def bert(store_dir, workspace):
    """final/ of a BERT of 2 layers x 64 after a few steps."""
    sizes = ["--n_layer", 2, "--n_embd", 64, "--n_head", 2, "--sequence_length", 64, "--eval_rows", 0]
    given = ["--dataset_dir", store_dir, "--model_type", "bert-tiny", "--max_steps", 3, "--batch_size", 4]
    run_script("run_pretraining.py", *given, *sizes, "--tracker", "none", "--model_dir", workspace / "bert")
    return workspace / "bert" / "final"


@pytest.fixture(scope="module")
def gpt2(workspace):
    """final/ of a GPT-2 of 2 layers x 64 after a few steps."""
    text, tokenizer, store = SAMPLE / "articles.txt", workspace / "gpt2_tokenizer", workspace / "gpt2_store"
    given = ["--objective", "causal", "--input_file", text, "--model_dir", tokenizer, "--vocab_size", 1024]
    run_script("train_tokenizer.py", *given)
    given = ["--input_file", text, "--tokenizer_dir", tokenizer, "--output_dir", store, "--num_workers", 1]
    run_script("prepare_corpus.py", *given)
    sizes = ["--n_layer", 2, "--n_embd", 64, "--n_head", 2, "--sequence_length", 128, "--eval_rows", 0]
    given = ["--dataset_dir", store, "--model_type", "gpt2-tiny", "--max_steps", 3, "--batch_size", 4]
    run_script("run_pretraining.py", *given, *sizes, "--tracker", "none", "--model_dir", workspace / "gpt2")
    return workspace / "gpt2" / "final"


def test_sentence_transformers_gives_the_mean_of_our_states(bert):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(bert), device="cpu")  # adds mean pooling by itself
    tokenizer, plain = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = plain(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(model.encode(TEXTS), expected.numpy(), atol=1e-5)


def test_peft_adds_to_a_model_and_saves_only_what_it_added(bert, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForMaskedLM.from_pretrained(bert)
    added = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"]))
    for name, parameter in added.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = AutoTokenizer.from_pretrained(bert)(TEXTS[0], return_tensors="pt")
    added.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForMaskedLM.from_pretrained(bert), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, added.eval()(**batch).logits)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < (bert / "model.safetensors").stat().st_size / 5


def test_onnxruntime_computes_what_torch_does(bert, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModelForMaskedLM.from_pretrained(bert).eval()
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = tokenizer(TEXTS[:2], padding=True, return_tensors="pt")
    shape = {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("tokens", max=64)}
    torch.onnx.export(
        model,
        kwargs={name: batch[name] for name in names},
        f=str(tmp_path / "model.onnx"),
        input_names=list(names),
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(names, shape),
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    other = tokenizer(TEXTS, padding=True, return_tensors="pt")
    (found,) = session.run(["logits"], {name: other[name].numpy() for name in names})
    with torch.no_grad():
        expected = model(**other).logits.numpy()
    print(f"onnxruntime differs by {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=1e-4)


TASK = """task: bits_of_my_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte}}
"""


def test_lm_eval_gives_our_bits_per_byte_but_for_the_end_of_a_document(gpt2, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "bits.yaml").write_text(TASK.format(documents=documents), encoding="utf-8")
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    judged = HFLM(pretrained=str(gpt2), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    found = lm_eval.simple_evaluate(model=judged, tasks=["bits_of_my_text"], task_manager=tasks, bootstrap_iters=0)
    theirs = found["results"]["bits_of_my_text"]["bits_per_byte,none"]
    given = ["--model_dir", gpt2, "--input_file", documents, "--output_file", tmp_path / "result.json"]
    run_script("evaluate_lm.py", *given)
    ours = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["metrics"]["bits_per_byte"]
    # Ours also predict that a document ends there.
    tokenizer, model = AutoTokenizer.from_pretrained(gpt2), AutoModelForCausalLM.from_pretrained(gpt2).eval()
    begin, end, size = tokenizer.bos_token_id, tokenizer.eos_token_id, sum(len(text.encode()) for text in TEXTS)
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            nats -= float(model(ids).logits[0, -1].log_softmax(-1)[end])
    print(f"lm-eval {theirs:.4f}, ours {ours:.4f}, of which ends {nats / np.log(2) / size:.4f} bits per byte")
    assert ours - nats / np.log(2) / size == pytest.approx(theirs, abs=1e-4)
