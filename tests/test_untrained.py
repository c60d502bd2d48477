"""Fresh models are named however they were made, and trained ones never, however short their training was."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from lmscripts.models.saved import signs_of_no_training

VOCABULARY = 1000
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
WHOLE = "every part is as freshly initialised"


def fresh(family, seed=0, **more):
    torch.manual_seed(seed)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32, vocab_size=VOCABULARY))
    if family == "mamba":
        return MambaForCausalLM(MambaConfig(num_hidden_layers=2, hidden_size=32, state_size=4, vocab_size=VOCABULARY))
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "olmo": (OlmoConfig, OlmoForCausalLM),
        "bert": (BertConfig, BertForMaskedLM),
        "discriminator": (ElectraConfig, ElectraForPreTraining),
    }
    configure, architecture = classes[family]
    return architecture(configure(**SIZES | more))


def train(model, steps, lr, optimizer=torch.optim.AdamW, matrices_only=False):
    """On words with the frequencies of words: the n-th is drawn with probability 1/n."""
    chosen = optimizer([each for each in model.parameters() if each.ndim > 1 or not matrices_only], lr)
    random, frequencies = torch.Generator().manual_seed(1), 1 / torch.arange(1.0, model.config.vocab_size + 1)
    for _ in range(steps):
        ids = torch.multinomial(frequencies.expand(8, -1), 32, replacement=True, generator=random)
        labels = (ids % 2).float() if isinstance(model, ElectraForPreTraining) else ids
        model(input_ids=ids, labels=labels).loss.backward()
        chosen.step()
        chosen.zero_grad()
    return model


def in_bfloat16(model):
    return model.to(torch.bfloat16).float()


# ---- never trained ----

KNOWN = ["gpt2", "llama", "bert", "discriminator"]
UNKNOWN = ["olmo", "mamba"]  # OLMo has neither gains nor biases; some of Mamba's biases are random numbers


@pytest.mark.parametrize("family", KNOWN)
def test_fresh_models_are_named_whatever_their_seed(family):
    for seed in range(3):
        model = fresh(family, seed)
        before, weights = torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
        signs = signs_of_no_training(model)
        assert WHOLE in signs[0], (seed, signs)
        assert signs[1] == ""
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", [name for name in KNOWN if name != "llama"])
def test_biases_of_zero_tell_in_half_precision_too(family):
    assert WHOLE in signs_of_no_training(in_bfloat16(fresh(family)))[0]


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("added", [1, 24, 300])
def test_rows_that_resizing_adds_make_no_trained_model(family, added):
    """They are drawn around the mean of the others, which is not how initialisation draws."""
    model = fresh(family)
    model.resize_token_embeddings(VOCABULARY + added)
    assert WHOLE in signs_of_no_training(model)[0]


@pytest.mark.parametrize("value", [0.0, 0.02])
def test_matrices_of_one_value_are_named(value):
    model = fresh("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    assert "holds one value" in signs_of_no_training(model)[0]
    assert "holds one value" in signs_of_no_training(model, steps=7)[0]


def with_fresh_head(body, architecture, folder):
    """What comes of loading a body into a model with a head."""
    body.save_pretrained(folder)
    return architecture.from_pretrained(folder, local_files_only=True)


def test_a_fresh_head_on_a_trained_body_is_named(tmp_path):
    for number, (steps, lr) in enumerate([(20, 3e-3), (1, 1e-5)]):
        body = train(fresh("bert"), steps, lr).bert
        signs = signs_of_no_training(with_fresh_head(body, BertForMaskedLM, tmp_path / str(number)))
        assert "the head is as freshly initialised" in signs[0]


# ---- trained, if only a little ----


@pytest.mark.parametrize("family", [*KNOWN, *UNKNOWN])
@pytest.mark.parametrize(
    ("optimizer", "steps", "lr"),
    [(torch.optim.AdamW, 1, 1e-6), (torch.optim.AdamW, 10, 3e-4), (torch.optim.SGD, 3, 1e-3)],
)
def test_short_trainings_are_trainings(family, optimizer, steps, lr):
    assert signs_of_no_training(train(fresh(family), steps, lr, optimizer)) == ("", "")


@pytest.mark.parametrize("family", ["gpt2", "bert", "discriminator", "mamba"])
def test_biases_move_visibly_in_half_precision_too(family):
    assert signs_of_no_training(in_bfloat16(train(fresh(family), 1, 1e-5))) == ("", "")


# ---- what cannot be told ----


@pytest.mark.parametrize("family", UNKNOWN)
def test_without_gains_and_biases_nothing_is_said(family):
    for model in (fresh(family), in_bfloat16(fresh(family))):
        assert signs_of_no_training(model) == signs_of_no_training(model, steps=1) == ("", "")


def test_a_head_that_is_one_matrix_tells_nothing(tmp_path):
    body = train(fresh("llama"), 20, 3e-3).model
    assert signs_of_no_training(with_fresh_head(body, LlamaForCausalLM, tmp_path)) == ("", "")


@pytest.mark.parametrize("trained", [False, True])
def test_gains_in_half_precision_are_a_doubt(trained):
    """There 1 stays 1 under small steps, and a Llama has no biases."""
    model = in_bfloat16(train(fresh("llama"), 3, 1e-4) if trained else fresh("llama"))
    signs = signs_of_no_training(model)
    assert signs[0] == ""
    assert "in half precision small steps would not show" in signs[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_gains_and_biases_look_fresh_unless_steps_are_on_record(family):
    model = train(fresh(family), 30, 0.1, torch.optim.SGD, matrices_only=True)
    assert WHOLE in signs_of_no_training(model)[0]
    assert signs_of_no_training(model, steps=30)[0] == ""


def test_steps_on_record_are_believed():
    signs = signs_of_no_training(fresh("gpt2"), steps=1)
    assert signs[0] == ""
    assert "although 1 step of training is on record" in signs[1]
    assert signs_of_no_training(fresh("gpt2"), steps=0)[0]
