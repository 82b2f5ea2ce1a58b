"""Whether another rank still lives and goes on: what its heartbeats say, and what this machine says of its process."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from expstate.engine.lease import boot_id, process_namespace, start_time


class Watched:
    """What was heard of a rank, and when.

    Parameters
    ----------
    timeout : float
        Seconds that it may stand still.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._beat = self._step = ""
        self._heard = self._stepped = time.monotonic()

    def silence(self, beat: str) -> float:
        """For how many seconds nothing new was heard."""
        now = time.monotonic()
        if beat != self._beat:
            self._beat, self._heard = beat, now
        return now - self._heard

    def is_hung(self, beat: str) -> bool:
        """Whether it has not gone on for too long, and does not wait for others."""
        now = time.monotonic()
        _, _, step = beat.partition(" ")
        if step != self._step or step.endswith(" 1"):
            self._step, self._stepped = step, now
        return now - self._stepped > self._timeout


def this_process() -> dict[str, Any]:
    """Who this process is, in a form that others can be told."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": boot_id(), "namespace": process_namespace(), "pid": pid, "started": start_time(pid)}


def is_of_here(process: dict[str, Any]) -> bool:
    """Whether a process is one of this machine, so that its end would be seen."""
    mine = this_process()
    is_known = process["started"] is not None and process["boot"] is not None
    return is_known and all(process[name] == mine[name] for name in ("boot", "namespace"))


def has_ended_here(process: dict[str, Any]) -> bool:
    """Whether a process was one of this machine, and is no more; one that lives is only slow to say so."""
    return is_of_here(process) and start_time(process["pid"]) != process["started"]
