"""The files for `accelerate launch`: Accelerate reads them, every key is explained, files that must agree do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

FOLDER = Path(__file__).resolve().parent.parent / "accelerate_configs"
FILES = sorted(set(FOLDER.rglob("*.yaml")) - {FOLDER / "cluster.example.yaml"})  # which is for scripts/launch.py
EXPECTED = {
    "cpu.yaml": ("NO", 1, "no"),
    "cpu_2proc.yaml": ("MULTI_GPU", 2, "no"),
    "gpu1.yaml": ("NO", 1, "no"),
    "gpu1_bf16.yaml": ("NO", 1, "bf16"),
    "gpu1_fp16.yaml": ("NO", 1, "fp16"),
    "gpu4_fp16.yaml": ("MULTI_GPU", 4, "fp16"),
    "gpu4_bf16.yaml": ("MULTI_GPU", 4, "bf16"),
    "gpu8_bf16.yaml": ("MULTI_GPU", 8, "bf16"),
    "gpu8_fp16.yaml": ("MULTI_GPU", 8, "fp16"),
    "fsdp2_bf16.yaml": ("FSDP", 8, "bf16"),
    "two_nodes/rank0_4gpu_fp16.yaml": ("MULTI_GPU", 8, "fp16"),
    "two_nodes/rank1_2gpu_fp16.yaml": ("MULTI_GPU", 4, "fp16"),
}
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))


def keys(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_every_file_is_expected() -> None:
    assert {str(file.relative_to(FOLDER)) for file in FILES} == set(EXPECTED)


@each_file
def test_accelerate_loads_it(file: Path) -> None:
    config = ClusterConfig.from_yaml_file(str(file))
    assert isinstance(load_config_from_file(str(file)), ClusterConfig)
    found = (config.distributed_type.value, config.num_processes, config.mixed_precision)
    assert found == EXPECTED[str(file.relative_to(FOLDER))]
    assert config.use_cpu == file.name.startswith("cpu")
    assert config.rdzv_backend == "static"


@pytest.mark.parametrize("file", [*FILES, FOLDER / "cluster.example.yaml"], ids=lambda file: file.name)
def test_every_key_has_a_comment_and_the_file_fits_one_screen(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 65
    assert max(map(len, lines)) <= 118
    for before, line in itertools.pairwise(lines):
        if line.strip() and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("# "), f"{line!r} is not explained"


@each_file
def test_the_file_names_itself_in_its_command(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert f"--config_file accelerate_configs/{file.relative_to(FOLDER)} scripts/" in text


@each_file
def test_a_port_that_suits(file: Path) -> None:
    content = keys(file)
    if content["num_machines"] > 1:
        assert content["main_process_port"] > 0  # machine 1 has to know it
    elif content["num_processes"] > 1:
        assert content["main_process_port"] == 0  # two runs on one machine do not collide


def test_two_nodes_agree_and_start_four_and_two_processes() -> None:
    first, second = (keys(FOLDER / "two_nodes" / name) for name in ("rank0_4gpu_fp16.yaml", "rank1_2gpu_fp16.yaml"))
    own = ("machine_rank", "num_processes")
    assert {k: v for k, v in first.items() if k not in own} == {k: v for k, v in second.items() if k not in own}
    assert first["num_machines"] == 2
    assert (first["machine_rank"], second["machine_rank"]) == (0, 1)
    assert [node["num_processes"] // node["num_machines"] for node in (first, second)] == [4, 2]


def test_fsdp_keys_are_those_of_the_second_version() -> None:
    """Keys of the first version would only be warned about, or ignored."""
    fsdp = keys(FOLDER / "fsdp2_bf16.yaml")["fsdp_config"]
    assert fsdp["fsdp_version"] == 2
    assert isinstance(fsdp["fsdp_reshard_after_forward"], bool)
    obsolete = ("sharding_strategy", "use_orig_params", "sync_module_states", "backward_prefetch", "forward_prefetch")
    assert not [key for key in obsolete if f"fsdp_{key}" in fsdp]


def test_fsdp_keys_are_options_of_the_launcher() -> None:
    """`accelerate launch` copies these keys without looking: a misspelt one would be lost."""
    from accelerate.commands.launch import launch_command_parser

    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(keys(FOLDER / "fsdp2_bf16.yaml")["fsdp_config"]) <= set(options)
