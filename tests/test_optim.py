import copy
import itertools
import json
import os

import pytest
import torch
import worlds
from conftest import ROOT, free_port
from safetensors.torch import load_file, save_file
from torch import nn

from lmscripts.errors import UserError
from lmscripts.training import optim
from lmscripts.training.checkpoint import load_optimizer_state, optimizer_state
from lmscripts.training.optim import OPTIMIZERS, Schedule, build_optimizer, hidden_matrices, parameter_groups


def rate(step, schedule, **settings):
    return Schedule(schedule, peak=1.0, warmup_steps=10, max_steps=110, **settings)(step)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_warmup_is_linear_and_the_first_step_moves(schedule):
    rates = [rate(step, schedule, decay_steps=20) for step in range(12)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)


def test_corners_of_the_schedules():
    assert rate(60, "linear") == pytest.approx(0.5)
    assert rate(60, "cosine") == pytest.approx(0.5)
    assert rate(109, "linear") == pytest.approx(0.01)
    assert rate(109, "constant") == 1.0
    stable = [rate(step, "wsd", decay_steps=20) for step in range(10, 91)]
    assert stable == pytest.approx([1.0] * 81)
    assert rate(100, "wsd", decay_steps=20) == pytest.approx(0.5)
    assert rate(60, "linear", final_ratio=0.1) == pytest.approx(0.55)


def test_a_decay_that_begins_within_the_warmup_is_refused():
    with pytest.raises(UserError, match="warmup 10 and decay 101 are more than the 110 steps of the run"):
        rate(0, "wsd", decay_steps=101)
    assert rate(9, "wsd", decay_steps=100) == pytest.approx(1.0)


def test_no_schedule_rises_after_the_warmup_or_goes_below_its_floor():
    for schedule in ("linear", "cosine", "wsd"):
        rates = [rate(step, schedule, decay_steps=30, final_ratio=0.1) for step in range(10, 110)]
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


def test_unknown_optimizer_is_named_with_the_choices():
    with pytest.raises(UserError, match="adamw, adam, radam, sgd, lamb, muon, got sgdx"):
        build_optimizer("sgdx", model(), **settings())


class Network(nn.Module):
    """A language model in small: a tied head, stacked layers, an untied head over labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.between = nn.Linear(8, 8)
        self.labels = nn.Linear(8, 3)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.words.weight

    def forward(self, ids):
        hidden = self.words(ids)
        for layer, norm in zip(self.layers, self.norms):
            hidden = norm(hidden + layer(hidden))
        hidden = self.between(hidden)
        return nn.functional.cross_entropy(self.head(hidden), (ids + 1) % 11) + self.labels(hidden).square().mean()


def train(network, optimizer, steps):
    losses = []
    for step in steps:
        ids = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        loss = network(ids)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_and_moves_every_parameter(name):
    network = Network()
    before = weights(network)
    losses = train(network, build_optimizer(name, network, **settings()), range(20))
    assert losses[-1] < 0.98 * losses[0]
    assert not any(torch.equal(before[key], after) for key, after in weights(network).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parameters_stay_bit_for_bit(name):
    network = Network()
    network.words.requires_grad_(False)
    network.layers[0].requires_grad_(False)
    before = weights(network)
    optimizer = build_optimizer(name, network, **settings())
    train(network, optimizer, range(3))
    for key, parameter in network.named_parameters():
        assert torch.equal(before[key], parameter) == (not parameter.requires_grad), key
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_gradient_only_matrices_shrink(name):
    network = Network()
    before = weights(network)
    optimizer = build_optimizer(name, network, **settings())
    steps = 8 if name in ("adamw", "radam", "muon") else 1  # radam takes up its second moment at the sixth
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(steps):
        optimizer.step()
    for key, after in weights(network).items():
        if after.ndim < 2:
            assert torch.equal(after, before[key]), key
        elif name == "adam":  # the decay is the whole gradient, and Adam makes a full step of any gradient
            assert torch.allclose(after, before[key] - 0.01 * before[key].sign(), atol=1e-3), key
        elif name == "lamb":  # the trust ratio makes any step as long as learning rate x weights
            assert torch.allclose(after, before[key] * 0.99, atol=1e-5), key
        else:
            assert torch.allclose(after, before[key] * (1 - 0.01 * 0.1) ** steps, atol=1e-6), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_assigned_learning_rate_reaches_every_parameter(name):
    network = Network()
    optimizer = build_optimizer(name, network, **settings())
    before = weights(network)
    network(torch.arange(11)).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert same(before, weights(network))


def resumed(name, network, file, groups, prepare=lambda optimizer: optimizer):
    """A copy of a network with a new optimizer that carries a saved state."""
    network = copy.deepcopy(network)
    optimizer = prepare(build_optimizer(name, network, **settings()))
    load_optimizer_state(optimizer, network, file, json.loads(json.dumps(groups)))
    return network, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_continued_with_saved_state_is_bit_for_bit_the_same(tmp_path, name):
    network = Network()
    optimizer = build_optimizer(name, network, **settings())
    train(network, optimizer, range(3))
    tensors, groups = optimizer_state(optimizer, network)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    other, continued = resumed(name, network, tmp_path / "optimizer.safetensors", groups)
    train(network, optimizer, range(3, 6))
    train(other, continued, range(3, 6))
    assert same(weights(network), weights(other))
    ends = [optimizer_state(o, n)[0] for o, n in ((optimizer, network), (continued, other))]
    assert same(*ends)
    # Whatever steps has a state, each hidden matrix the momentum of Muon and nothing else.
    assert {entry.rsplit("/", 1)[0] for entry in tensors} == set(weights(network))
    if name == "muon":
        hidden = set(hidden_matrices(network))
        for key, parameter in network.named_parameters():
            kept = {entry.rsplit("/", 1)[1] for entry in tensors if entry.rsplit("/", 1)[0] == key}
            assert kept == ({"momentum_buffer"} if parameter in hidden else {"step", "exp_avg", "exp_avg_sq"}), key


def test_muon_steps_are_orthogonal_and_the_rest_is_adamw():
    network = Network()
    other = copy.deepcopy(network)
    optimizers = [build_optimizer(name, n, **settings()) for name, n in (("muon", network), ("adamw", other))]
    hidden = set(hidden_matrices(network))
    for step in range(3):
        before = weights(network)
        torch.manual_seed(step)
        for mine, theirs in zip(network.parameters(), other.parameters()):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for (key, mine), theirs in zip(network.named_parameters(), other.parameters()):
            if mine not in hidden:
                assert torch.equal(mine, theirs), key
                continue
            moved = mine.detach() - before[key] * (1 - 0.01 * 0.1)
            sizes = torch.linalg.svdvals(moved) / (0.01 * 0.2 * max(mine.shape) ** 0.5)
            assert 0.5 < sizes.min() <= sizes.max() < 1.3, key
            assert 0.1 < moved.square().mean().sqrt() / 0.01 < 0.3  # an update of AdamW has about 0.2


IN_A_WORLD = """
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_optim import Network, settings, weights

from lmscripts.training.checkpoint import optimizer_state
from lmscripts.training.optim import build_optimizer

dist.init_process_group("gloo")
torch.set_num_threads(1)
network, number = Network(), int(sys.argv[1])
optimizer = build_optimizer("muon", network, **settings())
if sys.argv[2] == "rounds":  # as another kind of machine rounds
    from torch.optim import _muon
    exact = _muon._zeropower_via_newtonschulz
    _muon._zeropower_via_newtonschulz = lambda *given: exact(*given) * (1 + 0.01 * dist.get_rank())
for step in range(4):
    torch.manual_seed(step)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
tensors, _ = optimizer_state(optimizer, network)
save_file(weights(network) | {f"state {key}": value for key, value in tensors.items()}, f"after{dist.get_rank()}")
"""


@pytest.mark.parametrize("how", ["exact", "rounds"])
@pytest.mark.parametrize("counts", [(2, 1), (3, 1, 2)], ids=str)  # of four matrices: some have two, or none
def test_muon_is_divided_among_processes_and_all_have_the_same(counts, how, tmp_path):
    script = tmp_path / "in_a_world.py"
    script.write_text(IN_A_WORLD)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    for shape in ((1,), counts):
        folders = [tmp_path / str(shape) / f"node{node}" for node in range(len(shape))]
        codes, texts = worlds.run(shape, folders, script, "{}", how, port=free_port(), env={"PYTHONPATH": path})
        assert set(codes) == {0}, texts
    one = load_file(tmp_path / "(1,)" / "node0" / "after0")
    assert len({name for name in one if "momentum_buffer" in name}) == 4
    files = sorted((tmp_path / str(counts)).glob("node*/after*"))
    assert len(files) == sum(counts)
    first, *others = map(load_file, files)
    assert all(same(first, other) for other in others)
    assert same(first, one) == (how == "exact")


def test_hidden_matrices_are_those_of_the_stacked_layers():
    network = Network()
    names = {parameter: key for key, parameter in network.named_parameters()}
    assert [names[p] for p in hidden_matrices(network)] == [f"layers.{n}.{m}.weight" for n in (0, 1) for m in (0, 2)]
    network.layers.append(nn.Embedding(5, 8))
    network.layers.append(nn.Conv1d(8, 8, 3))
    assert len(hidden_matrices(network)) == 4


def electra_pair():
    from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

    sizes = dict(vocab_size=40, embedding_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    pair = nn.Module()
    pair.generator = ElectraForMaskedLM(ElectraConfig(**sizes, hidden_size=8))
    pair.discriminator = ElectraForPreTraining(ElectraConfig(**sizes, hidden_size=16))
    pair.generator.electra.embeddings = pair.discriminator.electra.embeddings
    pair.generator.generator_lm_head.weight = pair.discriminator.electra.embeddings.word_embeddings.weight
    return pair


def bert(**changes):
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForMaskedLM(BertConfig(**sizes, **changes))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8))


@pytest.mark.parametrize(
    ("make", "count"),
    [(bert, 12), (lambda: bert(tie_word_embeddings=False), 12), (gpt2, 8), (electra_pair, 24)],
    ids=["bert", "bert with its own head", "gpt2", "electra"],
)
def test_muon_takes_the_layers_of_transformers_models_and_no_parameter_twice(make, count):
    network = make()
    hidden = hidden_matrices(network)
    assert len(hidden) == count
    layer = (".layer.", ".h.")
    assert all(any(part in key for part in layer) for key, p in network.named_parameters() if p in set(hidden))
    optimizer = build_optimizer("muon", network, **settings())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(network.parameters())


def test_muon_without_hidden_matrices_or_in_an_old_torch_is_refused(monkeypatch):
    with pytest.raises(UserError, match="no matrix to train in the layers"):
        build_optimizer("muon", model(), **settings())
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"torch 2\.9 or newer"):
        build_optimizer("muon", Network(), **settings())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerate_prepares_every_optimizer(tmp_path, name):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain, network = Network(), Network()
    train(plain, build_optimizer(name, plain, **settings()), range(6))
    optimizer = accelerator.prepare(build_optimizer(name, network, **settings()))
    train(network, optimizer, range(3))
    tensors, groups = optimizer_state(optimizer, network)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    file = tmp_path / "optimizer.safetensors"
    network, optimizer = resumed(name, network, file, groups, accelerator.prepare)
    train(network, optimizer, range(3, 6))
    assert same(weights(plain), weights(network))


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_loss_scaler_unscales_every_gradient_and_skips_whole_steps(name):
    plain, network = Network(), Network()
    optimizers = [build_optimizer(name, n, **settings()) for n in (plain, network)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain(torch.arange(11)).backward()
    optimizers[0].step()
    scaler.scale(network(torch.arange(11))).backward()
    scaler.step(optimizers[1])
    scaler.update()
    for mine, theirs in zip(network.parameters(), plain.parameters()):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)
    before = weights(network)
    network.head.bias.grad[0] = torch.inf
    scaler.step(optimizers[1])
    assert same(before, weights(network))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_whose_gradient_is_found_to_be_infinite_changes_nothing_and_nobody_waits_for_it(name):
    plain, network = Network(), Network()
    optimizers = [build_optimizer(name, n, **settings()) for n in (plain, network)]
    for number, found in enumerate((1.0, 0.0, 1.0, 0.0)):
        for each in (plain, network):
            for parameter in each.parameters():
                torch.manual_seed(number)
                parameter.grad = torch.randn_like(parameter)
        if found:
            network.head.bias.grad[0] = torch.nan
            network.layers[0][0].weight.grad[:] = torch.inf
        else:
            optimizers[0].step()
        optimizers[1].found_inf = torch.tensor(found)
        optimizers[1].step()
        assert same(weights(plain), weights(network))
    (mine, _), (theirs, _) = (optimizer_state(o, n) for o, n in zip(optimizers, (plain, network)))
    assert same(mine, theirs)


def test_on_a_gpu_muon_and_adamw_are_told_later():
    norm = torch.ones((), device="meta")
    told = {name: optim._is_told_later(build_optimizer(name, Network(), **settings()), norm) for name in OPTIMIZERS}
    assert told == {**dict.fromkeys(OPTIMIZERS, False), "adamw": True, "adam": True, "muon": True}
