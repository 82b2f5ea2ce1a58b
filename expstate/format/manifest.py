"""The manifest: the records of ``snapshot.json``, their encoding, and the digest that ends it.

``encode`` gives the bytes to commit, ``decode`` checks digest and version and gives the records back. What the records say is checked by
``validate``. The JSON form is described by ``manifest.schema.json`` beside this file.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
from blake3 import blake3

from expstate import collector
from expstate.errors import (
    InvalidMetadataError,
    ManifestError,
    ManifestTooLargeError,
    SnapshotChangedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    UnsupportedFormatError,
)
from expstate.settings import GIB, MIB
from expstate.state import numpy_arrays, tensors

FORMAT = 1
SHARED_BOXES = "shared_boxes"
"""Boxes of equal content may lie at the same place."""
FEATURES: frozenset[str] = frozenset({SHARED_BOXES})
"""Names that ``requires`` may hold: parts of the format that a reader must know."""

BLOCK_BYTES = MIB
DIGEST_BYTES = 32
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header in so many bytes."""
INLINE_BLOCKS = 64
"""A box with more blocks keeps their digests in a file instead of the manifest."""

MAX_BYTES = GIB
MAX_ENTRIES = 10_000_000

_TAIL_START, _TAIL_END = b',"blake3":"', b'"}\n'
_TAIL_BYTES = len(_TAIL_START) + 2 * DIGEST_BYTES + len(_TAIL_END)
_HEXADECIMAL = frozenset(b"0123456789abcdef")
_TAIL_AND_MORE = re.compile(rb',"blake3":"[0-9a-f]{64}"\}.', re.DOTALL)
_HEAD = re.compile(rb'\{"format":(\d{1,9}),"id":"([0-9a-f]{32})"')


class FileRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A data file: name, size in bytes, length and BLAKE3 of its header (with the eight bytes before it)."""

    name: str
    size: int
    header_bytes: int
    header_digest: bytes


class Box(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where a box lies and what its bytes are.

    ``file`` is an index into the manifest's files, ``offset`` counts from the file's first byte. ``digest`` is the BLAKE3 of the bytes if
    they are one block, else of the blocks' digests one after the other; those are ``blocks``, or lie at ``blocks = (file, offset)``.
    ``starts`` and ``sizes`` place the box in the global shape; None for the whole. ``fingerprint`` is the keyed hash of the bytes that was
    computed on an accelerator, of a box that lay on one.
    """

    file: int
    offset: int
    digest: bytes
    blocks: bytes | tuple[int, int] | None = None
    starts: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None
    fingerprint: bytes | None = None


class TensorEntry(msgspec.Struct, array_like=True, frozen=True, gc=False, tag_field="entry", tag="tensor"):
    """A tensor, or a NumPy array (``kind`` is ``tensor``, ``parameter`` or ``numpy``), of global ``shape``."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    kind: str = "tensor"
    requires_grad: bool = False
    device: str | None = None
    rank: int | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return numpy_arrays.item_size(self.dtype) if self.kind == "numpy" else tensors.ITEM_SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


class ObjectEntry(msgspec.Struct, array_like=True, frozen=True, gc=False, tag_field="entry", tag="object"):
    """An object stored by ``torch.save``; ``needs_trust`` says that the safe loader refused it when it was taken."""

    path: str
    type: str
    nbytes: int
    needs_trust: bool
    boxes: tuple[Box, ...]
    rank: int | None = None


class ValueEntry(msgspec.Struct, array_like=True, frozen=True, gc=False, tag_field="entry", tag="value"):
    """A plain Python value in the form of ``state.values``."""

    path: str
    value: Any
    rank: int | None = None

    @property
    def nbytes(self) -> int:
        """Always 0: the value is in the manifest."""
        return 0


class AliasEntry(msgspec.Struct, array_like=True, frozen=True, gc=False, tag_field="entry", tag="alias"):
    """A tensor tied to another: the same memory under a second name."""

    path: str
    target: str
    rank: int | None = None

    @property
    def nbytes(self) -> int:
        """Always 0: the bytes are those of ``target``."""
        return 0


class ContainerEntry(msgspec.Struct, array_like=True, frozen=True, gc=False, tag_field="entry", tag="container"):
    """A value stored as parts, the entries below its path: the name of its codec and the codec's metadata."""

    path: str
    type: str
    meta: Any = None
    rank: int | None = None

    @property
    def nbytes(self) -> int:
        """Always 0: the bytes are those of its parts."""
        return 0


Entry = TensorEntry | ObjectEntry | ValueEntry | AliasEntry | ContainerEntry


class Metadata(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the taker said of the snapshot; ``params`` and ``metrics`` in the form of ``state.values``."""

    name: str | None = None
    tags: tuple[str, ...] = ()
    params: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    note: str | None = None
    step: int | None = None


class KeyRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A key of the app state and the class of the stateful under it."""

    key: str
    type: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that ``snapshot.json`` says but for its digest.

    ``created_at`` is ISO 8601 in UTC; ``parent`` is the id of the snapshot that the state came from, the last that the process took or
    restored with a key of this one; ``duration_seconds`` is the time from the beginning of the take until the manifest was written;
    ``fingerprint_key``, in hexadecimal digits, is the key of all fingerprints.
    """

    format: int
    id: str
    created_at: str
    duration_seconds: float | None = None
    parent: str | None = None
    fingerprint_key: str | None = None
    writer: str
    requires: tuple[str, ...]
    world_size: int
    metadata: Metadata
    provenance: dict[str, Any]
    keys: tuple[KeyRecord, ...]
    files: tuple[FileRecord, ...]
    entries: tuple[Entry, ...]

    @property
    def nbytes_written(self) -> int:
        """Bytes of the data files that the take wrote; those in ``base`` are files of earlier snapshots."""
        return sum(record.size for record in self.files if not record.name.startswith("base/"))


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """The bytes of ``snapshot.json``.

    Raises
    ------
    ManifestTooLargeError
        If it is larger than readers accept.
    InvalidMetadataError
        If a text in it has lone surrogates, which JSON cannot hold.
    """
    if len(manifest.entries) > MAX_ENTRIES:
        msg = f"the state has {len(manifest.entries):,} entries, and a snapshot holds at most {MAX_ENTRIES:,}"
        raise ManifestTooLargeError(msg)
    try:
        body = _encoder.encode(manifest)[:-1]
    except UnicodeEncodeError as error:
        msg = f"a text cannot be recorded, because it has lone surrogates: {error.object[:80]!r}"
        raise InvalidMetadataError(msg) from None
    data = body + _TAIL_START + blake3(body).hexdigest().encode() + _TAIL_END
    if len(data) > MAX_BYTES:
        msg = f"the manifest would have {len(data):,} bytes, and at most {MAX_BYTES:,} are read; put large plain values into tensors"
        raise ManifestTooLargeError(msg)
    return data


def digest_of(data: bytes) -> str:
    """The manifest's own digest, in hexadecimal digits, from its bytes."""
    return data[-len(_TAIL_END) - 2 * DIGEST_BYTES : -len(_TAIL_END)].decode("ascii")


def is_torn(data: bytes) -> bool:
    """Whether this is the beginning of a manifest only: a commit that did not finish.

    A manifest whose end is there but altered, or followed by something else, is damaged, not torn.
    """
    tail = data[-_TAIL_BYTES:]
    start, digits, end = tail[: len(_TAIL_START)], tail[len(_TAIL_START) : -len(_TAIL_END)], tail[-len(_TAIL_END) :]
    # Half of each is enough: a few bytes of it may be damaged.
    frame = [found == byte for found, byte in zip(start + end, _TAIL_START + _TAIL_END, strict=False)]
    is_end = sum(frame) >= len(_TAIL_START + _TAIL_END) // 2 and sum(digit in _HEXADECIMAL for digit in digits) >= DIGEST_BYTES
    return not is_end and _TAIL_AND_MORE.search(data) is None


def identify(data: bytes, expect_digest: str | None = None) -> tuple[str, str]:
    """The snapshot's id and the manifest's digest, in hexadecimal digits: what can be told without decoding its records.

    Raises
    ------
    SnapshotNotFoundError
        If it is torn.
    SnapshotCorruptError
        If its digest does not match.
    SnapshotChangedError
        If it is whole, but its digest is not the expected one.
    UnsupportedFormatError
        If it is of a newer format.
    ManifestError
        If it does not begin as ``encode`` lets it.
    """
    if is_torn(data):
        msg = "the manifest is incomplete: its take was interrupted"
        raise SnapshotNotFoundError(msg)
    if data[-_TAIL_BYTES:] != _TAIL_START + blake3(memoryview(data)[:-_TAIL_BYTES]).hexdigest().encode() + _TAIL_END:
        msg = "the manifest is damaged: its bytes do not match its digest"
        raise SnapshotCorruptError(msg)
    if expect_digest not in {None, digest_of(data)}:
        msg = f"another snapshot is there than the one expected: its manifest has the digest {digest_of(data)}, not {expect_digest}"
        raise SnapshotChangedError(msg)
    head = _HEAD.match(data)
    if head is None:
        msg = "the manifest does not begin with a format and an id"
        raise ManifestError(msg)
    if int(head.group(1)) > FORMAT:
        msg = f"the snapshot has format {int(head.group(1))}, and this version reads up to {FORMAT}; upgrade expstate"
        raise UnsupportedFormatError(msg)
    return head.group(2).decode("ascii"), digest_of(data)


def decode(data: bytes, expect_digest: str | None = None) -> Manifest:
    """The records of a manifest; with ``expect_digest``, of no other than the one that has it.

    Raises
    ------
    SnapshotNotFoundError
        If it is torn.
    SnapshotCorruptError
        If its digest does not match.
    SnapshotChangedError
        If its digest is not the expected one.
    UnsupportedFormatError
        If it is of a newer format.
    ManifestError
        If it is not of the form that ``encode`` writes.
    """
    identify(data, expect_digest)
    try:
        with collector.paused():
            manifest = _decoder.decode(data)
    except RecursionError:
        msg = "the manifest is nested too deeply"
        raise ManifestError(msg) from None
    except (msgspec.MsgspecError, ValueError) as error:
        _check_features(_features_of(data))
        msg = f"the manifest is not of the form of format {FORMAT}: {error}"
        raise ManifestError(msg) from error
    _check_features(manifest.requires)
    return manifest


class _Features(msgspec.Struct):
    requires: tuple[str, ...] = ()


_decode_features = msgspec.json.Decoder(_Features).decode


def _features_of(data: bytes) -> tuple[str, ...]:
    # A part of the format that is not known here may be what made the records unreadable.
    try:
        return _decode_features(data).requires
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ()


def _check_features(requires: tuple[str, ...]) -> None:
    unknown = sorted(set(requires) - FEATURES)
    if unknown:
        shown = ", ".join(repr(name[:80]) for name in unknown[:10])
        msg = f"the snapshot needs {shown}, which this version does not know; upgrade expstate"
        raise UnsupportedFormatError(msg)
