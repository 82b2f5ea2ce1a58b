"""Whether a catalog has changed, by this process or another: a look that costs next to nothing, in a thread that ends with its owner.

Gets a catalog and a function; calls it after each change that it sees.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from expstate.errors import CatalogError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from expstate.catalog.catalog import Catalog

EVERY_SECONDS = 2.0


class Watcher:
    """Looks now and then, as long as somebody watches.

    Parameters
    ----------
    catalog : Catalog
        What is looked at.
    changed : callable
        Called from the watcher's thread.
    """

    def __init__(self, catalog: Catalog, changed: Callable[[], None]) -> None:
        self._catalog = catalog
        self._changed = changed
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if it has not begun."""
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._run, name="expstate-browser-changes", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._ended.set()

    def _run(self) -> None:
        before = self._look()
        while not self._ended.wait(EVERY_SECONDS):
            now = self._look()
            if now != before:
                before = now
                self._changed()

    def _look(self) -> Any:
        path = self._catalog.place.path
        if path is not None:
            return tuple(_form_of(path.with_name(path.name + ending)) for ending in ("", "-wal"))
        with contextlib.suppress(CatalogError):
            return _newest(self._catalog)
        return None


def _form_of(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    return None


def _newest(catalog: Catalog) -> tuple[int, ...]:
    """Of a server: the newest record, and how many there are."""
    import sqlalchemy as sa  # noqa: PLC0415 - a file is looked at without it

    from expstate.catalog import schema  # noqa: PLC0415 - as above

    with catalog.database.reading() as connection:
        return tuple(connection.execute(sa.select(sa.func.max(schema.records.c.seq), sa.func.count(schema.records.c.seq))).one())
