"""Flags that several commands have: each is declared here once, and a command takes those that it needs.

    CONFIG, WORKDIR = run_flags.config("quickstart"), run_flags.workdir("runs/quickstart")

Commands hand the values on as plain arguments; nothing else in this folder reads these flags.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

flags.disclaim_key_flags()  # --help lists them among those of the command


def config(name: str | None = None) -> flags.FlagHolder:
    """Declare --config, by default experiments/configs/`name`.py, and --config.FIELD for each of its fields."""
    path = name and str(pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py")
    return config_flags.DEFINE_config_file("config", path, "Configuration file, see experiments/configs.")


def dataset() -> flags.FlagHolder:
    return flags.DEFINE_string("dataset", None, "Minari dataset id, in place of the configuration's.")


def new_dataset() -> flags.FlagHolder:
    return flags.DEFINE_string("dataset", None, "Id of the new Minari dataset: namespace/name-v0.", required=True)


def overwrite() -> flags.FlagHolder:
    return flags.DEFINE_bool("overwrite", False, "Replace an existing dataset.")


def download() -> flags.FlagHolder:
    return flags.DEFINE_bool("download", False, "Download the dataset from Minari's remote if it is not here.")


def workdir(
    default: str | None = None, text: str = "Folder for configuration, metrics and checkpoints.", **kwargs
) -> flags.FlagHolder:
    return flags.DEFINE_string("workdir", default, text, **kwargs)


def seed(text: str, upper: int | None = None) -> flags.FlagHolder:
    return flags.DEFINE_integer("seed", 0, text, 0, upper)


def num_seeds(default: int | None = None) -> flags.FlagHolder:
    return flags.DEFINE_integer("num_seeds", default, "Learners side by side, in place of the configuration's.", 1)


def data_episodes(default: int) -> flags.FlagHolder:
    return flags.DEFINE_integer("data_episodes", default, "Episodes to collect.", 2)


def num_episodes(default: int, text: str = "Episodes that each policy plays.", lower: int = 2) -> flags.FlagHolder:
    return flags.DEFINE_integer("num_episodes", default, text, lower)


def num_envs(default: int, text: str) -> flags.FlagHolder:
    return flags.DEFINE_integer("num_envs", default, text, 1)
