"""Takes of this process that are not committed yet, so that refs find them: entered when they go to the background, gone when they end.

A forked child has none: the threads that write them are the parent's.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from expstate.catalog.model import Record, host_of
from expstate.catalog.provenance import redact
from expstate.state.values import decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from expstate.catalog.place import CatalogPlace
    from expstate.format.manifest import Metadata


class Pending(Protocol):
    """What is asked of a ``PendingSnapshot``."""

    id: str
    path: str

    @property
    def total_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Running:
    """A take that goes on.

    Attributes
    ----------
    pending : PendingSnapshot
        To wait for.
    place : CatalogPlace
        The catalog that it will be recorded in.
    """

    pending: Pending
    place: CatalogPlace
    _record: Record
    _project: Callable[[], str]

    @property
    def record(self) -> Record:
        """What is known of it."""
        return dataclasses.replace(self._record, project=self._project(), nbytes=self.pending.total_bytes)


_lock = threading.Lock()
_running: dict[str, Running] = {}


def enter(pending: Pending, metadata: Metadata, place: CatalogPlace, project: Callable[[], str]) -> None:
    """A take goes on in the background, which this catalog will record under the project that ``project`` gives."""
    record = Record(
        id=pending.id,
        name=metadata.name,
        project="",
        user=None,
        host=host_of(pending.path) or None,
        url=redact.url(pending.path),
        locations=(),
        step=metadata.step,
        created_at=dt.datetime.now(dt.timezone.utc),
        duration_seconds=None,
        nbytes=0,
        nbytes_written=0,
        world_size=1,
        tags=tuple(sorted(metadata.tags)),
        aliases=(),
        pinned=False,
        note=metadata.note,
        params={name: decode(value) for name, value in metadata.params.items()},
        metrics={name: decode(value) for name, value in metadata.metrics.items()},
        keys=(),
        parent=None,
        digest="",
        provenance={},
        status="pending",
    )
    with _lock:
        _running[pending.id] = Running(pending, place, record, project)


def leave(snapshot_id: str) -> None:
    """A take has ended, whatever its end; nothing happens if it was not entered."""
    with _lock:
        _running.pop(snapshot_id, None)


def takes(place: CatalogPlace) -> list[Running]:
    """Those that will be recorded in this catalog, the last begun first."""
    with _lock:
        return [running for running in reversed(_running.values()) if running.place == place]


def pending_of(snapshot_id: str) -> Pending | None:
    """The take that will be this snapshot; None if it has ended."""
    with _lock:
        running = _running.get(snapshot_id)
    return None if running is None else running.pending


def _forget() -> None:
    global _lock  # noqa: PLW0603 - the parent's may be held by a thread that the child does not have
    _lock = threading.Lock()
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
