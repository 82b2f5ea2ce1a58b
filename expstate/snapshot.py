"""The face of the library: ``Snapshot`` takes, opens, restores, reads, verifies, copies and deletes.

Arguments are checked here, before anything is touched; the work is done by ``engine``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import html
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from expstate import collector
from expstate.catalog import opening
from expstate.catalog.model import value_of
from expstate.catalog.origin import CatalogOption, Origin, record_copy
from expstate.catalog.recorder import recorder
from expstate.diff.run import DiffOptions, diff_live, diff_snapshots
from expstate.engine import ancestry, attempt, busy, copy, describe, export, fetch, memory, ranks, restore, space, verify
from expstate.engine.devices import check_device
from expstate.engine.match import check_rename
from expstate.engine.part import warn_of_trust
from expstate.engine.plan import RestoreOptions
from expstate.engine.report import RestoreReport, VerifyReport, size_text
from expstate.engine.request import globs, make_request
from expstate.engine.source import SnapshotSource, find_key
from expstate.engine.take import Take, check_app_state, take_now
from expstate.errors import EntryNotFoundError, ExpstateError, InvalidArgumentError
from expstate.format import manifest as manifests
from expstate.format.manifest import AliasEntry, Entry, Manifest, TensorEntry
from expstate.format.validate import validate
from expstate.pending import PendingSnapshot, SkippedTake
from expstate.progress import ProgressOption, check_option
from expstate.state import paths
from expstate.storage import registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch

    from expstate.diff.report import SnapshotDiff
    from expstate.engine.export import ExportReport
    from expstate.engine.take import TakeRequest
    from expstate.state.stateful import Stateful
    from expstate.storage.base import Storage


BaseOption: TypeAlias = "Snapshot | PendingSnapshot | str | os.PathLike[str] | None"

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SnapshotMetadata:
    """What is known of a snapshot besides its state.

    Attributes
    ----------
    id : str
        32 hexadecimal digits.
    created_at : datetime.datetime
        When the take began, in UTC.
    name, note, step : str, str, int or None
        As given at the take.
    tags : tuple of str
        As given at the take.
    params, metrics : dict
        As given at the take.
    keys : dict of str to str
        The keys and the classes of their statefuls.
    world_size : int
        Ranks that took it.
    writer : str
        The version that wrote it.
    digest : str
        The manifest's own BLAKE3, in hexadecimal digits.
    provenance : dict
        Where it came from.
    """

    id: str
    created_at: dt.datetime
    name: str | None
    note: str | None
    step: int | None
    tags: tuple[str, ...]
    params: dict[str, Any]
    metrics: dict[str, Any]
    keys: dict[str, str]
    world_size: int
    writer: str
    digest: str
    provenance: dict[str, Any]


class Snapshot:
    """A snapshot at a path. Nothing is read until something is asked of it.

    Parameters
    ----------
    path : str or os.PathLike
        The snapshot's folder: a path, ``fs://...`` or ``file://...``.
    storage_options : dict, optional
        What the storage needs to connect; the local disk takes none.
    expect_digest : str, optional
        Read no other snapshot than the one with this digest, ``metadata.digest`` where it was taken: 64 hexadecimal digits. Whatever is
        read raises ``SnapshotChangedError`` if the manifest has another. The manifest holds the digests of all the rest, so that nobody
        who can write the folder can put other values there, unless they are read with ``verify=False``.

    Raises
    ------
    UnsupportedSchemeError
        If no storage is known for the path's scheme.
    InvalidArgumentError
        If ``expect_digest`` is no digest.

    Examples
    --------
    >>> import tempfile, torch
    >>> from expstate import Snapshot
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(2, 1)
    >>> snapshot = Snapshot.take(f"{folder.name}/step-1", {"model": model}, step=1)
    >>> snapshot.read_object("model/bias").shape
    torch.Size([1])
    >>> snapshot.restore({"model": torch.nn.Linear(2, 1)}).restored
    ('model/weight', 'model/bias')
    >>> pinned = Snapshot(snapshot.path, expect_digest=snapshot.metadata.digest)
    >>> pinned.verify().ok
    True
    >>> Snapshot(snapshot.path, expect_digest="0" * 64).verify()
    Traceback (most recent call last):
        ...
    expstate.errors.SnapshotChangedError: ...another snapshot is there than the one expected...
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        expect_digest: str | None = None,
    ) -> None:
        self._expect_digest = _checked_digest(expect_digest)
        self._storage = registry.open_storage(path, storage_options)
        self._loaded: tuple[SnapshotSource, bytes] | None = None

    # Taking

    @classmethod
    def take(
        cls,
        path: str | os.PathLike[str],
        app_state: dict[str, Stateful],
        *,
        pg: Any = None,
        replicated: Sequence[str] | None = None,
        check_replicated: bool = False,
        timeout: float | None = None,
        storage_options: Mapping[str, Any] | None = None,
        name: str | None = None,
        tags: Iterable[str] = (),
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        note: str | None = None,
        step: int | None = None,
        overwrite: bool = False,
        memory_budget_bytes: int | None = None,
        progress: ProgressOption = None,
        catalog: CatalogOption = None,
        force: bool = False,
        base: BaseOption = None,
        dedup: bool | None = None,
        trust_fingerprint: bool = True,
    ) -> Snapshot:
        """Take a snapshot and wait until it is durable.

        On several ranks all call it with the same path, keys and globs, and get one snapshot: what all of them have is written once, each
        by its share; what they hold in shards is one tensor; everything else is there for each rank. An error on one rank is raised on all.

        Parameters
        ----------
        path : str or os.PathLike
            A folder to make, or one without a snapshot in it.
        app_state : dict of str to Stateful
            What to take: objects with ``state_dict()`` and ``load_state_dict()``.
        pg : torch.distributed.ProcessGroup, optional
            The ranks that take together; default all, where ``torch.distributed`` is initialised.
        replicated : sequence of str, optional
            Globs of entries that are the same on all ranks; recorded. Not needed for modules under ``DistributedDataParallel`` or
            with sharded parameters, and for the optimizers of their parameters.
        check_replicated : bool, default False
            Compare the values of these on all ranks, by digests, before anything is written.
        timeout : float, optional
            Seconds that a rank may stand still before all give up, naming it; default 600.
        storage_options : dict, optional
            What the storage needs to connect.
        name, note : str, optional
            A name that refs can use, and a free text.
        tags : iterable of str
            Labels.
        params, metrics : dict, optional
            Settings of the experiment (plain values) and measured values (numbers).
        step : int, optional
            Step of the training.
        overwrite : bool, default False
            Replace a snapshot that is there: it stays readable until the new one is complete.
        memory_budget_bytes : int, optional
            Most extra host memory that this process may use; default half of what is available, divided by the ranks of this machine, at
            most 32 GiB.
        progress : None, bool or callable
            None shows a bar at a terminal or in a notebook when it takes longer than 2 s; a function is given a ``ProgressUpdate``
            after each piece.
        catalog : Catalog, str, os.PathLike or False, optional
            Where the take is recorded: a catalog, its path or URL, or False for nowhere; default by the setting ``catalog``, else the
            user's own. A catalog that fails never fails a take.
        force : bool, default False
            With ``overwrite``: also a snapshot that is pinned or has an alias.
        base : Snapshot, PendingSnapshot, str or os.PathLike, optional
            An earlier snapshot, or a ref to one: what has not changed since, under whatever name, is not written again. Its file is linked
            into the folder ``base`` where the storage can, so that each snapshot stands alone: the base may be deleted. ``"auto"`` goes on
            from the last snapshots of the same keys that this process took or restored, and is a full take if there are none. What it
            says that it holds is believed, and not read: ``verify`` one that may be damaged, or that strangers may have written.
        dedup : bool, optional
            Store equal tensors once. Default with ``base`` alone: a full snapshot is a plain safetensors file with all names in it.
        trust_fingerprint : bool, default True
            Believe that a tensor on an accelerator is unchanged if its fingerprint is that of the base: a keyed hash of 128 bits, computed
            where the tensor lies. False compares digests instead, for which the tensor is copied to the host; say so of a base that
            strangers may have written.

        Returns
        -------
        Snapshot
            The committed snapshot.

        Raises
        ------
        SnapshotExistsError
            If a snapshot is there already.
        SnapshotPinnedError
            If the snapshot to overwrite is pinned or has an alias.
        AppStateError, UnsupportedValueError, InvalidNameError, InvalidMetadataError, InvalidArgumentError
            If something that was given cannot be stored, or ranks were given what differs; nothing was written.
        RankFailedError
            If another rank failed, is gone or stands still; it is named, and nothing was committed.
        StorageError
            If the storage failed; nothing of the take remains.

        Warns
        -----
        NeedsTrustWarning
            If objects were stored that only ``trust=True`` will bring back.
        CatalogWarning
            If the take could not be entered into the catalog.
        ProvenanceWarning
            If a note or param looks like a secret, so that only a hash of it was recorded.
        """
        with ranks.join(pg, timeout).failing() as joined:
            origin = Origin(catalog if joined.is_first else False, replicated, note, params)
            request = make_request(
                path,
                app_state,
                joined,
                replicated,
                check_replicated,
                storage_options,
                name,
                tags,
                origin.params,
                metrics,
                origin.note,
                step,
                overwrite,
                memory_budget_bytes,
                progress,
                force,
                origin.provenance,
                _is_given(base) if dedup is None else dedup,
                trust_fingerprint,
            )
            if joined.is_first:
                origin.gather()
            bases = _bases(base, request, joined, catalog, storage_options)
            take, committed = take_now(dataclasses.replace(request, bases=bases))
        snapshot = cls._committed(request.storage, origin, committed)
        warn_of_trust(take.needing_trust)
        return snapshot

    @classmethod
    def async_take(
        cls,
        path: str | os.PathLike[str],
        app_state: dict[str, Stateful],
        *,
        pg: Any = None,
        replicated: Sequence[str] | None = None,
        check_replicated: bool = False,
        timeout: float | None = None,
        storage_options: Mapping[str, Any] | None = None,
        name: str | None = None,
        tags: Iterable[str] = (),
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        note: str | None = None,
        step: int | None = None,
        overwrite: bool = False,
        memory_budget_bytes: int | None = None,
        progress: ProgressOption = None,
        catalog: CatalogOption = None,
        force: bool = False,
        base: BaseOption = None,
        dedup: bool | None = None,
        trust_fingerprint: bool = True,
        device_staging_bytes: int | None = None,
        on_busy: str = "wait",
    ) -> PendingSnapshot:
        """Take a snapshot in the background; returns when the state is captured, so that the training may go on.

        What is taken is the state at the moment of the return, for tensors on the CPU too. The state is copied within the memory
        budget; what does not fit is written before the return. Parameters, errors and warnings are those of ``take``; errors of
        the part in the background are raised by ``wait()``.

        Parameters
        ----------
        device_staging_bytes : int, optional
            Most memory of each accelerator for a copy of what lies there, which is moved to the host while the training goes on; default by
            the setting, 0 for none: then the state is moved to the host before the return.
        on_busy : {"wait", "skip", "replace"}, default "wait"
            What to do if an async take of this process with one of the same keys has not ended: wait for it first, however it ends, so
            that no more memory is needed than for one; take nothing; or cancel it, so that nothing of it remains unless it is
            committed by then. On several ranks the first decides. What happened stands in the provenance under ``busy``.

        Returns
        -------
        PendingSnapshot
            To wait for; ``skipped`` if nothing is taken, and ``wait()`` then raises ``TakeSkippedError``.

        Raises
        ------
        TakePendingError
            If an earlier take has to end first and has written nothing for ``timeout`` seconds.
        """
        busy.check_policy(on_busy)
        with ranks.join(pg, timeout).failing() as joined:
            origin = Origin(catalog if joined.is_first else False, replicated, note, params)
            request = make_request(
                path,
                app_state,
                joined,
                replicated,
                check_replicated,
                storage_options,
                name,
                tags,
                origin.params,
                metrics,
                origin.note,
                step,
                overwrite,
                memory_budget_bytes,
                progress,
                force,
                origin.provenance,
                _is_given(base) if dedup is None else dedup,
                trust_fingerprint,
                device_staging_bytes,
            )
            with busy.turn(request.app_state, on_busy, joined, timeout) as turn:
                if turn is None:
                    joined.close()
                    return SkippedTake(request.storage.url, request.app_state)
                if joined.is_first:
                    origin.gather()
                origin.note_busy(turn.facts)
                bases = _bases(base, request, joined, catalog, storage_options)
                take = Take(dataclasses.replace(request, bases=bases))
                turn.begins(take)
                storage, metadata = request.storage, request.metadata
                del request, bases  # which keeps the state alive
                pending = PendingSnapshot(storage.url, take, turn, lambda committed: cls._committed(storage, origin, committed))
                try:
                    take.gather()
                    take.stage()
                    warn_of_trust(take.needing_trust)
                    origin.goes_on(pending, metadata)
                    pending._begin()  # noqa: SLF001 - not for users: it is begun when they get it
                except BaseException as error:
                    pending._give_up(error)  # noqa: SLF001
                    raise
        return pending

    @classmethod
    def find(
        cls,
        ref: str | os.PathLike[str],
        *,
        catalog: CatalogOption = None,
        project: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        expect_digest: str | None = None,
    ) -> Snapshot:
        """Open the snapshot that a ref names, from the first of the places that the catalog knows where it lies.

        What is opened has the id and the manifest's digest that were recorded. A take of this process that goes on is waited for.

        Parameters
        ----------
        ref : str or os.PathLike
            In this order: ``latest`` or ``latest~2`` (the second before it), an alias, an exact name (the newest), the beginning of an id
            (at least 4 digits), a path or URL. A snapshot at a path is opened though the catalog does not know it.
        catalog : Catalog, str, os.PathLike or False, optional
            Where to look: a catalog, its path or URL, or False for nowhere, so that only paths and URLs are found; default by the setting
            ``catalog``, else the user's own.
        project : str, optional
            Another project than the current one; ``"*"`` for all.
        storage_options : dict, optional
            What the storage of a remote place needs to connect.
        expect_digest : str, optional
            Open no other snapshot than the one with this digest of the manifest, whatever the catalog says; as for ``Snapshot``.

        Returns
        -------
        Snapshot
            The committed snapshot.

        Raises
        ------
        RefNotFoundError
            If no snapshot goes by the ref; the nearest are listed.
        AmbiguousRefError
            If it is the beginning of several ids.
        SnapshotChangedError
            If something else lies where it was recorded, or its digest is not the expected one.
        SnapshotNotFoundError
            If it lies at none of its places; one on the disk of another host names the host.
        UntrustedLocationError
            If its record has a URL of a scheme that is not to be trusted.
        InvalidArgumentError
            If ``expect_digest`` is no digest.
        CatalogError
            If the catalog cannot be read, and the ref is no path of a snapshot.

        Examples
        --------
        >>> import tempfile
        >>> from expstate import Catalog, Snapshot, StateDict
        >>> folder = tempfile.TemporaryDirectory()
        >>> catalog = Catalog(f"{folder.name}/catalog.db")
        >>> taken = Snapshot.take(f"{folder.name}/step-1", {"progress": StateDict(step=1)}, name="baseline", catalog=catalog)
        >>> Snapshot.find("baseline", catalog=catalog).id == Snapshot.find(taken.id[:6], catalog=catalog).id == taken.id
        True
        >>> Snapshot.find("latest", catalog=catalog).read_object("progress/step")
        1
        >>> catalog.close()
        >>> folder.cleanup()
        """
        digest = _checked_digest(expect_digest)
        found = opening.find(ref, catalog, project, storage_options)
        if isinstance(found, opening.Opened):
            snapshot = cls._opened(found.storage, found.manifest, found.data)
        else:
            assert isinstance(found, PendingSnapshot)
            snapshot = found.wait()
        if digest is None:
            return snapshot
        pinned = cls._at(snapshot._storage, None, digest)  # noqa: SLF001 - this class's own
        pinned._load()  # noqa: SLF001
        return pinned

    @classmethod
    def _opened(cls, storage: Storage, manifest: Manifest, data: bytes) -> Snapshot:
        return cls._at(storage, (SnapshotSource(storage, manifest, data, _own_rank(manifest)), data))

    @classmethod
    def _at(cls, storage: Storage, loaded: tuple[SnapshotSource, bytes] | None, expect_digest: str | None = None) -> Snapshot:
        snapshot = cls.__new__(cls)
        snapshot._expect_digest = expect_digest  # noqa: SLF001 - this class's own
        snapshot._storage = storage  # noqa: SLF001
        snapshot._loaded = loaded  # noqa: SLF001
        return snapshot

    @classmethod
    def _committed(cls, storage: Storage, origin: Origin, committed: tuple[Manifest, bytes] | None) -> Snapshot:
        """The snapshot that was just taken; recorded by the rank that has committed it."""
        if committed is None:
            return cls._at(storage, None)
        origin.record(storage.url, *committed)
        return cls._opened(storage, *committed)

    # What is in it

    @property
    def path(self) -> str:
        """Where it is, as a path or URL without secrets."""
        return self._storage.url

    def _load(self) -> tuple[SnapshotSource, bytes]:
        if self._loaded is None:
            self._loaded = _read_source(self._storage, self._expect_digest)
        return self._loaded

    @property
    def _source(self) -> SnapshotSource:
        return self._load()[0]

    def _source_of(self, rank: int | None) -> SnapshotSource:
        """What a rank sees of it; this process's own, or the first, if none is named."""
        if rank is None:
            return self._source
        world_size = self.manifest.world_size
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
            msg = f"rank must be one of the {world_size} that took the snapshot, got {rank!r}"
            raise InvalidArgumentError(msg)
        return self._source.of_rank(rank)

    @property
    def manifest(self) -> Manifest:
        """All that ``snapshot.json`` says, checked.

        Raises
        ------
        SnapshotNotFoundError
            If no committed snapshot is at the path.
        SnapshotCorruptError
            If the manifest is damaged.
        SnapshotChangedError
            If it is not the expected one.
        """
        return self._source.manifest

    @property
    def id(self) -> str:
        """The snapshot's id, 32 hexadecimal digits; copies keep it."""
        return self.manifest.id

    @property
    def created_at(self) -> dt.datetime:
        """When the take began, in UTC."""
        return _time(self.manifest.created_at)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, arrays and objects in it."""
        return sum(entry.nbytes for entry in self.manifest.entries)

    @property
    def nbytes_written(self) -> int:
        """Bytes of the data files that its take wrote, with their headers; files of earlier snapshots that it shares do not count."""
        return self.manifest.nbytes_written

    @property
    def nbytes_unique(self) -> int | None:
        """Bytes of its files that no other snapshot has: what deleting it sets free. None if it cannot be read any more.

        It is looked up on storage each time, since it grows when snapshots that share files with it are deleted. On object stores
        nothing is shared. Blocks that a file system shares between files of their own count for each.
        """
        return space.nbytes_unique(self._storage, self.id)

    @property
    def metadata(self) -> SnapshotMetadata:
        """What is known of it besides its state."""
        source, data = self._load()
        manifest = source.manifest
        given = manifest.metadata
        return SnapshotMetadata(
            id=manifest.id,
            created_at=_time(manifest.created_at),
            name=given.name,
            note=given.note,
            step=given.step,
            tags=given.tags,
            params={name: value_of(value) for name, value in given.params.items()},
            metrics={name: value_of(value) for name, value in given.metrics.items()},
            keys={record.key: record.type for record in manifest.keys},
            world_size=manifest.world_size,
            writer=manifest.writer,
            digest=manifests.digest_of(data),
            provenance=manifest.provenance,
        )

    def keys(self) -> tuple[str, ...]:
        """The keys of the app state that was taken."""
        return tuple(record.key for record in self.manifest.keys)

    def entries(self, glob: str | None = None, *, rank: int | None = None) -> tuple[Entry, ...]:
        """The entries, in order; containers are among them.

        Parameters
        ----------
        glob : str, optional
            Only those whose path, or a container above it, matches; ``*`` crosses ``/``.
        rank : int, optional
            Whose entries, of those that each rank has of its own; default this process's, or the first's.

        Raises
        ------
        EntryNotFoundError
            If none matches.
        """
        entries = tuple(self._source_of(rank).entries)
        if glob is None:
            return entries
        matches = paths.matcher(globs(glob, "globs"))
        found = tuple(entry for entry in entries if matches(entry.path))
        if not found:
            msg = f"the glob {glob!r} matches no entry of the snapshot at {self.path!r}"
            raise EntryNotFoundError(msg)
        return found

    # Reading

    def get_state_dict_for_key(
        self,
        key: str,
        *,
        rank: int | None = None,
        device: torch.device | str | None = None,
        trust: bool = False,
        verify: bool = True,
        memory_budget_bytes: int | None = None,
    ) -> Any:
        """The state dict of one key, in new memory.

        Parameters
        ----------
        key : str
            A key of the app state.
        rank : int, optional
            Whose, where each rank has values of its own; default this process's, or the first's.
        device : torch.device or str, optional
            Where tensors go; default where they were taken from if that device is there, else the CPU.
        trust : bool, default False
            Whether objects that need pickle may run code.
        verify : bool, default True
            Whether to check digests.
        memory_budget_bytes : int, optional
            Most extra host memory to use.

        Raises
        ------
        EntryNotFoundError
            If there is no such key.
        PickleNotAllowedError
            If an object in it needs ``trust``.
        SnapshotCorruptError
            If bytes are damaged.
        """
        checked = check_device(device)
        budget = memory.budget_bytes(memory_budget_bytes)
        path = find_key(self.manifest, key)
        return fetch.read_tree(self._source_of(rank), path, device=checked, trust=trust, verify=verify, budget=budget)

    def read_object(
        self,
        path: str,
        obj_out: Any = None,
        *,
        rows: slice | None = None,
        rank: int | None = None,
        device: torch.device | str | None = None,
        trust: bool = False,
        verify: bool = True,
        memory_budget_bytes: int | None = None,
    ) -> Any:
        """One entry: a tensor, a value, an object, or a container with all in it. Only its bytes are read.

        Parameters
        ----------
        path : str
            The entry's path, such as ``"model/encoder.0.weight"``.
        obj_out : torch.Tensor or numpy.ndarray, optional
            Of the entry's shape (with ``rows``, of theirs) and dtype, to read into.
        rows : slice, optional
            Only these rows of a tensor's first dimension; step 1. Only the blocks that hold them are read.
        rank : int, optional
            Whose, if each rank has an entry of its own at the path; default this process's, or the first's.
        device : torch.device or str, optional
            Where a new tensor goes; default where it was taken from if that device is there, else the CPU.
        trust : bool, default False
            Whether an object that needs pickle may run code.
        verify : bool, default True
            Whether to check digests.
        memory_budget_bytes : int, optional
            Most extra host memory to use.

        Returns
        -------
        Any
            The value, or ``obj_out``.

        Raises
        ------
        EntryNotFoundError
            If there is no such entry; near misses are named.
        RestoreMismatchError
            If ``obj_out`` does not fit.
        InvalidArgumentError
            If ``rows`` or ``obj_out`` are given for what is no tensor.
        """
        checked = check_device(device)
        budget = memory.budget_bytes(memory_budget_bytes)
        source = self._source_of(rank)
        entry = source.by_path.get(path) if isinstance(path, str) else None
        if isinstance(entry, (TensorEntry, AliasEntry)):
            return fetch.read_tensor(source, entry, obj_out, rows, device=checked, verify=verify, budget=budget)
        if entry is not None and (obj_out is not None or rows is not None):
            msg = f"entry {path!r} is no tensor, so it has no rows and cannot be read into one"
            raise InvalidArgumentError(msg)
        return fetch.read_tree(source, path, device=checked, trust=trust, verify=verify, budget=budget)

    def restore(
        self,
        app_state: dict[str, Stateful],
        *,
        pg: Any = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
        cast: bool = False,
        verify: bool = True,
        trust: bool = False,
        atomic: bool = False,
        dry_run: bool = False,
        device: torch.device | str | None = None,
        memory_budget_bytes: int | None = None,
        progress: ProgressOption = None,
    ) -> RestoreReport:
        """Put state back in place. The whole plan is checked before anything live changes.

        On several ranks each restores for itself, whatever the number of ranks that took: of a sharded tensor it reads what goes to its
        own shard; what all ranks had alike comes back on every one; values that each rank had of its own come back on the rank of the
        same number. A rank that was not there keeps what it has of these, which with ``strict`` is an error, as are values of ranks that
        are no longer there; only ``RNGState`` makes do (see there).

        Parameters
        ----------
        app_state : dict of str to Stateful
            What to restore; some of the snapshot's keys or all.
        pg : torch.distributed.ProcessGroup, optional
            In which this process's rank counts; default all ranks.
        include, exclude : str or sequence of str, optional
            Globs on entry paths (``"model/encoder.*"``): only what they let through comes back, the rest stays as it is.
        rename : dict of str to str, optional
            Prefixes of names below a key in the snapshot to prefixes of live names, such as ``{"module.": ""}``.
        strict : bool, default True
            Whether a module and the snapshot must have the same names, and the values of each rank a rank to go to.
        cast : bool, default False
            Convert values where the dtype differs, instead of raising.
        verify : bool, default True
            Whether to check digests.
        trust : bool, default False
            Whether objects that need pickle may run code.
        atomic : bool, default False
            Read and verify everything before a live byte changes: held in memory if the budget allows, else read twice.
        dry_run : bool, default False
            Only check, and report what would be done.
        device : torch.device or str, optional
            Where tensors without a live counterpart are made, those of modules on the meta device among them; default where they were
            taken from (state of optimizers: where the parameter is).
        memory_budget_bytes : int, optional
            Most extra host memory to use.
        progress : None, bool or callable
            As for ``take``.

        Returns
        -------
        RestoreReport
            What was restored, and what was not.

        Raises
        ------
        RestoreMismatchError
            If snapshot and live state do not fit together; every problem is named, nothing was changed.
        PickleNotAllowedError
            If that is only because objects need ``trust``.
        EntryNotFoundError
            If a key is not in the snapshot, or a glob matches nothing.
        RestoreInterruptedError
            If it failed, or was interrupted, after live state had begun to change.
        SnapshotCorruptError
            If files are missing or damaged, and nothing was changed yet.
        """
        check_app_state(app_state)
        check_rename(rename)
        check_option(progress)
        if isinstance(include, (list, tuple)) and not include:
            msg = "include is empty, so nothing would be restored; pass None for everything"
            raise InvalidArgumentError(msg)
        options = RestoreOptions(
            include=None if include is None else globs(include, "include"),
            exclude=() if exclude is None else globs(exclude, "exclude"),
            rename=dict(rename or {}),
            strict=strict,
            cast=cast,
            trust=trust,
            device=check_device(device),
            position=ranks.position(pg),
        )
        budget = memory.budget_bytes(memory_budget_bytes)
        source = self._source.of_rank(_own_rank(self.manifest, pg))
        report = restore.restore(
            source, app_state, options, budget=budget, progress=progress, verify=verify, atomic=atomic, dry_run=dry_run
        )
        if not dry_run:
            ancestry.note(report.keys, self.id, storage=self._storage)
        return report

    # Comparing

    def diff(
        self,
        other: Snapshot | dict[str, Stateful],
        *,
        content: bool = False,
        stats: bool = False,
        memory_budget_bytes: int | None = None,
        progress: ProgressOption = None,
    ) -> SnapshotDiff:
        """Compare this snapshot with a newer one, or with live state, by digests: no tensor is read.

        Parameters
        ----------
        other : Snapshot or dict of str to Stateful
            The newer side: what it has and this snapshot has not is ``added``. Of an app state only its keys are compared; tensors
            are digested where they lie.
        content : bool, default False
            Read tensors that are cut into other boxes than here, to see whether their content differs.
        stats : bool, default False
            Read the changed tensors of the same shape and measure how far they are apart; includes ``content``.
        memory_budget_bytes : int, optional
            Most extra host memory to use.
        progress : None, bool or callable
            As for ``take``.

        Returns
        -------
        SnapshotDiff
            What differs: true if any entry does.

        Raises
        ------
        InvalidArgumentError
            If ``other`` is neither, or an app state without keys.
        AppStateError, UnsupportedValueError
            If the app state could not be taken.
        SnapshotCorruptError
            If bytes that were read are damaged.
        SnapshotReplacedError
            If a snapshot was replaced or deleted before it was read.

        Examples
        --------
        >>> import tempfile
        >>> from expstate import Snapshot, StateDict
        >>> folder = tempfile.TemporaryDirectory()
        >>> progress = StateDict(epoch=1)
        >>> snapshot = Snapshot.take(f"{folder.name}/one", {"progress": progress}, name="one")
        >>> progress["epoch"] = 2
        >>> print(snapshot.diff({"progress": progress}))
        one -> live state: 1 changed, 0 same
          values: progress/epoch: 1 -> 2
        >>> folder.cleanup()
        """
        _check_comparable(other)
        check_option(progress)
        options = DiffOptions(content, stats, memory.budget_bytes(memory_budget_bytes), progress)
        if isinstance(other, Snapshot):
            return diff_snapshots(self._source, other._source, options)  # noqa: SLF001 - this class's own
        return diff_live(self._source, other, options)

    # The snapshot as a whole

    def verify(self, *, memory_budget_bytes: int | None = None, progress: ProgressOption = None) -> VerifyReport:
        """Read everything and compare it with its digests.

        Returns
        -------
        VerifyReport
            Every damaged entry, file and offset.

        Raises
        ------
        SnapshotCorruptError
            If the manifest itself is damaged, so that nothing can be said of the rest.
        """
        check_option(progress)
        # From the storage, and not what was read before: that is what is in question.
        source, _ = _read_source(self._storage, self._expect_digest)
        return verify.verify(source, budget=memory.budget_bytes(memory_budget_bytes), progress=progress)

    def delete(self, *, force: bool = False) -> None:
        """Remove the snapshot: at once invisible, then its files one by one by name. Other files in the folder stay.

        Parameters
        ----------
        force : bool, default False
            Delete it though it is pinned or has an alias.

        Raises
        ------
        SnapshotNotFoundError
            If there is none.
        SnapshotPinnedError
            If it is pinned or has an alias.
        SnapshotChangedError, SnapshotReplacedError
            If it is not the expected one; nothing was removed.
        """
        expected = None if self._expect_digest is None else (self.id, self._expect_digest)
        attempt.delete(self._storage, force=force, expected=expected)
        self._loaded = None

    def copy(
        self,
        dest: str | os.PathLike[str],
        *,
        provenance: bool = True,
        storage_options: Mapping[str, Any] | None = None,
        memory_budget_bytes: int | None = None,
        progress: ProgressOption = None,
        catalog: CatalogOption = None,
    ) -> Snapshot:
        """Copy the snapshot, verified on the way; the copy has the same id, and is another place of the same record.

        Within one object store the server copies by itself, and nothing is read: ``verify`` the copy if the original may be damaged.

        Parameters
        ----------
        dest : str or os.PathLike
            A folder to make, or one without a snapshot in it.
        provenance : bool, default True
            Whether the copy says where the snapshot came from. Without, it is still the same snapshot, but its manifest is another and
            has another digest.
        catalog : Catalog, str, os.PathLike or False, optional
            Where the new place is recorded, as for ``take``.

        Returns
        -------
        Snapshot
            The copy.

        Raises
        ------
        SnapshotExistsError
            If a snapshot is there already.
        SnapshotCorruptError
            If this one is damaged; nothing remains at ``dest``.
        """
        check_option(progress)
        known_to = recorder(catalog)
        copied = Snapshot(dest, storage_options)
        source, data = self._load()
        budget = memory.budget_bytes(memory_budget_bytes)
        copy.copy(source, data, copied._storage, provenance=provenance, budget=budget, progress=progress)
        if known_to is not None:
            copied_source, copied_data = copied._load()
            record_copy(known_to, copied._storage, copied_source.manifest, copied_data)
        return copied

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        memory_budget_bytes: int | None = None,
        progress: ProgressOption = None,
    ) -> ExportReport:
        """Write the tensors as plain safetensors files for other tools: nothing else, no provenance, verified on the way.

        In each file tensors have the names that they have below the key (``encoder.0.weight``), as in a state dict; of tied tensors one
        is stored, and the others are named in the metadata, as ``safetensors.torch.load_model`` wants it. What is no tensor is left out and
        reported.

        Parameters
        ----------
        path : str or os.PathLike
            A folder, for one file ``KEY.safetensors`` for each key that has tensors; or a name that ends in ``.safetensors``, for the
            one key that has them.
        include, exclude : str or sequence of str, optional
            Globs on entry paths (``"model/*"``): only what they let through is exported.
        storage_options : dict, optional
            What the storage of ``path`` needs to connect.
        memory_budget_bytes : int, optional
            Most extra host memory to use.
        progress : None, bool or callable
            As for ``take``.

        Returns
        -------
        ExportReport
            The files, and the entries that are not in them.

        Raises
        ------
        ExportExistsError
            If a file is there already.
        UnsupportedValueError
            If a tensor is of a dtype or layout that safetensors does not have; nothing was written.
        InvalidArgumentError
            If there is no tensor to export, or those of several keys and one file.
        EntryNotFoundError
            If a glob matches nothing.
        SnapshotCorruptError
            If the snapshot is damaged; nothing remains at ``path``.

        Examples
        --------
        >>> import tempfile, torch
        >>> from expstate import Snapshot
        >>> from safetensors.torch import load_file
        >>> folder = tempfile.TemporaryDirectory()
        >>> snapshot = Snapshot.take(f"{folder.name}/step-1", {"model": torch.nn.Linear(2, 1)})
        >>> report = snapshot.export(f"{folder.name}/model.safetensors")
        >>> sorted(load_file(report.files[0]))
        ['bias', 'weight']
        >>> folder.cleanup()
        """
        check_option(progress)
        folder, name = _split_file(path)
        return export.export(
            self._source,
            registry.open_storage(folder, storage_options),
            name,
            include=None if include is None else globs(include, "include"),
            exclude=() if exclude is None else globs(exclude, "exclude"),
            budget=memory.budget_bytes(memory_budget_bytes),
            progress=progress,
        )

    # For people

    def __repr__(self) -> str:
        if self._loaded is None:
            return f"Snapshot({self.path!r})"
        manifest = self.manifest
        name = f"{manifest.metadata.name!r}, " if manifest.metadata.name else ""
        step = f", step {manifest.metadata.step}" if manifest.metadata.step is not None else ""
        keys = ", ".join(map(paths.printable, self.keys()))
        return f"Snapshot({self.path!r}, {name}id={manifest.id[:8]}{step}, {keys}, {size_text(self.nbytes, self.nbytes_written)})"

    def _repr_html_(self) -> str:
        try:
            manifest = self.manifest
        except (ExpstateError, OSError) as error:
            return f"<b>{html.escape(self.path)}</b><br>{html.escape(str(error))}"
        return describe.as_html(self.path, manifest, self.nbytes, self.nbytes_written)


def _checked_digest(expect_digest: object) -> str | None:
    if expect_digest is None:
        return None
    digest = expect_digest.lower() if isinstance(expect_digest, str) else ""
    if not _DIGEST.fullmatch(digest):
        msg = f"expect_digest must be the 64 hexadecimal digits of a manifest's digest (metadata.digest), got {expect_digest!r:.90}"
        raise InvalidArgumentError(msg)
    return digest


def _read_source(storage: Storage, expect_digest: str | None = None) -> tuple[SnapshotSource, bytes]:
    with collector.paused():
        manifest, data = attempt.read_manifest(storage, expect_digest)
        validate(manifest)
        return SnapshotSource(storage, manifest, data, _own_rank(manifest)), data


def _is_given(base: object) -> bool:
    if base is not None and not isinstance(base, (Snapshot, PendingSnapshot, str, os.PathLike)):
        msg = f"base must be a snapshot, a ref to one, or 'auto', got {type(base).__name__}"
        raise InvalidArgumentError(msg)
    return base is not None


def _bases(
    base: BaseOption, request: TakeRequest, joined: ranks.Ranks, catalog: CatalogOption, storage_options: Mapping[str, Any] | None
) -> tuple[SnapshotSource, ...]:
    """The snapshots that a take goes on from."""
    if base is None:
        return ()
    if base == "auto":
        return tuple(_still_there(request.app_state, request.storage))
    if isinstance(base, PendingSnapshot):
        base = base.wait()
    if not isinstance(base, Snapshot):
        # The catalog is the first rank's.
        found = Snapshot.find(base, catalog=catalog, storage_options=storage_options) if joined.is_first else None
        path = joined.spread("base", None if found is None else os.fsencode(found.path))
        base = found or Snapshot(os.fsdecode(path), storage_options)
    return (base._source,)  # noqa: SLF001 - the class of this module


def _still_there(keys: Iterable[str], target: Storage) -> Iterator[SnapshotSource]:
    """The last snapshots of these keys that this process took or restored, which are still there and whose files can be shared."""
    for snapshot_id, storage in ancestry.places_of(keys):
        if not target.may_link(storage):
            continue
        with contextlib.suppress(ExpstateError):
            source, _ = _read_source(storage)
            if source.manifest.id == snapshot_id:
                yield source


def _own_rank(manifest: Manifest, pg: Any = None) -> int:
    """The rank of this process, if the snapshot has one of that number, else the first."""
    rank = 0 if manifest.world_size == 1 else ranks.position(pg)[0]
    return rank if rank < manifest.world_size else 0


def _split_file(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The folder and the file that a path ending in ``.safetensors`` names; any other is a folder."""
    _, rest = registry.parse(path)
    text = os.fspath(path)
    if not rest.endswith(".safetensors"):
        return text, None
    folder, slash, name = rest.rpartition("/")
    return text.removesuffix(rest) + (folder or slash or "."), name


def _check_comparable(other: object) -> None:
    """Refuse what a snapshot cannot be compared with."""
    if isinstance(other, Snapshot):
        return
    if not isinstance(other, dict):
        hint = "; open it by Snapshot(...)" if isinstance(other, (str, os.PathLike)) else ""
        msg = f"a snapshot is compared with another Snapshot or with an app state, got {type(other).__name__}{hint}"
        raise InvalidArgumentError(msg)
    check_app_state(other)
    if not other:
        msg = "the app state has no keys, so nothing would be compared"
        raise InvalidArgumentError(msg)


def _time(text: str) -> dt.datetime:
    try:
        return dt.datetime.fromisoformat(text)
    except ValueError:
        return dt.datetime.fromtimestamp(0, dt.timezone.utc)
