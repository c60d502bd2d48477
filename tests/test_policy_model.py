"""The policy model: what it computes, that padding and neighbours change nothing, and what is saved of it."""

import math
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from lmscripts.data.schema import Schema, load_schema
from lmscripts.errors import UserError
from lmscripts.models import policy
from lmscripts.models.saved import open_policy
from lmscripts.objectives import choice
from lmscripts.training.optim import OPTIMIZERS, build_optimizer

V1 = load_schema("kanachan-v1")
BOARD = Schema.from_json({
    "name": "board",
    "value": {"field": "result", "index": 0, "scale": 10},
    "fields": [
        {"name": "seen", "kind": "set", "vocab_size": 6, "max_length": 5},
        {"name": "sizes", "kind": "numeric", "max_length": 2, "scales": [1, 100]},
        {"name": "events", "kind": "sequence", "vocab_size": 9, "min_length": 0, "max_length": 12},
        {"name": "answers", "kind": "candidates", "vocab_size": 5, "max_length": 4},
        {"name": "chosen", "kind": "label"},
        {"name": "result", "kind": "extra", "max_length": 1},
    ],
})  # fmt: skip
TINY = policy.sizes(None, 16, 2, 2, 24, 20)
BOTH = pytest.mark.parametrize("original", [False, True], ids=["default", "original"])


def build(schema=BOARD, sizes=TINY, **given):
    return policy.build(schema, sizes, **{"seed": 1, "dropout": 0.0, **given})


def records(number, seed=0, schema=BOARD):
    """Rows as lists of what stands at each position: (id, value, place in the sequence, is a candidate)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        return int(torch.randint(0, most, (), generator=generator))

    rows = []
    for _ in range(number):
        row, numbers = [], 0
        for field in schema.fields:
            first = schema.first_id(field) if field.kind in ("set", "sequence", "candidates") else 0
            if field.kind == "numeric":
                values = torch.rand(field.max_length, generator=generator).tolist()
                row += [(schema.num_ids + numbers + n, value, 0, False) for n, value in enumerate(values)]
                numbers += field.max_length
            elif field.kind in ("set", "candidates"):
                ids = torch.randperm(field.vocab_size, generator=generator)[: 2 + draw(field.max_length - 1)]
                row += [(first + n, 0.0, 0, field.kind == "candidates") for n in sorted(ids.tolist())]
            elif field.kind == "sequence":
                row += [(first + draw(field.vocab_size), 0.0, n + 1, False) for n in range(draw(field.max_length + 1))]
        rows.append([*row, (schema.value_id, 0.0, 0, False)])
    return rows


def batch_of(rows, longer=0, schema=BOARD):
    """Rows as a batch, padded to their longest and more."""
    length, most = max(map(len, rows)) + longer, max(sum(each[3] for each in row) for row in rows) + longer
    pad = (schema.pad_id, 0.0, 0, False)
    filled = [row + [pad] * (length - len(row)) for row in rows]
    places = [[n for n, each in enumerate(row) if each[3]] for row in rows]
    made = {
        "input_ids": [[each[0] for each in row] for row in filled],
        "position_ids": [[each[2] for each in row] for row in filled],
        "attention_mask": [[int(n < len(row)) for n in range(length)] for row in rows],
        "candidates": [each + [0] * (most - len(each)) for each in places],
        "candidate_mask": [[n < len(each) for n in range(most)] for each in places],
        "labels": [len(each) - 1 for each in places],
        "value_places": [len(row) - 1 for row in rows],
    }
    made = {name: torch.tensor(each) for name, each in made.items()}
    made["values"] = torch.tensor([[each[1] for each in row] for row in filled])
    made["weights"], made["outcome"] = torch.ones(len(rows)), torch.linspace(-1, 1, len(rows))
    return made


def logits(model, batch):
    return model(**{name: batch[name] for name in choice._INPUTS}).logits


def keys(rows):
    return torch.randint(-(2**31), 2**31 - 1, (rows, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))


# ---- what it computes --------------------------------------------------------------------------------------------


@BOTH
def test_logits_do_not_depend_on_what_else_is_in_the_batch(original):
    model, rows = build(original=original).eval(), records(9)
    whole = logits(model, batch_of(rows, longer=7))
    for number, row in enumerate(rows):
        alone = logits(model, batch_of([row]))[0]
        assert torch.allclose(whole[number, : len(alone)], alone, atol=1e-6, rtol=0)


@BOTH
def test_no_mass_on_candidates_that_are_not_there(original):
    batch = batch_of(records(9), longer=3)
    found = logits(build(original=original), batch)
    assert found.dtype == torch.float32
    assert torch.equal(found == -math.inf, ~batch["candidate_mask"])
    assert torch.allclose(found.softmax(1).sum(1), torch.ones(9))


@BOTH
def test_states_at_some_places_are_those_of_all(original):
    model, batch = build(original=original).eval(), batch_of(records(5))
    given = [batch[name] for name in ("input_ids", "values", "position_ids", "attention_mask")]
    whole, places = model.encoder(*given), batch["candidates"]
    expected = torch.stack([states[at] for states, at in zip(whole, places)])
    assert torch.allclose(model.encoder(*given, places), expected, atol=1e-6)


def test_the_order_of_events_matters_and_that_of_a_set_does_not():
    first, second = (V1.first_id(V1.field(kind)) for kind in ("set", "sequence"))
    row = [
        (first + 1, 0.0, 0, False),
        (first + 9, 0.0, 0, False),
        *((V1.num_ids + n, n / 3, 0, False) for n in range(6)),
    ]
    row += [(second + 5, 0.0, 1, False), (second + 9, 0.0, 2, False), (second + 5, 0.0, 3, False)]
    row += [(V1.value_id - 9, 0.0, 0, True), (V1.value_id - 4, 0.0, 0, True)]
    swapped = [*row[:8], (*row[9][:2], 1, False), (*row[8][:2], 2, False), *row[10:]]
    others = [*row[:2], (*row[2][:1], 0.4, 0, False), *row[3:]]
    for original in (False, True):
        model = build(V1, original=original).eval()
        found = [
            logits(model, batch_of([each], schema=V1)) for each in (row, [row[1], row[0], *row[2:]], swapped, others)
        ]
        assert torch.allclose(found[0], found[1], atol=1e-6)
        assert not torch.allclose(found[0], found[2], atol=1e-5)
        assert not torch.allclose(found[0], found[3], atol=1e-5)


@pytest.mark.parametrize(("preset", "encoder", "embeddings", "head"), [
    ("base", 87.5e6, 2.5e6, 2.37e6),
    ("large", 305.6e6, 3.3e6, 4.20e6),
])  # fmt: skip
def test_the_original_has_as_many_parameters_as_the_older_trainer_counted(preset, encoder, embeddings, head):
    config = policy.PolicyConfig(schema=V1.as_json(), **policy.sizes(preset), **policy.ORIGINAL)
    with torch.device("meta"):
        model = policy.PolicyModel(config)
    assert model.encoder.num_parameters() == pytest.approx(encoder, rel=1e-3)
    assert model.encoder.embeddings.weight.numel() == pytest.approx(embeddings, rel=0.01)
    assert sum(p.numel() for p in model.decoder.parameters()) == pytest.approx(head, rel=2e-3)


@pytest.mark.parametrize("activation", policy.ACTIVATIONS)
def test_the_original_is_what_torch_calls_a_transformer_encoder(activation):
    model = build(original=True, activation_function=activation, dropout=0.1).eval()
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.1, activation, batch_first=True, norm_first=False)
    golden = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # layers begin alike
    golden.load_state_dict(policy.to_original(model))
    rows = [row for row in records(40) if len(row) == len(records(1)[0])]
    batch = batch_of(rows)
    given = [batch[name] for name in ("input_ids", "values", "position_ids", "attention_mask")]
    assert batch["attention_mask"].all()
    assert torch.allclose(model.encoder(*given), golden(model.encoder.embed(*given[:3])), atol=1e-5)


def test_the_original_begins_as_torch_does_with_all_layers_alike():
    model = build(original=True)
    first, second = (layer.state_dict() for layer in model.encoder.layers)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert float(model.encoder.embeddings.weight[:-1].detach().std()) == pytest.approx(1, abs=0.1)
    assert not model.encoder.embeddings.weight[-1].any()
    states = model.encoder.eval().embed(*(batch_of(records(3))[n] for n in ("input_ids", "values", "position_ids")))
    batch = batch_of(records(3))
    of_numbers = batch["input_ids"] >= BOARD.num_ids
    assert torch.equal(states[..., 0][of_numbers], batch["values"][of_numbers])  # a value is in its own channel
    in_sequence = batch["position_ids"] == 2
    rest = (states - model.encoder.embeddings(batch["input_ids"].clamp(max=BOARD.pad_id)))[in_sequence]
    assert torch.allclose(rest[:, 0], torch.tensor(1.0).sin())
    assert torch.allclose(rest[:, 1], torch.tensor(1.0).cos())


def test_sizes_are_checked():
    assert policy.sizes("base", num_layers=3)["num_hidden_layers"] == 3
    assert policy.sizes("mini")["final_intermediate_size"] == 1024
    assert policy.sizes(None, 8, 2, 1)["intermediate_size"] == 32
    with pytest.raises(UserError, match="--dimension 770 cannot be divided among --num-heads 12"):
        policy.sizes("base", dimension=770)
    with pytest.raises(UserError, match="--num-layers must be given"):
        policy.sizes(None, 8, 2)
    with pytest.raises(UserError, match="there is no --model-preset huge"):
        policy.sizes("huge")
    with pytest.raises(UserError, match="which extra number is the value"):
        policy.build(Schema(BOARD.name, BOARD.fields, None, BOARD.as_json()), TINY, seed=1, value_head=True)


# ---- training ----------------------------------------------------------------------------------------------------


def step(objective, optimizer, batch, row_keys=None):
    objective.train()
    given = batch | ({} if row_keys is None else {"row_keys": row_keys})
    loss = objective.loss(objective(given), {"choice": len(batch["labels"]), "value": len(batch["labels"])})
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_step_that_lowers_the_loss(name):
    if name == "lamb":
        pytest.importorskip("pytorch_optimizer")
    objective = choice.trained(build(value_head=True), choice.Settings(value=True, label_smoothing=0.1))
    rate = 0.1 if name == "sgd" else 0.01
    adam = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01}
    optimizer, batch = build_optimizer(name, objective, learning_rate=rate, **adam), batch_of(records(8))
    losses = [step(objective, optimizer, batch) for _ in range(12)]
    assert losses[-1] < losses[0]


@BOTH
def test_numbers_are_trained_and_saved(original, tmp_path):
    """The older trainer lost them at every save, and each of its processes had others."""
    model = build(original=original)
    before = {name: p.clone() for name, p in model.named_parameters() if "number_" in name}
    objective, rows = choice.trained(model, choice.Settings()), batch_of(records(8))
    optimizer = torch.optim.AdamW(objective.parameters(), 0.01)
    for _ in range(3):
        step(objective, optimizer, rows)
    assert before
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    again = policy.PolicyModel.from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval(), rows), logits(model.eval(), rows))
    assert type(AutoModel.from_pretrained(tmp_path)) is policy.PolicyModel
    assert AutoConfig.from_pretrained(tmp_path).schema == BOARD.as_json()


@BOTH
def test_dropout_is_drawn_by_rows(original):
    model, rows = build(original=original, dropout=0.3, value_head=True), records(6)
    assert model.config.attention_dropout == (0.3 if original else 0.0)
    objective = choice.trained(model, choice.Settings(value=True))
    found = []
    for some in ([0, 1, 2, 3, 4, 5], [0], [1, 2], [5, 4], [0]):
        objective(batch_of([rows[n] for n in some], longer=2) | {"row_keys": keys(6)[some]})  # sets what is drawn by
        answer = choice.say(objective, batch_of([rows[n] for n in some], longer=2))
        found.append((answer.logits.masked_fill(answer.logits == -math.inf, 0.0), answer.value))
    for some, (said, value) in zip(([0], [1, 2], [5, 4], [0]), found[1:]):
        assert torch.allclose(said, found[0][0][some][:, : said.shape[1]], atol=1e-6)
        assert torch.allclose(value, found[0][1][some], atol=1e-6)
    model.draws.keys = keys(7)[1:]
    assert not torch.allclose(logits(model, batch_of(rows, longer=2))[0, 0], found[0][0][0, 0], atol=1e-4)


def test_a_frozen_encoder_stays_as_it_is_bit_for_bit():
    """The older trainer gave its weights to the optimizer and went on dropping."""
    model = build(dropout=0.5)
    policy.freeze_encoder(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective, batch = choice.trained(model, choice.Settings()), batch_of(records(8))
    adam = {"learning_rate": 0.1, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.1}
    optimizer = build_optimizer("adamw", objective, **adam)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.decoder.parameters()
    }
    for _ in range(3):
        step(objective, optimizer, batch, keys(8))
    objective.train()
    assert model.decoder.training
    assert not any(module.training for module in model.encoder.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name


@BOTH
def test_activations_computed_again_give_the_same_gradients(original):
    batch, found = batch_of(records(8)), []
    for recompute in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = build(original=original, recompute=recompute, dropout=0.2)
            objective = choice.trained(model, choice.Settings())
            objective(batch | {"row_keys": keys(8)})["choice"].backward()
        assert all(layer.gradient_checkpointing == recompute for layer in model.encoder.layers)
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BOTH
def test_half_precision_says_about_the_same(original, dtype):
    model, batch = build(original=original, dropout=0.1), batch_of(records(8))
    full = logits(model.eval(), batch)
    with torch.autocast("cpu", dtype):
        half = logits(model, batch)
        choice.trained(model.train(), choice.Settings())(batch | {"row_keys": keys(8)})["choice"].backward()
    assert half.dtype == torch.float32
    real = batch["candidate_mask"]
    assert torch.allclose(half[real], full[real], atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@BOTH
def test_it_compiles_as_one_graph_for_any_length(original):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    model = build(original=original, dropout=0.1, sizes=policy.sizes(None, 16, 2, 1))
    objective = choice.trained(model, choice.Settings())
    compiled = torch.compile(objective, backend=count, fullgraph=True, dynamic=True)
    for number, longer in ((5, 0), (7, 3), (9, 1), (4, 5)):
        batch = batch_of(records(number), longer) | {"row_keys": keys(number)}
        assert torch.allclose(compiled(batch)["choice"], objective(batch)["choice"], atol=1e-5)
    assert len(graphs) <= 2


def test_what_a_forward_pass_keeps_is_found_without_computing():
    objective = choice.trained(build(), choice.Settings())
    small, large = (objective.kept_bytes(batch_of(records(n, 3)), torch.float32) for n in (4, 8))
    assert 0 < small < large
    assert objective.flops_per_position(40, 40) > objective.flops_per_position(40, 10) > 0


def test_a_schema_may_have_no_numbers_no_set_and_no_events_or_several():
    ends = [{"name": "answers", "kind": "candidates", "vocab_size": 5, "max_length": 4}, {"name": "n", "kind": "label"}]
    events = [
        {"name": name, "kind": "sequence", "vocab_size": 4, "max_length": size} for name, size in (("a", 3), ("b", 9))
    ]
    for more in ([], events, [{"name": "x", "kind": "numeric", "max_length": 1, "scales": [2]}, *events]):
        schema = Schema.from_json({"name": "other", "fields": [*more, *ends]})
        for original in (False, True):
            objective = choice.trained(build(schema, original=original), choice.Settings())
            step(objective, torch.optim.SGD(objective.parameters(), 0.1), batch_of(records(3, 0, schema), 0, schema))
            assert all(tensor.isfinite().all() for tensor in objective.state_dict().values())


# ---- what is asked of it -----------------------------------------------------------------------------------------


def test_sums_are_those_of_the_decisions_counted_one_by_one():
    settings = choice.Settings(value=True, value_weight=0.5, label_smoothing=0.2)
    objective, rows = choice.trained(build(value_head=True), settings), records(8)
    batch = batch_of(rows, longer=2)
    batch["weights"][3] = 0.0
    sums, expected = objective(batch), dict.fromkeys(("choice", "top1", "top3", "value"), 0.0)
    for number, row in enumerate(rows):
        one = batch_of([row])
        answer, label = choice.say(objective, one), int(one["labels"])
        scores = answer.logits[0, : int(one["candidate_mask"].sum())].detach().double()
        wanted = torch.full_like(scores, 0.2 / len(scores))
        wanted[label] += 0.8
        weight, off = float(batch["weights"][number]), float(answer.value.detach() - batch["outcome"][number])
        expected["choice"] -= weight * float((wanted * scores.log_softmax(0)).sum())
        expected["top1"] += weight * (int(scores.argmax()) == label)
        expected["top3"] += weight * (label in scores.argsort(descending=True)[:3])
        expected["value"] += weight * (off**2 / 2 if abs(off) < 1 else abs(off) - 0.5)
    assert {name: float(value.detach()) for name, value in sums.items()} == pytest.approx(expected, abs=1e-4)
    counts = {"choice": 7.0, "value": 7.0, "tokens": 99.0}
    said = objective.metrics({name: float(value.detach()) for name, value in sums.items()}, counts)
    assert said["loss"] == pytest.approx(said["choice_loss"] + 0.5 * said["value_loss"])
    assert said["loss"] == pytest.approx(float(objective.loss(sums, counts).detach()), abs=1e-5)
    assert said["top3_accuracy"] == pytest.approx(expected["top3"] / 7)


def test_ties_and_what_is_no_number_are_no_luck():
    objective = choice.trained(build(), choice.Settings())
    batch = {"candidate_mask": torch.tensor([[True] * 3 + [False]] * 4), "labels": torch.tensor([0, 1, 2, 0])}
    scores = torch.tensor([[1.0, 1.0, 1.0, -math.inf]] * 3 + [[math.nan] * 4])
    losses, places = choice.row_losses(objective, scores, batch)
    assert places.tolist() == [0, 1, 2, 4]
    assert losses[:3].tolist() == pytest.approx([math.log(3)] * 3)


# ---- parts of other models ---------------------------------------------------------------------------------------


def moved(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def test_parts_come_from_folders_and_files(tmp_path):
    other, batch = moved(build(value_head=True), 2).eval(), batch_of(records(4))
    other.save_pretrained(tmp_path / "model")
    other.encoder.save_pretrained(tmp_path / "encoder")
    torch.save(other.decoder.state_dict(), tmp_path / "decoder.pth")
    encoders = ["model", "encoder", "encoder/model.safetensors", "model/model.safetensors"]
    for encoder, decoder in zip(encoders, ["model", "decoder.pth", "model/model.safetensors", "model"]):
        model = build(seed=7)
        said = policy.load_parts(model, str(tmp_path / encoder), str(tmp_path / decoder))
        assert [sentence for sentence in said if sentence.startswith("the encoder is that of")]
        assert torch.equal(logits(model.eval(), batch), logits(other, batch)), encoder
    model = build(seed=7)
    policy.load_parts(model, encoder=str(tmp_path / "model"))
    assert not torch.equal(model.decoder.hidden.weight, other.decoder.hidden.weight)
    build(seed=7).save_pretrained(tmp_path / "without")
    model = build(value_head=True)
    said = policy.load_parts(model, decoder=str(tmp_path / "without"))
    assert "value_decoder" in said[-1]
    assert "new" in said[-1]


def test_an_encoder_of_the_older_trainer(tmp_path):
    other = moved(build(V1, original=True), 2).eval()
    layers = {f"encoder.{name}": tensor for name, tensor in policy.to_original(other).items()}
    tables = other.encoder.embeddings.weight.detach().split([527, 2166, 548])
    names = ("sparse_embedding.weight", "progression_embedding._table.weight", "candidates_embedding.weight")
    sines = {"progression_embedding._positions._pe": torch.zeros(113, 16)}
    torch.save(dict(zip(names, tables)) | sines | layers, tmp_path / "encoder.01.pth")
    head = dict(zip(("_a.weight", "_a.bias", "_b.weight", "_b.bias"), other.decoder.state_dict().values()))
    torch.save(head, tmp_path / "decoder.01.pth")
    model = build(V1, original=True, seed=9)
    said = policy.load_parts(model, str(tmp_path / "encoder.01.pth"), str(tmp_path / "decoder.01.pth"))
    assert any("neither trained nor saved" in sentence for sentence in said)
    batch = batch_of(records(4, schema=V1), schema=V1)
    assert not torch.equal(logits(model.eval(), batch), logits(other, batch))  # by the numbers alone
    model.encoder.number_embeddings.data.copy_(other.encoder.number_embeddings)
    assert torch.equal(logits(model, batch), logits(other, batch))
    with pytest.raises(UserError, match="--original alone"):
        policy.load_parts(build(V1), encoder=str(tmp_path / "encoder.01.pth"))
    with pytest.raises(UserError, match="a decoder is asked for"):
        policy.load_parts(model, decoder=str(tmp_path / "encoder.01.pth"))


def test_parts_that_do_not_fit_are_refused_with_both_values(tmp_path):
    build().save_pretrained(tmp_path / "model")
    file = str(tmp_path / "model" / "model.safetensors")
    whole = build().state_dict()

    def refused(match, model, **parts):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(UserError, match=match):
            policy.load_parts(model, **parts)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    folder = str(tmp_path / "model")
    refused("num_attention_heads is 2, not 4", build(sizes=policy.sizes(None, 16, 4, 2, 24, 20)), encoder=folder)
    refused("norm is pre, not post", build(original=True), encoder=folder)
    refused("its schema board has other fields", build(V1), encoder=folder)
    refused("final_intermediate_size is 20, not 21", build(sizes=policy.sizes(None, 16, 2, 2, 24, 21)), decoder=folder)
    refused("lacks 14 tensors", build(sizes=policy.sizes(None, 16, 2, 3, 24, 20)), encoder=file)
    refused("has 14 more", build(sizes=policy.sizes(None, 16, 2, 1, 24, 20)), encoder=file)
    refused(r"has the shape \(24,\), not \(28,\)", build(sizes=policy.sizes(None, 16, 2, 2, 28, 20)), encoder=file)
    refused("does not exist", build(), encoder=str(tmp_path / "nothing.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    refused("cannot be read as weights", build(), encoder=str(tmp_path / "text.pth"))
    torch.save({"model": whole}, tmp_path / "nested.pth")
    refused("is no table of weights", build(), encoder=str(tmp_path / "nested.pth"))
    torch.save({"a": nn.Linear(2, 2)}, tmp_path / "code.pth")
    refused("cannot be read as weights", build(), encoder=str(tmp_path / "code.pth"))


def test_a_saved_policy_is_opened(tmp_path):
    model = build(value_head=True)
    model.save_pretrained(tmp_path)
    found = open_policy(str(tmp_path)).models[""]
    batch = batch_of(records(3))
    assert torch.equal(logits(found, batch), logits(model.eval(), batch))
    with pytest.raises(UserError, match="does not exist"):
        open_policy(str(tmp_path / "nothing"))
