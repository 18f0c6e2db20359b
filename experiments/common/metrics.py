"""Metrics of a run: lines of JSON, which must be written, and TensorBoard's files, which may fail."""

import contextlib
import json
import math
import os
import pathlib
import platform
import time

from absl import logging

from experiments.common import entry, files

try:
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2
except ImportError:
    record_writer = None


class MetricsWriter:
    """Writes metrics to `workdir`/metrics.jsonl, one object per step, and to TensorBoard where tensorboardX is there.

    Lines beyond `resume_step`, of a run that went on after its last checkpoint, are dropped: they will be made again.
    TensorBoard's files are written by the caller's thread: tensorboardX's own thread ends when the disk is full, and
    whoever then waits for it waits for ever.
    """

    def __init__(self, workdir, *, resume_step=0):
        self._events = None
        if not entry.is_main_process():
            return
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            files.replace_text(self._path, "".join(line for line in lines if _step_of(line) <= resume_step))
        if record_writer:
            folder = self._path.with_name("tensorboard")
            with self._may_fail():
                folder.mkdir(parents=True, exist_ok=True)
                name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
                self._events = record_writer.RecordWriter(str(folder / name))
                self._write_event(0, file_version="brain.Event:2")
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides what is beyond the step
                self._write_event(resume_step + 1, session_log=start)

    def write(self, step, metrics):
        """Add a step's metrics.

        Raises FloatingPointError in every process if one is not finite, and OSError if the line cannot be written; the
        file then ends with the line before.
        """
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}.")
        if not entry.is_main_process():
            return
        _append(self._path, json.dumps({"step": int(step)} | metrics) + "\n")
        if self._events:
            with self._may_fail():
                for name, value in metrics.items():
                    self._write_event(int(step), summary=summary.scalar(name, value))
                self._events.flush()

    def close(self):
        """Write out what TensorBoard still holds."""
        if self._events:
            with self._may_fail():
                self._events.close()

    def _write_event(self, step, **what):
        event = event_pb2.Event(step=step, wall_time=time.time(), **what)
        self._events.write(event.SerializeToString())

    @contextlib.contextmanager
    def _may_fail(self):
        """Say once that TensorBoard's files cannot be written, and go on without them."""
        try:
            yield
        except OSError as error:
            logging.warning("TensorBoard's files cannot be written, the run goes on without them: %s", error)
            events, self._events = self._events, None
            with contextlib.suppress(OSError):  # what it still holds
                if events:
                    events.close()


def _append(path, line):
    """Add a line, or leave the file as it was."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data = line.encode()
        try:
            while data:  # where the disk has room for a part, the next write raises what is the matter
                data = data[file.write(data) :]
        except OSError as error:
            file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from error


def _step_of(line):
    """Return a line's step, or infinity for one that was not written to its end."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
