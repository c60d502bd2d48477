"""scripts/extract_electra_model.py: an ELECTRA checkpoint taken apart, and every way in which it must be refused."""

import json
import os
import re
import runpy
import shlex
import shutil
import stat
import sys

import forked
import pytest
import torch
from conftest import PATIENCE, ROOT, TINY_PRESET, help_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from lmscripts.files import file_sha256
from lmscripts.models.finding import find_damage, write_checksums

SCRIPT = ROOT / "scripts" / "extract_electra_model.py"
# As it stands in the older document.
DOCUMENT = """
python extract_electra_model.py \
--input_dir ./model/electra/checkpoint-1000000 \
--output_dir ./model/electra/extracted-1000000 \
--parameter_file parameter.json \
--model_type electra-small \
--generator \
--discriminator
"""
ELECTRA = {**TINY_PRESET, "embedding-size": 32, "generator-size": "1/2", "mask-percent": 15}
TEXT = "日本の首都は東京です。"


def pair(tokenizer_dir, length=64, embedding=32, hidden=32, generator_hidden=16, dtype=torch.float32):
    """Generator and discriminator on one embeddings module, as they are trained; no two weights alike."""
    sizes = {"vocab_size": len(AutoTokenizer.from_pretrained(tokenizer_dir)), "embedding_size": embedding}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": length}
    torch.manual_seed(length + embedding)
    large = ElectraConfig(hidden_size=hidden, num_attention_heads=2, intermediate_size=2 * hidden, **sizes)
    heads = 2 * generator_hidden // hidden
    small = ElectraConfig(
        hidden_size=generator_hidden, num_attention_heads=heads, intermediate_size=2 * generator_hidden, **sizes
    )
    discriminator, generator = ElectraForPreTraining(large), ElectraForMaskedLM(small)
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight
    for model in (discriminator, generator):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return generator.eval().to(dtype), discriminator.eval().to(dtype)


def save(folder, models, tokenizer_dir, step=None):
    """A checkpoint (with `step`) or a final/ folder in the layout of a run."""
    generator, discriminator = models
    shutil.copytree(tokenizer_dir, folder)
    discriminator.save_pretrained(folder)
    generator.save_pretrained(folder / "generator")
    if step is not None:
        save_file({"a/exp_avg": torch.rand(10)}, folder / "optimizer.safetensors")
        (folder / "training_state.json").write_text(json.dumps({"progress": {"step": step}}), encoding="utf-8")
        write_checksums(folder)
    return folder


@pytest.fixture(scope="module")
def models(tokenizer_dir):
    return pair(tokenizer_dir)


@pytest.fixture
def final(tmp_path, models, tokenizer_dir):
    """A folder without checksums, free to be damaged."""
    return save(tmp_path / "run" / "final", models, tokenizer_dir)


@pytest.fixture
def checkpoint(tmp_path, models, tokenizer_dir):
    return save(tmp_path / "run" / "checkpoint-12", models, tokenizer_dir, step=12)


@pytest.fixture
def extract(capsys, monkeypatch):
    """The script in this process: (exit code, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        capsys.readouterr()
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(extract, tmp_path):
    """Run the script where it must refuse: one sentence, exit code 2, not one file written, changed or removed."""

    def snapshot():
        return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(tmp_path.rglob("*"))}

    def run(*words, output=tmp_path / "out"):
        before = snapshot()
        code, _, error = extract(*words, "--output_dir", output)
        assert code == 2
        assert snapshot() == before
        assert len(error.strip().splitlines()) == 1, error
        assert "Traceback" not in error
        return error

    return run


def in_plain_transformers(program, *words):
    """Run a program where this package cannot be imported and there is no network."""
    blocked = "import sys; sys.modules['lmscripts'] = None\n" + program
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", blocked, *map(str, words)]
    done = forked.run(command, "/", environment, PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOGITS = """
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer
out, text = Path(sys.argv[1]), sys.argv[2]
for name, loader in (("generator", AutoModelForMaskedLM), ("discriminator", AutoModelForPreTraining)):
    tokenizer, model = AutoTokenizer.from_pretrained(out / name), loader.from_pretrained(out / name)
    # As long as the model takes: truncation by the tokenizer must fit the position embeddings.
    inputs = tokenizer(text * 200, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        body = AutoModel.from_pretrained(out / name)(**inputs).last_hidden_state
    save_file({"ids": inputs["input_ids"], "logits": logits, "body": body}, out / f"{name}.logits")
"""


# ---- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (64, {"dtype": torch.bfloat16}),
        (128, {"embedding": 16, "hidden": 32, "generator_hidden": 32}),
        (512, {"embedding": 32, "hidden": 64, "generator_hidden": 32}),
    ],
)
def test_any_length_and_shape_gives_the_same_logits_in_plain_transformers(
    tmp_path, tokenizer_dir, extract, length, sizes
):
    """The older script built its models with 512 positions, so that any other sequence length crashed it."""
    trained = dict(zip(("generator", "discriminator"), pair(tokenizer_dir, length, **sizes)))
    source = save(tmp_path / "final", tuple(trained.values()), tokenizer_dir)
    code, said, error = extract("--input_dir", source, "--output_dir", tmp_path / "out")
    assert code == 0, error
    in_plain_transformers(LOGITS, tmp_path / "out", TEXT)
    for name, model in trained.items():
        found = load_file(tmp_path / "out" / f"{name}.logits")
        assert found["ids"].shape == (1, length)
        with torch.no_grad():
            assert torch.equal(model(input_ids=found["ids"]).logits, found["logits"])
            assert torch.equal(model.electra(input_ids=found["ids"]).last_hidden_state, found["body"])
        assert found["logits"].dtype == sizes.get("dtype", torch.float32)
    assert f"up to {length} tokens" in said


def test_the_documents_command_line(tmp_path, models, tokenizer_dir):
    """As it was written, through python, from the user's folder; in the document's time no tokenizer was written."""
    small = {"electra-small": ELECTRA, "comment": "sizes of this test"}
    (tmp_path / "parameter.json").write_text(json.dumps(small), encoding="utf-8")
    source = save(tmp_path / "model" / "electra" / "checkpoint-1000000", models, tokenizer_dir, step=1000000)
    words = shlex.split(DOCUMENT.replace("extract_electra_model.py", str(SCRIPT)))[1:]
    command = [sys.executable, *words]
    done = forked.run(command, cwd=tmp_path, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "model" / "electra" / "extracted-1000000"
    weights = {"generator": source / "generator" / "model.safetensors", "discriminator": source / "model.safetensors"}
    for name, file in weights.items():
        tokenizer_files = {p.name for p in tokenizer_dir.iterdir()}
        assert {p.name for p in (out / name).iterdir()} == {
            "config.json",
            "model.safetensors",
            "README.md",
            *tokenizer_files,
        }
        assert file_sha256(out / name / "model.safetensors") == file_sha256(file)
        assert AutoTokenizer.from_pretrained(out / name)(TEXT) == AutoTokenizer.from_pretrained(tokenizer_dir)(TEXT)
        assert str(out.relative_to(tmp_path) / name) in done.stdout
    assert "AutoModelForMaskedLM.from_pretrained" in done.stdout
    assert "AutoModelForPreTraining.from_pretrained" in done.stdout
    assert "step 1,000,000" in done.stdout
    assert done.stderr == ""
    assert find_damage(source) is None
    assert sorted(p.name for p in out.iterdir()) == ["discriminator", "generator"]


@pytest.mark.parametrize(
    ("flags", "written"),
    [
        ([], ["discriminator", "generator"]),  # the older script wrote nothing then, and said nothing
        (["--generator"], ["generator"]),
        (["--discriminator"], ["discriminator"]),
        (["--no_generator"], ["discriminator"]),
        (["--no-discriminator"], ["generator"]),
        (["--generator", "--no_discriminator"], ["generator"]),
    ],
)
def test_what_is_asked_for_is_written(extract, final, tmp_path, flags, written):
    code, said, error = extract("--input_dir", final, "--output_dir", tmp_path / "out", *flags)
    assert code == 0, error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == written
    assert sorted(set(re.findall(r"out/(generator|discriminator)\b", said))) == written


def test_one_half_after_the_other(extract, final, tmp_path):
    for flag in ("--generator", "--discriminator"):
        assert extract("--input_dir", final, "--output_dir", tmp_path / "out", flag)[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["discriminator", "generator"]


def test_modes_follow_the_umask_and_names_may_be_odd(extract, final, tmp_path):
    assert stat.S_IMODE((final / "model.safetensors").stat().st_mode) == 0o600  # as transformers writes it
    before = os.umask(0o027)
    try:
        assert extract("--input_dir", final, "--output_dir", tmp_path / "出力 folder")[0] == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "出力 folder").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_the_card_tells_where_it_is_from_and_its_program_runs(extract, checkpoint, tmp_path, name):
    assert extract("--input_dir", checkpoint, "--output_dir", tmp_path / "out")[0] == 0
    folder = tmp_path / "out" / name
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert ("pipeline_tag: fill-mask" in text) == (name == "generator")
    source = checkpoint / "generator" if name == "generator" else checkpoint
    assert file_sha256(source / "model.safetensors") in text
    assert "`run/checkpoint-12`, step 12" in text
    assert "| longest input | 64 tokens |" in text
    assert f"| hidden size | {16 if name == 'generator' else 32} |" in text
    assert str(tmp_path) not in text
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    in_plain_transformers(program.replace("PATH/TO/THIS/FOLDER", str(folder)))


def test_tokens_beyond_the_last_position_are_cut_off(extract, final, tmp_path):
    """A tokenizer that promises 512 tokens to a model of 64 positions ends in an index error at the first long text."""
    file = final / "tokenizer_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    for limit, expected in ((512, 64), (None, 64), (64, 64), (32, 32)):
        file.write_text(json.dumps({**facts, "model_max_length": limit}), encoding="utf-8")
        assert extract("--input_dir", final, "--output_dir", tmp_path / f"out-{limit}")[0] == 0
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"out-{limit}" / "generator")
        assert len(tokenizer(TEXT * 200, truncation=True)["input_ids"]) == expected


# ---- which checkpoint --------------------------------------------------------------------------------------------


def test_of_a_run_the_newest_whole_checkpoint_is_taken(extract, tmp_path, models, tokenizer_dir):
    run = tmp_path / "run"
    for step in (5, 100, 20):
        save(run / f"checkpoint-{step}", models, tokenizer_dir, step=step)
    save(run / "final", models, tokenizer_dir)
    (run / "checkpoint-100" / "optimizer.safetensors").unlink()
    code, said, error = extract("--input_dir", run, "--output_dir", run / "extracted")
    assert code == 0, error
    assert "checkpoint-100 is damaged (optimizer.safetensors is missing) and passed over" in said
    assert "checkpoint-20 is taken" in said
    assert "`run/checkpoint-20`, step 20" in (run / "extracted" / "generator" / "README.md").read_text(encoding="utf-8")
    assert (run / "checkpoint-100").is_dir()  # looking is not changing: the run may be going on


def test_of_a_run_without_checkpoints_final_is_taken(extract, final, tmp_path):
    code, said, _ = extract("--input_dir", final.parent, "--output_dir", tmp_path / "out")
    assert code == 0
    assert "final is taken" in said
    assert "the end of its run" in said


def test_a_run_with_damaged_checkpoints_alone(refused, checkpoint):
    (checkpoint / "vocab.txt").write_text("other", encoding="utf-8")
    assert "every checkpoint" in (sentence := refused("--input_dir", checkpoint.parent))
    assert "vocab.txt" in sentence


# ---- a parameter file --------------------------------------------------------------------------------------------


def write_presets(folder, **changes):
    entries = {key: value for key, value in {**ELECTRA, **changes}.items() if value is not None}
    (folder / "mine.json").write_text(json.dumps({"electra-mine": entries}), encoding="utf-8")
    return "--parameter_file", folder / "mine.json"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("number-of-layers", 3, ["num_hidden_layers of the discriminator is 3 by the preset and 2 here"]),
        ("hidden-size", 64, ["hidden_size of the discriminator is 64 by the preset and 32 here"]),
        ("attention-heads", 4, ["num_attention_heads of the discriminator is 4 by the preset and 2"]),
        ("ffn-inner-hidden-size", 128, ["intermediate_size of the discriminator is 128 by the preset and 64"]),
        ("embedding-size", 16, ["embedding_size of the discriminator is 16 by the preset and 32"]),
        (
            "generator-size",
            "1/1",
            ["preset electra-mine of", "hidden_size of the generator is 32 by the preset and 16"],
        ),
    ],
)
def test_sizes_of_another_preset(refused, checkpoint, tmp_path, key, value, words):
    file = write_presets(tmp_path, **{key: value})
    sentence = refused("--input_dir", checkpoint, *file, "--model_type", "electra-mine")
    for word in [*words, str(checkpoint), "electra-mine", "mine.json"]:
        assert word in sentence


def test_a_generator_of_another_depth_is_told(refused, final, tmp_path, tokenizer_dir, models):
    config = ElectraConfig(**{**models[0].config.to_dict(), "num_hidden_layers": 1})
    shallow = ElectraForMaskedLM(config)
    shallow.electra.embeddings = models[1].electra.embeddings
    shallow.tie_weights()
    shallow.save_pretrained(final / "generator")
    sentence = refused("--input_dir", final, *write_presets(tmp_path), "--model_type", "electra-mine")
    assert "num_hidden_layers of the generator is 2 by the preset and 1" in sentence


def test_another_sequence_length_is_a_notice(extract, checkpoint, tmp_path):
    file = write_presets(tmp_path, **{"sequence-length": 128})
    words = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", *file, "--model_type", "electra-mine")
    code, said, error = extract(*words)
    assert code == 0, error
    assert "sequence-length 128, the checkpoint 64" in said


def test_a_preset_that_continues_a_model_has_no_sizes_to_compare(extract, checkpoint, tmp_path):
    words = ("--input_dir", checkpoint, "--output_dir", tmp_path / "out", "--model_type", "electra-small-additional")
    code, said, error = extract(*words)
    assert code == 0, error
    assert "no sizes to compare" in said


def test_a_model_type_alone_is_looked_up_in_the_projects_file(refused, checkpoint):
    sentence = refused("--input_dir", checkpoint, "--model_type", "electra-small")
    assert str(ROOT / "parameter.json") in sentence
    assert "hidden_size of the discriminator is 256 by the preset and 32" in sentence


def test_preset_options_that_make_no_sense(refused, checkpoint, tmp_path):
    file = write_presets(tmp_path)
    assert "no effect without --model_type" in refused("--input_dir", checkpoint, *file)
    assert "of the family bert, not electra" in refused("--input_dir", checkpoint, "--model_type", "bert-small")
    assert "electra-mine" in refused("--input_dir", checkpoint, *file, "--model_type", "electra-mne")
    missing = ("--parameter_file", tmp_path / "none.json", "--model_type", "electra-mine")
    assert "none.json cannot be read" in refused("--input_dir", checkpoint, *missing)
    nothing = refused("--input_dir", checkpoint, "--no_generator", "--no_discriminator")
    assert "nothing to write" in nothing


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_what_is_no_folder(refused, tmp_path):
    assert "nowhere does not exist" in refused("--input_dir", tmp_path / "nowhere")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file" in refused("--input_dir", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("--input_dir", tmp_path / "empty")
    assert "missing --input_dir" in refused()


def test_a_model_of_another_family(refused, final):
    config = json.loads((final / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (final / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "BertForMaskedLM and the model_type bert" in refused("--input_dir", final)


def test_one_half_alone(refused, final, tmp_path):
    generator = shutil.move(final / "generator", tmp_path / "generator")
    assert "no generator/config.json: it is one half alone" in refused("--input_dir", final)
    assert "its config.json names ElectraForMaskedLM" in refused("--input_dir", generator)


def test_halves_in_each_others_place(refused, final, models):
    models[1].save_pretrained(final / "generator")
    assert "lacks the head of ElectraForMaskedLM" in refused("--input_dir", final)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generator/config.json", "vocab.txt"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_file_of_final_is_missing_or_cut_off(refused, final, name, damage):
    file = final / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2 if damage == "half" else 0])
    sentence = refused("--input_dir", final)
    assert name in sentence or str(file.parent) in sentence


def test_a_vocabulary_that_ends_early(refused, final):
    """Transformers loads it: every later word would be unknown to a model that has learned it."""
    entries = (final / "vocab.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (final / "vocab.txt").write_text("".join(entries[:-100]), encoding="utf-8")
    size = len(entries)
    assert f"of the {size:,} entries by lmscripts_tokenizer.json only {size - 100:,} are left" in refused(
        "--input_dir", final
    )


def test_weights_of_the_generator_are_missing(refused, final):
    (final / "generator" / "model.safetensors").rename(final / "generator" / "pytorch_model.bin")
    assert "generator holds no usable weights" in refused("--input_dir", final)
    tensors = load_file(final / "model.safetensors")
    (final / "model.safetensors").unlink()
    (final / "generator" / "pytorch_model.bin").rename(final / "generator" / "model.safetensors")
    torch.save(tensors, final / "pytorch_model.bin")
    assert "pytorch_model.bin is no safetensors file" in refused("--input_dir", final)


def test_no_tokenizer(refused, final):
    """AutoTokenizer makes up five entries where the files are missing: they would have been published."""
    (final / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json is missing" in refused("--input_dir", final)
    (final / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    (final / "vocab.txt").unlink()
    assert "has no tokenizer beside the model" in refused("--input_dir", final)


@pytest.mark.parametrize("name", ["model.safetensors", "generator/model.safetensors", "vocab.txt", "config.json"])
def test_a_flipped_bit_in_a_checkpoint(refused, checkpoint, name):
    content = bytearray((checkpoint / name).read_bytes())
    content[-10] ^= 1
    (checkpoint / name).write_bytes(content)
    assert f"{name} has another content" in refused("--input_dir", checkpoint)


def test_a_checkpoint_without_its_checksums(refused, checkpoint):
    (checkpoint / "checksums.json").unlink()
    assert "checksums.json is missing" in refused("--input_dir", checkpoint)
    renamed = checkpoint.rename(checkpoint.with_name("best"))
    assert "checksums.json is missing" in refused("--input_dir", renamed)


def change(file, name, edit):
    tensors = load_file(file)
    tensors[name] = edit(tensors[name].clone())
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.safetensors", "generator/model.safetensors"])
def test_a_weight_that_is_not_finite(refused, final, name, value):
    tensor = "electra.encoder.layer.1.output.dense.weight"

    def poison(weights):
        weights[3, 4] = value
        return weights

    change(final / name, tensor, poison)
    sentence = refused("--input_dir", final)
    assert f"{(final / name).parent}: 1 of " in sentence
    assert tensor in sentence


@pytest.mark.parametrize(
    "tensor", ["word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.bias"]
)
def test_halves_of_different_steps(refused, final, tensor):
    """The two share their embeddings; if one value differs, they were not saved together."""

    def train_on(weights):
        weights.view(-1)[-1] += 1e-6
        return weights

    change(final / "generator" / "model.safetensors", f"electra.embeddings.{tensor}", train_on)
    assert f"electra.embeddings.{tensor} differs between the halves" in refused("--input_dir", final)


def test_halves_of_different_lengths_or_precision(refused, final):
    file, name = final / "generator" / "model.safetensors", "electra.embeddings.position_embeddings.weight"
    change(file, name, lambda weights: weights.to(torch.bfloat16))
    assert f"would not load {name} (torch.bfloat16)" in refused("--input_dir", final)
    change(file, name, lambda weights: weights[:32].float())
    assert f"{name} has the shape (32, 32), not (64, 32)" in refused("--input_dir", final)


def edit_configs(folder, half, **changes):
    for name in ("config.json", "generator/config.json"):
        if half in (name, "both"):
            facts = json.loads((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps({**facts, **changes}), encoding="utf-8")


def test_vocabularies_that_do_not_fit(refused, final):
    size = json.loads((final / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    for half in ("generator/config.json", "both"):
        edit_configs(final, half, vocab_size=size - 64)
        assert "word_embeddings.weight has the shape" in refused("--input_dir", final)


def test_a_tokenizer_with_more_entries_than_the_models_have(refused, final):
    with open(final / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("新語\n")
    assert "it is the tokenizer of another model" in refused("--input_dir", final)


@pytest.mark.parametrize(
    ("half", "changes", "words"),
    [
        # 512 positions over weights of 64: the older script's crash, here of a config that was edited by hand.
        (
            "config.json",
            {"max_position_embeddings": 512},
            "has the shape (64, 32), not (512, 32)",
        ),
        ("generator/config.json", {"hidden_size": 32}, "LayerNorm.bias has the shape (16,), not (32,)"),
        ("generator/config.json", {"num_hidden_layers": 3}, "electra.encoder.layer.2"),
        ("config.json", {"num_hidden_layers": 1}, "no place, encoder.layer.1"),
        ("config.json", {"hidden_act": "none such"}, "none that its config.json suits"),
        ("config.json", {"hidden_size": "wide"}, "config.json cannot be read"),
        ("both", {"dtype": "bfloat16"}, "look at dtype"),
        (
            "generator/config.json",
            {"tie_word_embeddings": False},
            "lacks the head of ElectraForMaskedLM, gen",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_weights(refused, final, half, changes, words):
    """Transformers fills such gaps with random weights and a warning."""
    edit_configs(final, half, **changes)
    assert words in refused("--input_dir", final)


def test_what_was_there_is_never_touched(refused, extract, final, tmp_path):
    out = tmp_path / "out"
    (out / "discriminator").mkdir(parents=True)
    (out / "discriminator" / "mine.txt").write_text("months of work", encoding="utf-8")
    for flags in ([], ["--discriminator"], ["--generator", "--discriminator"]):
        assert "out/discriminator exists already" in refused("--input_dir", final, *flags)
    assert extract("--input_dir", final, "--output_dir", out, "--generator")[0] == 0
    assert (out / "discriminator" / "mine.txt").read_text(encoding="utf-8") == "months of work"
    assert "out/generator exists already" in refused("--input_dir", final, "--generator")


def test_output_in_places_where_it_must_not_be(refused, checkpoint, tmp_path):
    for place in (checkpoint, checkpoint / "extracted", checkpoint / "generator" / "deep" / "er"):
        assert "lies in the checkpoint" in refused("--input_dir", checkpoint, "--discriminator", output=place)
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "is a file: give another folder" in refused(
        "--input_dir", checkpoint, "--generator", output=tmp_path / "file"
    )
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "generator").symlink_to(tmp_path / "nowhere")
    assert "exists already" in refused("--input_dir", checkpoint, output=tmp_path / "link")


def test_a_full_disk_leaves_nothing_behind(refused, final, monkeypatch):
    """The disk fills up at the second half: the first is not published alone."""
    copied = []

    def copy(source, target, **how):
        copied.append(source)
        if len([file for file in copied if file.name == "model.safetensors"]) == 2:
            raise OSError(28, "No space left on device", str(target))
        return original(source, target, **how)

    original = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert "No space left on device" in refused("--input_dir", final)


def test_mistyped_options_and_help(refused, final):
    assert "did you mean --generator" in refused("--input_dir", final, "--generater")
    text, heavy = help_of(SCRIPT)
    assert not heavy
    for option in ("input_dir", "output_dir", "generator", "discriminator", "parameter_file", "model_type"):
        assert f"--{option}" in text
