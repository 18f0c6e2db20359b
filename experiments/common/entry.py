"""What every entry point shares: flags and configurations, one-line errors and exit codes.

    CONFIG = config_flags.DEFINE_config_file("config")

    def main(_):
        config = entry.resolve_config(CONFIG.value, dataset=DATASET.value, workdir=WORKDIR.value)

    if __name__ == "__main__":
        entry.run(main)

Exit codes: 0 done; 2 the caller's mistake, with one line on stderr; 75 interrupted after saving, start again to go on;
1 anything else.
"""

import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
import typing
import warnings
from logging import StreamHandler

import jax
import numpy as np
from absl import app, flags, logging
from flax import traverse_util
from jax.experimental import multihost_utils

import tt_jax
from experiments.common import files, lock, memory, supervision
from tt_jax import checkpoints

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 75

# A checkpoint is of no use when one of these changes, but for the free fields.
ESSENTIAL_FIELDS = ("dataset", "data", "model", "iql", "train.optimizer")
FREE_FIELDS = ("model.remat", "model.attention")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
HEARTBEAT_SECONDS = 30  # without a sign of life another process is lost

_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of this SLURM job or TPU pod.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where there is no SLURM or TPU."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes; with --coordinator_address.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process; with --coordinator_address.")


class UsageError(ValueError):
    """A mistake of the caller, told in one line."""


class Failed(Exception):
    """Work that could not be done in full, told in one line; what was done is saved."""


class Interrupted(Exception):
    """Raised when the run ends early with its state saved."""


def run(main_fn):
    """Parse the flags, set JAX up, call `main_fn(argv)` and exit with the code that says how it went.

    What the entry points log as information goes to stdout. `--verbosity=1` shows the traceback behind an error.
    """
    app.run(lambda argv: _together(lambda: _exit_code(_start, lambda: main_fn(argv))), flags_parser=_parse_flags)


def _parse_flags(argv):
    def parse():
        argv_with_config = _with_config(argv)
        try:
            rest = flags.FLAGS(argv_with_config)
            _check_config()
        except Exception as error:  # a configuration is code: it may raise anything
            raise UsageError(_tell_flag_error(error, argv_with_config)) from error
        if rest[1:]:
            raise UsageError(f"unexpected argument {rest[1]!r}; flags are written --name=value.")
        for name, value in flags.FLAGS.flag_values_dict().items():
            numbers = value if isinstance(value, tuple) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise UsageError(f"flag --{name}={value}: must be finite.")

    if code := _exit_code(parse):
        sys.exit(code)
    return argv[:1]


def _check_config():
    """Raise what is wrong with the file of --config, which config_flags keeps until the configuration is used."""
    if "config" in flags.FLAGS and (config := flags.FLAGS["config"].value) is not None:
        import ml_collections  # here, because the benchmark uses this module and must not need ml_collections

        getattr(config, "seed", None)  # OSError if the file is not there
        if not isinstance(config, ml_collections.ConfigDict):
            raise TypeError(f"get_config() must return a ConfigDict, got {type(config).__name__}")


def _tell_flag_error(error, argv):
    """Say in one line what is wrong with the flags, or with the configuration that they name."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, AttributeError | KeyError) and text[:1] in ("'", '"'):  # ml_collections quotes the name
        suggestion = re.search(r'Did you mean "\w+"', text)
        name, hint = re.search(r"\w+", text)[0], f"; {suggestion[0].lower()}?" if suggestion else "."
        return f"the configuration has no field {name!r}{hint}"
    lines = text.strip().splitlines() or [repr(error)]
    if isinstance(error, flags.Error) and "parsing config file" not in lines[0]:
        return lines[0]
    message = " ".join(lines) if isinstance(error, OSError) else re.sub(r"^\w+Error: ", "", lines[-1]).rstrip(".")
    files = [argument.partition("=")[2] for argument in argv if argument.lstrip("-").startswith("config=")]
    file = files[-1] if files else ""
    return message if file.partition(":")[0] in message else f"--config={file} cannot be used: {message}."


def _with_config(argv):
    """Add the command's default configuration file, see `run_flags.config`, if none is given."""
    default = getattr(flags.FLAGS["config"], "default_file", None) if "config" in flags.FLAGS else None
    given = any(argument.lstrip("-").split("=")[0] == "config" for argument in argv[1:])
    return [*argv[:1], f"--config={default}", *argv[1:]] if default and not given else argv


def _exit_code(*functions):
    """Call the functions in turn and return the exit code; what was not foreseen is raised on, with its traceback."""
    try:
        with memory.explained("what was asked for", "choose smaller sizes"):
            for function in functions:
                function()
    except Interrupted as error:
        return report(error, INTERRUPTED)
    except Exception as error:
        if _is_distributed() and supervision.is_loss(error):
            return supervision.LOST  # the parent says so
        if not isinstance(error, ValueError | Failed | OSError | FloatingPointError):
            raise
        return report(error, USAGE if isinstance(error, ValueError) else FAILED)
    except KeyboardInterrupt:
        return report("interrupted; nothing was saved.", FAILED)
    return DONE


def report(error, code):
    """Print the one line that says what went wrong, and return the exit code."""
    print(f"{pathlib.Path(sys.argv[0]).stem}: {' '.join(str(error).split())}", file=sys.stderr)
    logging.debug("traceback", exc_info=True)
    return code


def _is_distributed():
    return flags.FLAGS.is_parsed() and bool(_DISTRIBUTED.value or _COORDINATOR.value)


def _together(function):
    """Return the exit code of `function`, one of several processes; a failure ends this one without the others."""
    if not _is_distributed():
        return function()
    sys.stdout.flush()
    if ended := supervision.fork(STOP_SIGNALS):
        code, last_words = ended
        if code != supervision.LOST or flags.FLAGS.verbosity > 0:
            os.write(2, last_words)
        if code == supervision.LOST:
            code = report("another process of this run was lost; start all of them again to go on.", INTERRUPTED)
            time.sleep(1)  # so that the launcher first sees the end of one that failed
        os._exit(code)
    try:
        code = function()
    except Exception:
        logging.exception("not foreseen")
        code = FAILED
    if code not in (DONE, INTERRUPTED):  # jax would wait for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _start():
    """Set up the log, join the other processes, turn the compilation cache on, and say where the run is."""
    _log_own_information_to_stdout()
    sys.unraisablehook = _report_unraisable
    if _COORDINATOR.value:
        _check_place_among_processes()
        jax.distributed.initialize(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    elif _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
        raise UsageError("--num_processes and --process_id need --coordinator_address.")
    elif _DISTRIBUTED.value:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except ValueError as error:  # jax finds nothing that would tell it
            raise UsageError(
                f"--distributed: no SLURM job or TPU pod is found here ({error}); start it there, see launch/, or pass "
                "--coordinator_address, --num_processes and --process_id."
            ) from error
    # A cache that cannot be written, on a full disk for one, or was written in part, costs time alone.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    cache = {
        "jax_compilation_cache_dir": str(pathlib.Path.home() / ".cache" / "tt_jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in cache.items():
        if name.upper() not in os.environ:  # which jax has read
            jax.config.update(name, value)
    if is_main_process():
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
        processes = f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}"
        logging.info("tt_jax %s, jax %s, %s, %s", tt_jax.__version__, jax.__version__, devices, processes)


def _check_place_among_processes():
    """Raise UsageError unless the flags say where process 0 is, how many processes there are, and which is this."""
    num, index, (host, _, port) = _NUM_PROCESSES.value, _PROCESS_ID.value, _COORDINATOR.value.rpartition(":")
    if num is None or index is None:
        raise UsageError("--coordinator_address needs --num_processes and --process_id.")
    if not 0 <= index < num:
        raise UsageError(f"--process_id={index} must be in [0, {num}), below --num_processes={num}.")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"--coordinator_address={_COORDINATOR.value} must be HOST:PORT, such as localhost:12345.")


def _log_own_information_to_stdout():
    """Show what the entry points say as plain lines, and of the libraries only warnings; --verbosity=1 shows all."""
    if flags.FLAGS.verbosity == logging.INFO:
        own = StreamHandler(sys.stdout)
        own.addFilter(lambda record: record.levelname == "INFO" and _is_own(record.pathname))
        logging.get_absl_logger().addHandler(own)
        logging.get_absl_handler().python_handler.addFilter(_is_for_the_user)


def _is_for_the_user(record):
    """Leave out information, and what orbax logs, with its traceback or before an error, since it raises it as well."""
    return record.levelname != "INFO" and "orbax" not in record.pathname


def _report_unraisable(unraisable):
    """Leave out what orbax's reads and writes say after one of them has failed, which is raised as well."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _is_own(path):
    return pathlib.Path(__file__).parents[1] in pathlib.Path(path).parents


def is_main_process() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0


def check_alone() -> None:
    """Raise UsageError with several processes, for commands that run in one."""
    if jax.process_count() > 1:
        raise UsageError(f"this command runs in one process, got {jax.process_count()}; it uses all devices of it.")


def commit_id() -> str:
    """Return the commit of the source, with "-dirty" if it was changed since, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


# Configurations


def resolve_config(config, *, dataset, workdir, method="tt"):
    """Set the dataset, `hold` the workdir, compare with the run that it has, and write `workdir`/config.json.

    `method` is what is trained there: tt, iql or a baseline. Raises UsageError if a flag is missing, or if the workdir
    has checkpoints made with another method, dataset, data, model or number of seeds; everything else may change when a
    run is resumed.
    """
    for flag, value in (("config", config), ("workdir", workdir)):
        if not value:
            raise UsageError(f"--{flag} is missing.")
    config.dataset = dataset or config.dataset
    if not config.dataset:
        raise UsageError("--dataset is missing: the id of a Minari dataset, such as mujoco/hopper/medium-v0.")
    hold(workdir)
    path, settings = pathlib.Path(workdir) / "config.json", {"method": method} | config.to_dict()
    if path.exists() and checkpoints.latest_step(workdir) is not None:
        _check_same_run(read_config(workdir).to_dict(), settings, workdir)
    if is_main_process():
        files.write_json(path, settings)
    import ml_collections  # here, because the benchmark uses this module and must not need ml_collections

    return ml_collections.FrozenConfigDict(config)


def hold(workdir):
    """Reserve a workdir for this run until its end; raises UsageError, in every process, if another run writes it."""
    problem = None
    if is_main_process():
        try:
            lock.hold(workdir)
            _check_kinds(workdir)
        except (lock.Held, UsageError) as error:
            problem = UsageError(str(error))
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            problem = (OSError if is_full else UsageError)(f"--workdir={workdir} cannot be written: {error}.")
    if multihost_utils.broadcast_one_to_all(np.bool_(problem is not None)):
        raise problem or UsageError(f"--workdir={workdir} cannot be used, see process 0.")


def _check_kinds(workdir):
    """Raise UsageError if a folder stands where a run has a file, or the other way round."""
    for name, is_folder in {"checkpoints": True, "damaged": True, "config.json": False, "metrics.jsonl": False}.items():
        path = pathlib.Path(workdir) / name
        if path.exists() and path.is_dir() != is_folder:
            kind = "folder" if is_folder else "file"
            raise UsageError(f"--workdir={workdir} cannot be used: {path} must be a {kind}; move it elsewhere.")


def read_config(workdir):
    """Return the configuration that the run in `workdir` was started with."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        import ml_collections

        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UsageError(f"there is no run in {workdir}: {path} is missing.") from error
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is not the configuration of a run ({error}); delete it or use another workdir."
        ) from error


def to_dataclass(cls, config, **extra):
    """Build the dataclass `cls` from a ConfigDict or dict and further fields; lists become tuples."""
    fields = {
        name: tuple(value) if isinstance(value, list) else value for name, value in (dict(config) | extra).items()
    }
    known = {field.name for field in dataclasses.fields(cls)}
    for name in fields.keys() - known:
        raise UsageError(f"{cls.__name__} has no field {name!r}; it has {sorted(known)}.")
    for field in dataclasses.fields(cls):
        if typing.get_origin(field.type) is tuple and field.name in fields:
            _check_elements(field.name, fields[field.name], typing.get_args(field.type))
        value = fields.get(field.name)
        if isinstance(field.type, types.UnionType) and (
            isinstance(value, bool) or not isinstance(value, field.type | int)
        ):
            raise UsageError(f"{field.name}={value!r} must be of type {field.type}.")
    try:
        return cls(**fields)
    except TypeError as error:
        raise UsageError(f"{cls.__name__}: {error}.") from error


def _check_elements(name, values, types):
    """Raise UsageError unless `values` are of the `types` of a tuple's annotation; configurations do not check them."""
    kind, size = types[0], len(types) if types[-1] is not Ellipsis else None
    is_right = all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
    if not is_right or size not in (None, len(values)):
        raise UsageError(f"{name}={values} must consist of {size or 'any number of'} values of type {kind.__name__}.")


def _check_same_run(old, new, workdir):
    old, new = (traverse_util.flatten_dict(json.loads(json.dumps(config)), sep=".") for config in (old, new))
    seeds = "iql_train.num_seeds" if new["method"] == "iql" else f"baselines.{new['method']}.train.num_seeds"
    fields = ("method", seeds, *ESSENTIAL_FIELDS)
    for name in sorted(old.keys() | new.keys()):
        # A field that is newer than the run has its default there.
        is_essential = name not in FREE_FIELDS and f"{name}.".startswith(tuple(f"{each}." for each in fields))
        if name in old and is_essential and old[name] != new.get(name):
            raise UsageError(
                f"{workdir} holds checkpoints made with {name}={old.get(name)!r}, this run has {new.get(name)!r}; "
                "use another --workdir or the same setting."
            )
