"""Hostile input to whole commands: handled and counted, or one sentence and exit code 2; nothing lost."""

import gzip
import io
import json
import lzma
import os
import random
import resource
import shutil
import tarfile
import zipfile

import pytest
from conftest import SAMPLE, TINY_PRESET, run_script

from lmscripts.data.preparation import Source, prepare_store
from lmscripts.errors import UserError

TEXT = (SAMPLE / "articles.txt").read_text(encoding="utf-8")
FEW = TEXT[: TEXT.index("\n\n", 4000)] + "\n"


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} if folder.exists() else {}


def sentence_of(done):
    """The one sentence of a refusal."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


def prepare(tokenizer_dir, output, *more, check=False, **settings):
    return run_script(
        "prepare_corpus.py",
        *("--tokenizer_dir", tokenizer_dir, "--output_dir", output, "--num_workers", 1, *more),
        check=check,
        **settings,
    )


# ---- text that is repaired and counted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("invalid UTF-8", FEW.encode() + b"\xe3\x81 broken \xff here\n", "1 lines held bytes that are not UTF-8"),
        ("NUL bytes", FEW.replace("。", "。\0", 3).encode(), "3 NUL characters were removed"),
        ("CRLF", FEW.replace("\n", "\r\n").encode(), None),
        ("CR", FEW.replace("\n", "\r").encode(), None),
        ("BOM", b"\xef\xbb\xbf" + FEW.encode(), "1 byte order marks"),
        ("control characters", FEW.replace("、", "、\x07", 2).encode(), "2 control characters"),
        ("no newline at the end", FEW.rstrip().encode(), None),
        ("many blank lines", ("\n\n\n" + FEW.replace("\n\n", "\n\n\n\n") + "\n\n").encode(), None),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 25 else "",
)
def test_repaired_text_gives_the_clean_text(name, data, said, tokenizer_dir, tmp_path):
    (tmp_path / "clean.txt").write_text(FEW, encoding="utf-8")
    (tmp_path / "dirty.txt").write_bytes(data)
    stores = {}
    for kind in ("clean", "dirty"):
        done = prepare(tokenizer_dir, tmp_path / kind, "--input_file", tmp_path / f"{kind}.txt", check=True)
        stores[kind] = (done.stdout, (tmp_path / kind / "train" / "tokens.bin").read_bytes())
    assert said is None or said in stores["dirty"][0]
    if name not in ("invalid UTF-8", "control characters"):  # these add a line, and spaces between words
        assert stores["clean"][1] == stores["dirty"][1]


def test_one_line_of_50_megabytes_is_cut_and_memory_stays_small(tokenizer_dir, tmp_path):
    line = FEW.replace("\n", "")
    with open(tmp_path / "long.txt", "w", encoding="utf-8") as file:
        for _ in range(50_000_000 // len(line.encode())):
            file.write(line)

    def limit():  # 4 GB of addresses: a reader that holds the line in several copies passes it
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    import subprocess
    import sys

    program = (
        "from lmscripts.text.corpus import *\n"
        "from lmscripts.text.report import TextReport\n"
        f"report = TextReport()\nn = sum(len(l) for d in read_documents([Span({str(tmp_path / 'long.txt')!r})], report)"
        " for l in d)\n"
        # Not ru_maxrss: that of a forked process begins with what its parent held, here all that pytest has loaded.
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(n, report.changes['long_lines_cut'], peak)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, preexec_fn=limit)
    characters, cuts, kilobytes = map(int, done.stdout.split())
    assert characters == (tmp_path / "long.txt").stat().st_size // len(line.encode()) * len(line)
    assert cuts >= 47
    assert kilobytes < 400_000


# ---- texts of every kind, each through a whole store -------------------------------------------------------------


def halves(character):
    """A character beyond U+FFFF as Java writes it."""
    code = ord(character) - 0x10000
    pair = (0xD800 + (code >> 10), 0xDC00 + (code & 0x3FF))
    return b"".join(chr(half).encode("utf-8", "surrogatepass") for half in pair)


def archive(*names):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in names:
            file.writestr(name, FEW)
    return packed.getvalue()


def tar():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        file.add(SAMPLE / "english.txt", "english.txt")
    return packed.getvalue()


def around(line):
    """A text in the midst of which a line stands."""
    return f"{FEW}\n{line}\n\n{FEW}".encode()


NOISE = random.Random(7)
RECORDS = [{"text": line} for line in FEW.split("\n")[:6] if line]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
SCRIPTS = {
    "Thai": "ภาษาไทยเขียนติดกัน",
    "runes": "ᚠᚢᚦᚨᚱᚲ",
    "Hangul": "한국어는재미있다",
    "Arabic": "العربيةجميلة",
    "Devanagari": "हिन्दीभाषा",
    "emoji": "😀👨‍👩‍👧‍👦🏳️‍🌈",
    "Egyptian": "𓀀𓁀𓂀",
    "private": "\ue000\uf8ff",
    "combining": "e\u0301" * 9,
    "marks alone": "\u0301" * 40,
    "bidi": "\u202eabc\u202c def",
    "tags": "a\U000e0041b",
    "noncharacters": "\ufffe\uffff\U0010ffff",
    "replaced": "\ufffd" * 30,
    "half width": "ﾊﾝｶｸｶﾅ",
    "full width": "ＡＢＣ１２３",
    "expands": "\ufdfa" * 20,
    "kanji beyond": "𠮷𩸽葛\U000e0100",
}
LONG = {
    "letters": "ab" * 60_000,
    "digits": "9" * 120_000,
    "base64": "".join(NOISE.choices("ABCDwxyz0189+/", k=150_000)),
    "kana": "あ" * 50_000,
    "kanji": "漢" * 50_000,
    "no space": FEW.replace("\n", "") * 40,
    "spaces": "a" + " " * 70_000 + "b",
    "full-width spaces": "a" + "\u3000" * 70_000 + "b",
    "marks": "。" * 50_000,
    "word": "x" * 101,
    "emoji": "😀" * 30_000,
}
SPECIAL = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "［ＭＡＳＫ］",
    "[mask]",
    "[MASK][MASK]",
    "##[SEP]",
    "[ MASK ]",
    "[SEP",
]
UNSEEN = ["\u200b", "\u2060", "\u200c\u200d", "\u00ad", "\u3164", "\u200e\u200f", "\u200b \u200b"]
# name of the file -> its content, and what its refusal says
REFUSED = {
    **{
        f"{code}.txt": (TEXT.encode(code, "ignore"), f"iconv -f {code} ")
        for code in (
            "utf-16-le",
            "utf-16-be",
            "utf-32-le",
            "utf-32-be",
            "utf-16",
            "utf-32",
            "cp932",
            "euc-jp",
            "iso-2022-jp",
        )
    },
    "a b.txt": (TEXT.encode("utf-16-le"), "a b.txt' > '"),
    "$(x).txt": (TEXT.encode("utf-16-be"), "$(x).txt'"),
    "nothing.txt": (b"", "is empty"),
    "nothing.txt.gz": (gzip.compress(b""), "is empty"),
    "nothing.jsonl": (b"", "is empty"),
    "blank.txt": (b" \n\t\n\r\n", "is empty"),
    "unseen.txt": ("\u200b\n\u2060\n".encode(), "invisible"),
    "header.csv": (b"text,id\n", "is empty"),
    "zero.csv": (b"", "is empty"),
    "column.csv": (b"body\nx\n", "no column 'text'"),
    "zip.txt": (archive("a.txt"), "zip archive"),
    "zip.csv": (archive("a.xml"), "zip archive"),
    "none.zip": (archive(), "zip"),
    "tar.txt": (tar(), "tar archive"),
    "a.tar.gz": (gzip.compress(tar()), "tar archive"),
    "gz.txt": (gzip.compress(FEW.encode()), "packed with gzip"),
    "cut.txt.xz": (lzma.compress(FEW.encode())[:-9], "cut off"),
    "plain.txt.gz": (FEW.encode(), "damaged"),
    "pdf.txt": (b"%PDF-1.7\n" + bytes(99), "PDF"),
    "zeros.txt": (bytes(999), "no text"),
    "png.txt": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20, "no text"),
    "noise.txt": (NOISE.randbytes(9000), "no text"),
    "array.jsonl": (b"[" + LINES.strip().replace(b"\n", b",\n") + b"]", "one JSON array"),
    "array.json": (json.dumps(RECORDS, indent=1).encode(), "one JSON array"),
    "strings.json": (b'["a", "b"]', "{text: .}"),
    "object.json": (json.dumps({"text": FEW}, indent=1).encode(), "one JSON object"),
    "html.txt": (b"<!DOCTYPE html><p>x", "markup"),
    "lists.jsonl": (b"[1]\n[2]\n", "2 x no JSON record"),
    "numbers.jsonl": (b"1\n2\n", "no JSON record"),
    "other.jsonl": (b'{"body": "x"}\n', "no column 'text'"),
    "nulls.jsonl": (b'{"text": null}\n' * 3, "3 records had no text"),
    "deep.jsonl": (b'{"text": ' + b"[" * 90_000 + b"\n", "no JSON record"),
    "fake.parquet": (b"PAR1" + bytes(64), "fake.parquet"),
}
# name of the file -> its content, and what is counted
READ = {
    **{f"script {name}.txt": (around(line), {}) for name, line in SCRIPTS.items()},
    **{f"long {name}.txt": (around(line), {}) for name, line in LONG.items()},
    **{f"special {n}.txt": (around(f"{x}と{x}です。{x} {x}"), {}) for n, x in enumerate(SPECIAL)},
    **{f"unseen {n}.txt": (around(x), {"invisible_lines": 1}) for n, x in enumerate(UNSEEN)},
    "halves.txt": (around("笑") + halves("😀") * 3, {"joined_halves": 3}),
    "half.jsonl": (LINES + b'{"text": "\\ud83d x"}\n', {"half_characters": 1}),
    "pair.jsonl": (LINES + b'{"text": "\\ud83d\\ude00"}\n', {}),
    "marks.txt": (b"\xef\xbb\xbf" + FEW.encode() + b"\n\xef\xbb\xbf" + FEW.encode(), {"byte_order_marks": 2}),
    "records.json": (LINES, {"json_lines_files": 1}),
    "records.txt": (LINES, {"json_lines_files": 1}),
    "cr.csv": (b"text,id\none\rtwo,1\nthree,2\n", {}),
    "mac.csv": (b"text,id\rone,1\rtwo,2\r", {}),
    "twice.csv": (b"text\none\ntext\ntwo\n", {"bad_records_dropped": 1}),
    "wide.csv": (b"text,id\n" + b"x y " * 50_000 + b",1\n", {}),
    "stray.csv": (b'text,id\n"one,1\ntwo,2\n', {"bad_records_dropped": 1}),
    "mixed.txt": (b"a\rb\r\nc\n\rd", {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_text_that_is_refused_by_what_it_is(name, tokenizer_dir, tmp_path):
    data, words = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as refusal:
        prepare_store(Source((str(tmp_path / name),), tokenizer_dir, validation_fraction=0.0), tmp_path / "store", 1)
    assert words in str(refusal.value)
    assert name in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", READ)
def test_text_that_is_read_with_all_that_was_done_to_it(name, tokenizer_dir, tmp_path):
    data, changes = READ[name]
    (tmp_path / name).write_bytes(data)
    store = prepare_store(
        Source((str(tmp_path / name),), tokenizer_dir, validation_fraction=0.0), tmp_path / "store", 1
    )
    assert store.manifest["text"]["changes"] == changes
    facts = store.manifest["parts"]["train"]
    assert 0 <= facts["unknown_characters"] <= facts["characters"]
    assert not {0, 2, 3, 4}.intersection(store.part("train").tokens.tolist())  # no text gives a special token


# ---- text that is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.txt", b"", ["txt is empty"]),
        ("blank.txt", b"\n  \n\n\t\n" * 50, ["txt is empty"]),
        ("sjis.txt", FEW.encode("cp932", "ignore"), ["sjis.txt", "iconv"]),
        ("utf16.txt", FEW.encode("utf-16"), ["utf16.txt", "iconv"]),
        ("cut.txt.gz", gzip.compress(FEW.encode(), mtime=0)[:-200], ["cut.txt.gz"]),
        ("text.docx", b"PK\x03\x04" + bytes(range(1, 256)) * 40, ["text.docx"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_text_is_refused_by_name(name, data, words, tokenizer_dir, tmp_path):
    (tmp_path / name).write_bytes(data)
    sentence = sentence_of(prepare(tokenizer_dir, tmp_path / "store", "--input_file", tmp_path / name))
    assert all(word in sentence for word in words), sentence
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_missing_file_and_missing_tokenizer(tokenizer_dir, tmp_path):
    sentence = sentence_of(prepare(tokenizer_dir, tmp_path / "store", "--input_file", tmp_path / "nowhere.txt"))
    assert "nowhere.txt" in sentence
    sentence = sentence_of(prepare(tmp_path / "no_tokenizer", tmp_path / "s", "--input_file", SAMPLE / "articles.txt"))
    assert "no_tokenizer" in sentence


# What root has to give up to be refused like anybody else.
ORDINARY = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


@pytest.mark.skipif(
    bool(ORDINARY) and shutil.which("setpriv") is None, reason="runs for ordinary users or with setpriv"
)
def test_directory_without_read_permission(tokenizer_dir, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "a.txt").write_text(FEW, encoding="utf-8")
    closed.chmod(0)
    try:
        sentence = sentence_of(prepare(tokenizer_dir, tmp_path / "store", "--input_file", closed, prefix=ORDINARY))
    finally:
        closed.chmod(0o700)
    assert "closed" in sentence


def test_used_output_folder_keeps_its_content(tokenizer_dir, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("ten years of work", encoding="utf-8")
    before = contents(used)
    assert "used" in sentence_of(prepare(tokenizer_dir, used, "--input_file", SAMPLE / "articles.txt"))
    arguments = ["--input_file", SAMPLE / "articles.txt", "--model_dir", used, "--vocab_size", 1000]
    assert "used" in sentence_of(run_script("train_tokenizer.py", *arguments, check=False))
    assert contents(used) == before


def test_vocabulary_larger_than_the_text_supports(tmp_path):
    (tmp_path / "small.txt").write_text(FEW, encoding="utf-8")
    arguments = ["--input_file", tmp_path / "small.txt", "--model_dir", tmp_path / "tokenizer"]
    done = run_script("train_tokenizer.py", *arguments, "--vocab_size", "100000")
    assert "not 100,0" in done.stdout
    size = len((tmp_path / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").splitlines())
    assert f"{size:,}" in done.stdout
    assert size % 64 == 0


# ---- runs that are refused ---------------------------------------------------------------------------------------


@pytest.fixture
def run(store_dir, tmp_path):
    """Starts a run of a tiny preset, with changes to the preset and more arguments."""

    def start(*more, preset=None, check=False, **settings):
        file = tmp_path / "presets.json"
        file.write_text(json.dumps({"bert-test": {**TINY_PRESET, **(preset or {})}}), encoding="utf-8")
        arguments = ["--parameter_file", file, "--model_dir", tmp_path / "run", "--tracker", "none"]
        if "--model_type" not in more:
            arguments += ["--model_type", "bert-test"]
        if "--dataset_dir" not in more:
            arguments += ["--dataset_dir", store_dir]
        return run_script("run_pretraining.py", *arguments, *more, check=check, **settings)

    return start


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model_type", "bert-tset"], ["bert-tset", "bert-test"]),
        (["--lerning_rate", "1"], ["lerning_rate", "learning_rate"]),
        (["--learning_rate", "fast"], ["learning_rate", "fast"]),
        (["--packing", "tight"], ["packing", "tight", "isolated"]),
        (["--mask_probability", "1.5"], ["mask_probability", "1.5"]),
        (["--sequence_length", "6"], ["6"]),
        (["--max_time", "soon"], ["soon"]),
        (["--process_shares", "1", "1"], ["2 process shares", "1 processes"]),
        (["--fp16_type", "1"], ["fp16", "CPU"]),
        (["--expected_processes", "4"], ["4 processes", "1 were"]),
        (["--mecab_dic", "unidic"], ["unidic", "ipadic"]),
        (["--batch_size", "0"], ["batch_size", "0"]),
        (["--micro_batch_size", "-3"], ["micro_batch_size", "-3"]),
        (["--max_steps", "0"], ["max_steps", "0"]),
        (["--max_steps", "10", "--epochs", "1"], ["max_steps", "epochs"]),
        (["--decay_steps", "5"], ["decay_steps", "wsd"]),
        (["--attention", "varlen", "--attention_dropout", "0.1"], ["varlen", "0.1"]),
        (["--input_file", "x.txt"], ["dataset_dir", "input_file"]),
        (["--validation_fraction", "0.1"], ["validation_fraction", "dataset_dir"]),
        (["--hidden_dropout", "1.5"], ["hidden_dropout", "1.5"]),
        (["--process_shares", "0"], ["process_shares", "0"]),
        (["--beta1", "1.0"], ["beta1", "1.0"]),
        (["--warmup_steps", "-5"], ["warmup_steps", "-5"]),
        (["--schedule", "wsd", "--decay_steps", "20", "--max_steps", "10"], ["20", "10"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_wrong_options_are_named(run, tmp_path, more, words):
    sentence = sentence_of(run(*more))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


def test_unknown_and_missing_keys_of_a_preset_are_named_together(run, tmp_path):
    file = tmp_path / "presets.json"
    preset = {**TINY_PRESET, "lerning-rate": 1, "batchsize": 3}
    del preset["learning-rate"]
    sentence = sentence_of(run(preset={"lerning-rate": 1, "batchsize": 3}))
    assert "lerning-rate" in sentence
    assert "batchsize" in sentence
    file.write_text(json.dumps({"bert-test": preset}), encoding="utf-8")
    done = run_script(
        "run_pretraining.py",
        *("--parameter_file", file, "--model_type", "bert-test", "--model_dir", tmp_path / "run", "--dataset_dir", "x"),
        check=False,
    )
    sentence = sentence_of(done)
    assert all(word in sentence for word in ("lerning-rate", "batchsize", "learning-rate"))


def test_batch_that_does_not_divide_is_planned_and_trained(run):
    done = run("--batch_size", "7", "--micro_batch_size", "3", "--max_steps", "2", check=True)
    assert "rows of a step [7]" in done.stdout


def test_store_of_another_tokenizer(run, tmp_path):
    other = tmp_path / "other"
    arguments = ["--input_file", SAMPLE / "articles.txt", "--model_dir", other, "--vocab_size", "1500"]
    run_script("train_tokenizer.py", *arguments)
    sentence = sentence_of(run("--tokenizer_dir", other))
    assert "was made with the tokenizer" in sentence


def test_truncated_store(run, store_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(store_dir, broken)
    file = broken / "train" / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-10])
    assert "tokens.bin" in sentence_of(run("--dataset_dir", broken))
    (broken / "manifest.json").write_text("{", encoding="utf-8")
    assert "manifest.json" in sentence_of(run("--dataset_dir", broken))


def test_used_run_folder_and_other_settings(run, tmp_path):
    run("--max_steps", "2", "--logging_steps", "100", check=True)
    before = contents(tmp_path / "run")
    assert "--do_continue" in sentence_of(run("--max_steps", "2"))
    sentence = sentence_of(run("--max_steps", "4", "--do_continue", "--seed", "7"))
    assert "seed: 42 then, 7 now" in sentence
    sentence = sentence_of(run("--max_steps", "4", "--do_continue", "--weight_decay", "0.5"))
    assert "weight_decay: 0.01 then, 0.5 now" in sentence
    assert contents(tmp_path / "run") == before


def test_text_that_the_tokenizer_does_not_know(run, tokenizer_dir, tmp_path):
    """The share of its characters stands in table, manifest and plan; training asks before it learns that."""
    runes = "".join(chr(0x16A0 + 7 * n % 75) + " " * (n % 6 == 5) for n in range(6000))
    (tmp_path / "runes.txt").write_text("\n\n".join(runes[n : n + 60] for n in range(0, 6000, 60)), encoding="utf-8")
    done = prepare(tokenizer_dir, tmp_path / "store", "--input_file", tmp_path / "runes.txt", check=True)
    assert "warning: 100.0% of the characters are unknown" in done.stdout
    part = json.loads((tmp_path / "store" / "manifest.json").read_text(encoding="utf-8"))["parts"]["train"]
    assert part["unknown_characters"] == part["characters"] > 4000
    more = ("--dataset_dir", tmp_path / "store", "--max_steps", 1)
    sentence = sentence_of(run(*more))
    assert "100.0% of the characters" in sentence
    assert "--max_unknown_share 0.5" in sentence
    done = run(*more, "--max_unknown_share", 1, "--dry_run", check=True)
    assert "100.00% of the characters of the text; warning" in done.stdout


@pytest.mark.slow
def test_accumulation_in_the_accelerate_config(run):
    sentence = sentence_of(run(env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}))
    assert "gradient_accumulation_steps is 8" in sentence


def test_options_beside_inspect(store_dir):
    done = run_script("prepare_corpus.py", "--inspect", store_dir, "--num_workers", "2", check=False)
    assert "--num_workers has no effect with --inspect" in sentence_of(done)


def test_frozen_layers_are_not_ignored(run):
    assert "layers that were never trained" in sentence_of(run(preset={"frozen-layers": 1}))


def test_disk_that_fills_up_while_saving(run, tmp_path):
    """No file may grow past 300 kB after the first checkpoint: as good as a full disk, for any user."""
    run("--max_steps", "8", "--stop_at_step", "2", check=True)
    before = contents(tmp_path / "run" / "checkpoint-2")
    import subprocess
    import sys

    from conftest import ROOT

    command = [sys.executable, str(ROOT / "scripts" / "run_pretraining.py"), "--model_dir", str(tmp_path / "run")]
    command += ["--config", str(tmp_path / "run" / "config.yaml"), "--do_continue", "--stop_at_step", "6"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert "could not save" in sentence_of(done)
    assert "bytes are free" in done.stderr
    assert contents(tmp_path / "run" / "checkpoint-2") == before
    assert not any(path.name.startswith(".checkpoint") for path in (tmp_path / "run").iterdir())
    done = run("--max_steps", "8", "--do_continue", check=True)
    assert "the model is in" in done.stdout


def test_a_tokenizer_of_the_hub_comes_from_its_cache(tmp_path, tokenizer_dir):
    """As it lies there after somebody asked for it once; another name is refused without asking the network."""
    snapshot = tmp_path / "hub" / "models--someone--tokenizer" / "snapshots" / "abc"
    shutil.copytree(tokenizer_dir, snapshot)
    (tmp_path / "hub" / "models--someone--tokenizer" / "refs").mkdir()
    (tmp_path / "hub" / "models--someone--tokenizer" / "refs" / "main").write_text("abc")
    arguments = ["--input_file", SAMPLE / "english.txt", "--output_dir", tmp_path / "store"]
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run_script("prepare_corpus.py", *arguments, "--tokenizer_dir", "someone/tokenizer", env=env)
    assert (tmp_path / "store" / "tokenizer" / "vocab.txt").is_file()
    done = run_script("prepare_corpus.py", *arguments, "--tokenizer_dir", "nobody/tokenizer", env=env, check=False)
    assert done.returncode == 2
    assert "nobody/tokenizer is neither a folder" in done.stderr


# ---- tables, all in one process ----------------------------------------------------------------------------------

ROWS = [(f"sentence number {n} of the table", ("left", "right")[n % 2]) for n in range(20)]


def csv_of(rows=(), *, head="text,label", end="\n", before="", mark=","):
    """A good table with rows put behind it."""
    good = [mark.join(row) for row in ROWS]
    return before + end.join([head, *good, *rows]) + end


def jsonl_of(*lines):
    return "\n".join([*(json.dumps({"text": text, "label": label}) for text, label in ROWS), *lines]) + "\n"


# Name of the file, what it holds, options of reading, and what is said: of rows that are left out (their reasons), put
# right or doubted where the table is taken, or of the refusal where it begins with "!".
TABLES = [
    ("t.csv", csv_of(), {}, "2 labels: left, right"),
    ("t.csv", csv_of(end="\r\n"), {}, "2 labels: left, right"),
    ("t.csv", csv_of(end="\r"), {}, "2 labels: left, right"),
    ("t.csv", csv_of(["a,left\r", "b,right\r"]), {}, "built"),
    ("t.csv", "\ufeff" + csv_of(), {}, "built"),
    ("t.csv", csv_of(["\ufeffa,left"]), {}, "put right 1 byte order marks"),
    ("t.csv", csv_of(before="\n\n  \n"), {}, "built"),
    ("t.csv", csv_of(before="sep=,\n"), {}, "built"),
    ("t.csv", csv_of(before='"sep=;"\n', head="text;label", mark=";"), {}, "built"),
    ("t.csv", csv_of(head="text;label", mark=";"), {}, "built"),
    ("t.csv", csv_of(head="text\tlabel", mark="\t"), {}, "built"),
    ("t.csv", csv_of(head="text|label", mark="|"), {}, "built"),
    ("t.csv", csv_of(head="text#label", mark="#"), {}, "!give --text"),
    ("t.csv", csv_of(head="text#label", mark="#"), {"delimiter": "#"}, "built"),
    ("t.csv", csv_of().replace("label", "------\nlabel", 1), {}, "!no column 'label'"),
    ("t.csv", csv_of().replace("label\n", "label\n-----,----\n", 1), {}, "put right 1 lines of dashes"),
    ("t.csv", csv_of(['"open,left', "a,right"]), {}, "stray quote"),
    ("t.csv", csv_of(['"open,left', "a,right"]), {"quotes": False}, "22 documents, 0 bad rows"),
    ("t.csv", csv_of(['"a"b,left']), {}, "stray quote"),
    ("t.csv", csv_of(["a"]), {}, "too few fields"),
    ("t.csv", csv_of(["a,b,left"]), {}, "too many fields"),
    ("t.csv", csv_of([",left"]), {}, "empty text"),
    ("t.csv", csv_of(["a,"]), {}, "empty label"),
    ("t.csv", csv_of(["\0,left"]), {}, "empty text"),
    ("t.csv", csv_of(["a\0b,left"]), {}, "put right 1 nul characters"),
    ("t.csv", csv_of(["text,label"]), {}, "header repeated"),
    ("t.csv", csv_of(["TEXT,Label"]), {}, "header repeated"),
    ("t.csv", csv_of(["label,text", "left,a"]), {}, "!t.csv:22: the columns are named again in another order"),
    ("t.csv", csv_of(["a,Left", "b,Left"]), {}, "beware: 'Left' (2 rows, first t.csv:22, U+004C) and 'left'"),
    ("t.csv", csv_of(["a,le\u200bft", "b,le\u200bft"]), {}, "U+200B"),
    ("t.csv", csv_of(["a,l\u0435ft", "b,l\u0435ft"]), {}, "U+0435"),
    ("t.csv", csv_of(["a,N/A", "b,N/A"]), {}, "'N/A' (2 rows, first t.csv:22)"),
    ("t.csv", csv_of(["a,nan", "b,nan"]), {"labels": ("left", "right")}, "unknown label"),
    ("t.csv", csv_of(["a, left "]), {}, "put right 1 labels with white space around them"),
    ("t.csv", csv_of(["a,middle"]), {}, "!1 of 3 labels of 'label' have fewer than 2 rows: 'middle' (1)"),
    ("t.csv", csv_of(["a,0.5", "b,1.25"]).replace("left", "1.5").replace("right", "2"), {}, "!no regression"),
    ("t.csv", csv_of(["a,\"['left']\""]), {}, "label of the wrong kind"),
    ("t.csv", csv_of(["a,\"['left', 'right']\""]), {"separator": ","}, "put right 1 lists of labels in one cell"),
    ("t.csv", csv_of(["a,\"['left' 'right']\""]), {"separator": ","}, "label of the wrong kind"),
    ("t.csv", csv_of(['a,"{left,right}"']), {"separator": ","}, "'{left,right}'"),
    ("t.csv", csv_of(['a,"[left, right]"']), {"separator": ","}, "'[left, right]'"),
    (
        "t.csv",
        "text,left,right\n" + "a,1,0\nb,0,1\n" * 3 + "c,x,0\n",
        {"label_columns": ("left", "right")},
        "label left of the wrong kind",
    ),
    ("t.csv", csv_of(), {"label_columns": ("left",)}, "!no column 'left'"),
    ("t.csv", csv_of(), {"label_columns": ("label", "label")}, "!columns of their own"),
    ("t.csv", csv_of(), {"label": "lable"}, "!did you mean 'label'?"),
    ("t.csv", csv_of(head="text,text"), {}, "!more than once"),
    ("t.csv", csv_of(head="label,label"), {}, "!no column 'text'"),
    ("t.csv", csv_of(head="text,label,label"), {}, "!more than once"),
    ("t.csv", csv_of(), {"labels": ("left",)}, "!every row of"),
    ("t.csv", csv_of(), {"labels": ("left", "up")}, "!left out: 10 x unknown label"),
    ("t.csv", csv_of(), {"labels": ("left", "left")}, "!must differ"),
    ("t.csv", csv_of(), {"delimiter": "ab"}, "!one character"),
    ("t.csv", csv_of(), {"encoding": "hex"}, "!no encoding of text"),
    ("t.csv", csv_of().encode("utf-16"), {}, "built"),
    ("t.csv", csv_of().encode("utf-32"), {}, "built"),
    ("t.csv", csv_of().encode("utf-16-le"), {}, "!--encoding utf-16-le"),
    ("t.csv", csv_of().encode("utf-16-le"), {"encoding": "utf-16-le"}, "built"),
    ("t.csv", csv_of(["星は光る,left"]).encode("cp932"), {}, "!--encoding"),
    ("t.csv", csv_of(["星は光る,left"]).encode("cp932"), {"encoding": "cp932"}, "built"),
    ("t.csv", csv_of().encode() + b"caf\xe9,left\n", {"encoding": "utf-8"}, "cannot be decoded"),
    ("t.csv", csv_of().encode() + b"\xed\xa0\x80,left\n", {}, "!t.csv:22: byte 1"),
    ("t.csv", "", {}, "!is empty"),
    ("t.csv", "text,label\n", {}, "!no row that can be used"),
    ("t.csv", "text,label\na,left\nb,left\n", {}, "!every row"),
    ("t.csv", b"PK\x03\x04" + bytes(99), {}, "!is an office file"),
    ("t.csv", b"\xd0\xcf\x11\xe0" + bytes(99), {}, "!older office file"),
    ("t.csv", b"%PDF-1.7\n", {}, "!is a PDF"),
    ("t.csv", b"\x1f\x8b" + bytes(99), {}, "!packed with gzip"),
    ("t.csv", b"PAR1" + bytes(99), {}, "!is a parquet file"),
    ("t.csv", b"SQLite format 3\0" + bytes(99), {}, "!SQLite"),
    ("t.csv", jsonl_of(), {}, "built"),
    ("t.tsv", csv_of(head="text\tlabel", mark="\t"), {}, "built"),
    ("t.jsonl", jsonl_of(), {}, "built"),
    ("t.jsonl", jsonl_of("{", "[1]", '"a"', "1", "null", "{}"), {}, "no JSON record"),
    ("t.jsonl", jsonl_of('{"text": null, "label": "left"}'), {}, "empty text"),
    ("t.jsonl", jsonl_of('{"text": "a", "label": null}'), {}, "empty label"),
    ("t.jsonl", jsonl_of('{"text": "a", "label": NaN}'), {}, "empty label"),
    ("t.jsonl", jsonl_of('{"text": 5, "label": "left"}'), {}, "text of the wrong kind"),
    ("t.jsonl", jsonl_of('{"text": ["a"], "label": "left"}'), {}, "text of the wrong kind"),
    ("t.jsonl", jsonl_of('{"text": "a", "label": ["left"]}'), {}, "label of the wrong kind"),
    ("t.jsonl", jsonl_of('{"text": "a", "label": ["left", "right"]}'), {"separator": "|"}, "built"),
    ("t.jsonl", jsonl_of('{"text": "a", "label": ["left", null]}'), {"separator": "|"}, "label of the wrong kind"),
    ("t.jsonl", jsonl_of('{"text": "a", "label": {"left": 1}}'), {}, "label of the wrong kind"),
    ("t.jsonl", jsonl_of('{"text": "\\ud83d", "label": "left"}'), {}, "put right 1 half characters"),
    ("t.jsonl", jsonl_of('{"text": "a", "label": ' + "[" * 9999 + "}"), {}, "no JSON record"),
    ("t.jsonl", jsonl_of('{"text": "a", "label": 1' + "0" * 6000 + "}"), {}, "left out 1 rows"),
    ("t.jsonl", '[{"text": "a", "label": "left"}]\n', {}, "!one JSON array"),
    ("t.jsonl", '{"body": "a"}\n', {}, "!no column 'text'"),
    ("t.parquet", b"PAR1" + bytes(99), {}, "!not a parquet file"),
    ("t.parquet", csv_of(), {}, "!not a parquet file"),
    ("t.csv.gz", __import__("gzip").compress(csv_of().encode()), {}, "built"),
    ("t.csv.gz", __import__("gzip").compress(csv_of().encode() * 99)[:-20], {}, "!damaged or cut off"),
    ("t.csv.gz", csv_of(), {}, "!damaged or cut off"),
    ("t.csv.zst", csv_of(), {}, "!damaged or cut off"),
    ("t.txt", csv_of(), {}, "!let it end in .csv"),
    ("t.xlsx", b"PK\x03\x04" + bytes(99), {}, "!is an office file"),
]


def test_hostile_tables_are_read_and_counted_or_refused_in_one_sentence(tokenizer_dir, tmp_path):
    from lmscripts.data.folding import FoldSettings
    from lmscripts.data.labelled_build import SplitSettings, TableOptions, open_or_build
    from lmscripts.errors import UserError
    from lmscripts.tokenizer.encoder import load_encoder

    encoder, split, wrong = load_encoder(tokenizer_dir), SplitSettings(validation=0.0, test=0.0, train=1.0), []
    for number, (name, data, options, expected) in enumerate(TABLES):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        before = contents(folder)
        try:
            made = open_or_build(folder / name, encoder, FoldSettings(32), split, TableOptions(**options))
            said, left = made.sentences(), {*before, made.path}
        except UserError as error:
            said, left = [f"!{error}"], {*before}
        fits = expected.removeprefix("!") in "\n".join(said) and said[0].startswith("!") == expected.startswith("!")
        fits = fits and contents(folder).keys() == left and before.items() <= contents(folder).items()
        if not fits or not all(len(line) < 1500 and line.isprintable() for line in said):
            wrong.append((number, name, expected, said))
    assert wrong == []


# As above, of what is to be labelled: the lines that have an answer and the notes of the others.
TEXTS = [
    ("t.csv", "text\na\nb\n", {}, [2, 3]),
    ("t.csv", "text\r\na\r\nb\r\n", {}, [2, 3]),
    ("t.csv", "text\ra\rb\r", {}, [2, 3]),
    ("t.csv", "\n\ntext\na\n", {}, [4]),
    ("t.csv", "sep=;\nid;text\n1;a,b\n", {"id": "id"}, [3]),
    ("t.csv", "id;text\n-1;a\n=2;b\n", {"id": "id"}, [2, 3]),
    ("t.csv", 'text\n"two\nlines"\n""\n"  "\nb\n', {}, [2, "empty text", "empty text", 6]),
    ("t.csv", 'id,text\n1,"open\n2,b\n', {}, ["stray quote", 3]),
    ("t.csv", 'id,text\n1,"open\n2,b\n', {"quotes": False}, [2, 3]),
    ("t.csv", "id,text\n1\n2,b,c\n3,d\n", {}, ["too few fields", "too many fields", 4]),
    ("t.csv", "id,text\n1,a\nid,text\n2,b\n", {}, [2, "header repeated", 4]),
    ("t.csv", "id,text\n1,a\ntext,id\nb,2\n", {}, "!another order"),
    ("t.csv", "id,body\n1,a\n", {}, "!no column 'text'"),
    ("t.csv", "id,text\n1,a\n", {"id": "key"}, "!--id_column"),
    ("t.csv", "", {}, "!is empty"),
    ("t.csv", "text\n", {}, []),
    ("t.csv", b"id,text\n1,caf\xe9\n2,b\n", {}, "!t.csv:2"),
    ("t.csv", b"id,text\n1,caf\xe9\n2,b\n", {"encoding": "utf-8"}, ["cannot be decoded", 3]),
    ("t.csv", b"id,text\n1,caf\xe9\n2,b\n", {"encoding": "latin-1"}, [2, 3]),
    ("t.csv", b"PK\x03\x04" + bytes(99), {}, "!is an office file"),
    ("t.jsonl", '{"text": "a"}\n{\n\n{"text": null}\n{"text": 1}\n', {},
     [1, "no JSON record", "empty text", "text of the wrong kind"]),
    ("t.jsonl", '[{"text": "a"}]\n', {}, "!one JSON array"),
    ("t.json", '{"text": "a"}\n{"text": "b"}\n', {}, [1, 2]),
    ("t.txt", "a\n\nb\n", {}, [1, 2, 3]),
    ("t.txt", b"a\n\xff\nb\n", {}, [1, "cannot be decoded as utf-8", 3]),
    ("t.parquet", "text\na\n", {}, "!not a parquet file"),
    ("t.csv.xz", "text\na\n", {}, "!damaged or cut off"),
]  # fmt: skip


def test_hostile_texts_are_labelled_line_by_line_or_refused_in_one_sentence(tmp_path):
    from lmscripts.errors import UserError
    from lmscripts.evaluation.applying import read_texts
    from lmscripts.text.records import TableOptions

    wrong = []
    for number, (name, data, options, expected) in enumerate(TEXTS):
        path = tmp_path / f"{number}_{name}"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        try:
            found = [text.note or text.line for text in read_texts(str(path), "", TableOptions(label="", **options))]
        except UserError as error:
            found = f"!{error}"
        fits = found == expected if isinstance(expected, list) else expected[1:] in found and "\n" not in found
        wrong += [] if fits else [(number, name, expected, found)]
    assert wrong == []
