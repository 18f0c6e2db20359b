"""The launch scripts find a Python that works."""

import os
import subprocess
import sys
import venv

import pytest
from entry_points import ROOT

OWN_VERSION = "{}.{}".format(*sys.version_info)


def find_python(version, folder):
    """Return what find_python prints where only `folder` has programs, and a pyenv in it its versions."""
    script = f'source "{ROOT}/launch/find_python.sh"; PATH="$1"; PYENV_ROOT="$1/pyenv"; find_python {version}'
    command = ["bash", "-euc", script, "bash", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def add_program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_first_python_of_the_version_that_runs_is_found(tmp_path):
    pytest.importorskip("ensurepip")  # a separate package in some distributions
    assert find_python(OWN_VERSION, tmp_path) == ""
    own = f'exec "{sys.executable}" "$@"'
    in_pyenv = tmp_path / "pyenv" / "versions" / f"{OWN_VERSION}.1" / "bin" / "python"
    add_program(in_pyenv, own)
    add_program(tmp_path / f"python{OWN_VERSION}", "echo 'pyenv: command not found' >&2; exit 127")  # as its shims do
    assert find_python(OWN_VERSION, tmp_path) == str(in_pyenv)
    add_program(tmp_path / "python3", own)
    assert find_python(OWN_VERSION, tmp_path) == "python3"
    assert find_python("3.1", tmp_path) == ""


def test_an_interpreter_without_pip_is_refused_in_one_line(tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    command = ["bash", "-euc", f'source "{ROOT}/launch/environment.sh" test']
    python = str(environment / "bin" / "python")
    done = subprocess.run(command, env=os.environ | {"PYTHON": python}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"{python} -m ensurepip" in done.stderr
