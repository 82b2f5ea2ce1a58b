"""Every error and warning that expstate raises, in one tree.

Each class inherits ``ExpstateError`` and the builtin that a caller would expect, so that both ``except ExpstateError`` and
``except FileNotFoundError`` do what they say. A docstring says when the error is raised and what to do.
"""

from __future__ import annotations

import errno as _errno
import pickle
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class ExpstateError(Exception):
    """Base of every error of this library."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument and OSError a tuple: messages here are sentences.
        return str(self.args[0]) if self.args else type(self).__name__


# What a caller hands in


class AppStateError(ExpstateError, TypeError):
    """The app state is not a ``dict`` of keys and statefuls. Wrap plain values in ``StateDict``."""


class UnsupportedValueError(ExpstateError, TypeError):
    """A value of the state cannot be stored (a tensor on ``meta``, a container that holds itself). The message names its path."""


class InvalidNameError(ExpstateError, ValueError):
    """A name or tag has characters that a ref cannot carry. Choose one without ``@ : = /`` and control characters."""


class InvalidMetadataError(ExpstateError, ValueError):
    """A param, metric, note or step has a value that cannot be recorded. The message names it."""


class InvalidArgumentError(ExpstateError, ValueError):
    """Arguments that do not go together or are out of range. The message says which."""


class InvalidSettingError(ExpstateError, ValueError):
    """An ``EXPSTATE_...`` variable or a setting has a value that cannot be read."""


class UnsupportedSchemeError(ExpstateError, ValueError):
    """No storage is known for the scheme of this URL. The message lists those there are."""


class MemoryBudgetError(ExpstateError, MemoryError):
    """The memory budget is smaller than one buffer can be: give at least 2 MiB. Or the system has no memory left for one: free some."""


# Finding and reading snapshots


class SnapshotNotFoundError(ExpstateError, FileNotFoundError):
    """No committed snapshot is at this path. A take that was interrupted leaves none: run ``expstate.gc`` on the folder."""


class SnapshotExistsError(ExpstateError, FileExistsError):
    """Another snapshot is at this path. Take to another path, or pass ``overwrite=True``."""


class ExportExistsError(ExpstateError, FileExistsError):
    """A file is where an export would put one, and nothing is overwritten. Export to another path, or remove it."""


class SnapshotReplacedError(ExpstateError, RuntimeError):
    """The snapshot was replaced or deleted by someone else while it was in use. Open it anew."""


class EntryNotFoundError(ExpstateError, KeyError):
    """No entry or key of this name is in the snapshot. The message lists near misses."""


class SnapshotCorruptError(ExpstateError, ValueError):
    """Bytes of the snapshot are damaged or missing. The message names the entry, file and offset; ``verify()`` lists all."""


class ManifestError(SnapshotCorruptError):
    """The manifest is whole, but what it says cannot be: it was not written by expstate, or was altered."""


class ManifestTooLargeError(ManifestError):
    """The manifest is larger, or names more entries, than this version reads or writes."""


class UnsupportedFormatError(ExpstateError, ValueError):
    """The snapshot was written in a newer format. Upgrade expstate."""


class UnsafePathError(ManifestError):
    """The manifest names a file outside the snapshot. Do not trust where it came from."""


class UnsafeFileError(ManifestError):
    """A file of the snapshot is a link, a pipe or a device instead of a regular file."""


class PickleNotAllowedError(ExpstateError, pickle.UnpicklingError):
    """An entry needs pickle, which can run code. Pass ``trust=True`` only if you trust who wrote the snapshot."""


class CheckpointFormatError(ExpstateError, ValueError):
    """A checkpoint of another library is damaged, or has a form that is not known here. Load it with that library, and take a snapshot."""


class UnknownClassError(ExpstateError, TypeError):
    """An entry is of a class that this process has not imported. Import its module, then read again."""


# Restore


class RestoreMismatchError(ExpstateError, ValueError):
    """The snapshot and the live state do not fit together; nothing was changed.

    Attributes
    ----------
    problems : tuple of str
        Every problem found, one sentence each.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = tuple(problems)


class RestoreInterruptedError(ExpstateError, RuntimeError):
    """A restore failed after live state had begun to change. Restore again, or from another snapshot.

    Attributes
    ----------
    applied, unapplied : tuple of str
        Entry paths that hold the snapshot's values, and those that do not or may hold a mixture.
    """

    def __init__(self, message: str, applied: Sequence[str] = (), unapplied: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.applied: tuple[str, ...] = tuple(applied)
        self.unapplied: tuple[str, ...] = tuple(unapplied)


# Storage


class StorageError(ExpstateError, OSError):
    """The storage refused or failed. ``errno`` holds the system's number where there is one."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class StoragePermissionError(StorageError, PermissionError):
    """The storage does not let this user read or write here."""


class NoSpaceError(StorageError):
    """The storage is full (bytes, inodes or quota). Nothing of this take remains; free room and take again."""


class CommitUnknownError(StorageError):
    """The reply to a write was lost and the storage cannot be asked what became of it. ``Snapshot(path).verify()`` tells, once it can."""


class SnapshotWriteError(StorageError):
    """What was written is not what the storage holds, or the attempt's lease is gone. Nothing was committed; take again."""


def from_os_error(error: OSError, action: str) -> StorageError:
    """Our error for an ``OSError`` of the system, with what was being done.

    >>> from_os_error(OSError(28, "No space left on device"), "writing 'a.safetensors'").__class__.__name__
    'NoSpaceError'
    """
    reason = error.strerror or str(error) or type(error).__name__
    message = f"{action} failed: {reason}"
    if error.errno in {_errno.ENOSPC, _errno.EDQUOT}:
        return NoSpaceError(f"{message}; free some room and try again", error.errno)
    if error.errno in {_errno.EACCES, _errno.EPERM, _errno.EROFS}:
        return StoragePermissionError(f"{message}; check the permissions of the folder", error.errno)
    return StorageError(message, error.errno)


# Takes in the background


class TakeCancelledError(ExpstateError, CancelledError):
    """The take was cancelled before it was committed. Nothing of it remains."""


class TakeSkippedError(ExpstateError, RuntimeError):
    """Nothing was taken, because an earlier take of the same keys had not ended and ``on_busy="skip"`` was given."""


class RankFailedError(ExpstateError, RuntimeError):
    """Another rank failed or is gone, and with it what all were doing together: nothing was committed.

    Attributes
    ----------
    rank : int or None
        Which one, if that is known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RankTimeoutError(RankFailedError, TimeoutError):
    """A rank has done nothing for too long. Look for what it waits for; ``timeout=`` is how long it may."""


class TakePendingError(ExpstateError, TimeoutError):
    """A take was not done in time, and goes on: ``wait(timeout=...)`` ran out, or one that another has to wait for stands still."""


# The catalog


class CatalogError(ExpstateError, RuntimeError):
    """The catalog cannot do what was asked. Snapshots are not touched by its troubles."""


class CatalogUnavailableError(CatalogError, ConnectionError):
    """The catalog is locked, read-only, unreachable, or a package that it needs is missing. Try again, or mend what the message names."""


class CatalogCorruptError(CatalogError):
    """The catalog's file is damaged or not one of ours. ``expstate scan`` puts it aside and builds it anew from the snapshots."""


class CatalogVersionError(CatalogError):
    """The catalog was made by a newer version. Upgrade expstate, or name another catalog by ``EXPSTATE_CATALOG``."""


class InvalidQueryError(ExpstateError, ValueError):
    """A query or sort cannot be understood.

    Attributes
    ----------
    position : int or None
        The character of the query where it goes wrong, from 0.
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position


class RefNotFoundError(SnapshotNotFoundError, LookupError):
    """No snapshot goes by this ref. The message lists the nearest names."""


class NameNotFoundError(ExpstateError, NameError):
    """A name stands for nothing in the namespace of a notebook. Create the object first, or look at the names that the message lists."""


class NotInNotebookError(ExpstateError, RuntimeError):
    """Something of a notebook was asked for where none is. Run ``%load_ext expstate`` in it first."""


class CellFailedError(ExpstateError, RuntimeError):
    """A cell under ``%%snapshot`` raised or was interrupted. The error of the cell is shown above, and is the cause of this one."""


class UndoError(ExpstateError, RuntimeError):
    """There is nothing to undo or redo, or the state was changed since. Pass ``-y`` if that is to be thrown away."""


class NoUndoRoomError(ExpstateError, MemoryError):
    """There is no room to keep what would be overwritten, and nothing was changed. Free some, or pass ``undo=False`` (``--no-undo``)."""


class AmbiguousRefError(ExpstateError, LookupError):
    """The beginning of an id fits several snapshots. Give more of it."""


class SnapshotChangedError(ExpstateError, RuntimeError):
    """Another snapshot lies there than was recorded, or than ``expect_digest`` names. ``expstate scan`` records what is there."""


class SnapshotPinnedError(ExpstateError, PermissionError):
    """The snapshot is pinned or has an alias, so it is not removed. Unpin it, or pass ``force=True``."""


class UntrustedLocationError(ExpstateError, ValueError):
    """A record's URL has a scheme that records may not open. Add the scheme to ``EXPSTATE_SCHEMES`` if you trust who wrote the catalog."""


# Warnings


class ExpstateWarning(UserWarning):
    """Base of every warning of this library."""


class NeedsTrustWarning(ExpstateWarning):
    """A take stored objects that will need ``trust=True`` to come back."""


class TakeFailedWarning(ExpstateWarning):
    """A take in the background failed and nobody waited for it."""


class CatalogWarning(ExpstateWarning):
    """A take was not entered into the catalog, or a catalog is in a place that does not suit it; the snapshot itself is safe."""


class WeakStorageWarning(ExpstateWarning):
    """A storage cannot keep a promise that others keep. The message says which, and what to do."""


class ProvenanceWarning(ExpstateWarning):
    """Something of a snapshot's provenance could not be recorded, or looked like a secret and was left out."""
