"""Which process computes which rows of which step, what a checkpoint has to agree with, and what the card shows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SAMPLE, run_script
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lmscripts.data.packing import Layout
from lmscripts.data.steps import ByLength, Phase, Phases, Prefetcher, Shuffled, rows_before, step_batches
from lmscripts.data.stream import StreamRows
from lmscripts.data.token_store import Part
from lmscripts.errors import UserError
from lmscripts.objectives.causal import continuations, document_beginnings
from lmscripts.tokenizer.folder import check_tokenizer
from lmscripts.training.checkpoint import check_architecture, load_weights
from lmscripts.training.plan import PhaseSettings


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "character", "sentencepiece_bpe"])
def test_type_of_a_fast_tokenizer_is_seen(kind, tmp_path):
    arguments = ["--input_file", SAMPLE / "english.txt", "--model_dir", tmp_path / "tokenizer", "--vocab_size", "600"]
    run_script("train_tokenizer.py", *arguments, "--word_tokenizer", "whitespace", "--tokenizer_type", kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    check_tokenizer(tokenizer, tokenizer_type=kind, mecab_dic=None)
    if kind in ("unigram", "sentencepiece_bpe"):  # an older name of both
        check_tokenizer(tokenizer, tokenizer_type="sentencepiece")
    else:
        with pytest.raises(UserError, match=f"sentencepiece.*{kind}"):
            check_tokenizer(tokenizer, tokenizer_type="sentencepiece")
    with pytest.raises(UserError, match=f"bpe.*{kind}"):
        check_tokenizer(tokenizer, tokenizer_type="bpe", mecab_dic=None)
    with pytest.raises(UserError, match="ipadic"):
        check_tokenizer(tokenizer, tokenizer_type=kind, mecab_dic="ipadic")


def test_type_of_a_japanese_tokenizer_is_seen(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    check_tokenizer(tokenizer, tokenizer_type="wordpiece", mecab_dic="ipadic")
    with pytest.raises(UserError, match=r"unigram.*wordpiece"):
        check_tokenizer(tokenizer, tokenizer_type="unigram", mecab_dic=None)


# ---- what a checkpoint has to agree with -------------------------------------------------------------------------

SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 40, "pad_token_id": 0}
GPT2 = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 40}
HEADS = SIZES | {"num_attention_heads": 2, "max_position_embeddings": 40}
MODELS = {
    "bert": (BertForMaskedLM, BertConfig, HEADS),
    "roberta": (RobertaForMaskedLM, RobertaConfig, HEADS),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "llama": (LlamaForCausalLM, LlamaConfig, HEADS),
    "mixtral": (MixtralForCausalLM, MixtralConfig, HEADS | {"num_key_value_heads": 2, "num_local_experts": 3}),
    "discriminator": (ElectraForPreTraining, ElectraConfig, HEADS | {"embedding_size": 8}),
    "generator": (ElectraForMaskedLM, ElectraConfig, HEADS | {"embedding_size": 8}),
}


def build(kind, **changes):
    architecture, config, sizes = MODELS[kind]
    return architecture(config(**sizes | changes))


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("bert", {"num_attention_heads": 4}, "num_attention_heads is 2 there, 4 here"),
        ("bert", {"hidden_act": "relu"}, "hidden_act is gelu there, relu here"),
        ("roberta", {"layer_norm_eps": 0.1}, "layer_norm_eps is 1e-12 there, 0.1 here"),
        ("gpt2", {"n_head": 4, "n_embd": 8}, "n_embd is 16 there, 8 here; n_head is 2 there, 4 here"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is gelu_new there, relu here"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is False there, True here",
        ),
        ("llama", {"rms_norm_eps": 0.1}, "rms_norm_eps is 1e-06 there, 0.1 here"),
        ("llama", {"num_attention_heads": 4, "head_dim": 8}, "num_attention_heads is 2 there, 4 here"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters is"),
        ("discriminator", {"num_attention_heads": 4}, "(config.json: num_attention_heads is 2 there, 4 here)"),
        ("generator", {"num_attention_heads": 4}, "(generator/config.json: num_attention_heads is 2 there, 4 here)"),
    ],
)
def test_a_checkpoint_of_a_model_that_computes_something_else(tmp_path, kind, changes, sentence):
    """Its weights have the same shapes, so that loading them would say nothing."""
    parts = {"": "discriminator", "generator": "generator"} if kind.endswith("tor") else {"": kind}
    for subfolder, part in parts.items():
        build(part).save_pretrained(tmp_path / subfolder)
    models = {subfolder: build(part, **changes if part == kind else {}) for subfolder, part in parts.items()}
    before = [parameter.clone() for model in models.values() for parameter in model.parameters()]
    with pytest.raises(UserError) as refused:
        load_weights(models, tmp_path)
    assert sentence in str(refused.value)
    now = [parameter for model in models.values() for parameter in model.parameters()]
    assert all(map(torch.equal, before, now))


def test_a_checkpoint_of_another_family(tmp_path):
    build("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model_type is bert there, roberta here"):
        load_weights({"": build("roberta")}, tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_what_may_differ_from_a_checkpoint(tmp_path, kind):
    """Dropouts belong to the options, the type and the path of attention to the file and the machine."""
    model = build(kind)
    model.half().save_pretrained(tmp_path)
    dropouts = {
        "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
        "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
        "llama": {"attention_dropout": 0.3},
    }
    other = build(kind, **dropouts.get(kind, dropouts["bert"]), use_cache=False, initializer_range=0.5)
    other.set_attn_implementation("eager")
    load_weights({"": other}, tmp_path)
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_experts_are_loaded_under_the_names_that_the_model_has(tmp_path):
    """transformers holds the experts of a layer as one tensor and saves each by itself."""
    model, other = build("mixtral"), build("mixtral")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() != model.state_dict().keys()
    load_weights({"": other}, tmp_path)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if "experts" in name)]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights({"": build("mixtral")}, tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_ends_of_documents_come_from_the_tokenizer(tmp_path, kind):
    """A run may have been begun with the ids that its pretrained model named; what they are, the rows say."""
    build(kind, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path)
    load_weights({"": build(kind, bos_token_id=2, eos_token_id=3, pad_token_id=0)}, tmp_path)


def test_longer_rows_than_those_of_another_run(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    longer = {"": build("gpt2", n_positions=64, bos_token_id=3)}
    check_architecture(longer, tmp_path, another_run=True)
    with pytest.raises(UserError, match="n_positions is 32 there, 64 here"):
        check_architecture(longer, tmp_path, another_run=False)


# ---- steps -------------------------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(0).integers(1, 400, 523)
ORDERS = {
    "shuffled": (Shuffled(num_rows=7, batch_size=5, total_rows=23, seed=4), 5),  # the last step has three rows
    "rising": (Shuffled(num_rows=7, batch_size=5, total_rows=17, seed=4, ramp=(2, 3)), 5),  # 2, 3, 4, 5 and 3 rows
    "by length": (ByLength(LENGTHS[:23], batch_size=5, seed=4), 10),  # one step of each of two epochs has three
}


def made(rows, epochs, sizes):
    """Batches that say which rows they hold."""
    ends = np.cumsum(sizes)[:-1]
    parts = zip(np.split(rows, ends), np.split(epochs, ends), strict=True)
    found = [{"rows": torch.from_numpy(row), "epochs": torch.from_numpy(epoch)} for row, epoch in parts]
    weights = [{"weights": torch.ones(size), "row_weights": torch.ones(size)} for size in sizes]
    return [(one | two, {"rows": float(len(one["rows"]))}) for one, two in zip(found, weights, strict=True)]


def rows_by_step(order, num_steps):
    return [order.rows(np.arange(*order.bounds(step)))[0] for step in range(num_steps)]


def rows_of_steps(order, num_steps, shares, micro_batch_size, at_once, first=0):
    """(row, epoch) of all rows of every step that weigh anything, in the order of the processes."""
    steps = [[] for _ in range(num_steps - first)]
    settings = {"micro_batch_size": micro_batch_size, "first": first, "stop": num_steps, "at_once": at_once}
    for process in range(len(shares)):
        given = list(step_batches(order, made, shares=shares, process=process, **settings))
        assert len(given) == len(steps)
        for step, (batches, counts) in zip(steps, given, strict=True):
            assert batches  # also of a process without rows, which takes part in what is exchanged
            assert max(len(batch["rows"]) for batch in batches) <= micro_batch_size
            weighing = [batch for batch in batches if batch["weights"].any()]
            assert all(batch["weights"].all() and batch["row_weights"].all() for batch in weighing)
            assert sum(bool(batch["row_weights"].any()) for batch in batches) == len(weighing)
            mine = [pair for b in weighing for pair in zip(b["rows"].tolist(), b["epochs"].tolist(), strict=True)]
            assert counts == {"rows": len(mine)}
            step += mine
    return steps


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shares", [[1, 1], [3, 1], [1, 0, 2], [1] * 7])
def test_a_step_has_the_same_rows_for_any_processes_and_micro_batches(name, shares):
    order, num_steps = ORDERS[name]
    expected = rows_of_steps(order, num_steps, [1], 100, 1)
    assert 3 in map(len, expected)
    for micro_batch_size in (1, 2, 3, 100):
        for at_once in (1, 4, 100):
            assert rows_of_steps(order, num_steps, shares, micro_batch_size, at_once) == expected
    assert rows_of_steps(order, num_steps, shares, 2, 3, first=3) == expected[3:]  # after a stop


@pytest.mark.parametrize("shares", [[3, 1], [1, 0, 2], [1] * 7])
def test_aligned_processes_compute_equally_many_micro_batches(shares):
    """A sharded model waits for all processes in every forward pass; rows that are not there weigh nothing."""
    order, num_steps = ORDERS["shuffled"]
    settings = {"micro_batch_size": 1, "first": 0, "stop": num_steps, "aligned": True}
    given = [list(step_batches(order, made, shares=shares, process=each, **settings)) for each in range(len(shares))]
    for step, expected in enumerate(rows_by_step(order, num_steps)):
        batches = [batch for process in given for batch in process[step][0]]
        assert len({len(process[step][0]) for process in given}) == 1
        assert [row for b in batches if b["weights"].any() for row in b["rows"].tolist()] == expected.tolist()


def test_micro_batches_are_few_and_even():
    def sizes(rows, micro_batch_size):
        settings = {"shares": [1], "process": 0, "micro_batch_size": micro_batch_size, "first": 0, "stop": 1}
        ((batches, _),) = step_batches(Shuffled(rows, rows, rows, seed=0), made, **settings)
        return [len(batch["rows"]) for batch in batches]

    assert sizes(100, 32) == [25, 25, 25, 25]
    assert sizes(32, 32) == [32]
    assert sizes(33, 32) in ([16, 17], [17, 16])
    for rows in range(1, 200):
        cut = sizes(rows, 7)
        assert sum(cut) == rows
        assert len(cut) == -(-rows // 7)
        assert max(cut) <= 7
        assert max(cut) - min(cut) <= 1


@pytest.mark.parametrize(
    ("order", "num_rows", "per_epoch"),
    [
        (Shuffled(num_rows=35, batch_size=5, total_rows=105, seed=1), 35, 7),
        (ByLength(LENGTHS, batch_size=4, seed=1), 523, 131),
        (ByLength(LENGTHS[:3], batch_size=4, seed=1), 3, 1),
    ],
)
def test_every_epoch_has_every_row_once(order, num_rows, per_epoch):
    steps = rows_of_steps(order, 3 * per_epoch, [1], 100, 1)
    epochs = [[row for step in steps[n * per_epoch : (n + 1) * per_epoch] for row, _ in step] for n in range(3)]
    assert all(sorted(rows) == list(range(num_rows)) for rows in epochs)
    assert epochs[0] != epochs[1] or num_rows == 3
    assert [epoch for step in steps for _, epoch in step] == [n for n in range(3) for _ in range(num_rows)]


def test_rows_of_about_the_same_length_share_a_step():
    """Hardly any padding is computed, and no epoch goes from short rows to long ones."""

    def padded(order, num_steps):
        return sum(len(step) * max(LENGTHS[r] for r, _ in step) for step in rows_of_steps(order, num_steps, [1], 8, 1))

    order = ByLength(LENGTHS, batch_size=8, seed=1)
    shuffled = Shuffled(num_rows=523, batch_size=8, total_rows=523, seed=1)
    assert padded(order, order.per_epoch) < 1.05 * LENGTHS.sum() < 1.5 * LENGTHS.sum() < padded(shuffled, 66)
    means = [LENGTHS[rows].mean() for rows in rows_by_step(order, order.per_epoch)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def test_items_come_ahead_in_their_order_and_an_error_where_it_is_due():
    taken = []

    def items():
        for number in range(10):
            taken.append(number)
            yield number
        raise OSError("the disk is gone")

    ahead = Prefetcher(items())
    assert [next(ahead) for _ in range(4)] == [0, 1, 2, 3]
    ahead.close()
    assert taken[-1] <= 6  # three items ahead, no more
    ahead = Prefetcher(items())
    assert [next(ahead) for _ in range(10)] == list(range(10))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    assert list(Prefetcher(iter("ab"))) == ["a", "b"]


def test_rows_of_a_step_rise_in_a_straight_line():
    for batch_size, first, length in [(16, 4, 300), (512, 1, 7), (8, 8, 5), (1000, 3, 1)]:
        before = np.array([rows_before(step, batch_size, (first, length)) for step in range(length + 50)])
        sizes = np.diff(before)
        straight = first + (batch_size - first) * np.minimum(np.arange(len(sizes)) / length, 1)
        assert np.abs(sizes - straight).max() < 1
        assert np.abs(before[1:] - np.cumsum(straight)).max() < 1
        assert (sizes[length:] == batch_size).all()
        assert sizes[0] == first
        for total in (1, first + 1, int(before[length // 2]) + 1, int(before[length]), int(before[-1]) + 1):
            order = Shuffled(50, batch_size, total, seed=0, ramp=(first, length))
            assert order.bounds(order.num_steps - 1)[0] < total == order.bounds(order.num_steps - 1)[1]
    assert rows_before(10**12, 8, (1, 10**9)) == 8 * 10**12 - 7 * 10**9 + 7 * (10**9 - 1) // 2  # no table
    order = Shuffled(20, 6, 60, seed=1, ramp=(1, 4))
    rows = np.concatenate(rows_by_step(order, order.num_steps)).reshape(3, 20)
    assert (np.sort(rows) == np.arange(20)).all()


def test_a_phase_has_the_rows_of_its_ramp():
    asked = {
        "store": None,
        "sequence_length": 8,
        "batch_size": 5,
        "micro_batch_size": 1,
        "epochs": None,
        "objective": 0,
    }
    assert PhaseSettings(steps=5, **asked).total_rows(7) == 25
    assert PhaseSettings(steps=5, ramp=(2, 3), **asked).total_rows(7) == 2 + 3 + 4 + 5 + 5
    with pytest.raises(UserError, match=r"9 rows.*--batch_size 5"):
        PhaseSettings(steps=5, ramp=(9, 3), **asked)


# ---- epochs ------------------------------------------------------------------------------------------------------


def test_the_end_of_every_epoch_in_every_phase():
    """7 rows by 3, 15 rows in all: ends behind 7 and 14 rows; then 4 rows by 5: every step ends an epoch."""
    rest = {"held_out": None, "make": None, "slots": 0, "words": "", "seed": 0, "shares": [1], "micro_batch_size": 1}
    rest["most_eval_rows"] = 0
    rows = [SimpleNamespace(num_rows=n, layout=SimpleNamespace(sequence_length=2 * n)) for n in (7, 4)]
    first, second = (
        Phase(rows[0], batch_size=3, total_rows=15, **rest),
        Phase(rows[1], batch_size=5, total_rows=10, **rest),
    )
    data = Phases([first, second])
    assert [data.positions(step) for step in (4, 5, 6)] == [42, 40, 40]
    assert [step for step in range(8) if data.is_due(step, "epoch")] == [0, 3, 5, 6, 7]
    assert [step for step in range(8) if data.is_due(step, 3)] == [0, 3, 6]


# ---- continuations -----------------------------------------------------------------------------------------------


def stream(lengths, first):
    """Documents of the given lengths, whose tokens count up from `first`."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    part = Part(None, np.arange(first, first + ends[-1], dtype=np.uint16), None, None, ends, None, np.array(lengths))
    return StreamRows(part, Layout(8, "isolated", begin_id=1, end_id=2, pad_id=0), 100)


def beginnings(held_out, train):
    data = SimpleNamespace(held_out=held_out and stream(held_out, 100), train=stream(train, 500))
    return [ids.tolist() for ids in document_beginnings(data)]


def test_examples_begin_where_documents_do():
    """One long held-out document, as a text without blank lines is, has one beginning: the others are of the text."""
    held_out, short = [1, *range(100, 111)], [1, 500, 501]
    assert beginnings([90], [4, 90, 30]) == [held_out, short, [1, *range(504, 515)]]
    assert beginnings([90, 2, 90, 90], [4]) == [held_out, [1, 190], [1, *range(192, 203)]]
    assert beginnings(None, [4]) == [short, short, short]


def test_a_prompt_that_comes_again_goes_on_in_another_way(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    model = build("gpt2", vocab_size=len(tokenizer), n_positions=64, bos_token_id=2, eos_token_id=3).eval()
    prompts = [np.array([2, 900, 901])] * 3
    state = torch.get_rng_state()
    lines = continuations(model, tokenizer, prompts)
    assert len(set(lines)) == 3
    assert lines == continuations(model, tokenizer, prompts)
    assert torch.equal(state, torch.get_rng_state())
