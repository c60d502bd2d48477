"""Options: what the line and a file give, what is refused, and with which sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import PATIENCE, cpu_seconds_below, help_of

from lmscripts.errors import UserError
from lmscripts.options import parsing
from lmscripts.options.checks import check_numbers, check_useless, refuse_given
from lmscripts.options.parsing import Further, dump_options, option, parse_options, parse_options_with_origin
from lmscripts.options.yaml_text import nearest

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    input_file: tuple[str, ...] = option(help="Text files.", required=True, group="Data")
    vocab_size: int = option(32768, help="Number of tokens.", group="Model")
    learning_rate: float = option(1e-4, help="Peak, 100% of it.", group="Model")
    do_whole_word_mask: bool = option(False, help="Mask whole words.", group="Model")
    compile: bool = option(True, help="Compile.", group="Model")
    mecab_dic: Literal["ipadic", "unidic_lite", "no"] = option("ipadic", help="Dictionary.")
    tokenizer_type: Literal["wordpiece", "unigram"] = option("wordpiece", help="Algorithm.")
    fp16_type: Literal[0, 1, 2] | None = option(None, help="Half precision.")
    run_name: str | None = option(None, help="Name of the run.")
    title: str = option("", help="Title.")
    stop_at_step: int | None = option(None, help="Where this job ends.")
    sizes: tuple[int, ...] = option((1, 2), help="Sizes.")
    rates: tuple[float, ...] | None = option(None, help="Rates.")
    overwrite: bool | None = option(None, help="Not decided unless given.")


OLDER = {
    "renamed": {"mecab_dic_type": "mecab_dic", "disable-compile": "no_compile"},
    "renamed_values": {"tokenizer_type": {"sentencepiece": "unigram"}},
    "accepted_unused": {"node_rank": "the launcher says it."},
}


def parse(*words: str, required: bool = True) -> Options:
    argv = [*words, *(["--input_file", "corpus.txt"] if required else [])]
    return parse_options(Options, description="Trains.", argv=argv, **OLDER)


def refusal(capsys: pytest.CaptureFixture[str], *words: str, required: bool = True) -> str:
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(*words, required=required)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if ": error: " in line]
    assert len(lines) == 1
    assert captured.err.endswith(lines[0] + "\n")
    assert "Traceback" not in captured.err
    return lines[0].split(": error: ", 1)[1]


def write(folder: Path, text: str) -> str:
    file = folder / "options.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--vocab_size", "100"], "vocab_size", 100),
        (["--vocab-size=1_000"], "vocab_size", 1000),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning_rate", "2"], "learning_rate", 2.0),
        (["--do_whole_word_mask"], "do_whole_word_mask", True),
        (["--do-whole-word-mask", "true"], "do_whole_word_mask", True),
        (["--do_whole_word_mask=false"], "do_whole_word_mask", False),
        (["--no_compile"], "compile", False),
        (["--no-compile"], "compile", False),
        (["--no_compile", "false"], "compile", True),
        (["--disable_compile"], "compile", False),
        (["--mecab_dic", "no"], "mecab_dic", "no"),
        (["--fp16_type", "0"], "fp16_type", 0),
        (["--fp16_type", "null"], "fp16_type", None),
        (["--run_name", "20261121"], "run_name", "20261121"),
        (["--run_name", "null"], "run_name", None),
        (["--title", "null"], "title", "null"),
        (["--title="], "title", ""),
        (["--title=--odd a=b"], "title", "--odd a=b"),
        (["--stop_at_step", "-1"], "stop_at_step", -1),
        (["--sizes", "4", "5", "--sizes", "6"], "sizes", (4, 5, 6)),
        (["--rates", "1e-3", "2"], "rates", (1e-3, 2.0)),
        (["--rates", "null", "--rates", "2"], "rates", (2.0,)),
        (["--overwrite"], "overwrite", True),
        (["--no_overwrite"], "overwrite", False),
        (["--overwrite", "null"], "overwrite", None),
        (["--tokenizer_type", "sentencepiece"], "tokenizer_type", "unigram"),
        (["--vocab_size", "5", "--vocab-size", "5"], "vocab_size", 5),
    ],
)
def test_command_line(words: list[str], name: str, value: Any) -> None:
    parsed = getattr(parse(*words), name)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("vocab-size: 100", "vocab_size", 100),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 3", "learning_rate", 3.0),
        ("mecab_dic: no", "mecab_dic", "no"),
        ("run_name: 2026-11-21", "run_name", "2026-11-21"),
        ("run_name: 'null'", "run_name", "null"),
        ("run_name: null", "run_name", None),
        ("run_name: 12:30:00", "run_name", "12:30:00"),
        ("title: 東京", "title", "東京"),
        ("sizes: [3, 4]", "sizes", (3, 4)),
        ("sizes:\n- 3\n- 4", "sizes", (3, 4)),
        ("sizes: 7", "sizes", (7,)),
        ("sizes: []", "sizes", ()),
        ("rates: null", "rates", None),
        ("compile: false", "compile", False),
        ("no_compile: true", "compile", False),
        ("mecab_dic_type: unidic_lite", "mecab_dic", "unidic_lite"),
        ("tokenizer_type: sentencepiece", "tokenizer_type", "unigram"),
    ],
)
def test_file(tmp_path: Path, line: str, name: str, value: Any) -> None:
    parsed = getattr(parse("--config", write(tmp_path, line)), name)
    assert parsed == value
    assert type(parsed) is type(value)


def test_the_line_beats_the_file_wherever_it_stands(tmp_path: Path) -> None:
    file = write(tmp_path, "vocab_size: 1\nsizes: [9]\ninput_file: a.txt\nmecab_dic_type: no\n")
    for words in (
        ["--vocab_size", "2", "--sizes", "3", "--mecab_dic", "ipadic", "--config", file],
        ["--config", file, "--vocab_size", "2", "--sizes", "3", "--mecab_dic", "ipadic"],
    ):
        options = parse(*words, required=False)
        assert (options.vocab_size, options.sizes, options.mecab_dic) == (2, (3,), "ipadic")
        assert options.input_file == ("a.txt",)


def test_one_of_several_on_the_line_replaces_any_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "vocab_size: 1\nsizes: [9]\ninput_file: a.txt\n")

    def read(*words: str) -> Options:
        one_of = [("vocab_size", "stop_at_step", "sizes")]
        return parse_options(Options, description="", argv=["--config", file, *words], one_of=one_of)

    options = read("--stop_at_step", "3")
    assert (options.vocab_size, options.sizes, options.stop_at_step) == (32768, (1, 2), 3)
    options = read("--stop_at_step", "null", "--title", "x")
    assert (options.vocab_size, options.sizes, options.stop_at_step) == (1, (9,), None)
    assert capsys.readouterr().err == ""


def test_origins(tmp_path: Path) -> None:
    file = write(tmp_path, "vocab_size: 1\ninput_file: a.txt\n")
    argv = ["--config", file, "--input_file", "b.txt"]
    _, origins = parse_options_with_origin(Options, description="Trains.", argv=argv)
    assert origins["input_file"] == "command line"
    assert origins["vocab_size"] == file
    assert origins["learning_rate"] == "default"
    assert set(origins) == set(Options.__dataclass_fields__)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--vocab_siz", "3"], ["unknown option --vocab_siz", "did you mean --vocab_size?"]),
        (["--vocab", "3"], ["unknown option --vocab", "did you mean --vocab_size?"]),
        (["--vocabsize", "3", "--lerning_rate=1"], ["--vocab_size?", "--lerning_rate", "--learning_rate?"]),
        (["--zzz"], ["unknown option --zzz (--help lists all)"]),
        (["--vocab_size", "x"], ["--vocab_size must be a whole number, not x"]),
        (["--vocab_size", "1.5"], ["--vocab_size must be a whole number, not 1.5"]),
        (["--vocab_size", "1:30"], ["--vocab_size must be a whole number, not 1:30"]),
        (["--vocab_size", ""], ["--vocab_size must be a whole number, not ''"]),
        (["--vocab_size"], ["--vocab_size needs a value"]),
        (["--vocab_size", "null"], ["--vocab_size must be a whole number, not null"]),
        (["--vocab_size", "3", "4"], ["--vocab_size takes one value, not 2 (3 and 4)"]),
        (["--vocab_size", "3", "--vocab-size", "4"], ["given twice: --vocab_size 3 and --vocab_size 4"]),
        (["--learning_rate", "nan"], ["--learning_rate must be a number, not nan"]),
        (["--learning_rate", "1e999"], ["--learning_rate must be a number"]),
        (["--do_whole_word_mask", "maybe"], ["--do_whole_word_mask must be true or false, not maybe"]),
        (["--compile", "--no_compile"], ["compile is given twice: --compile and --no_compile"]),
        (["--mecab_dic", "unidic"], ["must be ipadic, unidic_lite or no, not unidic", "did you mean unidic_lite?"]),
        (["--fp16_type", "3"], ["--fp16_type must be 0, 1, 2 or null, not 3"]),
        (["--sizes", "1", "x"], ["--sizes must be a whole number, not x"]),
        (["--sizes"], ["--sizes needs a value"]),
        (["--mecab_dic_type", "no", "--mecab_dic", "ipadic"], ["--mecab_dic_type no and --mecab_dic ipadic"]),
        (["--config", "absent.yaml"], ["--config absent.yaml cannot be read: No such file or directory"]),
        (["--config", "."], ["--config . cannot be read: Is a directory"]),
        (["--config"], ["--config needs a value"]),
        (["--config", "a", "--config", "b"], ["config is given twice: --config a and --config b"]),
        (["corpus.txt"], ["unexpected 'corpus.txt': every option starts with two dashes"]),
        (["-vocab_size", "3"], ["unexpected '-vocab_size'"]),
    ],
)
def test_refused_lines(capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]) -> None:
    sentence = refusal(capsys, *words)
    for part in parts:
        assert part in sentence


def test_an_option_without_its_value_does_not_take_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--run_name", "--vocab_size", "3") == "--run_name needs a value"


def test_missing_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "missing --input_file" in refusal(capsys, required=False)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vocab_size: 1\nvocabsize: 3", ["options.yaml: unknown key vocabsize in line 2 (did you mean vocab_size?)"]),
        ("title: a\n\nvocab_size: abc", ["options.yaml, line 3: vocab_size must be a whole number, not abc"]),
        ("vocab_size:", ["vocab_size must be a whole number, not null"]),
        ("vocab_size: {a: 1}", ["options.yaml, line 1: vocab_size must be a value or a list of values"]),
        ("vocab_size: 1\nvocab_size: 1", ["options.yaml, line 2: vocab_size stands in the file a second time"]),
        ("vocab-size: 1\nvocab_size: 2", ["options.yaml: vocab_size is given twice"]),
        ("mecab_dic_type: no\nmecab_dic: ipadic", ["options.yaml: mecab_dic is given twice"]),
        ("mecab_dic: [no, ipadic]", ["mecab_dic takes one value, not 2"]),
        ("mecab_dic: unidic", ["line 1: mecab_dic must be ipadic, unidic_lite or no, not unidic"]),
        ("sizes: [1, null]", ["sizes must be a whole number, not null"]),
        ("sizes: [1, [2]]", ["sizes must be a value or a list of values"]),
        ("config: other.yaml", ["unknown key config"]),
        ("a: [1", ["options.yaml, line 1, column", "not valid YAML"]),
        ("a: \x01", ["options.yaml", "not valid YAML"]),
        ("- a", ["options.yaml must hold lines"]),
        ("distributed_type: NO", ["accelerate launch --config_file"]),
    ],
)
def test_refused_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, parts: list[str]) -> None:
    sentence = refusal(capsys, "--config", write(tmp_path, text))
    for part in parts:
        assert part in sentence


def test_a_file_that_is_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_bytes(b"title: \xff")
    assert "not UTF-8" in refusal(capsys, "--config", str(tmp_path / "x.yaml"))


def test_an_empty_file_and_one_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path, "")) == parse()
    assert parse("--config", write(tmp_path, "\ufeffvocab_size: 3")).vocab_size == 3


def test_older_names_say_the_new_one_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path, "mecab_dic_type: no\nnode_rank: 3\n")
    options = parse("--config", file, "--mecab_dic_type", "no", "--tokenizer-type=sentencepiece", "--node_rank")
    assert (options.mecab_dic, options.tokenizer_type) == ("no", "unigram")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sorted(captured.err.splitlines()) == [
        "--mecab_dic_type is now --mecab_dic",
        "--node_rank has no effect: the launcher says it.",
        "--tokenizer_type sentencepiece is now --tokenizer_type unigram",
    ]


def test_only_the_first_process_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first process of the second node
    parse("--mecab_dic_type", "no")
    assert capsys.readouterr().err == ""
    assert "needs a value" in refusal(capsys, "--vocab_size")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        parse("--vocab_size")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""


def test_printed_options_give_the_same_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *("--vocab-size=7", "--learning_rate", "1e-05", "--no_compile", "--fp16_type", "0", "--mecab_dic", "no"),
        *("--title", "a: b #c 'd' \"e\"\n\tf 東京", "--rates", "1e-3", "2", "--run_name", "1e-4"),
        *("--input_file", "- x", "null", "{}", "~", "*a"),
    ]
    options = parse(*words, required=False)
    with pytest.raises(SystemExit) as stopped:
        parse(*words, "--print_config", required=False)
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed == dump_options(options)
    assert "# Number of tokens. (default: 32768)\nvocab_size: 7\n" in printed
    assert parse("--config", write(tmp_path, printed), required=False) == options


def test_defaults_survive_too(tmp_path: Path) -> None:
    assert parse("--config", write(tmp_path, dump_options(parse())), required=False) == parse()


def test_print_config_is_a_template_where_something_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--print_config", required=False)
    assert stopped.value.code == 0
    assert "# input_file:\n" in capsys.readouterr().out


def test_errors_of_the_options_class_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Checked:
        steps: int = option(1, help="Steps.")

        def __post_init__(self) -> None:
            if self.steps < 1:
                raise UserError(f"--steps must be at least 1, not {self.steps}")

    with pytest.raises(SystemExit) as stopped:
        parse_options(Checked, description="Checks.", argv=["--steps", "0"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: --steps must be at least 1, not 0\n")


def test_help_names_defaults_choices_groups_and_older_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--vocab_size", "wrong", "--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Trains.",
        "Data: --input_file VALUE ... Text files. (required)",
        "(default: 32768)",
        "Peak, 100% of it. (default: 0.0001)",
        "--compile, --no_compile",
        "one of ipadic, unidic_lite, no; default: ipadic",
        "--mecab_dic_type (now --mecab_dic)",
        "Accepted without effect: --node_rank.",
        "--print_config",
    ):
        assert part in text


def test_help_of_fifty_options_is_quick(tmp_path: Path) -> None:
    fields = "\n".join(f"    option_{i}: int | None = option({i}, help='Number {i}.')" for i in range(50))
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass\n"
        "from lmscripts.options.parsing import option, parse_options\n\n"
        f"@dataclass(frozen=True)\nclass Options:\n{fields}\n\n"
        "options = parse_options(Options, description='Fifty.')\n"
        "import torch\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with cpu_seconds_below(10):  # a third of a second on an idle machine, were it not for what has to be compiled first
        text, heavy = help_of(script, environment)
    assert text.count("Number ") == 50
    assert not heavy


def test_parsing_imports_nothing_heavy() -> None:
    code = "import sys, lmscripts.options.parsing\n"
    code += "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.strip() == "[]"


# ---- words without an option -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableOptions:
    input_file: tuple[str, ...] = option((), help="Tables.", positional=True, required=True)
    text: str = option("text", help="Column.", short="t")
    epochs: int = option(3, help="Epochs.", short="e")
    preponly: bool = option(False, help="Only prepare.", short="p")
    labels: tuple[str, ...] = option((), help="Labels.")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.csv", {"input_file": ("a.csv",)}),
        ("a.csv -e 4 -t body", {"input_file": ("a.csv",), "epochs": 4, "text": "body"}),
        ("-e 4 a.csv b.csv", {"input_file": ("a.csv", "b.csv"), "epochs": 4}),
        ("-p a.csv", {"input_file": ("a.csv",), "preponly": True}),
        ("-p false a.csv", {"input_file": ("a.csv",), "preponly": False}),
        ("a.csv --labels left right", {"input_file": ("a.csv",), "labels": ("left", "right")}),
        ("--epochs=5 a.csv", {"input_file": ("a.csv",), "epochs": 5}),
        ("--input_file a.csv", {"input_file": ("a.csv",)}),
    ],
)
def test_words_without_an_option_and_single_letters(line: str, expected: dict[str, Any]) -> None:
    options = parse_options(TableOptions, description="", argv=line.split())
    assert {name: getattr(options, name) for name in expected} == expected


def test_single_letters_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(TableOptions, description="", argv=["--help"])
    text = capsys.readouterr().out
    assert "INPUT_FILE" in text.splitlines()[0]
    assert "(also -e)" in text


def test_a_table_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(TableOptions, description="", argv=["-e", "4"])
    assert "missing --input_file" in capsys.readouterr().err


def test_a_table_that_an_option_took_for_a_value_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").touch()
    line = ["--labels", "left", str(tmp_path / "a.csv"), "-p"]
    with pytest.raises(SystemExit):
        parse_options(TableOptions, description="", argv=line)
    assert f"--labels took {tmp_path / 'a.csv'} for one of its values: write that first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_options(TableOptions, description="", argv=["--labels", "left", "right"])
    assert "took" not in capsys.readouterr().err


def test_an_older_letter_without_effect_is_no_word_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    unused = {"charts": "drawn in any case", "c": "drawn in any case"}
    options = parse_options(TableOptions, description="", argv=["-c", "a.csv"], accepted_unused=unused)
    assert options.input_file == ("a.csv",)
    assert "-c has no effect: drawn in any case" in capsys.readouterr().err
    options = parse_options(TableOptions, description="", argv=["a.csv", "--labels", "-c", "-d"])
    assert options.labels == ("-c", "-d")


# ---- further dataclasses of options ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    GROUP = "objective masked"
    mask_unit: Literal["token", "word"] = option("token", help="What is masked.")
    mask_probability: float = option(0.15, help="Share.")

    def __post_init__(self) -> None:
        if not 0 < self.mask_probability < 1:
            raise UserError(f"--mask_probability must lie between 0 and 1, got {self.mask_probability}")


@dataclass(frozen=True)
class Replaced:
    GROUP = "objective replaced"
    mask_unit: Literal["token", "word"] = option("token", help="What is masked.")
    discriminator_weight: float = option(50.0, help="Weight.")


@dataclass(frozen=True)
class Causal:
    z_loss: float = option(0.0, help="Weight.")
    seed: int = option(1, help="Seed.")


@dataclass(frozen=True)
class Run:
    model_dir: str = option(help="Folder.", group="run")
    seed: int = option(1, help="Seed.", group="run")


def parse_more(*words: str) -> tuple[Run, Further]:
    argv = ["--model_dir", "r", *words]
    return parse_options(Run, more=(Masked, Replaced, Causal), description="Trains.", argv=argv)


def test_further_dataclasses_are_options_too() -> None:
    options, further = parse_more("--z-loss", "1e-4", "--mask_unit", "word", "--seed", "3")
    assert options == Run(model_dir="r", seed=3)
    assert further.settings == {
        Masked: Masked(mask_unit="word"),
        Replaced: Replaced(mask_unit="word"),
        Causal: Causal(z_loss=1e-4, seed=3),
    }
    assert further.given == {"mask_unit": "word", "z_loss": 1e-4}  # the seed is the script's own


def test_a_further_option_without_effect_is_refused() -> None:
    _, further = parse_more("--z_loss", "0.1", "--mask_unit", "word")
    with pytest.raises(UserError, match=r"^--z_loss 0\.1 has no effect on the objective masked$"):
        refuse_given(further.settings[Masked], further.given, "on the objective masked")
    refuse_given(["z_loss", "mask_unit"], further.given, "on the objective x")
    _, further = parse_more("--z_loss", "0")  # the default, but asked for
    with pytest.raises(UserError, match=r"--z_loss 0\.0 has no effect on"):
        refuse_given(further.settings[Replaced], further.given, "on the objective replaced")


def test_further_options_are_printed_saved_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_more("--z_loss", "0.5", "--print_config")
    printed = capsys.readouterr().out
    assert "# ---- objective masked, objective replaced ----\n\n# What is masked." in printed
    assert printed.count("\nseed: ") == printed.count("\nmask_unit: ") == 1
    options, further = parse_more("--config", write(tmp_path, printed))
    assert (options, further) == parse_more("--z_loss", "0.5")
    assert further.given == {"z_loss": 0.5}  # all others stand in the file as they are anyway
    saved = dump_options(options, further.settings[Causal])
    assert "\nz_loss: 0.5\n" in saved
    assert "mask_unit" not in saved
    assert parse_more("--config", write(tmp_path, saved)) == (options, further)


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("--vocab_sizes", ["vocab_size", "max_steps"], "vocab_size"),
        ("--vocabsize", ["vocab_size"], "vocab_size"),
        ("--warmup", ["warmup_steps", "max_steps"], "warmup_steps"),
        ("--trainer.min_step", ["trainer.min_steps"], "trainer.min_steps"),
        ("--train_steps", ["max_steps", "warmup_steps"], ""),  # which means something else
        ("--do_train", ["do_continue", "dry_run"], ""),
        ("--bert_config_file", ["print_config", "config"], ""),
        ("--tf_model_dir", ["model_dir"], ""),
        ("--tokenizer_dirs", ["tokenizer_file", "tokenizer_type"], ""),
        ("--eval_steps", ["save_steps"], ""),
        ("--output_dir", ["input_dir", "output_file"], ""),
    ],
)
def test_a_hint_is_the_same_name_spelt_right_and_never_another_one(word: str, known: list[str], meant: str) -> None:
    assert nearest(word, known, "--") == (meant and f"did you mean --{meant}?")


def test_a_hint_names_no_option_of_an_older_system(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in refusal(capsys, "--mecab_dic_typ", "x")
    assert "did you mean" not in refusal(capsys, "--node_ranks", "1")


OF_VALUES = {
    "renamed": {"half true": "fp16_type 1", "half-of": "fp16_type", "pieces": "tokenizer_type unigram; in one folder"},
    "accepted_unused": {"half": "nothing is halved", "train": "that is what it does", "pad [PAD]": "the default"},
    "refused": {"train false": "another script evaluates", "pad": "it is [PAD]", "mecab_dic juman-x": "take ipadic"},
}


@pytest.mark.parametrize(
    ("line", "expected", "said"),
    [
        ("--half", {"fp16_type": 1}, "--half is now --fp16_type 1"),
        ("--half=True", {"fp16_type": 1}, "--half is now --fp16_type 1"),
        ("--half 1", {"fp16_type": 1}, "--half is now --fp16_type 1"),
        ("--half false", {"fp16_type": None}, "--half has no effect: nothing is halved"),
        ("--half_of 2", {"fp16_type": 2}, "--half_of is now --fp16_type"),
        ("--pieces x/y", {"tokenizer_type": "unigram"}, "--pieces is now --tokenizer_type unigram: in one folder"),
        ("--train=True", {}, "--train has no effect: that is what it does"),
        ("--pad [PAD]", {}, "--pad has no effect: the default"),
        ("--train=False", None, "--train False has no counterpart here: another script evaluates"),
        ("--train 0 --pad x", None, "evaluates; --pad x has no counterpart here: it is [PAD]"),
        ("--mecab-dic juman-x", None, "--mecab_dic juman-x has no counterpart here: take ipadic"),
        ("--zz --pad x", None, "unknown option --zz (--help lists all); --pad x has no counterpart here: it is [PAD]"),
    ],
)
def test_older_names_may_mean_something_else_by_their_value(
    line: str, expected: dict[str, Any] | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--input_file", "a", *line.split()]
    if expected is None:
        with pytest.raises(SystemExit) as stopped:
            parse_options(Options, description="", argv=argv, **OF_VALUES)
        assert stopped.value.code == 2
    else:
        options = parse_options(Options, description="", argv=argv, **OF_VALUES)
        assert {name: getattr(options, name) for name in expected} == expected
    assert capsys.readouterr().err.endswith(f"{said}\n")


def test_what_is_refused_in_a_file_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "input_file: a\ntrain: false\n")
    with pytest.raises(SystemExit):
        parse_options(Options, description="", argv=["--config", file], **OF_VALUES)
    assert f"error: {file}: --train false has no counterpart here: another script" in capsys.readouterr().err


def test_the_options_of_a_run_are_read_where_they_mean_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "model_type: x\ntitle: of the run\nvocab_size: 3\nseed: 1\ninput_file: trained_on.txt\n")
    options = parse_options(Options, description="", argv=["--config", file, "--input_file", "a"], of_run=("title",))
    assert (options.title, options.vocab_size, options.input_file) == ("of the run", 32768, ("a",))
    assert capsys.readouterr().err == f"{file} is of a pretraining run: only title is read of it\n"


def test_further_options_in_the_help_and_in_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_more("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "objective replaced: --discriminator_weight VALUE Weight. (default: 50.0)" in text
    assert f"{Causal.__module__.rpartition('.')[2]}: --z_loss VALUE" in text  # without a GROUP the module's name
    for words, sentence in (
        (("--mask_probability", "2"), "--mask_probability must lie between 0 and 1, got 2.0"),
        (("--zloss", "2"), "unknown option --zloss (did you mean --z_loss?)"),
    ):
        with pytest.raises(SystemExit):
            parse_more(*words)
        assert sentence in capsys.readouterr().err


def test_options_of_one_name_have_to_be_the_same() -> None:
    @dataclass(frozen=True)
    class Other:
        z_loss: float = option(1.0, help="Weight.")

    with pytest.raises(TypeError, match="the option z_loss differs"):
        parse_options(Run, more=(Causal, Other), description="", argv=[])


# ---- checks ------------------------------------------------------------------------------------------------------


def test_checks_pass_over_options_that_a_copy_of_a_script_does_not_have() -> None:
    check_numbers({"a": 1}, positive=("a", "gone"), not_negative=("gone",), below_one=("gone",))
    check_useless({"a": None}, "here", "a", "gone")
    with pytest.raises(UserError, match="--a must be greater than 0, got 0"):
        check_numbers({"a": (1, 0)}, positive=("gone", "a"))


def test_more_workers_than_processors_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Working:
        num_workers: int = option(4, help="Processes.")

    monkeypatch.setattr(parsing, "num_cpus", lambda: 3)
    for line, said in (([], ""), (["--num_workers", "3"], ""), (["--num_workers", "8"], "more than the 3 CPUs")):
        parse_options(Working, description="", argv=line)
        text = capsys.readouterr().err
        assert said in text
        assert bool(text) == bool(said)
