"""Flags that several commands have: each is declared here once, and a command takes those that it needs.

    CONFIG, WORKDIR = run_flags.config("quickstart"), run_flags.workdir(default="runs/quickstart")

Commands hand the values on as plain arguments; nothing else in this folder reads these flags.
"""

import dataclasses
import functools
import inspect
import pathlib
import re

from absl import flags
from ml_collections import config_flags

flags.disclaim_key_flags()  # --help lists --config among the flags of the command, as it does the others


class _PairParser(flags.ArgumentParser):
    """Reads 5,4 or (5, 4)."""

    def __init__(self, number_type):
        self._number_type = number_type

    def parse(self, argument):
        numbers = argument.strip("()").split(",")
        if len(numbers) != 2:
            raise ValueError("two numbers are needed, such as 5,4")
        return tuple(self._number_type(number) for number in numbers)


_FIELD = re.compile(r"^\s*(?:config\.)?([\w.]+)(?:: [^=\n]+)? = .*?  # (.*)$", re.MULTILINE)
_PARSERS = {
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    tuple: _PairParser(int),
}


def config(name: str | None = None) -> flags.FlagHolder:
    """Declare --config, by default experiments/configs/`name`.py, and --config.FIELD for each of its fields."""
    holder = config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:NAME in experiments/configs.")
    # `entry` passes the default as if it were given: as a default of the flag it would be read, with the fields on the
    # command line, when this is imported, where a mistake is a traceback.
    flags.FLAGS["config"].default_file = name and str(pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py")
    return holder


dataset = functools.partial(flags.DEFINE_string, "dataset", None, "Minari dataset id, in place of the configuration's.")
new_dataset = functools.partial(
    flags.DEFINE_string, "dataset", None, "Id of the new Minari dataset: namespace/name-v0.", required=True
)
overwrite = functools.partial(flags.DEFINE_bool, "overwrite", False, "Replace an existing dataset.")
download = functools.partial(
    flags.DEFINE_bool, "download", False, "Download the dataset from Minari's remote if it is not here."
)
workdir = functools.partial(
    flags.DEFINE_string, "workdir", default=None, help="Folder for configuration, metrics and checkpoints."
)
seed = functools.partial(flags.DEFINE_integer, "seed", 0, lower_bound=0)  # takes `help`; those below take `default`
num_seeds = functools.partial(
    flags.DEFINE_integer, "num_seeds", help="Learners side by side, in place of the configuration's.", lower_bound=1
)
data_episodes = functools.partial(flags.DEFINE_integer, "data_episodes", help="Episodes to collect.", lower_bound=2)
num_episodes = functools.partial(
    flags.DEFINE_integer, "num_episodes", help="Episodes that each policy plays.", lower_bound=2
)
num_envs = functools.partial(
    flags.DEFINE_integer, "num_envs", help="Environments that are played in step.", lower_bound=1
)
step = functools.partial(
    flags.DEFINE_integer, "step", None, "Step of the checkpoint to play, in place of the newest.", lower_bound=0
)
iql_workdir = functools.partial(
    flags.DEFINE_string, "iql_workdir", None, "Folder of a run of train_iql whose Q guides the plans."
)
env = functools.partial(
    flags.DEFINE_string, "env", None, "Environment id, or MODULE:ID, in place of the dataset's environment."
)
trust_environment = functools.partial(
    flags.DEFINE_bool,
    "trust_environment",
    False,
    "Run whatever code the dataset names as its environment, not only gymnasium's.",
)
max_episode_steps = functools.partial(
    flags.DEFINE_integer,
    "max_episode_steps",
    None,
    "Cut episodes after so many steps; by default as the environment or the data does.",
    1,
)
goal = functools.partial(
    flags.DEFINE,
    _PairParser(float),
    "goal",
    None,
    "x,y where the goal of a gymnasium-robotics maze stands in every episode.",
)
num_windows = functools.partial(
    flags.DEFINE_integer, "num_windows", help="Windows of held-out episodes to read, evenly spaced.", lower_bound=1
)
out = functools.partial(
    flags.DEFINE_string, "out", help="File for the numbers; a figure of the same name is beside it."
)
minutes = functools.partial(
    flags.DEFINE_float,
    "minutes",
    None,
    "Train for so long on this machine: a step is measured, and the updates and the schedule are set once for the run.",
    lower_bound=0.001,
)


def check_range(low: flags.FlagHolder, high: flags.FlagHolder) -> None:
    """Raise ValueError unless two numbers are given together, the first below the second, or neither is."""
    is_given = low.value is not None, high.value is not None
    if any(is_given) and not (all(is_given) and low.value < high.value):
        raise ValueError(
            f"--{low.name}={low.value} and --{high.name}={high.value} must be given together, the first below the "
            "second."
        )


def fields(prefix: str, record: type) -> dict[str, flags.FlagHolder]:
    """Declare --`prefix`.FIELD for each field of a dataclass; None means that it is not given.

    The types are those of the defaults. (A config flag would fail on a misspelt one at import.)
    """
    told = {name: f"{text[0].upper()}{text[1:]}." for name, text in comments(record).items()}
    return {
        field.name: flags.DEFINE(_PARSERS[type(field.default)], f"{prefix}.{field.name}", None, told[field.name])
        for field in dataclasses.fields(record)
    }


def comments(source) -> dict[str, str]:
    """Return what stands beside each field in the source of a dataclass and of its bases, or of a module."""
    found = {}
    for each in reversed(source.__mro__[:-1]) if isinstance(source, type) else [source]:
        found |= dict(_FIELD.findall(inspect.getsource(each)))
    return found


def given(holders: dict[str, flags.FlagHolder]) -> dict:
    """Return the values of those of `fields` that are on the command line."""
    return {name: holder.value for name, holder in holders.items() if holder.value is not None}
