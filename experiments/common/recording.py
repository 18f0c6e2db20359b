"""What collecting and importing share: checking a dataset id before the work, writing the dataset after it."""

import faulthandler
import os
import pathlib
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable

import gymnasium
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE

from tt_jax import rollouts


def check_id(dataset_id: str, *, overwrite: bool) -> None:
    """Raise ValueError unless `dataset_id` can be written: it has a version, and is new or may be overwritten."""
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match["version"] is None:
        raise ValueError(f"--dataset={dataset_id} must look like namespace/name-v0, with a version at the end.")
    path = minari.storage.get_dataset_path(dataset_id)
    if path.exists() and not overwrite:
        raise ValueError(f"Dataset {dataset_id} already exists at {path}; pass --overwrite or choose another id.")


def to_buffer(episode: rollouts.Episode) -> EpisodeBuffer:
    """Turn a point maze's episode, whose observations begin with position and velocity, into Minari's."""
    observations = np.array(episode.observations, np.float64)[:, :4]
    is_last = np.arange(1, episode.length + 1) == episode.length
    return EpisodeBuffer(
        seed=episode.seed,
        observations={
            "observation": observations,
            "achieved_goal": observations[:, :2],
            "desired_goal": np.tile(episode.goal.astype(np.float64), (len(observations), 1)),
        },
        actions=np.array(episode.actions),
        rewards=np.array(episode.rewards),
        terminations=is_last & episode.terminated,
        truncations=is_last & (not episode.terminated),
        infos={},  # Minari cannot print episodes without
    )


def write(
    dataset_id: str,
    episodes: Iterable[EpisodeBuffer],
    *,
    env: gymnasium.Env | None,
    eval_env: gymnasium.Env | None = None,
    overwrite: bool = True,
    **metadata,
) -> None:
    """Write `episodes` as the Minari dataset `dataset_id`; `metadata` is Minari's.

    It appears when it is whole; until then an existing one stays. `eval_env` is the environment to evaluate in; without
    it, that of the data. Without an `env` both spaces are needed. Raises OSError if it cannot be written, and
    ValueError unless `overwrite` if another process has written it meanwhile.
    """
    path = minari.storage.get_dataset_path(dataset_id)
    root = path.parents[dataset_id.count("/")]
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".unfinished_") as folder:

        def create():
            os.environ["MINARI_DATASETS_PATH"] = folder
            warnings.simplefilter("ignore", UserWarning)  # about author and permalink, of published datasets
            minari.create_dataset_from_buffers(dataset_id, episodes, env=env, eval_env=eval_env or env, **metadata)

        try:
            _run_in_child(create)
        except OSError as error:
            raise OSError(f"the dataset {path} cannot be written, what was there before stays ({error}).") from error
        check_id(dataset_id, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rename(pathlib.Path(folder) / "replaced")
        (pathlib.Path(folder) / dataset_id).rename(path)
        for file in pathlib.Path(folder).rglob("namespace_metadata.json"):
            target = root / file.relative_to(folder)
            if not target.exists():
                file.rename(target)


def _run_in_child(function: Callable[[], None]) -> None:
    """Call a function that writes HDF5 in a process of its own, and raise what it raises.

    When the disk is full, HDF5 ends the process with a segmentation fault; this one is then told by an OSError.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child only writes, so threads that it lacks do no harm
        child = os.fork()
    if not child:
        os.close(reader)
        _send_first_error(writer, function)
    os.close(writer)
    with open(reader, "rb") as pipe:
        sent = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if sent:
        raise pickle.loads(sent)
    if code:
        raise OSError(f"the process that writes it ended with {code}")


def _send_first_error(writer, function):
    """Call a function and end the process; the first error, in it or in what h5py frees, goes to the pipe `writer`."""
    sent = []

    def send(error):
        if not sent:
            found = re.search("error message = '([^']+)'", str(error))  # HDF5's
            sent.append(OSError(found[1]) if found else error)
            os.write(writer, pickle.dumps(sent[0]))

    faulthandler.disable()
    sys.excepthook = lambda kind, error, trace: send(error)
    sys.unraisablehook = lambda unraisable: send(unraisable.exc_value)
    try:
        function()
    except BaseException as error:
        send(error)
    os._exit(1 if sent else 0)
