"""Runs a script whose processes have a known speed.

SLOWED has the seconds that each process sleeps for a row of training, by rank. MEASURED has the steps that --balance
auto leaves out and those that it measures, for runs of few steps.
"""

import os
import runpy
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from lmscripts.training import pace

seconds = [float(each) for each in os.environ["SLOWED"].split()]
mine = seconds[int(os.environ.get("RANK", "0")) % len(seconds)]
if "MEASURED" in os.environ:
    pace._SKIPPED, pace._MEASURED = map(int, os.environ["MEASURED"].split())


def pause(module, inputs):
    of_rows = inputs and isinstance(inputs[0], dict) and "row_keys" in inputs[0]
    if of_rows and module.training and not isinstance(module, DistributedDataParallel):
        time.sleep(mine * len(inputs[0]["row_keys"]))


torch.nn.modules.module.register_module_forward_pre_hook(pause)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
