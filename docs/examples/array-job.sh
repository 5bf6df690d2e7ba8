#!/usr/bin/env bash
# Quantize a model as an array job: N workers that share a store. With SLURM:
#
#     sbatch --array=0-15 --cpus-per-task=8 --mem=32G --time=12:00:00 --requeue docs/examples/array-job.sh
#
# Any scheduler will do that tells a job its number: set SHARD and SHARDS by its own variables.
#
#     MODEL    folder of the model, which all machines see     STORE   folder, or s3://BUCKET/PATH (docs/store.md)
#     OPTIONS  of `moepress plan-work`                         OUT     where the result is to be
#
# Jobs may start in any order, be killed, and be requeued: each takes what nobody does. Every job plans the work first,
# which the first of them does and the others find; the last to end fetches the result.
set -euo pipefail

MODEL=${MODEL:?the folder of the model}
STORE=${STORE:?a folder or s3:// URL that all jobs see}
OUT=${OUT:?where the result is to be}
OPTIONS=${OPTIONS:---bits 4 --independent-layers}
SHARD=${SHARD:-${SLURM_ARRAY_TASK_ID:-0}}
SHARDS=${SHARDS:-${SLURM_ARRAY_TASK_COUNT:-1}}
THREADS=${THREADS:-${SLURM_CPUS_PER_TASK:-1}}
MEMORY=${MEMORY:-${SLURM_MEM_PER_NODE:-4096}}MiB

export OMP_NUM_THREADS=$THREADS

# shellcheck disable=SC2086  # OPTIONS are several words
moepress plan-work "$MODEL" --store "$STORE" $OPTIONS
moepress work --store "$STORE" --shard "$SHARD/$SHARDS" --threads "$THREADS" --max-memory "$MEMORY"

# All tasks are done now. One job fetches the result; the others have nothing left to do.
if [ "$SHARD" -eq 0 ]; then
  moepress work --store "$STORE" -o "$OUT" --force
  moepress status "$STORE"
fi
