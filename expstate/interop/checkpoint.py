"""Checkpoint folders of ``torch.distributed.checkpoint``, read without it: what is in them, and where.

Its ``.metadata`` is a pickle. It is read with stand-ins for DCP's own classes and nothing else, unless it is trusted; then everything that
it says is checked.
"""

from __future__ import annotations

import mmap
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expstate.errors import CheckpointFormatError, PickleNotAllowedError, SnapshotNotFoundError
from expstate.format import manifest as manifests
from expstate.interop import archives, pickles
from expstate.interop.names import Place, place_of
from expstate.state import tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

METADATA = ".metadata"
_PACKAGE = "torch.distributed.checkpoint"
_OLD_PROPERTIES = "torch.distributed._shard.sharded_tensor.metadata"
_RECORDS = {
    f"{_PACKAGE}.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    ),
    f"{_PACKAGE}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    _OLD_PROPERTIES: ("TensorProperties",),
}
_PATHS = tuple(
    (module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix", "Windows", "PureWindows")
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, or all of a value: where it begins in the whole, its sizes, and the archive that holds it."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Item:
    """A value of a checkpoint: its name, its place in nested dicts and lists, and its chunks; of a tensor, dtype and shape."""

    name: str
    place: Place
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Checkpoint:
    """A checkpoint folder.

    Parameters
    ----------
    folder : str or os.PathLike
        On a disk of this machine.
    trust : bool
        Whether its pickles may run code.

    Attributes
    ----------
    items : list of Item
        What is in it, in the order of the state dict.

    Raises
    ------
    SnapshotNotFoundError
        If there is no checkpoint.
    PickleNotAllowedError
        If its metadata needs trust, and there is none.
    CheckpointFormatError
        If its metadata cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], *, trust: bool) -> None:
        self._folder = Path(folder)
        self._trust = trust
        self._files: dict[str, mmap.mmap] = {}
        try:
            self.items = list(_items(_read_metadata(self._folder / METADATA, trust=trust)))
        except CheckpointFormatError as error:
            msg = f"the file {METADATA} of the checkpoint at {str(folder)!r} cannot be read: {error}"
            raise CheckpointFormatError(msg) from error

    def tensor(self, item: Item, chunk: Chunk) -> torch.Tensor:
        """A box of a tensor, as a view of its file where it is strided."""
        mapped = self._open(item, chunk)
        try:
            found: Any = archives.read_tensor(mapped, chunk.offset, chunk.length)
            if found is None:
                found = archives.read_value(mapped, chunk.offset, chunk.length, trust=self._trust)
        except (CheckpointFormatError, PickleNotAllowedError) as error:
            raise self._told(item, error) from error
        if not isinstance(found, torch.Tensor) or found.dtype != item.dtype or tuple(found.shape) != chunk.sizes:
            what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
            msg = f"{item.name!r} of the checkpoint should be {item.dtype} {chunk.sizes} at {chunk.starts}, and is {what}"
            raise CheckpointFormatError(msg)
        return found

    def value(self, item: Item) -> Any:
        """What is no tensor."""
        (chunk,) = item.chunks
        try:
            return archives.read_value(self._open(item, chunk), chunk.offset, chunk.length, trust=self._trust)
        except (CheckpointFormatError, PickleNotAllowedError) as error:
            raise self._told(item, error) from error

    @staticmethod
    def _told(item: Item, error: Exception) -> Exception:
        return type(error)(f"{item.name!r} of the checkpoint: {error}")

    def _open(self, item: Item, chunk: Chunk) -> mmap.mmap:
        if chunk.file not in self._files:
            try:
                number = os.open(self._folder / chunk.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    # Private and writable: torch wants it so, and nothing writes to it.
                    self._files[chunk.file] = mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
                finally:
                    os.close(number)
            except (OSError, ValueError) as error:
                msg = f"{item.name!r} of the checkpoint lies in file {chunk.file!r}, which cannot be opened: {error}"
                raise CheckpointFormatError(msg) from error
        mapped = self._files[chunk.file]
        if chunk.offset + chunk.length > len(mapped):
            end = chunk.offset + chunk.length
            msg = f"{item.name!r} of the checkpoint ends at {end:,} of file {chunk.file!r}, which has {len(mapped):,} bytes"
            raise CheckpointFormatError(msg)
        return mapped


# The metadata


def _read_metadata(path: Path, *, trust: bool) -> Any:
    try:
        with open(path, "rb") as file:
            data = file.read(manifests.MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        folder = str(path.parent)
        hint = "; each rank has saved for itself (use_collectives=False)" if list(path.parent.glob(f"__*{METADATA}")) else ""
        msg = f"no checkpoint of {_PACKAGE} at {folder!r}: there is no file {METADATA!r} in it{hint}"
        raise SnapshotNotFoundError(msg) from None
    if len(data) > manifests.MAX_BYTES:
        msg = f"it has more than {manifests.MAX_BYTES:,} bytes"
        raise CheckpointFormatError(msg)
    if trust:
        try:
            return pickle.loads(data)  # noqa: S301 - trusted
        except Exception as error:
            msg = f"{type(error).__name__}: {error}"
            raise CheckpointFormatError(msg) from error
    try:
        return pickles.read(data, _metadata_table())
    except PickleNotAllowedError as error:
        what = f"the file {METADATA} of the checkpoint at {str(path.parent)!r} is a pickle, and {error}"
        msg = f"{what}, which is none of DCP's own classes; pass trust=True to let it run code, if you trust who wrote it"
        raise PickleNotAllowedError(msg) from error


def _metadata_table() -> pickles.Table:
    def nothing(*parts: Any) -> None:
        """For what is not looked at."""

    def size(numbers: Any) -> tuple[Any, ...]:
        return tuple(numbers)

    table: pickles.Table = {(module, name): pickles.record_class(name) for module, found in _RECORDS.items() for name in found}
    table |= dict.fromkeys(_PATHS, nothing)
    table |= {
        (f"{_PACKAGE}.metadata", "_MEM_FORMAT_ENCODING"): nothing,
        (_OLD_PROPERTIES, "MEM_FORMAT_ENCODING"): nothing,
        ("torch.serialization", "_get_layout"): nothing,
        ("torch", "Size"): size,
        ("collections", "OrderedDict"): dict,
        **{("torch", name): name for name in tensors.DTYPES},
    }
    return table


def _fields(value: Any, *names: str) -> list[Any]:
    """Attributes of an object of DCP's, or of its stand-in."""
    found = value.fields if isinstance(value, pickles.Record) else getattr(value, "__dict__", {})
    missing = [name for name in names if name not in found]
    if missing:
        msg = f"it has a {type(value).__name__} without {missing[0]!r}"
        raise CheckpointFormatError(msg)
    return [found[name] for name in names]


def _items(metadata: Any) -> Iterator[Item]:
    described, mapping, storage = _fields(metadata, "state_dict_metadata", "planner_data", "storage_data")
    if not isinstance(described, dict) or not isinstance(storage, dict) or not all(type(name) is str for name in described):
        msg = "it does not say what is in the checkpoint, and where"
        raise CheckpointFormatError(msg)
    lies_at = {(name, starts): info for name, starts, info in _stored(storage)}
    ordered = [name for name in mapping if name in described] if isinstance(mapping, dict) else []
    for name in dict.fromkeys((*ordered, *described)):
        place = place_of(name, mapping)
        kind = type(described[name]).__name__
        if kind == "BytesStorageMetadata":
            yield Item(name, place, None, (), (_chunk(name, lies_at, None, ()),))
            continue
        if kind != "TensorStorageMetadata":
            msg = f"{name!r} is a {kind}"
            raise CheckpointFormatError(msg)
        properties, shape, chunks = _fields(described[name], "properties", "size", "chunks")
        places = [_fields(chunk, "offsets", "sizes") for chunk in chunks]
        if not places or not all(map(_is_shape, (shape, *(part for place in places for part in place)))):
            msg = f"{name!r} has a shape that is not possible"
            raise CheckpointFormatError(msg)
        found = tuple(_chunk(name, lies_at, tuple(starts), tuple(sizes)) for starts, sizes in places)
        yield Item(name, place, _dtype(name, properties), tuple(shape), found)


def _stored(storage: dict[Any, Any]) -> Iterator[tuple[str, tuple[int, ...] | None, Any]]:
    """Where each chunk lies: its name, where it begins in the whole (None for what is no tensor), and what is said of its archive."""
    for index, info in storage.items():
        found = index.fields if isinstance(index, pickles.Record) else getattr(index, "__dict__", {})
        name, starts = found.get("fqn"), found.get("offset")
        if type(name) is not str or not (starts is None or _is_shape(starts)):
            msg = "it says of something without a name where it lies"
            raise CheckpointFormatError(msg)
        yield name, None if starts is None else tuple(starts), info


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(number) is int and 0 <= number < 2**62 for number in value)


def _chunk(name: str, lies_at: dict[Any, Any], starts: tuple[int, ...] | None, sizes: tuple[int, ...]) -> Chunk:
    if (name, starts) not in lies_at:
        msg = f"it does not say where {name!r} lies"
        raise CheckpointFormatError(msg)
    info = lies_at[name, starts]
    file, offset, length = _fields(info, "relative_path", "offset", "length")
    # A checkpoint's files lie right in its folder.
    if type(file) is not str or file != os.path.basename(file) or file in {"", ".", ".."} or "\0" in file:  # noqa: PTH119 - a text, not yet a path
        shown = repr(file[:300]) if type(file) is str else f"a {type(file).__name__}"
        msg = f"{name!r} lies in {shown}, which is no file of a checkpoint"
        raise CheckpointFormatError(msg)
    if not _is_shape((offset, length)):
        msg = f"{name!r} lies where no file has bytes"
        raise CheckpointFormatError(msg)
    packed = (info.fields if isinstance(info, pickles.Record) else vars(info)).get("transform_descriptors")
    if packed:
        msg = f"{name!r} was compressed or otherwise transformed when it was written, which cannot be undone here"
        raise CheckpointFormatError(msg)
    return Chunk(starts or (), sizes, file, offset, length)


def _dtype(name: str, properties: Any) -> torch.dtype:
    if isinstance(properties, pickles.Record) and isinstance(properties.state, tuple) and properties.state:
        found = properties.state[0]
    else:
        (found,) = _fields(properties, "dtype")
    dtype = tensors.DTYPES.get(found) if isinstance(found, str) else found
    if not isinstance(dtype, torch.dtype):
        msg = f"{name!r} has no dtype that is known here"
        raise CheckpointFormatError(msg)
    return dtype
