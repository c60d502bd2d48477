"""Names that older scripts gave their options: each is taken over, has no effect, or is refused with what to do."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from lmscripts import options as tables
from lmscripts.options import language_pretraining, lightning, nvidia_bert
from lmscripts.options.parsing import parse_options, parse_options_with_origin

SCRIPTS = {
    "train_tokenizer.py": tables.TOKENIZER,
    "prepare_corpus.py": tables.PREPARATION,
    "run_pretraining.py": tables.PRETRAINING,
    "evaluate_lm.py": tables.EVALUATION,
}
# All that the argument parsers of these scripts know, so far as it is no name of ours.
NVIDIA = """input_dir config_file bert_model output_dir vocab_file init_checkpoint max_seq_length
    max_predictions_per_seq train_batch_size num_train_epochs warmup_proportion local_rank
    gradient_accumulation_steps fp16 amp loss_scale log_freq checkpoint_activations resume_from_checkpoint
    resume_step num_steps_per_checkpoint skip_checkpoint phase2 allreduce_post_accumulation
    allreduce_post_accumulation_fp16 phase1_end_step init_loss_scale do_train json-summary use_env
    disable_progress_bar steps_this_run disable_jit_fusions cuda_graphs profile no_dense_sequence_output
    bert_config_file input_files_dir eval_files_dir dllog_path optimizer_type do_eval eval_batch_size
    num_train_steps num_warmup_steps save_checkpoints_steps display_loss_steps iterations_per_loop max_eval_steps
    num_accumulation_steps verbose_logging horovod report_loss manual_fp16 use_fp16 use_xla use_tpu tpu_name
    tpu_zone gcp_project master num_tpu_cores"""
READING = """tokenizer_name_or_path language load_from_hub word_tokenizer_type subword_tokenizer_type tokenizer_class
    do_lower_case ignore_max_byte_error mecab_dic mecab_option sudachi_split_mode sudachi_config_path
    sudachi_resource_dir sudachi_dict_type sp_model_kwargs unk_token sep_token pad_token cls_token mask_token"""
LATER = {
    "prepare_corpus.py": f"""output_file vocab_file max_seq_length max_predictions_per_seq masked_lm_prob dupe_factor
        do_whole_word_mask short_seq_prob random_seed input_corpus max_length dataset_type input_file mask_style
        mlm_probability dataset_dir
        num_proc cache_dir {READING}""",
    "run_pretraining.py": f"""dataset_dir model_dir parameter_file model_type do_whole_word_mask node_rank local_rank
        run_name resume_from_checkpoint is_dataset_masked use_deepspeed deepspeed_bucket_size {READING} {NVIDIA}""",
    "train_tokenizer.py": """word_tokenizer input_file model_dir intermediate_dir num_files pretokenized_prefix language
        tokenizer_type vocab_size min_frequency limit_alphabet num_unused_tokens mecab_dic mecab_option
        sudachi_split_mode sudachi_config_path sudachi_resource_dir sudachi_dict_type spm_model_type
        spm_disable_add_dummy_prefix spm_split_by_whitespace spm_pretokenize_boundary_constraint ignore_max_byte_error
        disable_tqdm train_file spm_model_dir tf_model_dir input_sentence_size add_dummy_prefix sep_token cls_token
        pad_token unk_token bos_token eos_token""",
}


@cache
def script(name: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"older_{Path(name).stem}", ROOT / "scripts" / name)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # where types are looked up
    spec.loader.exec_module(module)
    return vars(module)


def parse(name: str, *words: str) -> dict[str, Any]:
    """The options of a script from a line, those of further dataclasses among them."""
    own = script(name)
    table = {"description": "", "argv": words, **SCRIPTS[name]}
    if "SETTINGS" in own:
        options, further = parse_options(own["Options"], more=own["SETTINGS"], **table)
        return {**vars(options), **{k: v for each in further.settings.values() for k, v in vars(each).items()}}
    if name == "evaluate_lm.py":
        return vars(parse_options(own["Options"], **table))
    return vars(parse_options_with_origin(own["Options"], **table)[0])


@cache
def names_of(name: str) -> frozenset[str]:
    own = script(name)
    classes = (own["Options"], *own.get("SETTINGS", ()))
    return frozenset(field for each in classes for field in each.__dataclass_fields__)


def said(capsys: pytest.CaptureFixture[str], name: str, *words: str) -> str:
    """The sentence with which a line is refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(name, *words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", LATER)
def test_every_name_has_an_answer(name: str) -> None:
    kinds = [SCRIPTS[name].get(kind, {}) for kind in ("renamed", "accepted_unused", "refused")]
    answered = {key.split()[0] for table in kinds for key in table} | names_of(name)
    assert {word.replace("-", "_") for word in LATER[name].split()} <= answered


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_table_names_is_an_option_of_that_script(name: str) -> None:
    table = SCRIPTS[name]
    for key, target in table.get("renamed", {}).items():
        assert target.partition(";")[0].split()[0] in names_of(name), key
    for kind in ("accepted_unused", "refused"):
        for key, reason in table.get(kind, {}).items():
            other = re.match(r".*?(\w+\.py)", reason)
            owners = names_of(name) | (names_of(other[1]) if other else set()) | {"config_file"}
            named = set(re.findall(r"--(\w+)", reason))
            assert named - {key.split()[0], "num_accumulation_steps"} <= owners, key


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_name_with_a_value_has_an_answer_for_other_values_too(name: str) -> None:
    kinds = [SCRIPTS[name].get(kind, {}) for kind in ("renamed", "accepted_unused", "refused")]
    whole = {key for table in kinds for key in table if " " not in key} | names_of(name)
    assert {key.split()[0] for table in kinds for key in table} <= whole


def test_systems_do_not_contradict_each_other() -> None:
    for systems in ((language_pretraining, nvidia_bert), (language_pretraining, lightning)):
        for attribute in ("PREPARATION", "PRETRAINING", "TOKENIZER"):
            seen: dict[str, Any] = {}
            for table in (vars(each).get(attribute, {}) for each in systems):
                for kind, rows in table.items():
                    for key, text in rows.items() if kind != "renamed_values" else ():
                        assert seen.setdefault(key, (kind, text)) == (kind, text), key


GIVEN = ["--model_type", "bert-tiny", "--dataset_dir", "s"]


def test_a_line_of_google_and_nvidia(capsys: pytest.CaptureFixture[str]) -> None:
    line = """--output_dir=out --do_train=True --do_eval=False --bert_config_file=c.json --batch_size 24 --horovod
        --max_seq_length=64 --max_predictions_per_seq=10 --num_train_steps=90 --num_warmup_steps=9 --use_xla --use_fp16
        --optimizer_type lamb --save_checkpoints_steps 30"""
    found = parse("run_pretraining.py", *GIVEN, *line.split())
    wanted = {"model_dir": "out", "eval_rows": 0, "bert_config_file": "c.json", "sequence_length": (64,)}
    wanted |= {"max_steps": 90, "warmup_steps": 9, "compile": True, "precision": "fp16", "optimizer": "lamb"}
    wanted |= {"save_steps": 30}
    assert {name: found[name] for name in wanted} == wanted
    lines = capsys.readouterr().err.splitlines()
    assert "--do_eval is now --eval_rows 0" in lines
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            "--train_batch_size=12",
            ["--train_batch_size 12", "rows of one process", "--batch_size", "--micro_batch_size"],
        ),
        ("--do_train=False", ["evaluate_lm.py"]),
        ("--phase2 --phase1_end_step 7", ["--phase2 has", "--phase1_end_step 7 has", "--phase_steps"]),
        ("--gradient_accumulation_steps=8 --steps_this_run 5", ["--batch_size counts", "--stop_at_step"]),
        ("--input_dir x --warmup_proportion 0.1", ["--input_file and --tokenizer_dir", "--warmup_steps"]),
        ("--resume_from_checkpoint run/checkpoint-7", ["--do_continue", "--start_from"]),
        ("--is_dataset_masked --use_deepspeed", ["every epoch", "fsdp2_bf16.yaml"]),
        ("--word_tokenizer_type juman", ["no tokenizer here"]),
        ("--do_lower_case --sep_token </s>", ["gives", "[SEP]"][1:]),
    ],
)
def test_refused_in_pretraining(line: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sentence = said(capsys, "run_pretraining.py", "--model_dir", "r", *GIVEN, *line.split())
    assert "did you mean" not in sentence
    for part in parts:
        assert part in sentence


def test_a_flag_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("run_pretraining.py", "--output_dir", "r", *GIVEN, "--resume_from_checkpoint")["do_continue"]


def test_a_corpus_with_a_name_and_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    line = """--input_corpus wiki-ja --input_file x.txt --max_length 128 --dataset_type nsp --mask_style roberta-wwm
        --mlm_probability 0.2 --dataset_dir out --num_proc 3 --cache_dir c --tokenizer_name_or_path tok
        --word_tokenizer_type mecab --pad_token [PAD]"""
    found = parse("prepare_corpus.py", *line.split())
    wanted = {"input_file": ("x.txt",), "output_dir": "out", "num_workers": 3, "tokenizer_dir": "tok"}
    assert {name: found[name] for name in wanted} == wanted
    notices = capsys.readouterr().err
    assert "--input_corpus has no effect: a store has the name of --output_dir" in notices
    assert "--max_length has no effect: a store serves every length" in notices


def test_tokenizers_of_other_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--train_file a.txt --spm_model_dir spm --tf_model_dir out"
    found = parse("train_tokenizer.py", *line.split())
    assert (found["input_file"], found["model_dir"], found["objective"]) == (("a.txt",), "out", "causal")
    parse("train_tokenizer.py", "--train_file", "a.txt", "--tf_model_dir", "out")  # the third had a default
    assert "--train_file is now --input_file: what was trained there is --objective" in capsys.readouterr().err
    line = "--word_tokenizer mecab --input_file a --model_dir b --spm_model_type unigram --spm_split_by_whitespace"
    found = parse("train_tokenizer.py", *line.split(), "--spm_disable_add_dummy_prefix")
    assert found["word_tokenizer"] == "mecab"
    capsys.readouterr()
    for words, part in (
        (
            "--word_tokenizer juman",
            "--word_tokenizer juman has no counterpart here: --word_tokenizer mecab and sudachi",
        ),
        ("--word_tokenizer_type spacy-luw", "has no counterpart here: --word_tokenizer mecab and sudachi"),
        ("--spm_model_type bpe", "give --tokenizer_type unigram, sentencepiece_bpe, wordpiece or character"),
        ("--spm_model_dirs x", "unknown option --spm_model_dirs (--help lists all)\n"),
    ):
        assert part in said(capsys, "train_tokenizer.py", "--model_dir", "m", "--input_file", "a", *words.split())


LIGHTNING_FILE = """
seed_everything: 3
trainer: {max_epochs: 2, precision: 16, callbacks: [{class_path: pytorch_lightning.callbacks.GPUStatsMonitor}]}
model: {tokenizer_model: tok, train_file: a.txt, valid_file: null, test_file: held_out.txt, lr: 1e-4}
"""


def test_a_file_of_the_older_trainer_for_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(LIGHTNING_FILE, encoding="utf-8")
    found = parse("evaluate_lm.py", "--config", str(file), "--ckpt_path", "run")
    assert (found["model_dir"], found["input_file"], found["tokenizer_dir"]) == ("run", ("held_out.txt",), None)
    assert "only model.test_file is read" in capsys.readouterr().err
    found = parse("evaluate_lm.py", "--config", str(file), "--ckpt_path", "run", "--test_file", "mine.txt")
    assert found["input_file"] == ("mine.txt",)
    file.write_text(LIGHTNING_FILE.replace("held_out.txt", "null"), encoding="utf-8")
    assert "missing --input_file" in said(capsys, "evaluate_lm.py", "--config", str(file), "--ckpt_path", "run")


def test_a_checkpoint_of_the_older_trainer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--ckpt_path", "logs/version_3/checkpoints/epoch=1-step=5.ckpt", "--test_file", "a.txt"]
    assert "give the run's folder (logs/version_3), or a checkpoint-STEP" in said(capsys, "evaluate_lm.py", *line)


def test_a_run_for_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its training text is not what is evaluated."""
    file = tmp_path / "config.yaml"
    with pytest.raises(SystemExit):
        parse("run_pretraining.py", "--model_dir", "runs/x", "--model_type", "b", "--input_file", "a", "--print_config")
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    found = parse("evaluate_lm.py", "--config", str(file), "--input_file", "held_out.txt")
    assert (found["model_dir"], found["input_file"]) == ("runs/x", ("held_out.txt",))
    assert "missing --input_file" in said(capsys, "evaluate_lm.py", "--config", str(file))


SIZES = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80}


def test_sizes_of_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "bert_config.json"
    more = {"hidden_act": "gelu", "vocab_size": 70, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 2}
    file.write_text(json.dumps(SIZES | more), encoding="utf-8")
    sizes, sentence = tables.sizes_of_config(str(file))
    assert sizes == {"layers": 3, "hidden_size": 48, "heads": 4, "ffn_size": 80}
    assert "vocab_size 70 (the tokenizer's) and attention_probs_dropout_prob 0.1 (--attention_dropout)" in sentence


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (SIZES | {"hidden_act": "relu"}, ["hidden_act 'relu' has no counterpart, only 'gelu'"]),
        ({"hidden_size": "48"}, ['hidden_size must be a whole number of at least 1, not "48"', "num_hidden_layers is"]),
        ({"bert-base": {}}, ["num_attention_heads is missing"]),
        ([], ["must be an object"]),
    ],
)
def test_a_configuration_that_is_none(tmp_path: Path, content: Any, parts: list[str]) -> None:
    file = tmp_path / "bert_config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(tables.parsing.UserError) as refused:
        tables.sizes_of_config(str(file))
    for part in parts:
        assert part in str(refused.value)
