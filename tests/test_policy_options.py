"""Names and values of an older policy trainer, of its successor, and of this project's other scripts."""

import importlib.util
import re
import sys

import pytest
from conftest import ROOT

from lmscripts.options import POLICY, dump_options, parse_options, parse_options_with_origin

NEEDED = ["--training-data", "a.txt", "--output-prefix", "runs", "--training-batch-size", "8"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_policy", ROOT / "scripts" / "train_policy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_policy"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_policy"]


def parse(script, *words, needed=NEEDED):
    return parse_options(script.Options, description="", argv=[*needed, *map(str, words)], **POLICY)


def refused(capsys, script, *words, needed=NEEDED):
    with pytest.raises(SystemExit) as end:
        parse(script, *words, needed=needed)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_those_of_the_older_trainer(script):
    options, origins = parse_options_with_origin(script.Options, description="", argv=NEEDED, **POLICY)
    found = vars(script.settled(options, origins))
    wanted = {"num_workers": 2, "activation_function": "gelu", "dropout": 0.1, "optimizer": "lamb", "freeze_encoder": 0}
    wanted |= {"learning_rate": 0.001, "epsilon": 1e-6, "gradient_accumulation_steps": 1, "max_gradient_norm": 1.0}
    wanted |= {"num_epochs": 1, "num_epoch_digits": 2, "snapshot_interval": 0, "schedule": "constant", "resume": False}
    assert {name: found[name] for name in wanted} == wanted


def test_the_successors_words_need_no_dashes(script, capsys):
    words = """training_data=b.txt validation_data=c.txt encoder=bert_base encoder.num_layers=3 encoder.load_from=E
    encoder.position_encoder=position_embedding decoder=double decoder.dim_feedforward=99 decoder.load_from=D
    decoder.dropout=0.2 encoder.dropout=0.2 optimizer=radam optimizer.learning_rate=1e-4 optimizer.epsilon=1e-7
    optimizer.warmup_steps=10 optimizer.warmup_start_lr=1e-8 optimizer.annealing_steps=0 device=cpu device.dtype=float32
    device.amp_dtype=float16 checkpointing=true batch_size=64 validation_batch_size=32 snapshot_interval=1000
    gradient_accumulation_steps=2 max_gradient_norm=0.5 num_workers=0"""
    found = vars(parse(script, *words.split(), needed=["--output-prefix", "runs"]))
    wanted = dict(training_data=("b.txt",), validation_data=("c.txt",), model_preset="base", num_layers=3, dropout=0.2)
    wanted |= dict(initial_encoder="E", initial_decoder="D", dim_final_feedforward=99, optimizer="radam", device="cpu")
    wanted |= dict(learning_rate=1e-4, epsilon=1e-7, warmup_steps=10, precision="fp16_on_gpu", checkpointing=True)
    wanted |= dict(training_batch_size=64, validation_batch_size=32, snapshot_interval=1000, num_workers=0)
    wanted |= dict(gradient_accumulation_steps=2, max_gradient_norm=0.5)
    assert {name: found[name] for name in wanted} == wanted
    said = capsys.readouterr().err
    assert "encoder bert_base is now --model_preset base" in said
    assert "optimizer.warmup_start_lr has no effect" in said
    assert parse(script, "encoder=bert_medium").num_layers == 8
    assert parse(script, "initial_model=M").initial_encoder == parse(script, "initial_model=M").initial_decoder == "M"


def test_what_a_word_cannot_mean_here_is_refused(script, capsys):
    assert "only position_embedding is accepted" in refused(
        capsys, script, "encoder.position_encoder=positional_encoding"
    )
    assert "falls once" in refused(capsys, script, "optimizer.annealing_steps=100")
    assert "only double is accepted" in refused(capsys, script, "decoder=triple")
    assert "dropout is given twice" in refused(capsys, script, "encoder.dropout=0.1", "decoder.dropout=0.2")
    assert "name folders" in refused(capsys, script, "initial_model_prefix=x")
    assert "unexpected 'nonsense=1'" in refused(capsys, script, needed=["nonsense=1"])


def test_a_value_with_an_equals_sign_is_no_word(script):
    """The name of a file may have one."""
    assert parse(script, "--validation-data", "a=b.txt", "c=d.txt").validation_data == ("a=b.txt", "c=d.txt")


@pytest.mark.parametrize(("level", "precision"), [("O0", "no"), ("O1", "fp16_on_gpu"), ("O2", "fp16_on_gpu")])
def test_levels_of_mixed_precision_are_precisions(script, level, precision):
    assert parse(script, "--amp-optimization-level", level).precision == precision
    assert parse(script, "--precision", "bf16").precision == "bf16"


def test_the_second_training_batch_size_is_that_of_validation(script, capsys):
    options = parse(script, "--training_batch_size", 3)
    assert (options.training_batch_size, options.validation_batch_size) == (8, 3)
    assert "is --validation-batch-size 3" in capsys.readouterr().err
    assert "given twice" in refused(capsys, script, "--training-batch-size", 3, "--validation-batch-size", 4)
    assert "given twice" in refused(capsys, script, "--training-batch-size", 3, "--training-batch-size", 4)


def test_words_of_the_other_scripts_mean_the_same(script):
    words = """--input_file a.txt --model_dir runs/x --batch_size 8 --epochs 3 --max_grad_norm 2 --hidden_dropout 0
    --activation_checkpointing --do_continue --keep_last 4"""
    options = parse(script, *words.split(), needed=[])
    assert (options.output_prefix, options.experiment_name, options.num_epochs) == ("runs", "x", 3)
    assert (options.max_gradient_norm, options.dropout, options.keep_snapshots) == (2.0, 0.0, 4)
    assert options.checkpointing
    assert options.resume


def test_what_is_written_down_is_read_again(script, tmp_path):
    options = parse(
        script, "--optimizer", "sgd", "--device", "cuda0", "--process_shares", 3, 1, "--experiment-name", "x"
    )
    (tmp_path / "config.yaml").write_text(dump_options(options), encoding="utf-8")
    assert parse(script, "--config", tmp_path / "config.yaml", needed=[]) == options
    assert parse(script, "--config", tmp_path / "config.yaml", "--optimizer", "adam", needed=[]).optimizer == "adam"


def test_a_file_may_name_what_a_run_began_with_when_it_is_resumed(script, tmp_path, capsys):
    more = ["--experiment-name", "x", "--initial-encoder", "E"]
    (tmp_path / "config.yaml").write_text(dump_options(parse(script, *more)), encoding="utf-8")
    argv = ["--config", str(tmp_path / "config.yaml"), "--resume"]
    options, origins = parse_options_with_origin(script.Options, description="", argv=argv, **POLICY)
    assert script.settled(options, origins).initial_encoder == "E"
    options, origins = parse_options_with_origin(
        script.Options, description="", argv=[*argv, "--initial-encoder", "E"], **POLICY
    )
    with pytest.raises(ValueError, match="--initial-encoder is for a run that begins"):
        script.settled(options, origins)


@pytest.mark.parametrize(
    ("device", "visible", "seen"),
    [("cpu", None, ""), ("cuda0", None, "0"), ("cuda:1", None, "1"), ("cuda1", "4,7", "7"), ("cuda", "4,7", "4,7")],
)
def test_devices_are_chosen_by_what_torch_can_see(script, monkeypatch, device, visible, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    script.choose_device(device)
    assert script.os.environ.get("CUDA_VISIBLE_DEVICES") == seen
    monkeypatch.setenv("WORLD_SIZE", "2")
    if re.search(r"\d", device):
        with pytest.raises(ValueError, match="several processes were started"):
            script.choose_device(device)


def test_every_option_of_the_older_page_is_one_here(script):
    page = """training-data validation-data num-workers device amp-optimization-level model-preset dimension num-heads
    dim-feedforward num-layers dim-final-feedforward activation-function dropout initial-encoder initial-decoder
    training-batch-size freeze-encoder optimizer momentum learning-rate epsilon checkpointing
    gradient-accumulation-steps max-gradient-norm num-epochs initial-optimizer output-prefix experiment-name
    num-epoch-digits snapshot-interval resume"""
    own = set(script.Options.__dataclass_fields__) | set(POLICY["foreign"].KEYS)
    assert {name.replace("-", "_") for name in page.split()} <= own
