"""The launcher of Accelerate for one node: `python -m lmscripts.cluster.agent --config_file FILE script.py ...`.

It takes the words of `accelerate launch` and differs in how it ends: with the exit code of the process that ended
first, 75 of a run that stopped early after saving among them, and with that process' own sentence, where the launcher
alone would end with 1 and a table of failures. What one process alone needs of it is an environment: it becomes it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from lmscripts.cluster.announced import announced_nodes
from lmscripts.errors import shortened

SUPERVISED = "LMS_SUPERVISED"  # set where another launcher reads the end as a line of JSON after VERDICT
VERDICT = "\x1elms-end "
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def main() -> None:
    """Start the processes of this node, wait for them, and end as they did."""
    from accelerate.commands.launch import _validate_launch_command as completed
    from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments, *_ = completed(launch_command_parser().parse_args())
    if not (arguments.multi_gpu or arguments.use_fsdp):
        command, environment = prepare_simple_launcher_cmd_env(arguments)
        os.execvpe(command[0], command, environment)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the sentence at the end says it
    # Whoever started this sends signals to the processes directly, so that their exit codes count. A scheduler may send
    # them to all: here they mean nothing, and torch is told to take no notice of them either.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    try:
        multi_gpu_launcher(arguments)
    except ChildFailedError as error:
        _end(*_first(error.failures))
    except (ConnectionError, DistError) as error:  # a port that was taken, or a node that has gone, since they met
        _end(2, f"node {arguments.machine_rank}: {shortened(error)}", True)


def _first(failures: dict[int, Any]) -> tuple[int, str, bool]:
    """Exit code and words of the process that ended first, and whether it was for the end of another one."""
    told = {rank: failure.error_file_data.get("message") for rank, failure in failures.items()}
    told = {rank: said if isinstance(said, dict) else {} for rank, said in told.items()}

    def when(rank: int) -> tuple[bool, bool, float]:
        ended_by_agent = failures[rank].exitcode == -signal.SIGTERM
        said = told[rank].get("extraInfo", {"of_another": failures[rank].exitcode == 1})  # it may be: nobody said why
        return ended_by_agent, said["of_another"], said.get("timestamp", failures[rank].timestamp)

    rank = min(failures, key=when)
    code, said = failures[rank].exitcode, told[rank].get("message")
    how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    ranks = [node.host for node in announced_nodes() for _ in range(node.processes)]
    who = f"process {rank}" + (f" ({ranks[rank]})" if rank < len(ranks) else "")
    if said and (said.startswith("process ") or sum(each.get("message") == said for each in told.values()) > 1):
        who = ""  # the processes have told each other, or all found the same
    words = ": ".join(filter(None, [who, said])) if said else f"{who} {how}"
    return abs(code) + 128 * (code < 0), words, when(rank)[1]


def _end(code: int, sentence: str, of_another: bool) -> NoReturn:
    if os.environ.get(SUPERVISED):
        sys.stderr.write(VERDICT + json.dumps({"code": code, "sentence": sentence, "of_another": of_another}) + "\n")
    elif code != 75:  # which is no error
        sys.stderr.write(f"error: {sentence}\n")
    sys.exit(code)


def _watch(parent: int) -> None:
    """Ask the processes to stop when the one that would pass on signals has been killed."""
    import psutil

    while os.getppid() == parent:
        time.sleep(1)
    children = psutil.Process().children()
    for child in children:
        child.terminate()
    if not children:
        os._exit(1)


if __name__ == "__main__":
    main()
