"""Every family and every objective has what is asked of all, and both checks of the first second find what is wrong."""

import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from tiny import new_models, tiny_preset
from transformers import AutoTokenizer

from lmscripts import objectives
from lmscripts.data.packing import Layout, segment_ends
from lmscripts.data.steps import Shuffled, step_batches
from lmscripts.data.token_store import open_store
from lmscripts.errors import UserError
from lmscripts.models import building, families
from lmscripts.models.attention import use_attention
from lmscripts.models.checks import check_exports, check_isolation
from lmscripts.tokenizer.encoder import Encoder

LAYOUT = Layout(64, "isolated", begin_id=2, end_id=3, pad_id=0)
HEADS = [(name, objective) for name in families.names() for objective in families.family(name).heads]
NOT_EVERYWHERE = {"KIND", "SCORES", "pair_scores"}


def asked_for(docstring):
    """Names of the table of a docstring, and of those that are functions their parameters."""
    found = {}
    for names, rest in re.findall(r"^    (\w+(?:, \w+)*)  +(.*)$", docstring, re.MULTILINE):
        parameters = re.match(r"\((.*?)\)", rest)
        found |= {name: parameters and parameters[1].split(", ") for name in names.split(", ")}
        found |= {name: inside.split(", ") for name, inside in re.findall(r"`(\w+)\((.*?)\)`", rest)}
    return found


@pytest.mark.parametrize(
    ("module", "docstring"),
    [
        *((families.family(name), families.__doc__) for name in families.names()),
        *((objectives.objective(name), objectives.__doc__) for name in objectives.names()),
    ],
    ids=[*families.names(), *objectives.names()],
)
def test_every_module_has_what_is_asked_of_all(module, docstring):
    asked = asked_for(docstring)
    assert len(asked) > 12
    for name, parameters in asked.items():
        if name in NOT_EVERYWHERE and not hasattr(module, name):
            continue
        value = getattr(module, name)
        if parameters is not None:
            known = inspect.signature(value).parameters
            assert list(known)[: len(parameters)] == parameters, name
            more = [known[other] for other in list(known)[len(parameters) :]]
            assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in more), name


def test_families_and_objectives_fit_together():
    assert {objective for _, objective in HEADS} == set(objectives.names())
    for name in families.names():
        module = families.family(name)
        assert module.default_objective in module.heads
        assert module.heads.keys() == module.pretrained_heads.keys()
        for objective, heads in module.heads.items():
            kind = objectives.objective(objective)
            assert heads.keys() == module.pretrained_heads[objective].keys()
            assert "" in heads
            assert heads.keys() <= kind.PARTS.keys()  # a class may have the heads of two folders in one
            assert {export.subfolder for export in kind.EXPORTS} == kind.PARTS.keys()
            assert dataclasses.is_dataclass(kind.Settings)


def test_what_is_not_there_is_refused_by_name():
    with pytest.raises(UserError, match="no --objective clozed: choose among " + ", ".join(objectives.names())):
        objectives.objective("clozed")
    with pytest.raises(UserError, match="of the family t5 cannot be trained yet, only " + ", ".join(families.names())):
        families.family("t5")
    with pytest.raises(UserError, match="--objective causal has no head in the family bert, which has masked"):
        families.architectures("bert", "causal")


# ---- both checks of the first second -----------------------------------------------------------------------------


def apart(models):
    """Models of which each has a body of its own."""
    return list({id(model.base_model): model for model in reversed(models.values())}.values())


@pytest.mark.parametrize(("name", "objective"), HEADS)
@pytest.mark.parametrize("path", ["eager", "sdpa", "varlen"])
def test_documents_are_kept_apart_and_the_model_is_left_as_it_was(name, objective, path):
    family = families.family(name)
    for model in apart(new_models(name, objective, LAYOUT, path)):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for packing in ("isolated", "contiguous"):
            check_isolation(family, model, path, dataclasses.replace(LAYOUT, packing=packing))
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert model.training
        assert model.config._attn_implementation == use_attention(path)


@pytest.mark.parametrize(("name", "objective"), HEADS)
@pytest.mark.parametrize("length", [1, 2, 8, 14, 15, 23])
def test_short_rows_are_checked_too(name, objective, length, monkeypatch):
    """Two documents of a fixed length would need more positions than a model of such rows has."""
    family, layout = families.family(name), dataclasses.replace(LAYOUT, sequence_length=length)
    models = apart(new_models(name, objective, layout))
    for model in models:
        check_isolation(family, model, "sdpa", layout)
    monkeypatch.setattr(family, "attention", no_mask)
    for model in models if length > 1 else ():
        with pytest.raises(UserError, match="packed rows"):
            check_isolation(family, model, "sdpa", layout)


def no_mask(model, path, batch, dtype):
    return {"attention_mask": None}


@pytest.mark.parametrize(("name", "objective"), HEADS)
@pytest.mark.parametrize("path", ["eager", "sdpa"])
def test_a_family_whose_attention_gives_no_mask_is_caught(name, objective, path, monkeypatch):
    family = families.family(name)
    monkeypatch.setattr(family, "attention", no_mask)
    for model in apart(new_models(name, objective, LAYOUT, path)):
        with pytest.raises(UserError, match=f"a {type(model).__name__} .* with --packing contiguous"):
            check_isolation(family, model, path, LAYOUT)


@pytest.mark.parametrize(("name", "objective"), HEADS)
def test_a_mask_that_hides_too_little_is_caught(name, objective, monkeypatch):
    """All but the first token of the document before is hidden."""
    family = families.family(name)
    right = family.attention

    def leaking(*arguments):
        found = right(*arguments)
        masks = found["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            mask[..., 0] = 0.0
        return found

    monkeypatch.setattr(family, "attention", leaking)
    for model in apart(new_models(name, objective, LAYOUT)):
        with pytest.raises(UserError, match=r"packed rows|see the one before"):
            check_isolation(family, model, "sdpa", LAYOUT)


@pytest.mark.parametrize(("name", "objective"), [head for head in HEADS if head[0] != "modernbert"])
def test_positions_that_go_on_from_document_to_document_are_caught(name, objective, monkeypatch):
    """Rotary positions say only how far apart two tokens are, so they may."""
    family = families.family(name)
    right = family.encode

    def counting_on(model, ids, positions, *rest):
        return right(model, ids, torch.arange(ids.shape[1]).expand_as(ids), *rest)

    monkeypatch.setattr(family, "encode", counting_on)
    for model in apart(new_models(name, objective, LAYOUT)):
        with pytest.raises(UserError, match="gives other logits in packed rows than alone"):
            check_isolation(family, model, "sdpa", LAYOUT)


def build(name, objective, tokenizer):
    return building.build(
        tiny_preset(name),
        objective,
        tokenizer,
        LAYOUT,
        seed=0,
        path="sdpa",
        dropouts=building.Dropouts(0.0, 0.0),
    )


@pytest.mark.parametrize(("name", "objective"), HEADS)
def test_documents_are_looked_at_where_models_are_built(name, objective, tokenizer_dir, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    models, notices = build(name, objective, tokenizer)
    assert notices == []
    assert models.keys() == families.family(name).heads[objective].keys()
    monkeypatch.setattr(families.family(name), "attention", no_mask)
    with pytest.raises(UserError, match="with --packing contiguous"):
        build(name, objective, tokenizer)


@pytest.mark.parametrize(("name", "objective"), HEADS)
def test_an_export_that_comes_back_as_another_model_is_refused(name, objective, tokenizer_dir):
    models = new_models(name, objective, LAYOUT)
    encoder = Encoder(tokenizer_dir, AutoTokenizer.from_pretrained(tokenizer_dir))
    for part, model in models.items():
        with pytest.raises(UserError, match=f"makes a \\w+ of what is saved as a {type(model).__name__}"):
            check_exports(models, {part: "AutoModelForQuestionAnswering"}, encoder)
        with pytest.raises(UserError, match=f"AutoModelForSeq2SeqLM cannot load a {type(model).__name__}"):
            check_exports(models, {part: "AutoModelForSeq2SeqLM"}, encoder)


@pytest.mark.parametrize(("name", "objective"), HEADS)
def test_a_tokenizer_that_does_not_come_back_is_refused(name, objective, tokenizer_dir):
    models = new_models(name, objective, LAYOUT)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens(["<new>"])  # its folder does not know
    with pytest.raises(UserError, match=r"makes another tokenizer of .*: a vocabulary of 2048 other entries"):
        check_exports(models, {}, Encoder(Path(tokenizer_dir), tokenizer))


# ---- training ----------------------------------------------------------------------------------------------------


def random_row(model, path):
    """A row of three documents and what `encode` takes of it."""
    ids = torch.randint(5, 500, (2, 64), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([0] * 20 + [1] * 30 + [2] * 14).expand(2, 64)
    positions = torch.cat([torch.arange(n) for n in (20, 30, 14)]).expand(2, 64)
    return ids, positions, {"input_ids": ids, "segments": segments, "segment_ends": segment_ends(segments, 8)}


@pytest.mark.parametrize(("name", "objective"), HEADS)
@pytest.mark.parametrize("path", ["eager", "sdpa", "varlen"])
@torch.no_grad()
def test_a_narrow_last_layer_computes_at_its_slots_what_the_whole_one_has(name, objective, path):
    family, slots = families.family(name), torch.tensor([0, 19, 20, 41, 64, 70, 90, 127])
    for model in apart(new_models(name, objective, LAYOUT, path)):
        ids, positions, batch = random_row(model, path)
        attention = family.attention(model.eval(), path, batch, torch.float32)
        whole = family.encode(model, ids, positions, attention)
        assert whole.shape == (2, 64, model.config.hidden_size)
        family.narrow(model)
        some = family.encode(model, ids, positions, attention, slots)
        assert (some - whole.flatten(0, 1)[slots]).abs().max() < 1e-5
        assert torch.equal(family.encode(model, ids, positions, attention), whole)


@pytest.mark.parametrize(("name", "objective"), HEADS)
@pytest.mark.parametrize("path", ["sdpa", "varlen"])
def test_sums_are_of_the_targets_that_are_counted_and_an_idle_process_has_none(name, objective, path, store_dir):
    kind, tokenizer = objectives.objective(objective), AutoTokenizer.from_pretrained(store_dir / "tokenizer")
    settings = kind.resolved(kind.Settings(), tiny_preset(name))
    rows = kind.rows(open_store(store_dir), "train", tokenizer, 64, "isolated", settings)
    plan, numbers = kind.plan(tokenizer, rows.layout, settings), np.arange(4)
    models = new_models(name, objective, rows.layout, path, vocabulary=len(tokenizer))
    trained = objectives.trained(objective, families.family(name), models, path, settings)

    def batches(sizes):
        return kind.batches(rows, numbers, np.zeros_like(numbers), 0, sizes, plan, path == "varlen")

    ((batch, counts),) = batches([4])
    terms = kind.weights(settings)
    assert counts.keys() >= {*terms, "tokens"}
    sums = trained(batch)
    assert sums.keys() >= terms.keys()
    assert trained.kept_bytes(batch, torch.float32) == pytest.approx(kept_for_the_gradient(trained, batch), rel=0.03)
    assert all(counts[term] > 0 and sums[term] > 0 for term in terms)
    halves = [(trained(part), part_counts) for part, part_counts in batches([1, 3])]
    for term in terms:
        assert sum(part_counts[term] for _, part_counts in halves) == counts[term]
        assert sum(part[term] for part, _ in halves).item() == pytest.approx(sums[term].item(), rel=1e-4)
    shares = {"shares": [1, 0], "micro_batch_size": 4, "first": 0, "stop": 1}
    order, made = Shuffled(4, 4, 4, 0), lambda rows_of, epochs, sizes: batches([4] if sizes == [4] else [1, 3])[:1]
    ((idle,), counts) = next(step_batches(order, made, process=1, **shares))
    assert set(counts.values()) == {0.0}
    sums = trained(idle)
    assert all(sums[term] == 0 for term in terms)
    trained.loss(sums, dict.fromkeys(terms, 1.0)).backward()
    assert not any(p.grad.any() for p in trained.parameters() if p.grad is not None)


def kept_for_the_gradient(trained, batch):
    kept, own = {}, {p.untyped_storage()._cdata for p in trained.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept.update({} if storage._cdata in own else {storage._cdata: storage.nbytes()})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = trained(batch)  # alive until all is counted: freed memory would be used again
    assert sums
    return sum(kept.values())


def test_activations_that_cannot_be_computed_again_are_refused():
    models = new_models("bert", "masked", LAYOUT)
    building.recompute_activations(models)
    assert any(getattr(module, "gradient_checkpointing", False) for module in models[""].modules())
    models[""].supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="does not have that for a BertForMaskedLM"):
        building.recompute_activations(models)


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.names())
def test_sizes_of_the_line_are_those_of_the_model(name):
    objective = families.family(name).default_objective
    asked = building.as_asked(tiny_preset(name), objective, sizes={"layers": 3, "heads": 4, "hidden_size": 96})
    assert (asked.layers, asked.heads, asked.hidden_size, asked.ffn_size) == (3, 4, 96, 384)
    with pytest.raises(UserError, match="--n_embd 97 is not divisible by --n_head 2"):
        building.as_asked(tiny_preset(name), objective, sizes={"hidden_size": 97})


def test_sizes_of_the_line_of_which_a_generator_cannot_have_its_share():
    """Its heads would be rounded down to none."""
    with pytest.raises(UserError, match="electra-tiny: generator-size 1/2 of attention-heads 1 is not a whole number"):
        building.as_asked(tiny_preset("electra"), "replaced", sizes={"heads": 1})


GIVEN = {
    "do_whole_word_mask": [],
    "mask_unit": ["span"],
    "mask_probability": ["0.2"],
    "generator_weight": ["2"],
    "discriminator_weight": ["2"],
    "z_loss": ["0.1"],
    "pair_task": ["order"],
    "pair_weight": ["2"],
    "short_pairs": ["0.2"],
    "pair_passes": ["2"],
}


def options_of(objective):
    return {field.name for field in dataclasses.fields(objectives.objective(objective).Settings)}


def test_all_options_of_objectives_are_tried_below():
    assert set(GIVEN) == set().union(*map(options_of, objectives.names()))


@pytest.mark.parametrize(
    ("objective", "option"),
    [(name, option) for name in objectives.names() for option in GIVEN if option not in options_of(name)],
)
def test_options_of_another_objective_are_refused(objective, option, store_dir, tmp_path):
    family = next(name for name, of_family in HEADS if of_family == objective)
    arguments = ["--model_type", f"{family}-tiny", "--objective", objective, "--dataset_dir", store_dir]
    arguments += ["--model_dir", tmp_path / "run", f"--{option}", *GIVEN[option]]
    done = run_script("run_pretraining.py", *arguments, check=False)
    assert done.returncode == 2
    assert re.search(rf"--{option} \S+ has no effect on the objective {objective}", done.stderr)
    assert not (tmp_path / "run").exists()
