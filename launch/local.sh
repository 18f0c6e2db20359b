#!/usr/bin/env bash
# One process that uses all devices of this machine.
#   launch/local.sh [--dry_run] experiments.train_tt --config=experiments/configs/maze.py --dataset=ID --workdir=DIR
# Without accelerators, NUM_DEVICES=4 splits the CPU into 4 devices.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [[ -n "${NUM_DEVICES:-}" ]]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$NUM_DEVICES"
fi
run exec "${PYTHON:-python}" -m "$@"
