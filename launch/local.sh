#!/usr/bin/env bash
# One process that uses all devices of this machine.
#   launch/local.sh experiments.train_tt --config=experiments/configs/locomotion.py:hopper-medium --workdir=DIR
# Without accelerators, NUM_DEVICES=4 splits the CPU into 4 devices.
set -euo pipefail
if [[ -n "${NUM_DEVICES:-}" ]]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$NUM_DEVICES"
fi
exec "${PYTHON:-python}" -m "$@"
