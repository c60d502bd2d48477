"""ModernBERT: windows of attention in packed rows, and runs."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_PRESET, launch, run_script
from runs import kill_at_random_moments, largest_difference, log_of, same_bits, weights
from tiny import new_models, tiny_preset
from transformers import AutoModelForMaskedLM, AutoTokenizer, ModernBertForMaskedLM, pipeline

from lmscripts import objectives
from lmscripts.data.packing import Layout, segment_ends
from lmscripts.models.attention import attention_paths
from lmscripts.models.families import modernbert
from lmscripts.objectives.masked import Settings

LAYOUT = Layout(256, "isolated", begin_id=2, end_id=3, pad_id=0)
DOCUMENTS = [170, 20, 50]  # the first is longer than the 129 tokens that a layer with a window sees


def packed(documents, length):
    """A row (1, length) of documents of random tokens, its positions and its segments."""
    ids = torch.randint(5, 512, (1, length), generator=torch.Generator().manual_seed(1))
    segments = torch.full((1, length), -1)
    positions = torch.arange(length)[None].clone()
    begin = 0
    for number, size in enumerate(documents):
        segments[0, begin : begin + size] = number
        positions[0, begin : begin + size] = torch.arange(size)
        begin += size
    ids[0, begin:] = 0
    batch = {"input_ids": ids, "segments": segments, "segment_ends": segment_ends(segments, len(documents) + 2)}
    return ids, positions, batch


@pytest.mark.parametrize("path", ["eager", "sdpa", "varlen"])
@torch.no_grad()
def test_documents_longer_than_a_window_are_as_transformers_has_them_alone(path):
    assert set(attention_paths(ModernBertForMaskedLM)) == {"eager", "sdpa", "varlen"}
    model = new_models("modernbert", "masked", LAYOUT, path)[""].eval()
    ids, positions, batch = packed(DOCUMENTS, LAYOUT.sequence_length)
    attention = modernbert.attention(model, path, batch, torch.float32)
    found = modernbert.predict(model, modernbert.encode(model, ids, positions, attention))[0]
    model.set_attn_implementation("sdpa")
    begin = 0
    for size in DOCUMENTS:
        alone = model(input_ids=ids[:, begin : begin + size]).logits[0]
        assert (found[begin : begin + size] - alone).abs().max() < 1e-6
        begin += size


@torch.no_grad()
def test_a_single_mask_for_all_layers_would_not_do():
    """What a window hides is seen in the logits, so the test above can fail."""
    model = new_models("modernbert", "masked", LAYOUT)[""].eval()
    ids, positions, batch = packed([256], 256)
    right = modernbert.attention(model, "sdpa", batch, torch.float32)
    whole = right["attention_mask"]["full_attention"]
    assert right["attention_mask"]["sliding_attention"] is not whole
    wrong = right | {"attention_mask": dict.fromkeys(right["attention_mask"], whole)}
    found, other = (modernbert.encode(model, ids, positions, attention) for attention in (right, wrong))
    assert (found - other).abs().max() > 1e-4


@pytest.mark.parametrize("path", ["sdpa", "varlen"])
def test_the_narrow_last_layer_computes_the_same_with_its_gradient(path):
    results = []
    for narrow in (False, True):
        model = new_models("modernbert", "masked", LAYOUT, path)[""]
        ids, positions, batch = packed(DOCUMENTS, LAYOUT.sequence_length)
        attention = modernbert.attention(model, path, batch, torch.float32)
        slots = torch.tensor([3, 100, 169, 175, 239])
        if narrow:
            modernbert.narrow(model)
        hidden = modernbert.encode(model, ids, positions, attention, slots if narrow else None)
        hidden = hidden if narrow else hidden[0, slots]
        hidden.square().sum().backward()
        gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach().flatten(), gradient))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-6
    assert largest_difference(results[0][1], results[1][1]) < 1e-4 * max(g.abs().max() for g in results[0][1].values())


def test_operations_count_the_gate_and_the_windows():
    """Against twice the weights of every product of the forward pass, thrice for a training step."""
    layout = Layout(512, "isolated", begin_id=2, end_id=3, pad_id=0)
    model = new_models("modernbert", "masked", layout)[""]
    layers = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    head = model.head.dense.weight.numel() + model.decoder.weight.numel()
    kinds = [
        512 if kind == "full_attention" else 2 * model.config.sliding_window + 1 for kind in model.config.layer_types
    ]
    products = sum(2 * 2 * model.config.hidden_size * seen for seen in kinds)  # scores, and sums of values
    assert modernbert.flops(model, 512, 512) == pytest.approx(3 * (2 * (layers + head) + products))
    assert modernbert.flops(model, 512, 64) < modernbert.flops(model, 512, 512)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def presets(workspace):
    file = workspace / "presets.json"
    preset = TINY_PRESET | {"sequence-length": 192, "mask-percent": 30, "batch-size": {"-1": 4}}
    file.write_text(json.dumps({"modernbert-t": preset}), encoding="utf-8")
    return file


def arguments(store_dir, presets, run_dir, *more):
    shared = ["--dataset_dir", store_dir, "--parameter_file", presets, "--model_type", "modernbert-t"]
    return [*shared, "--model_dir", run_dir, "--hidden_dropout", 0, "--do_whole_word_mask", *more]


@pytest.fixture(scope="module")
def run_dir(workspace, store_dir, presets):
    run_script("run_pretraining.py", *arguments(store_dir, presets, workspace / "run"))
    return workspace / "run"


def test_what_is_saved_needs_nothing_of_this_package(run_dir):
    """The tokenizer of BERT stands beside a ModernBERT, whose own class is another."""
    model = AutoModelForMaskedLM.from_pretrained(run_dir / "final")
    assert type(model) is ModernBertForMaskedLM
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final")
    assert type(tokenizer).__name__ == "BertJapaneseTokenizer"
    assert tokenizer.model_max_length == 192
    assert tokenizer.tokenize("今日はよい天気だ。")
    assert len(pipeline("fill-mask", str(run_dir / "final"))("今日は[MASK]がよい。")) == 5
    text = "".join(chr(0x3042 + i % 60) for i in range(900))  # one document, longer than a window
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=192)["input_ids"]
    assert ids.shape[1] > 129
    trained = objectives.trained("masked", modernbert, {"": model}, "sdpa", Settings()).eval()
    batch = {"input_ids": ids, "segments": torch.zeros_like(ids)}
    attention = trained.attention_inputs(model, batch)
    with torch.no_grad():
        found = modernbert.predict(model, modernbert.encode(model, ids, torch.arange(ids.shape[1])[None], attention))
        assert (found - model(input_ids=ids).logits).abs().max() < 1e-5


def test_a_run_learns_and_says_the_rate_that_it_trains_at(run_dir):
    records = [record for record in log_of(run_dir) if "loss" in record]
    assert records[-1]["loss"] < records[0]["loss"]
    assert np.isfinite([record["gradient_norm"] for record in records]).all()


@pytest.mark.slow
def test_killed_and_continued_ends_at_the_same_bits(workspace, run_dir, store_dir, presets):
    killed = workspace / "killed"
    more = arguments(store_dir, presets, killed, "--save_steps", 2, "--do_continue")
    assert kill_at_random_moments(more, killed, workspace / "killed.txt", times=2)
    run_script("run_pretraining.py", *more)
    assert same_bits(weights(killed), weights(run_dir))


@pytest.mark.launch
def test_uneven_processes_give_what_one_process_gives(workspace, run_dir, store_dir, presets):
    more = ("--process_shares", 3, 1, "--micro_batch_size", 2)
    launch("cpu_2proc.yaml", "run_pretraining.py", *arguments(store_dir, presets, workspace / "uneven", *more))
    assert largest_difference(weights(workspace / "uneven"), weights(run_dir)) < 1e-6


def test_further_pretraining_goes_on_with_longer_rows(workspace, run_dir, store_dir, presets):
    more = ("--pretrained_model_name_or_path", run_dir / "final", "--sequence_length", 256, "--max_steps", 2)
    done = run_script("run_pretraining.py", *arguments(store_dir, presets, workspace / "further", *more))
    assert "rows may be longer: config.json says 256 now" in done.stdout
    assert AutoModelForMaskedLM.from_pretrained(workspace / "further" / "final").config.max_position_embeddings == 256


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_other_tokenizers_stand_beside_it_too(kind, workspace, presets):
    sample = workspace / "sample.txt"
    sample.write_text("\n\n".join(f"今日は{n}回目の散歩だ。\n川まで歩いた。" for n in range(40)), encoding="utf-8")
    tokenizer_dir, store_dir, run_dir = (workspace / f"{kind}-{name}" for name in ("tokenizer", "store", "run"))
    more = {"unigram": ["--tokenizer_type", "unigram"], "bpe": ["--objective", "causal", "--tokenizer_type", "bpe"]}
    run_script(
        "train_tokenizer.py", "--input_file", sample, "--model_dir", tokenizer_dir, *more[kind], "--vocab_size", 400
    )
    given = ["--input_file", sample, "--tokenizer_dir", tokenizer_dir, "--output_dir", store_dir]
    run_script("prepare_corpus.py", *given, "--validation_fraction", 0)
    done = run_script("run_pretraining.py", *arguments(store_dir, presets, run_dir, "--max_steps", 2), check=False)
    if kind == "bpe":  # it has no [MASK]
        assert done.returncode == 2
        return
    assert done.returncode == 0, done.stderr
    assert AutoTokenizer.from_pretrained(run_dir / "final").tokenize("散歩")


def test_its_preset_says_its_sizes():
    preset = tiny_preset("modernbert")
    assert (preset.family, preset.layers, preset.mask_probability) == ("modernbert", 2, 0.3)
