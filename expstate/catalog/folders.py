"""The folders that a catalog knows, and what lies in them: roots, locations of records, and the snapshot that is found in one.

Gets URLs out of the catalog, hands on storages; what a manifest or ``annotations.json`` there says is checked before it is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from expstate.catalog import filesystems, model, opening, roots
from expstate.engine import annotate
from expstate.engine.attempt import read_committed, read_manifest
from expstate.errors import ExpstateError, ManifestError
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.format.validate import validate
from expstate.state import paths
from expstate.storage import registry
from expstate.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from expstate.catalog.model import Location, RecordData
    from expstate.catalog.place import CatalogPlace
    from expstate.format.manifest import Manifest
    from expstate.storage.base import FileInfo, Storage

_MOST_RANKS = 2**31
_MOST_BYTES = 2**63


@dataclass(frozen=True, slots=True)
class Problem:
    """A place that could not be read, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return paths.printable(f"{self.path}: {self.reason.removeprefix(f'{self.path!r}: ')}")


@dataclass(frozen=True, slots=True)
class Found:
    """A snapshot in a folder: its manifest's stamp before it was read, the manifest and its bytes, and what the catalog keeps of it."""

    storage: Storage
    info: FileInfo
    manifest: Manifest
    raw: bytes
    data: RecordData

    def is_there_still(self) -> bool:
        """Whether the manifest is the one that was read."""
        try:
            return self.storage.stat(names.MANIFEST) == self.info
        except (ExpstateError, OSError):
            return False


def look(storage: Storage, on_problem: Callable[[Problem], object]) -> Found | None:
    """The snapshot in a folder; None if there is none, or one that cannot be read, which ``on_problem`` is told."""
    try:
        info = storage.stat(names.MANIFEST)
        manifest, raw = read_manifest(storage)
        validate(manifest)
        data = model.describe(manifest, manifests.digest_of(raw), storage.url)
        _check(data, raw)
    except FileNotFoundError:  # a torn manifest is none
        return None
    except (ExpstateError, OSError, ArithmeticError, ValueError) as error:
        on_problem(Problem(storage.url, str(error)))
        return None
    try:
        annotations = annotate.read(storage, data.id)
    except (ExpstateError, OSError) as error:
        on_problem(Problem(f"{storage.url}/{names.ANNOTATIONS}", str(error)))
    else:
        data = msgspec.structs.replace(data, annotations=annotations)
    return Found(storage, info, manifest, raw, data)


def identity(storage: Storage) -> tuple[str, str] | None:
    """The id and manifest digest of the snapshot in a folder, or None if there is none.

    Raises
    ------
    SnapshotCorruptError
        If its manifest is damaged.
    """
    data = read_committed(storage)
    try:
        return None if data is None else manifests.identify(data)
    except ExpstateError as error:
        msg = f"{storage.url!r}: {error}"
        raise type(error)(msg) from error


def _check(data: RecordData, raw: bytes) -> None:
    """Refuse what no take writes and no database holds."""
    if data.id != manifests.identify(raw)[0]:
        msg = "the manifest has two ids"
        raise ManifestError(msg)
    if (
        data.world_size >= _MOST_RANKS
        or max(data.nbytes, data.written_bytes) >= _MOST_BYTES
        or not -_MOST_BYTES <= (data.step or 0) < _MOST_BYTES
    ):
        msg = f"world size {data.world_size}, step {data.step} or {data.nbytes} bytes are not possible"
        raise ManifestError(msg)


def is_reachable(location: Location, snapshot_id: str) -> bool:
    """Whether a location is on a disk of this machine, or on what every machine reaches, or the snapshot is found on a shared disk."""
    return not opening.is_elsewhere(location) or _is_shared(location.url, snapshot_id)


def _is_shared(url: str, snapshot_id: str) -> bool:
    try:
        storage = open_location(url)
        return (
            isinstance(storage, LocalStorage)
            and filesystems.is_network(Path(storage.path))
            and annotate.committed_id(storage) == snapshot_id
        )
    except (ExpstateError, OSError):
        return False


def open_location(url: str) -> Storage:
    """The storage of a URL out of the catalog.

    Raises
    ------
    UntrustedLocationError
        If records may not open such a URL.
    """
    opening.check_trusted(url)
    return registry.open_storage(url)


def roots_of(place: CatalogPlace) -> Sequence[str]:
    """The folders that takes went to."""
    return roots.read(place)


def near_roots(place: CatalogPlace, on_problem: Callable[[Problem], object], but: Container[str] = ()) -> Iterator[Storage]:
    """Each folder that takes went to, but for some, and the folders in it."""
    for url in roots_of(place):
        if url in but:
            continue
        try:
            storage = open_location(url)
        except ExpstateError as error:
            on_problem(Problem(url, str(error)))
            continue
        yield from storage.walk(depth=1, on_error=lambda path, error: on_problem(Problem(path, str(error))))
