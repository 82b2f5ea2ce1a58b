"""Garbage collection: what takes, copies and deletions left behind when their process died.

Only folders with a dead lease are touched, and in them only files that carry the lease's attempt in their names or that the lease
names, and that no manifest there needs. Where a manifest is damaged, nothing is touched. Edits of annotations and questions for the time
have no lease: what one was writing is told by its name, and goes when it is old.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expstate import settings
from expstate.engine.lease import LEASE_SECONDS, decode_lease, is_dead
from expstate.errors import ExpstateError, ManifestError, SnapshotNotFoundError, UnsafePathError, UnsupportedSchemeError
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.storage import registry
from expstate.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from expstate.storage.base import FileInfo, Storage


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a dead attempt left in one folder.

    Attributes
    ----------
    url : str
        The folder.
    attempt : str
        The attempt's id.
    action : str
        What it was doing: ``"take"``, ``"copy"`` or ``"delete"``; or ``"edit"``, of what was added to the snapshot of this attempt; or
        ``"clock"``, asking an object store for the time.
    files : tuple of str
        Names of the files, the lease last if there is one.
    nbytes : int
        Bytes in them that get free: a file that another snapshot has too stays there.
    """

    url: str
    attempt: str
    action: str
    files: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class GcReport:
    """What ``gc`` found and removed.

    Attributes
    ----------
    removed : tuple of Leftover
        Leftovers of dead attempts, now gone (with ``dry_run=True``: those that would go).
    alive : tuple of str
        Leases of attempts that may still be at work.
    damaged : tuple of str
        Folders left alone because their manifest cannot be read.
    uploads : int
        Uploads to an object store that were not ended, whose parts were thrown away.
    """

    removed: tuple[Leftover, ...]
    alive: tuple[str, ...]
    damaged: tuple[str, ...]
    uploads: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in what was removed."""
        return sum(leftover.nbytes for leftover in self.removed)


def joined(reports: Sequence[GcReport]) -> GcReport:
    """Several reports as one."""
    return GcReport(
        tuple(leftover for report in reports for leftover in report.removed),
        tuple(lease for report in reports for lease in report.alive),
        tuple(folder for report in reports for folder in report.damaged),
        sum(report.uploads for report in reports),
    )


def collect(storages: Iterable[Storage], *, dry_run: bool) -> GcReport:
    """Remove the leftovers in these folders."""
    removed: list[Leftover] = []
    alive: list[str] = []
    damaged: list[str] = []
    for storage in storages:
        try:
            files = {info.name: info for info in storage.list()}
        except FileNotFoundError:
            continue
        for scrap in _scraps(storage, files):
            if not dry_run:
                _delete(storage, scrap.files)
            removed.append(scrap)
        leases = _leases(files)
        if not leases:
            continue
        needed = _needed(storage)
        if needed is None:
            damaged.append(storage.url)
            continue
        for name in leases:
            leftover = _dead(storage, files, name, needed, leases)
            if leftover is None:
                alive.append(f"{storage.url}/{name}")
                continue
            if not dry_run:
                _remove(storage, leftover, needed)
            removed.append(leftover)
    return GcReport(tuple(removed), tuple(alive), tuple(damaged))


def _scraps(storage: Storage, files: dict[str, FileInfo]) -> list[Leftover]:
    """What was there for a moment when a process died or could not remove it: no such moment is a day."""
    written: dict[tuple[str, str], list[FileInfo]] = {}
    for name in sorted(files):
        scrap = names.scrap_of(name)
        if scrap is not None:
            written.setdefault(scrap, []).append(files[name])
    if not written:
        return []
    now = storage.clock()
    old = {scrap: [info for info in infos if now - info.modified_at > LEASE_SECONDS] for scrap, infos in written.items()}
    return [
        Leftover(storage.url, attempt, action, tuple(info.name for info in infos), sum(info.size for info in infos))
        for (action, attempt), infos in old.items()
        if infos
    ]


def _delete(storage: Storage, files: Iterable[str]) -> None:
    for file in files:
        storage.delete(file)


def _remove(storage: Storage, leftover: Leftover, needed: set[str]) -> None:
    *files, lease = leftover.files
    _delete(storage, files)
    # A server may have stored the last that a dead process sent it only now.
    for info in list(storage.list()):
        if info.name not in needed and names.is_of_attempt(info.name, leftover.attempt):
            storage.delete(info.name)
    storage.delete(lease)
    storage.flush()
    storage.remove_folder()


def _leases(files: Iterable[str]) -> list[str]:
    """The lease of each attempt; where there is none, the one that was being written when its process died."""
    found: dict[str, str] = {}
    for name in sorted(files, reverse=True):  # those being written come first, with their two dots
        attempt = names.attempt_of_lease(name)
        if attempt is not None and (attempt not in found or name == names.lease_name(attempt)):
            found[attempt] = name
    return sorted(found.values())


def _needed(storage: Storage) -> set[str] | None:
    """The files that the manifest names; None if it is damaged."""
    try:
        manifest = manifests.decode(storage.read(names.MANIFEST, limit=manifests.MAX_BYTES))
    except FileNotFoundError:
        return set()
    except SnapshotNotFoundError:
        return set()  # torn: the commit of an attempt that died in it
    except ExpstateError:
        return None
    return {record.name for record in manifest.files} | {names.MANIFEST, names.ANNOTATIONS}


def _dead(storage: Storage, files: dict[str, FileInfo], lease_name: str, needed: set[str], leases: Iterable[str]) -> Leftover | None:
    attempt = names.attempt_of_lease(lease_name)
    assert attempt is not None
    try:
        lease = decode_lease(storage.read(lease_name, limit=2**26))
    except (FileNotFoundError, ManifestError):
        return None  # it ended just now, or no take has written it
    modified_at, now = files[lease_name].modified_at, storage.clock()
    if lease is None:  # it was not written to its end: only its age tells
        dead = now - modified_at > LEASE_SECONDS
    else:
        dead = names.attempt_of(lease.id) == attempt and is_dead(lease, modified_at, now)
    if not dead:
        return None
    action, listed = ("take", ()) if lease is None else (lease.action, lease.files)
    named = set()
    for name in listed:
        try:
            names.check_file_name(name)
        except UnsafePathError:
            continue
        # A copy of the snapshot that was to be replaced may be at work: its files have a lease of their own.
        if not any(names.is_of_attempt(name, names.attempt_of_lease(other) or "") for other in leases if other != lease_name):
            named.add(name)
    if action == "delete" and names.MANIFEST not in needed:
        named.add(names.ANNOTATIONS)
    theirs = [name for name in files if name not in needed and name != lease_name and (name in named or names.is_of_attempt(name, attempt))]
    # The lease goes last: as long as it is there, what is left can be found again.
    everything = (*sorted(theirs), lease_name)
    shared = storage.links(everything)
    return Leftover(storage.url, attempt, action, everything, sum(files[name].size for name in everything if name not in shared))


def local_folders(root: str) -> Iterator[Storage]:
    """A storage for each folder below ``root`` that holds a lease or a scrap, ``root`` among them; links are not followed."""
    for folder, _, files in os.walk(root):
        if any(names.attempt_of_lease(name) or names.scrap_of(name) for name in files):
            yield LocalStorage(folder)


def gc(path: str | os.PathLike[str], *, dry_run: bool = False) -> GcReport:
    """Remove what takes, copies and deletions left in a folder, and in those below it, when their process died.

    Only files of attempts that are provably dead are removed: their process on this machine is gone, or is this one and knows that they are
    over, or they gave no sign for 24 hours. What was there for a moment only, of a tag, a note or the like, goes when it is as old.

    Parameters
    ----------
    path : str or os.PathLike
        A snapshot's folder, or one with snapshots below it.
    dry_run : bool, default False
        Only report what would be removed.

    Returns
    -------
    GcReport
        What was removed and what was left alone.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gc(folder).removed
    ()
    """
    storage = registry.open_storage(path)
    if isinstance(storage, LocalStorage):
        return collect(local_folders(storage.url), dry_run=dry_run)
    found = collect(storage.walk(), dry_run=dry_run)
    return found if dry_run else dataclasses.replace(found, uploads=_end_uploads(path, storage.clock() - LEASE_SECONDS))


def _end_uploads(path: str | os.PathLike[str], older_than: float) -> int:
    # Not every transport can list them: obstore cannot, and it begins none either.
    with settings.override(transport="fsspec"):
        try:
            return registry.open_storage(path).end_uploads(older_than)
        except UnsupportedSchemeError:  # the package for it is not installed
            return 0
