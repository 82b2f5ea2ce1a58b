"""What a manifest must hold before anything in it is believed.

Gets decoded records, raises ``ManifestError`` for what no take writes: paths that clash, shapes that overflow, boxes that overlap, leave
the file or do not tile the shape. A manifest that passes can be read without further doubt but for the bytes themselves.
"""

from __future__ import annotations

import itertools
import math
import re

from expstate.errors import ManifestError, ManifestTooLargeError
from expstate.format import names
from expstate.format.manifest import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    INLINE_BLOCKS,
    LENGTH_BYTES,
    MAX_ENTRIES,
    SHARED_BOXES,
    AliasEntry,
    Box,
    ContainerEntry,
    Manifest,
    ObjectEntry,
    TensorEntry,
)
from expstate.state import codecs, paths, tensors

_MAX_DIMENSIONS = 64
_MAX_CUT_DIMENSIONS = 8
_MAX_TENSOR_BYTES = 2**62
_MAX_FILE_BYTES = 2**62
_KINDS = {"tensor", "parameter", "numpy"}

_FINGERPRINT_KEY = re.compile(r"[0-9a-f]{32}")
_FINGERPRINT_BYTES = 16

Span = tuple[int, int, int]
"""File, first byte, byte after the last."""


def validate(manifest: Manifest) -> None:
    """Check a manifest's records against each other.

    Raises
    ------
    ManifestError
        If they cannot be what a take wrote; the message names the entry.
    """
    if len(manifest.entries) > MAX_ENTRIES:
        msg = f"the manifest names {len(manifest.entries):,} entries, more than the {MAX_ENTRIES:,} that are read"
        raise ManifestTooLargeError(msg)
    if manifest.world_size < 1:
        msg = f"world size {manifest.world_size} is not possible"
        raise ManifestError(msg)
    if manifest.parent is not None and not names.is_id(manifest.parent):
        msg = f"the parent {manifest.parent[:80]!r} is no id of a snapshot"
        raise ManifestError(msg)
    if manifest.duration_seconds is not None and manifest.duration_seconds < 0:
        msg = f"a duration of {manifest.duration_seconds} seconds is not possible"
        raise ManifestError(msg)
    if manifest.fingerprint_key is not None and not _FINGERPRINT_KEY.fullmatch(manifest.fingerprint_key):
        msg = f"the key of its fingerprints is not possible: {manifest.fingerprint_key[:80]!r}"
        raise ManifestError(msg)
    _check_files(manifest)
    _check_paths(manifest)
    spans: list[Span] = []
    for entry in manifest.entries:
        if type(entry) is TensorEntry:
            _check_tensor(entry, manifest, spans)
        elif type(entry) is ObjectEntry:
            _check_object(entry, manifest, spans)
    _check_disjoint(spans, manifest)
    if SHARED_BOXES in manifest.requires:
        _check_shared(manifest)


def _fail(path: str, problem: str) -> None:
    msg = f"entry {path[:300]!r} {problem}"
    raise ManifestError(msg)


def _check_files(manifest: Manifest) -> None:
    seen: set[str] = set()
    for record in manifest.files:
        names.check_file_name(record.name)
        if record.name.casefold() in seen:
            msg = f"the manifest names file {record.name!r} twice"
            raise ManifestError(msg)
        seen.add(record.name.casefold())
        if not LENGTH_BYTES <= record.header_bytes <= record.size <= _MAX_FILE_BYTES or len(record.header_digest) != DIGEST_BYTES:
            msg = f"the record of file {record.name!r} is not possible"
            raise ManifestError(msg)


def _check_paths(manifest: Manifest) -> None:
    """Each path once, or once for each rank that has its own; each below a container, each key with a state."""
    keys = {paths.quote(record.key) for record in manifest.keys}
    if len(keys) < len(manifest.keys):
        msg = "the manifest names a key twice"
        raise ManifestError(msg)
    if manifest.world_size > 1:
        _check_paths_of_ranks(manifest, keys)
        return
    kinds: dict[str, type] = {}
    for entry in manifest.entries:
        path = entry.path
        if path in kinds or entry.rank is not None:
            _fail(path, "is there twice" if path in kinds else f"is of rank {entry.rank}, and one process took it")
        _check_path(path, keys)
        above = path.rpartition("/")[0]
        if above and kinds.get(above) is not ContainerEntry:
            _fail(path, "is not inside a container")
        kinds[path] = type(entry)
        if isinstance(entry, AliasEntry):
            _check_alias(entry, kinds)
        elif isinstance(entry, ContainerEntry):
            _check_kind(entry)
    missing = keys - kinds.keys()
    if missing:
        _fail(min(missing), "is a key without a state")


def _check_path(path: str, keys: set[str]) -> None:
    if not paths.is_printable(path):
        _fail(path, "has characters in it that no path holds")
    above, _, name = path.rpartition("/")
    if not above and path not in keys:
        _fail(path, "is not one of the keys")
    if above and not name:
        _fail(path, "has no name")


def _check_paths_of_ranks(manifest: Manifest, keys: set[str]) -> None:
    """The same where several ranks took it: what each of them sees is whole. Under None is what all of them have."""
    kinds: dict[str, dict[int | None, type]] = {}
    size = manifest.world_size
    for entry in manifest.entries:
        path, rank = entry.path, entry.rank
        of_path = kinds.setdefault(path, {})
        if not of_path:
            _check_path(path, keys)
        if rank is not None and not 0 <= rank < size:
            _fail(path, f"is of rank {rank}, and {size} ranks took it")
        if rank in of_path or None in of_path or (rank is None and of_path):
            _fail(path, "is there twice")
        above = path.rpartition("/")[0]
        if above and not _is_in_container(kinds.get(above, {}), rank, size):
            _fail(path, "is not inside a container")
        of_path[rank] = type(entry)
        if isinstance(entry, AliasEntry):
            target = kinds.get(entry.target, {})
            _check_alias(entry, {entry.target: target.get(rank, target.get(None, type(None)))})
        elif isinstance(entry, ContainerEntry):
            _check_kind(entry)
    for key in sorted(keys):
        if None not in kinds.get(key, {}) and len(kinds.get(key, {})) < size:
            _fail(key, "is a key without a state on some ranks")


def _is_in_container(above: dict[int | None, type], rank: int | None, size: int) -> bool:
    """Whether what is above an entry is a container for everyone who sees the entry."""
    if rank is not None:
        return above.get(rank, above.get(None)) is ContainerEntry
    return above.get(None) is ContainerEntry or (len(above) == size and set(above.values()) == {ContainerEntry})


def _check_kind(entry: ContainerEntry) -> None:
    try:
        codecs.by_name(entry.type)
    except ManifestError as error:
        _fail(entry.path, f"cannot be read: {error}")


def _check_alias(entry: AliasEntry, kinds: dict[str, type]) -> None:
    """An alias names a tensor of the same key that came before it."""
    if kinds.get(entry.target) is not TensorEntry or entry.target.partition("/")[0] != entry.path.partition("/")[0]:
        _fail(entry.path, "is tied to something that is no tensor of this key")


def _check_tensor(entry: TensorEntry, manifest: Manifest, spans: list[Span]) -> None:
    shape = entry.shape
    if entry.kind not in _KINDS:
        _fail(entry.path, f"is of unknown kind {entry.kind!r}")
    try:
        itemsize = entry.itemsize
    except (KeyError, ValueError):
        _fail(entry.path, f"has a dtype that is not known here: {entry.dtype[:80]!r}")
    if entry.requires_grad and (entry.kind == "numpy" or not _has_gradient(entry.dtype)):
        _fail(entry.path, f"wants a gradient, which {entry.dtype[:80]} has not")
    nbytes = math.prod(shape) * itemsize
    if nbytes == 0 or len(shape) > _MAX_DIMENSIONS or (shape and min(shape) < 0):
        _check_odd_shape(entry, itemsize)
    if nbytes > _MAX_TENSOR_BYTES:
        _fail(entry.path, f"has a shape that is not possible: {shape[:8]}")
    boxes = entry.boxes
    if len(boxes) == 1 and boxes[0].starts is None and boxes[0].sizes is None:
        _check_box(entry.path, boxes[0], nbytes, manifest, spans)
    else:
        _check_placed(entry, itemsize, manifest, spans)


def _check_placed(entry: TensorEntry, itemsize: int, manifest: Manifest, spans: list[Span]) -> None:
    """Boxes that are parts of a tensor."""
    shape = entry.shape
    for box in entry.boxes:
        starts, sizes = box.starts, box.sizes
        if starts is None or sizes is None or not len(starts) == len(sizes) == len(shape):
            _fail(entry.path, "has a box without a place in its shape")
            return
        for start, size, whole in zip(starts, sizes, shape, strict=True):
            if start < 0 or size < 0 or start + size > whole:
                _fail(entry.path, "has a box outside its shape")
        _check_box(entry.path, box, math.prod(sizes) * itemsize, manifest, spans)
    _check_tiling(entry)


def _check_odd_shape(entry: TensorEntry, itemsize: int) -> None:
    """Shapes without elements, whose other sizes still must not overflow, and those with too many or negative sizes."""
    shape = entry.shape
    if (
        len(shape) > _MAX_DIMENSIONS
        or (shape and min(shape) < 0)
        or math.prod(max(size, 1) for size in shape) * itemsize > _MAX_TENSOR_BYTES
    ):
        _fail(entry.path, f"has a shape that is not possible: {shape[:8]}")


def _has_gradient(dtype: str) -> bool:
    return tensors.DTYPES[dtype].is_floating_point or tensors.DTYPES[dtype].is_complex


def _check_object(entry: ObjectEntry, manifest: Manifest, spans: list[Span]) -> None:
    if len(entry.boxes) != 1 or entry.boxes[0].starts is not None or not 0 < entry.nbytes <= _MAX_TENSOR_BYTES:
        _fail(entry.path, "has no bytes, or is in pieces")
    _check_box(entry.path, entry.boxes[0], entry.nbytes, manifest, spans)


def _check_box(path: str, box: Box, nbytes: int, manifest: Manifest, spans: list[Span]) -> None:
    if len(box.digest) != DIGEST_BYTES:
        _fail(path, "has a digest of the wrong length")
    if box.fingerprint is not None and len(box.fingerprint) != _FINGERPRINT_BYTES:
        _fail(path, "has a fingerprint of the wrong length")
    _check_span(path, box.file, box.offset, nbytes, manifest, spans)
    count = -(-nbytes // BLOCK_BYTES)
    blocks = box.blocks
    if count <= 1:
        if blocks is not None:
            _fail(path, "has digests of blocks that it has not")
    elif isinstance(blocks, tuple):
        _check_span(path, blocks[0], blocks[1], count * DIGEST_BYTES, manifest, spans)
    elif blocks is None or count > INLINE_BLOCKS or len(blocks) != count * DIGEST_BYTES:
        _fail(path, "has not one digest for each block")


def _check_span(path: str, file: int, offset: int, nbytes: int, manifest: Manifest, spans: list[Span]) -> None:
    if not 0 <= file < len(manifest.files):
        _fail(path, f"lies in file number {file}, and there are {len(manifest.files)}")
    record = manifest.files[file]
    if not record.header_bytes <= offset <= offset + nbytes <= record.size:
        _fail(path, f"needs {nbytes:,} bytes at {offset:,} of file {record.name!r}, which has {record.size:,}")
    if nbytes:
        spans.append((file, offset, offset + nbytes))


def _check_disjoint(spans: list[Span], manifest: Manifest) -> None:
    spans.sort()
    may_be_shared = SHARED_BOXES in manifest.requires
    last: Span = (-1, 0, 0)
    for span in spans:
        file, start, _ = span
        if file == last[0] and start < last[2] and not (may_be_shared and span == last):
            msg = f"two entries lie over each other at byte {start:,} of file {manifest.files[file].name!r}"
            raise ManifestError(msg)
        last = span


def _check_shared(manifest: Manifest) -> None:
    """What lies at one place is said to be one thing, so that whoever has looked at it there need not do so again."""
    digests: dict[tuple[int, int], bytes] = {}
    for entry in manifest.entries:
        if isinstance(entry, (TensorEntry, ObjectEntry)):
            for box in entry.boxes:
                is_empty = isinstance(entry, TensorEntry) and 0 in (entry.shape if box.sizes is None else box.sizes)
                if not is_empty and digests.setdefault((box.file, box.offset), box.digest) != box.digest:
                    _fail(entry.path, "lies where another entry does, and has another digest")


def _check_tiling(entry: TensorEntry) -> None:
    """The boxes cover each element of the shape once.

    Cut along one dimension, as nearly all tensors are, they must follow each other. Otherwise a sum of boxes is told by its corners, each
    counted up or down by how many of its sides are ends: the boxes are the whole exactly if all corners but those of the whole cancel out.
    So the time that it takes grows with the boxes alone, however they lie.
    """
    if 0 in entry.shape:
        if not entry.boxes:
            _fail(entry.path, "has no box")
        return
    placed = [(box.starts or (), box.sizes or ()) for box in entry.boxes if 0 not in (box.sizes or ())]
    cut = [number for number, whole in enumerate(entry.shape) if any(sizes[number] != whole for _, sizes in placed)]
    if len(cut) > _MAX_CUT_DIMENSIONS:
        _fail(entry.path, f"is cut along {len(cut)} dimensions, and at most {_MAX_CUT_DIMENSIONS} are read")
    if len(cut) == 1:
        (along,) = cut
        sides = sorted((starts[along], starts[along] + sizes[along]) for starts, sizes in placed)
        follow = all(stop == start for (_, stop), (start, _) in itertools.pairwise(sides))
        if not follow or (sides[0][0], sides[-1][1]) != (0, entry.shape[along]):
            _fail(entry.path, "is not covered by its boxes, or has boxes that lie over each other")
        return
    corners: dict[tuple[int, ...], int] = {}
    whole = ((0,) * len(entry.shape), entry.shape)
    for (starts, sizes), count in (*((place, 1) for place in placed), (whole, -1)):
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(starts[number] + end * sizes[number] for number, end in zip(cut, ends, strict=True))
            corners[corner] = corners.get(corner, 0) + (count if sum(ends) % 2 == 0 else -count)
    if any(corners.values()):
        _fail(entry.path, "is not covered by its boxes, or has boxes that lie over each other")
