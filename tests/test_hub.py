"""What is uploaded to the Hub, when, and with which card: huggingface_hub itself against a server in this process."""

import contextlib
import gc
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT, TINY_PRESET, forget_accelerator, launch, run_script
from hub_standin import TOKEN, standin
from huggingface_hub import ModelCard, constants
from runs import wait_for_step
from tiny import new_models

from lmscripts.data.packing import Layout
from lmscripts.errors import UserError
from lmscripts.models.families import gpt2
from lmscripts.models.finding import checkpoint_step, list_checkpoints
from lmscripts.training.card import About, model_card
from lmscripts.training.checkpoint import check_architecture
from lmscripts.training.hub import Hub, open_hub

WORDS = {"began": "Trained.", "use": "", "limits": ""}


@pytest.fixture
def hub(monkeypatch):
    with standin(monkeypatch) as server:
        yield server


def opened(name, private=None, language=(), licence=None, is_tried=False):
    return open_hub(name, private, language, licence, is_tried=is_tried)


# ---- in the first second -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("no good name", {}, "--push_to_hub no good name must be USER/NAME or NAME"),
        ("a/b/c", {}, "must be USER/NAME or NAME"),
        ("nobody/mine", {}, r"is refused .*rights to create a model under this namespace"),
        ("mine", {"licence": "no-such"}, r'license\\" must be one of many'),
        ("public", {"private": True}, "somebody/public is there already, and not private"),
    ],
)
def test_what_the_hub_would_not_take_is_refused_at_once(hub, name, more, sentence):
    hub.commits["somebody/public"], hub.private["somebody/public"] = [], False
    with pytest.raises(UserError, match=sentence):
        opened(name, **more)
    assert list(hub.commits) == ["somebody/public"]


@pytest.mark.parametrize(
    ("token", "sentence"),
    [(None, "needs a token: `hf auth login`, or set HF_TOKEN"), ("hf_other", "is refused"), ("hf_\x01odd", "needs a")],
)
def test_a_token_that_is_none_or_wrong_is_not_told(hub, monkeypatch, tmp_path, token, sentence):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=sentence) as found:
        opened("mine")
    assert token is None or token[3:] not in str(found.value)


def test_offline_and_a_hub_do_not_go_together(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE .* it: leave it out, and upload later: hf upload mine"):
        opened("mine")
    assert hub.asked == []


def test_one_process_asks_and_a_trial_makes_nothing(hub, monkeypatch):
    found, said = opened("mine", is_tried=True)
    assert found.repo == "somebody/mine"
    assert said == [f"checkpoints and the model go to {hub.endpoint}/somebody/mine"]
    assert hub.commits == {}
    monkeypatch.setenv("RANK", "1")
    asked = len(hub.asked)
    assert opened("mine")[0].repo == "mine"
    assert len(hub.asked) == asked
    monkeypatch.setenv("RANK", "0")
    opened("mine", private=True)
    assert hub.private == {"somebody/mine": True}


# ---- uploads -----------------------------------------------------------------------------------------------------


def model(folder, weights):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    (folder / "optimizer.safetensors").write_bytes(b"moments")
    (folder / "training_state.json").write_text("{}")
    return folder


def test_the_newest_of_those_that_wait_is_uploaded_even_where_it_was_removed(hub, tmp_path):
    hub.gate.clear()
    pushed, said = opened("mine")[0], []
    for step in (1, 2, 3):
        folder = model(tmp_path / f"checkpoint-{step}", b"%d" % step)
        pushed.push(folder, f"step {step}", said.append, tmp_path)
        while not any(path.startswith("PUT") for path in hub.asked):  # the first is on its way
            assert not pushed.is_done(0.01)
        shutil.rmtree(folder)
    hub.gate.set()
    assert pushed.is_done(60)
    assert hub.messages("somebody/mine") == ["step 1", "step 3"]
    assert hub.files("somebody/mine") == {"model.safetensors": b"3", "config.json": b"{}"}
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_equal_files_are_no_second_commit(hub, tmp_path):
    pushed, said, folder = opened("mine")[0], [], model(tmp_path / "final", b"1")
    for message in ("step 1", "the model"):
        pushed.push(folder, message, said.append, tmp_path)
        assert pushed.is_done(60)
    assert said == []
    assert hub.messages("somebody/mine") == ["step 1"]


def test_a_hub_that_fails_is_told_of_once(hub, tmp_path):
    pushed, said, folder = opened("mine")[0], [], model(tmp_path / "final", b"1")
    hub.failing.append("/commit/")
    for step in (1, 2):
        pushed.push(folder, f"step {step}", said.append, tmp_path)
        assert pushed.is_done(60)
    (line,) = said
    assert line.startswith("warning: step 1 was not uploaded to somebody/mine (")
    assert line.endswith("; the run goes on")
    assert "the Hub is tired" in line
    assert TOKEN not in line
    with pytest.raises(UserError, match=f"hf upload somebody/mine {re.escape(str(folder))}$"):
        pushed.check(folder, "step 2")
    hub.failing.clear()
    pushed.push(folder, "step 3", said.append, tmp_path)
    assert pushed.is_done(60)
    pushed.check(folder, "step 3")
    assert hub.messages("somebody/mine") == ["step 3"]


# ---- a run -------------------------------------------------------------------------------------------------------


def train(monkeypatch, script, *arguments):
    """Run a script in this process, which takes the server for the Hub; the exit code."""
    gc.collect()  # of an earlier run, which would hold the lock of its folder
    forget_accelerator()
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    }
    streams = sys.stdout, sys.stderr
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return end.value.code or 0


@pytest.fixture
def arguments(tmp_path, store_dir):
    (tmp_path / "preset.json").write_text(json.dumps({"bert-test": TINY_PRESET}), encoding="utf-8")
    given = ["--dataset_dir", store_dir, "--model_type", "bert-test", "--parameter_file", tmp_path / "preset.json"]
    given += ["--model_dir", tmp_path / "run", "--max_steps", 4, "--save_steps", 2, "--keep_last", 1, "--eval_rows", 8]
    return [*given, "--tracker", "none", "--push_to_hub", "mine", "--license", "apache-2.0"]


def test_a_run_uploads_its_checkpoints_and_its_model(hub, monkeypatch, capsys, tmp_path, arguments):
    run_dir, final = tmp_path / "run", tmp_path / "run" / "final"
    assert train(monkeypatch, "run_pretraining.py", *arguments) == 0
    assert f"checkpoints and the model go to {hub.endpoint}/somebody/mine\n" in capsys.readouterr().out
    assert hub.messages("somebody/mine")[-1] == "the model, after step 4"
    assert set(hub.messages("somebody/mine")) <= {"step 2", "step 4", "the model, after step 4"}
    assert not any(name.startswith(("optimizer", "training_state", "checksums")) for name in hub.files("somebody/mine"))
    assert {path.name: path.read_bytes() for path in final.iterdir()} == hub.files("somebody/mine")
    assert sorted(path.name for path in run_dir.iterdir() if path.is_dir()) == ["checkpoint-4", "final"]
    check_card(hub.files("somebody/mine")["README.md"].decode(), tmp_path)
    number = len(hub.commits["somebody/mine"])
    assert train(monkeypatch, "run_pretraining.py", *arguments, "--do_continue") == 0
    assert len(hub.commits["somebody/mine"]) == number  # nothing twice
    hub.commits["somebody/mine"].clear()
    hub.failing.append("/commit/")
    capsys.readouterr()
    assert train(monkeypatch, "run_pretraining.py", *arguments, "--do_continue") == 2
    said = capsys.readouterr().err
    assert said.rstrip().endswith(f"later: hf upload somebody/mine {final}")
    assert "the Hub is tired" in said
    assert (final / "model.safetensors").is_file()
    assert TOKEN not in said
    assert not [file for file in run_dir.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


def check_card(text, folder):
    data = ModelCard(text).data
    assert data.language == ["ja"]
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "fill-mask"
    assert data.tags == ["lmscripts", "bert", "masked"]
    assert data.model_name == "somebody/mine"
    assert {result.metric_type for result in data.eval_results} >= {"loss", "accuracy"}
    assert {result.dataset_name for result in data.eval_results} == {"held-out text of articles.txt"}
    assert "`pip install fugashi ipadic`" in text
    assert 'pipeline("fill-mask", model="somebody/mine")' in text
    assert str(folder) not in text
    assert "model_dir: run\n" in text


@pytest.mark.slow
def test_a_classifier_and_a_policy_are_uploaded_too(hub, monkeypatch, tmp_path, tokenizer_dir):
    network = new_models("bert", "masked", Layout(32, "isolated", begin_id=None, end_id=0, pad_id=0), vocabulary=2048)
    shutil.copytree(tokenizer_dir, tmp_path / "bert")
    network[""].save_pretrained(tmp_path / "bert")
    rows = [f"{'昆布水鍋'[n % 4]}と{'星月空'[n % 3]}{n}。,{'ab'[n % 2]}" for n in range(60)]
    (tmp_path / "topics.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    given = [tmp_path / "topics.csv", "--model_name_or_path", tmp_path / "bert", "--epochs", "1", "--max_length", "32"]
    assert train(monkeypatch, "finetune_classifier.py", *given, "--tracker", "none", "--push_to_hub", "topics") == 0
    assert hub.messages("somebody/topics")[-1].startswith("the model, after step")
    data = ModelCard(hub.files("somebody/topics")["README.md"].decode()).data
    assert {result.dataset_name for result in data.eval_results} == {"test documents of topics"}
    run_script("make_annotations.py", "--output_file", tmp_path / "made.txt", "--num_records", 100)
    given = ["--training-data", tmp_path / "made.txt", "--schema", "kanachan-v1", "--training-batch-size", "50"]
    given += ["--dimension", "16", "--num-heads", "2", "--num-layers", "1", "--output-prefix", tmp_path / "runs"]
    given += ["--experiment-name", "policy", "--tracker", "none", "--push_to_hub", "policy"]
    assert train(monkeypatch, "train_policy.py", *given) == 0
    assert hub.messages("somebody/policy")[-1] == "the model, after step 2"
    assert set(hub.files("somebody/policy")) == {"README.md", "config.json", "model.safetensors"}


@pytest.mark.slow
@pytest.mark.launch
def test_of_two_processes_one_uploads_and_both_end_as_it_does(arguments, tmp_path):
    with standin() as server:
        launch("cpu_2proc.yaml", "run_pretraining.py", *arguments, env=server.environment)
        assert server.messages("somebody/mine")[-1] == "the model, after step 4"
        assert server.asked.count("GET /api/whoami-v2") == 1
        server.failing.append("/commit/")
        shutil.rmtree(tmp_path / "run")
        done = launch("cpu_2proc.yaml", "run_pretraining.py", *arguments, env=server.environment, check=False)
        assert done.returncode != 0
        assert f"later: hf upload somebody/mine {tmp_path / 'run' / 'final'}" in done.stderr
        assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_signal_does_not_wait_for_the_hub(arguments, tmp_path):
    with standin() as server, open(tmp_path / "said.txt", "w+", encoding="utf-8") as said:
        server.gate.clear()
        arguments[arguments.index("--max_steps") + 1] = 4000
        command = [sys.executable, ROOT / "scripts" / "run_pretraining.py", *arguments]
        env = {**os.environ, **server.environment}
        process = subprocess.Popen([*map(str, command)], stdout=said, stderr=said, env=env)
        wait_for_step(process, tmp_path / "run", 12)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 75
        assert server.messages("somebody/mine") == []
        server.gate.set()
        step = max(checkpoint_step(folder) for folder in list_checkpoints(tmp_path / "run"))
        more = ["--do_continue", "--stop_at_step", step + 2]
        run_script("run_pretraining.py", *arguments, *more, env=server.environment)
        assert server.messages("somebody/mine")[-1] == f"step {step + 2}"
        assert not [*(tmp_path / "run").glob(".hub-*")]


# ---- cards -------------------------------------------------------------------------------------------------------

ODD = "a \"b\": {c}, [d] # e | 名前 'f' - g & *h"


def test_a_card_is_read_back_whatever_the_names(tmp_path):
    facts = {"results": {"macro f1: x": 0.5, "loss": float("nan"), "mcc": None}, "measured_on": ODD}
    facts |= {"tags": ["bert"], "task": "fill-mask", "datasets": ["somebody/日本語: x"], "began_with": ["org/base"]}
    data = ModelCard(model_card(ODD, {}, "", about=About(None, ("en",), "mit"), **WORDS, **facts)).data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("macro f1: x", 0.5, ODD)
    assert (data.model_name, data.datasets, data.language) == (ODD, ["somebody/日本語: x"], ["en"])
    assert (data.base_model, data.license) == (["org/base"], "mit")
    nothing = ModelCard(model_card("x", {}, "", about=About(), **WORDS)).data
    assert nothing.to_dict() == {"library_name": "transformers", "tags": ["lmscripts"]}


def test_options_of_a_card_say_nothing_of_the_disk():
    lines = ["a: /home/me/私の 本.txt", "b: [/home/me/x/y, runs/z, ../../up/w]", "c: ~/corpus", "d: 1.0e-06", "e: /"]
    options = "\n".join(lines).replace("/home/me/私の 本.txt", json.dumps("/home/me/私の 本.txt", ensure_ascii=False))
    options = options.replace("~/corpus", '"~/corpus"')
    text = model_card("x", {}, options, about=About(), **WORDS)
    shown = text.partition("```yaml\n")[2].partition("\n```")[0]
    assert shown.splitlines() == ['a: "私の 本.txt"', "b: [y, runs/z, w]", 'c: "corpus"', "d: 1.0e-06", "e: /"]


@pytest.mark.parametrize(
    ("settings", "install", "language"),
    [
        ({"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": "ipadic"}}, "fugashi ipadic", ["ja"]),
        ({"word_tokenizer_type": "mecab"}, "fugashi unidic-lite", ["ja"]),
        ({"word_tokenizer_type": "mecab", "mecab_kwargs": {"mecab_dic": None}}, "fugashi", ["ja"]),
        ({"word_tokenizer_type": "sudachi"}, "SudachiPy sudachidict_core", ["ja"]),
        ({"word_tokenizer_type": "basic"}, None, None),
    ],
)
def test_what_a_downloader_installs(tmp_path, settings, install, language):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = model_card("x", {}, "", about=About(), model_dir=tmp_path, **WORDS)
    assert (f"`pip install {install}`." in text) == (install is not None)
    assert ModelCard(text).data.get("language") == language
    given = model_card("x", {}, "", about=About(language=("en", "fi")), model_dir=tmp_path, **WORDS)
    assert ModelCard(given).data.language == ["en", "fi"]


def test_a_folder_is_named_as_its_card_says(tmp_path):
    pushed = About(Hub("somebody/base"))
    (tmp_path / "README.md").write_text(model_card("x", {}, "", about=pushed, results={"loss": 1.0}, **WORDS))
    began = {"began_with": [str(tmp_path), str(tmp_path / "nothing there"), str(tmp_path.parent)]}
    assert ModelCard(model_card("y", {}, "", about=About(), **began, **WORDS)).data.base_model == ["somebody/base"]


# ---- GPT-2 -------------------------------------------------------------------------------------------------------


def test_converters_find_the_context_of_gpt2(tmp_path):
    layout = Layout(48, "isolated", begin_id=1, end_id=2, pad_id=0)
    models = new_models("gpt2", "causal", layout)
    models[""].save_pretrained(tmp_path)
    assert "n_ctx" not in json.loads((tmp_path / "config.json").read_text())
    gpt2.adopt(models[""], layout)
    check_architecture(models, tmp_path, another_run=False)  # of an older version
    models[""].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == 48
    check_architecture(models, tmp_path, another_run=False)
    with contextlib.suppress(AttributeError):
        del models[""].config.n_ctx
    check_architecture(models, tmp_path, another_run=False)
