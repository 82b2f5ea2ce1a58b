"""Windows: every byte of a data file is written once, every block digested once, whatever the boxes and the alignment."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from expstate.engine.windows import WriteWindow, write_windows
from expstate.format.layout import PAGE_BYTES, DataFile, PlacedBox
from expstate.format.manifest import BLOCK_BYTES

MIB = 1024**2


def data_file(sizes: list[int]) -> DataFile:
    """A file with boxes of these sizes, one after the other behind a header of a page."""
    boxes, offset = [], PAGE_BYTES
    for number, size in enumerate(sizes):
        boxes.append(PlacedBox(number, 0, size, offset))
        offset += size
    return DataFile("a.safetensors", b" " * PAGE_BYTES, offset, boxes)


SIZES = st.lists(
    st.one_of(st.integers(0, 10_000), st.sampled_from([PAGE_BYTES, MIB, MIB + 1, 3 * MIB - 7]), st.integers(0, 5 * MIB)),
    min_size=1,
    max_size=30,
)


def windows_of(file: DataFile, alignment: int, window_bytes: int) -> list[WriteWindow]:
    return list(write_windows(0, file, alignment, window_bytes))


@given(SIZES, st.sampled_from([1, 512, PAGE_BYTES]), st.sampled_from([1, 2, 16]))
def test_every_byte_after_the_header_is_written_once(sizes: list[int], alignment: int, mib: int) -> None:
    """What windows write follows each other from the header to the end of the file, at aligned places."""
    file = data_file(sizes)
    position = len(file.header)
    windows = windows_of(file, alignment, mib * MIB)
    for window in windows:
        assert position == window.start
        assert 0 == window.start % alignment
        assert window.start <= window.stop <= window.staged_stop
        position = window.stop
    assert file.size == position or not windows
    assert sum(sizes) == sum(window.nbytes for window in windows)


@given(SIZES, st.sampled_from([1, 512, PAGE_BYTES]), st.sampled_from([1, 2, 16]))
def test_a_window_is_staged_without_holes_and_fits_a_buffer(sizes: list[int], alignment: int, mib: int) -> None:
    """Fragments follow each other from the window's first byte to the last that is staged, which a buffer has room for."""
    file = data_file(sizes)
    for window in windows_of(file, alignment, mib * MIB):
        position = window.start
        for fragment in window.fragments:
            assert position == file.boxes[fragment.box].offset + fragment.start
            assert fragment.start < fragment.stop <= file.boxes[fragment.box].nbytes
            position += fragment.stop - fragment.start
        assert window.staged_stop == position
        assert position - window.start <= mib * MIB + 2 * alignment


@given(SIZES, st.sampled_from([1, PAGE_BYTES]), st.sampled_from([1, 16]))
def test_every_block_is_digested_once(sizes: list[int], alignment: int, mib: int) -> None:
    """The fragments to digest are whole blocks, and together all blocks of all boxes."""
    file = data_file(sizes)
    digested: list[tuple[int, int]] = []
    for window in windows_of(file, alignment, mib * MIB):
        for fragment in window.fragments:
            if fragment.digest:
                assert 0 == fragment.start % BLOCK_BYTES
                assert 0 == fragment.stop % BLOCK_BYTES or fragment.stop == file.boxes[fragment.box].nbytes
                digested += [(fragment.box, block) for block in range(fragment.start // BLOCK_BYTES, -(-fragment.stop // BLOCK_BYTES))]
    assert [(number, block) for number, box in enumerate(file.boxes) for block in range(box.block_count)] == digested


def test_a_file_without_bytes_has_no_windows() -> None:
    """Empty boxes are not staged."""
    assert [] == windows_of(data_file([0, 0]), PAGE_BYTES, MIB)
