"""Commands of several stages: what is done is kept in the workdir, and the same command goes on from there."""

import contextlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from absl import logging

from experiments.common import entry


def is_done(workdir: pathlib.Path, settings: dict) -> bool:
    """Say whether the results are there; raise UsageError if the workdir was made with other settings."""
    path, settings = workdir / "settings.json", json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text()) != settings:
        raise entry.UsageError(f"{workdir} holds a run with other settings, see {path}; use another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    if done := (workdir / "results.json").exists():
        logging.info("%s is done; another --workdir starts anew.", workdir)
    return done


@contextlib.contextmanager
def stage(title: str):
    """Say when a stage begins and how long it took."""
    logging.info("%s", title)
    started = time.time()
    yield
    logging.info("%s: %.0f s\n", title, time.time() - started)


def once(path: pathlib.Path, make: Callable[[], Any]) -> Any:
    """Return the JSON value that `path` holds, or make it and write it there."""
    if path.exists():
        logging.info("already done")
    else:
        write_json(path, make())
    return json.loads(path.read_text())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a file so that it is never seen in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
