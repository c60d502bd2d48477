"""What stands around a loop: the plan before it; processes, optimizers, state, log and folder of the run within it.

The loops themselves stand in the scripts, all of one shape. A loop of another kind brings its data, which yields
`(micro-batches, counts)` for a step, as `lmscripts.data.steps` does; a module whose forward pass returns sums, with
`loss(sums, targets)`, `metrics(sums, counts)` and `models`, what is saved by subfolder; a function `rate(step)`; a
function that writes what has to stand beside its weights (`folder.tokenizer_beside`, `folder.write_nothing`); and, if
it has to know more than `TrainingState` does, a dataclass of plain values as `own`. Entering a folder, restoring,
saving, pruning, logging and exporting are then called, not written again. Values come in, never a script's options;
imports from objectives and the rooms below it.
"""
