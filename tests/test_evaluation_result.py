"""evaluate_lm.py in this process: where a result may go, that none is lost, and what is said of the numbers."""

import errno
import io
import json
import os
import runpy
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_analyze_results import run_here
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lmscripts.data.packing import Layout, open_rows
from lmscripts.data.token_store import Part
from lmscripts.errors import UserError
from lmscripts.evaluation.result import as_json, check_output, remarks, table
from lmscripts.evaluation.sums import SHORTEST_ROW, text_facts
from lmscripts.files import check_writable, write_text
from lmscripts.text.records import corpus_table

OLDER = dict.fromkeys(("model", "untrained", "untrained_because", "text", "metrics", "counts", "options", "versions"))


@pytest.fixture(autouse=True)
def signals():
    """The script takes signals for itself; here they belong to the tests."""
    kinds = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(kind) for kind in kinds]
    yield
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny decoder that knows the words w1 to w40, and whose weights are not as initialisation leaves them."""
    folder = tmp_path_factory.mktemp("models") / "モデル"
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n + 2 for n in range(1, 41)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=32, vocab_size=len(words)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "held_out.txt"
    file.write_text("w1 w2 w3\nw4 w5\n\nw6 w7 w8\n", encoding="utf-8")
    return file


def evaluate(model, *inputs, output=None, more=(), check=True):
    arguments = ["--model_dir", model, "--input_file", *inputs, *more]
    done = run_here("evaluate_lm.py", *arguments, *([] if output is None else ["--output_file", output]), check=check)
    return done, json.loads(output.read_text(encoding="utf-8")) if output is not None and not done.returncode else None


# ---- where it goes -----------------------------------------------------------------------------------------------


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("before", encoding="utf-8")
    target.chmod(0o640)
    link.symlink_to("target.json")
    write_text(link, "after")
    assert os.readlink(link) == "target.json"
    assert target.read_text(encoding="utf-8") == "after"
    assert target.stat().st_mode & 0o777 == 0o640
    target.unlink()
    write_text(link, "new")
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "target.json"]


def test_half_characters_are_escaped_as_json_has_them(tmp_path):
    values = {"モデル": os.fsdecode(b"caf\xe9.txt")}
    write_text(tmp_path / "result.json", json.dumps(values, ensure_ascii=False))
    written = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert "モデル" in written
    assert json.loads(written) == values


def test_what_is_no_file_is_never_replaced(tmp_path):
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to(pipe)
    for path in (pipe, folder, link):
        for refuse in (lambda path: write_text(path, "x"), check_writable, lambda path: check_output(str(path), [])):
            with pytest.raises(UserError, match=r"is a folder|is a device, a pipe or a socket"):
                refuse(path)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]


def test_names_as_long_as_they_can_be(tmp_path):
    longest = tmp_path / ("x" * 250 + ".json")
    assert check_output(str(longest), []) == longest
    write_text(longest, "{}")
    assert longest.read_text(encoding="utf-8") == "{}"
    with pytest.raises(UserError, match=r"--output_file .* cannot be written: File name too long"):
        check_output(str(tmp_path / ("x" * 251 + ".json")), [])
    with pytest.raises(UserError, match=r"cannot be written: .*nowhere is no folder"):
        check_output(str(tmp_path / "nowhere" / "result.json"), [])


@pytest.mark.parametrize("content", ["", as_json({}), json.dumps(OLDER)])
def test_an_earlier_result_may_be_replaced(tmp_path, content):
    file = tmp_path / "result.json"
    file.write_text(content, encoding="utf-8")
    assert check_output(str(file), []) == file
    assert file.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "content", ["text", "[]", "{}", '{"model_type": "gpt2"}', '{"format": 3}', "[" * 100_000, "\xff"]
)
def test_anything_else_may_not(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="exists and is not an earlier result"):
        check_output(str(file), [])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_neither_the_text_nor_the_model_is_replaced(gpt2, text, tmp_path):
    link = tmp_path / "result.json"
    link.symlink_to(text)
    before = text.read_bytes(), (gpt2 / "config.json").read_bytes()
    for output, reason in (
        (text, "is the input"),
        (link, "is the input"),
        (gpt2 / "config.json", "is not an earlier result"),
    ):
        done, _ = evaluate(gpt2, text, output=output, check=False)
        assert done.returncode == 2
        assert reason in done.stderr
    assert (text.read_bytes(), (gpt2 / "config.json").read_bytes()) == before


# ---- no result is lost -------------------------------------------------------------------------------------------


def printing_to(stream, *arguments):
    """Run the script with a standard output of its own; returns its exit code and what it wrote to standard error."""
    words, errors = [str(ROOT / "scripts" / "evaluate_lm.py"), *map(str, arguments)], io.StringIO()
    with mock.patch.multiple(sys, argv=words, stdout=stream, stderr=errors), pytest.raises(SystemExit) as ended:
        runpy.run_path(words[0], run_name="__main__")
    return ended.value.code, errors.getvalue()


def test_a_reader_that_has_gone_costs_nothing(gpt2, text, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    output = tmp_path / "result.json"
    with open(writing, "w", encoding="utf-8") as stream:
        assert printing_to(stream, "--model_dir", gpt2, "--input_file", text, "--output_file", output) == (0, "")
    assert json.loads(output.read_text(encoding="utf-8"))["metrics"]["loss"] > 0


def test_names_that_a_terminal_cannot_show_cost_nothing(gpt2, text, tmp_path):
    output, shown = tmp_path / "結果.json", io.BytesIO()
    with io.TextIOWrapper(shown, encoding="ascii") as stream:
        assert printing_to(stream, "--model_dir", gpt2, "--input_file", text, "--output_file", output) == (0, "")
        assert b"\\u30e2\\u30c7\\u30eb: gpt2" in shown.getvalue()
        assert b"\\u7d50\\u679c.json" in shown.getvalue()
    assert "モデル" in output.read_text(encoding="utf-8")


def test_names_that_are_not_utf8_come_back_from_the_result(gpt2, text, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    text.rename(odd)
    _, result = evaluate(gpt2, odd, output=tmp_path / "result.json")
    assert os.fsencode(result["text"][0]["file"]) == b"caf\xe9.txt"


def test_a_result_that_cannot_be_written_is_printed_at_least(gpt2, text, tmp_path):
    (folder := tmp_path / "results").mkdir()
    (output := folder / "result.json").write_text(as_json({}), encoding="utf-8")
    with mock.patch("os.fchmod", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        done, _ = evaluate(gpt2, text, output=output, check=False)
    assert done.returncode == 2
    assert "result.json: No space left on device" in done.stderr
    assert "bits per byte" in done.stdout
    assert output.read_text(encoding="utf-8") == as_json({})
    assert list(folder.iterdir()) == [output]


# ---- what is said ------------------------------------------------------------------------------------------------


def test_unknown_tokens_are_counted_and_named(gpt2, text, tmp_path):
    done, result = evaluate(gpt2, text, output=tmp_path / "known.json")
    assert result["counts"]["unknown_tokens"] == result["metrics"]["unknown_share"] == 0
    assert "does not know" not in done.stdout
    text.write_text("w1 w2 吾輩 は 猫 w3\n", encoding="utf-8")
    done, result = evaluate(gpt2, text, output=tmp_path / "unknown.json")
    assert result["counts"]["unknown_tokens"] == 3
    assert result["metrics"]["unknown_share"] == 3 / 7
    assert "3 of the 7 scored tokens (42.86%) stand for text that the tokenizer does not know" in done.stdout
    assert "bits per byte and bits per text byte and accuracy of this text cannot be compared" in done.stdout


def test_what_was_repaired_and_left_out_is_told(gpt2, tmp_path):
    lines = ['{"text": "w1 w2 w3"}', *['{"text": "w1'] * 49, '{"text": "w1\\u0000 \\ud83d w2"}', '{"text": " "}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done, result = evaluate(gpt2, tmp_path / "bad.jsonl", output=tmp_path / "result.json")
    assert "49 records could not be read and were left out (first at " in done.stdout
    assert "1 records had no text and were left out" in done.stdout
    assert "1 NUL characters were removed" in done.stdout
    changes = result["text_report"]["changes"]
    assert changes["bad_records_dropped"] == 49
    assert result["text_report"]["documents"] == result["counts"]["documents"] == 2
    (tmp_path / "worse.jsonl").write_text('{"text": " "}\n' + '{"text": "w1\n' * 49, encoding="utf-8")
    done, _ = evaluate(gpt2, tmp_path / "worse.jsonl", check=False)
    assert done.returncode == 2
    assert "holds no text: 0 bytes" in done.stderr
    assert "49 records could not be read" in done.stderr


def test_bytes_that_nobody_predicts_are_named(gpt2, text, tmp_path):
    lines = text.read_bytes().replace(b"\n\n", b"\n")
    text.write_bytes(lines)
    plain, _ = evaluate(gpt2, text)
    assert "bits per text byte by" not in plain.stdout
    text.write_bytes(lines + b"\n" * 20_000)
    done, result = evaluate(gpt2, text, output=tmp_path / "result.json")
    assert result["metrics"]["bits_per_byte"] < 0.01 * result["metrics"]["bits_per_text_byte"]
    assert "by the 20,024 bytes of the text as it was given, bits per text byte by the 24 that were read" in done.stdout


@pytest.mark.parametrize(
    ("asked", "given", "told"), [("bf16", "fp32", True), ("bf16", "bf16", False), ("no", "bf16", False)]
)
def test_the_precision_of_the_launch_is_not_passed_over(gpt2, text, monkeypatch, asked, given, told):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    done, _ = evaluate(gpt2, text, more=["--precision", given])
    assert ("the launch says mixed precision bf16; the numbers are those of --precision fp32" in done.stdout) == told


def result_of(files, column="text", **counts):
    model = {"name": "m", "type": "bert", "step": 1200, "parameters": 5, "weights_sha256": {}, "tokenizer": "t"}
    text = [{"file": name, "bytes": size} for name, size in files.items()]
    return {
        "model": model,
        "text": text,
        "options": {"text_column": column},
        "counts": {"raw_bytes": 100, "text_bytes": 90, **counts},
        "metrics": {"loss": 1.0, "accuracy": 0.5, "pseudo_accuracy": 0.25},
        "untrained": False,
    }


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({"a.txt": 1000}, "1 file, 1,000 bytes"),
        ({"a.txt.gz": 1000, "b.txt": 1}, "2 files, 1,001 bytes unpacked"),
        ({"a.jsonl": 20, "b.csv.gz": 6}, "2 files, 26 bytes in the column 'body'"),
        ({"a.parquet": 20, "b.txt": 6}, "2 files, 26 bytes (of tables: in the column 'body')"),
    ],
)
def test_the_size_of_a_text_is_called_what_it_is(files, size):
    rows = [line.split(None, 1) for line in table(result_of(files, "body")).splitlines()]
    for row in (["text", size], ["model", "m: bert, step 1,200, 5 parameters"], ["accuracy", "50.00%"]):
        assert row in rows


def test_remarks_name_the_numbers_that_they_are_about():
    assert remarks(result_of({}, masked=10, unknown_tokens=0)) == []  # bytes matter to bits per byte alone
    counts = {"masked": 10, "unknown_tokens": 2, "pseudo_tokens": 50, "pseudo_unknown_tokens": 1}
    first, second = remarks(result_of({}, **counts))
    assert first.startswith("2 of the 10 scored tokens (20.00%)")
    assert "know: accuracy of" in first
    assert second.startswith("1 of the 50 scored tokens (2.00%)")
    assert "know: pseudo accuracy of" in second


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_file_counts_once(text, tmp_path):
    link, copy = tmp_path / "link.txt", tmp_path / "copy.txt"
    link.symlink_to(text)
    copy.write_bytes(text.read_bytes())
    with pytest.raises(UserError, match=f"{text} and {link} are the same file"):
        text_facts([text, copy, link], corpus_table(), False)
    facts = text_facts([text, copy], corpus_table(), False)
    assert [fact["file"] for fact in facts] == ["held_out.txt", "copy.txt"]
    assert facts[0]["sha256"] == facts[1]["sha256"]


def test_options_of_other_forms_of_text_are_refused(text, tmp_path):
    (table_file := tmp_path / "a.jsonl").write_text('{"body": "w1"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"--text_column body has no effect: only \.txt files are given"):
        text_facts([text], corpus_table("body"), False)
    with pytest.raises(UserError, match=r"--document_per_line has no effect: no \.txt file is given"):
        text_facts([table_file], corpus_table("body"), True)
    facts = text_facts([text, table_file], corpus_table("body"), True)
    assert [fact["bytes"] for fact in facts] == [text.stat().st_size, 2]
    assert not any("format" in fact for fact in facts)
    facts = text_facts([table_file.rename(tmp_path / "a.json")], corpus_table("body"), False)
    assert [(fact["bytes"], fact["format"]) for fact in facts] == [(2, "jsonl")]


def test_the_shortest_row_is_that_of_the_packing(tmp_path):
    offsets = np.array([0, 20])
    part = Part(
        tmp_path,
        np.zeros(20, np.uint16),
        np.full(3, 255, np.uint8),
        np.zeros(0, np.uint32),
        offsets,
        offsets,
        offsets[1:],
    )
    store = SimpleNamespace(part=lambda name: part, fingerprint="", folder=tmp_path)
    for size in (SHORTEST_ROW, SHORTEST_ROW - 1):
        layout = Layout(size, "isolated", 2, 3, 0)
        if size == SHORTEST_ROW:
            assert open_rows(store, "train", layout).num_rows == 3
        else:
            with pytest.raises(UserError, match="too short"):
                open_rows(store, "train", layout)
