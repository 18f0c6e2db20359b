#!/usr/bin/env bash
# NUM_PROCESSES processes on this machine that train as one; NUM_DEVICES=2 gives each of them 2 CPU devices.
#   NUM_PROCESSES=2 launch/multi_process.sh experiments.train_tt --config=... --workdir=DIR
# On several machines, start one process on each, with the same COORDINATOR=HOST:PORT and its own PROCESS_ID.
set -euo pipefail
coordinator="${COORDINATOR:-localhost:$((20000 + RANDOM % 10000))}"
start() {
  "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$@" --coordinator_address="$coordinator" \
    --num_processes="${NUM_PROCESSES:-2}" --process_id="$process_id" &
}
for process_id in ${PROCESS_ID:-$(seq 0 $((${NUM_PROCESSES:-2} - 1)))}; do start "$@"; done
trap 'kill -TERM $(jobs -p) 2>/dev/null' TERM INT
code=0
while [[ -n "$(jobs -p)" ]]; do wait -n || code=$?; done
exit "$code"
