"""Stores, tokenizers and checkpoints that were damaged or edited: one sentence that names the file, nothing lost."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import forked
import numpy as np
import psutil
import pytest
from conftest import PATIENCE, ROOT, SAMPLE, TINY_PRESET, run_script
from runs import same_bits, wait_for_step, weights

from lmscripts.models.finding import find_damage, list_checkpoints


def sentence_of(done):
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    return line


@pytest.fixture
def train(store_dir, tmp_path):
    """Starts a run of a tiny preset on a copy of the store, which it gives before."""
    presets, store = tmp_path / "presets.json", tmp_path / "store"
    presets.write_text(json.dumps({"bert-test": TINY_PRESET}), encoding="utf-8")
    shutil.copytree(store_dir, store)

    def start(*more, **settings):
        arguments = ["--parameter_file", presets, "--model_dir", tmp_path / "run", "--tracker", "none"]
        arguments += ["--model_type", "bert-test", "--dataset_dir", store, "--logging_steps", "100", *more]
        return run_script("run_pretraining.py", *arguments, **settings)

    start.store = store
    return start


def edited(file, change):
    """Change a file of numbers in place and put its times back, as a careful hand would."""
    before = file.stat()
    numbers = np.fromfile(file, "int64" if "document" in file.name else "uint16")
    change(numbers)
    with open(file, "r+b") as opened:
        opened.write(numbers.tobytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def one_id(numbers):
    numbers[100] = 7 if numbers[100] != 7 else 8


def beyond(numbers):
    numbers[5] = 60000


def swapped(numbers):
    numbers[[1, 2]] = numbers[[2, 1]]


def far(numbers):
    numbers[3] = 10**12


@pytest.mark.parametrize(
    ("part", "file", "change"),
    [
        ("train", "tokens", one_id),
        ("train", "tokens", beyond),
        ("validation", "tokens", one_id),
        ("train", "document_tokens", swapped),
        ("train", "document_tokens", far),
        ("train", "document_sentences", swapped),
        ("train", "document_bytes", far),
    ],
)
def test_content_that_is_not_as_it_was_written_is_not_trained_on(train, part, file, change):
    path = train.store / part / f"{file}.bin"
    edited(path, change)
    sentence = sentence_of(train("--dry_run", check=False))
    assert str(path) in sentence
    assert "damaged" in sentence


def test_content_is_checked_once_and_again_after_a_change(train, monkeypatch):
    """Also where size and time of modification are as before."""
    from lmscripts.data import arrays, token_store

    seen = []
    monkeypatch.setattr(arrays, "file_sha256", lambda path: seen.append(path) or real(path))
    real = __import__("lmscripts.files").files.file_sha256
    store = token_store.open_store(train.store)
    token_store.check_store(store)
    token_store.check_store(store)
    assert len(seen) == len(set(seen)) == 12
    edited(train.store / "train" / "tokens.bin", one_id)
    with pytest.raises(token_store.UserError, match=r"tokens\.bin has hash"):
        token_store.check_store(store)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("tokens", beyond, "ids beyond"),
        ("document_tokens", swapped, "document_tokens that are no offsets"),
        ("document_sentences", far, "document_sentences that are no offsets"),
        ("document_bytes", far, "other sums"),
    ],
)
def test_hashes_that_were_made_to_fit_do_not_help(train, file, change, words):
    from lmscripts.files import file_sha256

    path, manifest = train.store / "train" / f"{file}.bin", train.store / "manifest.json"
    edited(path, change)
    values = json.loads(manifest.read_text(encoding="utf-8"))
    values["parts"]["train"]["files"][file]["sha256"] = file_sha256(path)
    manifest.write_text(json.dumps(values), encoding="utf-8")
    assert words in sentence_of(train("--dry_run", check=False))


def put(*keys):
    """Sets or, with `del` as the value, removes what stands under keys."""

    def change(values):
        *path, last, value = keys
        for key in path:
            values = values[key]
        if value is del_:
            del values[last]
        else:
            values[last] = value

    return change


del_ = object()
MANIFESTS = {
    "list for parts": put("parts", []),
    "list for a part": put("parts", "train", [1, 2]),
    "no validation": put("parts", "validation", del_),
    "no train": put("parts", "train", del_),
    "null part": put("parts", "train", None),
    "no files": put("parts", "train", "files", del_),
    "one file less": put("parts", "train", "files", "tokens", del_),
    "file as text": put("parts", "train", "files", "tokens", "many"),
    "size as text": put("parts", "train", "files", "tokens", "bytes", "12"),
    "size as half": put("parts", "train", "files", "tokens", "bytes", 12.5),
    "negative count": put("parts", "train", "tokens", -1),
    "another count": put("parts", "train", "tokens", 5),
    "documents": put("parts", "train", "documents", 10**30),
    "truth as count": put("parts", "train", "sentences", True),
    "unknown dtype": put("dtype", "float64"),
    "dtype as list": put("dtype", ["uint16"]),
    "another dtype": put("dtype", "uint32"),
    "no dtype": put("dtype", del_),
    "no tokenizer": put("tokenizer", del_),
    "tokenizer as text": put("tokenizer", "mecab"),
    "tokenizer without fingerprint": put("tokenizer", "fingerprint", del_),
    "another tokenizer": put("tokenizer", "fingerprint", "0" * 64),
    "no source": put("source", del_),
    "files as number": put("source", "files", 3),
    "no options": put("options", None),
    "other options": put("options", "validation_fraction", 0.9),
    "fingerprint as number": put("fingerprint", 5),
    "another fingerprint": put("fingerprint", "0" * 64),
    "version as text": put("format_version", "1"),
    "no version": put("format_version", del_),
    "another version": put("format_version", 99),
    "text as list": put("text", []),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_pretraining.py", "prepare_corpus.py"])
def test_edited_manifests_are_one_sentence_each(train, script):
    manifest, before = train.store / "manifest.json", sorted(train.store.iterdir())
    whole = manifest.read_text(encoding="utf-8")
    contents = {"list": "[]", "null": "null", "text": '"a"', "empty": "", "deep": "[" * 100_000, "cut": whole[:-200]}
    contents |= {"not UTF-8": whole.encode("utf-16"), "long number": '{"format_version": ' + "1" * 5000 + "}"}
    for name, change in MANIFESTS.items():
        values = json.loads(whole)
        change(values)
        contents[name] = json.dumps(values)
    for name, content in contents.items():
        manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
        inspect = ("prepare_corpus.py", "--inspect", train.store)
        done = train("--dry_run", check=False) if script == "run_pretraining.py" else run_script(*inspect, check=False)
        sentence = sentence_of(done)
        assert str(train.store) in sentence, (name, sentence)
    assert sorted(train.store.iterdir()) == before


def folder_for_file(path):
    path.unlink()
    path.mkdir()


TOKENIZERS = {
    "gone": lambda folder: shutil.rmtree(folder),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
    "vocabulary gone": lambda folder: (folder / "vocab.txt").unlink(),
    "vocabulary cut": lambda folder: shorten(folder / "vocab.txt", 1000),
    "vocabulary swapped": lambda folder: swap_lines(folder / "vocab.txt", 500, 501),
    "vocabulary longer": lambda folder: append(folder / "vocab.txt", "another\n"),
    "vocabulary a folder": lambda folder: folder_for_file(folder / "vocab.txt"),
    "vocabulary of bytes": lambda folder: (folder / "vocab.txt").write_bytes(bytes(range(256)) * 9),
    "settings gone": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "settings cut": lambda folder: shorten(folder / "tokenizer_config.json", 3),
    "settings a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "settings deep": lambda folder: (folder / "tokenizer_config.json").write_text("[" * 100_000),
    "another class": lambda folder: settings(folder, tokenizer_class="BertTokenizer"),
    "no such class": lambda folder: settings(folder, tokenizer_class="NoSuchTokenizer"),
    "code of its own": lambda folder: own_code(folder),
    "lower case": lambda folder: settings(folder, do_lower_case=True),
    "another dictionary": lambda folder: settings(folder, mecab_kwargs={"mecab_dic": "nowhere"}),
}


def shorten(file, lines):
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]), encoding="utf-8")


def swap_lines(file, one, other):
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[one], lines[other] = lines[other], lines[one]
    file.write_text("".join(lines), encoding="utf-8")


def append(file, text):
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")


def settings(folder, **values):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def own_code(folder):
    """Whoever runs it leaves a mark; its class is one that transformers does not know."""
    mark = folder.parent / "mark"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n", encoding="utf-8")
    settings(folder, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_of_a_store_is_the_one_that_made_it(train, name):
    folder = train.store / "tokenizer"
    TOKENIZERS[name](folder)
    for done in (
        train("--dry_run", check=False),
        run_script("prepare_corpus.py", "--inspect", train.store, check=False),
    ):
        assert str(folder) in sentence_of(done)
    assert not (train.store / "mark").exists()


def test_a_store_that_is_whole_trains_and_says_nothing_about_it(train):
    done = train("--max_steps", "1")
    assert "damaged" not in done.stdout + done.stderr
    assert (train.store / "rows" / "checked.json").is_file()


@pytest.mark.parametrize("script", ["prepare_corpus.py", "train_tokenizer.py"])
def test_work_that_is_stopped_leaves_no_process_and_no_file(tokenizer_dir, tmp_path, script):
    """SIGKILL leaves a folder that the next start removes."""
    text, output = tmp_path / "long.txt", tmp_path / "output"
    text.write_bytes((SAMPLE / "articles.txt").read_bytes() * 200)
    command = [sys.executable, str(ROOT / "scripts" / script), "--input_file", text, "--num_workers", 2]
    if script == "prepare_corpus.py":
        command += ["--tokenizer_dir", tokenizer_dir, "--output_dir", output]
    else:
        command += ["--vocab_size", 1000, "--model_dir", output]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        workers, deadline = set(), time.monotonic() + PATIENCE
        while len(workers) < 2 and process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(process.pid).children()
                workers |= {child for child in children if "spawn_main" in " ".join(child.cmdline())}
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate()[1].decode()
        assert len(workers) == 2, said
        assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []
    assert process.returncode == 128 + signal.SIGTERM
    assert [line for line in said.splitlines() if "error:" in line] == ["error: stopped by SIGTERM"]
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == [text]


# ---- taken away while a run is under way -------------------------------------------------------------------------


def lose_the_text(run_dir, store):
    """The store with its tokenizer, and the log, in whose place is something that nobody can write to."""
    shutil.rmtree(store)
    (run_dir / "log.jsonl").unlink()
    (run_dir / "log.jsonl").mkdir()


def lose_the_run(run_dir, store):
    shutil.rmtree(run_dir)
    run_dir.write_text("")


@pytest.mark.parametrize(("lose", "code"), [(lose_the_text, 0), (lose_the_run, 2)])
def test_what_is_taken_away_while_it_trains(train, tmp_path, lose, code):
    run_dir, command = tmp_path / "run", [sys.executable, str(ROOT / "scripts" / "run_pretraining.py")]
    command += ["--parameter_file", tmp_path / "presets.json", "--model_type", "bert-test", "--model_dir", run_dir]
    command += ["--dataset_dir", train.store, "--tracker", "none", "--max_steps", 120, "--save_steps", 25]
    with open(tmp_path / "said.txt", "w+", encoding="utf-8") as log:
        process = forked.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT)
        wait_for_step(process, run_dir, 25)
        lose(run_dir, train.store)
        assert process.wait(timeout=PATIENCE) == code
        log.seek(0)
        said = log.read()
    assert "Traceback" not in said
    assert said.count("log.jsonl: ") == 1
    if code == 0:
        assert (run_dir / "final" / "vocab.txt").is_file()
        assert (run_dir / "checkpoint-120" / "checksums.json").is_file()
    else:
        (sentence,) = [line for line in said.splitlines() if line.startswith("error:")]
        assert f"could not save {run_dir}" in sentence
        assert "go on with --do_continue" in sentence


def fill_the_disk(process, run_dir, store):
    """As good as full for the weights: no file of the process may grow past 20 kB."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def lock_the_log(process, run_dir, store):
    (run_dir / "log.jsonl").unlink()
    (run_dir / "log.jsonl").mkdir()


def remove_the_text(process, run_dir, store):
    shutil.rmtree(store)


def remove_the_run(process, run_dir, store):
    """Over and over, as it may be saving."""
    with contextlib.suppress(FileNotFoundError):
        while True:
            shutil.rmtree(run_dir, ignore_errors=True)
            run_dir.lstat()


@pytest.mark.slow
def test_at_any_moment_the_last_checkpoint_stands_and_the_run_ends_alike(train, tmp_path):
    """LMSCRIPTS_KILLS moments, or 4."""
    command = [sys.executable, str(ROOT / "scripts" / "run_pretraining.py"), "--dataset_dir", train.store]
    command += ["--parameter_file", tmp_path / "presets.json", "--model_type", "bert-test", "--tracker", "none"]
    command += ["--max_steps", 200, "--save_steps", 5, "--do_continue", "--model_dir"]
    subprocess.run([*map(str, command), str(tmp_path / "whole")], check=True, capture_output=True, timeout=PATIENCE)
    expected, kept = weights(tmp_path / "whole"), tmp_path / "kept"
    shutil.copytree(train.store, kept)
    takes, moment = (fill_the_disk, lock_the_log, remove_the_text, remove_the_run), random.Random(3)
    for number in range(int(os.environ.get("LMSCRIPTS_KILLS", len(takes)))):
        take, run_dir = takes[number % len(takes)], tmp_path / f"run{number}"
        with open(tmp_path / "said.txt", "w+", encoding="utf-8") as log:
            process = forked.Popen([*map(str, command), str(run_dir)], stdout=log, stderr=subprocess.STDOUT)
            wait_for_step(process, run_dir, 5)
            time.sleep(moment.random())
            take(process, run_dir, train.store)
            code = process.wait(timeout=PATIENCE)
            log.seek(0)
            said = log.read()
        about = (number, take.__name__, code, said[-3000:])
        assert "Traceback" not in said, about
        if code:
            (sentence,) = [line for line in said.splitlines() if line.startswith("error:")]
            assert code == 2, about
            assert "--do_continue" in sentence, about
            left = list_checkpoints(run_dir) if run_dir.is_dir() else []
            assert (left != [] and all(find_damage(folder) is None for folder in left)) or take is remove_the_run, about
        else:
            assert take is not fill_the_disk or same_bits(weights(run_dir), expected), about
        shutil.copytree(kept, train.store, dirs_exist_ok=True)
        if (run_dir / "log.jsonl").is_dir():
            (run_dir / "log.jsonl").rmdir()
        subprocess.run([*map(str, command), str(run_dir)], check=True, capture_output=True, timeout=PATIENCE)
        assert same_bits(weights(run_dir), expected), about


# ---- checkpoints and models --------------------------------------------------------------------------------------

STATES = {
    "progress as list": put("progress", []),
    "no progress": put("progress", del_),
    "step as text": put("progress", "step", "2"),
    "step as half": put("progress", "step", 2.5),
    "step below 0": put("progress", "step", -3),
    "another step": put("progress", "step", 10**15),
    "truth": put("progress", "skipped_steps", True),
    "sums as list": put("progress", "window_sums", [1]),
    "sum as text": put("progress", "window_sums", {"mlm": "much"}),
    "no counts": put("progress", "window_counts", None),
    "origin": put("progress", "origin", 7),
    "tokens": put("progress", "real_tokens", "many"),
    "groups as object": put("groups", {}),
    "no group": put("groups", []),
    "group as list": put("groups", 0, []),
    "rate as text": put("groups", 0, "lr", "fast"),
    "one beta": put("groups", 0, "betas", [0.9]),
    "beta as text": put("groups", 0, "betas", [0.9, "0.99"]),
    "settings as list": put("fixed", []),
    "no settings": put("fixed", del_),
    "length as text": put("fixed", "sequence_length", "64"),
}


@pytest.fixture
def stopped(train, tmp_path):
    """A run that stopped at step 2, and how it goes on."""
    train("--max_steps", 4, "--stop_at_step", 2)
    line = ["--max_steps", 4, "--stop_at_step", 3, "--do_continue"]
    return tmp_path / "run" / "checkpoint-2", lambda: sentence_of(train(*line, check=False))


@pytest.mark.slow
def test_states_of_wrong_types_with_checksums_made_to_fit(stopped):
    from lmscripts.models.finding import write_checksums

    checkpoint, go_on = stopped
    file, sums = checkpoint / "training_state.json", checkpoint / "checksums.json"
    whole = file.read_text(encoding="utf-8")
    contents = {"list": "[]", "empty": "", "deep": "[" * 100_000, "digits": f'{{"fixed": {"1" * 5000}}}'}
    for name, change in STATES.items():
        values = json.loads(whole)
        change(values)
        contents[name] = json.dumps(values)
    for name, content in contents.items():
        file.write_text(content, encoding="utf-8")
        sums.unlink()
        write_checksums(checkpoint)
        assert "checkpoint-2" in go_on(), name
    assert [path.name for path in checkpoint.parent.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("content", ["{}", "[]", "null", "", '{"config.json": 5}', "[" * 100_000, "one"])
def test_checksums_that_name_nothing_or_little_are_no_checksums(stopped, content):
    checkpoint, go_on = stopped
    sums = checkpoint / "checksums.json"
    if content == "one":
        content = json.dumps({"vocab.txt": json.loads(sums.read_text())["vocab.txt"]})
    sums.write_text(content, encoding="utf-8")
    assert "checkpoint-2 is damaged (checksums.json" in go_on()


def test_optimizer_states_of_other_shapes(stopped):
    from safetensors.torch import load_file, save_file

    from lmscripts.models.finding import write_checksums

    checkpoint, go_on = stopped
    tensors = load_file(checkpoint / "optimizer.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, checkpoint / "optimizer.safetensors")
    (checkpoint / "checksums.json").unlink()
    write_checksums(checkpoint)
    assert f"{name} has the shape" in go_on()


def test_code_that_a_model_brings_along_is_not_run_whatever_is_answered(train, tmp_path):
    """`yes |` answers what transformers would ask on a terminal."""
    train("--max_steps", 1)
    folder, mark = tmp_path / "run" / "final", tmp_path / "mark"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "evaluate_lm.py"), "--model_dir", str(folder)]
    command += ["--input_file", str(SAMPLE / "english.txt")]
    done = forked.run(command, input="y\n" * 99)
    assert str(folder) in sentence_of(done)
    assert not mark.exists()


def test_what_would_train_on_nothing_or_be_ignored_is_refused(train):
    assert "nothing would be learnt" in sentence_of(train("--mask_probability", "1e-8", check=False))
    assert "--node_rank 7 cannot be" in sentence_of(train("--node_rank", 7, check=False))
