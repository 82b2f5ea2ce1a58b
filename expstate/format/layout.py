"""Where every byte of a take will lie: entries in, data files out, before anything is moved.

A data file is a safetensors file: a header that ends on a page, then the boxes one after the other without holes. Boxes of whole pages come
first, then by falling item size, so that every tensor is aligned for whoever maps the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from blake3 import blake3

from expstate.format.manifest import BLOCK_BYTES, FileRecord
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from expstate.format.names import FileNamer

PAGE_BYTES = 4096
MAX_HEADER_BYTES = 50_000_000

SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""What safetensors calls the dtypes that it has and that its readers bring back, by torch's name."""


BYTES = "bytes"
"""The dtype of a source whose items mean nothing to torch; it is never cut."""


class Source(msgspec.Struct, frozen=True, gc=False):
    """What the layout needs to know of an array: its path, dtype (by torch's name, or ``BYTES``), shape and item size.

    Of an array that is here in part only, it is one box: ``shape`` has its sizes, and ``starts`` where it begins in the whole. Boxes of one
    array follow each other.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    starts: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


class _HeaderField(msgspec.Struct, frozen=True, gc=False):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class PlacedBox(msgspec.Struct, gc=False):
    """A box and its place: which source, which bytes of it, at which byte of the file; ``rows`` if the source was cut."""

    source: int
    first_byte: int
    nbytes: int
    offset: int = 0
    rows: tuple[int, int] | None = None

    @property
    def block_count(self) -> int:
        """Blocks of the box; an empty box has none."""
        return -(-self.nbytes // BLOCK_BYTES)


@dataclass(slots=True)
class DataFile:
    """A data file to write: its name, whole header (with the eight bytes that give its length), size and boxes in order."""

    name: str
    header: bytes
    size: int
    boxes: list[PlacedBox] = field(default_factory=list)

    @property
    def record(self) -> FileRecord:
        """What the manifest says of it."""
        return FileRecord(self.name, self.size, len(self.header), blake3(self.header).digest())


def file_name_of(path: str, taken: Mapping[str, object]) -> str:
    """The name of an entry inside its data file: what is below the key, as the state dict has it where that is distinct."""
    _, _, below = path.partition("/")
    name = below or path
    if "%" in name and "/" not in name:
        plain = paths.unquote(name)
        try:
            plain.encode()
        except UnicodeEncodeError:
            plain = name
        name = plain if plain not in taken else name
    while name in taken or name == "__metadata__":
        name += "%"
    return name


def lay_out(
    stem: str,
    sources: Sequence[Source],
    aliases: Iterable[tuple[str, str]],
    namer: FileNamer,
    target_bytes: int,
    *,
    first: int = 0,
    boxes: Iterable[PlacedBox] | None = None,
) -> list[DataFile]:
    """Lay the arrays of one key out in data files.

    Parameters
    ----------
    stem : str
        What the files are named after: the key.
    sources : sequence of Source
        The arrays.
    aliases : iterable of (str, str)
        Paths of tied tensors and of those they are tied to.
    namer : FileNamer
        Gives names to files.
    target_bytes : int
        A file is closed when it has this size; a larger tensor is cut along its first dimension.
    first : int, default 0
        Number of the first source: ``PlacedBox.source`` counts from it.
    boxes : iterable of PlacedBox, optional
        Those of ``cut(sources, target_bytes)`` that are to be written; default all.

    Returns
    -------
    list of DataFile
        At least one.
    """
    names = _names(sources)
    boxes = list(cut(sources, target_bytes) if boxes is None else boxes)
    # Those that end in the middle of a page come last, the largest items first.
    whole = [box for box in boxes if box.nbytes % PAGE_BYTES == 0]
    rest = [box for box in boxes if box.nbytes % PAGE_BYTES]
    rest.sort(key=lambda box: -sources[box.source].itemsize)
    metadata = {"format": "pt"} | _aliases(sources, names, aliases)
    # A tensor may be called what a part of another would be.
    is_cut = any(source.starts is not None for source in sources) or any(box.rows is not None for box in boxes)
    taken = frozenset(names) if is_cut else frozenset()
    files: list[DataFile] = []
    for group in _group(whole + rest, names, target_bytes):
        header = _header(group, sources, names, taken, {} if files else metadata)
        for box in group:
            box.offset += len(header)
            box.source += first
        size = group[-1].offset + group[-1].nbytes if group else len(header)
        files.append(DataFile(namer.name(stem), header, size, group))
    return files


def _names(sources: Sequence[Source]) -> list[str]:
    """The name of each source inside its data file, the same for boxes of one array."""
    taken: dict[str, None] = {}
    found: list[str] = []
    path = ""
    for source in sources:
        if source.path != path:
            path = source.path
            name = path.partition("/")[2]
            if not name or "%" in name or name in taken or name == "__metadata__":
                name = file_name_of(path, taken)
            taken[name] = None
        found.append(name)
    return found


def _aliases(sources: Sequence[Source], names: Sequence[str], aliases: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Names of tied tensors, and of those that they are tied to."""
    found: dict[str, str] = {}
    pairs = list(aliases)
    if pairs:
        by_path = {source.path: name for source, name in zip(sources, names, strict=True)}
        taken: dict[str, None] = dict.fromkeys(names)
        for path, target in pairs:
            alias = file_name_of(path, taken)
            taken[alias] = None
            if target in by_path:  # else another rank writes it
                found[alias] = by_path[target]
    return found


def cut(sources: Iterable[Source], target_bytes: int) -> Iterator[PlacedBox]:
    """The boxes of arrays, in order: the whole of each, or runs of its first dimension where it is larger than ``target_bytes``."""
    for number, source in enumerate(sources):
        nbytes = source.nbytes
        rows = source.shape[0] if source.shape else 1
        if nbytes <= target_bytes or rows <= 1 or source.dtype == BYTES:
            yield PlacedBox(number, 0, nbytes)
            continue
        row_bytes = nbytes // rows
        step = max(1, target_bytes // row_bytes)
        for row in range(0, rows, step):
            stop = min(rows, row + step)
            yield PlacedBox(number, row * row_bytes, (stop - row) * row_bytes, rows=(row, stop))


def _group(boxes: Sequence[PlacedBox], names: Sequence[str], target_bytes: int) -> Iterator[list[PlacedBox]]:
    """Boxes of each file, with offsets counted from its data; a new file before size or header grow too large."""
    group: list[PlacedBox] = []
    size, header = 0, 0
    for box in boxes:
        # An upper bound of what the header says of one box: escapes can make six characters of one.
        header_more = 6 * len(names[box.source]) + 300
        if group and (size + box.nbytes > target_bytes or header + header_more > MAX_HEADER_BYTES):
            yield group
            group, size, header = [], 0, 0
        box.offset = size
        group.append(box)
        size += box.nbytes
        header += header_more
    yield group


def _header(
    boxes: Sequence[PlacedBox], sources: Sequence[Source], names: Sequence[str], taken: frozenset[str], metadata: Mapping[str, str]
) -> bytes:
    fields: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    for box in boxes:
        source = sources[box.source]
        name, shape = names[box.source], source.shape
        if box.rows is not None or source.starts is not None:
            row = box.rows[0] if box.rows is not None else 0
            starts = (row,) if source.starts is None else (source.starts[0] + row, *source.starts[1:]) if shape else ()
            name = f"{name}#{'_'.join(map(str, starts))}"
            while name in taken:
                name += "%"
        if box.rows is not None:
            shape = (box.rows[1] - box.rows[0], *shape[1:])
        dtype = SAFETENSORS_DTYPES.get(source.dtype)
        if dtype is None:
            dtype, shape = "U8", (box.nbytes,)
        fields[name] = _HeaderField(dtype, shape, (box.offset, box.offset + box.nbytes))
    text = msgspec.json.encode(fields)
    length = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
    return length.to_bytes(8, "little") + text.ljust(length)
