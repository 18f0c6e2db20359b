#!/usr/bin/env bash
# NUM_PROCESSES processes on this machine that train as one; NUM_DEVICES=2 gives each of them 2 CPU devices.
#   NUM_PROCESSES=2 launch/multi_process.sh [--dry_run] experiments.train_tt --config=... --workdir=DIR
# Each has a log of its own, DIR/logs/0.log and so on (or in LOGS); process 0 is shown as well. When one saved and left
# (exit code 75) or was lost (killed by a signal), all start again, at most MAX_RESTARTS times (10); when one fails
# otherwise, all are ended. What is left GRACE seconds (60) after the first is killed. TERM and Ctrl-C are passed on.
# On several machines, start one process on each, with the same COORDINATOR=HOST:PORT and its own PROCESS_ID.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/common.sh
source "$here/common.sh"
num="${NUM_PROCESSES:-2}" ids="${PROCESS_ID:-$(seq 0 $((${NUM_PROCESSES:-2} - 1)))}" logs="${LOGS:-}" stopped=""
for argument; do if [[ "$argument" == --workdir=* ]]; then logs="${logs:-${argument#*=}/logs}"; fi; done
if [[ -z "$dry_run" ]]; then mkdir -p "${logs:=logs}"; fi
signal() { for id in $ids; do kill "-$1" "${pids[id]:-}" 2>/dev/null || true; done; }
trap 'stopped=1; signal TERM' TERM INT HUP

for ((restarts = 1; ; restarts++)); do
  coordinator="${COORDINATOR:-localhost:$((20000 + RANDOM % 10000))}" left="$ids" code=0 deadline="" pids=()
  for id in $ids; do
    command=("$here/local.sh" ${dry_run:+--dry_run} "$@" --coordinator_address="$coordinator"
      --num_processes="$num" --process_id="$id")
    if [[ -n "$dry_run" ]]; then "${command[@]}" && continue; fi
    set -m # in a process group of its own, so that Ctrl-C reaches it once
    if [[ "$id" == 0 ]]; then "${command[@]}" </dev/null > >(tee -a "$logs/0.log") 2>&1 &
    else "${command[@]}" </dev/null >>"$logs/$id.log" 2>&1 & fi
    pids[id]=$!
    set +m
  done
  if [[ -n "$dry_run" ]]; then exit; fi
  if [[ -n "$stopped" ]]; then signal TERM; fi # came between two of them
  while [[ -n "$left" ]]; do
    sleep 0.1 || true # Ctrl-C ends it
    still=""
    for id in $left; do
      if kill -0 "${pids[id]}" 2>/dev/null; then still+=" $id" && continue; fi
      ended=0 && wait "${pids[id]}" 2>/dev/null || ended=$?
      if [[ -z "$deadline" && "$ended" -gt "$code" ]]; then code=$ended culprit=$id; fi # of several at once the highest
    done
    left="$still"
    if [[ "$code" != 0 && -z "$deadline" ]]; then
      deadline=$((SECONDS + ${GRACE:-60}))
      echo "multi_process.sh: process $culprit ended with $code, log in $logs/$culprit.log:" >&2
      tail -n 1 "$logs/$culprit.log" | tr '\r' '\n' | tail -n 1 >&2 # the last state of a progress bar
      if [[ "$code" != 75 ]]; then signal TERM; fi # after 75 the others are saving, too
    elif [[ -n "$deadline" && "$SECONDS" -ge "$deadline" ]]; then signal KILL; fi
  done
  if [[ -n "$stopped" || ("$code" != 75 && "$code" -le 128) ]]; then exit "$code"; fi
  if [[ "$restarts" -gt "${MAX_RESTARTS:-10}" ]]; then exit "$code"; fi
  echo "multi_process.sh: all processes start again ($restarts of ${MAX_RESTARTS:-10})" >&2
done
