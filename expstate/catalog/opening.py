"""From a ref to the bytes of a snapshot: every place that its record knows is tried, and what lies there is compared with the record.

A URL that a catalog tells is opened only if its scheme is trusted; one that a person typed is theirs. What is found to be gone or replaced
is told to the catalog, if that can be written.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expstate import collector, settings
from expstate.catalog import given, running
from expstate.catalog.catalog import Catalog
from expstate.catalog.model import LOCAL_SCHEMES, Location, Record, this_host
from expstate.catalog.place import catalog_place, package_missing
from expstate.catalog.provenance import redact
from expstate.engine.attempt import read_manifest
from expstate.errors import (
    CatalogError,
    CatalogUnavailableError,
    ExpstateError,
    InvalidArgumentError,
    RefNotFoundError,
    SnapshotChangedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    StorageError,
    UntrustedLocationError,
)
from expstate.format import manifest as manifests
from expstate.format.validate import validate
from expstate.state.paths import printable
from expstate.storage import registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from expstate.catalog.origin import CatalogOption
    from expstate.catalog.running import Pending
    from expstate.format.manifest import Manifest
    from expstate.storage.base import Storage

SCHEMES = frozenset({*LOCAL_SCHEMES, "s3", "s3a", "gs", "gcs"})
_NO_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EINVAL}
_MARKING_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Opened:
    """A snapshot whose manifest was read and checked."""

    storage: Storage
    manifest: Manifest
    data: bytes


# Which URLs of a catalog may be opened


def check_trusted(url: str) -> None:
    """Refuse a URL that a record may not open: whoever can write a catalog must not choose what this process connects to.

    Parameters
    ----------
    url : str
        Of a location.

    Raises
    ------
    UntrustedLocationError
        If its scheme is not one of ``fs``, ``file``, ``s3``, ``s3a``, ``gs``, ``gcs`` and the setting ``schemes``, or URLs are chained in
        it.

    Examples
    --------
    >>> check_trusted("/data/run-1"), check_trusted("s3://bucket/run-1")
    (None, None)
    >>> check_trusted("http://example.com/run-1")
    Traceback (most recent call last):
        ...
    expstate.errors.UntrustedLocationError: a record may not open 'http://example.com/run-1'...
    """
    more = {scheme.strip().lower().removesuffix("://") for scheme in settings.current().schemes.split(",")}
    try:
        scheme, _ = registry.parse(url)
    except InvalidArgumentError as error:
        msg = f"a record names no place: {error}"
        raise UntrustedLocationError(msg) from None
    plain = "://" not in url
    if plain and os.path.isabs(url):  # noqa: PTH117 - a text from anybody
        return
    if plain or "::" in url or scheme not in SCHEMES | more - {""}:
        allowed = ", ".join(sorted(SCHEMES | more - {""}))
        shown = printable(redact.url(url))[:300]
        msg = (
            f"a record may not open {shown!r}: allowed are absolute paths and URLs with one of the schemes {allowed}, not "
            "chained by '::'; name the scheme in EXPSTATE_SCHEMES if you trust who wrote the catalog, or open the URL yourself"
        )
        raise UntrustedLocationError(msg)


def storage_of(location: Location, storage_options: Mapping[str, Any] | None = None) -> Storage:
    """The storage of a place that a record knows. Nothing is read yet.

    Parameters
    ----------
    location : Location
        The place.
    storage_options : mapping, optional
        What the storage of a remote place needs to connect; disks take none.

    Raises
    ------
    UntrustedLocationError
        If its scheme is not trusted.
    UnsupportedSchemeError
        If no storage is known for it.
    """
    check_trusted(location.url)
    local = registry.parse(location.url)[0] in LOCAL_SCHEMES
    return registry.open_storage(location.url, None if local else storage_options)


def is_elsewhere(location: Location) -> bool:
    """Whether this is the disk of another host, which may be shared with this one all the same."""
    return location.host not in {"", this_host()}


# By ref


def find(
    ref: str | os.PathLike[str], option: CatalogOption, project: str | None, storage_options: Mapping[str, Any] | None
) -> Opened | Pending:
    """The snapshot that a ref names, or the take that will be it; as ``Snapshot.find`` documents it."""
    text = given.text_of(ref)
    try:
        with _catalog(option) as catalog:
            return _find(catalog, text, project, storage_options)
    except RefNotFoundError:
        found = _lying_at(text, storage_options)
        if found is None:
            raise
        return found
    except CatalogError as error:
        found = _lying_at(text, storage_options)
        if found is None:
            msg = f"{redact.url(text)[:80]!r} is no path of a snapshot, and no other ref can be looked up: {error}"
            raise type(error)(msg) from error
        return found


@contextlib.contextmanager
def _catalog(option: CatalogOption) -> Iterator[Catalog]:
    if isinstance(option, Catalog):
        yield option
        return
    if option is True or not (option is None or option is False or isinstance(option, (str, os.PathLike))):
        msg = f"catalog must be a Catalog, a path or URL, False, or None for the default one, got {option!r}"
        raise InvalidArgumentError(msg)
    if option is False or catalog_place(option) is None:
        msg = "no catalog is asked (catalog=False, or EXPSTATE_CATALOG is 'off')"
        raise CatalogUnavailableError(msg)
    catalog = Catalog(option)
    try:
        yield catalog
    finally:
        catalog.close()


def _find(catalog: Catalog, text: str, project: str | None, storage_options: Mapping[str, Any] | None) -> Opened | Pending:
    try:
        from expstate.catalog import refs  # noqa: PLC0415 - SQLAlchemy takes 0.3 s to import, and is absent on some machines
    except ImportError as error:
        raise package_missing(error) from None
    record = refs.resolve(catalog, text, project)
    if record.status == "pending":
        pending = running.pending_of(record.id)
        if pending is not None:
            return pending
        record = refs.resolve(catalog, record.id)  # it has ended just now
    return open_record(catalog, record, storage_options, first=given.place_of(text))


def _lying_at(text: str, storage_options: Mapping[str, Any] | None) -> Opened | None:
    """The snapshot at a path or URL that a person typed; None if none is there."""
    try:
        local = registry.parse(text)[0] in LOCAL_SCHEMES
        storage = registry.open_storage(text, None if local else storage_options)
        return _read(storage)
    except (SnapshotNotFoundError, InvalidArgumentError, UnicodeEncodeError):
        return None
    except StorageError as error:
        if "/" not in text or error.errno in _NO_PATH:
            return None
        raise


def _read(storage: Storage) -> Opened:
    with collector.paused():
        manifest, data = read_manifest(storage)
        validate(manifest)
    return Opened(storage, manifest, data)


# By record


@dataclass(slots=True)
class _Tried:
    """What was found at the places of one record: one sentence each, by what it means for the record."""

    changed: list[str] = field(default_factory=list)
    damaged: list[ExpstateError] = field(default_factory=list)
    untrusted: list[str] = field(default_factory=list)
    failed: list[ExpstateError] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new_status: dict[tuple[str, str], str] = field(default_factory=dict)


def open_record(
    catalog: Catalog, record: Record, storage_options: Mapping[str, Any] | None = None, *, first: tuple[str, str] | None = None
) -> Opened:
    """The snapshot of a record, from the first of its places where it lies: same id, and the manifest's digest that was recorded there.

    Places that are found to hold nothing, or another snapshot, are marked so.

    Parameters
    ----------
    catalog : Catalog
        That the record is of.
    record : Record
        Which snapshot.
    storage_options : mapping, optional
        What the storage of a remote place needs to connect.
    first : (str, str), optional
        URL and host of the place to begin with.

    Raises
    ------
    SnapshotChangedError
        If something else lies there.
    SnapshotNotFoundError
        If it lies at none of its places, or on the disk of another host.
    UntrustedLocationError
        If it has only places that a record may not open.
    SnapshotCorruptError, StorageError
        If it lies there but cannot be read.
    """
    tried = _Tried()
    order = sorted(
        record.locations,
        key=lambda place: ((place.url, place.host) != first, is_elsewhere(place), place.status != "present"),
    )
    opened = None
    for location in order:
        opened = _try(record, location, storage_options, tried)
        if opened is not None:
            break
    if tried.new_status:
        with contextlib.suppress(CatalogError):
            _mark(catalog, record, tried.new_status)
    if opened is None:
        raise _explained(record, tried)
    return opened


def _try(record: Record, location: Location, storage_options: Mapping[str, Any] | None, tried: _Tried) -> Opened | None:
    url, elsewhere = location.url, is_elsewhere(location)
    status = None
    opened = None
    try:
        found = _read(storage_of(location, storage_options))
    except UntrustedLocationError as error:
        tried.untrusted.append(str(error))
    except SnapshotNotFoundError:
        status = "missing"
        tried.missing.append(f"{url!r} is on the disk of host {location.host!r}" if elsewhere else f"nothing is at {url!r}")
    except SnapshotCorruptError as error:
        tried.damaged.append(error)
    except ExpstateError as error:
        tried.failed.append(error)
    else:
        digest = manifests.digest_of(found.data)
        if (found.manifest.id, digest) == (record.id, location.digest):
            status = "present"
            opened = found
        elif elsewhere:
            tried.missing.append(f"{url!r} is on the disk of host {location.host!r}")
        elif found.manifest.id == record.id:
            tried.changed.append(f"the manifest at {url!r} is not the one that was recorded: its digest is {digest[:16]}")
        else:
            status = "replaced"
            tried.changed.append(f"another snapshot, {found.manifest.id[:8]}, is at {url!r}")
    # What this host sees of another's disk says nothing, unless it is the snapshot.
    if status not in {None, location.status} and (opened is not None or not elsewhere):
        tried.new_status[location.url, location.host] = status
    return opened


def _explained(record: Record, tried: _Tried) -> ExpstateError:
    """Why none of the places will do: what a person can do most about comes first."""
    shown = f"{record.id[:8]} ({printable(record.name)})" if record.name else record.id[:8]
    others = [*tried.missing, *map(str, tried.failed), *tried.untrusted]
    if tried.changed:
        found = "; ".join([*tried.changed, *others])
        return SnapshotChangedError(f"snapshot {shown} is not where it was: {found}; `expstate scan` of the folder enters what is there")
    for problem in (*tried.damaged, *tried.failed):
        return problem
    if tried.untrusted:
        return UntrustedLocationError(f"snapshot {shown}: {'; '.join([*tried.untrusted, *tried.missing])}")
    places = "; ".join(tried.missing) or "no place of it is known"
    return SnapshotNotFoundError(f"snapshot {shown} was not found: {places}; if it was moved, `expstate scan` of its new folder enters it")


def _mark(catalog: Catalog, record: Record, new_status: Mapping[tuple[str, str], str]) -> None:
    import sqlalchemy as sa  # noqa: PLC0415 - as refs

    from expstate.catalog import rows, schema  # noqa: PLC0415 - as refs

    with catalog.database.writing(timeout_seconds=_MARKING_SECONDS) as connection:
        seq = connection.execute(sa.select(schema.records.c.seq).where(schema.records.c.id == record.id)).scalar()
        if seq is not None:
            for (url, host), status in new_status.items():
                rows.set_location_status(connection, seq, url, host, status)
