"""Labelling new texts: order, folding and calibration of the model's own folder, and what cannot be answered."""

import csv
import gzip
import io
import json
import shutil
import sys
from unittest import mock

import forked
import pytest
import torch
from conftest import PATIENCE, ROOT
from test_analyze_results import run_here
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from lmscripts.data.folding import Folder, FoldSettings
from lmscripts.errors import UserError
from lmscripts.evaluation import applying
from lmscripts.models.classifier import KEY, ClassifierSettings
from lmscripts.text.records import TableOptions
from lmscripts.tokenizer.encoder import load_encoder

SCRIPT = "predict_classifier.py"
LABELS = ("料理", "宇宙", "=1+1")
TEXTS = [
    "昆布とかつお節で取る一番だしは、和食の土台としてよく知られている。",
    "",
    "星。",
    "水1リットルに対して昆布は10グラムほどが目安だ。まず昆布を水に浸し、できれば30分以上置いておく。" * 3,
    "　 ",
    "月は地球のまわりを回る。",
]


def build(folder, tokenizer_dir, settings):
    """A classifier with random weights as finetune_classifier.py saves one."""
    shutil.copytree(tokenizer_dir, folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    config = BertConfig(vocab_size=vocabulary, max_position_embeddings=64, initializer_range=0.3, **sizes)
    config.id2label, config.label2id = dict(enumerate(LABELS)), {name: n for n, name in enumerate(LABELS)}
    if settings is not None:
        setattr(config, KEY, settings.as_json())
        kind = "multi" if settings.multi_label else "single"
        config.problem_type = f"{kind}_label_classification"
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(workspace, tokenizer_dir):
    settings = ClassifierSettings(FoldSettings(max_length=16), "mean_logits", temperature=1.7)
    return build(workspace / "classifier", tokenizer_dir, settings)


def predict(*arguments, **settings):
    return list(csv.DictReader(io.StringIO(run_here(SCRIPT, *arguments, **settings).stdout)))


def from_standard_input(model_dir, text, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / SCRIPT), "--model_dir", str(model_dir), *map(str, arguments)]
    return forked.run(command, input=text, timeout=PATIENCE)


def recomputed(model_dir, text):
    """Probabilities by plain transformers: logits of the rows of 16 tokens, their mean, the temperature."""
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    (rows,) = Folder(load_encoder(model_dir), FoldSettings(max_length=16))([text])
    with torch.no_grad():
        logits = [model(torch.from_numpy(row.ids).long()[None]).logits[0] for row in rows]
    return len(rows), (torch.stack(logits).mean(0) / 1.7).softmax(0).tolist()


def test_every_text_has_its_line_in_order_folded_and_calibrated_as_the_folder_says(model_dir, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\r\n".join(TEXTS) + "\r\n", encoding="utf-8-sig")
    rows = predict("--model_dir", model_dir, "--input_file", file, "--batch_size", 3, "--texts_at_once", 2)
    assert [int(row["line"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, text in zip(rows, TEXTS, strict=True):
        shares = [row[f"probability of {name}"] for name in LABELS]
        if not text.strip():
            assert (row["label"], row["fragments"], row["note"], shares) == ("", "0", "empty text", ["", "", ""])
            continue
        number, expected = recomputed(model_dir, text)
        assert (int(row["fragments"]), row["note"]) == (number, "")
        assert list(map(float, shares)) == pytest.approx(expected, abs=2e-6)
        best = LABELS[expected.index(max(expected))]
        assert row["label"] == best
    assert int(rows[3]["fragments"]) > 2


def test_an_answer_for_a_spreadsheet_has_its_mark_once_and_no_formula(model_dir, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    outputs = []
    for more in ((), ("--spreadsheet_safe",)):
        outputs.append(run_here(SCRIPT, "--model_dir", model_dir, "--input_file", file, *more).stdout)
    exact, safe = outputs
    assert safe.startswith("\ufeffline,")
    assert safe.count("\ufeff") == 1
    assert [row["label"] for row in csv.DictReader(io.StringIO(safe))] == [
        f"'{row['label']}" if row["label"].startswith("=") else row["label"]
        for row in csv.DictReader(io.StringIO(exact))
    ]


def test_tables_json_lines_and_standard_input_are_answered_alike(model_dir, tmp_path):
    with gzip.open(tmp_path / "texts.csv.gz", "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("no", "本文"), *((f"t{number}", text) for number, text in enumerate(TEXTS))])
    table = ["--input_file", tmp_path / "texts.csv.gz", "--text", "本文", "--id_column", "no"]
    run_here(SCRIPT, "--model_dir", model_dir, *table, "--output_file", tmp_path / "out.jsonl")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["name"] for record in records] == ["t0", "t1", "t2", "t3", "t4", "t5"]
    assert [record.get("note") for record in records] == [None, "empty text", None, None, "empty text", None]
    done = from_standard_input(model_dir, "\n".join(TEXTS).encode() + b"\n\xff\xfe\n")
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert "cannot be decoded" in rows.pop()["note"]
    for row, record in zip(rows, records, strict=True):
        shares = [float(row[f"probability of {name}"]) for name in record["probabilities"]]
        assert shares == pytest.approx(list(record["probabilities"].values()), abs=2e-6)
    assert b"7 texts, 3 of them without an answer" in done.stderr


def test_rows_that_cannot_be_read_keep_their_line_and_are_told_with_the_way_out(model_dir, tmp_path):
    """Answers joined with the input by id match all that have one, whatever the id begins with."""
    rows = ["-1,星。", '=2," opened', " @3 ,月。", "+4,", "id,text", "5", '"+5",空。']
    file = tmp_path / "t.csv"
    file.write_text("\n".join(["id,text", *rows]), encoding="utf-8")
    arguments = ["--model_dir", model_dir, "--input_file", file, "--id_column", "id"]
    done = run_here(SCRIPT, *arguments)
    found = {row["line"]: (row["name"], row["note"]) for row in csv.DictReader(io.StringIO(done.stdout))}
    assert found == {
        "2": ("-1", ""), "3": ("", "stray quote"), "4": (" @3 ", ""), "5": ("+4", "empty text"),
        "6": ("", "header repeated"), "7": ("", "too few fields"), "8": ("+5", ""),
    }  # fmt: skip
    assert f"1 x stray quote, first {file}:3: the quote that opens a field in line 3" in done.stderr
    assert "--no_quotes" in done.stderr
    assert '" opened' not in run_here(SCRIPT, *arguments, "--no_quotes").stderr
    file.write_text("\n".join(["id,text", "1,星。", "text,id", "月。,2"]), encoding="utf-8")
    done = run_here(SCRIPT, *arguments, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{file}:3: the columns are named again in another order" in done.stderr


def test_several_labels_are_those_that_reach_their_thresholds(workspace, tokenizer_dir, tmp_path):
    thresholds = (0.0, 0.5, 1.0)
    settings = ClassifierSettings(FoldSettings(max_length=16), "max", 2.0, thresholds, multi_label=True, separator=";")
    folder = build(workspace / "several", tokenizer_dir, settings)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    rows = predict("--model_dir", folder, "--input_file", tmp_path / "texts.txt")
    for row in (row for row in rows if not row["note"]):
        assert row["label"] == ";".join(
            name for name, t in zip(LABELS, thresholds) if float(row[f"probability of {name}"]) >= t
        )


def test_a_folder_of_another_tool_is_used_with_defaults_and_says_so(workspace, tokenizer_dir, tmp_path):
    folder = build(workspace / "foreign", tokenizer_dir, None)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    done = run_here(SCRIPT, "--model_dir", folder, "--input_file", tmp_path / "texts.txt")
    assert KEY in done.stderr
    assert "64 tokens" in done.stderr
    assert len(done.stdout.splitlines()) == len(TEXTS) + 1


def test_a_name_on_the_hub_answers_like_its_folder(workspace, tokenizer_dir, tmp_path, monkeypatch):
    """From the cache, as without a network; nothing is read but what is there."""
    from huggingface_hub import constants

    commit = "0" * 40
    place = tmp_path / "hub" / "models--someone--topics"
    folder = build(place / "snapshots" / commit, tokenizer_dir, None)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    expected = predict("--model_dir", folder, "--input_file", tmp_path / "texts.txt")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert predict("--model_dir", "someone/topics", "--input_file", tmp_path / "texts.txt") == expected
    (folder / "config.json").unlink()
    arguments = ("--model_dir", "someone/topics", "--input_file", tmp_path / "texts.txt")
    assert "neither a folder" in run_here(SCRIPT, *arguments, check=False).stderr


def test_no_text_at_all_is_a_table_without_lines(model_dir):
    assert len(run_here(SCRIPT, "--model_dir", model_dir).stdout.splitlines()) == 1


def test_a_table_on_standard_input_is_one(model_dir, tmp_path):
    """Its header was answered as a text, and of JSON records the braces and names were judged too."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    expected = predict("--model_dir", model_dir, "--input_file", tmp_path / "texts.txt")
    tables = {"jsonl": "".join(json.dumps({"本文": text, "no": n}) + "\n" for n, text in enumerate(TEXTS))}
    for kind, mark in (("csv", ","), ("tsv", "\t")):
        text = io.StringIO()
        csv.writer(text, delimiter=mark, lineterminator="\n").writerows([("no", "本文"), *enumerate(TEXTS)])
        tables[kind] = text.getvalue()
    arguments = ("--model_dir", model_dir, "--text", "本文", "--id_column", "no")
    for kind, table in tables.items():
        rows = predict(*arguments, "--input_format", kind, standard_input=table.encode())
        for row, wanted in zip(rows, expected, strict=True):
            assert [row[name] for name in list(row)[2:]] == [wanted[name] for name in list(wanted)[1:]], kind
            assert row["name"] == str(int(wanted["line"]) - 1)
    done = run_here(SCRIPT, *arguments, "--input_format", "csv", standard_input=b"no,txt\n", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard input has no column '本文'" in done.stderr


def texts_of(given, kind="", **settings):
    stream = io.TextIOWrapper(io.BytesIO(given.encode()))
    with mock.patch.object(sys, "stdin", stream):
        return [each.text for each in applying.read_texts("-", kind, TableOptions(label="", **settings))]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"text": "星"}\n', "jsonl"),
        ('\ufeff{"id": 1, "text": "星"}\n', "jsonl"),
        ("text,label\n星,宇宙\n", "csv"),
        ('"id"; "text"\n1;星\n', "csv"),
        ("text\tlabel\n星\t宇宙\n", "tsv"),
        ("text\n星\n", "csv"),
        ("Text,label\n星,宇宙\n", "csv --text Text"),
        ("TEXT\tlabel\n星\t宇宙\n", "tsv --text TEXT"),
    ],
)
def test_what_looks_like_a_table_on_standard_input_is_asked_about(text, kind):
    with pytest.raises(UserError, match=f"--input_format {kind} .*--input_format txt"):
        texts_of(text)
    assert len(texts_of(text, "txt")) == text.count("\n")
    kind, *column = kind.split(" --text ")
    assert texts_of(text, kind, **({"text": column[0]} if column else {})) == ["星"]


def test_a_json_list_on_standard_input_is_not_one_text():
    for text in ('[{"text": "星"}]\n', ' [ {"text":\n'):
        with pytest.raises(UserError, match=r"JSON list.*--input_format jsonl.*--input_format txt"):
            texts_of(text)
        assert len(texts_of(text, "txt")) == 1


def test_standard_input_that_is_taken_for_lines_is_said_to_be(model_dir):
    """A header without the column of the texts is a line like any other, and was answered without a word."""
    said = "standard input is read as lines of text"
    for text in ("body;x\n星;1\n", "星\n"):
        done = run_here(SCRIPT, "--model_dir", model_dir, standard_input=text.encode())
        assert said in done.stderr
        assert said not in done.stdout
    asked = run_here(SCRIPT, "--model_dir", model_dir, "--input_format", "txt", standard_input="星\n".encode())
    assert said not in asked.stderr


def test_lines_that_are_no_table_are_texts():
    for text in ("a text, and more of it\nanother\n", "{x} is a set\n", "", '[1] "text"\n', "{\n", "\n星\n"):
        assert texts_of(text) == [line.strip() for line in text.splitlines()]


def test_a_stray_quote_is_text_where_quotes_are(tmp_path):
    (tmp_path / "texts.csv").write_text('text,no\n"start quote only,1\nfine,2\n', encoding="utf-8")
    texts = list(applying.read_texts(str(tmp_path / "texts.csv"), "", TableOptions(label="", quotes=False)))
    assert [(each.text, each.note) for each in texts] == [('"start quote only', ""), ("fine", "")]


@pytest.mark.parametrize(
    ("path", "kind", "given", "said"),
    [
        ("-", None, {"text": "nosuch"}, "--text nosuch has no effect on txt, .* Then give --input_format"),
        ("-", None, {"id_column": "no"}, "--id_column no has no effect on txt"),
        ("texts.txt", None, {"delimiter": ";"}, "--delimiter ; has no effect on txt, which is how texts.txt is read"),
        ("texts.jsonl", None, {"quotes": False}, "--no_quotes has no effect on jsonl"),
        ("-", "jsonl", {"delimiter": ";"}, "--delimiter ; has no effect on jsonl"),
        ("texts.parquet", None, {"encoding": "cp932"}, "--encoding cp932 has no effect on parquet"),
        ("-", None, {"encoding": "klingon"}, "no encoding .*klingon"),
        ("-", None, {"encoding": "hex"}, "no encoding .*hex"),
    ],
)
def test_options_that_would_be_ignored_are_refused(path, kind, given, said):
    with pytest.raises(UserError, match=said):
        applying.check_input_options(path, kind, given)


def test_options_that_say_something_are_taken():
    applying.check_input_options("-", None, {"encoding": "cp932"})
    applying.check_input_options("x.txt", "csv", {"delimiter": ";", "quotes": False, "text": "t", "id_column": "no"})
    applying.check_input_options("x.jsonl.gz", None, {"text": "t", "encoding": "cp932"})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--input_file", "absent.csv"], "absent.csv"),
        (["--input_file", "{tmp}/texts.csv", "--text", "txet"], "did you mean 'text'"),
        (["--input_file", "{tmp}/texts.csv", "--output_file", "{tmp}/out.csv"], "--overwrite"),
        (["--input_file", "{tmp}/texts.csv", "--output_file", "{tmp}/new.xlsx"], ".csv or .jsonl"),
        (["--input_file", "{tmp}/texts.csv", "--model_dir", "{tmp}"], "config.json"),
        (["--text", "nosuch"], "--text nosuch has no effect on txt"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_touches_nothing(arguments, sentence, model_dir, tmp_path):
    (tmp_path / "texts.csv").write_text("text,label\n星,宇宙\n", encoding="utf-8")
    (tmp_path / "out.csv").write_text("mine", encoding="utf-8")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--model_dir" not in arguments:
        arguments += ["--model_dir", model_dir]
    done = run_here(SCRIPT, *arguments, check=False)
    assert done.returncode == 2, done.stdout
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "texts.csv"]
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == "mine"


def test_a_damaged_setting_is_named(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config[KEY]["temperature"] = 0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run_here(SCRIPT, "--model_dir", tmp_path / "model", standard_input="星\n".encode(), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "temperature 0" in done.stderr


def test_json_lines_are_records_whatever_the_name_of_the_input(tmp_path):
    (tmp_path / "texts.json").write_text('{"text": "eins"}\n{"text": "zwei"}\n', encoding="utf-8")
    (tmp_path / "texts.csv.txt").write_bytes(b"PK\x03\x04 is a workbook")
    table = TableOptions(label="")
    read = [each.text for each in applying.read_texts(str(tmp_path / "texts.json"), "", table)]
    assert read == ["eins", "zwei"]
    assert len(list(applying.read_texts(str(tmp_path / "texts.json"), "txt", table))) == 2
    with pytest.raises(UserError, match="is an office file"):
        next(applying.read_texts(str(tmp_path / "texts.csv.txt"), "", table))
