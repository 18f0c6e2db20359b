#!/usr/bin/env bash
# All combinations of lists of flags through another launcher, each in a workdir of its own, at most JOBS at once (1):
#   JOBS=4 launch/sweep.sh [--dry_run] --workdir=runs/sweep --dataset=A,B --config.seed=0,1,2 \
#     launch/local.sh experiments.train_tt --config=...
# Without lists, once for every run in that folder; {} in an argument is the run's workdir:
#   JOBS=4 launch/sweep.sh --workdir=runs/sweep launch/local.sh experiments.plan --num_episodes=20 --out={}/results.json
# Through launch/slurm.sh they are one job array; sbatch's options follow it. Each run's output is in its output.log.
# One table of them all: python -m experiments.collect_results --workdir=runs/sweep
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
workdir="" names=("") flags=("")
for option in ${options[@]+"${options[@]}"}; do
  if [[ "$option" == --workdir=* ]]; then workdir="${option#*=}" && continue; fi
  flag="${option%%=*}" new_names=() new_flags=()
  IFS=, read -ra values <<<"${option#*=}"
  for i in "${!names[@]}"; do
    for value in "${values[@]}"; do
      new_names+=("${names[i]:+${names[i]}_}${flag##*[-.]}=${value//[!A-Za-z0-9._-]/-}")
      new_flags+=("${flags[i]} $(printf %q "$flag=$value")")
    done
  done
  names=("${new_names[@]}") flags=("${new_flags[@]}")
done
: "${workdir:?--workdir=DIR is missing}" "${1:?the launcher is missing, such as launch/local.sh}"
if [[ -z "${names[0]}" ]]; then
  names=() flags=()
  for config in "$workdir"/*/config.json; do
    if [[ ! -e "$config" ]]; then echo "sweep.sh: there is no run in $workdir" >&2 && exit 2; fi
    names+=("$(basename "$(dirname "$config")")") flags+=("")
  done
fi
launcher=("$1") && shift
while [[ "${1:-}" == -* ]]; do launcher+=("$1") && shift; done

commands=()
for i in "${!names[@]}"; do
  run="$workdir/${names[i]}"
  arguments="$(printf '%q ' "${@//"{}"/$run}" --workdir="$run")${flags[i]}"
  if [[ "${launcher[0]}" == *slurm.sh ]]; then
    commands+=("$arguments")
  else
    commands+=("mkdir -p $(printf %q "$run") && $(printf '%q ' "${launcher[@]}")$arguments >>$(printf %q "$run")/output.log 2>&1")
  fi
done
if [[ -n "$dry_run" ]]; then
  printf '%s\n' "${commands[@]}"
else
  mkdir -p "$workdir" && printf '%s\n' "${commands[@]}" >"$workdir/commands"
fi
if [[ "${launcher[0]}" == *slurm.sh ]]; then
  run "${launcher[0]}" --array="1-${#commands[@]}%${JOBS:-1}" ${launcher[@]+"${launcher[@]:1}"} "$workdir/commands"
elif [[ -z "$dry_run" ]]; then
  # shellcheck disable=SC2016 # expanded by the inner shell
  tr '\n' '\0' <"$workdir/commands" | xargs -0 -n 1 -P "${JOBS:-1}" bash -c 'eval "$0" || { echo "$?: $0" >&2; exit 1; }'
fi
