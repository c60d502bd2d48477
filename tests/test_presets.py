"""The parameter file: its presets are right, and whatever is wrong in one is named at once."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from lmscripts.errors import UserError
from lmscripts.models.families import preset_keys
from lmscripts.options import presets
from lmscripts.options.presets import FamilyKeys, Preset, default_parameter_file, load_preset

PARAMETER_FILE = Path(__file__).resolve().parent.parent / "parameter.json"
NAMES = [name for name in json.loads(PARAMETER_FILE.read_text(encoding="utf-8")) if name != "comment"]

BUILT = preset_keys()
# Families whose presets the file has already, although nothing trains them.
FAMILIES = BUILT | {name: FamilyKeys() for name in ("deberta", "debertav2", "debertav3", "modernbert")}

BERT = {
    "number-of-layers": 2,
    "hidden-size": 128,
    "sequence-length": 128,
    "ffn-inner-hidden-size": 512,
    "attention-heads": 2,
    "warmup-steps": 10,
    "learning-rate": 1e-3,
    "batch-size": {"-1": 32},
    "train-steps": 100,
}
ELECTRA = {**BERT, "embedding-size": 64, "generator-size": "1/2", "mask-percent": 15}


def load(folder: Path, entries: dict[str, Any], name: str = "bert-mine") -> Preset:
    file = folder / "parameter.json"
    file.write_text(json.dumps({name: entries}), encoding="utf-8")
    return load_preset(file, name, families=FAMILIES)


def refusal(folder: Path, entries: dict[str, Any], name: str = "bert-mine") -> str:
    with pytest.raises(UserError) as refused:
        load(folder, entries, name)
    message = str(refused.value)
    assert message.startswith(f"{folder / 'parameter.json'}, preset {name}: ")
    assert "\n" not in message
    return message


def without(entries: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in keys}


# name: layers, hidden, ffn, heads, embedding, generator, mask %, length, rate, warmup, batch, steps, save, log
PUBLISHED = {
    "bert-small": (12, 256, 1024, 4, None, None, 15, 128, 5e-4, 10000, 128, 1450000, 100000, 5000),
    "bert-base": (12, 768, 3072, 12, None, None, 15, 512, 1e-4, 10000, 256, 1000000, 50000, 5000),
    "bert-large": (24, 1024, 4096, 16, None, None, 15, 512, 1e-4, 10000, 256, 464000, 50000, 5000),
    "electra-small-paper": (12, 256, 1024, 4, 128, "1/4", 15, 128, 5e-4, 10000, 128, 1000000, 100000, 5000),
    "electra-small": (12, 256, 1024, 4, 128, "1/1", 15, 128, 5e-4, 10000, 128, 1000000, 100000, 5000),
    "electra-base": (12, 768, 3072, 12, 768, "1/3", 15, 512, 2e-4, 10000, 256, 766000, 50000, 5000),
    "electra-large": (24, 1024, 4096, 16, 1024, "1/4", 25, 512, 2e-4, 10000, 2048, 400000, 50000, 5000),
    "roberta-base": (12, 768, 3072, 12, None, None, 15, 512, 6e-4, 24000, 8000, 500000, 50000, 5000),
    "roberta-large": (24, 1024, 4096, 16, None, None, 15, 512, 4e-4, 30000, 8000, 500000, 50000, 5000),
    "deberta-base": (12, 768, 3072, 12, None, None, 15, 512, 2e-4, 10000, 2000, 1000000, 10000, 5000),
    "bert-base-dist": (12, 768, 3072, 12, None, None, 15, 512, 1e-4, 10000, 256, 1000000, 50000, 5000),
    "bert-base-suzuki": (12, 768, 3072, 12, None, None, 15, 512, 1e-4, 10000, 256, 1000000, 50000, 5000),
    "electra-base-suzuki": (12, 768, 3072, 12, 768, "1/3", 15, 512, 2e-4, 10000, 256, 766000, 50000, 5000),
    "bert-small-dist": (12, 256, 1024, 4, None, None, 15, 128, 5e-4, 10000, 64, 1450000, 100000, 5000),
    "electra-small-paper-dist": (12, 256, 1024, 4, 128, "1/4", 15, 128, 5e-4, 10000, 128, 1000000, 100000, 5000),
    "bert-small-additional": (*[None] * 6, 15, None, 1e-4, 10000, 128, 1450000, 100000, 5000),
    "electra-small-additional": (*[None] * 6, 15, None, 1e-4, 10000, 128, 1000000, 100000, 5000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    preset = load_preset(PARAMETER_FILE, name, families=FAMILIES)
    fraction = PUBLISHED[name][5]
    assert (
        preset.layers,
        preset.hidden_size,
        preset.ffn_size,
        preset.heads,
        preset.embedding_size,
        preset.generator_fraction,
        round(preset.mask_probability * 100, 9),
        preset.sequence_length,
        preset.learning_rate,
        preset.warmup_steps,
        preset.batch_size,
        preset.train_steps,
        preset.save_steps,
        preset.logging_steps,
    ) == (*PUBLISHED[name][:5], fraction and Fraction(fraction), *PUBLISHED[name][6:])
    assert (preset.fp16_type, preset.bf16) == (0, False)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("bert-base", None),
        ("bert-base-dist", {0: 80, 1: 80, 2: 48, 3: 48}),
        ("bert-base-suzuki", {0: 98, 1: 100, 2: 58}),
        ("bert-small-dist", {0: 64}),
    ],
)
def test_shares_of_the_nodes(name: str, shares: dict[int, int] | None) -> None:
    assert load_preset(PARAMETER_FILE, name, families=BUILT).node_batch_sizes == shares


def test_further_pretraining() -> None:
    bert = load_preset(PARAMETER_FILE, "bert-small-additional", families=BUILT)
    assert (bert.pretrained_model, bert.frozen_layers) == ("izumi-lab/bert-small-japanese", 6)
    electra = load_preset(PARAMETER_FILE, "electra-small-additional", families=FAMILIES)
    assert electra.frozen_layers == -1
    assert electra.pretrained_generator == "izumi-lab/electra-small-paper-japanese-generator"
    assert electra.pretrained_discriminator == "izumi-lab/electra-small-paper-japanese-discriminator"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("bert-tiny", (2, 128, 512, 2, 128)),
        ("roberta-tiny", (2, 128, 512, 2, 128)),
        ("electra-tiny", (2, 128, 512, 2, 128)),
        ("gpt2-tiny", (2, 128, 512, 2, 128)),
        ("gpt2-small", (12, 768, 3072, 12, 1024)),
        ("gpt2-medium", (24, 1024, 4096, 16, 1024)),
        ("gpt2-large", (36, 1280, 5120, 20, 1024)),
        ("gpt2-xl", (48, 1600, 6400, 25, 1024)),
        ("debertav2-base", (12, 768, 3072, 12, 512)),
        ("debertav3-base", (12, 768, 3072, 12, 512)),
        ("modernbert-tiny", (2, 128, 344, 2, 128)),
        ("modernbert-small", (12, 256, 384, 4, 512)),
        ("modernbert-base", (22, 768, 1152, 12, 1024)),
    ],
)
def test_sizes_of_the_added_presets(name: str, sizes: tuple[int, ...]) -> None:
    preset = load_preset(PARAMETER_FILE, name, families=FAMILIES)
    found = (preset.layers, preset.hidden_size, preset.ffn_size, preset.heads, preset.sequence_length)
    assert found == sizes


def test_every_preset_is_tested_above() -> None:
    added = {name for mark in test_sizes_of_the_added_presets.pytestmark for name, _ in mark.args[1]}
    assert set(NAMES) == set(PUBLISHED) | added


@pytest.mark.parametrize("name", [name for name in NAMES if name.partition("-")[0] not in BUILT])
def test_families_that_are_not_built_are_refused_by_name(name: str) -> None:
    family = name.partition("-")[0]
    with pytest.raises(UserError, match=f"preset {name}: models of the family {family} cannot be trained"):
        load_preset(PARAMETER_FILE, name, families=BUILT)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "electra"])
def test_the_name_begins_with_the_family(tmp_path: Path, family: str) -> None:
    assert load(tmp_path, BERT, f"{family}-x").family == family


@pytest.mark.parametrize(("name", "family"), [("mine", "mine"), ("my-bert-base", "my"), ("bertx-base", "bertx")])
def test_a_name_without_a_family(tmp_path: Path, name: str, family: str) -> None:
    message = refusal(tmp_path, BERT, name)
    assert f"models of the family {family} cannot be trained yet, only {', '.join(sorted(BUILT))}" in message


@pytest.mark.parametrize("key", sorted(BERT))
def test_each_missing_key_is_named(tmp_path: Path, key: str) -> None:
    assert refusal(tmp_path, without(BERT, key)).endswith(f": missing key {key}")


@pytest.mark.parametrize("key", ["embedding-size", "generator-size", "mask-percent"])
def test_each_missing_key_of_electra_is_named(tmp_path: Path, key: str) -> None:
    assert refusal(tmp_path, without(ELECTRA, key), "electra-mine").endswith(f": missing key {key}")


def test_all_problems_at_once(tmp_path: Path) -> None:
    entries = {**without(BERT, "hidden-size", "train-steps"), "hiden-size": 3, "color": 1, "learning-rate": "x"}
    message = refusal(tmp_path, entries)
    for part in (
        "missing keys hidden-size and train-steps; ",
        "unknown keys hiden-size (did you mean hidden-size?) and color; ",
        'learning-rate must be a number above 0, not "x"',
    ):
        assert part in message


def test_optional_keys_and_spellings(tmp_path: Path) -> None:
    preset = load(tmp_path, {**{key.replace("-", "_"): value for key, value in BERT.items()}, "comment": ["a", "b"]})
    assert (preset.save_steps, preset.logging_steps, preset.accumulation_steps) == (50000, 5000, 1)
    assert (preset.mask_probability, preset.frozen_layers, preset.fp16_type, preset.bf16) == (0.15, -1, 0, False)
    assert load(tmp_path, {**BERT, "mask-percent": 30}).mask_probability == 0.3
    assert load(tmp_path, {**BERT, "flozen-layers": 1}).frozen_layers == 1
    assert load(tmp_path, {**BERT, "frozen-layers": 1}).frozen_layers == 1
    assert load(tmp_path, {**ELECTRA, "generator-size": 0.5}, "electra-mine").generator_fraction == Fraction(1, 2)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden-size": 128.0}, "hidden-size must be a whole number of at least 1, not 128.0"),
        ({"hidden-size": True}, "hidden-size must be a whole number of at least 1, not true"),
        ({"number-of-layers": 0}, "number-of-layers must be a whole number of at least 1, not 0"),
        ({"sequence-length": "128"}, 'sequence-length must be a whole number of at least 8, not "128"'),
        ({"attention-heads": 3}, "hidden-size 128 is not divisible by attention-heads 3"),
        ({"learning-rate": 0}, "learning-rate must be a number above 0, not 0"),
        ({"learning-rate": float("nan")}, "learning-rate must be a number above 0, not NaN"),
        ({"warmup-steps": -1}, "warmup-steps must be a whole number of at least 0, not -1"),
        ({"warmup-steps": 101}, "warmup-steps 101 exceeds train-steps 100"),
        ({"mask-percent": 0}, "mask-percent must be a number above 0 and below 100, not 0"),
        ({"mask-percent": 100}, "mask-percent must be a number above 0 and below 100, not 100"),
        ({"fp16-type": 4}, "fp16-type must be a whole number from 0 to 3, not 4"),
        ({"bf16": 1}, "bf16 must be true or false, not 1"),
        ({"fp16-type": 1, "bf16": True}, "fp16-type 1 and bf16 true exclude each other"),
        ({"frozen-layers": -2}, "frozen-layers must be a whole number of at least -1, not -2"),
        ({"frozen-layers": 3}, "frozen-layers 3 exceeds number-of-layers 2"),
        ({"frozen-layers": 1, "flozen-layers": 1}, "frozen-layers and flozen-layers mean the same; give one of them"),
        ({"hidden_size": 128}, "hidden-size and hidden_size mean the same; give one of them"),
        ({"comment": 3}, "comment must be a text or a list of texts"),
        ({"embedding-size": 64}, "unknown key embedding-size"),
        ({"pos_att_type": ["p2c"]}, "unknown key pos_att_type"),
        ({"pretrained_model_name_or_path": "x/y"}, "no effect, as the sizes are those of the pretrained model"),
        ({"batch-size": 32}, 'batch-size must be {"-1": rows} or {"0": rows of node 0'),
        ({"batch-size": {}}, "batch-size must be "),
        ({"batch-size": {"-1": 0}}, 'batch-size must be whole numbers of at least 1, not {"-1": 0}'),
        ({"batch-size": {"0": 3, "1": -3}}, 'batch-size must be whole numbers of at least 1, not {"1": -3}'),
        ({"batch-size": {"-1": 32, "0": 3}}, 'batch-size has "-1" (a single node) beside node numbers'),
        ({"batch-size": {"0": 3, "2": 3}}, 'must number its nodes "0" and "1", not 0 and 2'),
        ({"batch-size": {"1": 3}}, "must number its nodes"),
        ({"batch-size": {"a": 3}}, "must number its nodes"),
    ],
)
def test_wrong_values(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    assert part in refusal(tmp_path, {**BERT, **changes})


@pytest.mark.parametrize("value", ["1/0", "0/4", "-1/4", "5/4", "a", "", 2, True, None, [1, 4]])
def test_wrong_fractions(tmp_path: Path, value: Any) -> None:
    message = refusal(tmp_path, {**ELECTRA, "generator-size": value}, "electra-mine")
    assert f'generator-size must be a fraction such as "1/4", at most 1, not {json.dumps(value)}' in message


def test_a_fraction_that_leaves_half_a_head(tmp_path: Path) -> None:
    message = refusal(tmp_path, {**ELECTRA, "generator-size": "1/4"}, "electra-mine")
    assert "generator-size 1/4 of attention-heads 2 is not a whole number" in message


def test_nodes_are_summed_whatever_their_order(tmp_path: Path) -> None:
    preset = load(tmp_path, {**BERT, "batch-size": {"2": 56, "0": 100, "1": 100}})
    assert preset.batch_size == 256
    assert preset.node_batch_sizes == {0: 100, 1: 100, 2: 56}


@pytest.mark.parametrize(("name", "near"), [("bert-bse", "bert-base"), ("electra-smal", "electra-small")])
def test_an_unknown_preset(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"has no preset '{name}'; did you mean .*{near}"):
        load_preset(PARAMETER_FILE, name, families=BUILT)


def test_an_unknown_preset_far_from_all() -> None:
    for name in ("zzzzzz", "comment"):
        with pytest.raises(UserError, match=f"has no preset '{name}'; it has bert-tiny, "):
            load_preset(PARAMETER_FILE, name, families=BUILT)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{\n  "bert-x": {,}\n}', "parameter.json, line 2, column 14: not valid JSON"),
        (b"", "line 1, column 1: not valid JSON"),
        (b"[1]", "must be an object of presets, not list"),
        (b'{"bert-x": 3}', "preset bert-x must be an object with keys, not 3"),
        (b'{"bert-x": {}, "bert-x": {}}', "parameter.json: key bert-x given twice"),
        (b'{"bert-x": {"bf16": 1, "train-steps": 2, "bf16": 1}}', "key bf16 (beside train-steps) given twice"),
        (b'{"comment": 3, "bert-x": {}}', "comment must be a text or a list of texts"),
        (b'{"bert-x\xff": 3}', "is not UTF-8 text"),
    ],
)
def test_files_that_are_no_parameter_files(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "parameter.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_preset(file, "bert-x", families=BUILT)
    assert part in str(refused.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for file, reason in ((tmp_path / "absent.json", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"{file.name} cannot be read: {reason}"):
            load_preset(file, "bert-base", families=BUILT)


def test_the_presets_are_found_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a script stands and is started."""
    monkeypatch.chdir(tmp_path)
    assert default_parameter_file() == PARAMETER_FILE
    monkeypatch.setattr(presets, "project_folder", lambda: tmp_path)
    with pytest.raises(UserError, match="say with --parameter_file where"):
        default_parameter_file()


def test_how_many_checkpoints_stay(tmp_path: Path) -> None:
    """As many as the scripts kept that had such files; presets of our own say fewer."""
    assert load(tmp_path, BERT).keep_last == 20
    assert load(tmp_path, {**BERT, "keep-last": 2}).keep_last == 2
    assert load_preset(PARAMETER_FILE, "bert-base", families=BUILT).keep_last == 20
    assert load_preset(PARAMETER_FILE, "bert-tiny", families=BUILT).keep_last == 3
    assert "keep-last must be" in refusal(tmp_path, {**BERT, "keep-last": 0})


def test_another_family_is_no_hint() -> None:
    with pytest.raises(UserError, match="has no preset 'deberta-bose'; did you mean deberta-base"):
        load_preset(PARAMETER_FILE, "deberta-bose", families=BUILT)
    with pytest.raises(UserError, match="has no preset 'gpt-small'; it has"):
        load_preset(PARAMETER_FILE, "gpt-small", families=BUILT)


def test_a_configuration_is_no_file_of_presets(tmp_path: Path) -> None:
    (tmp_path / "bert_config.json").write_text('{"num_hidden_layers": 2}', encoding="utf-8")
    with pytest.raises(UserError, match="--bert_config_file takes its sizes"):
        load_preset(tmp_path / "bert_config.json", "bert-base", families=BUILT)
