#!/usr/bin/env bash
# Let a command outlive the connection through which it is started (Linux): start it in the background if FOLDER's is
# not running, show the end of its log as it grows, and end with its exit code. Without a command, only watch.
#   launch/detached.sh FOLDER [COMMAND ...]
set -euo pipefail
folder="$1"
shift
mkdir -p "$folder"
running() { [[ -s "$folder/pid" ]] && kill -0 "$(cat "$folder/pid")" 2>/dev/null; }
if ! running && (($#)); then
  rm -f "$folder/code"
  : >"$folder/log" # before someone watches it
  # shellcheck disable=SC2016 # expanded by the inner shell
  setsid bash -c 'code=0; "$@" || code=$?; echo "$code" >"$0/code"' "$folder" "$@" </dev/null >>"$folder/log" 2>&1 &
  echo $! >"$folder/pid"
  echo "$*" >"$folder/command"
elif (($#)) && [[ "$(cat "$folder/command")" != "$*" ]]; then
  echo "detached.sh: another command is still running here: $(cat "$folder/command")" >&2
  exit 2
fi
tail -n 1000 -f --pid="$(cat "$folder/pid")" "$folder/log"
exit "$(cat "$folder/code" 2>/dev/null || echo 137)" # without a code it was lost
