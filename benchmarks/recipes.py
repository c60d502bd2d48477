"""What learns fastest: small models trained on the same text in many ways, held-out loss by tokens and by CPU seconds.

    python benchmarks/recipes.py --text corpus.txt --work_dir work             # what has a result is left out
    python benchmarks/recipes.py --text corpus.txt --work_dir work --show      # tables, and curves.png
    python benchmarks/recipes.py --text corpus.txt --work_dir gpt2 --causal    # the same for GPT-2

Every run is `scripts/run_pretraining.py` with the options that the table shows, in a process of its own with one
thread, one at a time; about three minutes each. Whatever a run masks, it is judged on 15 % of the same held-out tokens,
masked as whole words, the same for all, on rows of its longest phase. CPU seconds are those of training alone, the
thread that makes batches among them, without evaluations and checkpoints.

Runs of the second and third group change one thing of the best of the groups before (`BEST`), or of the best with
Muon (`MUON`), of those that have run: a group begins when the ones before are done. Held-out documents are those of
the store: they choose. The documents of `test.txt` are in no store; `--show` names the command that scores a model on
them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
START = {"model_type": "modernbert-tiny", "batch_size": "16", "max_steps": "1000", "warmup_steps": "100"}
START |= {"mask_probability": "0.15", "eval_every": "100", "logging_steps": "100", "eval_rows": "512"}
START |= {"do_whole_word_mask": "true", "save_steps": "100000", "tracker": "none"}
BERT = {"model_type": "bert-tiny"}
MUON = {"optimizer": "muon"}
# Name: what is changed. "from": of which run; "muon": parts of `optimizers.Muon`.
FIRST: dict[str, dict[str, str]] = {
    "mb-adamw-2e-3": {"learning_rate": "2e-3"},
    "b-adamw-2e-3": BERT | {"learning_rate": "2e-3"},
    "mb-muon-4e-3": MUON | {"learning_rate": "4e-3"},
    "mb-adamw-4e-3": {"learning_rate": "4e-3"},
    "mb-muon-2e-3": MUON | {"learning_rate": "2e-3"},
    "mb-adamw-8e-3": {"learning_rate": "8e-3"},
    "b-muon-4e-3": BERT | MUON | {"learning_rate": "4e-3"},
    "b-adamw-1e-3": BERT | {"learning_rate": "1e-3"},
    "b-adamw-4e-3": BERT | {"learning_rate": "4e-3"},
    "mb-muon-8e-3": MUON | {"learning_rate": "8e-3"},
    "b-muon-2e-3": BERT | MUON | {"learning_rate": "2e-3"},
    "b-muon-8e-3": BERT | MUON | {"learning_rate": "8e-3"},
    "mb-muon-1.6e-2": MUON | {"learning_rate": "1.6e-2"},
    "mb-adamw-1e-3": {"learning_rate": "1e-3"},
}
# The budget of all is 16,000 rows of 128.
SECOND: dict[str, dict[str, str]] = {
    "rows-32": {"from": "BEST", "batch_size": "32", "max_steps": "500", "warmup_steps": "50", "eval_every": "50"},
    "rows-8": {"from": "BEST", "batch_size": "8", "max_steps": "2000", "warmup_steps": "200", "eval_every": "200"},
    "mask-30": {"from": "BEST", "mask_probability": "0.3"},
    "mask-25": {"from": "BEST", "mask_probability": "0.25"},
    "mask-40": {"from": "BEST", "mask_probability": "0.4"},
    "mask-50": {"from": "BEST", "mask_probability": "0.5"},
    "dropout-10": {"from": "BEST", "hidden_dropout": "0.1"},
    "ramp-4-to-16": {"from": "BEST", "batch_ramp": "4 400", "max_steps": "1150"},
    "length-64-to-128": {"from": "BEST", "phase_steps": "500 500", "sequence_length": "64 128", "batch_size": "32 16"},
    "mask-40-length": {"from": "length-64-to-128", "mask_probability": "0.4"},
    "mask-50-length": {"from": "length-64-to-128", "mask_probability": "0.5"},
    "adamw-mask-40": {"from": "mb-adamw-2e-3", "mask_probability": "0.4"},
    "muon-mask-40": {"from": "MUON", "mask_probability": "0.4"},
    "muon-warmed": {"from": "MUON", "muon": "warmed"},
    "muon-cautious": {"from": "MUON", "muon": "cautious"},
    "muon-normal": {"from": "MUON", "muon": "normal"},
}
GPT2 = {"model_type": "gpt2-tiny"}
CAUSAL: dict[str, dict[str, str]] = {
    f"{optimizer}-{rate}": GPT2 | {"optimizer": optimizer, "learning_rate": rate}
    for optimizer, rates in (("adamw", ("2e-3", "1e-3", "4e-3")), ("muon", ("2e-3", "4e-3", "8e-3", "1.6e-2")))
    for rate in rates
}
Result = dict[str, Any]
Groups = tuple[dict[str, dict[str, str]], ...]


def groups_of(causal: bool) -> Groups:
    """The three groups of runs, by name, in their order."""
    first = CAUSAL if causal else FIRST
    base = "adamw-2e-3" if causal else "b-adamw-2e-3"
    third = {
        f"{who}-seed-{seed}": {"from": name, "seed": str(seed)}
        for seed in (43, 44)
        for who, name in (("best", "BEST"), ("base", base))
    }
    return first, {name: run for name, run in SECOND.items() if not causal or "mask" not in name}, third


def options_of(name: str, groups: Groups, results: Mapping[str, Result], more: Mapping[str, str]) -> dict[str, str]:
    """The options of a run; those of the run it changes beneath.

    Raises:
        KeyError: a run that it depends on has no result.
    """
    first, second, third = groups
    changes = dict((first | second | third)[name])
    origin = changes.pop("from", None)
    if origin is None:
        return {k: v for k, v in START.items() if "mask" not in k or first is not CAUSAL} | dict(more) | changes
    if origin in ("BEST", "MUON"):
        before = first if name in second else first | second
        done = {each: results[each]["options"] for each in before if each in results}
        names = [each for each in done if origin == "BEST" or done[each].get("optimizer") == "muon"]
        origin = min(names, key=lambda each: results[each]["curve"][-1]["loss"])
    beneath = dict(results[origin]["options"])
    if "phase_steps" in changes:
        del beneath["max_steps"]
    return beneath | changes


# ---- one run, in a process of its own ------------------------------------------------------------------------------


def train(name: str, options: Mapping[str, str], work_dir: Path) -> None:
    """Train in this process; ends it, with the result written."""
    sys.path.insert(0, str(SCRIPTS))
    import run_pretraining
    import torch

    from lmscripts.data.masking import prediction_slots
    from lmscripts.data.steps import fixed_batch
    from lmscripts.evaluation.sums import evaluate
    from lmscripts.training import optim

    torch.set_num_threads(1)
    curve: list[dict[str, float]] = []
    clock = {"began": 0.0, "elsewhere": 0.0}

    def judge(given: Any, run: Any, meter: Any, report: Any, stop_asked: Any) -> bool:
        """In the place of the script's own evaluation."""
        state = run.state
        if not run.data.is_due(state.step, given.eval_every) and state.step != run.data.num_steps:
            return False
        if curve and curve[-1]["step"] == state.step:
            return False
        now = time.process_time()
        clock["began"] = clock["began"] or now
        phase = run.data.longest
        make, plan = phase.make, phase.make.keywords["plan"]
        if hasattr(plan, "probability"):
            slots = prediction_slots(0.15, phase.layout.most_real_tokens)
            make = partial(make, plan=replace(plan, probability=0.15, slots=slots))
        held_out = (lambda rows: fixed_batch(phase.held_out, make, rows), given.eval_rows, 32)
        with meter.paused():
            record, _ = evaluate(run.accelerator, run.objective, *held_out, lambda: False)
        point = {"step": state.step, "tokens": state.real_tokens, "cpu": now - clock["began"] - clock["elsewhere"]}
        curve.append(point | {name: record[name] for name in ("loss", "accuracy") if name in record})
        report(state.step, {f"eval_{key}": value for key, value in record.items()}, f"held-out {record['loss']:.4f}")
        clock["elsewhere"] += time.process_time() - now
        return False

    def finish(code: int) -> None:
        file = work_dir / "results" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        if not code:  # a run that was stopped has no result
            file.with_suffix(".part").write_text(json.dumps({"name": name, "options": dict(options), "curve": curve}))
            os.replace(file.with_suffix(".part"), file)
        os._exit(code)

    run_pretraining.stopped_while_evaluating, run_pretraining.leave = judge, finish
    given = dict(options)
    shutil.rmtree(work_dir / "runs" / name, ignore_errors=True)  # of a run that was interrupted
    if parts := given.pop("muon", ""):
        from optimizers import muon_of

        optim.muon_and_adamw = partial(muon_of, parts)
    given |= {"dataset_dir": str(work_dir / "store"), "model_dir": str(work_dir / "runs" / name)}
    sys.argv = ["run_pretraining.py", *(word for key, value in given.items() for word in words(key, value))]
    run_pretraining.main()


def words(key: str, value: str) -> list[str]:
    """An option as words of a command line."""
    return [f"--{key}"] if value == "true" else [f"--{key}", *value.split()]


# ---- all runs ----------------------------------------------------------------------------------------------------


def prepare(text: Path, work_dir: Path, vocabulary: int, causal: bool) -> None:
    """Test documents, 2 % by a hash of their text, a tokenizer and a store of the others; what is there stays."""
    work_dir.mkdir(parents=True, exist_ok=True)
    if not (work_dir / "train.txt").exists():
        documents = [each for each in text.read_text(encoding="utf-8").split("\n\n") if each.strip()]
        parts: dict[bool, list[str]] = {True: [], False: []}
        for document in documents:
            digest = hashlib.sha256(f"test{document}".encode()).digest()
            parts[int.from_bytes(digest[:4], "big") % 50 == 0].append(document)
        for name, is_test in (("test", True), ("train", False)):
            (work_dir / f"{name}.txt").write_text("\n\n".join(parts[is_test]) + "\n", encoding="utf-8")
    train_txt, tokenizer = str(work_dir / "train.txt"), str(work_dir / "tokenizer")
    script = [sys.executable, str(SCRIPTS / "train_tokenizer.py"), "--input_file", train_txt, "--model_dir", tokenizer]
    if not Path(tokenizer).exists():
        of = ["--objective", "causal"] if causal else []
        subprocess.run([*script, "--vocab_size", str(vocabulary), *of], check=True)
    if not (work_dir / "store").exists():
        script = [sys.executable, str(SCRIPTS / "prepare_corpus.py"), "--input_file", train_txt]
        script += ["--tokenizer_dir", tokenizer, "--output_dir", str(work_dir / "store")]
        subprocess.run([*script, "--validation_fraction", "0.02"], check=True)


def read_results(work_dir: Path) -> dict[str, Result]:
    """Results by name."""
    files = sorted((work_dir / "results").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def todo(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """Runs without a result, as far as what they depend on has one."""
    groups = groups_of(given.causal)
    for name in given.runs or [name for group in groups for name in group]:
        results = read_results(given.work_dir)
        if name not in results:
            yield name, options_of(name, groups, results, dict(each.split("=", 1) for each in given.set))


def show(work_dir: Path, picture: Path, groups: Groups, drawn: list[str]) -> None:
    """A table by group, and the curves of those that are named, or of all but further seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = read_results(work_dir)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True, sharey=True)
    for panel in panels:
        panel.set_prop_cycle(color=[pyplot.get_cmap("tab20")(each) for each in (*range(0, 20, 2), *range(1, 20, 2))])
    for group in groups:
        print("\n| run | tokens | CPU s | held-out loss | accuracy |\n|---|---|---|---|---|")
        for name in sorted((each for each in group if each in results), key=lambda n: results[n]["curve"][-1]["loss"]):
            curve, last = results[name]["curve"], results[name]["curve"][-1]
            figures = f"{last['tokens'] / 1e6:.2f} M | {last['cpu']:.0f} | {last['loss']:.3f} | {last['accuracy']:.1%}"
            print(f"| {name} | {figures} |")
            if name in drawn if drawn else group is not groups[-1]:
                for panel, key, unit in ((panels[0], "tokens", 1e6), (panels[1], "cpu", 1)):
                    panel.plot([p[key] / unit for p in curve], [p["loss"] for p in curve], label=name, linewidth=1)
    for panel, label in zip(panels, ("million tokens", "CPU seconds of training"), strict=True):
        panel.set_xlabel(label)
        panel.set_ylim(top=6.0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss (nats)" if groups[0] is CAUSAL else "held-out loss, 15 % masked (nats)")
    panels[1].legend(fontsize=6, ncol=2)
    figure.savefig(picture, dpi=80)
    score = "python scripts/evaluate_lm.py --mask_unit word --model_dir"
    print(f"\n{score} {work_dir / 'runs'}/NAME/final --input_file {work_dir / 'test.txt'}")


def train_all(given: argparse.Namespace) -> None:
    """Train what has no result, a process each."""
    for name, options in todo(given):
        print(time.strftime("%H:%M:%S"), name, options, flush=True)
        command = [sys.executable, __file__, "--text", str(given.text), "--work_dir", str(given.work_dir)]
        (given.work_dir / "logs").mkdir(exist_ok=True)
        with open(given.work_dir / "logs" / f"{name}.log", "w", encoding="utf-8") as log:
            command += ["--only", name, "--options", json.dumps(options)]
            subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a sentence a line, blank lines between documents")
    parser.add_argument("--work_dir", type=Path, required=True, help="tokenizer, store, runs, results")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--causal", action="store_true", help="GPT-2 instead of encoders")
    parser.add_argument(
        "--runs", nargs="+", default=[], help="these alone, such as b-adamw-2e-3; with --show, in the picture"
    )
    parser.add_argument("--set", nargs="+", default=[], help="options of all runs, such as parameter_file=wide.json")
    parser.add_argument("--show", action="store_true", help="only the tables, and --picture, of what has a result")
    parser.add_argument("--picture", type=Path, default=Path("curves.png"))
    parser.add_argument("--only", help="train this run in this process; its options as JSON in --options")
    parser.add_argument("--options", type=json.loads)
    given = parser.parse_args()
    if given.show:
        show(given.work_dir, given.picture, groups_of(given.causal), given.runs)
    elif given.only:
        train(given.only, given.options, given.work_dir)
    else:
        prepare(given.text, given.work_dir, given.vocab_size, given.causal)
        train_all(given)


if __name__ == "__main__":
    main()
