"""One process at a time writes a workdir.

The lock is a file, `workdir`/lock, that names host and process of the holder. It is no flock: over NFS that depends on
the server, the mount and the version, and where it is not passed on it succeeds everywhere. What is used instead works
on every file system: a file is made complete under another name and linked to its own, which fails if it is there.

A holder that ended without removing its lock is recognised, and the lock taken over:
    on the same host (and boot, and container) by its process id, which is gone or started at another time;
    elsewhere by its heartbeat: the holder sets the file's time every 10 s. A lock that is older than 60 s by the file
    system's own clock, which is the same for all hosts, is that of a dead process; a younger one is watched until it
    moves or is that old.
"""

import atexit
import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time

from absl import logging

HEARTBEAT_SECONDS, DEAD_SECONDS = 10.0, 60.0


class Held(Exception):
    """Raised when another process, named in the message, writes the workdir."""


def hold(workdir: str | pathlib.Path) -> None:
    """Reserve `workdir`, which is made, for this process until it ends; a second call does nothing.

    Raises Held if another process has it, and OSError if nothing can be written there.
    """
    path = pathlib.Path(workdir) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {"host": platform.node(), "pid": os.getpid(), "started": _start_time(os.getpid()), "place": _place()}
    text = json.dumps(own)
    if _read(path) == text:
        return
    new = path.with_name(f"lock.{own['host']}.{own['pid']}")
    while True:
        try:
            new.write_text(text)
            _link(new, path)
            break
        except FileExistsError:
            found = _read(path)
            if found is not None:
                _check_dead(path, found, new, own)
                _remove(path, found, new)
        finally:
            new.unlink(missing_ok=True)
    atexit.register(_release, path, text)
    threading.Thread(target=_beat, args=(path, text), daemon=True).start()


def _link(new, path):
    """Give a file a second name; raises FileExistsError if that is taken."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, of a bucket for one: the text comes a moment after the name
        with path.open("x") as file:
            file.write(new.read_text())


def _check_dead(path, text, clock, own):
    """Raise Held unless the holder that the lock's `text` names is dead; `clock` is a file that was just written."""
    try:
        holder = json.loads(text)
        host, pid, started, place = (holder[name] for name in ("host", "pid", "started", "place"))
    except (ValueError, KeyError, TypeError):
        logging.warning("%s is no lock of a run and removed.", path)
        return
    held = Held(f"{path.parent} is written by process {pid} on {host}; wait for its end or use another --workdir.")
    if place == own["place"]:
        if started is not None and _start_time(pid) == started:
            raise held
    else:
        first = _time(path)
        logging.info("%s was written by process %d on %s; is it alive?", path.parent, pid, host)
        while _time(clock) - first < DEAD_SECONDS:
            time.sleep(HEARTBEAT_SECONDS / 10)
            clock.touch()
            if _time(path) != first:
                raise held
    logging.info("%s was written by process %d on %s, which has ended.", path.parent, pid, host)


def _remove(path, text, new):
    """Remove the lock if it still says `text`; one that another process made meanwhile is put back."""
    aside = new.with_suffix(".dead")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if aside.read_text() != text:
            with contextlib.suppress(FileExistsError):
                _link(aside, path)
        aside.unlink()


def _release(path, text):
    if _read(path) == text:
        path.unlink(missing_ok=True)


def _beat(path, text):
    """Show that the holder is alive; end it where another process took it for dead, as after a long standstill."""
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        with contextlib.suppress(OSError):  # a file server that is away for a while
            found = _read(path)
            if found == text:
                os.utime(path)
            elif found is not None:
                print(f"{path.parent} was taken over by another process; this one ends.", file=sys.stderr, flush=True)
                os._exit(1)


def _read(path):
    """Return the text of a lock, None if there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _time(path):
    """Return when a file was written, infinitely long ago if it is gone; opened, so that NFS asks its server."""
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return float("-inf")


def _place():
    """Name what process ids belong to: the host and, on Linux, its boot and the container."""
    place = [platform.node()]
    with contextlib.suppress(OSError):
        place += [pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(place)


def _start_time(pid):
    """Return when a process was started, in whatever unit; None if it has ended."""
    if os.path.exists("/proc/self/stat"):
        try:
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
