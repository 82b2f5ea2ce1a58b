"""A snapshot whose data comes from elsewhere than a take: its place is held, what ranks have written is put together, and it is committed.

Gets the ``RankPart`` of each rank; hands on the committed manifest, and tells the catalog.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from expstate import collector
from expstate._version import __version__
from expstate.catalog.origin import Origin
from expstate.engine import ancestry, crew, merge, share
from expstate.engine.arrays import device_name
from expstate.engine.attempt import Attempt
from expstate.engine.part import PartWriter
from expstate.errors import ExpstateError, UnsupportedValueError
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.format.manifest import Manifest
from expstate.format.metadata import make_metadata
from expstate.format.validate import validate
from expstate.interop.names import assemble
from expstate.state import tree
from expstate.state.tensors import NAMES, is_plain_memory
from expstate.storage import registry

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from expstate.catalog.origin import CatalogOption
    from expstate.engine.merge import RankPart
    from expstate.interop.names import Place
    from expstate.state.sharding import Part
    from expstate.storage.base import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What was asked for, as ``Snapshot.take`` documents it; ``key`` is that of what stands at the top of the state dict."""

    path: str | os.PathLike[str]
    key: str
    storage_options: Mapping[str, Any] | None = None
    name: str | None = None
    tags: Iterable[str] = ()
    params: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    note: str | None = None
    step: int | None = None
    overwrite: bool = False
    force: bool = False
    memory_budget_bytes: int | None = None
    catalog: CatalogOption = None


@dataclass(frozen=True, slots=True)
class Shards:
    """What is here of a tensor, at least one box, and the shape of the whole."""

    shape: tuple[int, ...]
    parts: list[Part]


class RankAttempt:
    """The data files of one rank, under a lease of its own: ``gc`` finds what is left if its process dies.

    Parameters
    ----------
    storage : Storage
        The snapshot's folder.
    attempt : Attempt
        Begun, or holding its lease.
    rank, size, local_ranks : int
        The rank, how many there are, and how many of them on this machine.
    memory_budget_bytes : int or None
        Most extra host memory to use.

    Attributes
    ----------
    part : PartWriter
        To be given what to write.
    """

    def __init__(self, storage: Storage, attempt: Attempt, rank: int, size: int, local_ranks: int, memory_budget_bytes: int | None) -> None:
        self._attempt = attempt
        self._rank = rank if size > 1 else None
        namer = names.FileNamer(attempt.token, self._rank)
        self._stop = crew.Stop()
        self.part = PartWriter(storage, namer, memory_budget_bytes, local_ranks, self._stop, self._written, attempt.renew)

    def _written(self, nbytes: int) -> None:  # noqa: ARG002 - nobody is shown how far it is
        self._attempt.renew()

    def write(self) -> RankPart:
        """Write it all; what the manifest will say of it."""
        with collector.paused() as pause:
            if self.part.total_bytes >= collector.LONG_BYTES:
                pause.end()
            try:
                self.part.write()
                return self.part.record(self._rank)
            finally:
                self.part.close()

    def abort(self) -> None:
        """Remove what was written, and the lease."""
        self._stop.set()
        self.part.abort()
        self._attempt.abort(self.part.created)
        self.part.close()


def add_key(part: PartWriter, key: str, wholes: Iterable[tuple[str, Any]], shards: Mapping[str, Shards]) -> None:
    """Give a writer what a rank has of one key.

    Parameters
    ----------
    part : PartWriter
        The writer.
    key : str
        The key.
    wholes : iterable of (str, Any)
        Whole tensors and other values, each with the path of its entry.
    shards : mapping of str to Shards
        What is here of tensors in shards, by path.

    Raises
    ------
    UnsupportedValueError
        If something cannot be stored; the message names its path.
    """
    leaves = tree.flatten_items(wholes)
    for leaf in leaves:
        if isinstance(leaf, tree.Sharded):
            msg = f"entry {leaf.path!r} is a sharded tensor inside of a value, which is saved by one rank alone"
            raise UnsupportedValueError(msg)
    pieces: dict[str, list[share.Piece]] = {}
    of_all: dict[str, str] = {}
    for path, found in shards.items():
        tensor = found.parts[0].tensor
        if tensor.dtype not in NAMES:
            msg = f"entry {path!r} has dtype {tensor.dtype}, which cannot be stored in shards"
            raise UnsupportedValueError(msg)
        leaves.append(tree.Sharded(path, "tensor", NAMES[tensor.dtype], found.shape, tuple(found.parts), (), None))
        of_all[path] = device_name(tensor)
        is_empty = 0 in found.shape
        here = [one for one in found.parts if one.tensor.numel() or is_empty]
        pieces[path] = [_piece(one, is_whole=one.sizes == found.shape and not is_empty) for one in here]
    part.add_key(key, leaves, pieces, of_all)


def _piece(one: Part, *, is_whole: bool) -> share.Piece:
    address = one.tensor.data_ptr() if is_plain_memory(one.tensor) else None
    return share.Piece(None if is_whole else one.starts, one.tensor, address)


class Commission:
    """The place that a snapshot will be committed to, held by one process for all.

    Parameters
    ----------
    given : Given
        What was asked for.

    Attributes
    ----------
    storage : Storage
        The snapshot's folder.
    attempt : Attempt
        The try to put it there.
    """

    def __init__(self, given: Given) -> None:
        self._given = given
        self._origin = Origin(given.catalog, None, given.note, given.params)
        self._metadata = make_metadata(
            name=given.name,
            tags=given.tags,
            params=self._origin.params,
            metrics=given.metrics,
            note=self._origin.note,
            step=given.step,
        )
        self.storage = registry.open_storage(given.path, given.storage_options)
        self.attempt = Attempt(self.storage, names.new_id(), "take")
        self._created_at = dt.datetime.now(dt.timezone.utc)
        self._begun = time.monotonic()
        self._looked_at = ancestry.moment()

    def begin(self) -> None:
        """Take hold of the place.

        Raises
        ------
        SnapshotExistsError, SnapshotPinnedError
            If a snapshot is there that is to stay.
        """
        self.attempt.begin(overwrite=self._given.overwrite, force=self._given.force)
        self._origin.gather()

    def commit(self, parts: Sequence[RankPart], places: Sequence[Place], others: Sequence[str]) -> tuple[Manifest, bytes]:
        """Put together what all ranks have written, and commit it.

        Parameters
        ----------
        parts : sequence of RankPart
            In the order of the ranks.
        places : sequence of Place
            Of all values, in the order of the state dict.
        others : sequence of str
            The attempts of the other ranks, which are over with this.

        Returns
        -------
        Manifest
            As it was committed.
        bytes
            Its bytes.
        """
        with collector.paused():
            files, entries = merge.merge(parts) if len(parts) > 1 else (parts[0].files, parts[0].entries)
            keys, entries = assemble(places, [msgspec.structs.replace(entry, rank=None) for entry in entries], self._given.key)
            manifest = Manifest(
                format=manifests.FORMAT,
                id=self.attempt.id,
                created_at=self._created_at.isoformat(timespec="milliseconds"),
                writer=f"expstate {__version__}",
                requires=(),
                world_size=len(parts),
                metadata=self._metadata,
                provenance=self._origin.provenance(),
                parent=ancestry.parent_of(record.key for record in keys),
                duration_seconds=round(time.monotonic() - self._begun, 6),
                keys=keys,
                files=files,
                entries=entries,
            )
            validate(manifest)
            data = manifests.encode(manifest)
        self.attempt.commit(data, {record.name: record.size for record in files})
        for token in others:
            with contextlib.suppress(ExpstateError, OSError):  # gc takes away what stays
                self.storage.delete(names.lease_name(token))
        self.attempt.finish()
        ancestry.note((record.key for record in keys), manifest.id, self._looked_at)
        self._origin.record(self.storage.url, manifest, data)
        return manifest, data

    def abort(self, created: Iterable[str], others: Iterable[str] = ()) -> None:
        """Give up the place: what was written is removed, that of the other ranks' attempts too, unless it was committed."""
        if self.attempt.committed:
            return
        for token in others:
            with contextlib.suppress(ExpstateError, OSError):
                for info in list(self.storage.list()):
                    if names.is_of_attempt(info.name, token):
                        self.storage.delete(info.name)
                self.storage.delete(names.lease_name(token))
        self.attempt.note_files()
        self.attempt.abort(created)


def alone(given: Given, fill: Callable[[PartWriter], Sequence[Place]]) -> tuple[Commission, Manifest]:
    """Write and commit a snapshot in this process alone.

    Parameters
    ----------
    given : Given
        What was asked for.
    fill : callable
        Is given the writer, gives it what to write, and returns the places of all values.
    """
    commission = Commission(given)
    commission.begin()
    work = RankAttempt(commission.storage, commission.attempt, 0, 1, 1, given.memory_budget_bytes)
    try:
        places = fill(work.part)
        return commission, commission.commit([work.write()], places, ())[0]
    except BaseException:
        work.abort()
        raise
