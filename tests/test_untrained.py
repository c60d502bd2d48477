"""Fresh models are named however they were made, and trained ones never, however short their training was."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from lmscripts.models.untrained import Signs, signs_of_no_training

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

EVERY = ["gpt2", "llama", "olmo", "mamba", "bert", "discriminator"]


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_fresh_models_are_named_whatever_their_seed(family, precision):
    """OLMo has neither gains nor biases; some of Mamba's biases are random numbers."""
    for seed in range(3):
        model = fresh(family, seed).to(precision).float()
        before, weights = torch.random.get_rng_state(), copy.deepcopy(model.state_dict())
        signs = signs_of_no_training(model)
        assert len(signs.untrained) == 1, (seed, signs)
        assert WHOLE in signs.untrained[0]
        assert signs.doubts == []
        assert torch.equal(before, torch.random.get_rng_state())
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("added", [1, 24, 300])
def test_rows_that_resizing_adds_make_no_trained_model(family, added):
    """They are drawn around the mean of the others, which is not how initialisation draws."""
    model = fresh(family)
    model.resize_token_embeddings(VOCABULARY + added)
    assert WHOLE in signs_of_no_training(model).untrained[0]


@pytest.mark.parametrize("value", [0.0, 0.02])
def test_matrices_of_one_value_are_named(value):
    model = fresh("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    assert "holds one value" in signs_of_no_training(model).untrained[0]
    assert "holds one value" in signs_of_no_training(model, steps=7).untrained[0]


def with_fresh_head(body, architecture, folder):
    """What comes of loading a body into a model with a head."""
    body.save_pretrained(folder)
    return architecture.from_pretrained(folder, local_files_only=True)


def test_a_fresh_head_on_a_trained_body_is_named(tmp_path):
    """Llama's head is one matrix, without a bias that could tell."""
    for number, (trained, architecture) in enumerate(
        [
            (train(fresh("llama"), 20, 3e-3).model, LlamaForCausalLM),
            (train(fresh("bert"), 20, 3e-3).bert, BertForMaskedLM),
            (train(fresh("bert"), 1, 1e-5).bert, BertForMaskedLM),
        ]
    ):
        assert isinstance(trained, (LlamaModel, BertModel))
        signs = signs_of_no_training(with_fresh_head(trained, architecture, tmp_path / str(number)))
        assert "the head is as freshly initialised" in signs.untrained[0]


# ---- trained, if only a little ----


@pytest.mark.parametrize("family", [name for name in EVERY if name != "olmo"])
@pytest.mark.parametrize(
    ("optimizer", "steps", "lr"),
    [(torch.optim.AdamW, 1, 1e-6), (torch.optim.AdamW, 10, 3e-4), (torch.optim.SGD, 3, 1e-3)],
)
def test_short_trainings_are_trainings(family, optimizer, steps, lr):
    assert signs_of_no_training(train(fresh(family), steps, lr, optimizer)) == Signs()


@pytest.mark.parametrize("family", ["gpt2", "bert", "discriminator", "mamba"])
def test_biases_move_visibly_in_half_precision_too(family):
    assert signs_of_no_training(in_bfloat16(train(fresh(family), 1, 1e-5))) == Signs()


@pytest.mark.parametrize("family", ["gpt2", "olmo", "bert"])
@pytest.mark.parametrize(("steps", "lr"), [(3, 1e-3), (50, 1e-4)])
def test_the_margin_where_only_matrices_speak(family, steps, lr):
    """Gains and biases were frozen, or there are none; what is saved in bfloat16 tells no less."""
    model = train(fresh(family), steps, lr, matrices_only=True)
    assert signs_of_no_training(model).untrained == []
    assert signs_of_no_training(in_bfloat16(model)).untrained == []


@pytest.mark.parametrize("family", ["llama", "olmo"])
def test_sgd_with_frozen_gains(family):
    assert signs_of_no_training(train(fresh(family), 30, 0.1, torch.optim.SGD, matrices_only=True)) == Signs()


def test_trained_matrices_are_training_although_no_gain_has_moved():
    """In bfloat16 a gain of 1 stays 1 under small steps, and a Llama has no biases."""
    model = fresh("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.5)
    assert signs_of_no_training(model) == Signs()


# ---- what cannot be told ----


def test_where_little_would_show_it_is_a_doubt():
    """64 rows of 32 random numbers hide a change by a quarter of their spread."""
    signs = signs_of_no_training(fresh("olmo", vocab_size=64))
    assert signs.untrained == []
    assert "would show, but no smaller one" in signs.doubts[0]


def test_steps_on_record_are_believed():
    for family in ("olmo", "gpt2"):
        signs = signs_of_no_training(fresh(family), steps=1)
        assert signs.untrained == []
        assert "although 1 step of training is on record" in signs.doubts[0]
    assert signs_of_no_training(fresh("gpt2"), steps=0).untrained
