"""One process at a time writes a workdir, and the lock of a dead one is no hindrance."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from entry_points import ROOT

from experiments.common import lock

HOLD = "import sys; from experiments.common import lock; lock.hold(sys.argv[1]); print('held', flush=True); input()"


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path and ends with its input."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def _write(workdir, **changes):
    """Write a lock of a process that is alive, but for the changes."""
    own = {"host": "here", "pid": os.getpid(), "started": lock._start_time(os.getpid()), "place": lock._place()}
    (workdir / "lock").write_text(json.dumps(own | changes))


def _is_ours(workdir):
    return json.loads((workdir / "lock").read_text())["pid"] == os.getpid()


def test_the_second_process_is_refused_and_told_who_is_first(holder, tmp_path):
    with pytest.raises(lock.Held, match=f"is written by process {holder.pid} on {os.uname().nodename}; wait"):
        lock.hold(tmp_path)
    holder.communicate("\n")  # ends, and removes its lock
    assert not list(tmp_path.iterdir())
    lock.hold(tmp_path)
    lock.hold(tmp_path)  # once more is nothing new
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] and _is_ours(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    lock.hold(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] and _is_ours(tmp_path)


def test_a_file_system_without_links_will_do(holder, tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(lock.Held, match=f"process {holder.pid} "):
        lock.hold(tmp_path)
    holder.kill()
    holder.wait()
    lock.hold(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] and _is_ours(tmp_path)


@pytest.mark.parametrize("changes", [{"started": "1"}, {"pid": 2**22 + 1}, {"started": None}])
def test_a_process_id_that_is_used_again_is_not_the_holder(tmp_path, changes):
    _write(tmp_path, **changes)
    lock.hold(tmp_path)


def test_a_file_that_is_no_lock_is_replaced(tmp_path):
    (tmp_path / "lock").write_text("torn")
    lock.hold(tmp_path)
    assert _is_ours(tmp_path)


@pytest.mark.parametrize("age", [0, 0.3, 1000])
def test_a_process_on_another_host_is_dead_when_its_heartbeat_stops(tmp_path, monkeypatch, age):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1.0)  # looks every 0.1 s
    _write(tmp_path, host="elsewhere", place="elsewhere", pid=1)
    os.utime(tmp_path / "lock", times=(time.time() - age,) * 2)
    started = time.monotonic()
    lock.hold(tmp_path)
    assert time.monotonic() - started > 0.4 - age
    assert _is_ours(tmp_path)


def test_a_process_on_another_host_is_alive_while_its_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 30.0)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1.0)
    _write(tmp_path, host="elsewhere", place="elsewhere", pid=7)
    beat = threading.Timer(0.3, os.utime, [tmp_path / "lock"])
    beat.start()
    with pytest.raises(lock.Held, match="is written by process 7 on elsewhere"):
        lock.hold(tmp_path)
    beat.join()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
