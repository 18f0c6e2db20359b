#!/usr/bin/env bash
# NUM_PROCESSES processes on this machine that train as one; NUM_DEVICES=2 gives each of them 2 CPU devices.
#   NUM_PROCESSES=2 launch/multi_process.sh [--dry_run] experiments.train_tt --config=... --workdir=DIR
# Each has a log of its own, DIR/logs/0.log and so on (or in LOGS); process 0 is shown as well. When one saved and left
# (exit code 75) or was lost (killed by a signal), all start again, at most MAX_RESTARTS times (10); when one fails
# otherwise, all are ended. Those that are left GRACE seconds (60) after the first are killed. TERM and Ctrl-C are passed
# on. On several machines, start one process on each, with the same COORDINATOR=HOST:PORT and its own PROCESS_ID.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/common.sh
source "$here/common.sh"
logs="logs" ids="${PROCESS_ID:-$(seq 0 $((${NUM_PROCESSES:-2} - 1)))}" stopped=""
for argument; do if [[ "$argument" == --workdir=* ]]; then logs="${argument#*=}/logs"; fi; done
logs="${LOGS:-$logs}"

start() { # each process in a group of its own, so that Ctrl-C reaches it once
  set -m
  if [[ "$id" == 0 ]]; then "$@" </dev/null > >(tee -a "$logs/0.log") 2>&1 & else "$@" </dev/null >>"$logs/$id.log" 2>&1 & fi
  set +m
  pids[id]=$!
}
signal() { for id in $ids; do kill "-$1" "${pids[id]}" 2>/dev/null || true; done; }
trap 'stopped=1; signal TERM' TERM INT

for ((restarts = 0; ; restarts++)); do
  coordinator="${COORDINATOR:-localhost:$((20000 + RANDOM % 10000))}" left="$ids" code=0 deadline="" pids=()
  for id in $ids; do
    command=("$here/local.sh" ${dry_run:+--dry_run} "$@" --coordinator_address="$coordinator")
    command+=(--num_processes="${NUM_PROCESSES:-2}" --process_id="$id")
    if [[ -n "$dry_run" ]]; then "${command[@]}"; else mkdir -p "$logs" && start "${command[@]}"; fi
  done
  while [[ -z "$dry_run" && -n "$left" ]]; do
    sleep 0.1
    running=""
    for id in $left; do
      if kill -0 "${pids[id]}" 2>/dev/null; then running+=" $id" && continue; fi
      ended=0 && wait "${pids[id]}" 2>/dev/null || ended=$?
      if [[ -z "$deadline" && "$ended" -gt "$code" ]]; then code=$ended culprit=$id; fi # of several at once the highest
    done
    left="$running"
    if [[ "$code" != 0 && -z "$deadline" ]]; then
      deadline=$((SECONDS + ${GRACE:-60}))
      echo "multi_process.sh: process $culprit ended with $code; $logs/$culprit.log: $(tail -n 1 "$logs/$culprit.log")" >&2
      if [[ "$code" != 75 ]]; then signal TERM; fi # after 75 the others are saving, too
    fi
    if [[ -n "$deadline" && "$SECONDS" -ge "$deadline" ]]; then signal KILL; fi
  done
  if [[ -n "$stopped" || ("$code" != 75 && "$code" -le 128) || "$restarts" -ge "${MAX_RESTARTS:-10}" ]]; then exit "$code"; fi
  echo "multi_process.sh: all processes start again ($((restarts + 1)) of ${MAX_RESTARTS:-10})" >&2
done
