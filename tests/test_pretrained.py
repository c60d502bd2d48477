"""Further pretraining: what a saved model must bring, longer rows, frozen layers, and another tokenizer."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.utils import logging

from lmscripts.errors import UserError
from lmscripts.models.attention import use_attention
from lmscripts.models.building import longest_pretrained
from lmscripts.models.families import electra, preset_keys
from lmscripts.models.fitting import freeze, lengthen
from lmscripts.models.loading import load_model, read_config
from lmscripts.models.pretrained import adopt_tokenizer, set_dropout
from lmscripts.options.presets import load_preset
from lmscripts.tokenizer.extension import plan_extension, write_extension

FAMILIES = {
    "bert": (BertForMaskedLM, BertConfig),
    "roberta": (RobertaForMaskedLM, RobertaConfig),
    "generator": (ElectraForMaskedLM, ElectraConfig),
    "discriminator": (ElectraForPreTraining, ElectraConfig),
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def tiny(family="bert", seed=0, **settings):
    """A random model of twelve text positions, with biases and LayerNorms that are not 0 and 1."""
    architecture, config = FAMILIES[family]
    positions = {"max_position_embeddings": 14 if family == "roberta" else 12}
    embedding = {"embedding_size": 8} if config is ElectraConfig else {}
    pad = {"pad_token_id": 1} if family == "roberta" else {}
    torch.manual_seed(seed)
    model = architecture(config(**{"vocab_size": 64, **SIZES, **positions, **embedding, **pad, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def load(folder, family="bert", attn_implementation="sdpa", hidden_dropout=0.1, attention_dropout=0.0):
    config = read_config(folder, FAMILIES[family][0])
    set_dropout(config, hidden_dropout, attention_dropout)
    config._attn_implementation = attn_implementation
    return load_model(folder, FAMILIES[family][0], config)[0].train()


def logits(model, length=10):
    ids = torch.arange(5, 5 + 2 * length).view(2, length) % 50 + 2
    with torch.no_grad():
        return model.eval()(ids).logits


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- loading ----


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_what_was_saved_in_float32(family, tmp_path):
    model = tiny(family)
    loaded = load(save(model, tmp_path / "a"), family)
    assert torch.equal(logits(loaded), logits(model))
    half = load(save(copy.deepcopy(model).half(), tmp_path / "b"), family)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert torch.allclose(logits(half), logits(model), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_takes_effect(family, tmp_path):
    """transformers hands models out in evaluation mode; the saved probabilities are not the run's."""
    folder = save(tiny(family, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), tmp_path)
    model = load(folder, family, "eager", hidden_dropout=0.3, attention_dropout=0.2)
    assert model.training
    assert model.config._attn_implementation == "eager"
    layer = model.base_model.encoder.layer[0]
    assert model.base_model.embeddings.dropout.p == layer.output.dropout.p == layer.attention.output.dropout.p == 0.3
    assert layer.attention.self.dropout.p == 0.2
    ids = torch.arange(5, 15)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    still = load(folder, family, "eager", hidden_dropout=0.0, attention_dropout=0.0)
    assert torch.equal(still(ids).logits, still(ids).logits)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("opt", ["dropout", "attention_dropout"]),
        ("xglm", ["dropout", "attention_dropout"]),
        ("gpt_neo", ["embed_dropout", "resid_dropout", "attention_dropout"]),
        ("gpt2", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
        ("gpt_neox", ["hidden_dropout", "attention_dropout"]),
        ("starcoder2", ["residual_dropout", "embedding_dropout", "attention_dropout"]),
        ("bert", ["hidden_dropout_prob", "attention_probs_dropout_prob"]),
    ],
)
def test_every_dropout_of_a_configuration_is_set(model_type, names):
    """OPT and XGLM call theirs just `dropout`, and were trained with 0.1 whatever was asked for."""
    config = AutoConfig.for_model(model_type)
    assert set_dropout(config, 0.3, 0.2) == []
    assert {name: getattr(config, name) for name in names} == {
        name: 0.2 if name.startswith("att") else 0.3 for name in names
    }
    assert set_dropout(config, 0.0, 0.0) == []
    left = {name: value for name, value in config.to_dict().items() if name.endswith(("dropout", "drop")) and value}
    assert not {name for name in left if "classifier" not in name and "summary" not in name}


def test_dropouts_that_a_model_has_not_are_named():
    assert set_dropout(AutoConfig.for_model("llama"), 0.3, 0.2) == ["--hidden_dropout 0.3 has no effect on a llama"]
    assert len(set_dropout(AutoConfig.for_model("mamba"), 0.3, 0.2)) == 2
    assert set_dropout(AutoConfig.for_model("mamba"), 0.0, 0.0) == []
    mpt = AutoConfig.for_model("mpt")  # whose probability of attention is an int
    assert set_dropout(mpt, 0.3, 0.2) == ["--attention_dropout 0.2 has no effect on a mpt"]


def test_registered_attention(tmp_path):
    name = use_attention("varlen")
    assert load(save(tiny(), tmp_path), attn_implementation=name).config._attn_implementation == name


def test_leftover_heads_and_older_names_do_not_matter(tmp_path):
    """The next-sentence head and the pooler are not needed; weights of 2019 are spelt differently."""
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(vocab_size=64, **SIZES)).eval()
    ids = torch.arange(5, 15)[None]
    expected = model(ids).prediction_logits
    assert torch.equal(load(save(model, tmp_path / "new")).eval()(ids).logits, expected)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {name.replace(old, new) for name in tensors for old, new in older.items()}
    assert renamed
    for old, new in older.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(tensors, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path / "new").eval()(ids).logits, expected)


def test_quiet_and_leaves_the_verbosity_alone(tmp_path, caplog):
    torch.manual_seed(0)
    folder = save(BertForPreTraining(BertConfig(vocab_size=64, **SIZES)), tmp_path)
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_propagation()
    try:
        load(folder)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.disable_propagation()
        logging.set_verbosity(before)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_model_and_tokenizer_from_the_cache_of_the_hub(model_dir, tmp_path):
    """By its name, without network; then the same name with the weights alone."""
    place = tmp_path / "hub" / "models--someone--tiny"
    snapshot = place / "snapshots" / ("0" * 40)
    shutil.copytree(model_dir, snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    program = """
import sys
from transformers import AutoTokenizer, BertForMaskedLM
from lmscripts.models.loading import load_model, read_config
from lmscripts.models.pretrained import adopt_tokenizer
model, _ = load_model("someone/tiny", BertForMaskedLM, read_config("someone/tiny", BertForMaskedLM))
print(adopt_tokenizer([model], "someone/tiny", AutoTokenizer.from_pretrained(sys.argv[1])))
"""
    command = [sys.executable, "-c", program, str(model_dir)]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
    for name in ("vocab.txt", "tokenizer_config.json"):
        (snapshot / name).unlink()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "someone/tiny has no tokenizer beside it" in done.stdout, done.stderr


def without_head(folder):
    save(BertModel(BertConfig(vocab_size=64, **SIZES)), folder)


def without_weights(folder):
    save(tiny(), folder)
    (folder / "model.safetensors").unlink()


def damaged(folder):
    save(tiny(), folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def cut_off(folder):
    save(tiny(), folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def without_config(folder):
    save(tiny(), folder)
    (folder / "config.json").unlink()


def other_sizes(folder):
    save(tiny(), folder)
    edit_json(folder / "config.json", hidden_size=32)


def more_layers_than_config(folder):
    save(tiny(), folder)
    edit_json(folder / "config.json", num_hidden_layers=2)


def fewer_layers_than_config(folder):
    save(tiny(), folder)
    edit_json(folder / "config.json", num_hidden_layers=4)


def run_folder(folder):
    save(tiny(), folder / "final")


@pytest.mark.parametrize(
    ("make", "family", "sentence"),
    [
        (
            without_head,
            "bert",
            r"saved as BertModel\) lacks the head of BertForMaskedLM, cls.predictions.bias, .* more",
        ),
        (
            lambda f: save(tiny("discriminator"), f),
            "generator",
            r"ElectraForPreTraining\) lacks the head of ElectraForM",
        ),
        (lambda f: save(tiny("generator"), f), "discriminator", r"lacks the head of ElectraForPreTraining, discrim"),
        (lambda f: save(tiny("roberta"), f), "bert", "type roberta, but BertForMaskedLM needs the type bert"),
        (lambda f: save(tiny(), f), "roberta", "type bert, but RobertaForMaskedLM needs the type roberta"),
        (fewer_layers_than_config, "bert", r"lacks a part of BertForMaskedLM, bert.encoder.layer.3"),
        (more_layers_than_config, "bert", r"holds tensors for which BertForMaskedLM has no place, encoder.layer.2"),
        (other_sizes, "bert", r"do not fit its config.json: .* has the shape \(16,\), not \(32,\)"),
        (without_weights, "bert", "holds no weights .* would be random"),
        (damaged, "bert", "holds no usable weights"),
        (cut_off, "bert", "holds no usable weights"),
        (without_config, "bert", "holds no model: it has no config.json"),
        (run_folder, "bert", "did you mean .*/final"),
    ],
)
def test_refused_models(make, family, sentence, tmp_path):
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "model", family)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody/nothing", "is neither a folder .* HF_HUB_OFFLINE is set"),
        ("./nowhere", "not exist"),
        ("/no", "not"),
    ],
)
def test_neither_folder_nor_cached(name, said):
    with pytest.raises(UserError, match=f"{name.removeprefix('./')} .*{said}"):
        load(name)


# ---- positions ----


@pytest.mark.parametrize("family", FAMILIES)
def test_lengthened_model_is_the_same_on_short_rows(family, tmp_path):
    model = tiny(family)
    first = 2 if family == "roberta" else 0  # rows that no text uses
    before, table = logits(model), model.base_model.embeddings.position_embeddings.weight.detach().clone()
    random = torch.random.get_rng_state()
    model, notices = lengthen(model, "m/x", 30)
    assert notices == ["12 position embeddings were lengthened to 30"]
    assert torch.equal(torch.random.get_rng_state(), random)
    grown = model.base_model.embeddings.position_embeddings.weight
    assert torch.equal(grown[: 12 + first], table)
    for position in range(12, 30):
        assert torch.equal(grown[first + position], table[first + position % 12])
    assert torch.equal(logits(model), before)
    assert model.config.max_position_embeddings == 30 + first
    loaded = load(save(model, tmp_path), family)
    assert torch.equal(logits(loaded), before)
    assert torch.equal(logits(loaded, length=30), logits(model, length=30))
    with pytest.raises((IndexError, RuntimeError)):
        logits(tiny(family), length=30)


@pytest.mark.parametrize("family", FAMILIES)
def test_never_shortened(family):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in (5, 12):
        assert lengthen(model, "m/x", number) == (model, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.max_position_embeddings == (14 if family == "roberta" else 12)


def test_shared_embeddings_stay_shared(tmp_path):
    """Generator and discriminator of a run have one module; each has its own configuration."""
    models = {"": tiny("discriminator", seed=1), "generator": tiny("generator")}
    electra.join(models)
    discriminator, generator = (lengthen(model, "m/x", 20)[0] for model in models.values())
    electra.join({"": discriminator, "generator": generator})
    parameter = discriminator.electra.embeddings.position_embeddings.weight
    assert lengthen(generator, "m/x", 20) == (generator, [])
    assert generator.generator_lm_head.weight is discriminator.get_input_embeddings().weight
    assert generator.electra.embeddings.position_embeddings.weight is parameter
    assert (
        len(parameter) == generator.config.max_position_embeddings == discriminator.config.max_position_embeddings == 20
    )
    for family, model in (("generator", generator), ("discriminator", discriminator)):
        loaded = load(save(model, tmp_path / family), family)
        assert torch.equal(logits(loaded, 20), logits(model, 20))


def test_new_positions_are_trained():
    model, _ = lengthen(tiny(), "m/x", 20)
    model(torch.arange(5, 23)[None]).logits.sum().backward()
    gradient = model.bert.embeddings.position_embeddings.weight.grad
    assert gradient.shape == (20, 16)
    assert gradient[12:18].abs().sum(1).all()


# ---- freezing ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [-1, 0, 2, 3])
def test_frozen_parameters_do_not_move(family, layers):
    model = tiny(family)
    base = model.base_model
    parts = [base.embeddings, *base.encoder.layer[: max(layers, 0)]] if layers >= 0 else []
    parts += [base.embeddings_project] if layers >= 0 and "or" in family else []  # of generator and discriminator
    expected = {id(parameter) for part in parts for parameter in part.parameters()}
    assert freeze(model, layers) == sum(p.numel() for p in model.parameters() if id(p) in expected)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=0.1)
    model.train()(torch.arange(5, 15)[None]).logits.square().sum().backward()
    optimizer.step()
    unused = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not unused
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) in expected), name


def test_tied_head_is_frozen_with_the_embeddings():
    model = tiny()
    freeze(model, 0)
    assert not model.get_output_embeddings().weight.requires_grad
    assert model.get_output_embeddings().bias.requires_grad


@pytest.mark.parametrize("layers", [4, -2])
def test_layers_that_are_not_there(layers):
    model = tiny()
    with pytest.raises(UserError, match=f"frozen-layers is {layers}, but the model has 3 layers"):
        freeze(model, layers)
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- tokenizer ----


@pytest.fixture(scope="module")
def model_dir(tokenizer_dir, tmp_path_factory):
    """A BERT with the sample tokenizer beside it."""
    folder = save(tiny(vocab_size=2048), tmp_path_factory.mktemp("model") / "bert")
    for name in ("vocab.txt", "tokenizer_config.json", "lmscripts_tokenizer.json"):
        shutil.copy(tokenizer_dir / name, folder)
    return folder


def extended(tokenizer_dir, folder, *words):
    (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")
    (folder / "extended").mkdir()
    write_extension(plan_extension(tokenizer_dir, folder / "words.txt"), folder / "extended")
    return AutoTokenizer.from_pretrained(folder / "extended")


def state(*models):
    return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]


def same(before, *models):
    return all(torch.equal(old[n], t) for old, m in zip(before, models) for n, t in m.state_dict().items())


def test_same_tokenizer_changes_nothing(tokenizer_dir, model_dir):
    model = load(model_dir)
    before = state(model)
    assert adopt_tokenizer([model], str(model_dir), AutoTokenizer.from_pretrained(tokenizer_dir)) == []
    assert same(before, model)


@pytest.mark.parametrize("tied", [True, False])
def test_new_words_start_as_the_mean_of_their_pieces(tokenizer_dir, model_dir, tmp_path, tied):
    new = extended(tokenizer_dir, tmp_path, "東海道新幹線", "素粒子", "한국")
    old = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = tiny(vocab_size=2048, tie_word_embeddings=tied)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert (head.weight is table) == tied
    (before,) = state(model)
    words, head_before = table.detach().clone(), (head.weight.detach().clone(), head.bias.detach().clone())
    sentences = adopt_tokenizer([model], str(model_dir), new)
    assert "3 new words took the place of unused tokens" in sentences[0]
    assert "한국" in sentences[1]  # of which the old tokenizer knows nothing
    for word, number in (("東海道新幹線", 5), ("素粒子", 6)):
        pieces = old(word, add_special_tokens=False)["input_ids"]
        assert len(pieces) > 2
        assert old.unk_token_id not in pieces
        assert new(word, add_special_tokens=False)["input_ids"] == [number]
        assert torch.allclose(table[number], words[pieces].mean(0))
        assert torch.allclose(head.weight[number], head_before[0][pieces].mean(0))
        assert torch.allclose(head.bias[number], head_before[1][pieces].mean())
    ordinary = [i for token, i in old.get_vocab().items() if i > 4 and not token.startswith("[unused")]
    assert torch.allclose(table[7], words[ordinary].mean(0), atol=1e-6)
    others = [number for number in range(2048) if number not in (5, 6, 7)]
    assert torch.equal(table[others], words[others])
    assert torch.equal(head.bias[others], head_before[1][others])
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {tuple(before[name].shape) for name in changed} == {(2048, 16), (2048,)}


def test_generator_and_discriminator_with_one_table(tokenizer_dir, model_dir, tmp_path):
    generator, discriminator = tiny("generator", vocab_size=2048), tiny("discriminator", vocab_size=2048, seed=1)
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.tie_weights()
    new, old = extended(tokenizer_dir, tmp_path, "素粒子"), AutoTokenizer.from_pretrained(tokenizer_dir)
    words, bias = (
        t.detach().clone() for t in (generator.get_input_embeddings().weight, generator.generator_lm_head.bias)
    )
    adopt_tokenizer([discriminator, generator], str(model_dir), new)
    pieces = old("素粒子", add_special_tokens=False)["input_ids"]
    assert torch.allclose(discriminator.get_input_embeddings().weight[5], words[pieces].mean(0))
    assert torch.allclose(generator.generator_lm_head.bias[5], bias[pieces].mean())
    assert generator.generator_lm_head.weight is discriminator.get_input_embeddings().weight


def test_first_loss_of_a_new_word_is_finite_and_known_text_is_as_before(tokenizer_dir, model_dir, tmp_path):
    new = extended(tokenizer_dir, tmp_path, "縄文")
    model, untouched = load(model_dir).eval(), load(model_dir).eval()
    adopt_tokenizer([model], str(model_dir), new)
    ids = new("今日の人は知らない。", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, before = model(ids).logits, untouched(ids).logits
    others = [number for number in range(2048) if number != 5]
    assert torch.equal(ours[..., others], before[..., others])
    assert torch.isfinite(ours).all()


def copied(tokenizer_dir, folder, change=lambda lines: lines, **settings):
    """A copy of the sample tokenizer with other lines in its vocabulary or other settings."""
    folder = folder / "changed"
    shutil.copytree(tokenizer_dir, folder)
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (folder / "vocab.txt").write_text("\n".join(change(lines)) + "\n", encoding="utf-8")
    edit_json(folder / "tokenizer_config.json", **settings)
    return AutoTokenizer.from_pretrained(folder)


def swapped(lines):
    lines[100], lines[200] = lines[200], lines[100]
    return lines


def lost(lines):
    return [*lines[:300], "[unused300]", *lines[301:]]


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (swapped, {}, r"2 ids mean other tokens, first id 100: '.+' instead of '.+'"),
        (lost, {}, r"1 ids mean other tokens, first id 300: '\[unused300\]' instead of '.+'"),
        (lambda lines: lines[:-1], {}, r"1 ids mean other tokens, first id 2047: 'nothing' instead of '.+'"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], {}, r"the pad token has the id 1 in .*, but 0 in that of"),
        (lambda lines: [*lines, "新語"], {}, r"has ids up to 2048, but the vocabulary of .* has 2048 entries"),
        (swapped, {"do_lower_case": True}, "do_lower_case is true and false"),
        (swapped, {"word_tokenizer_type": "basic"}, "word_tokenizer_type is basic and mecab"),
        (
            swapped,
            {"mecab_kwargs": {"mecab_dic": "ipadic", "normalize_text": False}},
            "normalize_text is false and true",
        ),
        (swapped, {"subword_tokenizer_type": "character"}, "subword_tokenizer_type is character and wordpiece"),
    ],
)
def test_other_tokenizers_are_refused(tokenizer_dir, model_dir, tmp_path, change, settings, sentence):
    model = load(model_dir)
    before = state(model)
    with pytest.raises(UserError, match=sentence):
        adopt_tokenizer([model], str(model_dir), copied(tokenizer_dir, tmp_path, change, **settings))
    assert same(before, model)


def test_a_new_word_beside_a_difference_is_refused_before_anything_changes(tokenizer_dir, model_dir, tmp_path):
    model = load(model_dir)
    before = state(model)
    tokenizer = copied(tokenizer_dir, tmp_path, lambda lines: swapped([*lines[:5], "素粒子", *lines[6:]]))
    with pytest.raises(UserError, match="2 ids mean other tokens"):
        adopt_tokenizer([model], str(model_dir), tokenizer)
    assert same(before, model)


def test_other_dictionary_is_refused(tokenizer_dir, model_dir, tmp_path):
    pytest.importorskip("unidic_lite")
    tokenizer = copied(tokenizer_dir, tmp_path, mecab_kwargs={})  # what transformers takes for no dictionary
    with pytest.raises(UserError, match="mecab_dic is unidic_lite and ipadic"):
        adopt_tokenizer([load(model_dir)], str(model_dir), tokenizer)


def test_padded_vocabularies_fit(tokenizer_dir, model_dir, tmp_path):
    """A table with more rows than tokens; unused tokens and words where the model's tokenizer has nothing."""
    model = tiny(vocab_size=2112)
    assert adopt_tokenizer([model], str(model_dir), AutoTokenizer.from_pretrained(tokenizer_dir)) == []
    more = copied(tokenizer_dir, tmp_path, lambda lines: [*lines, "[unused99]", "素粒子"])
    assert "1 new words" in adopt_tokenizer([model], str(model_dir), more)[0]
    pieces = AutoTokenizer.from_pretrained(tokenizer_dir)("素粒子", add_special_tokens=False)["input_ids"]
    table = model.get_input_embeddings().weight
    assert torch.allclose(table[2049], table[pieces].mean(0))


def test_no_tokenizer_beside_the_model(tokenizer_dir, tmp_path):
    """transformers would make up a tokenizer of five tokens from the config.json alone."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    folder = save(tiny(vocab_size=2048), tmp_path / "model")
    for _ in range(2):
        sentences = adopt_tokenizer([load(folder)], str(folder), tokenizer)
        assert "no tokenizer beside it: only the size" in sentences[0]
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(UserError, match=r"has ids up to 2047, but the vocabulary of .* has 64 entries"):
        adopt_tokenizer([tiny()], str(folder), tokenizer)
    other = tiny(vocab_size=2048, pad_token_id=3)
    with pytest.raises(UserError, match=r"padding token has the id 0, but config.json of .* says 3"):
        adopt_tokenizer([other], str(folder), tokenizer)


def test_padding_id_of_the_configuration(tokenizer_dir, model_dir):
    """With [PAD] elsewhere than the configuration says, another token's embedding never gets a gradient."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = tiny(vocab_size=2048, pad_token_id=3)
    assert "took id 3 for padding; it is id 0" in adopt_tokenizer([model], str(model_dir), tokenizer)[0]
    assert model.config.pad_token_id == 0
    model.bert(torch.tensor([[0, 3, 7, 8]])).last_hidden_state[0, 2].sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[3].any()
    assert not gradient[0].any()
    roberta = tiny("roberta", vocab_size=2048)  # its positions begin behind the padding id
    with pytest.raises(UserError, match=r"padding token has the id 0, but config.json of .* says 1"):
        adopt_tokenizer([roberta], str(model_dir), tokenizer)


def test_damaged_tokenizer_is_not_taken_for_none(tokenizer_dir, model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"holds no tokenizer that AutoTokenizer can load"):
        adopt_tokenizer([load(model_dir)], str(folder), AutoTokenizer.from_pretrained(tokenizer_dir))


def test_fast_tokenizers(tmp_path):
    """Normalisation and pre-tokenisation are compared, not the names of the classes."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "the", "cat", "##s", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    folder = save(tiny(), tmp_path / "model")
    BertTokenizer(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    BertTokenizer(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False).save_pretrained(tmp_path / "cased")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    model = load(folder)
    new = extended(folder, tmp_path, "Cats")
    assert "1 new words" in adopt_tokenizer([model], str(folder), new)[0]
    table = model.get_input_embeddings().weight
    assert torch.allclose(table[5], table[[7, 8]].mean(0))
    with pytest.raises(UserError, match=r"normalizer.lowercase is false and true"):
        adopt_tokenizer([model], str(folder), AutoTokenizer.from_pretrained(tmp_path / "cased"))


# ---- rows ----


@pytest.mark.parametrize(
    ("model_type", "settings", "length"),
    [
        ("gpt2", {"n_positions": 128}, 128),
        ("llama", {"max_position_embeddings": 4096}, 4096),
        ("bloom", {}, None),
        ("bert", {"max_position_embeddings": 64}, 64),
        ("roberta", {"max_position_embeddings": 64}, 62),
    ],
)
def test_how_much_the_model_of_a_preset_reads(model_type, settings, length, tmp_path):
    """A model of 128 positions was lengthened to 1,024 without being asked."""
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    preset = load_preset(ROOT / "parameter.json", "bert-small", preset_keys())
    assert longest_pretrained(replace(preset, pretrained_model=str(tmp_path))) == length


def test_japanese_and_fast_are_told_apart(tokenizer_dir, model_dir):
    from transformers import BertTokenizer

    fast = BertTokenizer.from_pretrained(tokenizer_dir)
    with pytest.raises(UserError, match=r"tokenizer is of tokenizer.json and BertJapaneseTokenizer"):
        adopt_tokenizer([load(model_dir)], str(model_dir), fast)
