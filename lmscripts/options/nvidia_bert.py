"""Names of Google's BERT scripts and of NVIDIA's, in both frameworks, as arguments of `lmscripts.options.parsing`.

What counts the rows of one process, or steps of one job, there is refused: it would mean another number here.
"""

from __future__ import annotations

from collections.abc import Mapping

_LAUNCHED = "processes are started by `accelerate launch`"
_SCALE = "the scale of the loss is found while training"
_LOGGED = "every number is in log.jsonl of --model_dir"
_ACCUMULATED = "--batch_size counts all rows of a step; what does not fit into --micro_batch_size is accumulated"
_TEXT = (
    "files of rows that are masked already are not read: give the text (--input_file and --tokenizer_dir) or a store"
)
_PHASES = "both phases are one run: --phase_steps, and a value for each of --sequence_length and --batch_size"
_RESUMED = "--do_continue goes on from the newest checkpoint of --model_dir"
_TPU = "there is no way to a TPU"
_OF_RUNS = "a store serves every run"
PREPARATION: dict[str, Mapping[str, str]] = {  # of create_pretraining_data.py
    "renamed": {},
    "accepted_unused": {
        "max_seq_length": f"{_OF_RUNS}: run_pretraining.py --sequence_length",
        **dict.fromkeys(
            ("max_predictions_per_seq", "masked_lm_prob"), f"{_OF_RUNS}: run_pretraining.py --mask_probability"
        ),
        "do_whole_word_mask": f"{_OF_RUNS}: run_pretraining.py --do_whole_word_mask",
        "short_seq_prob": f"{_OF_RUNS}: run_pretraining.py --objective sentence_pairs --short_pairs",
        "dupe_factor": "masks are drawn while training, anew in every epoch",
        "random_seed": f"{_OF_RUNS}: run_pretraining.py --seed",
    },
    "refused": {
        "output_file": "--output_dir is the folder of a store",
        "vocab_file": "--tokenizer_dir is the folder of a tokenizer",
    },
}
PRETRAINING: dict[str, Mapping[str, str]] = {
    "renamed": {
        "output_dir": "model_dir",
        "config_file": "bert_config_file",
        "max_seq_length": "sequence_length",
        "num_train_steps": "max_steps",
        "num_train_epochs": "epochs",
        "num_warmup_steps": "warmup_steps",
        "save_checkpoints_steps": "save_steps",
        "num_steps_per_checkpoint": "save_steps",
        "display_loss_steps": "logging_steps",
        "log_freq": "logging_steps",
        "checkpoint_activations": "activation_checkpointing",
        "use_xla": "compile",
        **{f"{name} true": "precision fp16" for name in ("use_fp16", "manual_fp16", "fp16", "amp")},
        "optimizer_type adam": "optimizer adamw; its weights decay as they did there",
        "optimizer_type lamb": "optimizer lamb",
        "do_eval false": "eval_rows 0",
        "resume_from_checkpoint true": "do_continue",
    },
    "accepted_unused": {
        "do_train": "this script trains",
        "do_eval": "--eval_every says how often held-out rows are judged, --eval_rows how many",
        "eval_batch_size": "--micro_batch_size counts for held-out rows too",
        "max_predictions_per_seq": "--mask_probability says it: 0.15 are 19 of 128 tokens, 77 of 512",
        "bert_model": "--model_type names a preset",
        "vocab_file": "the tokenizer's folder has it",
        "iterations_per_loop": "--logging_steps says how often numbers are shown",
        **{f"{name} false": "--precision says it" for name in ("use_fp16", "manual_fp16", "fp16", "amp")},
        **dict.fromkeys(("horovod", "use_env", "allreduce_post_accumulation"), _LAUNCHED),
        "allreduce_post_accumulation_fp16": _LAUNCHED,
        **dict.fromkeys(("loss_scale", "init_loss_scale"), _SCALE),
        **dict.fromkeys(("json_summary", "dllog_path", "verbose_logging", "report_loss"), _LOGGED),
        "disable_progress_bar": "without a terminal plain lines are printed",
        **dict.fromkeys(("dense_sequence_output", "no_dense_sequence_output"), "logits are computed at masks only"),
        "disable_jit_fusions": "nothing is compiled without --compile",
        "resume_from_checkpoint false": "a run goes on with --do_continue only",
        **{f"{name} false": "it is the default" for name in ("use_tpu", "skip_checkpoint", "phase2", "cuda_graphs")},
    },
    "refused": {
        "do_train false": "this script trains; evaluate_lm.py judges a model",
        "train_batch_size": "it counts the rows of one process: give --batch_size, its product with the number of "
        "processes (and of --num_accumulation_steps), and it itself as --micro_batch_size",
        **dict.fromkeys(("gradient_accumulation_steps", "num_accumulation_steps"), f"{_ACCUMULATED}: leave it out"),
        "optimizer_type": "--optimizer chooses",
        **dict.fromkeys(("use_fp16", "manual_fp16", "fp16", "amp"), "--precision says it: no, fp16 or bf16"),
        "warmup_proportion": "--warmup_steps counts the steps of the warmup",
        "steps_this_run": "--stop_at_step is the step at which a job ends; --max_time ends it too",
        **dict.fromkeys(("phase2", "phase1_end_step"), _PHASES),
        **dict.fromkeys(("input_dir", "input_files_dir"), _TEXT),
        **dict.fromkeys(("eval_files_dir", "eval_dir"), "held-out text is --validation_file, or a part of the store"),
        "max_eval_steps": "--eval_rows counts the held-out rows",
        "init_checkpoint": "--pretrained_model_name_or_path takes a folder of transformers; checkpoints of other "
        "programs are not read",
        "resume_step": f"{_RESUMED}: leave it out",
        "skip_checkpoint": "a run saves; --save_steps says how often",
        "cuda_graphs": "--compile is what there is",
        "profile": "benchmarks/README.md says how a run is measured",
        **dict.fromkeys(("use_tpu", "tpu_name", "tpu_zone", "gcp_project", "master", "num_tpu_cores"), _TPU),
    },
}
