"""A take from beginning to end: state gathered and flattened, laid out, moved, committed.

``Take`` does it in three steps, so that a caller can go on between them: ``gather`` looks at the state, ``write`` (or ``stage``
and later ``write_staged``) moves it, ``commit`` makes it exist. Whatever goes wrong, ``abort`` leaves the place as it was.
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
from expstate.engine import ancestry, crew, memory
from expstate.engine.attempt import Attempt
from expstate.engine.digest import box_digest
from expstate.engine.write import FilesWriter
from expstate.errors import AppStateError, UnsupportedValueError
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
    KeyRecord,
    Manifest,
    Metadata,
    ObjectEntry,
    TensorEntry,
    ValueEntry,
)
from expstate.progress import Progress, ProgressOption
from expstate.state import tree
from expstate.state.objects import PickledObject, pickle_object
from expstate.state.stateful import RNGState, Stateful, preserved_rng
from expstate.state.tensors import ITEM_SIZES, NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
    memory_budget_bytes: int
    progress: ProgressOption


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
        self._storage = request.storage
        self._stop = crew.Stop()
        self.id = names.new_id()
        self._attempt = Attempt(request.storage, self.id, "take")
        self._created_at = dt.datetime.now(dt.timezone.utc)
        self._begun = time.monotonic()
        self._looked_at = 0
        self._parent: str | None = None
        self._leaves: list[tree.Leaf] = []
        self._keys: list[KeyRecord] = []
        self._sources: list[torch.Tensor] = []
        self._addresses: list[int | None] = []
        self._shapes: list[tuple[int, ...]] = []
        self._devices: list[str] = []
        self._number_of: dict[str, int] = {}
        self._objects: dict[str, PickledObject] = {}
        self._types: dict[str, str] = {}
        self._files: list[DataFile] = []
        self._namer = names.FileNamer(self._attempt.token)
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
        self._looked_at = ancestry.moment()
        self._parent = ancestry.parent_of(self._request.app_state)
        states = state_dicts(self._request.app_state)
        with collector.paused():
            for key, state in states.items():
                stateful = type(self._request.app_state[key])
                self._keys.append(KeyRecord(key, f"{stateful.__module__}.{stateful.__qualname__}"))
                leaves = tree.flatten(key, state)
                self._leaves += leaves
                self._lay_out_key(key, leaves)
        self.total_bytes = sum(box.nbytes for file in self._files for box in file.boxes)
        # From here on their state is all that is needed: statefuls are not kept alive by a take that is still being written.
        self._request = dataclasses.replace(self._request, app_state={})

    def _lay_out_key(self, key: str, leaves: Sequence[tree.Leaf]) -> None:
        arrays = [leaf for leaf in leaves if isinstance(leaf, tree.Array)]
        aliases = [(leaf.path, leaf.target) for leaf in leaves if isinstance(leaf, tree.Alias)]
        sources = [_source(leaf) for leaf in arrays]
        if sources:
            self._add_files(key, sources, [leaf.tensor for leaf in arrays], [leaf.address for leaf in arrays], aliases)
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
        self._shapes += [source.shape for source in sources]
        self._devices += ["cpu" if tensor.is_cpu else str(tensor.device) for tensor in tensors]
        self._number_of |= {source.path: first + index for index, source in enumerate(sources)}
        self._files += lay_out(stem, sources, aliases, self._namer, self._storage.data_file_bytes, first=first)

    # Moving

    def _writer(self, files: Sequence[DataFile], sources: Sequence[torch.Tensor], addresses: Sequence[int | None]) -> FilesWriter:
        threads, budget = memory.means(self._storage, self._request.memory_budget_bytes)
        if self._staging is None:
            pinned_for = next((tensor.device.type for tensor in sources if not tensor.is_cpu), None)
            self._staging = memory.Staging(budget, threads, pinned_for)
            self._progress = Progress("take", self.total_bytes, self._request.progress)
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
        self._attempt.renew()

    def _renewed(self, nbytes: int) -> None:  # noqa: ARG002 - told as ``_written`` is
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

    def commit(self) -> tuple[Manifest, bytes]:
        """Write the digests that the manifest does not hold itself, then commit.

        Returns
        -------
        Manifest
            As it was written.
        bytes
            Its bytes.
        """
        with collector.paused():
            boxes = self._boxes()
            manifest = self._manifest(boxes)
            data = manifests.encode(manifest)
        self._stop.check()
        self._attempt.commit(data, {record.name: record.size for record in manifest.files})
        self._attempt.finish()
        self._close()
        ancestry.note((record.key for record in manifest.keys), manifest.id, self._looked_at)
        return manifest, data

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
            if box.rows is not None:
                shape = self._shapes[box.source]
                starts = (box.rows[0], *(0 for _ in shape[1:]))
                sizes = (box.rows[1] - box.rows[0], *shape[1:])
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

    def _manifest(self, boxes: Mapping[int, list[Box]]) -> Manifest:
        return Manifest(
            format=manifests.FORMAT,
            id=self.id,
            created_at=self._created_at.isoformat(timespec="milliseconds"),
            writer=f"expstate {__version__}",
            requires=(),
            world_size=1,
            metadata=self._request.metadata,
            provenance=self._request.provenance(),
            parent=self._parent,
            duration_seconds=round(time.monotonic() - self._begun, 6),
            keys=tuple(self._keys),
            files=tuple(file.record for file in self._files),
            entries=tuple(self._entry(leaf, boxes) for leaf in self._leaves),
        )

    def _entry(self, leaf: tree.Leaf, boxes: Mapping[int, list[Box]]) -> Entry:
        kind = type(leaf)
        path = leaf.path
        if kind is tree.Array:
            number = self._number_of[path]
            placed = tuple(boxes[number])
            return TensorEntry(path, leaf.dtype, leaf.shape, placed, leaf.kind, leaf.requires_grad, self._devices[number])  # type: ignore[union-attr]
        if kind is tree.Value:
            return ValueEntry(path, leaf.encoded)  # type: ignore[union-attr]
        if kind is tree.Container:
            return ContainerEntry(path, leaf.type, leaf.meta)  # type: ignore[union-attr]
        if kind is tree.Alias:
            return AliasEntry(path, leaf.target)  # type: ignore[union-attr]
        pickled = self._objects[path]
        return ObjectEntry(path, self._types[path], len(pickled.data), pickled.needs_trust, tuple(boxes[self._number_of[path]]))

    # Ending

    def cancel(self) -> None:
        """Stop as soon as the threads notice; without effect once the commit has begun."""
        self._stop.set()

    def abort(self) -> bool:
        """Remove what was written, unless it was committed; whether it was."""
        self._stop.set()
        for writer in self._writers:
            writer.abort()
        self._attempt.abort([name for writer in self._writers for name in writer.created])
        self._close()
        return self._attempt.committed

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._staging is not None:
            self._staging.close()
        self._sources = []


def take_now(request: TakeRequest) -> tuple[Take, Manifest, bytes]:
    """Take and wait for the commit.

    Returns
    -------
    Take
        With what there is to say about it.
    Manifest
        As it was committed.
    bytes
        Its bytes.
    """
    take = Take(request)
    with collector.paused() as pause:
        try:
            take.gather()
            if take.total_bytes >= collector.LONG_BYTES:
                pause.end()
            take.write()
            return (take, *take.commit())
        except BaseException:
            take.abort()
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
    if isinstance(leaf, tree.Container):
        return tree.Container(leaf.path, leaf.type, leaf.meta, None)
    if isinstance(leaf, tree.Value):
        return tree.Value(leaf.path, None, leaf.encoded)
    return tree.Alias(leaf.path, leaf.target, None) if isinstance(leaf, tree.Alias) else tree.Object(leaf.path, None)
