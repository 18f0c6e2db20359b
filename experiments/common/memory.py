"""Whether a program fits the memory of its device: an estimate before it runs, and one line if it does not."""

import contextlib
import functools
import os
import pathlib
import resource
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_GIB = 2**30


class TooLarge(Exception):
    """A program that wants more memory than there is; `share` is how much of it there is."""

    def __init__(self, needed: int, free: int):
        super().__init__(f"it needs {needed / _GIB:.3g} GiB, {free / _GIB:.3g} GiB are free on a device")
        self.share = free / needed


@contextlib.contextmanager
def explained(what: str, settings: str) -> Iterator[None]:
    """Turn whatever fails for memory inside into a ValueError: `what` does not fit, and which `settings` to change."""
    try:
        yield
    except (TooLarge, MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise ValueError(f"{what} does not fit the memory ({reason}); {settings}.") from error


def check(fn: Callable[..., Any], *arguments: Any) -> int:
    """Compile `fn`, of `jax.jit` or `data_parallel.over_devices`, and return the bytes it needs beside `arguments`.

    Raises TooLarge if that is more than is free on a device. A call with arguments of the same shapes compiles nothing
    again. On a backend that does not say what it needs this is 0. Several processes decide alike.
    """
    settings = {}
    if isinstance(fn, functools.partial):
        fn, settings = fn.func, fn.keywords
    found = fn.lower(*arguments, **settings).compile().memory_analysis()
    if found is None:
        return 0
    needed = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    free = free_bytes()
    if jax.process_count() > 1:  # in MiB, as arrays of int64 become int32
        free = int(multihost_utils.process_allgather(np.int32(free // 2**20)).min()) * 2**20
    if needed > free:
        raise TooLarge(needed, free)
    return needed


def guarded(fn: Callable[..., Any], what: str, settings: str) -> Callable[..., Any]:
    """Return `fn`, of `jax.jit`, with a `check` before its first call, the largest, and its failures `explained`."""
    is_checked = False

    def call(*arguments):
        nonlocal is_checked
        with explained(what, settings):
            if not is_checked:
                check(fn, *arguments)
                is_checked = True
            return fn(*arguments)

    return call


def free_bytes() -> int:
    """Return the bytes that each local device can still allocate; those of CPU share what this process can."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    virtual, resident = _own_bytes()
    limits = [_machine_bytes()]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space - virtual)
    group = _first_line("/sys/fs/cgroup/memory.max")  # of a container
    if group.isdigit():
        limits.append(int(group) - resident)
    return max(min(limits), 0) // len(devices)


def _machine_bytes():
    """Return what the machine can still give, or, where it does not say, all of its memory."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _own_bytes():
    """Return the address space and the resident set of this process; 0 where the system does not say."""
    pages = [int(pages) for pages in _first_line("/proc/self/statm").split()[:2]] or [0, 0]
    return [count * os.sysconf("SC_PAGE_SIZE") for count in pages]


def _first_line(path):
    try:
        return pathlib.Path(path).read_text().partition("\n")[0]
    except OSError:
        return ""
