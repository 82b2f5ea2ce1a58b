"""``Writer``: what ``torch.distributed.checkpoint`` saves becomes a snapshot.

Every rank writes the items of its plan into data files of its own, and tells the coordinator by the results that DCP gathers anyway what
it has written. The coordinator puts that together and commits. Nothing here communicates.
"""

from __future__ import annotations

import dataclasses
import socket
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from expstate import collector
from expstate.engine import memory, merge, ranks
from expstate.engine.attempt import Attempt
from expstate.engine.lease import boot_id
from expstate.engine.part import warn_of_trust
from expstate.errors import ExpstateError, InvalidArgumentError, RankFailedError, SnapshotWriteError, UnsupportedValueError
from expstate.format import names
from expstate.format.metadata import make_metadata
from expstate.interop.commit import Commission, Given, RankAttempt, Shards, add_key
from expstate.interop.names import TOP_KEY, Place, entry_path, place_of
from expstate.state import paths
from expstate.state.objects import unpickle_object
from expstate.state.sharding import Part
from expstate.storage import registry

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from torch.distributed.checkpoint.metadata import Metadata

    from expstate.catalog.origin import CatalogOption


@dataclass(frozen=True, slots=True)
class _Host:
    """What a rank's plan tells the coordinator: its machine."""

    name: str


@dataclass(frozen=True, slots=True)
class _Seat:
    """What the coordinator's plan tells a rank: its number, how many there are, and how many of them are on its machine."""

    rank: int
    size: int
    local_ranks: int


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank tells the coordinator in the end: its part, as ``merge.encode`` gives it, or why there is none."""

    seat: _Seat
    token: str
    part: bytes
    error: str = ""


class Writer(StorageWriter):
    """Lets ``torch.distributed.checkpoint`` save a snapshot.

    The state dict ``{"model": ..., "optim": ...}`` becomes the keys ``model`` and ``optim``; dicts and lists in it come back as they were,
    so that ``Snapshot(path).restore``, ``read_object`` and ``get_state_dict_for_key`` read it as if it had been taken. Values that stand at
    the top of the state dict, as in ``dcp.save(model.state_dict(), ...)``, go under one key, ``state`` if no other is given. DCP itself
    makes texts of all keys of dicts, drops empty dicts, and keeps of what is no tensor the value of one rank; the numbers that key the
    state of an optimizer are put back.

    On several ranks all make one with the same arguments. The first holds the place and commits; if a rank fails, all raise, and nothing
    is left; what a killed one leaves, ``expstate.gc`` removes. It works in the thread and in the process of ``dcp.async_save``, with any
    process group, and with none. A planner that makes new tensors has all of them in memory while they are written. The ``async_save`` of
    torch versions without ``async_stager`` copies nothing that lies on the host, whatever the writer: change it when the future is done.

    Parameters
    ----------
    path : str or os.PathLike, optional
        A folder to make, or one without a snapshot in it; default the ``checkpoint_id`` that is given to ``dcp.save``, which always wins.
    key : str, default "state"
        The key for what stands at the top of the state dict.
    storage_options, name, tags, params, metrics, note, step, overwrite, force, memory_budget_bytes, catalog
        As for ``Snapshot.take``.

    Raises
    ------
    InvalidNameError, InvalidMetadataError, InvalidArgumentError
        If one of them cannot be recorded.

    Notes
    -----
    ``dcp.save`` raises ``CheckpointException``, whose ``failures`` hold the errors of each rank: those of ``Snapshot.take``, and
    ``RankFailedError`` where one failed while it wrote.

    Examples
    --------
    >>> import tempfile, torch, warnings
    >>> import torch.distributed.checkpoint as dcp
    >>> from expstate import Snapshot
    >>> from expstate.interop.dcp import Writer
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = torch.nn.Linear(2, 1)
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # torch warns that this is one process
    ...     _ = dcp.save({"model": model, "epoch": 3}, storage_writer=Writer(f"{folder.name}/step-1", step=1))
    >>> snapshot = Snapshot(f"{folder.name}/step-1")
    >>> snapshot.keys(), snapshot.read_object("state/epoch")
    (('model', 'state'), 3)
    >>> snapshot.restore({"model": torch.nn.Linear(2, 1)}).restored
    ('model/weight', 'model/bias')
    >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        key: str = TOP_KEY,
        storage_options: Mapping[str, Any] | None = None,
        name: str | None = None,
        tags: Iterable[str] = (),
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        note: str | None = None,
        step: int | None = None,
        overwrite: bool = False,
        force: bool = False,
        memory_budget_bytes: int | None = None,
        catalog: CatalogOption = None,
    ) -> None:
        super().__init__()
        if not isinstance(key, str) or not key or names.has_lone_surrogates(key):
            msg = f"key must be a text that is not empty, got {key!r}"
            raise InvalidArgumentError(msg)
        tags = tags if isinstance(tags, str) or not hasattr(tags, "__iter__") else tuple(tags)
        make_metadata(name=name, tags=tags, params=params, metrics=metrics, note=note, step=step)
        memory.budget_bytes(memory_budget_bytes)
        self._given = Given(
            path="" if path is None else path,
            key=key,
            storage_options=storage_options,
            name=name,
            tags=tags,
            params=params,
            metrics=metrics,
            note=note,
            step=step,
            overwrite=overwrite,
            force=force,
            memory_budget_bytes=memory_budget_bytes,
            catalog=catalog,
        )
        if path is not None:
            registry.open_storage(path, storage_options)
        self._commission: Commission | None = None
        self._abandon: weakref.finalize[Any, Writer] | None = None

    # What DCP calls, in this order

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins, to another path if one is given."""
        self._give_up()
        if checkpoint_id:
            self._given = dataclasses.replace(self._given, path=checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002 - DCP's signature
        self._give_up()
        if not kwargs.get("use_collectives", True) and ranks.position(None)[1] > 1:
            msg = "several ranks write one snapshot, whose manifest one of them commits: use_collectives=False is not possible"
            raise InvalidArgumentError(msg)
        if not self._given.path:
            msg = "there is no path: pass one to Writer, or checkpoint_id to dcp.save"
            raise InvalidArgumentError(msg)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return dataclasses.replace(plan, storage_data=_Host(boot_id() or socket.gethostname()))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: take hold of the place, and give each rank its seat."""
        commission = Commission(self._given)
        self._commission = commission
        self._abandon = weakref.finalize(self, commission.abort, ())
        commission.begin()
        hosts = [plan.storage_data.name if isinstance(plan.storage_data, _Host) else str(number) for number, plan in enumerate(plans)]
        seats = [_Seat(rank, len(plans), hosts.count(host)) for rank, host in enumerate(hosts)]
        return [dataclasses.replace(plan, storage_data=seat) for plan, seat in zip(plans, seats, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of this rank."""
        seat = plan.storage_data
        if not isinstance(seat, _Seat):
            msg = f"the planner {type(planner).__name__} has dropped what the plan says of the storage"
            raise InvalidArgumentError(msg)
        if seat.size == 1:
            try:
                written = self._write(plan, planner, seat)
            except BaseException:
                self._give_up()
                raise
        else:
            written = self._write_or_tell(plan, planner, seat)
        index = plan.items[0].index if plan.items else MetadataIndex("")
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(index, len(written.part), written)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: commit what all ranks have written."""
        commission = self._commission
        assert commission is not None, "the place is held since prepare_global_plan"
        written = [result.storage_data for of_rank in results for result in of_rank if isinstance(result.storage_data, _Written)]
        written.sort(key=lambda one: one.seat.rank)
        others = [one.token for one in written if one.token not in {"", commission.attempt.token}]
        try:
            _check(written, len(results))
            commission.commit([merge.decode(one.part) for one in written], _places(metadata), others)
        except BaseException:
            commission.abort((), others)
            raise
        finally:
            self._give_up()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a path or URL that a snapshot can be at."""
        try:
            registry.parse(checkpoint_id)
        except ExpstateError:
            return False
        return True

    # The work of a rank

    def _write(self, plan: SavePlan, planner: SavePlanner, seat: _Seat) -> _Written:
        commission = self._commission
        if commission is not None:
            storage, attempt = commission.storage, commission.attempt
        else:
            storage = registry.open_storage(self._given.path, self._given.storage_options)
            attempt = Attempt(storage, names.new_id(), "take")
            attempt.hold()
        work = RankAttempt(storage, attempt, seat.rank, seat.size, seat.local_ranks, self._given.memory_budget_bytes)
        try:
            for key, items in _by_key(plan, self._given.key).items():
                _add(work, key, items, planner)
            part = work.write()
        except BaseException:
            work.abort()
            raise
        warn_of_trust(work.part.needing_trust, stacklevel=2)
        return _Written(seat, attempt.token, merge.encode(part))

    def _write_or_tell(self, plan: SavePlan, planner: SavePlanner, seat: _Seat) -> _Written:
        """The coordinator has to hear of a failure from the rank itself: what DCP raises for it, it does not tell the writer."""
        try:
            return self._write(plan, planner, seat)
        except BaseException as error:  # noqa: BLE001 - raised on all ranks, by finish
            return _Written(seat, "", b"", f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)

    def _give_up(self) -> None:
        """What an earlier save has begun and not ended is removed."""
        if self._abandon is not None:
            self._abandon()
        self._abandon = self._commission = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_commission": None, "_abandon": None}


def _check(written: list[_Written], size: int) -> None:
    """Raise what has happened on a rank."""
    for one in written:
        if one.error:
            msg = f"rank {one.seat.rank} failed: {one.error}"
            raise RankFailedError(msg, one.seat.rank)
    if [one.seat.rank for one in written] != list(range(size)):
        msg = f"{size} ranks save, and {len(written)} have said what they wrote"
        raise SnapshotWriteError(msg)


def _places(metadata: Metadata) -> list[Place]:
    """The places of all values, in the order of the state dict."""
    mapping = metadata.planner_data
    known = metadata.state_dict_metadata
    ordered = [name for name in mapping if name in known] if isinstance(mapping, dict) else []
    return [place_of(name, mapping) for name in dict.fromkeys((*ordered, *known))]


def _by_key(plan: SavePlan, top: str) -> dict[str, list[tuple[str, WriteItem]]]:
    """The items of each key, each with the path of its entry."""
    found: dict[str, list[tuple[str, WriteItem]]] = {}
    for item in plan.items:
        path = entry_path(place_of(item.index.fqn, plan.planner_data), top)
        found.setdefault(paths.key_of(path), []).append((path, item))
    return found


def _add(work: RankAttempt, key: str, items: list[tuple[str, WriteItem]], planner: SavePlanner) -> None:
    """Give the writer the items of one key."""
    with collector.paused():
        shards: dict[str, Shards] = {}
        for path, item in items:
            if item.type == WriteItemType.SHARD:
                assert item.tensor_data is not None
                found = shards.setdefault(path, Shards(tuple(item.tensor_data.size), []))
                found.parts.append(_shard(item, path, planner))
        wholes = ((path, _value(item, path, planner)) for path, item in items if item.type != WriteItemType.SHARD)
        add_key(work.part, key, wholes, shards)


def _shard(item: WriteItem, path: str, planner: SavePlanner) -> Part:
    assert item.tensor_data is not None
    tensor: Any = planner.resolve_data(item)
    chunk = item.tensor_data.chunk
    if tensor.shape != chunk.sizes:
        msg = f"entry {path!r} has a shard of shape {tuple(tensor.shape)}, and its plan says {tuple(chunk.sizes)}"
        raise UnsupportedValueError(msg)
    return Part(tuple(chunk.offsets), tuple(chunk.sizes), tensor.detach())


def _value(item: WriteItem, path: str, planner: SavePlanner) -> Any:
    """A whole tensor, or what is no tensor: the object itself where the planner is one of torch's, which would pickle it."""
    if item.type == WriteItemType.TENSOR:
        return planner.resolve_data(item)
    is_plain = getattr(type(planner), "transform_object", None) is DefaultSavePlanner.transform_object
    if is_plain and isinstance(planner, DefaultSavePlanner):
        return planner.lookup_object(item.index)
    data: Any = planner.resolve_data(item)
    try:
        return unpickle_object(data.getvalue(), trust=False)
    except ExpstateError as error:
        msg = f"entry {path!r}, as {type(planner).__name__} transforms it, is no plain value: {error}"
        raise UnsupportedValueError(msg) from error
