import itertools

import pytest
import torch
from torch import nn

from lmscripts.errors import UserError
from lmscripts.optim import build_optimizer, lr_at, parameter_groups

BASE = {"peak": 1.0, "warmup_steps": 10, "max_steps": 110}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_warmup_is_linear_and_the_first_step_moves(schedule):
    rates = [lr_at(step, schedule=schedule, decay_steps=20, **BASE) for step in range(12)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)


def test_corners_of_the_schedules():
    assert lr_at(60, schedule="linear", **BASE) == pytest.approx(0.5)
    assert lr_at(60, schedule="cosine", **BASE) == pytest.approx(0.5)
    assert lr_at(109, schedule="linear", **BASE) == pytest.approx(0.01)
    assert lr_at(109, schedule="constant", **BASE) == 1.0
    stable = [lr_at(step, schedule="wsd", decay_steps=20, **BASE) for step in range(10, 91)]
    assert stable == pytest.approx([1.0] * 81)
    assert lr_at(100, schedule="wsd", decay_steps=20, **BASE) == pytest.approx(0.5)
    assert lr_at(60, schedule="linear", final_ratio=0.1, **BASE) == pytest.approx(0.55)


def test_no_schedule_rises_after_the_warmup_or_goes_below_its_floor():
    for schedule in ("linear", "cosine", "wsd"):
        rates = [lr_at(step, schedule=schedule, decay_steps=30, final_ratio=0.1, **BASE) for step in range(10, 110)]
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rates))
        assert min(rates) >= 0.1


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def test_only_matrices_decay():
    network = model()
    decayed, plain = parameter_groups(network, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))


def settings(**changes):
    return {"learning_rate": 0.01, "betas": (0.9, 0.999), "epsilon": 1e-6, "weight_decay": 0.1} | changes


def test_lamb_is_the_algorithm_of_the_paper():
    """arXiv:1904.00962, algorithm 2 (version without bias correction), written out for one step."""
    network = model()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = build_optimizer("lamb", network, **settings())
    network(torch.tensor([[1, 2, 3]])).square().sum().backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    optimizer.step()
    for weight, gradient, after in zip(before, gradients, network.parameters()):
        first, second = 0.1 * gradient, 0.001 * gradient**2
        decay = 0.1 if weight.ndim >= 2 else 0.0
        update = first / (second.sqrt() + 1e-6) + decay * weight
        ratio = weight.norm().clamp(max=10) / (update.norm() + 1e-6) if weight.norm() > 0 else 1.0
        if update.norm() == 0:
            ratio = 1.0
        assert torch.allclose(after, weight - 0.01 * ratio * update, atol=1e-6)


def test_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="sgdx"):
        build_optimizer("sgdx", model(), **settings())
