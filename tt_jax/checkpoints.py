"""Save and restore training runs with orbax: parameters, tokenizer, configuration, optimizer state and step.

    workdir/checkpoints/STEP/arrays      every array, in its own dtype, under "params", "tokenizer" and "state"
    workdir/checkpoints/STEP/settings    JSON: the static configuration, the run's settings, a checksum per array

A step's folder is renamed into place when all of it is written, so that a save that is cut short leaves nothing behind
that could be taken for a checkpoint. Orbax does not notice flipped bytes; the checksums do.
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import re
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `restore` returns; every array is a numpy array."""

    step: int
    params: Any  # nested dicts of arrays
    config: Any  # the static settings that were saved, e.g. a TransformerConfig
    tokenizer: Any  # a Discretizer, or None
    state: Any  # nested dicts of arrays, or the structure of `state_template`; None if none was saved
    run: Any  # JSON values: how the run was made


class DamagedError(ValueError):
    """Raised for a checkpoint that is there and cannot be read as it was written."""


class Writer:
    """Save the checkpoints of one run in the background and keep the newest `keep` of them.

    With several processes, each of them makes the same calls and process 0 writes. Use as a context manager, or call
    `close` at the end: only then the last checkpoint is known to be complete.
    """

    def __init__(self, workdir, *, keep=3):
        self._directory = _directory(workdir)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        with _write_errors(self._directory):
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def save(self, step, *, params, config, tokenizer, state=None, run=None):
        """Start saving a checkpoint; the arrays are copied first, so the caller may donate or change them.

        `params` are nested dicts with string keys, `config` a frozen dataclass of this package, `tokenizer` an array
        record or None, `state` any pytree of arrays or None, `run` anything that JSON can hold. Steps increase; the
        newest step is not written again. Raises OSError if this save or the one before it failed.
        """
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            if step == newest:
                return
            raise ValueError(f"{self._directory} already holds step {newest}, later than {step}; use a new workdir.")
        tree = {"params": params, "tokenizer": {} if tokenizer is None else _fields(tokenizer)}
        arrays = _named_leaves(tree | ({} if state is None else {"state": state}))
        settings = {
            "config": _encode(config),
            "tokenizer": None if tokenizer is None else _class_name(type(tokenizer)),
            "has_state": state is not None,
            "run": run,
        }
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(traverse_util.unflatten_dict(arrays, sep="/")),
            settings=ocp.args.JsonSave(settings | {"checksums": _checksums(arrays, settings)}),
        )
        with _write_errors(self._directory):
            self._manager.save(step, args=items, force=True)

    def check(self):
        """Raise OSError if a save that ended in the background has failed."""
        with _write_errors(self._directory):
            self._manager.check_for_errors()

    def wait(self):
        """Wait until every checkpoint is complete on disk; raises OSError if one could not be written."""
        with _write_errors(self._directory):
            self._manager.wait_until_finished()

    def close(self):
        """Wait as `wait` does, then free the background threads."""
        with _write_errors(self._directory):
            self._manager.close()


def save(workdir, *, step, params, config, tokenizer, state=None, run=None, keep=3):
    """Save one checkpoint and wait until it is complete; arguments and errors are those of `Writer.save`."""
    newest = latest_step(workdir)
    if newest is not None and step <= newest:
        raise ValueError(f"{_directory(workdir)} already holds step {newest}; save a later one or use a new workdir.")
    with Writer(workdir, keep=keep) as writer:
        writer.save(step, params=params, config=config, tokenizer=tokenizer, state=state, run=run)


def restore(workdir, step=None, *, state_template=None) -> Checkpoint:
    """Read the checkpoint of `step` (None: the newest) and verify every array.

    `state_template` is a pytree of arrays or shapes in whose structure the state is returned, such as a fresh optimizer
    state; its names, shapes and dtypes must be those of the saved state. Raises ValueError if there is no such
    checkpoint or if the template does not fit, and DamagedError, which is one, if the checkpoint is damaged.
    """
    directory = _directory(workdir)
    saved = steps(workdir)
    if not saved:
        raise ValueError(f"no checkpoint in {directory}; train with this workdir first.")
    if step is not None and step not in saved:
        raise ValueError(f"no checkpoint of step {step} in {directory}; it holds the steps {saved}.")
    step = saved[-1] if step is None else step
    items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), settings=ocp.args.JsonRestore())
    options = ocp.CheckpointManagerOptions(create=False)
    try:
        with ocp.CheckpointManager(directory, options=options) as manager:
            restored = manager.restore(step, args=items)
        arrays = traverse_util.flatten_dict(restored.arrays, sep="/")
        expected = restored.settings.pop("checksums")
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise DamagedError(_damaged(directory / str(step), _one_line(error))) from error
    settings = restored.settings
    found = _checksums(arrays, settings)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise DamagedError(_damaged(directory / str(step), f"the checksum of {name!r} is wrong"))
    arrays = _rename_networks(arrays)

    tokenizer = None
    if settings["tokenizer"]:
        tokenizer = _find_class(settings["tokenizer"])(**_subtree(arrays, "tokenizer"))
    state = None
    if settings["has_state"]:
        state = _subtree(arrays, "state")
        if state_template is not None:
            state = _fill(state_template, arrays, prefix="state", source=directory / str(step))
    return Checkpoint(
        step=step,
        params=_subtree(arrays, "params"),
        config=_decode(settings["config"]),
        tokenizer=tokenizer,
        state=state,
        run=settings["run"],
    )


def restore_newest(workdir, *, state_template=None) -> tuple[Checkpoint, dict[int, DamagedError]]:
    """Read the newest checkpoint that is not damaged; also return what is wrong with later ones, by step.

    Errors are those of `restore`, DamagedError if none can be read.
    """
    damaged = {}
    for step in reversed(steps(workdir)):
        try:
            return restore(workdir, step, state_template=state_template), damaged
        except DamagedError as error:
            damaged[step] = error
    if damaged:
        raise DamagedError(f"no checkpoint in {_directory(workdir)} can be read: {damaged[max(damaged)]}")
    return restore(workdir), damaged  # raises what is missing


def set_aside(workdir, step) -> pathlib.Path:
    """Move a damaged checkpoint out of the way, to `workdir`/damaged, and return where it is."""
    folder = pathlib.Path(workdir).absolute() / "damaged"
    folder.mkdir(exist_ok=True)
    target = folder / str(step)
    while target.exists():  # this step was damaged before
        target = target.with_name(f"{target.name}_")
    return (_directory(workdir) / str(step)).rename(target)


def latest_step(workdir) -> int | None:
    """Return the newest complete checkpoint's step, or None if there is none."""
    return max(steps(workdir), default=None)


def steps(workdir) -> list[int]:
    """List the steps of the complete checkpoints, ascending."""
    name_format = ocp.path.step.standard_name_format()
    return sorted(metadata.step for metadata in name_format.find_all(_directory(workdir)))


def _directory(workdir):
    return pathlib.Path(workdir).absolute() / "checkpoints"


@contextlib.contextmanager
def _write_errors(directory):
    """Turn whatever a failed write raises, at once or later from the background, into one OSError with the path."""
    try:
        yield
    except Exception as error:
        reason = f"cannot write a checkpoint to {directory}; earlier ones are left as they are ({_one_line(error)})"
        raise OSError(reason) from error


def _one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _damaged(path, reason):
    return f"checkpoint {path} is damaged: {reason}; training goes on from the one before."


# Arrays


def _named_leaves(tree):
    """Copy the leaves of a pytree to numpy, each under its path such as "state/adam/mu/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path_name(path): np.array(leaf, copy=True) for path, leaf in leaves}


def _path_name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rename_networks(arrays):
    """Give the networks of checkpoints of version 0.1, and their optimizers' moments, today's names."""
    renamed = {}
    for name, array in arrays.items():
        name = re.sub("/((token|position|goal)_embedding)$", r"/\1/embedding", name)
        name = re.sub("/head$", "/head/kernel", name)
        name = re.sub(r"/dense_(\d+)/", r"/mlp/Dense_\1/" if "/actor/" in name else r"/Dense_\1/", name)
        before, stacked, after = name.partition("/blocks/")
        parts = {f"{before}/blocks_{i}/{after}": part for i, part in enumerate(array)} if stacked else {name: array}
        renamed |= parts
    if "params/units/reward_scale" in renamed and "params/units/action_scale" not in renamed:  # actions were within +-1
        renamed["params/units/action_center"] = np.zeros_like(renamed["params/actor/log_std"])
        renamed["params/units/action_scale"] = np.ones_like(renamed["params/actor/log_std"])
    return renamed


def _subtree(arrays, name):
    """Return the nested dict of the arrays whose names begin with `name`."""
    prefix = f"{name}/"
    inside = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    return traverse_util.unflatten_dict(inside, sep="/")


def _fill(template, arrays, *, prefix, source):
    """Put the arrays below `prefix` into the structure of `template`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    wanted = {f"{prefix}/{_path_name(path)}": leaf for path, leaf in paths}
    present = {name for name in arrays if name.startswith(f"{prefix}/")}
    for name in sorted(wanted.keys() ^ present):
        where = "is missing there" if name in wanted else "is not expected here"
        raise ValueError(f"the state in {source} has another structure than this run's: {name!r} {where}.")
    for name, leaf in wanted.items():
        expected, got = (np.shape(leaf), np.dtype(leaf.dtype)), (arrays[name].shape, arrays[name].dtype)
        if expected != got:
            raise ValueError(f"{name!r} in {source} has shape and dtype {got}, this run needs {expected}.")
    return structure.unflatten([arrays[name] for name in wanted])


def _checksums(arrays, settings):
    """Return a CRC-32 for each array (dtype and shape included), and one for the settings."""
    checksums = {"settings": zlib.crc32(json.dumps(settings, sort_keys=True).encode())}
    for name, array in arrays.items():
        header = f"{array.dtype} {array.shape}".encode()
        checksums[name] = zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(header))
    return checksums


# Records of this package, as JSON


def _fields(record):
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _class_name(cls):
    return f"{cls.__module__}:{cls.__qualname__}"


def _find_class(name):
    """Return the dataclass called `name`, which must be one of this package: a file may not name arbitrary code."""
    module, _, qualname = name.partition(":")
    if module.startswith("tt_jax."):
        found = getattr(importlib.import_module(module), qualname, None)
        if dataclasses.is_dataclass(found):
            return found
    raise ValueError(f"the checkpoint names {name!r}, which is no record of this version of tt_jax.")


def _encode(value):
    """Turn a frozen dataclass, nested ones included, into JSON values."""
    if dataclasses.is_dataclass(value):
        _find_class(_class_name(type(value)))
        return {"class": _class_name(type(value)), "fields": {k: _encode(v) for k, v in _fields(value).items()}}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a static setting must be a number, text, a tuple or a dataclass of these, got {value!r}.")


def _decode(value):
    """Invert `_encode`; lists become tuples, so that the settings are hashable."""
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if isinstance(value, dict):
        cls, fields = _find_class(value["class"]), {k: _decode(v) for k, v in value["fields"].items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"the checkpoint is of another version of tt_jax: {error}.") from error
    return value
