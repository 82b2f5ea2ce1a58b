"""``annotations.json`` in a snapshot's folder: read, merged with what is added, and asked whether the snapshot may be removed.

Writers replace only what they have read, and merge again when they lose; so of edits made at the same time none is lost. Annotations of
another id were left by a snapshot that is no longer there: they say nothing, and the next edit replaces them.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from typing import TYPE_CHECKING

from expstate.errors import (
    ExpstateError,
    ManifestTooLargeError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotPinnedError,
    SnapshotReplacedError,
    StorageError,
    UnsafeFileError,
    UnsupportedFormatError,
)
from expstate.format import annotations as added
from expstate.format import manifest as manifests
from expstate.format import names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.format.annotations import Annotations
    from expstate.storage.base import Storage

_MOST_TRIES = 1000
_HEAD = re.compile(rb'\{"format":\d{1,9},"id":"([0-9a-f]{32})"')
_HEAD_BYTES = 64
_TAIL_BYTES = 4096


def committed_id(storage: Storage) -> str | None:
    """The id of the snapshot that is committed here, from the manifest's two ends; None if there is none, or it cannot be told."""
    try:
        with storage.open_file(names.MANIFEST) as reader:
            head = bytearray(min(_HEAD_BYTES, reader.size))
            tail = bytearray(min(_TAIL_BYTES, reader.size))
            reader.read_into(0, memoryview(head))
            reader.read_into(reader.size - len(tail), memoryview(tail))
    except (FileNotFoundError, SnapshotCorruptError):
        return None
    return None if manifests.is_torn(bytes(tail)) else id_in(bytes(head))


def id_in(data: bytes) -> str | None:
    """The id at the beginning of a manifest, which may be damaged."""
    found = _HEAD.match(data)
    return found and found.group(1).decode("ascii")


def _read_file(storage: Storage) -> bytes | None:
    try:
        return storage.read(names.ANNOTATIONS, limit=added.MAX_BYTES)
    except FileNotFoundError:
        return None


def _decoded(storage: Storage, data: bytes) -> Annotations:
    try:
        return added.decode(data)
    except (SnapshotCorruptError, UnsupportedFormatError) as error:
        msg = f"{storage.url!r}: {error}"
        raise type(error)(msg) from error


def read(storage: Storage, snapshot_id: str) -> Annotations | None:
    """What was added to this snapshot; None if nothing was.

    Raises
    ------
    SnapshotCorruptError
        If ``annotations.json`` is damaged.
    UnsupportedFormatError
        If a newer version wrote it.
    """
    data = _read_file(storage)
    if data is None:
        return None
    found = _decoded(storage, data)
    return found if found.id == snapshot_id else None


def update(storage: Storage, annotations: Annotations) -> Annotations:
    """Merge into ``annotations.json`` what was added to the snapshot that lies here.

    Parameters
    ----------
    storage : Storage
        The snapshot's folder.
    annotations : Annotations
        What was added; of items that are in the file too the newer stay.

    Returns
    -------
    Annotations
        What the file holds now.

    Raises
    ------
    SnapshotNotFoundError
        If no snapshot is here.
    SnapshotReplacedError
        If another one is.
    SnapshotCorruptError, UnsupportedFormatError
        If the file is damaged, or a newer version wrote it; it is left as it is.
    StorageError
        If it cannot be written.
    """
    _check_here(storage, annotations.id)
    # A name of its own for each writer's temporary file, which also tells by its end whose clean-up may remove it.
    token = f"{uuid.uuid4().hex[:8]}.{names.attempt_of(annotations.id)}"
    for _ in range(_MOST_TRIES):
        before = _read_file(storage)
        there = None if before is None else _decoded(storage, before)
        merged = annotations if there is None or there.id != annotations.id else added.merge(there, annotations)
        if merged == there:
            return merged
        data = added.encode(merged)
        try:
            if before is None:
                storage.create(names.ANNOTATIONS, data, token=token)
            else:
                storage.replace(names.ANNOTATIONS, data, token=token, expected=before)
        except FileExistsError:
            continue  # someone else was first
        except FileNotFoundError:
            raise _gone(storage) from None
        try:
            _check_here(storage, annotations.id)
        except (SnapshotNotFoundError, SnapshotReplacedError):
            # It was deleted meanwhile, and whoever did that may not have seen this file.
            with contextlib.suppress(ExpstateError, OSError):
                storage.delete(names.ANNOTATIONS, expected=data)
                storage.remove_folder()
            raise
        return merged
    msg = f"annotations.json of {storage.url!r} changes as often as it is read"
    raise StorageError(msg)


def _check_here(storage: Storage, snapshot_id: str) -> None:
    found = committed_id(storage)
    if found is None:
        raise _gone(storage)
    if found != snapshot_id:
        msg = f"another snapshot, {found[:8]}, lies at {storage.url!r} now"
        raise SnapshotReplacedError(msg)


def _gone(storage: Storage) -> SnapshotNotFoundError:
    return SnapshotNotFoundError(f"no snapshot at {storage.url!r}")


# Removal of the snapshot


def check_removable(storage: Storage, snapshot_id: str | None) -> None:
    """Refuse to remove a snapshot that is pinned or has an alias, and one of which that cannot be told.

    Parameters
    ----------
    storage : Storage
        The snapshot's folder.
    snapshot_id : str or None
        Its id; None if its manifest does not tell.

    Raises
    ------
    SnapshotPinnedError
        Saying what protects it.
    """
    try:
        data = _read_file(storage)
        found = None if data is None else added.decode(data)
    except (SnapshotCorruptError, UnsupportedFormatError, UnsafeFileError, ManifestTooLargeError) as error:
        msg = f"whether the snapshot at {storage.url!r} is pinned cannot be told, so it is not removed; pass force=True to do it: {error}"
        raise SnapshotPinnedError(msg) from error
    if found is None or snapshot_id not in {None, found.id}:
        return
    check_unprotected(f"the snapshot at {storage.url!r}", found.alias_names, pinned=found.pinned)


def check_unprotected(snapshot: str, aliases: Sequence[str], *, pinned: bool) -> None:
    """Refuse to remove a snapshot, named in words, that is pinned or has aliases; the error says what protects it."""
    reasons = ["is pinned"] if pinned else []
    if aliases:
        reasons.append(f"has the {'aliases' if len(aliases) > 1 else 'alias'} {', '.join(map(repr, aliases))}")
    if reasons:
        undo = " and ".join(["unpin"] * pinned + ["unalias"] * bool(aliases))
        msg = f"{snapshot} {' and '.join(reasons)}; {undo} it, or pass force=True"
        raise SnapshotPinnedError(msg)


def remove_others(storage: Storage, snapshot_id: str | None) -> None:
    """Remove annotations that are not of the snapshot that lies here now; None if there is none any more."""
    try:
        data = _read_file(storage)
    except (UnsafeFileError, ManifestTooLargeError):
        storage.delete(names.ANNOTATIONS)  # a link or the like: no edit made it
        return
    if data is None:
        return
    with contextlib.suppress(SnapshotCorruptError, UnsupportedFormatError):
        if added.decode(data).id == snapshot_id:
            return
    with contextlib.suppress(FileExistsError):  # replaced meanwhile by one that is
        storage.delete(names.ANNOTATIONS, expected=data)


def temporary_files(storage: Storage, snapshot_id: str) -> list[str]:
    """Files that edits of a snapshot's annotations were writing when their process died."""
    start, attempt = f".{names.ANNOTATIONS}.", names.attempt_of(snapshot_id)
    return [info.name for info in storage.list() if info.name.startswith(start) and names.is_of_attempt(info.name, attempt)]
