"""Tells what commands say of their arguments, without running them: flags, fields of the configuration, and settings.

A process of its own, as importing a command declares flags: `python -m tests.command_lines`, JSON on stdin and stdout.
A line is [command, *arguments]; the command "" stands for any that has all of these flags.
"""

import contextlib
import functools
import importlib
import json
import os
import pathlib
import sys

from absl import flags

from experiments.common import run_flags, settings
from tt_jax import sequence_planner

COMMANDS = sorted(path.stem for path in pathlib.Path("experiments").glob("[a-z]*.py"))


def in_child(function):
    """Return the text that `function` returns in a fork, where it may declare flags."""
    reader, writer = os.pipe()
    if not os.fork():
        with contextlib.suppress(BrokenPipeError), open(writer, "w") as pipe:
            pipe.write(function())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    os.wait()
    return text


@functools.cache
def flag_names(command):
    """Return the names of a command's flags."""

    def tell():
        importlib.import_module(f"experiments.{command}")
        return " ".join(flags.FLAGS)

    return set(in_child(tell).split())


def complaint(command, arguments):
    """Return what is wrong with the arguments, or an empty text; flags that are required may be missing."""

    def parse():
        try:
            program = importlib.import_module(f"experiments.{command}")
            sys.argv = [command, *(each for each in arguments if "=" in each or not each.startswith("--"))]
            named = {each.removeprefix("--").removeprefix("no") for each in arguments if each not in sys.argv}
            if unknown := named - set(flags.FLAGS):
                return f"no flag {unknown}"
            default = getattr(flags.FLAGS["config"], "default_file", None) if "config" in flags.FLAGS else None
            if default and not any(each.startswith("--config=") for each in arguments):
                sys.argv.insert(1, f"--config={default}")
            try:
                rest = flags.FLAGS(sys.argv)[1:]
            except flags.IllegalFlagValueError as error:
                if "other than None" not in str(error):
                    raise
                rest = []
            if rest:
                return f"unexpected argument {rest[0]}"
            if "config" in flags.FLAGS:
                settings.checked(flags.FLAGS.config)
            if hasattr(program, "PLAN"):
                sequence_planner.PlanConfig(**run_flags.given(program.PLAN))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return in_child(parse)


def complaint_of_any(arguments):
    """Return an empty text if any command takes these arguments, or what the last one that has the flags says."""
    names = [argument.removeprefix("--").split("=")[0] for argument in arguments]
    wanted = {"config" if name.startswith("config.") else name for name in names}
    found = f"no command has all of {sorted(wanted)}"
    for command in COMMANDS:
        if wanted <= flag_names(command) and not (found := complaint(command, arguments)):
            break
    return found


if __name__ == "__main__":
    for path in pathlib.Path("experiments/common").glob("[a-z]*.py"):
        importlib.import_module(f"experiments.common.{path.stem}")  # once for all commands
    lines = json.load(sys.stdin)
    json.dump([complaint(each, rest) if each else complaint_of_any(rest) for each, *rest in lines], sys.stdout)
