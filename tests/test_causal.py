"""Causal language modelling: rows of a stream, the loss in chunks, and documents that never see each other."""

import json
import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lmscripts.attention import segment_ends, use_attention
from lmscripts.causal import CausalLanguageModel, boundary_ids, causal_batches, check_isolation
from lmscripts.cross_entropy import chunked_cross_entropy
from lmscripts.errors import UserError
from lmscripts.fitting import freeze, fuse_activations, lengthen_positions
from lmscripts.packing import Layout
from lmscripts.stream import StreamRows
from lmscripts.token_store import Part

BEGIN, END, PAD = 2, 3, 0
PATHS = ["eager", "sdpa", "varlen"]


def make_part(lengths, seed=0):
    """A part of a store in memory: documents of random tokens."""
    tokens = np.random.default_rng(seed).integers(10, 200, sum(lengths)).astype(np.uint16)
    nothing = np.zeros(0, np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Part(None, tokens, nothing, nothing, offsets, offsets, np.full(len(lengths), 7, np.int64))


def make_rows(lengths, length, packing="isolated"):
    layout = Layout(length, packing, BEGIN, END, PAD)
    return StreamRows(make_part(lengths), layout, text_bytes=7 * len(lengths))


def documents_of(part):
    return [part.tokens[a:b].tolist() for a, b in zip(part.document_tokens[:-1], part.document_tokens[1:], strict=True)]


def make_model(path="sdpa", seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 200}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**(sizes | dropout | settings), pad_token_id=PAD, bos_token_id=BEGIN, eos_token_id=END)
    config._attn_implementation = use_attention(path)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # larger weights, so that a leak would show
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def make_batch(rows, numbers, path="sdpa"):
    laid_out = rows.read(np.asarray(numbers))
    (batch, counts) = causal_batches(laid_out, [len(numbers)])[0]
    if path == "varlen":
        segments = torch.from_numpy(laid_out.segments)
        batch["segment_ends"] = segment_ends(segments, segments.numel() + 1)
    return batch, counts


# ---- rows ----


@pytest.mark.parametrize("length", [8, 13, 64])
@pytest.mark.parametrize("packing", ["isolated", "contiguous"])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 30, 8, 7], [200], [1] * 40, [63, 64, 65], [0, 0, 3, 0]])
def test_every_token_and_every_end_is_a_target_exactly_once(lengths, packing, length):
    rows = make_rows(lengths, length, packing)
    inputs, targets = [], []
    for document in documents_of(rows.part):
        inputs += [BEGIN, *document]
        targets += [*document, END]
    order = np.random.default_rng(1).permutation(rows.num_rows)
    shuffled = rows.read(order)
    back = np.argsort(order)
    whole = [getattr(shuffled, name)[back].reshape(-1) for name in ("ids", "targets", "segments", "content")]
    real = whole[2] >= 0
    assert whole[0][real].tolist() == inputs
    assert whole[1][real].tolist() == targets
    assert real.sum() == rows.num_positions
    assert not real[rows.num_positions :].any()
    assert (whole[0][~real] == PAD).all()
    assert whole[3].sum() == sum(lengths)
    assert rows.fill() == rows.num_positions / real.size


def test_positions_and_segments_restart_in_each_document_and_only_when_isolated():
    isolated, contiguous = (
        make_rows([5, 1, 9], 8, packing).read(np.arange(3)) for packing in ("isolated", "contiguous")
    )
    assert isolated.segments.tolist() == [[0] * 6 + [1] * 2, [0] * 8, [0] * 2 + [-1] * 6]
    assert isolated.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert contiguous.segments.tolist() == [[0] * 8, [0] * 8, [0] * 2 + [-1] * 6]
    assert contiguous.positions[0].tolist() == list(range(8))


def test_bisection_finds_the_document_of_every_place():
    lengths = np.random.default_rng(3).integers(0, 9, 257).tolist()
    rows = make_rows(lengths, 16)
    expected = np.repeat(np.arange(257), np.array(lengths) + 1)
    assert (rows.documents_at(np.arange(rows.num_positions)) == expected).all()


# ---- loss ----


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_in_chunks_has_the_value_and_the_gradients_of_the_plain_one(chunk, z_loss, bias):
    torch.manual_seed(0)
    hidden, weight, offset = torch.randn(50, 16), torch.randn(90, 16), torch.randn(90)
    labels, weights = torch.randint(0, 90, (50,)), (torch.rand(50) > 0.3).float()
    found = []
    for way in ("chunks", "plain"):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, offset)]
        if way == "chunks":
            inputs = (*leaves[:2], leaves[2] if bias else None, labels, weights)
            loss, entropy, _, _ = chunked_cross_entropy(*inputs, z_loss, positions_at_once=chunk)
        else:
            logits = leaves[0] @ leaves[1].t() + (leaves[2] if bias else 0)
            each = nn.functional.cross_entropy(logits, labels, reduction="none")
            entropy = (each * weights).sum()
            loss = entropy + z_loss * (logits.logsumexp(-1).square() * weights).sum()
        (0.3 * loss).backward()
        found.append([loss, entropy, *(leaf.grad for leaf in leaves[: 2 + bias])])
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-5)


def peak_allocated(step, folder):
    """Most bytes a call holds at a time, beyond what was there before: every allocation, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events))


def test_no_more_than_two_chunks_of_logits_are_held_at_a_time(tmp_path):
    hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(4000, 16, requires_grad=True)
    labels, weights = torch.randint(0, 4000, (512,)), torch.ones(512)
    logits, chunk = 4 * 512 * 4000, 4 * 32 * 4000

    def ours():
        chunked_cross_entropy(hidden, weight, None, labels, weights, positions_at_once=32)[0].backward()

    def plain():
        nn.functional.cross_entropy(hidden @ weight.t(), labels).backward()

    kept = 4 * (2 * hidden.numel() + 2 * weight.numel())  # their gradients, there and in .grad
    assert peak_allocated(plain, tmp_path) > 2.9 * logits
    assert peak_allocated(ours, tmp_path) < 2 * chunk + kept + 50_000


def test_right_predictions_are_counted_where_no_gradient_is_wanted():
    hidden, weight = torch.eye(4), nn.Parameter(torch.eye(4))
    targets = (torch.tensor([0, 1, 3, 3]), torch.tensor([1.0, 1, 1, 0]))
    with torch.no_grad():  # as in an evaluation, where the parameters still say that they require one
        assert chunked_cross_entropy(hidden, weight, None, *targets)[3] == 2
    assert chunked_cross_entropy(hidden, weight.detach(), None, *targets)[3] == 2


def test_frozen_output_matrix_gets_no_gradient():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    loss = chunked_cross_entropy(hidden, weight, None, torch.arange(5), torch.ones(5))[0]
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("path", PATHS)
def test_objective_equals_the_documents_alone_through_the_model_itself(path):
    rows = make_rows([7, 20, 1, 30], 62)  # all in one row
    model = make_model(path)
    objective = CausalLanguageModel(model, path)
    batch, counts = make_batch(rows, [0], path)
    loss = objective(batch)["clm"]
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    plain = make_model("eager")
    total = 0.0
    for document in documents_of(rows.part):
        ids = torch.tensor([[BEGIN, *document]])
        logits = plain(input_ids=ids).logits[0]
        total = total + nn.functional.cross_entropy(logits, torch.tensor([*document, END]), reduction="sum")
    total.backward()
    assert counts["clm"] == 62
    assert counts["tokens"] == 58
    assert abs(loss.item() - total.item()) < 1e-3
    for name, parameter in plain.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_metrics_are_those_of_a_language_model():
    objective = CausalLanguageModel(make_model(), "sdpa", z_loss=0.1)
    found = objective.metrics(
        {"clm": 25.0, "clm_entropy": 20.0, "clm_penalty": 5.0, "clm_correct": 3.0}, {"clm": 10.0, "bytes": 40.0}
    )
    assert found["loss"] == 2.0
    assert found["z_loss"] == 0.5
    assert found["accuracy"] == 0.3
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["bits_per_byte"] == pytest.approx(0.5 / math.log(2))


# ---- isolation ----


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_no_logit_changes_with_a_neighbour_and_would_by_position_ids_alone(path, training):
    model = make_model(path).train(training)
    batch, _ = make_batch(make_rows([20, 14, 27], 64), [0], path)
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][0, 21:36] = 11  # the document in the middle
    objective = CausalLanguageModel(model, path)
    hidden = []
    model.transformer.register_forward_hook(lambda *call: hidden.append(call[2].last_hidden_state[0]))
    with torch.no_grad():
        for each in (batch, changed):
            objective(each)
    outside = [*range(21), *range(36, 64)]
    assert torch.equal(hidden[0][outside], hidden[1][outside])
    assert not torch.equal(hidden[0][21:36], hidden[1][21:36])
    if path != "varlen":  # what position ids without a mask do in this model
        with torch.no_grad():
            leaking = [
                model.transformer(
                    input_ids=b["input_ids"], position_ids=b["position_ids"].long(), attention_mask=torch.ones(1, 64)
                ).last_hidden_state[0]
                for b in (batch, changed)
            ]
        assert (leaking[0][36:] - leaking[1][36:]).abs().max() > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_seen_before_it_is_predicted(path):
    model = make_model(path)
    batch, _ = make_batch(make_rows([63], 64), [0], path)
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][0, 40:] = 11
    hidden = []
    model.transformer.register_forward_hook(lambda *call: hidden.append(call[2].last_hidden_state[0]))
    objective = CausalLanguageModel(model, path)
    objective(batch), objective(changed)
    assert torch.equal(hidden[0][:40], hidden[1][:40])


def test_other_decoders_are_proved_before_they_are_trained():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=200, initializer_range=0.3))
    for path in ("sdpa", "eager", "varlen"):
        llama.config._attn_implementation = use_attention(path)
        check_isolation(llama, path)
    llama.config._attn_implementation = "sdpa"
    objective = CausalLanguageModel(llama, "sdpa")
    batch, _ = make_batch(make_rows([20, 14, 27], 64), [0])
    assert torch.isfinite(objective(batch)["clm"])
    with torch.no_grad():
        llama.model.rotary_emb.attention_scaling = 1.0
        llama.lm_head.register_forward_hook(lambda module, inputs, out: out * (1 if inputs[0].ndim == 3 else 2))
        llama.register_forward_hook(lambda module, inputs, out: out.__setitem__("logits", out.logits.tanh()))
    with pytest.raises(UserError, match="other logits in packed rows"):
        CausalLanguageModel(llama, "sdpa")


def test_a_model_without_position_ids_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=32, n_head=2, vocab_size=200))
    with pytest.raises(UserError, match="BloomForCausalLM"):
        CausalLanguageModel(model, "sdpa")


def test_windows_of_attention_shorter_than_rows_are_refused(tmp_path):
    from dataclasses import replace

    from conftest import ROOT

    from lmscripts.models import build
    from lmscripts.presets import load_preset

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = MistralConfig(**sizes, num_key_value_heads=2, vocab_size=200, sliding_window=16)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    preset = replace(load_preset(ROOT / "parameter.json", "gpt2-tiny"), pretrained_model=str(tmp_path))
    settings = {"attn_implementation": "sdpa", "hidden_dropout": 0.0, "attention_dropout": 0.0}
    with pytest.raises(UserError, match="16 tokens"):
        build(preset, range(200), Layout(64, "isolated", BEGIN, END, PAD), seed=0, **settings)


# ---- fitting ----


def test_gelu_in_one_kernel_keeps_the_function_and_a_fraction_of_the_memory(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=64)
    plain = GPT2LMHeadModel(config).eval()
    fused = GPT2LMHeadModel(config).eval()
    fused.load_state_dict(plain.state_dict())
    fuse_activations(fused)
    ids = torch.randint(0, 50, (4, 64))
    assert type(fused.transformer.h[0].mlp.act) is nn.GELU
    assert torch.allclose(fused(ids).logits, plain(ids).logits, atol=1e-6)
    assert list(fused.state_dict()) == list(plain.state_dict())
    held = [peak_allocated(lambda m=model: m.transformer(ids, use_cache=False), tmp_path) for model in (fused, plain)]
    assert held[0] < 0.65 * held[1]
    fused.save_pretrained(tmp_path)
    assert type(GPT2LMHeadModel.from_pretrained(tmp_path).transformer.h[0].mlp.act) is type(
        plain.transformer.h[0].mlp.act
    )


def test_a_lengthened_gpt2_gives_the_same_logits_on_short_inputs():
    model = make_model()
    ids = torch.randint(0, 200, (2, 40))
    before = model(input_ids=ids).logits
    assert lengthen_positions(model, 128)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model(input_ids=torch.randint(0, 200, (1, 128))).logits.shape == (1, 128, 200)
    model.set_attn_implementation("eager")
    assert torch.isfinite(model(input_ids=torch.randint(0, 200, (1, 128))).logits).all()


def test_frozen_layers_of_a_decoder_get_no_gradient():
    model = make_model()
    freeze(model, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith(("transformer.h.1.", "transformer.ln_f")) for name in trained)


class Tokenizer:
    """A tokenizer with the given special ids."""

    name_or_path = "folder"

    def __init__(self, **ids):
        for name in ("bos", "eos", "cls", "sep"):
            setattr(self, f"{name}_token_id", ids.get(name))


def test_what_separates_documents():
    assert boundary_ids(Tokenizer(bos=2, eos=3, cls=5, sep=6)) == (2, 3)
    assert boundary_ids(Tokenizer(eos=9)) == (9, 9)
    assert boundary_ids(Tokenizer(cls=5, sep=6)) == (5, 6)
    with pytest.raises(UserError, match="no bos or cls token"):
        boundary_ids(Tokenizer())
    with pytest.raises(UserError, match="no eos or sep token"):
        boundary_ids(Tokenizer(bos=1))
