#!/usr/bin/env bash
# One process per GPU on SLURM; jax finds the others by SLURM's variables. Submit with your own sizes, for example
#   sbatch --nodes=2 launch/slurm.sh experiments.train_tt --config=... --workdir=DIR
#SBATCH --job-name=tt_jax
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch, from the repository root}"
code=0
srun --kill-on-bad-exit=0 "${PYTHON:-python}" -m "$@" --distributed || code=$?
if [[ "$code" == 75 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi # saved: go on in the next time slot
exit "$code"
