"""Files of a run: where they can be written, and writing them whole."""

import json
import os
import pathlib
import tempfile


def make_folder(folder, *, flag):
    """Make a folder for the value of a `flag`; raises ValueError if no files can be written there."""
    _probe(folder, flag=flag, value=folder)


def result_file(name, *, flag="out"):
    """Return the path of the file that a `flag` names and make its folder; raises ValueError if it cannot be written.

    Call it before the work.
    """
    path = pathlib.Path(name)
    if path.is_dir() or path.suffix in (".png", ".npz"):
        kind = "folder" if path.is_dir() else "picture or arrays, which are written beside it"
        raise ValueError(f"--{flag}={name} must name a file, not a {kind}.")
    _probe(path.parent, flag=flag, value=name)
    return path


def _probe(folder, *, flag, value):
    """Make a folder and a file in it, which is gone at once; only that shows what can be written, even to root."""
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--{flag}={value} cannot be written: {error}.") from error


def read_json(path):
    """Return the value in a file; raises ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); move it elsewhere, and it is made anew.") from error


def write_json(path, value):
    """Write a file, whose folder is made, so that it is never seen in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_text(path, text):
    """Write a file so that whoever reads it, also after a crash, sees the old text or the new, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
