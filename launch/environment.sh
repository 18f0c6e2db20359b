# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: enter the repository root and set PYTHON to an interpreter that has the package
# with the extras "$1", e.g. "envs,plots". An interpreter given as PYTHON= is used and installed into; otherwise .venv,
# made with the newest tested Python of this machine.

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_venv() {
  local version base
  for version in "${TESTED_PYTHONS[@]}"; do
    if base="$(find_python "$version")"; then
      echo "Making .venv with Python $version"
      "$base" -m venv .venv
      return
    fi
  done
  for base in python3 python3.14; do
    if new_enough "$base"; then
      echo "Making .venv with $base: of the tested ones, ${TESTED_PYTHONS[*]}, none that can make it was found." >&2
      "$base" -m venv .venv
      return
    fi
  done
  echo "Python 3.11 or later is needed, but python3 is $(python3 --version 2>&1); set PYTHON= to one." >&2
  return 2
}

if [[ "${PYTHON:-}" == */* ]]; then # keep a relative path, but not through symbolic links, which make the environment
  PYTHON="$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=launch/find_python.sh
source launch/find_python.sh
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON="$PWD/.venv/bin/python"
  new_enough "$PYTHON" || make_venv
fi
if ! new_enough "$PYTHON"; then
  echo "PYTHON=$PYTHON is not a Python of version 3.11 or later." >&2
  exit 2
fi

# A stamp in the environment says that this setup.py was installed from this folder with these extras.
stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.tt_jax-$1-$(cat setup.py <(pwd) | cksum | tr ' ' '-')"
if [[ ! -e "$stamp" ]]; then
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    echo "PYTHON=$PYTHON has no pip to install tt_jax with: run $PYTHON -m ensurepip first, or leave PYTHON= out." >&2
    exit 2
  fi
  echo "Installing tt_jax[$1]"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -e ".[$1]"
  touch "$stamp"
fi
