#!/usr/bin/env bash
#SBATCH --job-name=internjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# A training job that queues itself again when it is preempted or its time is up, and goes on where it was:
#
#   sbatch --nodes 8 experiments/launch/slurm.sh python -m experiments.internlm2_20b --run 20b
#
# One task per node holds all its GPUs. 180 s before the time is up (and at a preemption) Slurm sends SIGTERM to this
# script alone, which passes it on: the run saves and ends with 75. 76 means that a process died or hangs. Both are
# queued again, MAX_RESTARTS times at most; any other failure is a mistake that a restart would repeat, and ends the job.
set -uo pipefail

if [ $# -eq 0 ]; then
  echo "Given no command; wanted: sbatch experiments/launch/slurm.sh python -m experiments.NAME ..." >&2
  exit 2
fi

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_COORDINATOR_ADDRESS="$first_node:$((61440 + SLURM_JOB_ID % 4096))"
export JAX_NUM_PROCESSES=$SLURM_NTASKS
# The same in every start: --fresh keeps the run folder that the first one made.
export INTERNJAX_JOB="slurm-$SLURM_JOB_ID"
max_restarts=${MAX_RESTARTS:-50}

# --kill-on-bad-exit is left out: processes end by themselves, with the message of the one that failed.
srun --label "$@" &
step=$!

asked=0
trap 'asked=1; kill -TERM "$step" 2>/dev/null' TERM
code=0
wait "$step" || code=$?
# `wait` also returns when the trap has run; the step is over when it is gone.
while kill -0 "$step" 2>/dev/null; do
  code=0
  wait "$step" || code=$?
done

case $code in
  0) exit 0 ;;
  75 | 76 | 134 | 137 | 143) ;;
  *)
    echo "The job ended with exit code $code, which a restart would repeat; it is not queued again." >&2
    exit "$code"
    ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_restarts" ]; then
  echo "Exit code $code after $SLURM_RESTART_COUNT restarts (MAX_RESTARTS=$max_restarts); not queued again." >&2
  exit "$code"
fi
echo "Exit code $code (asked to stop: $asked): queued again, restart $((${SLURM_RESTART_COUNT:-0} + 1))."
scontrol requeue "$SLURM_JOB_ID"
