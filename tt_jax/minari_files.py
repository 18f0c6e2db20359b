"""Minari datasets on this machine, read without making an environment; what is wrong is a one-line ValueError."""

import contextlib
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator

import minari
from minari.dataset.minari_storage import MinariStorage

from tt_jax import environments

_AGAIN = "copy or download the dataset again"


def open_storage(dataset_id: str, *, download: bool = False) -> MinariStorage:
    """Open a dataset, from Minari's remote if it is not here and `download`.

    Raises ValueError if it is missing or damaged, or needs a package or an untrusted environment to be read.
    """
    try:
        path = minari.storage.get_dataset_path(dataset_id)
    except OSError as error:  # it makes the folder of all datasets
        raise ValueError(f"MINARI_DATASETS_PATH must name a folder: {error}.") from error
    if not (path / "data").exists():
        if not download:
            raise ValueError(
                f"Dataset {dataset_id} not found at {path}; "
                "set MINARI_DATASETS_PATH to the folder that holds it, or pass --download."
            )
        try:
            minari.download_dataset(dataset_id)
        except Exception as error:  # missing client, network, unknown dataset: whatever the remote's client raises
            raise ValueError(f"Dataset {dataset_id} could not be downloaded: {error}") from error
    data = pathlib.Path(path) / "data"
    metadata = _metadata(data)
    if not {"observation_space", "action_space"} <= metadata.keys():  # Minari would make the environment for them
        try:
            environments.check_trusted(environments.read_spec(metadata.get("env_spec")))
        except environments.Unavailable as error:
            raise ValueError(f"{data / 'metadata.json'} has no spaces, and {error}.") from error
    version = metadata.get("minari_version")
    if version not in minari.supported_dataset_versions:
        raise ValueError(
            f"{data} is of Minari {version}, which the installed Minari {minari.__version__} does not read; install "
            "another version of minari."
        )
    with _read_errors(data, f"data_format={metadata.get('data_format')}"):
        return MinariStorage.read(data)


def read_episodes(storage: MinariStorage, indices: Iterable[int]) -> Iterator[dict]:
    """Yield the episodes with the given indices, as Minari stores them; raises ValueError if one cannot be read."""
    for index in indices:
        with _read_errors(storage.data_path, f"episode {index}"):
            (episode,) = storage.get_episodes([index])
        yield episode


def evaluation_spec(dataset_id: str) -> str | None:
    """Return the JSON specification of the environment to evaluate in, or else of the data's; None without one."""
    metadata = _metadata(pathlib.Path(minari.storage.get_dataset_path(dataset_id)) / "data")
    return metadata.get("eval_env_spec") or metadata.get("env_spec")


def reference_scores(dataset_id: str) -> tuple[float, float] | None:
    """Return the dataset's returns with the normalised scores 0 and 1; None without a range of them or a dataset."""
    data = pathlib.Path(minari.storage.get_dataset_path(dataset_id)) / "data"
    metadata = _metadata(data) if data.exists() else {}
    scores = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    is_range = all(isinstance(score, int | float) for score in scores) and -math.inf < scores[0] < scores[1] < math.inf
    return scores if is_range else None


def environment_limits(storage: MinariStorage) -> tuple[str, int | None]:
    """Return the id and the time limit of the data's environment; "" and None, with a warning, if it is unreadable."""
    text = storage.metadata.get("env_spec")
    if not text:
        return "", None
    try:
        spec = environments.read_spec(text)
    except environments.Unavailable as error:
        logging.getLogger(__name__).warning("%s: %s; its time limit is not known.", storage.data_path, error)
        return "", None
    return spec.id, spec.max_episode_steps


def _metadata(data):
    with _read_errors(data / "metadata.json", "metadata"):
        metadata = MinariStorage.read_raw_metadata(data)
        if not isinstance(metadata, dict):
            raise TypeError(f"expected an object, got {type(metadata).__name__}")
        return metadata


@contextlib.contextmanager
def _read_errors(path, what):
    """Turn what a damaged file or a missing package raises, which may be anything, into one line that names it."""
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read ({what}): {reason}; install the package that it names.") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path} cannot be read ({what}): {reason}; {_AGAIN}.") from error
