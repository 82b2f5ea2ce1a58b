"""What of a snapshot goes into plain safetensors files: which entries, in which file, under which names.

Gets a manifest's entries and globs; hands on one laid out file for each key, and what is no tensor. What safetensors cannot hold is an
error before anything is written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expstate.errors import EntryNotFoundError, InvalidArgumentError, UnsupportedValueError
from expstate.format import layout
from expstate.format.layout import DataFile, Source
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, TensorEntry
from expstate.format.names import FileNamer, file_stem
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from expstate.engine.source import SnapshotSource

_OPEN_CONTAINERS = frozenset({"dict", "OrderedDict", "defaultdict", "Counter", "list", "tuple", "namedtuple", "deque", "set", "frozenset"})
"""Containers whose parts are values of their own, and not what a value was taken apart into."""
_TENSOR_CONTAINERS = frozenset(
    {"torch.quantized", "torch.subclass", "torch.sparse_coo", "torch.sparse_compressed", "torch.nested", "torch.mkldnn"}
)
_NUMPY_DTYPES = {
    "b1": "bool",
    "u1": "uint8",
    "u2": "uint16",
    "u4": "uint32",
    "u8": "uint64",
    "i1": "int8",
    "i2": "int16",
    "i4": "int32",
    "i8": "int64",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
}
_NUMBERS = re.compile(r"[<>|][biufc]")
_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class ExportFile:
    """A file to write: laid out, the tensors that ``PlacedBox.source`` counts, and how many names are tied to one of them."""

    layout: DataFile
    entries: tuple[TensorEntry, ...]
    tied: int


def is_in_rows(entry: TensorEntry) -> bool:
    """Whether each box of a tensor is some of its whole rows, so that its bytes follow each other in the tensor too."""
    return all(box.starts is None or not entry.shape or tuple(box.sizes or ())[1:] == entry.shape[1:] for box in entry.boxes)


def plan(
    source: SnapshotSource, single: str | None, include: tuple[str, ...] | None, exclude: tuple[str, ...]
) -> tuple[list[ExportFile], tuple[str, ...]]:
    """The files of an export, and the paths of what is left out because it is no tensor.

    Raises
    ------
    EntryNotFoundError
        If a glob matches nothing.
    UnsupportedValueError
        If there is a tensor of a dtype or layout that safetensors has no name for; all are named.
    InvalidArgumentError
        If there are no tensors, or those of several keys for one file.
    """
    chosen, left_out = _choose(source, _selection(source, include, exclude))
    by_key: dict[str, list[TensorEntry | AliasEntry]] = {}
    for entry in chosen:
        by_key.setdefault(paths.key_of(entry.path), []).append(entry)
    if not by_key:
        msg = "there are no tensors to export" if include is None and not exclude else "the globs choose no tensor to export"
        raise InvalidArgumentError(msg)
    if single is not None and len(by_key) > 1:
        listed = ", ".join(map(repr, by_key))
        msg = f"one file holds the tensors of one key, and there are {listed}: export to a folder, or choose one, as by include='model/*'"
        raise InvalidArgumentError(msg)
    taken: set[str] = set()
    files = []
    for key, entries in by_key.items():
        files.append(_lay_out(source, key, entries, single or _file_name(key, taken)))
    return files, left_out


def _file_name(key: str, taken: set[str]) -> str:
    stem = first = file_stem(key)
    number = 1
    while stem.casefold() in taken:
        number += 1
        stem = f"{first}_{number}"
    taken.add(stem.casefold())
    return f"{stem}.safetensors"


def _selection(source: SnapshotSource, include: tuple[str, ...] | None, exclude: tuple[str, ...]) -> Callable[[str], bool]:
    for glob in (*(include or ()), *exclude):
        matches = paths.matcher([glob])
        if not any(matches(entry.path) for entry in source.entries):
            msg = f"the glob {glob!r} matches no entry of the snapshot at {source.storage.url!r}"
            raise EntryNotFoundError(msg)
    included, excluded = paths.matcher(include or ("*",)), paths.matcher(exclude)
    return lambda path: included(path) and not excluded(path)


def _choose(source: SnapshotSource, is_wanted: Callable[[str], bool]) -> tuple[list[TensorEntry | AliasEntry], tuple[str, ...]]:
    chosen: list[TensorEntry | AliasEntry] = []
    left_out: list[str] = []
    problems: list[str] = []
    closed: set[str] = set()
    for entry in source.entries:
        above = paths.parent(entry.path)
        if above in closed:
            closed.add(entry.path)
            continue
        if isinstance(entry, ContainerEntry):
            if entry.type in _OPEN_CONTAINERS:
                continue
            closed.add(entry.path)
        if not is_wanted(entry.path):
            continue
        kind = _kind(source, entry)
        if kind is None:
            left_out.append(entry.path)
        elif kind:
            problems.append(f"{entry.path!r} ({kind})")
        elif isinstance(entry, (TensorEntry, AliasEntry)):
            chosen.append(entry)
    if problems:
        more = f" and {len(problems) - 5:,} more" if len(problems) > 5 else ""  # noqa: PLR2004 - as many as a message bears
        msg = f"safetensors has no form for {', '.join(problems[:5])}{more}; leave them out by globs, or use copy()"
        raise UnsupportedValueError(msg)
    return chosen, tuple(left_out)


def _kind(source: SnapshotSource, entry: Entry) -> str | None:
    """Empty for what safetensors can hold, what a tensor is that it cannot, None for what is no tensor."""
    if isinstance(entry, ContainerEntry):
        return entry.type if entry.type in _TENSOR_CONTAINERS else None
    resolved = source.resolve(entry)
    if not isinstance(resolved, TensorEntry):
        return None
    if _dtype(resolved) is not None:
        return ""
    is_number = resolved.kind != "numpy" or _NUMBERS.match(resolved.dtype) is not None
    return f"dtype {resolved.dtype}" if is_number else None


def _dtype(entry: TensorEntry) -> str | None:
    """Torch's name of a dtype that safetensors has, else None."""
    if entry.kind == "numpy":
        # One of a byte has no order of bytes; what is stored with the high byte first would be read the other way round.
        return _NUMPY_DTYPES.get(entry.dtype[1:]) if entry.dtype[0] in "<|" else None
    return entry.dtype if entry.dtype in layout.SAFETENSORS_DTYPES else None


def _lay_out(source: SnapshotSource, key: str, entries: Sequence[TensorEntry | AliasEntry], name: str) -> ExportFile:
    kept: dict[str, str] = {}
    sources: list[Source] = []
    tensors: list[TensorEntry] = []
    aliases: list[tuple[str, str]] = []
    for entry in entries:
        # What a tensor of another file, or one that was not chosen, is tied to is stored under the first of its names here.
        resolved = source.resolve(entry)
        assert isinstance(resolved, TensorEntry)
        if resolved.path in kept:
            aliases.append((entry.path, kept[resolved.path]))
            continue
        kept[resolved.path] = entry.path
        sources.append(Source(entry.path, _dtype(resolved) or "", resolved.shape, resolved.itemsize))
        tensors.append(resolved)
    files = layout.lay_out(key, sources, aliases, FileNamer(""), _NO_LIMIT)
    if len(files) > 1:
        msg = f"the names under {key!r} are more than the header of a safetensors file holds; choose some of them by globs"
        raise InvalidArgumentError(msg)
    files[0].name = name
    return ExportFile(files[0], tuple(tensors), len(aliases))
