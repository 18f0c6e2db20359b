#!/usr/bin/env bash
# Install into .venv (or the environment of PYTHON=), lint, and run the test files side by side; arguments are passed
# on to pytest.
#   launch/test.sh [-m slow ...]
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
