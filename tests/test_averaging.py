import copy
from types import MethodType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from lmscripts.errors import UserError
from lmscripts.models.families import bert
from lmscripts.training.optim import average_state, load_average, start_average, update_average

SIZES = dict(vocab_size=40, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


class Bert(nn.Module):
    """Like an objective: it holds a Python module, and one of its layers has another forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = BertForMaskedLM(BertConfig(**SIZES, hidden_size=16))
        self.family = bert
        layer = self.model.bert.encoder.layer[-1]
        layer.forward = MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), layer)

    def forward(self, ids):
        return self.model(input_ids=ids, labels=ids).loss


class Electra(nn.Module):
    """Two models on one embeddings module, and the head of one tied to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=16, hidden_size=8))
        self.discriminator = ElectraForPreTraining(ElectraConfig(**SIZES, embedding_size=16, hidden_size=16))
        embeddings = self.discriminator.electra.embeddings
        self.generator.electra.embeddings = embeddings
        self.generator.generator_lm_head.weight = embeddings.word_embeddings.weight

    def forward(self, ids):
        found = self.discriminator(input_ids=ids, labels=ids % 2).loss
        return self.generator(input_ids=ids, labels=ids).loss + found


class Counted(nn.Module):
    """A module with a buffer that training changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, ids):
        return self.second(self.first(ids[:, :4].float())).square().mean() + self.first.weight.sum()


KINDS = [Bert, Electra, Counted]
IDS = torch.arange(24).reshape(3, 8)


def steps(objective, average, numbers):
    """Large optimizer steps of different sizes; the weights after each."""
    seen = []
    for number in numbers:
        torch.manual_seed(number)  # dropout
        objective.train()(IDS + number).backward()
        torch.optim.SGD(objective.parameters(), lr=0.1 / (1 + number)).step()
        objective.zero_grad()
        update_average(average, objective)
        seen.append({name: p.detach().clone() for name, p in objective.named_parameters()})
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_it_is_the_weighted_mean_of_the_steps_written_out(kind, decay):
    objective = kind()
    average = start_average(objective, decay)
    seen = steps(objective, average, range(7))
    shares = [decay**age for age in reversed(range(7))]
    for name, parameter in average.module.named_parameters():
        expected = sum(share * each[name].double() for share, each in zip(shares, seen)) / sum(shares)
        assert torch.allclose(parameter.double(), expected, rtol=0, atol=1e-6), name
    for mine, theirs in zip(average.module.buffers(), objective.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_long_runs_average_with_the_plain_decay():
    objective = nn.Linear(1, 1, bias=False).double()
    average = start_average(objective, 0.9)
    expected = 0.0
    for step in range(400):
        nn.init.constant_(objective.weight, step % 7)
        expected = 0.9 * expected + 0.1 * (step % 7)
        update_average(average, objective)
    assert average.module.weight.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_is_a_copy(kind):
    objective = kind()
    average = start_average(objective, 0.999)
    (seen,) = steps(objective, average, [0])
    assert all(torch.equal(parameter, seen[name]) for name, parameter in average.module.named_parameters())


def test_shared_parameters_stay_shared():
    objective = Electra()
    average = start_average(objective, 0.9)
    steps(objective, average, range(3))
    copied = average.module
    assert copied.generator.electra.embeddings is copied.discriminator.electra.embeddings
    assert copied.generator.generator_lm_head.weight is copied.discriminator.electra.embeddings.word_embeddings.weight
    assert len(list(copied.parameters())) == len(list(objective.parameters()))
    mine = {p.data_ptr() for p in copied.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in objective.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_computes_with_its_own_weights_and_is_not_trained(kind):
    objective = kind()
    average = start_average(objective, 0.5)
    steps(objective, average, range(2))
    copied = average.module
    assert not copied.training
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in objective.parameters())
    before = copied(IDS)
    assert before != objective.eval()(IDS)
    for parameter in objective.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(copied(IDS), before)


def test_a_prepared_and_compiled_objective_is_copied_with_its_precision():
    """Mixed precision replaces `forward` by a bound method: the copy's must be bound to the copy."""
    from accelerate import Accelerator

    objective = Bert()
    objective.compile(backend="eager")
    Accelerator(cpu=True, mixed_precision="bf16").prepare(objective)
    average = start_average(objective, 0.5)
    copied = average.module
    before = copied(IDS)
    assert torch.equal(before, objective.eval()(IDS))
    assert not torch.equal(before, type(copied).forward(copied, IDS))
    for parameter in objective.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(copied(IDS), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_average_goes_on_bit_for_bit(tmp_path, kind):
    objective = kind()
    average = start_average(objective, 0.97)
    steps(objective, average, range(3))
    save_file(average_state(average), tmp_path / "average.safetensors")
    other = kind()
    other.load_state_dict(objective.state_dict())
    continued = start_average(other, 0.97)
    load_average(continued, load_file(tmp_path / "average.safetensors"))
    steps(objective, average, range(3, 6))
    steps(other, continued, range(3, 6))
    ends = [average_state(each) for each in (average, continued)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_copy_is_saved_as_a_transformers_model(tmp_path):
    objective = Bert()
    average = start_average(objective, 0.5)
    steps(objective, average, range(3))
    average.module.model.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(loaded(input_ids=IDS).logits, average.module.model(input_ids=IDS).logits)


def test_another_models_average_is_refused_and_nothing_is_changed():
    average = start_average(Bert(), 0.9)
    before = copy.deepcopy(average_state(average))
    wider = average_state(start_average(Electra(), 0.9))
    with pytest.raises(UserError, match=r"of another model.*discriminator"):
        load_average(average, wider)
    name = "model.bert.embeddings.word_embeddings.weight"
    with pytest.raises(UserError, match=f"misses {name}"):
        load_average(average, {key: tensor for key, tensor in before.items() if key != name})
    ones = {key: torch.ones_like(tensor) for key, tensor in before.items()}
    with pytest.raises(UserError, match=r"word_embeddings.weight has the shape \(3, 16\) instead of \(40, 16\)"):
        load_average(average, ones | {name: torch.ones(3, 16)})
    assert all(torch.equal(tensor, before[key]) for key, tensor in average_state(average).items())


def test_no_decay_is_no_average_and_an_impossible_one_is_refused():
    assert start_average(Bert(), None) is None
    for decay in (-0.1, 0.0, 1.0, 2.0, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            start_average(Bert(), decay)


def test_weights_in_half_precision_are_refused():
    with pytest.raises(UserError, match=r"bfloat16, too coarse"):
        start_average(Bert().bfloat16(), 0.999)
