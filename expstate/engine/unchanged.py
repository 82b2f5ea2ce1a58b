"""What of a state has not changed since an earlier snapshot, and what of it is there twice: told before anything is moved.

Gets the boxes of a take, in memory; hands on for each where a base holds the same, or which box before it is equal. On the host BLAKE3
digests are compared, on accelerators fingerprints that are computed there, so that what has not changed is not even copied.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import torch

from expstate.engine import inplace
from expstate.engine.digest import EMPTY, box_digest
from expstate.engine.fingerprint import Fingerprints
from expstate.engine.streams import SideStreams
from expstate.format.manifest import BLOCK_BYTES, DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from expstate.engine import crew
    from expstate.engine.base import Bases, Held


class LiveBox(msgspec.Struct, frozen=True, gc=False):
    """A box of a take: bytes ``start`` to ``start + nbytes`` of a tensor; ``address`` of the first if they lie in host memory.

    ``path`` and ``dtype`` are those of the entry, ``sizes`` those of the box; the dtype is empty for what is no tensor.
    """

    path: str
    dtype: str
    sizes: tuple[int, ...]
    tensor: torch.Tensor
    start: int
    nbytes: int
    address: int | None

    @classmethod
    def of(cls, path: str, dtype: str, tensor: torch.Tensor) -> LiveBox:
        """A whole tensor, or a part of one."""
        return cls(path, dtype, tuple(tensor.shape), tensor, 0, tensor.numel() * tensor.element_size(), None)

    @property
    def is_on_device(self) -> bool:
        """Whether it lies on an accelerator."""
        return not self.tensor.is_cpu


@dataclass(slots=True)
class Compared:
    """What was found of each box, by its number.

    Attributes
    ----------
    fingerprints : dict of int to bytes
        Of the boxes on accelerators; one without is digested, for which it has to be copied to the host.
    held : dict of int to (Held, bytes)
        Boxes that a base holds, and the digests of their blocks.
    equal : dict of int to int
        Boxes that are equal to an earlier one, and the number of that.
    """

    fingerprints: dict[int, bytes]
    held: dict[int, tuple[Held, bytes]] = field(default_factory=dict)
    equal: dict[int, int] = field(default_factory=dict)


def fingerprints(boxes: Sequence[LiveBox], key: bytes) -> dict[int, bytes]:
    """The fingerprints of the boxes that lie on accelerators, by their numbers; without those that a device has no room to compute."""
    chosen = [number for number, box in enumerate(boxes) if box.is_on_device and box.nbytes]
    if not chosen:
        return {}
    found = Fingerprints(key)
    numbers: list[int] = []
    streams = SideStreams(boxes[number].tensor.device for number in chosen)
    with streams.on_device(), streams.entered():
        for number in chosen:
            with contextlib.suppress(torch.OutOfMemoryError):
                found.add(_elements(boxes[number]))
                numbers.append(number)
        return dict(zip(numbers, found.collect(), strict=True))


def compare(
    boxes: Sequence[LiveBox],
    bases: Bases,
    found: Compared,
    *,
    dedup: bool,
    budget: int,
    stop: crew.Stop,
    done: Callable[[int], object],
) -> None:
    """Find the boxes that a base holds, and those that are there more than once.

    Parameters
    ----------
    boxes : sequence of LiveBox
        Those of the take.
    bases : Bases
        Prepared for their sizes.
    found : Compared
        With the fingerprints that are known; is filled with what is found.
    dedup : bool
        Whether to look for boxes that are equal to each other.
    budget, stop, done
        As ``inplace.digest`` has them.
    """
    doubtful = _compare_fingerprints(boxes, bases, found, dedup=dedup)
    digests = _digests(boxes, doubtful, bases, dedup, budget, stop, done)
    first: dict[tuple[int, bytes], int] = {}
    for number in doubtful:
        blocks = digests.get(number)
        if blocks is None:
            continue
        box = boxes[number]
        digest = box_digest(blocks)
        held = bases.find(box.nbytes, digest, box.path)
        if held is not None:
            found.held[number] = (held, bytes(blocks))
        elif dedup and box.nbytes:
            before = first.setdefault((box.nbytes, digest), number)
            if before != number:
                found.equal[number] = before
    for number, before in list(found.equal.items()):
        if before in found.held:
            found.held[number] = found.held[before]
            del found.equal[number]


def _compare_fingerprints(boxes: Sequence[LiveBox], bases: Bases, found: Compared, *, dedup: bool) -> list[int]:
    """Compare what has fingerprints; the numbers of the boxes that are left to be digested."""
    doubtful = []
    first: dict[tuple[str, tuple[int, ...], bytes], int] = {}
    for number, box in enumerate(boxes):
        fingerprint = found.fingerprints.get(number)
        if fingerprint is None:
            doubtful.append(number)
            continue
        held = bases.find_by_fingerprint(box.dtype, box.sizes, fingerprint, box.path)
        blocks = None if held is None else bases.blocks(held)
        if held is not None and blocks is not None:
            found.held[number] = (held, blocks)
            continue
        before = first.setdefault((box.dtype, box.sizes, fingerprint), number) if dedup else number
        if before != number:
            found.equal[number] = before
        elif not bases.is_told_by_fingerprint(box.dtype, box.sizes):
            doubtful.append(number)
    return doubtful


def _digests(
    boxes: Sequence[LiveBox],
    numbers: Iterable[int],
    bases: Bases,
    dedup: bool,
    budget: int,
    stop: crew.Stop,
    done: Callable[[int], object],
) -> dict[int, bytearray]:
    """The digests of the blocks of those boxes that may be somewhere else too: the first block tells of most that they are not."""
    sizes = Counter(boxes[number].nbytes for number in numbers)
    candidates = [number for number in numbers if bases.has_size(boxes[number].nbytes) or (dedup and sizes[boxes[number].nbytes] > 1)]
    digests = {number: bytearray(-(-boxes[number].nbytes // BLOCK_BYTES) * DIGEST_BYTES) for number in candidates}

    def run(chosen: Iterable[int], first: int, last: int | None) -> None:
        items = (item for number in chosen for item in _items(boxes[number], digests[number], first, last))
        inplace.digest(items, budget, stop, done)

    run(candidates, 0, BLOCK_BYTES)
    starts = {number: bytes(digests[number][:DIGEST_BYTES]) or EMPTY for number in candidates}
    alike = Counter((boxes[number].nbytes, start) for number, start in starts.items())
    for number, start in starts.items():
        nbytes = boxes[number].nbytes
        if not bases.may_hold(nbytes, start) and not (dedup and alike[nbytes, start] > 1):
            del digests[number]
    run([number for number in digests if boxes[number].nbytes > BLOCK_BYTES], BLOCK_BYTES, None)
    return digests


def _items(box: LiveBox, digests: bytearray, first: int, last: int | None) -> Iterable[inplace.Digesting]:
    """The blocks of a box from byte ``first`` to ``last``."""
    stop = box.nbytes if last is None else min(last, box.nbytes)
    address = None if box.address is None else box.address + first
    pieces = inplace.cut(box.tensor, box.start + first, box.start + stop, address, inplace.PIECE_BYTES)
    return inplace.filling(pieces, digests, first // BLOCK_BYTES * DIGEST_BYTES)


def _elements(box: LiveBox) -> torch.Tensor:
    """The tensor of a box."""
    tensor = box.tensor
    if tensor.dim() == 1 and tensor.element_size() == 1:
        return tensor[box.start : box.start + box.nbytes]
    if box.nbytes == tensor.numel() * tensor.element_size():
        return tensor
    row_bytes = box.nbytes // box.sizes[0]
    return tensor.narrow(0, box.start // row_bytes, box.sizes[0])
