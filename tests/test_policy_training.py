"""Whole runs of train_policy.py, and each fault of an older trainer that would show in them."""

import json
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from conftest import PATIENCE, ROOT, launch, run_script
from runs import kill_tree, largest_difference, same_bits, start
from safetensors.torch import load_file

from lmscripts.models.finding import list_checkpoints

SCRIPT = str(ROOT / "scripts" / "train_policy.py")
NUMBER = 400
# Seven steps in an epoch, the last of them a short one.
USUAL = """--dimension 16 --num-heads 2 --num-layers 2 --training-batch-size 32 --gradient-accumulation-steps 2
--optimizer adam --epsilon 1e-4 --logging_steps 1 --device cpu --snapshot-interval 150 --num-epochs 2"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Decisions to learn, others to judge by, and a store of both."""
    folder = tmp_path_factory.mktemp("decisions")
    for name, number, seed in (("train", NUMBER, 1), ("held_out", 90, 2)):
        arguments = ("--output_file", folder / f"{name}.txt", "--num_records", number, "--seed", seed)
        run_script("make_annotations.py", *arguments)
    arguments = ("--input_file", folder / "train.txt", "--validation_file", folder / "held_out.txt")
    run_script("prepare_annotations.py", *arguments, "--output_dir", folder / "store")
    return folder


def line(files, prefix, name, *arguments):
    """A command line: the usual options, but where others are given; None leaves one out."""
    given, names = {}, f"--training-data {files}/store --output-prefix {prefix} --experiment-name {name}"
    for word in [*f"{names} {USUAL}".split(), *arguments]:
        if str(word).startswith("--"):
            values = given[word] = []
        else:
            values.append(word)
    return [word for option, values in given.items() if values != [None] for word in (option, *values)]


def train(files, prefix, name, *arguments, **how):
    return run_script("train_policy.py", *line(files, prefix, name, *arguments), **how)


def weights(run_dir, folder="final"):
    return load_file(run_dir / folder / "model.safetensors")


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(run_dir):
    of_time = ("second", "waiting")
    return [{n: v for n, v in each.items() if not any(word in n for word in of_time)} for each in records(run_dir)]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A run of two epochs that nothing stopped."""
    prefix = tmp_path_factory.mktemp("runs")
    done = train(files, prefix, "whole")
    assert "of a resumed run included" in done.stdout
    assert "time: about" in done.stdout
    return prefix / "whole"


def test_a_run_leaves_snapshots_by_records_and_epochs_and_a_model(whole):
    names = sorted(path.name for path in (whole / "snapshots").iterdir())
    assert [name for name in names if "." not in name] == ["01", "02"]
    inside = [[int(part) for part in name.split(".")] for name in names if "." in name]
    # At the first step at or beyond each multiple of 150, of which the fifth falls to the end of an epoch.
    assert [count // 150 for _, count in inside] == [1, 2, 3, 4]
    assert all(count % 150 < 64 and epoch == count // NUMBER for epoch, count in inside)
    log = records(whole)
    assert log[-2]["records"] == 2 * NUMBER  # each record twice, none left out at the end of an epoch
    assert [each["step"] for each in log if "eval_loss" in each] == [0, 7, 14]
    assert log[-1]["eval_loss"] < log[0]["eval_loss"]
    assert {"config.yaml", "curves.png", "tensorboard", "final"} <= {path.name for path in whole.iterdir()}
    assert "held-out top1 accuracy" in (whole / "final" / "README.md").read_text(encoding="utf-8")


def test_tracker_has_the_older_names(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert {"Training loss", "Gradient norm", "Validation epoch loss", "eval_loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("Validation epoch loss")] == [0, 1, 2]
    assert events.Scalars("Training loss")[-1].step == 2 * NUMBER


@pytest.mark.parametrize("step", [3, 9])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits_with_another_number_of_workers(files, whole, tmp_path, step):
    train(files, tmp_path, "part", "--stop_at_step", step, "--num-workers", 0)
    assert not (tmp_path / "part" / "final").exists()
    done = train(files, tmp_path, "part", "--resume", "--num-workers", 1)
    assert "going on from" in done.stdout
    assert same_bits(weights(tmp_path / "part"), weights(whole))
    assert without_times(tmp_path / "part") == without_times(whole)
    assert records(tmp_path / "part")[-2]["records"] == 2 * NUMBER  # the second epoch is a whole one too


def test_of_snapshots_that_are_damaged_the_one_before_is_taken(files, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    snapshots = tmp_path / "run" / "snapshots"
    newest = sorted(snapshots.iterdir(), key=lambda path: path.name)[-3:]
    assert newest[-1].name == "02"
    (newest[-1] / "optimizer.safetensors").unlink()
    shutil.copytree(newest[0], snapshots / "03.9999")  # one that was not whole
    (snapshots / "03.9999" / "checksums.json").unlink()
    done = train(files, tmp_path, "run", "--resume")
    assert done.stdout.count("is damaged") == 2
    assert f"going on from {newest[-2]}" in done.stdout
    assert same_bits(weights(tmp_path / "run"), weights(whole))


def test_a_run_is_not_overwritten(files, whole):
    before = weights(whole)
    done = train(files, whole.parent, whole.name, check=False)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert same_bits(weights(whole), before)
    done = train(files, whole.parent, whole.name, "--resume", "--learning-rate", 0.5, check=False)
    assert done.returncode == 2
    assert "learning_rate: 0.001 then, 0.5 now" in done.stderr
    done = train(files, whole.parent, whole.name, "--resume", "--initial-encoder", whole, check=False)
    assert done.returncode == 2
    assert "--initial-encoder is for a run that begins" in done.stderr


def test_epochs_are_counted_in_all_and_zero_only_validates(files, whole, tmp_path):
    train(files, tmp_path, "run", "--num-epochs", 1)
    assert [path.name for path in (tmp_path / "run" / "snapshots").glob("??")] == ["01"]
    done = train(files, tmp_path, "run", "--num-epochs", 0, "--resume")
    assert "nothing was trained" in done.stdout
    assert records(tmp_path / "run")[-1]["eval_loss"] == records(tmp_path / "run")[-2]["eval_loss"]
    train(files, tmp_path, "run", "--num-epochs", 2, "--resume")
    assert same_bits(weights(tmp_path / "run"), weights(whole))
    done = train(files, tmp_path, "run", "--num-epochs", 1, "--resume", check=False)
    assert done.returncode == 2
    assert "--num-epochs 1 counts all of them" in done.stderr


def test_without_an_end_a_run_is_ended_by_time_or_step(files, whole, tmp_path):
    done = train(files, tmp_path, "run", "--num-epochs", -1, "--stop_at_step", 15)
    assert "epochs without end" in done.stdout
    assert same_bits(weights(tmp_path / "run", "snapshots/02"), weights(whole, "snapshots/02"))
    assert not (tmp_path / "run" / "final").exists()
    done = train(files, tmp_path, "run", "--num-epochs", -1, "--max_time", "1s", "--resume", check=False)
    assert done.returncode == 75
    assert "stopped by --max_time" in done.stdout
    assert not re.search(r"\d,\d{3},\d{3},\d{3}|left, until", done.stdout)  # nobody knows how long


def test_accumulation_is_no_more_than_a_larger_batch(files, whole, tmp_path):
    """Also at the end of an epoch, where the older trainer kept half a step's gradients for the next one."""
    shapes = ("--training-batch-size", 64, "--gradient-accumulation-steps", None, "--micro_batch_size", 13)
    train(files, tmp_path, "run", *shapes)
    assert largest_difference(weights(tmp_path / "run"), weights(whole)) < 1e-5


@pytest.mark.launch
def test_two_unequal_processes_train_as_one(files, whole, tmp_path):
    """With dropout; the older trainer divided the gradient by the number of processes twice."""
    arguments = line(files, tmp_path, "run", "--process_shares", 3, 1, "--stop_at_step", 7)
    launch("cpu_2proc.yaml", "train_policy.py", *arguments)
    assert largest_difference(weights(tmp_path / "run", "snapshots/01"), weights(whole, "snapshots/01")) < 1e-6
    pairs = zip(without_times(tmp_path / "run"), without_times(whole))
    assert all(one == pytest.approx(other, abs=1e-5) for one, other in pairs)
    train(files, tmp_path, "run", "--resume")  # and goes on with another number
    assert largest_difference(weights(tmp_path / "run"), weights(whole)) < 1e-5


def wait_for(process, run_dir, snapshots):
    """Wait until a run has so many snapshots; whether it goes on."""
    deadline = time.monotonic() + PATIENCE
    while len(list_checkpoints(run_dir)) < snapshots and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process.poll() is None


@pytest.mark.launch
@pytest.mark.parametrize("config", [None, "cpu_2proc.yaml"])
def test_a_signal_ends_the_step_and_the_run_goes_on_to_the_same(files, whole, tmp_path, config):
    arguments = line(files, tmp_path, "run", "--num-epochs", -1)
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        process = start(arguments, log, config, SCRIPT)
        assert wait_for(process, tmp_path / "run", 1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE)
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert "everything is saved, go on with --resume" in said
    assert code == 75 if config is None else code != 0
    state = json.loads((list_checkpoints(tmp_path / "run")[-1] / "training_state.json").read_text(encoding="utf-8"))
    train(files, tmp_path, "run", "--resume", "--num-epochs", 1 + state["progress"]["step"] // 7)
    if config is None:
        assert same_bits(weights(tmp_path / "run", "snapshots/01"), weights(whole, "snapshots/01"))
    else:
        assert largest_difference(weights(tmp_path / "run", "snapshots/01"), weights(whole, "snapshots/01")) < 1e-6


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("same_world", [True, False])
def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_been(files, tmp_path, same_world):
    """Bit for bit where one process always did it, to 1e-5 in 30 epochs where their number was another each time."""
    long, moment = ["--snapshot-interval", 60, "--num-epochs", 30], random.Random(7)
    train(files, tmp_path, "whole", *long)
    arguments = line(files, tmp_path, "run", "--resume", *long)
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        for number in range(wanted := int(os.environ.get("LMSCRIPTS_KILLS", 4))):
            config = None if same_world or number % 2 else "cpu_2proc.yaml"
            process = start(arguments, log, config, SCRIPT)
            # Somewhere in the loop or in a save, after a little progress; or at any time, often while starting.
            if moment.random() < 0.6:
                wait_for(process, tmp_path / "run", len(list_checkpoints(tmp_path / "run")) + 1)
            else:
                time.sleep(moment.uniform(0.2, 5))
            time.sleep(moment.random() * 0.1)
            if process.poll() is not None:
                break  # it had ended: the run is complete
            kill_tree(process)
            process.wait()
            kills = number + 1
        assert kills >= min(wanted, 4)
        process = start(arguments, log, None, SCRIPT)
        assert process.wait(PATIENCE) == 0
    log = records(tmp_path / "run")
    assert [each["step"] for each in log if "loss" in each] == list(range(1, 211))
    assert log[-2]["records"] == 30 * NUMBER
    found, expected = (weights(tmp_path / name) for name in ("run", "whole"))
    if same_world:
        assert same_bits(found, expected)
    else:
        assert largest_difference(found, expected) < 1e-5


def test_the_validation_loss_is_that_of_all_records_one_by_one(files, whole):
    from lmscripts.data.decision_rows import make_batch
    from lmscripts.data.decisions import open_decisions
    from lmscripts.models.policy import PolicyModel

    store = open_decisions(files / "store")
    part, model = store.part("validation"), PolicyModel.from_pretrained(whole / "snapshots" / "02").eval()
    losses = []
    with torch.no_grad():
        for row in range(part.num_records):
            batch = make_batch(part, torch.tensor([row]).numpy(), store.schema, False)
            inputs = {name: batch[name] for name in batch if name not in ("labels", "weights")}
            losses.append(-model(**inputs).logits.double().log_softmax(1)[0, batch["labels"][0]])
    assert records(whole)[-1]["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-6)


def test_a_frozen_encoder_stays_as_it_was_given(files, whole, tmp_path):
    given = ("--initial-encoder", whole / "snapshots" / "01", "--freeze-encoder", "--weight-decay", 0.1)
    train(files, tmp_path, "frozen", *given, "--stop_at_step", 4)
    before = weights(whole, "snapshots/01")
    newest = max((tmp_path / "frozen" / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    after = load_file(newest / "model.safetensors")
    said = (tmp_path / "frozen" / "config.yaml").read_text(encoding="utf-8")
    assert f"initial_encoder: {whole}/snapshots/01" in said.replace('"', "")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if name.startswith("decoder.")}
    assert not any(name.split(".")[1] == "encoder" for name in load_file(newest / "optimizer.safetensors"))


def test_the_state_of_an_optimizer_may_come_from_another_run(files, whole, tmp_path):
    parts = [f"--initial-{part}" for part in ("encoder", "decoder", "optimizer")]
    given = [word for part in parts for word in (part, whole / "snapshots" / "01")]
    done = train(files, tmp_path, "run", *given, "--stop_at_step", 1)
    assert "the optimizer's state is that of" in done.stdout
    (newest,) = (tmp_path / "run" / "snapshots").iterdir()
    steps = {
        name: float(t) for name, t in load_file(newest / "optimizer.safetensors").items() if name.endswith("/step")
    }
    assert set(steps.values()) == {8.0}
    done = train(files, tmp_path, "other", *given, "--optimizer", "radam", check=False)
    assert done.returncode == 2
    assert "trained with the optimizer adam" in done.stderr


def test_a_run_that_has_no_snapshot_yet_begins_again_with_what_it_began_with(files, whole, tmp_path):
    given = ("--initial-encoder", whole, "--initial-decoder", whole, "--num-epochs", 0)
    train(files, tmp_path, "run", *given)
    train(files, tmp_path, "run", "--num-epochs", 0, "--resume")
    first, again = (each["eval_loss"] for each in records(tmp_path / "run")[-1:] + records(whole)[-1:])
    assert first == again
    assert "initial_encoder: null" not in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "radam", "lamb"])
def test_every_optimizer_trains_by_its_own_defaults(files, tmp_path, optimizer):
    """The older trainer fell over sgd, and over any --epsilon."""
    epsilon = ("--epsilon", None if optimizer == "sgd" else 1e-5)
    train(files, tmp_path, "run", "--optimizer", optimizer, *epsilon, "--stop_at_step", 2, "--num-epochs", 1)
    said = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    wanted = {"sgd": 0.1}.get(optimizer, 0.001)
    assert re.search(rf"^learning_rate: {wanted}$", said, re.MULTILINE)
    assert re.search(rf"^momentum: {0.9 if optimizer == 'sgd' else 'null'}$", said, re.MULTILINE)
    assert re.search(rf"^weight_decay: {0.01 if optimizer == 'lamb' else 0.0}$", said, re.MULTILINE)


def test_the_page_of_the_older_trainer_is_a_command_line(files, tmp_path):
    """Every option of it, with the slip of its page: the batch size of validation under the name of the other."""
    page = f"""--training-data {files}/train.txt --validation-data {files}/held_out.txt --num-workers 2 --device cpu
    --amp-optimization-level O2 --model-preset base --dimension 16 --num-heads 2 --dim-feedforward 32 --num-layers 1
    --dim-final-feedforward 24 --activation-function relu --dropout 0.1 --training-batch-size 50
    --training-batch-size 30 --optimizer lamb --learning-rate 0.001 --epsilon 1e-6 --checkpointing
    --gradient-accumulation-steps 2 --max-gradient-norm 1.0 --num-epochs 1 --output-prefix {tmp_path}
    --num-epoch-digits 3 --snapshot-interval 100"""
    done = run_script("train_policy.py", *page.split())
    assert "the second --training-batch-size is --validation-batch-size 30" in done.stderr
    (run_dir,) = (path for path in tmp_path.iterdir() if not path.name.startswith("decision_store"))
    assert re.fullmatch(r"\d{4}(-\d\d){5}", run_dir.name)  # the time it started
    assert sorted(path.name for path in (run_dir / "snapshots").iterdir()) == ["000.100", "000.200", "000.300", "001"]
    config = json.loads((run_dir / "final" / "config.json").read_text(encoding="utf-8"))
    sizes = [config[name] for name in ("hidden_size", "intermediate_size", "final_intermediate_size", "hidden_act")]
    assert sizes == [16, 32, 24, "relu"]


def test_the_value_is_learnt_beside_the_choice(files, tmp_path):
    done = train(files, tmp_path, "run", "--objective", "choice+value", "--num-epochs", 1)
    assert "value error" in done.stdout or "value_error" in done.stdout
    last = records(tmp_path / "run")[-2]
    assert last["loss"] == pytest.approx(last["choice_loss"] + last["value_loss"], abs=1e-5)
    assert any(name.startswith("value_decoder.") for name in weights(tmp_path / "run"))


def test_the_best_epoch_is_kept_and_exported(files, tmp_path):
    """With far too high a rate a later epoch is worse than the first."""
    arguments = (
        "--num-epochs",
        3,
        "--optimizer",
        "sgd",
        "--epsilon",
        None,
        "--learning-rate",
        0.05,
        "--keep_snapshots",
        1,
    )
    train(files, tmp_path, "run", *arguments, "--snapshot-interval", 0)
    losses = [each["eval_loss"] for each in records(tmp_path / "run") if "eval_loss" in each][1:]
    best = 1 + losses.index(min(losses))
    assert [path.name for path in (tmp_path / "run").glob("best-*")] == [f"best-{best}"]
    assert same_bits(weights(tmp_path / "run"), weights(tmp_path / "run", f"best-{best}"))
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["03"]


def test_slips_are_said_in_a_sentence_and_nothing_is_begun(files, tmp_path):
    bad = {
        ("--momentum", 0.5): "--momentum 0.5 has no effect on --optimizer adam",
        ("--num-heads", 3): "cannot be divided",
        ("--num-heads", 3, "--training-data", "none"): "cannot be divided",  # said before any data is read
        ("--experiment-name", ".."): "is no name of a folder",
        ("--num-epochs", -2): "--num-epochs must be at least 0, or -1",
        ("--device", "gpu"): "--device must be cpu, cuda or cudaN",
        ("--num-epochs", -1, "--schedule", "cosine"): "needs an end",
        ("--schema", "kanachan-v2"): "kanachan-v2",
        ("--initial-encoder", tmp_path / "none"): "none",
        ("--save_steps", 5): "--snapshot-interval counts records",
    }
    for arguments, sentence in bad.items():
        done = train(files, tmp_path, "run", *arguments, check=False)
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
