#!/usr/bin/env bash
# Install into .venv (or the environment of PYTHON=) and run the quickstart; arguments are passed on.
#   launch/quickstart.sh [--seed=1 ...]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" envs,plots,logging
exec "$PYTHON" -m experiments.quickstart "$@"
