"""What a run does where there is a GPU, found out without one."""

import dataclasses
import os
from functools import partial
from types import SimpleNamespace

import fake_cuda
import numpy as np
import pytest
import test_policy_model
import torch
from test_objectives import LAYOUT, PLAN, InMemory, make_rows
from tiny import new_models, tiny_preset
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from lmscripts import objectives
from lmscripts.data.packing import PackedRows, Rows
from lmscripts.data.steps import Phase
from lmscripts.data.stream import StreamRows
from lmscripts.errors import UserError
from lmscripts.models import attention, building, families
from lmscripts.objectives import causal, choice, labels
from lmscripts.objectives.replaced import by_groups, sample
from lmscripts.training import log, processes

ROWS, SEGMENTS = 4, 3
CASES = [(family, objective) for family in families.names() for objective in families.family(family).heads]


def gpu(monkeypatch, capability=(9, 0), name="NVIDIA H200"):
    """Let torch say that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)


def accelerator_on(device, precision="bf16", said=None):
    said = [] if said is None else said
    return SimpleNamespace(
        device=torch.device(device),
        mixed_precision=precision,
        num_processes=1,
        print=lambda text, **_: said.append(text),
    )


# ---- forward passes ----


class Pairs(InMemory):
    def read_pairs(self, numbers):
        rows = self.read(numbers)
        more = {"token_types": np.zeros_like(rows.ids, np.int64), "pair_places": np.zeros((len(rows.ids), 3), np.int64)}
        more["pair_labels"], more["pair_weights"] = np.zeros((ROWS, 3), np.int64), np.ones((ROWS, 3), np.float32)
        return rows, more


def trained(family, objective, path, dropout=0.0):
    kind = objectives.objective(objective)
    models = new_models(family, objective, LAYOUT, path, dropout=dropout)
    building.dropout.install(models.values(), False)
    return objectives.trained(objective, families.family(family), models, path, kind.Settings()).train()


def batch_for(objective, path, segments=SEGMENTS):
    kind, rows, numbers = objectives.objective(objective), make_rows(ROWS, segments), np.arange(ROWS)
    if objective == "causal":
        rows = dataclasses.replace(rows, targets=rows.ids)
        source = SimpleNamespace(read=lambda _: rows, usual_segments=2.0, bytes_per_target=1.0)
    else:
        source = Pairs(rows)
    plan = dataclasses.replace(PLAN, draws=objective == "replaced")
    ((batch, counts),) = kind.batches(source, numbers, 0 * numbers, 1, [ROWS], plan, path == "varlen")
    return batch | {"row_keys": torch.zeros(ROWS, 2, dtype=torch.int32)}, counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "objective"), CASES)
def test_a_forward_pass_on_a_gpu_stays_there_and_in_half_precision(family, objective, dtype):
    module = trained(family, objective, "varlen", dropout=0.1 if (family, dtype) == ("bert", torch.bfloat16) else 0.0)
    batch, _ = batch_for(objective, "varlen")
    sums, recorder = fake_cuda.forward(module, batch, dtype)
    assert sums.keys() >= module.weights.keys()
    assert {(each.dtype, each.device.type, each.shape) for each in sums.values()} == {(torch.float32, "cuda", ())}
    assert recorder.elsewhere == []
    # But for angles of rotary embeddings, which some versions of transformers make as outer products in float32.
    products = [[each for each in call if torch.is_tensor(each)] for call in recorder.of("mm")]
    assert {each.dtype for call in products if call[0].shape[-1] > 1 for each in call} == {dtype}
    calls = recorder.of("_varlen_attn")
    layers = sum(len(building.fitting.stacked_layers(model)) for model in module.models.values())
    bodies = {id(model.base_model) for model in module.models.values()}
    assert len(calls) == layers * len(bodies) // len(module.models)
    for query, key, value, ends, same_ends, longest, *_ in calls:
        assert query.dtype == key.dtype == value.dtype == dtype
        assert query.shape == key.shape == value.shape
        assert len(query) == ROWS * LAYOUT.sequence_length
        assert ends is same_ends
        assert (ends.dtype, tuple(ends.shape), longest) == (torch.int32, (16 + 1,), LAYOUT.sequence_length)


@pytest.mark.parametrize(("family", "objective"), [("modernbert", "masked"), ("electra", "replaced")])
def test_a_forward_pass_with_masks_stays_on_the_gpu_too(family, objective):
    sums, recorder = fake_cuda.forward(trained(family, objective, "sdpa"), batch_for(objective, "sdpa")[0], torch.half)
    assert recorder.elsewhere == []
    assert {each.device.type for each in sums.values()} == {"cuda"}


@pytest.mark.parametrize("kind", ["choice", "labels"])
def test_policies_and_classifiers_stay_there_too(kind):
    if kind == "choice":
        module = choice.trained(test_policy_model.build(), choice.Settings())
        batch = test_policy_model.batch_of(test_policy_model.records(ROWS))
    else:
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
        model = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))
        module, ids = labels.trained(model, labels.Settings(multi_label=False)), torch.ones(ROWS, 8, dtype=torch.int64)
        batch = {
            "input_ids": ids,
            "attention_mask": ids,
            "truth": torch.eye(3)[[0, 1, 2, 0]],
            "weights": torch.ones(ROWS),
        }
    sums, recorder = fake_cuda.forward(module.train(), batch, torch.bfloat16)
    assert recorder.elsewhere == []
    assert {(each.dtype, each.device.type, each.shape) for each in sums.values()} == {(torch.float32, "cuda", ())}


# ---- segments (D1) ----


def test_as_many_sequences_are_asked_for_as_there_are_in_the_mean():
    """One for every position was: a launch that no GPU can make."""
    part = SimpleNamespace(num_documents=300, tokens=np.zeros(90_000))
    source = StreamRows(part, dataclasses.replace(LAYOUT, sequence_length=1024), 1)
    assert source.usual_segments == pytest.approx(1 + 300 / 89)
    firsts = np.array([0, 1, 2, 102])  # of rows of which one is odd
    assert PackedRows(part, LAYOUT, {}, firsts, np.zeros(102), np.zeros(102)).usual_segments == 35
    rows = make_rows(ROWS, segments=1)
    odd = dataclasses.replace(rows, segments=np.where(np.arange(ROWS)[:, None] == 1, np.arange(64), 0).astype(np.int32))
    for laid_out, number in ((rows, 16), (odd, 128)):  # 67 of them: as many as are there, in this batch alone
        with_targets = dataclasses.replace(laid_out, targets=laid_out.ids)
        stream = SimpleNamespace(read=lambda _, found=with_targets: found, usual_segments=2.0, bytes_per_target=1.0)
        ((batch, _),) = causal.batches(stream, np.arange(ROWS), np.arange(ROWS), 1, [ROWS], None, True)
        assert len(batch["segment_ends"]) == number + 1


# ---- what the GPU can (D2, D7) ----


def choose(wanted="auto", precision="bf16", preset=None):
    preset = preset or tiny_preset("electra")
    return building.choose_attention(
        preset, "replaced", wanted, device="cuda", precision=precision, attention_dropout=0.0
    )


def test_varlen_is_for_gpus_and_heads_that_its_kernel_knows(monkeypatch):
    gpu(monkeypatch)
    assert choose() == ("varlen", [])
    assert choose(precision="no") == ("sdpa", [])
    odd = dataclasses.replace(tiny_preset("electra"), hidden_size=120, heads=10)
    path, (said,) = choose(preset=odd)
    assert path == "sdpa"
    assert "a multiple of 8, at most 256, and not of 12" in said
    with pytest.raises(UserError, match="not of 12: give --attention sdpa, or auto"):
        choose("varlen", preset=odd)
    assert choose("sdpa", preset=odd) == ("sdpa", [])
    gpu(monkeypatch, (7, 0))
    path, (said,) = choose(precision="fp16")
    assert path == "sdpa"
    assert "needs a GPU of compute capability 8.0 (Ampere), and this one has 7.0" in said
    assert attention.choose_attention("auto", "cuda", "fp16", 0.0, lacking=said) == "sdpa"


OTHERWISE = [({"precision": "no"}, "no"), ({"fp16_type": 0}, None), ({"preset_fp16_type": 1}, "fp16")]


@pytest.mark.parametrize(
    ("given", "config", "otherwise"),
    [({}, None, None), ({}, "no", "no")] + [(given, None, otherwise) for given, otherwise in OTHERWISE],
)
def test_bf16_is_the_default_of_gpus_that_have_it(monkeypatch, given, config, otherwise):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if config:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", config)
    values = {"fp16_type": None, "preset_fp16_type": 0, "preset_bf16": False} | given
    assert processes.choose_precision(**values) == otherwise
    gpu(monkeypatch)
    assert processes.choose_precision(**values) == (otherwise if given or config else "bf16")
    monkeypatch.setattr(processes.joining, "world", lambda: SimpleNamespace(exchange=lambda _, here: [here, False]))
    assert processes.choose_precision(**values) == otherwise  # the GPU of another machine has none
    monkeypatch.setattr(processes.joining, "world", lambda: None)
    gpu(monkeypatch, (7, 5))
    assert processes.choose_precision(**values) == otherwise


@pytest.mark.parametrize("capability", [(8, 0), (7, 0)])
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_not_in_bf16_is_in_tf32(monkeypatch, capability, exact):
    gpu(monkeypatch, capability)
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: accelerator_on("cuda"))
    for name in ("connect", "_check_world"):
        monkeypatch.setattr(processes, name, lambda _: None)
    before = torch.get_float32_matmul_precision()
    try:
        words = processes.in_words(processes.start_processes(exact=exact))
        fast = capability[0] >= 8 and not exact
        assert torch.get_float32_matmul_precision() == ("high" if fast else "highest")
        assert ("TF32 (NVIDIA_TF32_OVERRIDE=0 forbids it)" in words) == fast
        assert ("--precision bf16" in processes.in_words(accelerator_on("cuda", "no"))) == fast
    finally:
        torch.set_float32_matmul_precision(before)


# ---- statistics (D5, D8) ----


def test_a_statistic_ends_no_run(monkeypatch):
    class Refusal(Exception):
        """As NVML's are: of no other class."""

    def refuse(*_):
        raise Refusal("Insufficient Permissions")

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2**31)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert log.gpu_statistics(torch.device("cuda")) == {"gpu_memory_gib": 2.0}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", refuse)
    assert log.gpu_statistics(torch.device("cuda")) == {}


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12)]
)
def test_utilisation_is_of_the_peak_of_this_very_gpu(monkeypatch, name, peak):
    found, said = read_twice(monkeypatch, name, peak)
    assert found == [pytest.approx(1.0, rel=0.01)] * 2
    assert said == []


def test_an_unknown_gpu_has_no_utilisation_and_is_named_once(monkeypatch):
    found, said = read_twice(monkeypatch, "NVIDIA H100X", 1e12)
    assert found == [None] * 2
    assert said == ["no utilisation (mfu) in the log: the peak of a NVIDIA H100X is not known here"]


def read_twice(monkeypatch, name, operations):
    """Utilisation of two windows of a second with so many operations, and what was printed."""
    gpu(monkeypatch, name=name)
    said, clock = [], [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(log, "gpu_statistics", lambda _: {})
    monkeypatch.setattr(
        log, "Pace", lambda *_: SimpleNamespace(waiting=None, settle=lambda wait: None, is_shared=False)
    )
    meter, found = log.Meter(torch.device("cuda")), []
    for _ in range(2):
        meter.add_step({}, operations)
        clock[0] += 1.0
        found.append(meter.read(accelerator_on("cuda", said=said), lambda *_: {}).get("mfu"))
    return found, said


# ---- --deterministic (D6) ----


def test_samples_are_the_same_in_the_way_that_gpus_take(monkeypatch):
    torch.manual_seed(0)
    for scale, entries in ((1, 512), (6, 1000), (20, 700)):
        logits, draws = scale * torch.randn(3000, entries), torch.rand(3000)
        probabilities = logits.softmax(-1)
        taken = by_groups(probabilities, draws)
        assert (taken != sample(logits, draws)).float().mean() < 1e-3  # where rounding moves a border across the draw
        assert (probabilities.gather(1, taken[:, None]) > 0).all()
    edges = torch.zeros(2, 600).index_fill_(1, torch.arange(20, 580), 1 / 560)
    assert by_groups(edges, torch.tensor([0.0, 1 - 2**-24])).tolist() == [20, 579]


def test_deterministic_operations_are_enough_for_electra_on_a_gpu(monkeypatch):
    batch, _ = batch_for("replaced", "varlen")
    _, recorder = fake_cuda.forward(trained("electra", "replaced", "varlen"), batch, torch.bfloat16)
    assert recorder.of("cumsum") == recorder.of("cumprod") == []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
    processes.only_deterministic(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    processes.only_deterministic(True)
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


# ---- other devices (D9) ----


def test_nobody_trains_silently_beside_an_unused_device(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    assert "this machine's MPS is not used" in processes.in_words(accelerator_on("cpu", "no"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as was asked for
    assert "not used" not in processes.in_words(accelerator_on("cpu", "no"))


def test_a_tpu_is_told_and_any_other_device_refused(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert "not used" not in processes.in_words(accelerator_on("cpu", "no"))
    monkeypatch.setattr(processes, "find_spec", {"torch_xla": True}.get)
    assert "this machine's TPU is not used" in processes.in_words(accelerator_on("cpu", "no"))
    with pytest.raises(UserError, match="gives the device xpu, and models are trained on CUDA or on the CPU"):
        processes._check_world(SimpleNamespace(num_processes=1, device=torch.device("xpu")))


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_evaluations_refuse_them_too_before_they_read(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"distributed_type {name} is not supported"), processes.join():
        pytest.fail("went on")


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_ways_to_divide_a_model_are_refused_by_name(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"distributed_type {name} is not supported"):
        processes.start_processes()


# ---- compiling ----


@torch._dynamo.config.patch(suppress_errors=False)
def test_models_are_compiled_by_themselves_on_a_gpu_alone(monkeypatch):
    gpu(monkeypatch)
    monkeypatch.setattr(processes, "find_spec", lambda _: True)
    here, there = accelerator_on("cuda"), accelerator_on("cpu")
    assert processes.choose_compile(None, there) == (False, [])
    assert processes.choose_compile(True, there, deterministic=True) == (True, [])
    assert processes.choose_compile(False, here) == (False, [])
    assert not torch._dynamo.config.suppress_errors
    compiled, (said,) = processes.choose_compile(None, here, deterministic=False)
    assert compiled
    assert torch._dynamo.config.suppress_errors
    assert "--compile false" in said
    monkeypatch.setattr(processes.shutil, "which", lambda _: None)
    compiled, (said,) = processes.choose_compile(None, here, deterministic=True, shard=False)
    assert not compiled
    assert said == "the model is not compiled: --deterministic, no C compiler; --compile does it all the same"


class Mixed:
    """24 rows, of which six hold several segments."""

    layout, usual_segments, num_rows, bytes_per_target = LAYOUT, 2.0, 24, 1.0

    def read(self, numbers):
        each = [make_rows(1, 2 + number % 3 if number % 4 == 0 else 1, seed=number) for number in numbers.tolist()]
        names = [field.name for field in dataclasses.fields(Rows) if field.name != "targets"]
        joined = {name: np.concatenate([getattr(rows, name) for rows in each]) for name in names}
        return Rows(**joined, targets=joined["ids"])


@pytest.mark.parametrize(
    ("family", "objective", "path"),
    [("bert", "masked", "sdpa"), ("electra", "replaced", "varlen"), ("gpt2", "causal", "sdpa")],
)
def test_nothing_is_compiled_again_after_the_first_step_of_a_phase(family, objective, path):
    """Batches without "segments", which need no mask, are for models that are not compiled."""
    kind = objectives.objective(objective)
    plan = dataclasses.replace(PLAN, draws=objective == "replaced")
    make = partial(kind.batches, plan=plan, with_ends=path == "varlen")
    phase = Phase(Mixed(), None, make, 9, "", 5, 4, 24, [1], 4, 0)
    steps = [batch for (batch,), _ in phase.step_batches(0, 6, 0)]
    assert {"segments" in batch for batch in steps} == {False, True}
    module, counter = trained(family, objective, path), CompileCounter()
    for model in module.models.values():
        del building.fitting.stacked_layers(model)[:-1]
    torch._dynamo.reset()
    module.compile(backend=counter, dynamic=False)
    phase, graphs = dataclasses.replace(phase, same_keys=True), []
    for (batch,), _ in phase.step_batches(0, 6, 0):
        module(batch)
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert 0 < graphs[0] == graphs[-1]


# ---- vocabularies ----


class Words(dict):
    """A tokenizer of so many entries."""

    def __init__(self, number):
        super().__init__({f"w{each}": each for each in range(number)})
        self.get_vocab = lambda: self


def built(family, objective, number, **more):
    settings = {"seed": 0, "path": "sdpa", "dropouts": building.Dropouts(0.0, 0.0)}
    return building.build(tiny_preset(family), objective, Words(number), LAYOUT, **settings, **more)[0]


def test_new_models_have_room_for_a_multiple_of_64_ids_and_write_none_of_the_rest(tmp_path):
    model = built("gpt2", "causal", 257)[""]
    assert model.config.vocab_size == 320
    with torch.no_grad():  # what is left to itself would be what it writes
        model.transformer.wte.weight[:257] = 0
        model.transformer.wte.weight[257:].normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 2]])
    assert loaded(ids).logits[0, -1].argmax() >= 257
    written = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=True, eos_token_id=-1
    )
    assert written.max() < 257
    assert built("bert", "masked", 320)[""].config.vocab_size == 320
    assert {each.config.vocab_size for each in built("electra", "replaced", 257).values()} == {320}


@pytest.mark.parametrize("which", ["like", "origin"])
def test_what_goes_on_from_an_older_checkpoint_has_its_size(tmp_path, which):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 257}', encoding="utf-8")
    assert built("bert", "masked", 257, **{which: tmp_path})[""].config.vocab_size == 257
    assert built("bert", "masked", 257, **{which: tmp_path / "nothing"})[""].config.vocab_size == 320
