"""Leases: the small files that say who is at work in a folder, so that others can tell a slow process from a dead one.

An attempt writes and renews its lease; ``collect`` and other attempts read it.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

LEASE_SECONDS = 24 * 3600.0
"""A lease that was not renewed for so long is dead wherever its process is."""


class Lease(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who is at work: the process by host, boot, process namespace, id and start, so that another process can tell whether it lives."""

    id: str
    action: str
    host: str
    boot: str | None
    namespace: str | None
    pid: int
    started: int | None
    heartbeat: float
    files: tuple[str, ...] = ()


# Made now, in one thread: msgspec crashes where several come at once to a type that was never decoded.
_decode = msgspec.json.Decoder(Lease).decode
_abandoned: set[Lease] = set()
"""Leases of attempts of this process that are over, and may not have been able to remove them."""


def abandon(data: bytes) -> None:
    """Count this lease of this process as dead from now on, though the process lives."""
    lease = decode_lease(data)
    if lease is not None:
        _abandoned.add(lease)


def _first_line(path: str) -> str | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return None


def boot_id() -> str | None:
    """What tells this boot of this machine from every other, or None where the system does not say."""
    return _first_line("/proc/sys/kernel/random/boot_id")


def process_namespace() -> str | None:
    """What tells the process ids of one container from those of another."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None if there is no such process, or only what is left of a dead one."""
    line = _first_line(f"/proc/{pid}/stat")
    # The command's name is in parentheses and may hold anything; then come the process's state and 18 fields later its start.
    fields = line.rpartition(")")[2].split() if line else []
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZX" else None  # noqa: PLR2004 - see above


def is_dead(lease: Lease, modified_at: float, now: float) -> bool:
    """Whether nobody is at work under this lease any more.

    A process of this boot and namespace is looked for, however old the lease is; any other counts as dead when the lease was not
    renewed for ``LEASE_SECONDS`` by the storage's clock. What this process has abandoned is dead.
    """
    if lease in _abandoned:
        return True
    boot = boot_id()
    if boot is not None and (lease.boot, lease.namespace) == (boot, process_namespace()):
        return lease.started is None or start_time(lease.pid) != lease.started
    return now - modified_at > LEASE_SECONDS


def encode_lease(snapshot_id: str, action: str, files: Iterable[str]) -> bytes:
    """A lease of this process, as of now."""
    pid = os.getpid()
    return msgspec.json.encode(
        Lease(snapshot_id, action, socket.gethostname(), boot_id(), process_namespace(), pid, start_time(pid), time.time(), tuple(files))
    )


def decode_lease(data: bytes) -> Lease | None:
    """The lease in these bytes, or None if they hold none."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
