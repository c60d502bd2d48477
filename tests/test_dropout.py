"""Dropout by rows: what is dropped depends on the seed, the row, the place and the module, and on nothing else."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from lmscripts.models import building
from lmscripts.models.attention import attend_at
from lmscripts.models.dropout import Draws, RowDropout, attend, install, probe

SMALL = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}


def draws(rows, length=None, places=None):
    found = Draws()
    generator = torch.Generator().manual_seed(1)
    found.keys = torch.randint(-(2**31), 2**31 - 1, (rows, 2), dtype=torch.int32, generator=generator)
    found.length, found.places = length, places
    return found


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_that_is_dropped_and_the_scale(p):
    kept = RowDropout(p, 3, draws(64))(torch.ones(64, 128, 255))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-4)
    assert float((kept == 0).float().mean()) == pytest.approx(p, abs=1e-3)  # three deviations of chance at 0.5
    assert float(kept.mean()) == pytest.approx(1, abs=2e-3)
    for part in ((kept == 0).float().mean((0, 1)), (kept == 0).float().mean((1, 2)), (kept == 0).float().mean((0, 2))):
        assert float((part - p).abs().max()) < 0.03  # no place, row or channel is another's


def test_modules_rows_and_neighbours_are_independent():
    by, ones = draws(32), torch.ones(32, 128, 256)
    first, second = (RowDropout(0.5, number, by)(ones) == 0 for number in (1, 2))
    alike = [(first == second), (first[1:] == first[:-1]), (first[:, 1:] == first[:, :-1])]
    alike += [(first[..., 1:] == first[..., :-1]), first[..., ::2] == second[..., 1::2]]
    for each in alike:
        assert float(each.float().mean()) == pytest.approx(0.5, abs=0.004)


def test_any_two_channels_drop_independently():
    """The largest of 2,016 correlations of 64 channels over 131,072 places is what chance makes it, also in between."""
    dropped = (RowDropout(0.3, 2, draws(1024))(torch.ones(1024, 128, 64)) == 0).float().flatten(0, 1)
    correlations = torch.corrcoef(dropped.T).fill_diagonal_(0)
    assert float(correlations.abs().max()) * len(dropped) ** 0.5 < 5
    assert float(correlations.square().sum() / (64 * 63)) * len(dropped) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("width", [8, 7])
def test_compiled_the_same_is_dropped(width):
    module, states = RowDropout(0.3, 5, draws(4, 6)), torch.randn(4, 6, width)
    assert torch.equal(torch.compile(module, backend="eager")(states), module(states))


@pytest.mark.slow
def test_compiled_it_is_one_kernel():
    """As on a GPU, where every kernel reads and writes the states once more."""
    from torch._inductor import metrics

    torch._dynamo.reset()
    metrics.reset()
    module, states = RowDropout(0.1, 3, draws(8, 64)), torch.randn(8, 64, 128)
    assert torch.equal(torch.compile(module)(states), module(states))
    assert metrics.generated_kernel_count == 1


def test_a_row_alone_drops_what_it_drops_among_others_also_where_some_states_are_computed():
    by, states = draws(6, 12), torch.randn(6, 12, 8)
    whole = RowDropout(0.3, 5, by)(states)
    for row in range(6):
        alone = draws(6, 12)
        alone.keys = by.keys[row : row + 1]
        assert torch.equal(RowDropout(0.3, 5, alone)(states[row : row + 1, :9])[0], whole[row, :9])  # and shorter
    places = torch.tensor([1, 5, 12, 13, 30, 71])
    some = draws(6, 12, places)
    assert torch.equal(RowDropout(0.3, 5, some)(states.flatten(0, 1)[places]), whole.flatten(0, 1)[places])


def test_attention_at_some_positions_drops_the_same_weights():
    query, key, value = torch.randn(3, 4, 2, 10, 8)  # of 4 rows
    module = nn.Module()
    module.of_weights = RowDropout(0.0, 7, draws(4, 10))
    mask = torch.zeros(4, 1, 10, 10).masked_fill_(torch.rand(4, 1, 10, 10) < 0.3, -1e9)
    whole, _ = attend(module, query, key, value, mask, dropout=0.4)
    slots = torch.arange(4)[:, None] * 10 + torch.tensor([0, 3, 7])
    module.of_weights.draws.places = slots.flatten()
    some = attend_at(slots.flatten(), query[:, :, [0, 3, 7]], key, value, mask, module.of_weights, 0.4)
    assert torch.allclose(some.view(4, 3, 2, 8), whole[:, [0, 3, 7]], atol=1e-6)
    same, _ = attend(module, query, key, value, mask)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask)
    assert torch.allclose(same.transpose(1, 2), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert"])
def test_every_dropout_of_a_model_is_drawn_by_rows(kind):
    dropouts = {
        "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
        "modernbert": {"mlp_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1},
    }[kind]
    if kind == "bert":
        model = BertForMaskedLM(BertConfig(**SMALL, **dropouts))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=2, n_head=2, n_embd=16, **dropouts))
    else:
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
        model = ModernBertForMaskedLM(ModernBertConfig(**SMALL, **ids, **dropouts))
    model.train()
    ids = torch.randint(2, 50, (6, 14), generator=torch.Generator().manual_seed(2))
    install([model], of_weights=True)
    assert not any(type(module) is nn.Dropout for module in model.modules())
    assert probe(model, 6, lambda: model(input_ids=ids).logits) == (True, True)
    model.draws.keys, whole = draws(6).keys, None
    whole = model(input_ids=ids).logits
    for row in range(6):
        model.draws.keys = draws(6).keys[row : row + 1]
        assert torch.allclose(model(input_ids=ids[row : row + 1]).logits[0], whole[row], atol=1e-5)
    model.eval()
    kept = model(input_ids=ids).logits
    model.set_attn_implementation("eager")
    assert torch.allclose(kept, model(input_ids=ids).logits, atol=1e-5)


def test_a_model_whose_states_are_not_laid_out_by_rows_is_left_to_torch():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self._supports_attention_backend = False

        def forward(self, states):
            return self.dropout(states.transpose(0, 1)).transpose(0, 1)

    model = Turned()
    install([model], of_weights=False)
    assert probe(model, 2, lambda: model(torch.ones(2, 9, 4))) == (True, False)
    assert (model(torch.ones(2, 9, 400)) == 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_who_says_how_much_is_dropped(tmp_path):
    read = {name: building.read_preset(None, name)[0] for name in ("bert-tiny", "gpt2-small", "bert-base")}
    assert [preset.hidden_dropout for preset in read.values()] == [0.0, 0.0, 0.1]
    BertConfig(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2).save_pretrained(tmp_path)
    choose = building.choose_dropouts
    assert choose(read["bert-tiny"], None, None, None)[:2] == (0.0, 0.0)
    assert choose(read["bert-base"], None, None, None)[:2] == (0.1, 0.0)
    assert choose(read["bert-base"], None, 0.25, 0.05)[:2] == (0.25, 0.05)
    # A run that goes on keeps what it had, whatever the preset says today.
    assert choose(read["bert-tiny"], tmp_path, None, None)[:2] == (0.3, 0.2)
    assert choose(read["bert-tiny"], tmp_path, None, None).words.count("as it was") == 2
    assert choose(read["bert-tiny"], tmp_path, 0.0, None)[:2] == (0.0, 0.2)
