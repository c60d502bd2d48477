#!/bin/bash
# Submit the jobs of one pretraining run: each goes on where the one before was ended, in whatever phase that was, and
# those that are left when the run is finished are taken out of the queue.
#
#   slurm/chain.sh [further options of scripts/run_pretraining.py]
#
# From the root of the repository. Variables, beside those in slurm/pretrain.sbatch (MODEL_DIR, DATASET_DIR, RECIPE ...):
#   JOBS         how many to submit; the last of them goes back into the queue as often as it takes (4)
#   NODES        nodes x GPUs of each, or nodes x type:GPUs; several of these are unequal nodes: "1x8 2xa100:4"
#                (default: what slurm/pretrain.sbatch says)
#   CPUS         cores for each GPU, with NODES (6)
#   JOB_NAME     the chain: jobs of one name run one after the other (default: from MODEL_DIR)
#   LOGS         folder of the logs, one for each job (logs)
# Partition, account and time: in slurm/pretrain.sbatch, or SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
set -euo pipefail

MODEL_DIR="${MODEL_DIR:-runs/finbert}"
JOBS="${JOBS:-4}"
NODES="${NODES:-}"
CPUS="${CPUS:-6}"
LOGS="${LOGS:-logs}"
folder="${MODEL_DIR#/}"
JOB_NAME="${JOB_NAME:-${folder//\//-}}"
export MODEL_DIR

if [ -d "$MODEL_DIR/final" ]; then
    echo "$MODEL_DIR is finished: the model is in $MODEL_DIR/final"
    exit 0
fi
mkdir -p "$LOGS"  # which Slurm does not: the job would end without a word

line=()
part=0
for shape in ${NODES:-file}; do
    # The parts of a job need names of their own: singleton would have them wait for each other for ever.
    [ "$part" = 0 ] || line+=(: --job-name="$JOB_NAME+$part")
    if [ "$shape" != file ]; then
        gpus="${shape#*x}"
        line+=(--nodes="${shape%%x*}" --gres="gpu:$gpus" --ntasks-per-node=1 --cpus-per-task="$((CPUS * ${gpus##*:}))")
    fi
    part=$((part + 1))
done
for _ in $(seq "$JOBS"); do
    sbatch --job-name="$JOB_NAME" --dependency=singleton --export=ALL --output="$LOGS/%x-%j.txt" "${line[@]}" \
        slurm/pretrain.sbatch "$@"
done
echo "look at them with: squeue --name=$JOB_NAME; stop the chain with: scancel --name=$JOB_NAME"
