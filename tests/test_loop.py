"""What a step costs beside its computing: what waits for the device, is written behind it, and fits at once."""

import shutil
import threading
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate import Accelerator
from conftest import run_script
from runs import SCRIPT, kill_at_random_moments, same_bits, weights
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from lmscripts.data.steps import Phase, Phases
from lmscripts.errors import UserError
from lmscripts.models.cross_entropy import chunked_cross_entropy
from lmscripts.models.finding import find_damage, list_checkpoints
from lmscripts.training import optim, passes, processes
from lmscripts.training.checkpoint import optimizer_state
from lmscripts.training.folder import RunFolder
from lmscripts.training.pace import Pace
from lmscripts.training.state import TrainingState

NAN = float("nan")


# ---- what waits for the device -----------------------------------------------------------------------------------

COUNTED = """
import runpy, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from lmscripts.training.log import Meter, Reporter

asked = []

class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            asked.append(function)
        return function(*arguments, **(named or {}))

begin, advance = Meter.__init__, Reporter.advance

def counting(self, *arguments):
    begin(self, *arguments)
    Counting().__enter__()

def counted(self, step):
    print(f"after step {step}: {len(asked)}", flush=True)
    advance(self, step)

Meter.__init__, Reporter.advance = counting, counted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def small_run(store_dir, run_dir, *more, steps=4):
    given = ["--dataset_dir", store_dir, "--model_type", "bert-tiny", "--model_dir", run_dir, "--max_steps", steps]
    given += ["--n_layer", 1, "--n_embd", 32, "--n_head", 2, "--batch_size", 4, "--sequence_length", 32]
    return [*given, "--eval_rows", 0, "--tracker", "none", *more]


def test_a_step_of_one_process_asks_nothing_of_the_device(store_dir, tmp_path):
    counting = tmp_path / "counting.py"
    counting.write_text(COUNTED, encoding="utf-8")
    done = run_script(counting, SCRIPT, *small_run(store_dir, tmp_path / "run", "--logging_steps", 100))
    found = [int(line.split(": ")[1]) for line in done.stdout.splitlines() if line.startswith("after step")]
    assert found == [0] * 4


def steps_with(gradients, monkeypatch, late):
    """Weights, state and moments after steps of such gradients, a number each."""
    monkeypatch.setattr(optim, "_is_told_later", lambda *_: late)
    torch.manual_seed(0)
    model, state = nn.Linear(3, 3), TrainingState()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for number in gradients:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, number)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        optim.step(optimizer, norm, state, has_scaler=False)
        state.step += 1
    state.settle()
    return model.state_dict() | optimizer_state(optimizer, model)[0], state


def test_a_gradient_that_nobody_waits_for_is_left_out_all_the_same(monkeypatch):
    gradients = [1.0, NAN, 0.5, float("inf"), NAN, -1.0, NAN]
    late, late_state = steps_with(gradients, monkeypatch, True)
    at_once, state = steps_with(gradients, monkeypatch, False)
    only_finite, _ = steps_with([1.0, 0.5, -1.0], monkeypatch, False)
    assert same_bits(late, at_once)
    assert same_bits(late, only_finite)
    assert late_state == state
    assert (state.skipped_steps, state.nonfinite_streak) == (4, 1)


@pytest.mark.parametrize("late", [True, False])
def test_five_in_a_row_stop_the_run_also_a_step_later(late, monkeypatch):
    with pytest.raises(UserError, match="5 steps in a row, up to step 6"):
        steps_with([1.0, *[NAN] * 5], monkeypatch, late)
    with pytest.raises(UserError, match="5 steps in a row, up to step 6"):
        steps_with([1.0, *[NAN] * 5, 1.0], monkeypatch, late)


def test_seeding_a_step_gives_the_numbers_of_torch_and_keeps_nothing():
    before = len(torch.cuda._queued_calls)
    processes.seed_dropout(7, 3, 1)
    drawn = torch.rand(5)
    assert len(torch.cuda._queued_calls) == before
    torch.manual_seed(torch.initial_seed())
    assert torch.equal(torch.rand(5), drawn)


@pytest.mark.parametrize(("launched", "backend"), [("0", "cpu:gloo,cuda:nccl"), ("-1", None)])
def test_processes_on_gpus_have_a_world_for_numbers_on_the_cpu_too(launched, backend, monkeypatch):
    seen = []

    class State:
        device = torch.device("cuda")

        def __init__(self, cpu, timeout, backend=None):
            seen.append(backend)

    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setattr(processes, "_on_cpu", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", launched)
    processes.connect(60)
    assert seen == [backend]


class Event:
    """A moment in the queue of a GPU."""

    def __init__(self, milliseconds):
        self.at, self.is_over = milliseconds, False

    def elapsed_time(self, other):
        assert self.is_over
        assert other.is_over
        return other.at - self.at

    def query(self):
        return self.is_over

    def synchronize(self):
        self.is_over = True


def test_the_pace_of_a_gpu_is_read_when_the_gpu_is_there():
    pace, marks = Pace(torch.device("cpu")), ("begun", "agreed", "gradient", "exchanged")
    steps = [[Event(at + moment) for moment in (0, 10, 40, 45)] for at in (0, 100)]
    pace._hooks = []
    for rows, step in enumerate(steps, 3):
        pace.rows, pace._marks = rows, dict(zip(marks, step, strict=True))
        pace.settle()
    assert pace.waited == 0
    for event in steps[0]:
        event.is_over = True
    pace.settle()
    assert pace.waited == pytest.approx(0.015)
    for event in steps[1][:3]:
        event.is_over = True
    pace.settle(wait=True)
    assert pace.waited == pytest.approx(0.030)
    assert pace.speed() == pytest.approx(4 / 0.03)  # the slower of two is left out


# ---- checkpoints that are written meanwhile ------------------------------------------------------------------------


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        self.model = BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes))

    @property
    def models(self):
        return {"": self.model}

    def move(self, optimizer):
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


class Written:
    """A run that saves behind its steps, and writes on only when it may."""

    def __init__(self, path):
        self.accelerator, self.may, self.trained = Accelerator(cpu=True), threading.Event(), Trained()
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), fused=True)
        self.folder = RunFolder(path, {}, float, lambda place: self.held(place))
        self.folder.behind = True
        self.problem = None
        path.mkdir()

    def held(self, place):
        place.mkdir(exist_ok=True)
        assert self.may.wait(60)
        if self.problem:
            raise self.problem

    def save(self, step, best=""):
        self.trained.move(self.optimizer)
        self.folder.save(self.accelerator, self.trained, self.optimizer, TrainingState(step, origin=best))

    def named(self):
        return sorted(path.name for path in self.folder.path.iterdir())


@pytest.fixture
def written(tmp_path):
    run = Written(tmp_path / "run")
    yield run
    run.may.set()


def test_a_checkpoint_is_of_the_step_after_which_it_was_asked_for(written, tmp_path):
    written.save(1)
    then = {name: tensor.clone() for name, tensor in written.trained.model.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in optimizer_state(written.optimizer, written.trained)[0].items()}
    written.trained.move(written.optimizer)
    assert list_checkpoints(written.folder.path) == []  # nothing is there by halves
    written.may.set()
    written.folder.wait(written.accelerator)
    checkpoint = written.folder.path / "checkpoint-1"
    assert find_damage(checkpoint) is None
    saved = load_file(checkpoint / "model.safetensors")
    assert same_bits(saved, {name: then[name] for name in saved})
    assert same_bits(load_file(checkpoint / "optimizer.safetensors"), moments)
    behind = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    shutil.rmtree(checkpoint)
    written.folder.behind = False
    written.trained.model.load_state_dict(then)
    written.optimizer.load_state_dict(
        {
            **written.optimizer.state_dict(),
            "state": {
                n: {k.rsplit("/", 1)[1]: v for k, v in moments.items() if k.startswith(f"{name}/")}
                for n, (name, _) in enumerate(written.trained.named_parameters())
            },
        }
    )
    written.folder.save(written.accelerator, written.trained, written.optimizer, TrainingState(1))
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        assert (checkpoint / name).read_bytes() == behind[name], name


@pytest.mark.parametrize("behind", [False, True])
def test_what_is_no_checkpoint_but_has_its_name_is_set_aside(written, behind, capsys):
    written.may.set()
    written.folder.behind = behind
    for name in ("checkpoint-1", "checkpoint-1.damaged"):
        (written.folder.path / name).mkdir()
    (written.folder.path / "checkpoint-1" / "notes.txt").write_text("mine", encoding="utf-8")
    written.save(1)
    written.folder.wait(written.accelerator)
    assert written.named() == ["checkpoint-1", "checkpoint-1.damaged", "checkpoint-1.damaged-2"]
    assert find_damage(written.folder.path / "checkpoint-1") is None
    assert (written.folder.path / "checkpoint-1.damaged-2" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert "renamed to checkpoint-1.damaged-2" in capsys.readouterr().out
    before = (written.folder.path / "checkpoint-1" / "checksums.json").stat()
    written.save(1)  # as the last step of a run, which was due as well
    written.folder.wait(written.accelerator)
    assert (written.folder.path / "checkpoint-1" / "checksums.json").stat().st_ino == before.st_ino


def test_a_full_disk_is_said_when_the_run_waits(written):
    written.may.set()
    written.save(1)
    written.folder.wait(written.accelerator)
    written.problem = OSError(28, "No space left on device")
    written.save(2)
    with pytest.raises(UserError, match=r"could not save .*checkpoint-2 .*No space left.*Earlier checkpoints are unt"):
        written.save(3)
    assert [path.name for path in list_checkpoints(written.folder.path)] == ["checkpoint-1"]
    written.problem = None
    written.save(4)
    written.folder.wait(written.accelerator)
    assert [path.name for path in list_checkpoints(written.folder.path)] == ["checkpoint-1", "checkpoint-4"]


def test_what_is_old_goes_when_the_new_checkpoint_is_there(written):
    written.may.set()
    (written.folder.path / "best-1").mkdir()
    written.save(1, best="1")
    written.folder.wait(written.accelerator)
    written.may.clear()
    (written.folder.path / "best-2").mkdir()
    written.save(2, best="2")
    written.folder.prune(1, best=lambda progress: progress["origin"])
    (written.folder.path / "best-3").mkdir()  # no checkpoint names it yet
    assert [name for name in written.named() if name[0] != "."] == ["best-1", "best-2", "best-3", "checkpoint-1"]
    written.may.set()
    written.folder.wait(written.accelerator)
    assert written.named() == ["best-2", "best-3", "checkpoint-2"]


@pytest.mark.slow
def test_killed_while_checkpoints_are_written_behind_ends_with_the_same_bits(store_dir, tmp_path):
    behind = tmp_path / "behind.py"
    text = "import runpy, sys\nfrom lmscripts.training.folder import RunFolder\nRunFolder.behind = True\n"
    behind.write_text(f"{text}runpy.run_path({SCRIPT!r}, run_name='__main__')\n", encoding="utf-8")
    more = ["--save_steps", 2, "--logging_steps", 5, "--warmup_steps", 2]
    run_script("run_pretraining.py", *small_run(store_dir, tmp_path / "plain", *more, steps=60))
    given = [*small_run(store_dir, tmp_path / "run", *more, steps=60), "--do_continue"]
    assert kill_at_random_moments(given, tmp_path / "run", tmp_path / "log", script=str(behind)) > 0
    run_script(behind, *given)
    assert same_bits(weights(tmp_path / "run"), weights(tmp_path / "plain"))


# ---- how much fits at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "first", "most", "found", "tried"),
    [
        (37, 8, 100, 32, [8, 16, 32, 64]),
        (1000, 8, 100, 100, [8, 16, 32, 64, 100]),
        (99, 8, 100, 64, [8, 16, 32, 64, 100]),
        (3, 8, 100, 2, [8, 4, 2]),
        (1, 8, 100, 1, [8, 4, 2, 1]),
        (1000, 8, 3, 3, [3]),
    ],
)
def test_rows_are_doubled_until_they_no_longer_fit(limit, first, most, found, tried):
    seen = []

    def attempt(rows):
        seen.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError(f"{rows} rows")

    assert passes.most_rows(attempt, first, most) == found
    assert seen == tried


def phase(length, share, **more):
    rows = SimpleNamespace(layout=SimpleNamespace(sequence_length=length), num_rows=100)
    about = {"make": None, "slots": 1, "words": "", "seed": 0, "batch_size": share, "total_rows": 10, "shares": [share]}
    return Phase(rows, None, micro_batch_size=32, most_eval_rows=0, **about, **more)


def test_what_fits_is_found_for_each_phase_and_kept(tmp_path):
    accelerator, seen = Accelerator(cpu=True), []

    def attempts(accelerator, phase, objective):
        def attempt(rows):
            seen.append((phase.layout.sequence_length, rows))
            if rows * phase.layout.sequence_length > limit:
                raise torch.OutOfMemoryError

        return attempt

    data = Phases([phase(128, 1000, is_tried=True), phase(512, 24, is_tried=True), phase(512, 999)])
    state, limit = TrainingState(), 20_000
    fitted, said = passes.fit(accelerator, data, None, state, attempts)
    assert [each.micro_batch_size for each in fitted.phases] == [128, 24, 32]
    assert "128 then 24 then 32" in said[0]
    again, seen[:] = TrainingState.from_json(state.as_json()), []
    fitted, _ = passes.fit(accelerator, data, None, again, attempts)
    assert [each.micro_batch_size for each in fitted.phases] == [128, 24, 32]
    assert seen == []
    again.rows_at_once = {"process 0 (another GPU, 12.0 GiB)": [1, 1, 1]}
    fitted, _ = passes.fit(accelerator, data, None, again, attempts)
    assert [each.micro_batch_size for each in fitted.phases] == [128, 24, 32]
    limit = 100
    with pytest.raises(UserError, match=r"a single row of 128 tokens does not fit .*--activation_checkpointing"):
        passes.fit(accelerator, data, None, TrainingState(), attempts)


def test_rows_at_once_may_be_said_in_tokens(store_dir, tmp_path):
    more = ["--phase_steps", 2, 2, "--sequence_length", 32, 64, "--micro_batch_tokens", 100, "--dry_run"]
    given = small_run(store_dir, tmp_path / "run")
    given = [*given[:6], *given[8:14], *more, "--batch_size", 8]
    said = run_script("run_pretraining.py", *given).stdout
    assert said.index("at most 3 at once") < said.index("at most 1 at once")
    done = run_script("run_pretraining.py", *given, "--micro_batch_size", 2, check=False)
    assert done.returncode == 2
    assert "--micro_batch_tokens 100 has no effect with --micro_batch_size" in done.stderr


# ---- the loss in pieces --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_is_the_same_also_for_the_last_positions(dtype):
    torch.manual_seed(0)
    labels, shares = torch.randint(0, 50, (23,)), torch.rand(23)
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        given = [torch.randn(*shape, requires_grad=True) for shape in ((23, 16), (50, 16), (50,))]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = chunked_cross_entropy(*given, labels, shares, 1e-3, positions_at_once=8, compiled=compiled)
        found[0].backward()
        results.append([*found, *(each.grad for each in given)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
