"""The removal of takes that a training has made itself, unless somebody has marked them.

A tag, an alias or a pin is a mark, in the snapshot's folder or in the catalog. Only the one place is removed: copies elsewhere stay, and
their record.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING

from expstate.catalog.catalog import Catalog
from expstate.catalog.place import catalog_place
from expstate.engine import annotate, attempt
from expstate.errors import CatalogError, RefNotFoundError, SnapshotPinnedError
from expstate.format import manifest as manifests

if TYPE_CHECKING:
    from collections.abc import Callable

    from expstate.catalog.model import Record
    from expstate.catalog.origin import CatalogOption
    from expstate.format.manifest import Manifest
    from expstate.storage.base import Storage

_log = logging.getLogger("expstate")


class Keeper:
    """Removes takes.

    Parameters
    ----------
    catalog : Catalog, str, os.PathLike, False or None
        Where they are recorded, as for ``Snapshot.take``.
    """

    def __init__(self, catalog: CatalogOption) -> None:
        self._catalog = catalog

    def remove(self, storage: Storage, *, only: Callable[[Manifest], bool] = lambda _: True) -> None:
        """Remove the snapshot that lies here.

        Parameters
        ----------
        storage : Storage
            Its place.
        only : callable, optional
            Whether it is the one that is meant, by its manifest; another that has taken its place is left alone.

        Raises
        ------
        SnapshotPinnedError
            If somebody has marked it.
        SnapshotNotFoundError
            If there is none.
        SnapshotCorruptError, StorageError
            If it cannot be read or removed.
        """
        manifest, data = attempt.read_manifest(storage)
        if not only(manifest):
            return
        record = self._record(manifest.id)
        _check_unmarked(storage, manifest, record)
        attempt.delete(storage, expected=(manifest.id, manifests.digest_of(data)))
        if record is not None:
            self._forget(record, storage.url)

    def _forget(self, record: Record, url: str) -> None:
        from expstate.catalog import removal  # noqa: PLC0415 - SQLAlchemy takes 0.3 s to import

        assert self._records is not None, "the record is from there"
        try:
            removal.forget_place(self._records, record, url)
        except CatalogError as error:
            _log.debug("the catalog was not told that %r is gone: %s", url, error)

    @functools.cached_property
    def _records(self) -> Catalog | None:
        """The catalog that the takes are recorded in."""
        if isinstance(self._catalog, Catalog):
            return self._catalog
        option = None if isinstance(self._catalog, bool) else self._catalog
        return None if self._catalog is False or catalog_place(option) is None else Catalog(option)

    def _record(self, snapshot_id: str) -> Record | None:
        """What the catalog knows of a take; None if it does not, or cannot be asked."""
        with contextlib.suppress(CatalogError, RefNotFoundError):
            return None if self._records is None else self._records[snapshot_id]
        return None


def _check_unmarked(storage: Storage, manifest: Manifest, record: Record | None) -> None:
    added = annotate.read(storage, manifest.id)
    is_tagged = bool(manifest.metadata.tags) or (added is not None and any(mark.present for mark in added.tags.values()))
    if record is not None:
        is_tagged = is_tagged or bool(record.tags)
        annotate.check_unprotected(f"snapshot {record.id[:8]}", record.aliases, pinned=record.pinned)
    if is_tagged:
        msg = f"the snapshot at {storage.url!r} is tagged"
        raise SnapshotPinnedError(msg)
