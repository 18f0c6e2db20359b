#!/usr/bin/env bash
# The same command on every host of a TPU pod whose hosts have this repository in ~/tt_jax and its .venv.
#   TPU=NAME ZONE=us-central2-b launch/tpu_pod.sh experiments.train_tt --config=... --workdir=/mnt/shared/DIR
# The workdir must be one folder that all hosts see, such as a mounted bucket. Ends with the run's exit code.
set -euo pipefail
: "${TPU:?set TPU to the name of the pod}" "${ZONE:?set ZONE to the zone of the pod}"
printf -v arguments ' %q' "$@" --distributed
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/tt_jax && exec .venv/bin/python -m$arguments"
