"""Signals: a run that is told to stop saves its state and leaves."""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.common import entry

ANSWER_SECONDS = 3.0  # after a signal, for what may hang
SAME_SIGNAL_SECONDS = 0.5  # two signals in this time are one


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
        for number in entry.STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # Python writes to the pipe before it calls this
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _watch(self, reader):
        noticed_at = math.inf
        while True:
            if select.select([reader], [], [], 0.1 if self._noticed else None)[0]:
                if os.read(reader, 1)[0] not in entry.STOP_SIGNALS:
                    continue
                if time.monotonic() > noticed_at + SAME_SIGNAL_SECONDS:  # a launcher may pass on what all were sent
                    _leave("told to stop twice; what was saved before stays.", entry.INTERRUPTED)
                noticed_at, self._noticed = min(noticed_at, time.monotonic()), True
            elif self._doing and time.monotonic() > max(noticed_at, self._since) + ANSWER_SECONDS:
                what = f"stopped in {self._doing!r}, which did not answer; the same command does it again."
                _leave(what, entry.INTERRUPTED)

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
            raise entry.Interrupted(f"stopped in {doing!r}, which the same command does again.")


def _leave(message, code):
    """End the process, whatever its threads do."""
    entry.report(message, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
