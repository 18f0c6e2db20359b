# shellcheck shell=bash
# Sourced by the launchers: the options in front of the module go into `options`, the module and its flags stay in "$@".
# With --dry_run among the options, `run` prints a command in place of running it.
dry_run="" options=()
while [[ "${1:-}" == -* ]]; do
  if [[ "$1" == --dry_run ]]; then dry_run=1; else options+=("$1"); fi
  shift
done

run() {
  if [[ -z "$dry_run" ]]; then "$@"; else printf '%q ' "$@" && echo; fi
}
