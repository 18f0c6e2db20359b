#!/usr/bin/env bash
# A run on a TPU pod (queued resource), which is made if it does not exist; made and started again after preemption:
#   export TPU=NAME ZONE=ZONE SETUP='mountpoint -q /mnt/runs || sudo mount HOST:/SHARE /mnt/runs'
#   launch/tpu_pod.sh [--dry_run] --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot \
#     experiments.train_tt --config=... --workdir=/mnt/runs/NAME
#   launch/tpu_pod.sh --follow    # what runs there
#   launch/tpu_pod.sh --delete
# Options in front of the module are those of `gcloud compute tpus queued-resources create`. Every host gets what git
# tracks, changes included, an environment with EXTRAS (tpu,envs,logging,download), and runs SETUP, here to mount what
# all hosts share and what outlives them. Ctrl-C ends the watching, not the run. Exit code 75, a lost host and
# preemption start the run again, POLL seconds (30) later and at most MAX_RESTARTS times (100).
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/common.sh
source "$here/common.sh"
: "${TPU:?set TPU to the name of the pod}" "${ZONE:?set ZONE to the zone of the pod}" "${SETUP:=true}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT # whatever gcloud makes of it

tpus() { run gcloud compute tpus "$@" --zone="$ZONE" --quiet; }
on_all() { tpus tpu-vm ssh "$TPU" --worker=all --ssh-flag=-oServerAliveInterval=20 --command="$1"; }
state() { # nothing if there is no such pod; fails if that is not known
  if ! gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" --format="value(state.state)" 2>"$folder/why"
  then grep -q NOT_FOUND "$folder/why" || { cat "$folder/why" >&2 && return 255; }; fi
}
delete() { tpus queued-resources delete "$TPU" --force; }
create() { tpus queued-resources create "$TPU" --node-id="$TPU" ${options[@]+"${options[@]}"}; }
ready() { # create it if there is none or what was there is gone, and wait until it is active
  if [[ -n "$dry_run" ]]; then create && return; fi
  while now="$(state)" || return; [[ "$now" != ACTIVE ]]; do
    case "$now" in
      "") create || exit ;;
      SUSPENDED | FAILED) delete || return ;;
    esac
    sleep "${POLL:-30}"
  done
}
in_clone() { GIT_INDEX_FILE="$folder/index" git -C "$here/.." "$@"; } # with a copy of the index: another git may hold it
copy() {
  cp "$(git -C "$here/.." rev-parse --path-format=absolute --git-path index)" "$folder/index" &&
    in_clone add --update && tree="$(in_clone write-tree)" &&
    run git -C "$here/.." archive --output="$folder/tt_jax.tgz" "$tree" &&
    tpus tpu-vm scp "$folder/tt_jax.tgz" "$TPU:tt_jax.tgz" --worker=all
}
# shellcheck disable=SC2016 # expanded on the hosts
running='kill -0 "$(cat tt_jax/.run/pid 2>/dev/null)" 2>/dev/null' # and keeps its code
install="mkdir -p tt_jax && { $running || tar -xzf tt_jax.tgz -C tt_jax; } && cd tt_jax && { [ -x .venv/bin/python ] || \
  { curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --seed --python=3.12 .venv; }; } && \
  bash -c 'source launch/environment.sh ${EXTRAS:-tpu,envs,logging,download}' && { $SETUP; }"
start="cd tt_jax && launch/detached.sh .run .venv/bin/python -m$(printf ' %q' "$@" --distributed)"

if [[ " ${options[*]-} " == *" --delete "* ]]; then delete; exit; fi
if [[ " ${options[*]-} " == *" --follow "* ]]; then on_all "tt_jax/launch/detached.sh tt_jax/.run"; exit; fi
if (($# == 0)); then echo "tpu_pod.sh needs a module, such as experiments.train_tt" >&2 && exit 2; fi
for ((restarts = 0; ; restarts++)); do
  code=0 && { ready && copy && on_all "$install" && on_all "$start"; } || code=$?
  if [[ "$code" == 0 || -n "$dry_run" || "$restarts" -ge "${MAX_RESTARTS:-100}" ]]; then exit "$code"; fi
  sleep "${POLL:-30}"
  if [[ "$code" != 75 && "$code" -le 128 && "$(state || true)" == ACTIVE ]]; then exit "$code"; fi
  echo "tpu_pod.sh: ended with $code, starts again ($((restarts + 1)) of ${MAX_RESTARTS:-100})" >&2
done
