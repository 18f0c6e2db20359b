# shellcheck shell=bash
# Sourced by environment.sh and .ci/run: the Pythons that the tests run with, newest first, and how to find one.
# shellcheck disable=SC2034 # for those who source this
TESTED_PYTHONS=(3.13 3.12 3.11) # jax from 0.11 on is faster and needs 3.12

# Print an interpreter of the version "$1" that runs and can make virtual environments: one on PATH, or else of pyenv,
# which has every version on PATH but lets only the chosen ones run.
find_python() {
  local candidate
  for candidate in "python$1" python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1".*/bin/python; do
    if "$candidate" -c "import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (${1/./, }))" &>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}
