"""scripts/train_tokenizer.py as a user runs it."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from conftest import PATIENCE, help_of

from lmscripts.text.corpus import Span, plan_spans
from lmscripts.text.words import WordTokenizer
from lmscripts.tokenizer.training_text import SplitTask, finished_split, numeral_run_warning, write_split, write_splits

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "train_tokenizer.py"
ARTICLES = ROOT / "sample_data" / "articles.txt"


def run(*words, cwd=None, code=0, **environment):
    """Run the script; returns its output. Anything but the expected exit code, or a traceback, is a failure."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    result = forked.run(command, cwd, environment, PATIENCE)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    if code:
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        return result.stderr
    return result.stdout + result.stderr


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """The published command line, as it stands in the older document, on a tiny text; run from another folder."""
    folder = tmp_path_factory.mktemp("older")
    (folder / "share").mkdir()
    (folder / "share" / "corpus.txt").write_bytes(ARTICLES.read_bytes())
    line = """--input_file ./share/corpus.txt --model_dir ./share/tokenizer --intermediate_dir ./data/corpus_split/
        --num_files 20 --mecab_dic_type ipadic --tokenizer_type wordpiece --vocab_size 32768 --min_frequency 2
        --limit_alphabet 6129 --num_unused_tokens 10"""
    return folder, run(*line.split(), cwd=folder)


def test_older_command_line(older):
    folder, output = older
    assert "--mecab_dic_type is now --mecab_dic" in output
    assert re.search(r"the vocabulary has [\d,]+ entries, not 32,768", output)
    assert re.search(r"checked: \d+ lines have the same ids", output)
    assert "tokens per word" in output
    assert re.search(r"next:\n  python scripts/prepare_corpus.py --input_file \S+ --tokenizer_dir \S+", output)
    assert len(list((folder / "data" / "corpus_split").glob("*.txt"))) == 20
    tokenizer = folder / "share" / "tokenizer"
    names = {"lmscripts_tokenizer.json", "tokenizer_config.json", "tokenizer_report.json", "vocab.txt"}
    assert set(digests(tokenizer)) == names
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    assert config["mecab_kwargs"] == {"mecab_dic": "ipadic"}
    record = json.loads((tokenizer / "lmscripts_tokenizer.json").read_text())
    assert record["words"]["dictionary_version"]
    assert record["text"]["documents"] > 40
    assert str(folder) not in json.dumps(record)
    assert json.loads((tokenizer / "tokenizer_report.json").read_text())["unknown_tokens"] == 0


def test_objective_of_masked_models_is_the_default(older, tmp_path):
    """Named or not it is the same tokenizer, whose record knows nothing of objectives."""
    folder = older[0] / "share" / "tokenizer"
    run("--input_file", ARTICLES, "--objective", "masked", "--model_dir", tmp_path / "t")
    assert digests(tmp_path / "t") == digests(folder)
    record = json.loads((folder / "lmscripts_tokenizer.json").read_text())
    assert set(record["settings"]) == {"size", "min_frequency", "limit_alphabet", "num_unused", "multiple"}
    assert "objective" not in record


def test_folder_loads_without_this_package(older):
    """Plain transformers, no network, this package not importable."""
    program = (
        "import sys; sys.modules['lmscripts'] = None\n"
        "from transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(type(tokenizer).__name__, tokenizer('東京', '大阪')['token_type_ids'][-1], tokenizer.pad_token_id)"
    )
    command = [sys.executable, "-c", program, str(older[0] / "share" / "tokenizer")]
    output = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert output.stdout.split() == ["BertJapaneseTokenizer", "1", "0"], output.stderr


def test_splits_and_processes_do_not_matter(older, tmp_path):
    vocabulary = older[0] / "share" / "tokenizer"
    options = ["--input_file", ARTICLES, "--vocab_size", 32768, "--model_dir", tmp_path / "one"]
    run(*options, "--num_files", 1, PYTHONHASHSEED="7", RAYON_NUM_THREADS="1")
    assert digests(tmp_path / "one") == digests(vocabulary)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]  # the temporary splits are gone
    # The same again has nothing to do, another one is refused, and --overwrite replaces it.
    assert "holds this tokenizer already" in run(*options)
    sentence = run(*options, "--min_frequency", 3, code=2)
    assert "--overwrite" in sentence
    assert digests(tmp_path / "one") == digests(vocabulary)
    run(*options, "--min_frequency", 3, "--overwrite", "--num_files", 3)
    assert digests(tmp_path / "one") != digests(vocabulary)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_other_languages_and_kinds(tmp_path):
    english = ROOT / "sample_data" / "english.txt"
    options = ["--input_file", english, "--word_tokenizer", "whitespace", "--vocab_size", 400, "--language", "en"]
    output = run(*options, "--tokenizer_type", "sentencepiece", "--model_dir", tmp_path / "e")
    assert "--tokenizer_type sentencepiece is now --tokenizer_type unigram --character_coverage 0.9995" in output
    assert "--language has no effect" in output
    record = json.loads((tmp_path / "e" / "lmscripts_tokenizer.json").read_text(encoding="utf-8"))
    assert (record["tokenizer_type"], record["settings"]["character_coverage"]) == ("unigram", 0.9995)
    joined = [*options, "--spm_model_type", "bpe", "--model_dir", tmp_path / "j"]
    assert "sentencepiece_bpe" in run(*joined, "--tokenizer_type", "sentencepiece", code=2)
    run(*joined[:-4], *joined[-2:], "--tokenizer_type", "sentencepiece_bpe", "--character_coverage", 0.9995)
    record = json.loads((tmp_path / "j" / "lmscripts_tokenizer.json").read_text(encoding="utf-8"))
    assert (record["tokenizer_type"], record["settings"]["character_coverage"]) == ("sentencepiece_bpe", 0.9995)
    assert "further [unusedN] fill the vocabulary up to a multiple of 64; --pad_vocab_to_multiple_of 0" in output
    assert (tmp_path / "e" / "tokenizer.json").exists()
    table = tmp_path / "texts.csv"
    table.write_text("body,id\n" + "NA is text,1\nand null too,2\n" * 30)
    options = ["--input_file", table, "--text_column", "body", "--word_tokenizer", "none", "--tokenizer_type", "bpe"]
    assert "60 documents" in run(*options, "--vocab_size", 300, "--model_dir", tmp_path / "c")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--vocab_size", "12"], "no room"),
        (["--tokenizer_type", "bpe"], "byte-level BPE"),
        (["--mecab_dic", "naist"], "ipadic, unidic_lite, unidic or a folder"),
        (["--mecab_dic", "ipadic", "--word_tokenizer", "none"], "--mecab_dic has no effect"),
        (["--sudachi_split_mode", "C"], "--sudachi_split_mode has no effect"),
        (["--tokenizer_type", "unigram", "--min_frequency", "5"], "--min_frequency has no effect"),
        (["--tokenizer_type", "sentencepiece_bpe", "--min_frequency", "5"], "--min_frequency has no effect"),
        (["--text_column", "body"], "--text_column has no effect"),
        (["--num_files", "-1"], "--num_files must be at least 0"),
        (["--vocab_sise", "100"], "did you mean --vocab_size"),
        (["--tokenizer_type", "wordpice"], "wordpiece"),
    ],
)
def test_refusals(tmp_path, words, sentence):
    error = run("--input_file", ARTICLES, "--model_dir", tmp_path / "t", *words, code=2)
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no text"),
        (b"\n \n\n", "no text"),
        ("古い文字コードの文書です。\n".encode("cp932") * 30, "iconv"),
        (None, "does not exist"),
    ],
)
def test_hostile_files(tmp_path, content, sentence):
    path = tmp_path / "in.txt"
    if content is not None:
        path.write_bytes(content)
    error = run("--input_file", path, "--model_dir", tmp_path / "t", "--num_files", 2, code=2)
    assert sentence in error
    assert "in.txt" in error or content is not None
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("limit", "place"), [(10_000, "words/0.txt"), (120_000, "/t:")])
def test_no_room_on_the_disk(tmp_path, limit, place):
    """A limit on the size of files stands for a full disk: while segmenting, and while the tokenizer is written."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(ARTICLES.read_bytes())
    options = ["--input_file", corpus, "--model_dir", tmp_path / "t", "--intermediate_dir", tmp_path / "words"]
    options += ["--num_files", 1, "--tokenizer_type", "unigram", "--word_tokenizer", "none"]
    command = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    command += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", command, str(SCRIPT), *map(str, options)]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "File too large" in result.stderr
    assert place in result.stderr
    assert not (tmp_path / "t").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_repairs_are_printed(tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(
        "\ufeffよい文。\r\n".encode() * 30 + b"\x00\xff\r\n" + "第3四半期連結会計期間末日満期手形\n".encode()
    )
    output = run("--input_file", path, "--model_dir", tmp_path / "t", "--vocab_size", 100)
    assert "30 byte order marks" in output
    assert f"1 lines held bytes that are not UTF-8; each was replaced by U+FFFD (first at {path}:31)" in output
    assert "--mecab_dic unidic_lite" in output
    assert "四半期連結会計期間末日満期手形" in output


def test_help_is_quick():
    text, heavy = help_of(SCRIPT)
    assert "--limit_alphabet" in text
    assert not heavy


# ---- restart ----


def tasks_for(folder, num_splits, path=ARTICLES, source="s", **settings):
    plan = plan_spans([path], num_splits)
    words = WordTokenizer(**settings)
    return [SplitTask(index, tuple(spans), folder, source, words, True) for index, spans in enumerate(plan)]


def no_progress(*_):
    pass


def test_finished_splits_are_used_again(tmp_path):
    tasks = tasks_for(tmp_path, 4)
    first = write_splits(tasks, 2, no_progress)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "2.txt").write_text("cut off")
    (tmp_path / "3.json").write_text("{")
    (tmp_path / ".2.txt.0123abcd").write_text("left by a killed process")
    second = write_splits(tasks, 2, no_progress)
    assert [result.was_there for result in second] == [True, True, False, False]
    assert [result.report for result in second] == [result.report for result in first]
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] == before[name]} == {"0.txt", "0.json", "1.txt", "1.json"}
    for changed in (tasks_for(tmp_path, 4, source="t"), tasks_for(tmp_path, 4, normalization="none")):
        assert finished_split(changed[0]) is None


def test_interrupted_segmentation_goes_on(tmp_path):
    """Stopped inside the second split: the first is kept, the second leaves nothing that could be taken for it."""
    tasks = tasks_for(tmp_path, 3)
    write_split(tasks[0], no_progress)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(tasks[1], stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "0.txt"]
    results = write_splits(tasks, 1, no_progress)
    assert [result.was_there for result in results] == [True, False, False]
    whole = SplitTask(9, (Span(str(ARTICLES)),), tmp_path, "s", WordTokenizer(), True)
    write_split(whole, no_progress)
    assert "".join((tmp_path / f"{i}.txt").read_text() for i in range(3)) == (tmp_path / "9.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_and_started_again(tmp_path, number):
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(b"\n".join([ARTICLES.read_bytes()] * 45))  # the signal must find it at work
    options = ["--input_file", corpus, "--vocab_size", 2000, "--intermediate_dir", tmp_path / "words"]
    options += ["--num_files", 12, "--num_workers", 1, "--model_dir", tmp_path / "t"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    while not (tmp_path / "words" / "2.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == (2 if number == signal.SIGINT else -9)
    assert "Traceback" not in error
    assert not (tmp_path / "t").exists()
    output = run(*options)
    kept = int(re.search(r"(\d+) of 12 splits were finished by an earlier run", output).group(1))
    assert 3 <= kept < 12
    if number == signal.SIGKILL:
        run(*options[:4], "--model_dir", tmp_path / "u")
        assert digests(tmp_path / "t") == digests(tmp_path / "u")


def test_error_in_a_worker_reaches_the_user(tmp_path):
    bad = tmp_path / "bad.txt.gz"
    bad.write_bytes(b"no gzip" * 100)
    error = run(
        "--input_file", ARTICLES, bad, "--model_dir", tmp_path / "t", "--num_files", 2, "--num_workers", 2, code=2
    )
    assert "bad.txt.gz" in error


def test_numeral_runs_are_only_sought_in_ipadic(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("第3四半期連結会計期間末日満期手形\n三重県立看護大学の二大政党制\n", encoding="utf-8")
    (tmp_path / "w").mkdir()
    result = write_split(tasks_for(tmp_path / "w", 1, path)[0], no_progress)
    assert "四半期連結会計期間末日満期手形" in numeral_run_warning([result])
    pytest.importorskip("unidic_lite")
    result = write_split(tasks_for(tmp_path / "w", 1, path, dictionary="unidic_lite")[0], no_progress)
    assert numeral_run_warning([result]) is None
