import os
import shutil
import stat
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lmscripts.errors import UserError
from lmscripts.files import _HOST, new_folder
from lmscripts.models.finding import SNAPSHOTS, checkpoint_place, find_saved, look_for_whole, run_of
from lmscripts.training import checkpoint as checkpoints
from lmscripts.training.folder import RunFolder


def write_model(folder):
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(os.urandom(5000))
    (folder / "model.safetensors").chmod(0o600)


def save(run_dir, step):
    return checkpoints.save_checkpoint(
        run_dir / f"checkpoint-{step}", write_model, {"a/exp_avg": torch.rand(100)}, {"step": step}
    )


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "training_state.json", "checksums.json"]


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [missing, empty, truncated, zeroed, one_bit])
def test_every_damage_is_found_and_the_one_before_taken(tmp_path, file, damage):
    before, newest = save(tmp_path, 5), save(tmp_path, 10)
    damage(newest / file)
    found, sentences = checkpoints.newest_whole_checkpoint(tmp_path)
    assert found == before
    assert len(sentences) == 1
    assert "checkpoint-10" in sentences[0]
    # A bit of the list of checksums itself may have been the name of another file.
    assert file in sentences[0] or file == "checksums.json"
    assert (tmp_path / "checkpoint-10.damaged").is_dir()
    assert save(tmp_path, 10).is_dir()  # the step can be saved again


def test_newest_is_by_number_and_other_folders_are_ignored(tmp_path):
    for step in (5, 20, 100):
        save(tmp_path, step)
    for name in ("checkpoint-x", "checkpoint-", "tmp", ".checkpoint-300.aside-1-abc", "checkpoint-200.damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-500").write_text("a file", encoding="utf-8")
    assert checkpoints.newest_whole_checkpoint(tmp_path)[0].name == "checkpoint-100"


def test_snapshots_are_checkpoints_too(tmp_path):
    """After whole epochs, or within one after so many records of all; they are found, aged, and set aside alike."""
    run = RunFolder(tmp_path, {}, float)
    for name in ("00.90", "00.100", "01", "01.250", "01.1000", "02", "10"):
        checkpoints.save_checkpoint(tmp_path / SNAPSHOTS / name, write_model, {"a/exp_avg": torch.rand(100)}, {})
    for name in ("x", ".03.aside-1-abc", "04.damaged", "1e5", "05.1.2"):
        (tmp_path / SNAPSHOTS / name).mkdir()
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)][:4] == ["00.90", "00.100", "01", "01.250"]
    run.prune(keep_last=3)
    kept = checkpoints.list_checkpoints(tmp_path)
    assert [path.name for path in kept] == ["01.1000", "02", "10"]
    missing(kept[-1] / "model.safetensors")
    assert look_for_whole(tmp_path)[0] == kept[1]
    assert find_saved(tmp_path)[0] == kept[1]
    (kept[1] / "training_state.json").write_text("{}", encoding="utf-8")
    assert checkpoints.newest_whole_checkpoint(tmp_path)[0] == kept[0]
    assert {"10.damaged", "02.damaged"} < {path.name for path in (tmp_path / SNAPSHOTS).iterdir()}
    with pytest.raises(UserError, match="holds a run already"):
        run.claim(do_continue=False)
    assert all(run_of(path) == tmp_path for path in (kept[0], tmp_path / "checkpoint-5"))
    assert checkpoint_place(tmp_path / "10") is None  # a number is a snapshot in its folder only


def test_files_get_the_usual_modes(tmp_path):
    folder = save(tmp_path, 1)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((folder / "optimizer.safetensors").stat().st_mode) == 0o666 & ~umask


def test_pruning_keeps_the_newest_and_the_multiples(tmp_path):
    for step in range(5, 65, 5):
        save(tmp_path, step)
    RunFolder(tmp_path, {}, float).prune(keep_last=2, keep_every=20)
    assert [int(p.name.split("-")[1]) for p in checkpoints.list_checkpoints(tmp_path)] == [20, 40, 55, 60]
    RunFolder(tmp_path, {}, float).prune(keep_last=0)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-60"]


def test_a_failing_save_leaves_the_earlier_ones(tmp_path):
    save(tmp_path, 5)

    def full(folder):
        write_model(folder)
        raise OSError(28, "No space left on device", str(folder / "model.safetensors"))

    with pytest.raises(UserError, match=r"checkpoint-10.*No space left.*bytes are free"):
        checkpoints.save_checkpoint(tmp_path / "checkpoint-10", full, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]
    assert checkpoints.find_damage(tmp_path / "checkpoint-5") is None


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    import subprocess
    import sys

    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftover = tmp_path / f".checkpoint-5.aside-{_HOST}-{int(dead.stdout)}-abcdef"
    leftover.mkdir()
    mine = tmp_path / f".checkpoint-5.aside-{_HOST}-{os.getpid()}-abcdef"
    other = tmp_path / f".checkpoint-5.aside-elsewhere-{int(dead.stdout)}-abcdef"
    mine.mkdir()
    other.mkdir()
    save(tmp_path, 5)
    assert not leftover.exists()
    assert mine.exists()
    assert other.exists()  # of another machine, where that process may live


def test_a_reader_never_sees_a_half_written_folder(tmp_path):
    with new_folder(tmp_path / "out") as aside:
        (aside / "a").write_text("1", encoding="utf-8")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").exists()
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
        pass


def trained(name, steps, state=None):
    """A model stepped a few times; optionally its optimizer comes from saved state."""
    from lmscripts.training.optim import build_optimizer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = build_optimizer(name, model, learning_rate=0.01, betas=(0.9, 0.99), epsilon=1e-6, weight_decay=0.1)
    if state is not None:
        model.load_state_dict(state[0])
        checkpoints.load_optimizer_state(optimizer, model, *state[1:])
    for step in steps:
        torch.manual_seed(step)
        model(torch.rand(4, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_optimizer_state_comes_back_bit_for_bit(tmp_path, name):
    import json

    from safetensors.torch import save_file

    whole, _ = trained(name, range(10))
    half, optimizer = trained(name, range(5))
    tensors, groups = checkpoints.optimizer_state(optimizer, half)
    save_file(tensors, tmp_path / "o.safetensors")
    groups = json.loads(json.dumps(groups))
    state = ({k: v.clone() for k, v in half.state_dict().items()}, tmp_path / "o.safetensors", groups)
    resumed, _ = trained(name, range(5, 10), state)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [4, 6, 10])
def test_state_of_another_run_is_fitted_to_the_rows_there_are(tmp_path, rows):
    """Longer rows need more position embeddings; their moments begin at 0, and rates are those of the new run."""

    def embedding(number, learning_rate):
        torch.manual_seed(0)
        table = nn.Embedding(number, 3)
        return table, torch.optim.AdamW(table.parameters(), lr=learning_rate, weight_decay=0.5)

    before, optimizer = embedding(6, 1.0)
    before(torch.arange(6)).sum().backward()
    optimizer.step()
    tensors, groups = checkpoints.optimizer_state(optimizer, before)
    save_file(tensors, tmp_path / "state.safetensors")
    after, other = embedding(rows, 0.25)
    checkpoints.load_optimizer_state(other, after, tmp_path / "state.safetensors", groups, another_run=True)
    found, kept = other.state[after.weight]["exp_avg"], min(rows, 6)
    assert found.shape == after.weight.shape
    assert torch.equal(found[:kept], optimizer.state[before.weight]["exp_avg"][:kept])
    assert (found[kept:] == 0).all()
    assert other.param_groups[0]["lr"] == 0.25
    after(torch.arange(rows)).sum().backward()
    other.step()


def test_state_of_a_parameter_that_is_frozen_now_is_left_out(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors, groups = checkpoints.optimizer_state(optimizer, model)
    save_file(tensors, tmp_path / "state.safetensors")
    model[0].requires_grad_(False)
    other = torch.optim.AdamW(model[1].parameters())
    checkpoints.load_optimizer_state(other, model, tmp_path / "state.safetensors", groups, another_run=True)
    assert set(other.state) == set(model[1].parameters())


def test_settings_that_may_not_change_are_named_also_where_they_were_left_out(tmp_path):
    fixed = {"objective": "masked", "seed": 1, "batch_size": [8], "ema_decay": None, "format": 2}
    checkpoints.save_checkpoint(tmp_path / "checkpoint-5", write_model, {"a/exp_avg": torch.rand(3)}, {"fixed": fixed})
    changed = {"objective": "", "seed": 0, "batch_size": (8,), "ema_decay": 0.9, "of_a_newer_version": None}
    sentence = r"\(objective: masked then, not given now; seed: 1 then, 0 now; ema_decay: not given then, 0.9 now\)"
    with pytest.raises(UserError, match=sentence):
        RunFolder(tmp_path, changed, float).claim(do_continue=True)
    same = {"objective": "masked", "seed": 1, "batch_size": (8,), "of_a_newer_version": ""}
    found, continued, _ = RunFolder(tmp_path, same, float).claim(do_continue=True)
    assert (found, continued) == (tmp_path / "checkpoint-5", True)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(number):
    weights = {"a.weight": torch.ones(3), "b.ids": torch.arange(3), "b.weight": torch.tensor([1.0, number])}
    with pytest.raises(UserError, match=r"after step 1,000 b.weight of the generator holds numbers"):
        checkpoints.check_finite(weights, "generator", 1000)
    checkpoints.check_finite({"a.weight": torch.full((2,), 3e38)}, "", 1)


def test_a_run_folder_that_goes_while_it_is_saved_is_said_with_the_way_out(tmp_path):
    def go(aside):
        shutil.rmtree(tmp_path / "run")
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "run"))

    with pytest.raises(UserError, match=r"could not save .*run is gone\. .*--do_continue"):
        checkpoints.save_checkpoint(tmp_path / "run" / "checkpoint-5", go, {}, {})


def test_copies_for_the_writer_are_those_of_now_when_an_optimizer_has_got_a_state():
    """At the first save it may have none: no step had finite gradients yet."""
    folder = SimpleNamespace(_copies=[])
    first = [torch.ones(2)]
    assert len(list(RunFolder._copied(folder, first))) == 1
    more = [torch.full((2,), 3.0), torch.full((3, 1), 4.0)]
    copied = list(RunFolder._copied(folder, more))
    assert [each.tolist() for each in copied] == [[3.0, 3.0], [[4.0], [4.0], [4.0]]]
    kept = folder._copies
    more[0].zero_()
    assert copied[0].tolist() == [3.0, 3.0]
    list(RunFolder._copied(folder, more))
    assert folder._copies is kept  # the same memory from then on
