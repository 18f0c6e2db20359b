"""What every entry point shares: flags and configurations, one-line errors, exit codes and preemption.

    CONFIG = config_flags.DEFINE_config_file("config")

    def main(_):
        config = entry.resolve_config(CONFIG.value, dataset=DATASET.value, workdir=WORKDIR.value)

    if __name__ == "__main__":
        entry.run(main)

Exit codes: 0 done; 2 the caller's mistake, with one line on stderr; 75 interrupted after saving, start again to go on;
1 anything else.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
import typing
from logging import StreamHandler

import jax
import numpy as np
from absl import app, flags, logging
from flax import traverse_util
from jax.experimental import multihost_utils

import tt_jax
from experiments.common import lock, memory, supervision
from tt_jax import checkpoints

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 75

# A checkpoint is of no use when one of these changes, but for the free fields.
ESSENTIAL_FIELDS = ("dataset", "data", "model", "iql", "train.optimizer")
FREE_FIELDS = ("model.remat", "model.attention")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
ANSWER_SECONDS = 3.0  # after a signal, for what may hang
HEARTBEAT_SECONDS = 30  # without a sign of life another process is lost
SAME_SIGNAL_SECONDS = 0.5  # two signals in this time are one

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
        try:
            rest = flags.FLAGS(_with_config(argv))
        except Exception as error:  # a configuration is code: it may raise anything
            if isinstance(error, AttributeError) and str(error)[:1] in ("'", '"'):  # ml_collections quotes the name
                suggestion = re.search(r'Did you mean "\w+"', str(error))
                name, hint = re.search(r"\w+", str(error))[0], f"; {suggestion[0].lower()}?" if suggestion else "."
                raise UsageError(f"the configuration has no field {name!r}{hint}") from error
            message = str(error).strip().splitlines() or [repr(error)]
            if "failure to load" in message[0]:  # the file stands further down
                message = [" ".join(message)]
            raise UsageError(message[-1] if "parsing config file" in message[0] else message[0]) from error
        if rest[1:]:
            raise UsageError(f"unexpected argument {rest[1]!r}; flags are written --name=value.")
        for name, value in flags.FLAGS.flag_values_dict().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"flag --{name}={value}: must be finite.")

    if code := _exit_code(parse):
        sys.exit(code)
    return argv[:1]


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
        return _report(error, INTERRUPTED)
    except Exception as error:
        if _is_distributed() and supervision.is_loss(error):
            return supervision.LOST  # the parent says so
        if not isinstance(error, ValueError | Failed | OSError | FloatingPointError):
            raise
        return _report(error, USAGE if isinstance(error, ValueError) else FAILED)
    except KeyboardInterrupt:
        return _report("interrupted; nothing was saved.", FAILED)
    return DONE


def _report(error, code):
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
            code = _report("another process of this run was lost; start all of them again to go on.", INTERRUPTED)
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
        if _NUM_PROCESSES.value is None or _PROCESS_ID.value is None:
            raise UsageError("--coordinator_address needs --num_processes and --process_id.")
        jax.distributed.initialize(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    elif _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
        raise UsageError("--num_processes and --process_id need --coordinator_address.")
    elif _DISTRIBUTED.value:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
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


def _log_own_information_to_stdout():
    """Show what the entry points say as plain lines, and of the libraries only warnings; --verbosity=1 shows all."""
    if flags.FLAGS.verbosity == logging.INFO:
        own = StreamHandler(sys.stdout)
        own.addFilter(lambda record: record.levelname == "INFO" and _is_own(record.pathname))
        logging.get_absl_logger().addHandler(own)
        logging.get_absl_handler().python_handler.addFilter(_is_for_the_user)


def _is_for_the_user(record):
    """Leave out information, and what orbax logs with its traceback, since it raises it as well."""
    return record.levelname != "INFO" and not (record.levelname == "ERROR" and "orbax" in record.pathname)


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


def resolve_config(config, *, dataset, workdir):
    """Set the dataset, `hold` the workdir, compare with the run that it has, and write `workdir`/config.json.

    Raises UsageError if a flag is missing, or if the workdir has checkpoints made with another dataset, data or model;
    everything else may change when a run is resumed.
    """
    for flag, value in (("config", config), ("workdir", workdir)):
        if not value:
            raise UsageError(f"--{flag} is missing.")
    try:
        config.dataset = dataset or config.dataset
    except OSError as error:  # config_flags keeps a file that is not found until it is used
        raise UsageError(str(error)) from error
    if not config.dataset:
        raise UsageError("--dataset is missing: the id of a Minari dataset, such as mujoco/hopper/medium-v0.")
    hold(workdir)
    path = pathlib.Path(workdir) / "config.json"
    if path.exists() and checkpoints.latest_step(workdir) is not None:
        _check_same_run(read_config(workdir), config, workdir)
    if is_main_process():
        write_json(path, config.to_dict())
    import ml_collections  # here, because the benchmark uses this module and must not need ml_collections

    return ml_collections.FrozenConfigDict(config)


def hold(workdir):
    """Reserve a workdir for this run until its end; raises UsageError, in every process, if another run writes it."""
    problem = None
    if is_main_process():
        try:
            lock.hold(workdir)
        except lock.Held as error:
            problem = UsageError(str(error))
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            problem = (OSError if is_full else UsageError)(f"--workdir={workdir} cannot be written: {error}.")
    if multihost_utils.broadcast_one_to_all(np.bool_(problem is not None)):
        raise problem or UsageError(f"--workdir={workdir} cannot be used, see process 0.")


def read_config(workdir):
    """Return the configuration that the run in `workdir` was started with."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        import ml_collections

        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UsageError(f"there is no run in {workdir}: {path} is missing.") from error
    except (json.JSONDecodeError, TypeError) as error:
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
    plain = (json.loads(json.dumps(config.to_dict())) for config in (old, new))
    old, new = (traverse_util.flatten_dict(config, sep=".") for config in plain)
    for name in sorted(old.keys() | new.keys()):
        # A field that is newer than the run has its default there.
        is_essential = name not in FREE_FIELDS and f"{name}.".startswith(tuple(f"{each}." for each in ESSENTIAL_FIELDS))
        if name in old and is_essential and old[name] != new.get(name):
            raise UsageError(
                f"{workdir} holds checkpoints made with {name}={old.get(name)!r}, this run has {new.get(name)!r}; "
                "use another --workdir or the same setting."
            )


def make_folder(folder, *, flag):
    """Make a folder for the value of a `flag`; raises UsageError if no files can be written there."""
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise UsageError(f"--{flag}={folder} cannot be written: {error}.") from error


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


# Running


class Preemption:
    """Notices SIGTERM and Ctrl-C, so that a run can save its state and leave; create it first thing in main.

    A thread is told at once, whatever the main thread waits for. It ends the process when the signal comes a second
    time, and where nothing answers the first within `ANSWER_SECONDS` while nothing would be saved anyway, see `doing`.
    """

    def __init__(self):
        self._noticed = False
        self._doing, self._since = "the preparation", time.monotonic()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # Python writes to the pipe before it calls this
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _watch(self, reader):
        noticed_at = math.inf
        while True:
            if select.select([reader], [], [], 0.1 if self._noticed else None)[0]:
                if os.read(reader, 1)[0] not in STOP_SIGNALS:
                    continue
                if time.monotonic() > noticed_at + SAME_SIGNAL_SECONDS:  # a launcher may pass on what all were sent
                    _leave("told to stop twice; what was saved before stays.", INTERRUPTED)
                noticed_at, self._noticed = min(noticed_at, time.monotonic()), True
            elif self._doing and time.monotonic() > max(noticed_at, self._since) + ANSWER_SECONDS:
                what = f"stopped in {self._doing!r}, which did not answer; the same command does it again."
                _leave(what, INTERRUPTED)

    @contextlib.contextmanager
    def doing(self, what: str | None):
        """Say what is done, None for what answers a signal by itself; anything else may be ended in the middle."""
        before, self._doing, self._since = self._doing, what, time.monotonic()
        try:
            yield
        finally:
            self._doing, self._since = before, time.monotonic()

    def requested(self) -> bool:
        """Whether any process was told to stop; with several, all of them must ask equally often."""
        if jax.process_count() == 1:
            return self._noticed
        return bool(multihost_utils.process_allgather(np.int32(self._noticed)).any())

    def check(self, doing: str) -> None:
        """Raise Interrupted if this process was told to stop while `doing` what saves nothing before its end."""
        if self._noticed:
            raise Interrupted(f"stopped in {doing!r}, which the same command does again.")


def _leave(message, code):
    """End the process, whatever its threads do."""
    _report(message, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
