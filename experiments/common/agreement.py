"""Whether all processes are about to do the same: each reads data and settings for itself."""

import platform
import zlib
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.common import entry


def check(parts: dict[str, Any]) -> None:
    """Raise UsageError in every process unless each part, arrays or text, is the same in all; names who differs."""
    if jax.process_count() == 1:
        return
    own = np.array([_checksum(part) for part in parts.values()], np.uint32)
    host = np.frombuffer(platform.node().encode()[:64].ljust(64), np.uint8)
    found, hosts = multihost_utils.process_allgather((own, host))
    if problem := describe(list(parts), found, [bytes(row).decode(errors="replace").strip() for row in hosts]):
        raise entry.UsageError(problem)


def describe(names: list[str], checksums: np.ndarray, hosts: list[str]) -> str | None:
    """Say which processes differ from most in what; `checksums` is [processes, names]. None if all are equal."""
    counts = Counter(map(tuple, checksums.tolist()))
    usual = max(counts, key=counts.get)  # of equally many the first
    differing = []
    for i, row in enumerate(checksums.tolist()):
        wrong = [name for name, own, other in zip(names, row, usual, strict=True) if own != other]
        if wrong:
            differing.append(f"process {i} on {hosts[i]} has another {' and another '.join(wrong)}")
    return f"{'; '.join(differing)} than the rest; all must read the same files and flags." if differing else None


def _checksum(part):
    checksum = 0
    for leaf in [part.encode()] if isinstance(part, str) else jax.tree.leaves(part):
        array = np.frombuffer(leaf, np.uint8) if isinstance(leaf, bytes) else np.asarray(leaf)
        checksum = zlib.crc32(f"{array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), checksum)
    return checksum
