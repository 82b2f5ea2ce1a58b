"""Files cut into windows: what one staging buffer holds and one system call moves.

A window is a run of pieces that follow each other in a data file. Where the storage wants aligned writes, a window writes whole
pages: the page that two windows share is written by the second, which stages the few bytes before its own once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from expstate.format.manifest import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.format.layout import DataFile


class Fragment(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a box: its number in the file, the range, and whether these are whole blocks to digest."""

    box: int
    start: int
    stop: int
    digest: bool = True


class WriteWindow(msgspec.Struct, frozen=True):
    """A stretch of a data file to stage and write.

    The buffer's first byte is the file's byte ``start``; ``fragments`` follow each other from there without holes. ``stop`` is
    the end of what is written; what is staged may go on to ``staged_stop``. ``nbytes`` counts what no other window digests.
    """

    file: int
    start: int
    stop: int
    staged_stop: int
    fragments: tuple[Fragment, ...]
    nbytes: int


def write_windows(number: int, file: DataFile, alignment: int, window_bytes: int) -> Iterator[WriteWindow]:
    """The windows of a data file, in order; they write every byte after its header exactly once.

    Parameters
    ----------
    number : int
        The file's number.
    file : DataFile
        Its boxes.
    alignment : int
        Windows but the last end at multiples of it.
    window_bytes : int
        The most that is staged at once, not counting two times ``alignment``.
    """
    boxes = file.boxes
    fragments: list[Fragment] = []
    begin = len(file.header)
    room = window_bytes
    for index, box in enumerate(boxes):
        position = 0
        while position < box.nbytes:
            left = box.nbytes - position
            size = left if left <= room else room // BLOCK_BYTES * BLOCK_BYTES
            if size == 0:
                yield _window(number, file, begin, fragments, alignment, last=False)
                begin, fragments, room = box.offset + position, [], window_bytes
                continue
            fragments.append(Fragment(index, position, position + size))
            position += size
            room -= size
    if fragments:
        yield _window(number, file, begin, fragments, alignment, last=True)


def _window(number: int, file: DataFile, begin: int, fragments: list[Fragment], alignment: int, *, last: bool) -> WriteWindow:
    start = begin // alignment * alignment
    before: list[Fragment] = []
    index, position = fragments[0].box, begin
    if fragments[0].start == 0:
        index -= 1
    while position > start:
        box = file.boxes[index]
        first = max(start, box.offset)
        if first < position:
            before.append(Fragment(index, first - box.offset, position - box.offset, digest=False))
        position = min(position, first)
        index -= 1
    end = file.boxes[fragments[-1].box].offset + fragments[-1].stop
    return WriteWindow(number, start, end if last else end // alignment * alignment, end, (*reversed(before), *fragments), end - begin)
