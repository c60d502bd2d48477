"""A document in a packed row gives the same logits as alone, on every attention path that runs on a CPU."""

import numpy as np
import pytest
import torch
from tiny import new_models

from lmscripts.data.packing import Layout, segment_ends
from lmscripts.errors import UserError
from lmscripts.models import families
from lmscripts.models.attention import additive_mask, choose_attention

LAYOUT = Layout(64, "isolated", begin_id=2, end_id=3, pad_id=0)
FAMILIES = families.names()
ENCODERS = [name for name in FAMILIES if "causal" not in families.family(name).heads]


def make_model(family, path):
    objective = "masked" if family in ENCODERS else "causal"
    model = new_models(family, objective, LAYOUT, path, seed=1, dropout=0.1)[""]
    with torch.no_grad():  # larger weights, so that a leak would show
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


def make_batch(lengths):
    """Two rows with the same documents in another order, and an empty end."""
    random = np.random.default_rng(0)
    documents = [random.integers(10, 500, n) for n in lengths]
    ids, segments, positions = (np.zeros((2, 64), np.int64) for _ in range(3))
    segments[:] = -1
    for row, order in enumerate([range(len(lengths)), reversed(range(len(lengths)))]):
        at = 0
        for number, document in enumerate(order):
            n = lengths[document]
            ids[row, at : at + n] = documents[document]
            segments[row, at : at + n] = number
            positions[row, at : at + n] = np.arange(n)
            at += n
    batch = {"input_ids": ids, "segments": segments, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in batch.items()}, documents


def logits_of(model, family, path, batch, slots=None):
    if path == "varlen":
        batch = {**batch, "segment_ends": segment_ends(batch["segments"], 30)}
    family = families.family(family)
    attention = family.attention(model, path, batch, torch.float32)
    hidden = family.encode(model, batch["input_ids"], batch["position_ids"], attention, slots)
    return family.predict(model, hidden)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("path", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("one_document", [False, True])
def test_a_narrow_last_layer_gives_the_same_logits_and_gradients_at_its_slots(family, path, one_document):
    batch, _ = make_batch([64] if one_document else [7, 20, 1, 30])
    if one_document and path != "varlen":
        batch.pop("segments")  # no mask at all
    slots = torch.tensor([0, 5, 63, 33, 64 + 1, 64 + 2, 64 + 40, 64 + 40])
    model = make_model(family, path)
    full = logits_of(model, family, path, batch).flatten(0, 1)[slots]
    full.logsumexp(-1).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    families.family(family).narrow(model)
    assert torch.equal(full, logits_of(model, family, path, batch).flatten(0, 1)[slots])
    model.zero_grad()
    narrow = logits_of(model, family, path, batch, slots)
    assert (narrow - full).abs().max() < 1e-5
    narrow.logsumexp(-1).sum().backward()
    for name, gradient in expected.items():
        assert torch.allclose(dict(model.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["eager", "sdpa", "varlen"])
def test_packed_equals_separate(family, path):
    model = make_model(family, path)
    lengths = [7, 20, 1, 30]
    batch, documents = make_batch(lengths)
    with torch.no_grad():
        packed = logits_of(model, family, path, batch)
        plain = make_model(family, "sdpa")
        for row, order in enumerate([range(4), reversed(range(4))]):
            at = 0
            for document in order:
                n = lengths[document]
                # Alone, as any user of the saved model would call it: no position ids, no mask.
                alone = plain(input_ids=torch.from_numpy(documents[document])[None]).logits[0]
                assert (packed[row, at : at + n] - alone).abs().max() < 1e-5
                at += n


@pytest.mark.parametrize("path", ["eager", "sdpa", "varlen"])
def test_neighbours_do_not_change_a_document_and_would_without_the_mask(path):
    model = make_model("bert", path)
    batch, _ = make_batch([7, 20, 30])
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 7:27] = 11
    with torch.no_grad():
        before, after = (logits_of(model, "bert", path, b)[0, :7] for b in (batch, changed))
        assert torch.equal(before, after)
        if path != "varlen":
            leaking = [
                families.family("bert").encode(model, b["input_ids"], b["position_ids"], {"attention_mask": None})[
                    0, :7
                ]
                for b in (batch, changed)
            ]
            assert (leaking[0] - leaking[1]).abs().max() > 1e-3


@pytest.mark.parametrize("path", ["eager", "sdpa", "varlen"])
def test_gradients_agree_between_paths(path):
    gradients = []
    for way in (path, "eager"):
        model = make_model("bert", way)
        batch, _ = make_batch([7, 20, 30])
        logits_of(model, "bert", way, batch).square().mean().backward()
        gradients.append(model.bert.embeddings.word_embeddings.weight.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_segment_ends_have_one_of_few_shapes():
    segments = torch.tensor([[0, 0, 1, -1], [0, 1, 2, 2]])
    assert segment_ends(segments).tolist() == [0, 2, 3, 4, 5, 6, 8, 8, 8]  # 8 sequences, of which 6 are real
    assert segment_ends(segments, 10).tolist() == [0, 2, 3, 4, 5, 6] + 11 * [8]
    assert segment_ends(segments[:, :2]).tolist() == [0, 2, 3, 4, 4]
    assert segment_ends(segments[1:, 1:], 3).tolist() == [0, 1, 3, 3, 3]


def test_additive_mask_is_finite_and_has_no_empty_row():
    mask = additive_mask(torch.tensor([[0, 0, 1, -1]]), torch.float16)
    assert torch.isfinite(mask).all()
    assert (mask == 0).any(-1).all()


def test_choice_of_the_path():
    assert choose_attention("auto", "cuda", "bf16", 0.0) == "varlen"
    assert choose_attention("auto", "cuda", "bf16", 0.1) == "eager"
    with pytest.raises(UserError, match="--attention sdpa draws no dropout that is the same for any"):
        choose_attention("sdpa", "cpu", "no", 0.1)
    assert choose_attention("auto", "cpu", "no", 0.0) == "sdpa"
    with pytest.raises(ValueError, match="flash"):
        choose_attention("flash", "cpu", "no", 0.0)


def test_choice_of_the_path_where_a_model_does_not_have_all():
    assert choose_attention("auto", "cuda", "bf16", 0.0, ("sdpa", "eager")) == "sdpa"
    assert choose_attention("auto", "cuda", "bf16", 0.0, ("eager",)) == "eager"
    assert choose_attention("eager", "cpu", "no", 0.0, ("sdpa", "eager")) == "eager"
    with pytest.raises(UserError, match="cannot compute --attention varlen: give sdpa or eager, or auto"):
        choose_attention("varlen", "cuda", "bf16", 0.0, ("sdpa", "eager"))


def test_varlen_refuses_attention_dropout():
    model = make_model("bert", "varlen").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    batch, _ = make_batch([7, 20])
    with pytest.raises(ValueError, match="dropout"):
        logits_of(model, "bert", "varlen", batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where there is a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_varlen_kernel_equals_mask_on_a_gpu(family):
    batch, _ = make_batch([7, 20, 1, 30])
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        kernel, masked = (
            logits_of(make_model(family, path).cuda(), family, path, batch).float() for path in ("varlen", "sdpa")
        )
    real = batch["segments"] >= 0
    assert (kernel - masked)[real].abs().max() / masked[real].abs().max() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where there is a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_varlen_kernel_are_those_of_the_mask_on_a_gpu(family):
    batch, _ = make_batch([7, 20, 1, 30])
    batch = {name: tensor.cuda() for name, tensor in batch.items()}

    def gradient(path, half):
        model = make_model(family, path).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            logits = logits_of(model, family, path, batch).float()
        logits[batch["segments"] >= 0].square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient("sdpa", half=False)
    kernel, masked = ((gradient(path, half=True) - exact).norm() / exact.norm() for path in ("varlen", "sdpa"))
    assert kernel < 2 * masked + 0.01, (kernel, masked)
    assert masked < 0.2
