"""What becomes of a process when another of the same run is lost.

jax's coordination service ends every process that learns of it at once, from a thread of its own, with SIGABRT and a
dump of some 60 lines; nothing inside the process can answer that. So each process of a distributed run is the child of
one that does nothing but wait: it passes signals and stderr on, and where the child ended like this, says so in one
line and leaves with the code for being started again.
"""

import contextlib
import os
import re
import signal
import threading

LOST = 76  # exit code of a child in which a collective failed because another process is gone

_NOTICE = re.compile(rb"[EFW]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (client\.h|coordination_|preemption_sync)")
_FATAL = b"JAX distributed service detected fatal errors"
_FAILED = re.compile(r"Gloo|NCCL|coordination service|UNAVAILABLE|heartbeat|Socket closed|Connection (reset|closed)")


def is_loss(error: BaseException) -> bool:
    """Whether an error that jax raised, in whatever class, says that another process is gone."""
    return bool(_FAILED.search(str(error)))


def fork(signals) -> tuple[int, bytes] | None:
    """Return None in a new child process, which goes on; in the parent, when the child has ended, (code, last words).

    The code is as a shell has it, 128 + number after a signal, or LOST. The last words are what the child wrote to
    stderr from jax's first notice of a lost process on; everything before was passed on. `signals` are those that the
    parent passes on. A child does not outlive its parent.
    """
    life, stderr = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.dup2(stderr[1], 2)
        for descriptor in (*stderr, life[1]):
            os.close(descriptor)
        threading.Thread(target=_end_with_parent, args=(life[0],), daemon=True).start()
        return None
    os.close(stderr[1])
    for number in signals:
        signal.signal(number, lambda number, _: _send(child, number))
    held = b""
    while part := os.read(stderr[0], 65536):
        held += part
        notice = _NOTICE.search(held)
        # A notice may come in parts: of the last line that is not complete, only a progress bar is passed on at once.
        keep = notice.start() if notice else len(held) if b"\r" in held else held.rfind(b"\n") + 1
        os.write(2, held[:keep])
        held = held[keep:]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT and _FATAL in held:
        code = LOST
    return code if code >= 0 else 128 - code, held


def _send(child, number):
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(child, number)


def _end_with_parent(life):
    os.read(life, 1)  # ends when the parent does
    os.kill(os.getpid(), signal.SIGKILL)
