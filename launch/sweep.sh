#!/usr/bin/env bash
# All combinations of lists of flags through another launcher, each in a workdir of its own, at most JOBS at once (1):
#   JOBS=4 launch/sweep.sh [--dry_run] --workdir=runs/sweep --dataset=A,B --config.seed=0,1,2 \
#     launch/local.sh experiments.train_tt --config=...
# Without lists, once for every run in that folder; {} in an argument is the run's workdir:
#   JOBS=4 launch/sweep.sh --workdir=runs/sweep launch/local.sh experiments.plan --num_episodes=20 --out={}/results.json
# Through launch/slurm.sh they are one job array; sbatch's options follow it. Otherwise each run's output is in its
# output.log, below OUTPUT where the workdir is not on this machine, and the exit code is not 0 if one failed.
# One table of all results: python -m experiments.collect_results --workdir=runs/sweep
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
workdir="" lists=()
for option in ${options[@]+"${options[@]}"}; do
  if [[ "$option" == --workdir=* ]]; then workdir="${option#*=}"; else lists+=("$option"); fi
done
: "${workdir:?sweep.sh needs --workdir=DIR}" "${1:?sweep.sh needs a launcher, such as launch/local.sh}"
launcher=("$1") && shift
while [[ "${1:-}" == -* ]]; do launcher+=("$1") && shift; done
: "${1:?sweep.sh needs a module, such as experiments.train_tt}"
module=("$@")

combine() { # NAME FLAGS LIST...: print a command for every combination of the lists
  local name="$1" flags="$2" folder="$workdir/$1" output="${OUTPUT:-$workdir}/$1" flag="${3:-}" value values
  if (($# == 2)); then
    if [[ "${launcher[0]}" != *slurm.sh ]]; then printf 'mkdir -p %q && ' "$output" && printf '%q ' "${launcher[@]}"; fi
    printf '%q ' "${module[@]//"{}"/$folder}" --workdir="$folder" && printf '%s' "$flags"
    if [[ "${launcher[0]}" != *slurm.sh ]]; then printf '>>%q 2>&1' "$output/output.log"; fi
    echo && return
  fi
  flag="${flag%%=*}" && IFS=, read -ra values <<<"${3#*=}"
  for value in "${values[@]:-}"; do # of --flag= an empty one
    combine "${name:+${name}_}${flag##*[-.]}=${value//[!A-Za-z0-9._-]/-}" \
      "$flags$(printf '%q ' "$flag=$value")" "${@:4}"
  done
}

if ((${#lists[@]})); then
  commands="$(combine "" "" "${lists[@]}")"
else
  commands="$(for run in "$workdir"/*/config.json; do
    if [[ -e "$run" ]]; then combine "$(basename "${run%/config.json}")" ""; fi
  done)"
fi
if [[ -z "$commands" ]]; then echo "sweep.sh: there is no run in $workdir" >&2 && exit 2; fi
list="${OUTPUT:-$workdir}/commands"
if [[ -n "$dry_run" ]]; then echo "$commands"; else mkdir -p "$(dirname "$list")" && echo "$commands" >"$list"; fi
if [[ "${launcher[0]}" == *slurm.sh ]]; then
  run "${launcher[@]}" --array="1-$(($(wc -l <<<"$commands")))%${JOBS:-1}" "$list"
elif [[ -z "$dry_run" ]]; then
  # shellcheck disable=SC2016 # expanded by the inner shell
  tr '\n' '\0' <"$list" |
    xargs -0 -n 1 -P "${JOBS:-1}" bash -c 'eval "$0" || { echo "sweep.sh: exit code $? of: $0" >&2; exit 1; }'
fi
