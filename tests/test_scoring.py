"""Scores of documents: windows, masks of every token, and sums that do not depend on the number of processes."""

import math
import threading
import tracemalloc
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lmscripts import objectives
from lmscripts.data import windows
from lmscripts.data.packing import Layout, open_rows
from lmscripts.data.steps import Phase
from lmscripts.data.token_store import Part
from lmscripts.errors import UserError
from lmscripts.evaluation import scoring
from lmscripts.evaluation.sums import evaluate, raw_text_bytes, sum_over_batches
from lmscripts.models import families
from lmscripts.models.families import gpt2
from lmscripts.objectives import masked
from lmscripts.text.records import TableOptions

PAD, BEGIN, END, MASK, VOCABULARY = 0, 2, 3, 4, 200
LENGTHS = [5, 1, 0, 30, 8, 200, 63, 64, 15, 16, 17, 2]
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"vocab_size": VOCABULARY, "pad_token_id": PAD}


def make_part(lengths=LENGTHS, seed=0, folder=None):
    """A part of a store in memory: documents of random tokens, every one a word."""
    tokens = np.random.default_rng(seed).integers(10, VOCABULARY, sum(lengths)).astype(np.uint16)
    bits = np.full(-(-tokens.size // 8), 255, np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    sentences = np.zeros(0, np.uint32)
    return Part(folder, tokens, bits, sentences, offsets, offsets, np.full(len(lengths), 7, np.int64))


def documents_of(part):
    return [part.tokens[a:b].tolist() for a, b in zip(part.document_tokens[:-1], part.document_tokens[1:], strict=True)]


def perturbed(model, seed=1):
    """A model with weights far from their initial values, so that every part of it matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_gpt2(positions=64):
    return perturbed(
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=positions, vocab_size=VOCABULARY))
    )


def make_llama():
    return perturbed(LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **SIZES)))


def make_granite():
    return perturbed(GraniteForCausalLM(GraniteConfig(max_position_embeddings=64, logits_scaling=4.0, **SIZES)))


def score(model, part, **settings):
    settings = {"block_size": 64, "stride": 64, "batch_size": 2} | settings
    return scoring.score_causal(Accelerator(cpu=True), model, part, (BEGIN, END), **settings)


@torch.no_grad()
def brute_force(model, part, block_size, stride):
    """Sum of losses with one plain forward pass for each window, straight from the definition."""
    nats, targets = 0.0, 0
    for document in documents_of(part):
        inputs, wanted = [BEGIN, *document], [*document, END]
        done = 0
        for begin in range(0, len(inputs), stride):
            window = inputs[begin : begin + block_size]
            logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0]
            for at in range(done, begin + len(window)):
                nats -= logits[at - begin].log_softmax(-1)[wanted[at]].item()
                targets += 1
            done = begin + len(window)
            if done == len(inputs):
                break
    return nats, targets


# ---- windows ----


@pytest.mark.parametrize(("block_size", "stride"), [(64, 64), (64, 16), (64, 1), (10, 3), (1, 1), (7, 7)])
def test_every_target_is_scored_once_with_the_context_that_the_stride_gives(block_size, stride):
    part = make_part()
    made = windows.slide(part, block_size, stride)
    scored = {}
    for document, start, length, scored_from, _ in zip(*made.between(0, len(made)), strict=True):
        assert 0 < length <= block_size
        for at in range(scored_from, length):
            assert (document, start + at) not in scored
            scored[document, start + at] = at
    assert set(scored) == {(d, p) for d, n in enumerate(LENGTHS) for p in range(n + 1)}
    assert all(context == place or context >= block_size - stride for (_, place), context in scored.items())


@pytest.mark.parametrize("make", [make_gpt2, make_llama, make_granite])
@pytest.mark.parametrize("stride", [16, 32, 64])
def test_loss_equals_a_plain_forward_pass_for_each_window(make, stride):
    model, part = make(), make_part()
    nats, targets = brute_force(model, part, 64, stride)
    found = score(model, part, stride=stride)
    assert found["targets"] == targets == sum(LENGTHS) + len(LENGTHS)
    assert abs(found["nats"] - nats) / targets < 1e-5


def test_unknown_tokens_are_counted_among_those_that_are_scored():
    model, part = make_gpt2(), make_part()
    token = int(np.bincount(part.tokens).argmax())
    plain, found = score(model, part, stride=16), score(model, part, stride=16, unknown_id=token)
    assert found.pop("unknown") == np.count_nonzero(part.tokens == token) > plain.pop("unknown") == 0
    assert found == plain


def test_what_the_unknown_token_is():
    assert scoring.unknown_id(make_tokenizer()) == 1
    end = {"eos_token": "<e>", "unk_token": "<e>"}
    words = {"<e>": 0, "a": 1}
    of_bytes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, [])), **end)
    assert scoring.unknown_id(of_bytes) == -1  # as GPT-2's own
    of_words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<e>")), **end)
    assert scoring.unknown_id(of_words) == 0
    assert scoring.unknown_id(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, [])))) == -1


def test_more_context_changes_the_loss():
    """Otherwise the tests of strides would prove nothing."""
    model, part = make_gpt2(), make_part()
    assert abs(score(model, part, stride=8)["nats"] - score(model, part)["nats"]) > 1e-2


def test_logits_scaled_after_the_head_are_noticed():
    assert scoring.has_separate_head(make_gpt2())
    assert scoring.has_separate_head(make_llama())
    assert not scoring.has_separate_head(make_granite())


def test_a_longer_neighbour_changes_no_bit():
    model = make_gpt2()
    found = []
    for neighbour in (17, 31):
        part = make_part([20, neighbour])
        part.tokens[:20] = np.arange(20) + 50
        made = windows.slide(part, 64, 64)
        assert made.between(0, 2)[-1].tolist() == [32, 32]
        inputs, _, _ = windows.window_rows(part, made, 0, 2, BEGIN, END)
        ids = torch.from_numpy(inputs)
        hidden = gpt2.encode(model, ids, torch.arange(32).expand_as(ids), {"attention_mask": None})
        found.append(gpt2.predict(model, hidden)[0, :21])
    assert torch.equal(*found)


def test_the_padded_length_of_a_row_depends_on_nothing_but_the_row():
    for lengths in ([20], [20, 300], [1, 20, 63]):
        made = windows.slide(make_part(lengths), 64, 32)
        document, start, _, _, padded = made.between(0, len(made))
        batches = made.batches(128, 100)
        assert [n for pair in batches for n in range(*pair)] == list(range(len(made)))
        for first, last in batches:
            assert set(padded[first:last]) == {padded[first]}
        mine = padded[(document == lengths.index(20)) & (start == 0)]
        assert mine.tolist() == [32]


@pytest.mark.parametrize(("block_size", "stride"), [(64, 64), (64, 16), (64, 1), (10, 3), (1, 1), (37, 20)])
@pytest.mark.parametrize("lengths", [[], [0], LENGTHS, [64, 0, 63, 65, 500, 1, 1, 80]])
def test_windows_made_on_demand_are_those_that_are_listed_and_sorted(lengths, block_size, stride):
    """The order and the batches decide the last bits of every figure."""
    rows = []
    for document, positions in enumerate(length + 1 for length in lengths):
        for start in range(0, max(1, positions - block_size + stride), stride):
            length = min(block_size, positions - start)
            padded = min(block_size, -(-length // 16) * 16)
            rows.append((document, start, length, block_size - stride if start else 0, padded))
    rows.sort(key=lambda row: -row[-1])
    made = windows.slide(make_part(lengths), block_size, stride)
    assert len(made) == len(rows)
    for first, last in ((0, len(rows)), (3, 5), (len(rows) // 2, len(rows))):
        found = made.between(first, min(last, len(rows)))
        assert [tuple(map(int, row)) for row in zip(*found, strict=True)] == rows[first:last]
    expected, begin = [], 0
    while begin < len(rows):
        most, end = max(1, min(128 // rows[begin][-1], 5)), begin
        while end < min(len(rows), begin + most) and rows[end][-1] == rows[begin][-1]:
            end += 1
        expected.append((begin, end))
        begin = end
    batches = made.batches(128, 5)
    assert len(batches) == len(expected)
    assert list(batches) == expected


def test_windows_of_every_token_need_no_memory():
    part = make_part([3_000_000, 5])
    tracemalloc.start()
    made = windows.slide(part, 512, 1)
    batches = made.batches(512, 8)
    assert batches[len(batches) - 2][1] == len(made) - 1 == 3_000_001 - 512 + 1
    inputs, scored, targets = windows.window_rows(part, made, *batches[len(batches) - 2], BEGIN, END)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert scored.tolist() == [511]
    assert targets.tolist() == [END]
    assert inputs[0].tolist() == part.tokens[3_000_000 - 512 : 3_000_000].tolist()


@pytest.mark.parametrize("make", [make_gpt2, make_granite])
def test_few_logits_at_once(make, monkeypatch):
    model, part = make(), make_part()
    expected = score(model, part)
    sizes = []
    plain = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda x, *rest, **more: sizes.append(x.numel()) or plain(x, *rest, **more),
    )
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 64 * VOCABULARY)
    found = score(model, part, batch_size=8)
    assert max(sizes) <= 64 * VOCABULARY
    assert abs(found["nats"] - expected["nats"]) < 1e-3
    assert found["correct"] == expected["correct"]


def test_a_stride_longer_than_the_block_is_refused():
    with pytest.raises(UserError, match="between 1 and --block_size 64, got 65"):
        windows.slide(make_part(), 64, 65)


def test_bits_per_byte_are_those_of_the_raw_text():
    found = scoring.per_target({"nats": 80 * math.log(2), "targets": 20.0, "correct": 5.0}, raw=40, text=20)
    assert found["raw"] == pytest.approx(2.0)
    assert found["text"] == pytest.approx(4.0)
    assert found["perplexity"] == pytest.approx(16.0)
    assert found["accuracy"] == 0.25


# ---- masks ----


def make_masked(family):
    if family == "bert":
        return perturbed(BertForMaskedLM(BertConfig(max_position_embeddings=64, **SIZES)))
    return perturbed(RobertaForMaskedLM(RobertaConfig(max_position_embeddings=65, **SIZES)))


def make_objective(model, family="bert", probability=0.15):
    settings = masked.Settings(mask_unit="token", mask_probability=(probability,))
    return objectives.trained("masked", families.family(family), {"": model}, "sdpa", settings)


def make_phase(rows, objective, tokenizer, batch_size):
    """What a run has of these rows, which are held out as well."""
    plan = masked.plan(tokenizer, rows.layout, objective.settings)
    sizes = {"batch_size": batch_size, "shares": [batch_size], "micro_batch_size": batch_size}
    sizes |= {"total_rows": rows.num_rows, "most_eval_rows": rows.num_rows}
    return Phase(rows, rows, partial(masked.batches, plan=plan), plan.slots, "", seed=0, **sizes)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pseudo_perplexity_equals_one_forward_pass_for_each_token(family):
    model, part = make_masked(family), make_part([5, 1, 0, 30, 5, 20])
    nats = 0.0
    with torch.no_grad():
        for document in documents_of(part):
            for begin in range(0, len(document), 14):
                row = [BEGIN, *document[begin : begin + 14], END]
                for at in range(1, len(row) - 1):
                    ids = torch.tensor([row])
                    ids[0, at] = MASK
                    nats -= model(input_ids=ids).logits[0, at].log_softmax(-1)[row[at]].item()
    objective = make_objective(model, family).eval()
    special = {"cls": BEGIN, "sep": END, "mask": MASK}
    settings = {"block_size": 16, "batch_size": 3}
    accelerator = Accelerator(cpu=True)
    found = scoring.score_pseudo(accelerator, objective.family, objective.model, part, special, **settings)
    assert found["targets"] == 61
    assert abs(found["nats"] - nats) / 61 < 1e-5
    metrics = scoring.per_target(found)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / 61), rel=1e-4)
    assert not any("byte" in name for name in metrics)  # it is no likelihood
    settings["most_documents"] = 2
    first = scoring.score_pseudo(accelerator, objective.family, objective.model, part, special, **settings)
    assert first["targets"] == 6
    token = int(part.tokens[2])
    known = scoring.score_pseudo(
        accelerator, objective.family, objective.model, part, special, **settings, unknown_id=token
    )
    assert known["unknown"] == part.tokens[:6].tolist().count(token) > first["unknown"] == 0


def make_tokenizer():
    words = {f"w{n}": n for n in range(VOCABULARY)}
    special = {"pad_token": "w0", "cls_token": "w2", "sep_token": "w3", "mask_token": "w4", "unk_token": "w1"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), **special)


def make_rows(tmp_path, lengths=LENGTHS):
    part = make_part(lengths, folder=tmp_path / "train")
    layout = Layout(64, "isolated", BEGIN, END, PAD)
    return open_rows(SimpleNamespace(part=lambda name: part, fingerprint="", folder=tmp_path), "train", layout)


def test_masked_loss_equals_plain_models_on_the_same_masks(tmp_path):
    tokenizer = make_tokenizer()
    rows = make_rows(tmp_path)
    model = make_masked("bert")
    objective = make_objective(model, probability=0.3)
    data = make_phase(rows, objective, tokenizer, 1)
    nats = targets = right = 0
    with torch.no_grad():
        for number in range(rows.num_rows):
            batch, _ = data.eval_batch(np.array([number]))
            labels = torch.full((64,), -100)
            used = batch["weights"] > 0
            labels[batch["slots"][used]] = batch["labels"][used]
            segments = rows.read(np.array([number])).segments[0]
            for segment in range(segments.max() + 1):  # each document alone, by the model as transformers has it
                inside = torch.from_numpy(segments == segment)
                found = model(input_ids=batch["input_ids"][:, inside].long()).logits[0]
                wanted = labels[inside]
                nats += torch.nn.functional.cross_entropy(found, wanted, ignore_index=-100, reduction="sum").item()
                right += (found.argmax(-1) == wanted).sum().item()
                targets += (wanted >= 0).sum().item()
    metrics, counts = scoring.score_masks(Accelerator(cpu=True), objective, rows, tokenizer, batch_size=3)
    assert counts["mlm"] == targets
    assert abs(metrics["loss"] - nats / targets) < 1e-5
    assert metrics["accuracy"] == right / targets
    assert counts["unknown"] == 0
    at_slots = [
        batch["labels"][batch["weights"] > 0] for batch, _ in map(data.eval_batch, np.arange(rows.num_rows)[:, None])
    ]
    token = torch.cat(at_slots).mode().values.item()
    _, counts = scoring.score_masks(Accelerator(cpu=True), objective, rows, tokenizer, batch_size=3, unknown_id=token)
    assert counts["unknown"] == (torch.cat(at_slots) == token).sum() > 0


def test_a_text_without_a_masked_token_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    rows = make_rows(tmp_path, [1])
    objective = make_objective(make_masked("bert"), probability=0.01)
    with pytest.raises(UserError, match=r"of the 1 tokens of the text none is masked at --mask_probability 0\.01"):
        scoring.score_masks(Accelerator(cpu=True), objective, rows, tokenizer, batch_size=3)


# ---- any number of processes ----


class World:
    """Processes as threads, which meet in every all-reduce."""

    def __init__(self, size):
        self.barrier, self.given, self.size = threading.Barrier(size), [None] * size, size

    def member(self, rank):
        def reduce(tensor, how):
            self.given[rank] = tensor
            self.barrier.wait(30)
            total = torch.zeros_like(tensor)
            for other in np.random.default_rng(self.size).permutation(self.size):  # nobody promises an order
                total = total + self.given[other]
            self.barrier.wait(30)
            return total

        return SimpleNamespace(
            num_processes=self.size,
            process_index=rank,
            device=torch.device("cpu"),
            reduce=reduce,
            autocast=lambda: torch.autocast("cpu", enabled=False),
        )

    def run(self, work):
        results = [None] * self.size

        def of(rank):
            results[rank] = work(self.member(rank))

        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results


@pytest.mark.parametrize("num_batches", [0, 1, 2, 5, 6, 11])
def test_sums_have_the_same_bits_for_any_number_of_processes(num_batches):
    values = [1e16, 1.0, -1e16, 0.1, 3e-9, 1e16, 2.5, -0.0, 7e7, 1 / 3, -1e16]

    def work(accelerator):
        return sum_over_batches(accelerator, num_batches, lambda n: {"a": values[n], "b": torch.tensor(values[n] / 7)})

    alone = World(1).run(work)[0]
    plain = 0.0
    for value in values[:num_batches]:
        plain += value
    assert alone == ({"a": plain, "b": alone["b"]} if num_batches else {})
    for size in (2, 3, 5):
        assert World(size).run(work) == [alone] * size


def test_each_process_measures_only_its_own_batches():
    measured = {}

    def work(accelerator):
        numbers = measured.setdefault(accelerator.process_index, [])
        return sum_over_batches(accelerator, 8, lambda n: numbers.append(n) or {"n": float(n)})

    assert World(3).run(work) == [{"n": 28.0}] * 3
    assert measured == {0: [0, 3, 6], 1: [1, 4, 7], 2: [2, 5, 0]}  # the last one does not count


def test_one_process_that_is_asked_to_stop_stops_all_after_the_same_pass():
    passes = [0, 0, 0]

    def work(accelerator):
        rank = accelerator.process_index

        def measure(number):
            passes[rank] += 1
            return {"n": 1.0}

        return sum_over_batches(accelerator, 30, measure, lambda: rank == 1 and passes[rank] == 4)

    assert World(3).run(work) == [None] * 3
    assert passes == [4, 4, 4]


def test_held_out_figures_have_the_same_bits_for_any_number_of_processes(tmp_path):
    tokenizer = make_tokenizer()
    rows = make_rows(tmp_path, [50] * 23)
    objective = make_objective(make_masked("bert")).train()
    data = make_phase(rows, objective, tokenizer, 4)

    def work(accelerator):
        return evaluate(accelerator, objective, data.eval_batch, rows.num_rows, 4)[0]

    alone = World(1).run(work)[0]
    assert alone["loss"] > 1
    assert objective.training
    for size in (2, 3, 4):
        objective.train()
        # One model in several threads, all of which only read it.
        assert [found["loss"] for found in World(size).run(work)] == [alone["loss"]] * size


# ---- bytes ----


def test_raw_bytes_are_those_of_the_file_or_of_the_text_fields(tmp_path):
    import bz2
    import gzip
    import json

    raw = "\ufeff 一行目 \r\n\r\n\r\ntwo\x00 \r\n".encode() + b"\xff\n"
    files = {name: tmp_path / name for name in ("a.txt", "a.txt.gz", "a.txt.bz2", "b.jsonl", "c.csv")}
    files["a.txt"].write_bytes(raw)
    files["a.txt.gz"].write_bytes(gzip.compress(raw))
    files["a.txt.bz2"].write_bytes(bz2.compress(raw))
    files["b.jsonl"].write_text(json.dumps({"text": " 二 \n三", "id": 1}) + "\n", encoding="utf-8")
    files["c.csv"].write_text("id,text\n1, 二 \n2,x\n", encoding="utf-8")
    assert [raw_text_bytes(path, TableOptions(label="")) for path in files.values()] == [len(raw)] * 3 + [9, 6]


def test_a_stream_from_the_hub_is_refused():
    from pathlib import Path

    with pytest.raises(UserError, match="hub:some/text is a stream from the Hub"):
        raw_text_bytes(Path("hub:some/text"), TableOptions(label=""))
