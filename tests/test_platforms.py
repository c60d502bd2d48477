"""Where the scripts run, and what they say where they do not."""

import subprocess
import sys

from conftest import PATIENCE, ROOT

# As Python is there: without these modules, signals and functions. What the standard library asks of the platform is
# loaded before.
WINDOWS = """
import asyncio, multiprocessing.connection, multiprocessing.pool, runpy, signal, sys
import concurrent.futures.process, jsonargparse, psutil, yaml

sys.modules.update(dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"]))
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
sys.platform = "win32"
for sys.argv in SCRIPTS:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        print(sys.argv[0], stop.code)
"""


def test_windows_is_told_in_one_sentence():
    needed = {
        "train_tokenizer.py": ["--input_file", "a.txt", "--model_dir", "b"],
        "analyze_results.py": ["a.sqlite"],
        "compare_runs.py": ["a", "b"],
        "sample_lm.py": ["--model_dir", "a", "--prompt", "b"],
        "predict_classifier.py": ["--model_dir", "a", "--input_file", "a.csv"],
        "predict_policy.py": ["--model", "a", "--input_file", "a.txt"],
        "make_annotations.py": ["--output_file", "a.txt"],
        "extract_electra_model.py": ["--input_dir", "a", "--output_dir", "b"],
        "launch.py": ["--here_gpus", "1", "a.py"],
    }
    scripts = [[str(path), *needed.get(path.name, [])] for path in sorted((ROOT / "scripts").glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS.replace("SCRIPTS", repr(scripts))],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for path, *_ in scripts for word in (path, "2")]
    sentence = "error: lmscripts needs Linux or macOS: on Windows run it in WSL"
    assert done.stderr.splitlines() == [sentence] * len(scripts)
