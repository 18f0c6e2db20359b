"""Gymnasium environments by id, and those that a dataset or a checkpoint describes, without running a stranger's code.

A stored specification names functions to call. Of those, only environments registered on this machine and classes of
gymnasium, gymnasium-robotics and this package are used unless the caller trusts whoever wrote it.
"""

import contextlib
import dataclasses
import importlib
import io
import json

import gymnasium
from gymnasium.envs import registration

_TRUSTED = ("gymnasium", "gymnasium_robotics", "tt_jax")  # packages
_LOADERS = ("GymV21Environment-v0", "GymV26Environment-v0")  # import whatever their arguments name
_MOVED = {"experiments.action_repeat:ActionRepeat": "tt_jax.rollouts:ActionRepeat"}  # in older datasets


class Unavailable(ValueError):
    """A stored specification that cannot be read or made on this machine."""


class Untrusted(Unavailable):
    """A stored specification that would run code of neither gymnasium nor this machine's registry."""


def make(env: str | registration.EnvSpec, **kwargs) -> gymnasium.Env:
    """Make an environment that the caller names, of gymnasium-robotics too if it is installed.

    `kwargs` are those of `gymnasium.make`. Raises ValueError, with the reason, whatever went wrong.
    """
    problem = _register_robotics()
    try:
        return gymnasium.make(env, **kwargs)
    except Exception as error:  # an environment is code: drivers, missing packages, wrong arguments
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise ValueError(f"Environment {getattr(env, 'id', env)} cannot be made: {reason}{problem}") from error


def make_stored(text: str, *, trust: bool = False, **kwargs) -> gymnasium.Env:
    """Make the environment of a specification that `gymnasium.EnvSpec.to_json` of any version wrote.

    Raises Untrusted, naming what would have run, unless `trust` or `check_trusted` is content; Unavailable if the
    specification cannot be read, or the environment not made.
    """
    spec = read_spec(text)
    if not trust:
        check_trusted(spec)
    try:
        return make(spec, **kwargs)
    except ValueError as error:
        raise Unavailable(str(error)) from error


def read_spec(text: str) -> registration.EnvSpec:
    """Read a specification in JSON; fields that this gymnasium does not know are left out. Imports nothing.

    Raises Unavailable if it is not such a specification.
    """
    try:
        stored = json.loads(text)
        wrappers = [_known_fields(registration.WrapperSpec, each) for each in stored.get("additional_wrappers") or ()]
        for wrapper in wrappers:
            wrapper["entry_point"] = _MOVED.get(wrapper["entry_point"], wrapper["entry_point"])
        spec = registration.EnvSpec(**_known_fields(registration.EnvSpec, stored))
        spec.additional_wrappers = tuple(registration.WrapperSpec(**each) for each in wrappers)
        names = [spec.entry_point or "", *(wrapper.entry_point for wrapper in spec.additional_wrappers)]
        if not all(isinstance(name, str) for name in names) or not isinstance(spec.kwargs, dict):
            raise TypeError("its entry points must be texts and its arguments an object")
    except (ValueError, TypeError, KeyError, AttributeError, gymnasium.error.Error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Unavailable(f"the stored specification of the environment cannot be read ({reason})") from error
    return spec


def check_trusted(spec: registration.EnvSpec) -> None:
    """Raise Untrusted unless all that making `spec` runs is trusted; imports at most modules of trusted packages.

    The environment must be registered here with the same entry point, or a class of gymnasium or gymnasium-robotics;
    every wrapper a class of these or of this package. A missing class of a trusted package is Unavailable.
    """
    _register_robotics()
    here = gymnasium.registry.get(spec.id)
    is_registered = here is not None and spec.id not in _LOADERS and spec.entry_point in (None, here.entry_point)
    if not is_registered and not _is_trusted_class(spec.entry_point, gymnasium.Env):
        what = spec.entry_point or f"{spec.id}, which has no entry point and is not registered on this machine"
        raise Untrusted(f"the stored environment {spec.id} would run {what}, which is not known to be harmless")
    for wrapper in spec.additional_wrappers:
        if not _is_trusted_class(wrapper.entry_point, gymnasium.Wrapper):
            raise Untrusted(
                f"the stored environment {spec.id} would run the wrapper {wrapper.entry_point}, which is not known to "
                "be harmless"
            )


def _is_trusted_class(entry_point, base):
    """Whether `entry_point` is a class of a trusted package, not just any function to be found there."""
    module, _, name = (entry_point or "").partition(":")
    if module.split(".")[0] not in _TRUSTED:
        return False
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of another version, or one that needs a package or a driver
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Unavailable(f"the stored environment needs {entry_point}, which cannot be loaded ({reason})") from error
    return isinstance(found, type) and issubclass(found, base) and found.__module__.split(".")[0] in _TRUSTED


def _known_fields(cls, stored):
    known = {field.name for field in dataclasses.fields(cls) if field.init} - {"additional_wrappers"}
    return {name: value for name, value in stored.items() if name in known}


def _register_robotics():
    """Register gymnasium-robotics; return "" or, in brackets, why it fails here, for the error that may follow."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints news of its hands
            import gymnasium_robotics

            gymnasium.register_envs(gymnasium_robotics)
    except ImportError:
        return ""
    except Exception as error:  # MUJOCO_GL names a renderer that is not there
        return (
            f" (gymnasium-robotics: {type(error).__name__}: {' '.join(str(error).split())[:200]}; is MUJOCO_GL right?)"
        )
    return ""
