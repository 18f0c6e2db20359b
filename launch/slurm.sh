#!/usr/bin/env bash
# Submit a run to SLURM, from the repository's root; options in front of the module are sbatch's:
#   launch/slurm.sh [--dry_run] --nodes=2 [--partition=NAME ...] experiments.train_tt --config=... --workdir=DIR
# One process per GPU, or one per node with --ntasks-per-node=1; other sizes as below. Saved and not done (exit code 75,
# also 2 minutes before the time slot ends) or with a lost process, the job goes back into the queue, at most
# MAX_RESTARTS times (20). SLURM itself does so after preemption and when a node fails.
#SBATCH --job-name=tt_jax
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [[ -z "${SLURM_JOB_ID:-}" || "${1:-}" == -* ]]; then # not in the job yet
  # shellcheck source=launch/common.sh
  source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
  : "${1:?slurm.sh needs a module, such as experiments.train_tt}"
  run sbatch ${options[@]+"${options[@]}"} "${BASH_SOURCE[0]}" "$@"
  exit
fi
cd "${SLURM_SUBMIT_DIR:?}"
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then # of sweep.sh: "$1" has one line of arguments for each task
  eval "set -- $(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")"
fi
if [[ "${SLURM_NTASKS_PER_NODE:-}" == 1 && -n "${SLURM_GPUS_ON_NODE:-}" ]]; then # jax would take one GPU per process
  JAX_LOCAL_DEVICE_IDS="$(seq -s , 0 $((SLURM_GPUS_ON_NODE - 1)))"
  export JAX_LOCAL_DEVICE_IDS
fi
trap : TERM # the processes get it, too, and save; wait for them
code=0
srun --kill-on-bad-exit=0 --wait=120 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${PYTHON:-python}" -m "$@" --distributed || code=$?
if [[ "$code" == 75 || "$code" -gt 128 ]] && [[ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-20}" ]]; then
  state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)"
  if [[ "$state" == RUNNING ]]; then scontrol requeue "$SLURM_JOB_ID"; fi # not if it was cancelled
fi
exit "$code"
