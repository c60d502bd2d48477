"""Clusters of unequal machines on this one: every node started by scripts/launch.py --local_cpu."""

import json
import os
import subprocess
import sys

import forked
from conftest import PATIENCE, ROOT

HOSTS = [f"{letter}.example.org" for letter in "abcdefgh"]


def command(counts, script, *arguments, node_dir=None, options=(), batch_sizes=None, timeout=120):
    """The line that starts `counts` processes on as many nodes, named a.example.org, b.example.org and so on.

    Args:
        counts: processes of each node.
        script: a file, or the name of one of scripts/.
        arguments: of the script.
        node_dir: working folder of a node, {} being its place; None is the current one.
        options: further options of launch.py, in front of the script.
        batch_sizes: rows of a step on each node.
        timeout: seconds that a node waits for the others.
    """
    sizes = batch_sizes or [None] * len(counts)
    nodes = [{"host": h, "gpus": n, "batch_size": s} for h, n, s in zip(HOSTS, counts, sizes, strict=False)]
    words = ["--local_cpu", "--cluster", json.dumps({"nodes": nodes, "timeout": timeout}), *map(str, options)]
    words += [] if node_dir is None else ["--node_dir", str(node_dir)]
    script = ROOT / "scripts" / script if (ROOT / "scripts" / script).exists() else script
    return [sys.executable, str(ROOT / "scripts" / "launch.py"), *words, str(script), *map(str, arguments)]


def launch_nodes(counts, script, *arguments, check=True, cwd=None, env=None, forks=True, **how):
    """Run a script on nodes to its end; the finished process, in whose output node 0 has no prefix."""
    line, whole = command(counts, script, *arguments, **how), {**os.environ, **(env or {})}
    if forks:
        done = forked.run(line, cwd, whole, PATIENCE)
    else:
        done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=whole)
    assert not check or done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done


def start_nodes(counts, script, *arguments, log, cwd=None, env=None, **how):
    """Start a script on nodes; the process, whose output goes to the open file `log` (`runs.kill_tree` ends it)."""
    line, whole = command(counts, script, *arguments, **how), {**os.environ, **(env or {})}
    return forked.Popen(line, stdout=log, stderr=log, cwd=cwd, env=whole)
