"""What models say: samples of decoders, masks that encoders fill, alone, on the command line, and while they learn."""

import io
import json
import runpy
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_PRESET, launch, run_script
from runs import log_of, same_bits, weights
from tiny import new_models
from transformers import pipeline

from lmscripts import objectives
from lmscripts.data.packing import Layout
from lmscripts.models import families
from lmscripts.objectives.causal import boundary_ids
from lmscripts.objectives.sampling import Sampling, go_on, text_after
from lmscripts.tokenizer.encoder import load_encoder
from lmscripts.training.log import Reporter, draw_curves, read_log

FAMILIES = [("bert", "masked"), ("roberta", "masked"), ("modernbert", "masked"), ("electra", "replaced")]


def trained(family, objective, tokenizer_dir, path="sdpa", dropout=0.0):
    """An objective with tiny new models, whose weights are large enough to have an opinion, and a tokenizer."""
    encoder = load_encoder(tokenizer_dir)
    ids = (encoder.cls_id, encoder.sep_id, encoder.pad_id)
    vocabulary = -(-encoder.vocab_size // 64) * 64
    layout = Layout(64, "isolated", *ids)
    models = new_models(family, objective, layout, path, dropout=dropout, vocabulary=vocabulary)
    with torch.no_grad():
        for model in models.values():
            model.get_input_embeddings().weight.mul_(2)
    settings = objectives.objective(objective).Settings()
    return objectives.trained(objective, families.family(family), models, path, settings), encoder


@pytest.fixture(scope="module")
def decoder(tokenizer_dir):
    return trained("gpt2", "causal", tokenizer_dir)


# ---- decoders ----------------------------------------------------------------------------------------------------


def test_a_text_does_not_depend_on_what_is_sampled_beside_it(decoder):
    objective, encoder = decoder
    model, end = objective.models[""].eval(), boundary_ids(encoder.tokenizer)[1]
    prompt, state, how = [2, 900, 901], torch.get_rng_state(), Sampling(max_new_tokens=12, top_p=0.95)
    together, heard = go_on(model, prompt, range(4), how, end, 64), []
    alone = [go_on(model, prompt, [number], how, end, 64)[0] for number in range(3)]
    assert go_on(model, prompt, [3], how, end, 64, heard.append) == [together[3]]
    assert together[:3] == alone
    assert heard[: len(together[3])] == together[3]
    assert len({tuple(text) for text in together}) == 4
    others = [go_on(model, *asked, end, 64) for asked in (([2, 900], [0], how), (prompt, [0], Sampling(12, seed=1)))]
    assert all(other != [together[0]] for other in others)
    assert torch.equal(state, torch.get_rng_state())
    assert all(len(text) <= 10 for text in go_on(model, prompt, range(4), how, end, 13))


def test_samples_have_the_distribution_of_the_model(decoder):
    objective, encoder = decoder
    model, prompt, end = objective.models[""].eval(), [2, 900, 901], encoder.vocab_size + 1
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    taken = go_on(model, prompt, range(3000), Sampling(1, temperature=0.5, top_k=4), end)
    counts = torch.bincount(torch.tensor(taken).flatten(), minlength=len(logits)) / 3000
    best = logits.topk(4)
    assert counts.nonzero().flatten().tolist() == sorted(best.indices.tolist())
    assert (counts[best.indices] - (best.values / 0.5).softmax(0)).abs().max() < 0.04
    assert go_on(model, prompt, [0], Sampling(1, temperature=0), end) == [[int(logits.argmax())]]
    half = go_on(model, prompt, range(300), Sampling(1, top_k=0, top_p=0.3), end)
    order, shares = logits.argsort(descending=True), logits.softmax(0).sort(descending=True).values
    nucleus = int((shares.cumsum(0) < 0.3).sum()) + 1
    assert set(np.ravel(half)) <= set(order[:nucleus].tolist())


@pytest.mark.parametrize("path", ["sdpa", "eager", "varlen"])
def test_a_model_in_training_says_what_its_folder_will_say(tokenizer_dir, path):
    """Whatever way of attention it is trained with, and without dropout; mode and random state are left alone."""
    objective, encoder = trained("gpt2", "causal", tokenizer_dir, path, dropout=0.3)
    ids, tokenizer = objective.kind.read("今日は", encoder, 64), encoder.tokenizer
    objective.train()
    state = torch.get_rng_state()
    said = objective.answers({"今日は": ids}, tokenizer, 5)
    assert objective.training
    assert torch.equal(state, torch.get_rng_state())
    model = objective.models[""].eval()
    model.set_attn_implementation("sdpa")
    (expected,) = go_on(model, ids, [0], Sampling(seed=5), boundary_ids(tokenizer)[1], 64)
    assert said == {"今日は": [text_after(tokenizer, ids, expected)]}
    assert len(expected) > 5


# ---- encoders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "objective_name"), FAMILIES)
def test_masks_are_filled_as_the_pipeline_does(tokenizer_dir, tmp_path, family, objective_name):
    objective, encoder = trained(family, objective_name, tokenizer_dir, dropout=0.3)
    model, tokenizer = objective.models.get("generator", objective.models[""]), encoder.tokenizer
    text = "昆布を[MASK]に浸す。列車は次の[MASK]に着いた。"
    ids = objective.kind.read(text, encoder, 64)
    objective.train()
    (lines,) = objective.answers({text: ids}, tokenizer, 0).values()
    objective.eval()
    filled = objective.kind.fill(objective, ids, tokenizer.mask_token_id, 5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = pipeline("fill-mask", str(tmp_path), tokenizer=tokenizer, top_k=5)(text)
    for ours, theirs, line in zip(filled, expected, lines, strict=True):
        assert [number for number, _ in ours] == [each["token"] for each in theirs]
        assert [share for _, share in ours] == pytest.approx([each["score"] for each in theirs], rel=1e-4)
        assert line.startswith(f"{tokenizer.convert_ids_to_tokens(ours[0][0])} {ours[0][1]:.1%}, ")


# ---- while a model learns ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def common(store_dir, workspace):
    """Arguments of a short run with dropout."""
    file = workspace / "gpt2.json"
    file.write_text(json.dumps({"gpt2-test": TINY_PRESET, "bert-test": TINY_PRESET}), encoding="utf-8")
    common = ["--dataset_dir", store_dir, "--parameter_file", file, "--hidden_dropout", 0.1, "--eval_rows", 16]
    return [*common, "--max_steps", 6, "--eval_every", 2, "--save_steps", 3, "--seed", 3]


@pytest.fixture(scope="module")
def sampled(common, workspace):
    run_dir, prompts = workspace / "sampled", workspace / "prompts.txt"
    prompts.write_text("むかし\n\n今日は\n", encoding="utf-8")
    more = ["--model_type", "gpt2-test", "--sample_prompts", prompts, "夜 空", "--model_dir", run_dir]
    run_script("run_pretraining.py", *common, *more)
    return run_dir


def samples(run_dir):
    return [(r["step"], r["samples"]) for r in log_of(run_dir) if "samples" in r]


def test_samples_of_a_run_change_none_of_its_bits(common, sampled, workspace):
    run_dir = workspace / "plain"
    arguments = ["--model_type", "gpt2-test", "--model_dir", run_dir, "--tracker", "none"]
    run_script("run_pretraining.py", *common, *arguments)
    assert same_bits(weights(run_dir), weights(sampled))
    found = samples(sampled)
    assert [step for step, _ in found] == [0, 2, 4, 6]
    assert all(list(said) == ["むかし", "今日は", "夜 空"] for _, said in found)
    assert samples(run_dir) == []
    events = b"".join(file.read_bytes() for file in sampled.rglob("*tfevents*"))
    assert "samples/今日は".encode() in events
    for folder in (sampled, run_dir):
        (folder / "curves.png").unlink()
        draw_curves(folder)
    assert (sampled / "curves.png").read_bytes() == (run_dir / "curves.png").read_bytes()


def test_a_run_that_goes_on_writes_no_sample_twice(common, sampled, workspace):
    run_dir = workspace / "stopped"
    arguments = [*common, "--model_type", "gpt2-test", "--model_dir", run_dir, "--tracker", "none"]
    arguments += ["--sample_prompts", workspace / "prompts.txt", "夜 空"]
    run_script("run_pretraining.py", *arguments, "--stop_at_step", 4)
    run_script("run_pretraining.py", *arguments, "--do_continue")
    assert samples(run_dir) == samples(sampled)


@pytest.mark.slow
@pytest.mark.launch
def test_others_wait_while_the_main_process_answers(common, sampled, workspace):
    run_dir = workspace / "two"
    arguments = ["--model_type", "gpt2-test", "--model_dir", run_dir, "--tracker", "none"]
    arguments += ["--sample_prompts", workspace / "prompts.txt", "夜 空"]
    launch("cpu_2proc.yaml", "run_pretraining.py", *common, *arguments)
    assert samples(run_dir) == samples(sampled)  # float errors of 1e-7 draw no other token


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bert-test", "--sample_prompts", "今日は"], "no mask in '今日は': write [MASK]"),
        (["gpt2-test", "--sample_prompts", "今日は" * 40], "the model reads 64"),
        (["gpt2-test", "--sample_prompts", "none.txt"], "the file of prompts none.txt does not exist"),
        (["gpt2-test", "--sample_prompts", "今日は", "--eval_rows", 0], "without held-out rows"),
        (["gpt2-test", "--sample_prompts", "今日は", "--shard"], "has no effect with --shard"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_at_the_start(common, workspace, capfd, arguments, said):
    run_dir = workspace / "refused"
    common = [each for each in common if arguments[-2] != "--eval_rows" or each not in ("--eval_rows", 16)]
    words = [*common, "--model_type", *arguments, "--model_dir", run_dir, "--tracker", "none"]
    code, _, err = call("run_pretraining.py", *words)
    assert code == 2
    assert said in err
    assert not run_dir.exists()


class Quiet:
    is_main_process, log_with, trackers = True, (), ()

    def __init__(self):
        self.lines = []

    def print(self, line, **_):
        self.lines.append(line)


class Broken:
    name = "tensorboard"

    def log(self, *_, **__):
        raise RuntimeError("no such host")


def test_what_goes_wrong_with_samples_is_said_once(tmp_path):
    accelerator = Quiet()
    report = Reporter(accelerator, tmp_path, 0, 9, continued=False)
    report.texts(1, lambda: {"a": ["b\nc", "d"]})
    accelerator.trackers = (Broken(),)
    report.texts(2, lambda: {"a": ["b"]})
    report.texts(3, lambda: 1 // 0)
    records = read_log(tmp_path / "log.jsonl")
    assert records == [{"step": 1, "samples": {"a": ["b\nc", "d"]}}, {"step": 2, "samples": {"a": ["b"]}}]
    first, second, warning = accelerator.lines
    assert (first, second) == ("step 1: a → b c | d", "step 2: a → b")
    assert warning == "warning: no samples (RuntimeError: no such host); training goes on"


# ---- on the command line -----------------------------------------------------------------------------------------


class Typed:
    """Lines of somebody who waits for each answer: what was on the screen when each of them was asked for."""

    def __init__(self, lines, screen):
        self.lines, self.screen, self.seen = [f"{line}\n".encode() for line in lines], screen, []

    def readline(self, limit=-1):
        self.seen.append(self.screen.getvalue())
        return self.lines.pop(0) if self.lines else b""


def call(script, *words, lines=()):
    """Exit code, standard output and error of a script, in this process."""
    out, err = io.StringIO(), io.StringIO()
    stdin = mock.Mock(buffer=Typed(lines, out), isatty=lambda: False)
    argv = [script, *map(str, words)]
    with mock.patch.multiple(sys, argv=argv, stdin=stdin, stdout=out, stderr=err), pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    call.seen = stdin.buffer.seen
    return end.value.code or 0, out.getvalue(), err.getvalue()


def test_a_file_of_prompts_and_the_screen(sampled, workspace):
    how = ["--model_dir", sampled, "--max_new_tokens", 9, "--seed", 4]
    answers = []
    for size in (1, 2):
        target = workspace / f"texts{size}.jsonl"
        more = ["--input_file", workspace / "prompts.txt", "--num_samples", 3, "--batch_size", size, "-o", target]
        assert call("sample_lm.py", *how, *more)[0] == 0
        answers.append([json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()])
    assert answers[0] == answers[1]
    assert [(each["prompt"], each["sample"]) for each in answers[0]] == [
        (prompt, number) for prompt in ("むかし", "今日は") for number in (1, 2, 3)
    ]
    code, out, _ = call("sample_lm.py", *how, "--prompt", "今日は", "--prompt", "今日は")
    assert (code, out) == (0, "---\n".join(f"今日は{each['text']}\n" for each in answers[0][3:5]))
    other = ["--model_dir", sampled, "--prompt", "今日は", "--max_new_tokens", 9, "--seed", 5]
    assert call("sample_lm.py", *other)[1] != f"今日は{answers[0][3]['text']}\n"


def test_lines_are_answered_as_they_are_typed(sampled):
    how = ["--model_dir", sampled, "--max_new_tokens", 5, "--temperature", 0]
    code, out, err = call("sample_lm.py", *how, lines=["むかし", "", "今日は"])
    assert code == 1
    assert "error: the prompt '' is empty" in err
    assert [text.count("\n") for text in call.seen] == [0, 1, 1, 3]
    assert out.startswith("むかし")
    assert "\n---\n今日は" in out


@pytest.fixture(scope="module")
def encoder_dir(workspace, tokenizer_dir):
    objective, encoder = trained("bert", "masked", tokenizer_dir)
    objective.models[""].save_pretrained(workspace / "bert")
    encoder.tokenizer.save_pretrained(workspace / "bert")
    return workspace / "bert"


def test_masks_on_the_screen_and_in_a_file(encoder_dir, workspace):
    how = ["--model_dir", encoder_dir, "--prompt", "[MASK]は[MASK]だ。", "--top_k", 2]
    code, out, err = call("sample_lm.py", *how)
    assert code == 0
    assert "was never trained" in err
    assert call("sample_lm.py", *how, "-o", workspace / "masks.jsonl")[0] == 0
    (answer,) = map(json.loads, (workspace / "masks.jsonl").read_text(encoding="utf-8").splitlines())
    assert answer["prompt"] == "[MASK]は[MASK]だ。"
    said = ["  ".join(f"{each['token']} {each['probability']:.1%}" for each in mask) for mask in answer["masks"]]
    assert out == f"[MASK]は[MASK]だ。\n  {said[0]}\n  {said[1]}\n"
    code, _, err = call("sample_lm.py", "--model_dir", encoder_dir, "--prompt", "[MASK]", "--temperature", 1)
    assert (code, "--temperature 1.0 has no effect on an encoder (bert)" in err) == (2, True)
    code, _, err = call("sample_lm.py", "--model_dir", encoder_dir, "--prompt", "今日は")
    assert (code, "no mask in '今日は': write [MASK]" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", ""], "the prompt '' is empty"),
        (["--prompt", "今日は" * 40], "and the model reads 64"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
        (["--prompt", "a", "--top_p", "1.5"], "--top_p must be at most 1, got 1.5"),
        (["--prompt", "a", "--temperature", "0", "--num_samples", "2"], "--num_samples 2 has no effect"),
        (["--prompt", "a", "--input_file", "b"], "give one"),
        (["--input_file", "none.txt"], "none.txt does not exist"),
    ],
)
def test_bad_questions_are_one_sentence(sampled, arguments, said):
    code, out, err = call("sample_lm.py", "--model_dir", sampled, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
