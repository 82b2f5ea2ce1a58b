"""``Reader``: ``torch.distributed.checkpoint`` loads from a snapshot, of whatever ranks and however it was taken.

DCP's planner says which box of which tensor goes into which memory; these boxes are read straight into it, and nothing else is.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from expstate import collector
from expstate.engine import ancestry, attempt, fetch, memory, ranks
from expstate.engine.source import SnapshotSource
from expstate.errors import EntryNotFoundError, ExpstateError, InvalidArgumentError, RestoreMismatchError
from expstate.format.manifest import Manifest, TensorEntry, ValueEntry
from expstate.format.validate import validate
from expstate.interop.names import TOP_TYPE, Named, Names
from expstate.state import paths, tensors
from expstate.state.values import decode
from expstate.storage import registry

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from expstate.engine.read import Read
    from expstate.storage.base import Storage


class Reader(StorageReader):
    """Lets ``torch.distributed.checkpoint`` load a snapshot, whether ``Snapshot.take`` or a ``Writer`` has made it.

    The entry ``model/encoder.0.weight`` goes by the name ``model.encoder.0.weight``, so that a state dict ``{"model": ...}`` finds it.
    Tensors are read in place, checked block by block: of a DTensor of any placements only what is on this rank. Other values are
    put into the state dict by DCP's planner.

    Parameters
    ----------
    path : str or os.PathLike, optional
        The snapshot's folder; default the ``checkpoint_id`` that is given to ``dcp.load``, which always wins.
    key : str, optional
        The key whose contents stand at the top of the state dict, as in ``dcp.load(model.state_dict(), ...)``; default what a ``Writer``
        has found there.
    storage_options : dict, optional
        What the storage needs to connect.
    rank : int, optional
        Whose, where each rank has values of its own; default this process's, or the first's.
    verify : bool, default True
        Whether to check digests.
    trust : bool, default False
        Whether objects that need pickle may run code.
    memory_budget_bytes : int, optional
        Most extra host memory to use.

    Notes
    -----
    ``dcp.load`` raises ``CheckpointException``, whose ``failures`` hold the errors of each rank.

    Examples
    --------
    >>> import tempfile, torch, warnings
    >>> import torch.distributed.checkpoint as dcp
    >>> from expstate import Snapshot
    >>> from expstate.interop.dcp import Reader
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(2, 1)
    >>> snapshot = Snapshot.take(f"{folder.name}/step-1", {"model": model})
    >>> again = torch.nn.Linear(2, 1)
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # torch warns that this is one process
    ...     dcp.load({"model": again}, storage_reader=Reader(snapshot.path))
    ...     dcp.load(again.state_dict(), storage_reader=Reader(snapshot.path, key="model"))
    >>> torch.equal(model.weight, again.weight)
    True
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        key: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        rank: int | None = None,
        verify: bool = True,
        trust: bool = False,
        memory_budget_bytes: int | None = None,
    ) -> None:
        super().__init__()
        memory.budget_bytes(memory_budget_bytes)
        self._path = path
        self._key = key
        self._storage_options = storage_options
        self._rank = rank
        self._verify = verify
        self._trust = trust
        self._memory_budget_bytes = memory_budget_bytes
        self._source: SnapshotSource | None = None
        self._names = Names((), None)
        if path is not None:
            registry.open_storage(path, storage_options)

    # What DCP calls, in this order

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, from another path if one is given."""
        self._source = None
        if checkpoint_id:
            self._path = checkpoint_id

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:  # noqa: ARG002 - DCP's signature; it looks for "kwargs", to ask for each rank's
        """What is in the snapshot, in DCP's terms: each tensor is one chunk, whatever boxes it lies in."""
        if not self._path:
            msg = "there is no path: pass one to Reader, or checkpoint_id to dcp.load"
            raise InvalidArgumentError(msg)
        with collector.paused():
            source = _open(registry.open_storage(self._path, self._storage_options), self._rank)
            self._source, self._names = source, Names(source.entries, _top(source.manifest, self._key))
            found = self._names.found
            return Metadata(
                state_dict_metadata={name: _described(named) for name, named in found.items()},
                planner_data={name: named.place for name, named in found.items()},
                storage_data={},
            )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Refuse what cannot be read, before anything is."""
        asked = dict.fromkeys(item.storage_index.fqn for item in plan.items)
        ambiguous = [name for name in asked if name in self._names.ambiguous]
        if ambiguous:
            msg = f"several entries of the snapshot at {self._path!r} go by the name {ambiguous[0]!r}"
            raise RestoreMismatchError(msg)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of this rank: values first, which may be refused, then tensors."""
        source = self._source
        assert source is not None, "the metadata was read"
        budget = memory.budget_bytes(self._memory_budget_bytes)
        values = [(item, self._value(source, item, budget)) for item in plan.items if item.type == LoadItemType.BYTE_IO]
        boxes = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        tensors_here = self._read(source, [(item, planner.resolve_tensor(item).detach()) for item in boxes], budget)
        for item, tensor in zip(boxes, tensors_here, strict=True):
            planner.commit_tensor(item, tensor)
        for item, value in values:
            data = io.BytesIO()
            torch.save(value, data)
            data.seek(0)
            planner.load_bytes(item, data)
        ancestry.note({str(self._named(item).place[0]) for item in plan.items}, source.manifest.id)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a path or URL that a snapshot can be at."""
        try:
            registry.parse(checkpoint_id)
        except ExpstateError:
            return False
        return True

    # Reading

    def _named(self, item: ReadItem) -> Named:
        name = item.storage_index.fqn
        try:
            return self._names.found[name]
        except KeyError:
            msg = f"nothing in the snapshot at {self._path!r} goes by the name {name!r}"
            raise EntryNotFoundError(msg) from None

    def _value(self, source: SnapshotSource, item: ReadItem, budget: int) -> Any:
        entry = self._named(item).entry
        if isinstance(entry, ValueEntry):
            return decode(entry.value)
        return fetch.read_tree(source, entry.path, device=None, trust=self._trust, verify=self._verify, budget=budget)

    def _read(self, source: SnapshotSource, targets: Sequence[tuple[ReadItem, torch.Tensor]], budget: int) -> list[torch.Tensor]:
        """Read boxes into the memory that the planner gives, all of which has been checked before the first is read."""
        wanted: list[tuple[TensorEntry, tuple[int, ...], torch.Tensor]] = []
        numbers: set[int] = set()
        for item, tensor in targets:
            entry = self._named(item).entry
            if not isinstance(entry, TensorEntry) or not self._named(item).is_tensor:
                msg = f"entry {entry.path!r} is no tensor in the snapshot, and one in the state dict"
                raise RestoreMismatchError(msg)
            starts = tuple(item.storage_offsets)
            _check(entry, item, tensor)
            wanted.append((entry, starts, tensor))
            numbers |= source.files_of_regions(entry, [(starts, tuple(tensor.shape))])
        with source.opened(numbers) as opened:
            reads: list[Read] = []
            with collector.paused():
                for entry, starts, tensor in wanted:
                    dtype = tensors.DTYPES[entry.dtype]
                    reads += opened.region_reads(entry, starts, tensor, None if dtype == tensor.dtype else dtype)
            fetch.read_all(opened, reads, budget, verify=self._verify)
        return [tensor for _, _, tensor in wanted]


def _check(entry: TensorEntry, item: ReadItem, tensor: torch.Tensor) -> None:
    """See that a box of the snapshot goes into the memory for it."""
    lengths, starts = tuple(item.lengths), tuple(item.storage_offsets)
    is_inside = len(starts) == len(entry.shape) and all(
        start >= 0 and start + length <= whole for start, length, whole in zip(starts, lengths, entry.shape, strict=True)
    )
    if not is_inside or tuple(tensor.shape) != lengths:
        msg = (
            f"entry {entry.path!r} has shape {entry.shape} in the snapshot, and its box of shape {lengths} at {starts} goes into a tensor "
            f"of shape {tuple(tensor.shape)}"
        )
        raise RestoreMismatchError(msg)
    if not tensors.is_writable_in_place(tensor):
        msg = f"entry {entry.path!r}: elements of the tensor in the state dict share memory, so values cannot be read into it"
        raise RestoreMismatchError(msg)


def _open(storage: Storage, rank: int | None) -> SnapshotSource:
    manifest, data = attempt.read_manifest(storage)
    validate(manifest)
    if rank is None:
        own = ranks.position(None)[0]
        rank = own if own < manifest.world_size else 0
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < manifest.world_size:
        msg = f"rank must be one of the {manifest.world_size} that took the snapshot, got {rank!r}"
        raise InvalidArgumentError(msg)
    return SnapshotSource(storage, manifest, data, rank)


def _top(manifest: Manifest, key: str | None) -> str | None:
    """The key whose contents stand at the top."""
    if key is None:
        return next((record.key for record in manifest.keys if record.type == TOP_TYPE), None)
    if all(record.key != key for record in manifest.keys):
        known = ", ".join(paths.printable(record.key) for record in manifest.keys)
        msg = f"no key {key!r} in the snapshot (it has: {known})"
        raise EntryNotFoundError(msg)
    return key


def _described(named: Named) -> TensorStorageMetadata | BytesStorageMetadata:
    if not named.is_tensor:
        return BytesStorageMetadata()
    entry = named.entry
    assert isinstance(entry, TensorEntry)
    size = torch.Size(entry.shape)
    whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(properties=TensorProperties(dtype=tensors.DTYPES[entry.dtype]), size=size, chunks=[whole])
