"""A take from beginning to end: state gathered and flattened, laid out, moved, committed.

``Take`` does it in three steps, so that a caller can go on between them: ``gather`` looks at the state, ``write`` (or ``stage``
and later ``write_staged``) moves it, ``commit`` makes it exist. Whatever goes wrong, ``abort`` leaves the place as it was. On several
ranks each does all of this with its share; the first one has the lease and commits.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expstate import collector
from expstate._version import __version__
from expstate.engine import agreement, ancestry, crew, memory, merge, share
from expstate.engine.attempt import Attempt, FollowingAttempt
from expstate.engine.digest import box_digest
from expstate.engine.write import FilesWriter
from expstate.errors import AppStateError, TakeCancelledError, UnsupportedValueError
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.format.layout import BYTES, DataFile, Source, lay_out
from expstate.format.manifest import (
    DIGEST_BYTES,
    INLINE_BLOCKS,
    AliasEntry,
    Box,
    ContainerEntry,
    Entry,
    FileRecord,
    KeyRecord,
    Manifest,
    Metadata,
    ObjectEntry,
    TensorEntry,
    ValueEntry,
)
from expstate.format.validate import validate
from expstate.progress import Progress, ProgressOption
from expstate.state import tree
from expstate.state.objects import PickledObject, pickle_object
from expstate.state.stateful import RNGState, Stateful, preserved_rng
from expstate.state.tensors import ITEM_SIZES, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from expstate.engine.ranks import Ranks
    from expstate.storage.base import Storage


@dataclass(frozen=True, slots=True)
class TakeRequest:
    """What to take and where to, checked by the caller; ``provenance`` is asked when the manifest is written."""

    storage: Storage
    app_state: Mapping[str, Stateful]
    metadata: Metadata
    provenance: Callable[[], dict[str, Any]]
    overwrite: bool
    force: bool
    memory_budget_bytes: int | None
    progress: ProgressOption
    ranks: Ranks
    replicated: tuple[str, ...] = ()
    check_replicated: bool = False


_LEAVE_SECONDS = 10.0
"""So long the first rank waits for others to remove what they have written, when a take has failed."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_app_state(app_state: object) -> None:
    """Refuse what is not a dict of keys and statefuls.

    Raises
    ------
    AppStateError
        Naming the key and what is wrong with it.
    """
    if not isinstance(app_state, dict):
        msg = f"the app state must be a dict of keys and statefuls, got {type(app_state).__name__}"
        raise AppStateError(msg)
    for key, value in app_state.items():
        if not isinstance(key, str) or not key or _SURROGATE.search(key):
            msg = f"a key of the app state must be a text that is not empty and has no lone surrogates, got {key!r}"
            raise AppStateError(msg)
        if isinstance(value, type) or not isinstance(value, Stateful):
            msg = f"{key!r} is a {type(value).__name__} without state_dict() and load_state_dict(); wrap plain values in StateDict"
            raise AppStateError(msg)


def state_dicts(app_state: Mapping[str, Stateful]) -> dict[str, Any]:
    """The state dict of each stateful, in order. Random generators are read before the first and put back after the last."""
    with preserved_rng():
        captured = {key: value.state_dict() for key, value in app_state.items() if isinstance(value, RNGState)}
        return {key: captured[key] if key in captured else value.state_dict() for key, value in app_state.items()}


class Take:
    """One take.

    Parameters
    ----------
    request : TakeRequest
        What and where.

    Attributes
    ----------
    id : str
        Of the snapshot to be.
    total_bytes, done_bytes : int
        Bytes of its tensors and objects, and those that are written.
    needing_trust : list of (str, str)
        Paths of objects that only ``trust=True`` will bring back, and why.
    """

    def __init__(self, request: TakeRequest) -> None:
        self._request = request
        self._ranks = request.ranks
        self._storage = request.storage
        self._stop = crew.Stop()
        self._ranks.on_failure(self._stop.set)
        self.id = agreement.agree_on_id(request)
        self._attempt: Attempt | FollowingAttempt
        if self._ranks.is_first:
            self._attempt = Attempt(request.storage, self.id, "take")
        else:
            self._attempt = FollowingAttempt(request.storage, self.id, self._ranks)
        self._created_at = dt.datetime.now(dt.timezone.utc)
        self._begun = time.monotonic()
        self._looked_at = 0
        self._parent: str | None = None
        self._leaves: list[tree.Leaf] = []
        self._keys: list[KeyRecord] = []
        self._sources: list[torch.Tensor] = []
        self._addresses: list[int | None] = []
        self._placed: list[Source] = []
        self._devices: list[str] = []
        self._numbers_of: dict[str, range] = {}
        self._objects: dict[str, PickledObject] = {}
        self._types: dict[str, str] = {}
        self._of_all: dict[str, str] = {}
        self._files: list[DataFile] = []
        self._namer = names.FileNamer(self._attempt.token, self._ranks.rank if self._ranks.size > 1 else None)
        self._writers: list[FilesWriter] = []
        self._staging: memory.Staging | None = None
        self._progress: Progress | None = None
        self.total_bytes = 0
        self.done_bytes = 0
        self.needing_trust: list[tuple[str, str]] = []

    @property
    def name(self) -> str | None:
        """What people call it, if anything."""
        return self._request.metadata.name

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the app state, once they are gathered."""
        return tuple(record.key for record in self._keys)

    # What to write

    def gather(self) -> None:
        """Take hold of the place, then of the state: flattened, objects pickled, everything laid out."""
        self._attempt.begin(overwrite=self._request.overwrite, force=self._request.force)
        agreement.wait_for_first(self._ranks, "begun")
        self._looked_at = ancestry.moment()
        self._parent = ancestry.parent_of(self._request.app_state)
        states = state_dicts(self._request.app_state)
        with collector.paused():
            leaves = {key: tree.flatten(key, state) for key, state in states.items()}
            pieces = self._share(leaves)
            for key in states:
                stateful = type(self._request.app_state[key])
                self._keys.append(KeyRecord(key, f"{stateful.__module__}.{stateful.__qualname__}"))
                self._leaves += leaves[key]
                self._lay_out_key(key, leaves[key], pieces)
        self.total_bytes = sum(box.nbytes for file in self._files for box in file.boxes)
        # From here on their state is all that is needed: statefuls are not kept alive by a take that is still being written.
        self._request = dataclasses.replace(self._request, app_state={})

    def _share(self, leaves: Mapping[str, Sequence[tree.Leaf]]) -> dict[str, list[share.Piece]]:
        """What this rank writes of the arrays that others have too; their paths, with their devices, are noted in ``_of_all``."""
        ranks = self._ranks
        if ranks.size == 1 and not any(isinstance(leaf, tree.Sharded) for found in leaves.values() for leaf in found):
            return {}
        is_replicated = share.rule(self._request.app_state, self._request.replicated)
        everyone = range(ranks.size)
        holdings = share.Holdings()
        others: list[agreement.Told] = []
        for key, found in leaves.items():
            for leaf in found:
                if isinstance(leaf, tree.Sharded):
                    holders = [number for rank in leaf.holders if (number := ranks.group_rank(rank)) is not None]
                    holdings.add(leaf, holders)
                    self._of_all[leaf.path] = _device_name(leaf.parts[0].tensor) if leaf.parts else str(leaf.value.device)
                elif ranks.size == 1 or not is_replicated(key, leaf.path):
                    continue
                elif isinstance(leaf, tree.Array):
                    holdings.add(leaf, everyone)
                    self._of_all[leaf.path] = _device_name(leaf.tensor)
                elif isinstance(leaf, tree.Object):
                    self._of_all[leaf.path] = "cpu"
                    others.append(agreement.tell(leaf))
                elif self._request.check_replicated and not isinstance(leaf, tree.Alias):
                    others.append(agreement.tell(leaf))  # those that differ stay each rank's own, unless that is asked for
        agreement.check_alike(ranks, holdings, others, digests=self._request.check_replicated)
        return holdings.pieces(ranks.rank)

    def _lay_out_key(self, key: str, leaves: Sequence[tree.Leaf], pieces: Mapping[str, Sequence[share.Piece]]) -> None:
        sources: list[Source] = []
        tensors: list[torch.Tensor] = []
        addresses: list[int | None] = []
        for leaf in leaves:
            if isinstance(leaf, tree.Array) and leaf.path not in self._of_all:
                sources.append(_source(leaf))
                tensors.append(leaf.tensor)
                addresses.append(leaf.address)
            elif isinstance(leaf, (tree.Array, tree.Sharded)):
                for piece in pieces.get(leaf.path, ()):
                    sources.append(_piece_source(leaf, piece))
                    tensors.append(piece.tensor)
                    addresses.append(piece.address)
        aliases = [(leaf.path, leaf.target) for leaf in leaves if isinstance(leaf, tree.Alias)]
        if sources:
            self._add_files(key, sources, tensors, addresses, aliases)
        objects = [leaf for leaf in leaves if isinstance(leaf, tree.Object)]
        for leaf in objects:
            try:
                pickled = pickle_object(leaf.value)
            except UnsupportedValueError as error:
                msg = f"entry {leaf.path!r} cannot be stored: {error}"
                raise UnsupportedValueError(msg) from error
            self._objects[leaf.path] = pickled
            self._types[leaf.path] = f"{type(leaf.value).__module__}.{type(leaf.value).__qualname__}"
            if pickled.needs_trust:
                self.needing_trust.append((leaf.path, pickled.reason))
        objects = [leaf for leaf in objects if self._ranks.is_first or leaf.path not in self._of_all]
        if objects:
            # In a file of their own: the key's file holds its tensors and nothing else.
            stored = [self._objects[leaf.path].data for leaf in objects]
            sources = [Source(leaf.path, "uint8", (len(data),), 1) for leaf, data in zip(objects, stored, strict=True)]
            held = [_bytes_tensor(data) for data in stored]
            self._add_files(f"{key}.objects", sources, held, [tensor.data_ptr() for tensor in held])

    def _add_files(
        self,
        stem: str,
        sources: Sequence[Source],
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int | None],
        aliases: Sequence[tuple[str, str]] = (),
    ) -> None:
        first = len(self._sources)
        self._sources += tensors
        self._addresses += addresses
        self._placed += sources
        self._devices += ["cpu" if tensor.is_cpu else str(tensor.device) for tensor in tensors]
        for number, source in enumerate(sources, first):
            before = self._numbers_of.get(source.path)
            self._numbers_of[source.path] = range(number, number + 1) if before is None else range(before.start, number + 1)
        self._files += lay_out(stem, sources, aliases, self._namer, self._storage.data_file_bytes, first=first)

    # Moving

    def _writer(self, files: Sequence[DataFile], sources: Sequence[torch.Tensor], addresses: Sequence[int | None]) -> FilesWriter:
        ranks = self._ranks.local_size
        threads, budget = memory.means(self._storage, memory.budget_bytes(self._request.memory_budget_bytes, ranks), ranks)
        if self._staging is None:
            pinned_for = next((tensor.device.type for tensor in sources if not tensor.is_cpu), None)
            self._staging = memory.Staging(budget, threads, pinned_for)
            self._progress = Progress("take", self.total_bytes, self._request.progress if self._ranks.is_first else False)
        with collector.paused():
            # Progress counts the state; what is written after it, digests, is not part of what was promised.
            written = self._renewed if self._writers else self._written
            writer = FilesWriter(self._storage, files, sources, addresses, self._staging, threads, written, self._stop)
        self._writers.append(writer)
        return writer

    def _written(self, nbytes: int) -> None:
        self.done_bytes += nbytes
        if self._progress is not None:
            self._progress.add(nbytes)
        self._ranks.went_on()
        self._attempt.renew()

    def _renewed(self, nbytes: int) -> None:  # noqa: ARG002 - told as ``_written`` is
        self._ranks.went_on()
        self._attempt.renew()

    def write(self) -> None:
        """Stage, digest and write everything; the state must not change meanwhile."""
        self._writer(self._files, self._sources, self._addresses).write_now()

    def stage(self) -> None:
        """Copy everything, so that the state may change; what the budget does not hold at once is written meanwhile."""
        self._writer(self._files, self._sources, self._addresses).stage_all()
        # And now the copies are.
        self._sources = []
        self._leaves = [_without_values(leaf) for leaf in self._leaves]

    def write_staged(self) -> None:
        """Digest and write what ``stage`` has copied."""
        self._writers[0].finish_staged()

    # Making it exist

    def commit(self) -> tuple[Manifest, bytes] | None:
        """Write the digests that the manifest does not hold itself, then commit.

        Returns
        -------
        Manifest
            As it was written.
        bytes
            Its bytes.

        On another rank than the first, None, once the first has committed.
        """
        with collector.paused():
            boxes = self._boxes()
            files = tuple(file.record for file in self._files)
            entries = tuple(self._entry(leaf, boxes) for leaf in self._leaves)
        self._check_stopped()
        committed = self._commit_all(files, entries)
        self._close()
        ancestry.note((record.key for record in self._keys), self.id, self._looked_at)
        self._ranks.close()
        return committed

    def _commit_all(self, files: tuple[FileRecord, ...], entries: tuple[Entry, ...]) -> tuple[Manifest, bytes] | None:
        ranks = self._ranks
        if ranks.size > 1:
            merged = agreement.merge_parts(ranks, merge.RankPart(files, entries), self._attempt.renew)
            if merged is None:
                agreement.wait_for_first(ranks, "committed")
                self._attempt.finish()
                return None
            files, entries = merged
        with collector.paused():
            manifest = self._manifest(files, entries)
            if self._of_all:
                validate(manifest)  # ranks that do not hold all of a tensor are noticed here
            data = manifests.encode(manifest)
        self._check_stopped()
        ranks.decide_to_commit()
        assert isinstance(self._attempt, Attempt), "only the first rank commits"
        self._attempt.commit(data, {record.name: record.size for record in manifest.files})
        agreement.wait_for_first(ranks, "committed")
        self._attempt.finish()
        return manifest, data

    def _check_stopped(self) -> None:
        self._ranks.check()
        self._stop.check()

    def _boxes(self) -> dict[int, list[Box]]:
        """The boxes of each source as the manifest records them."""
        placed = [
            (number, box, digests)
            for number, (file, per_box) in enumerate(zip(self._files, self._writers[0].digests, strict=True))
            for box, digests in zip(file.boxes, per_box, strict=True)
        ]
        tables = self._write_tables([digests for _, _, digests in placed if len(digests) > INLINE_BLOCKS * DIGEST_BYTES])
        boxes: dict[int, list[Box]] = {}
        for number, box, digests in placed:
            blocks: bytes | tuple[int, int] | None = None
            if len(digests) > INLINE_BLOCKS * DIGEST_BYTES:
                blocks = tables.pop(0)
            elif len(digests) > DIGEST_BYTES:
                blocks = bytes(digests)
            starts = sizes = None
            placed_at, shape = self._placed[box.source].starts, self._placed[box.source].shape
            if box.rows is not None:
                first = 0 if placed_at is None else placed_at[0]
                starts = (first + box.rows[0], *((0,) * (len(shape) - 1) if placed_at is None else placed_at[1:]))
                sizes = (box.rows[1] - box.rows[0], *shape[1:])
            elif placed_at is not None:
                starts, sizes = placed_at, shape
            boxes.setdefault(box.source, []).append(Box(number, box.offset, box_digest(digests), blocks, starts, sizes))
        return boxes

    def _write_tables(self, tables: Sequence[bytearray]) -> list[tuple[int, int]]:
        """Write long lists of block digests to files of their own; where each lies."""
        if not tables:
            return []
        sources = [Source(f"digests/{index}", "uint8", (len(table),), 1) for index, table in enumerate(tables)]
        files = lay_out("digests", sources, (), self._namer, self._storage.data_file_bytes)
        held = [torch.frombuffer(table, dtype=torch.uint8) for table in tables]
        writer = self._writer(files, held, [tensor.data_ptr() for tensor in held])
        writer.write_now()
        places = {box.source: (len(self._files) + number, box.offset) for number, file in enumerate(files) for box in file.boxes}
        self._files += files
        return [places[index] for index in range(len(tables))]

    def _manifest(self, files: tuple[FileRecord, ...], entries: tuple[Entry, ...]) -> Manifest:
        return Manifest(
            format=manifests.FORMAT,
            id=self.id,
            created_at=self._created_at.isoformat(timespec="milliseconds"),
            writer=f"expstate {__version__}",
            requires=(),
            world_size=self._ranks.size,
            metadata=self._request.metadata,
            provenance=self._request.provenance(),
            parent=self._parent,
            duration_seconds=round(time.monotonic() - self._begun, 6),
            keys=tuple(self._keys),
            files=files,
            entries=entries,
        )

    def _entry(self, leaf: tree.Leaf, boxes: Mapping[int, list[Box]]) -> Entry:
        kind = type(leaf)
        path = leaf.path
        rank = None if self._ranks.size == 1 or path in self._of_all else self._ranks.rank
        if kind is tree.Array or kind is tree.Sharded:
            numbers = self._numbers_of.get(path, range(0))
            placed = tuple(boxes[numbers.start]) if len(numbers) == 1 else tuple(box for number in numbers for box in boxes[number])
            device = self._devices[numbers.start] if numbers else self._of_all[path]
            return TensorEntry(path, leaf.dtype, leaf.shape, placed, leaf.kind, leaf.requires_grad, device, rank)  # type: ignore[union-attr]
        if kind is tree.Value:
            return ValueEntry(path, leaf.encoded, rank)  # type: ignore[union-attr]
        if kind is tree.Container:
            return ContainerEntry(path, leaf.type, leaf.meta, rank)  # type: ignore[union-attr]
        if kind is tree.Alias:
            return AliasEntry(path, leaf.target, rank)  # type: ignore[union-attr]
        pickled = self._objects[path]
        written = tuple(boxes[self._numbers_of[path].start]) if path in self._numbers_of else ()
        return ObjectEntry(path, self._types[path], len(pickled.data), pickled.needs_trust, written, rank)

    # Ending

    def cancel(self) -> None:
        """Stop as soon as the threads notice; without effect once the commit has begun."""
        self._stop.set()

    def abort(self, error: BaseException | None = None) -> bool:
        """Remove what was written, unless it was committed; whether it was. Other ranks are told of the error."""
        self._stop.set()
        self._ranks.fail(TakeCancelledError("the take was cancelled") if error is None or isinstance(error, crew.StoppedError) else error)
        for writer in self._writers:
            writer.abort()
        if isinstance(self._attempt, Attempt) and self._ranks.size > 1:
            # Others remove their own; what is left of one that cannot is found by its name.
            self._ranks.wait_until_left(_LEAVE_SECONDS)
            self._attempt.note_files()
        self._attempt.abort([name for writer in self._writers for name in writer.created])
        self._close()
        self._ranks.close()
        return self._attempt.committed

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._staging is not None:
            self._staging.close()
        self._sources = []


def take_now(request: TakeRequest) -> tuple[Take, tuple[Manifest, bytes] | None]:
    """Take and wait for the commit.

    Returns
    -------
    Take
        With what there is to say about it.
    tuple of Manifest and bytes, or None
        As it was committed; None on another rank than the first.
    """
    take = Take(request)
    with collector.paused() as pause:
        try:
            take.gather()
            if take.total_bytes >= collector.LONG_BYTES:
                pause.end()
            take.write()
            return take, take.commit()
        except BaseException as error:
            take.abort(error)
            raise


def _source(leaf: tree.Array) -> Source:
    if leaf.kind == "numpy" and leaf.tensor.dtype == torch.uint8 and leaf.dtype != "|u1":
        native = _NUMPY_TO_TORCH.get(leaf.dtype)
        if native is not None:
            return Source(leaf.path, native, leaf.shape, torch.empty(0, dtype=getattr(torch, native)).element_size())
        return Source(leaf.path, BYTES, (leaf.tensor.numel(),), 1)
    if leaf.kind == "numpy":
        return Source(leaf.path, NAMES[leaf.tensor.dtype], leaf.shape, leaf.tensor.element_size())
    return Source(leaf.path, leaf.dtype, leaf.shape, ITEM_SIZES[leaf.dtype])


def _piece_source(leaf: tree.Array | tree.Sharded, piece: share.Piece) -> Source:
    if piece.starts is None and isinstance(leaf, tree.Array):
        return _source(leaf)
    tensor = piece.tensor
    return Source(leaf.path, NAMES[tensor.dtype], tuple(tensor.shape), tensor.element_size(), piece.starts)


def _device_name(tensor: torch.Tensor) -> str:
    return "cpu" if tensor.is_cpu else str(tensor.device)


_NUMPY_TO_TORCH = {
    "|b1": "bool",
    "|i1": "int8",
    "<i2": "int16",
    "<i4": "int32",
    "<i8": "int64",
    "<u2": "uint16",
    "<u4": "uint32",
    "<u8": "uint64",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "<c8": "complex64",
}


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _without_values(leaf: tree.Leaf) -> tree.Leaf:
    if isinstance(leaf, tree.Array):
        return tree.Array(leaf.path, leaf.kind, leaf.dtype, leaf.shape, torch.empty(0, device="cpu"), None, leaf.requires_grad)
    if isinstance(leaf, tree.Sharded):
        return tree.Sharded(leaf.path, leaf.kind, leaf.dtype, leaf.shape, (), (), None, leaf.requires_grad)
    if isinstance(leaf, tree.Container):
        return tree.Container(leaf.path, leaf.type, leaf.meta, None)
    if isinstance(leaf, tree.Value):
        return tree.Value(leaf.path, None, leaf.encoded)
    return tree.Alias(leaf.path, leaf.target, None) if isinstance(leaf, tree.Alias) else tree.Object(leaf.path, None)
