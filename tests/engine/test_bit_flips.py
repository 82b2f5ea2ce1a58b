"""A flipped bit in any file of a snapshot is noticed, and where it is said; or it changes nothing that comes back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine import read
from expstate.engine.read import Damage
from expstate.errors import ExpstateError, SnapshotCorruptError, SnapshotNotFoundError, UnsupportedFormatError
from expstate.format import manifest as manifests
from expstate.settings import MIB

TAIL = 200


class Thing:
    """Stored by pickle, in a file of its own."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and self.values == other.values

    __hash__ = None  # type: ignore[assignment]


def state(value: float) -> dict[str, StateDict]:
    """Tensors of one block and of several, values and an object."""
    return {
        "model": StateDict(
            weight=torch.full((MIB // 2,), value),
            bias=torch.full((9,), value, dtype=torch.float64),
            names=["a", "b", {"c": value}],
        ),
        "other": StateDict(thing=Thing([value])),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("flips") / "snapshot"
    with pytest.warns(match="trust=True"):
        Snapshot.take(place, state(1))
    for path in place.iterdir():
        path.chmod(0o644)
    return place


@pytest.fixture(scope="module")
def large_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of more blocks than the manifest holds digests of: they are in a file of their own."""
    place = tmp_path_factory.mktemp("large") / "snapshot"
    Snapshot.take(place, {"large": StateDict(table=torch.ones(66 * MIB, dtype=torch.uint8))})
    for path in place.iterdir():
        path.chmod(0o644)
    return place


def same(one: dict[str, StateDict], other: dict[str, StateDict]) -> bool:
    """Whether two states are equal, to the bit."""
    return all(
        torch.equal(value, other[key][name]) if isinstance(value, torch.Tensor) else value == other[key][name]
        for key, stateful in one.items()
        for name, value in stateful.items()
    )


class Flipped:
    """A file with one bit flipped, for the length of a ``with`` block."""

    def __init__(self, path: Path, offset: int, bit: int) -> None:
        self.path, self.offset, self.bit = path, offset, bit

    def _flip(self) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.offset)
            byte = file.read(1)[0]
            file.seek(self.offset)
            file.write(bytes([byte ^ 1 << self.bit]))

    def __enter__(self) -> None:
        self._flip()

    def __exit__(self, *_: object) -> None:
        self._flip()


def entry_at(snapshot: Snapshot, file: str, offset: int) -> str:
    """The entry whose bytes lie at an offset of a file; empty for what is no entry's."""
    for entry in snapshot.manifest.entries:
        for box, nbytes in snapshot._source.box_sizes(entry) if hasattr(entry, "boxes") else ():
            if snapshot.manifest.files[box.file].name == file and box.offset <= offset < box.offset + nbytes:
                return entry.path
    return ""


def positions(place: Path, path: Path, dice: random.Random) -> list[int]:
    """Where to flip: everywhere in turn at the beginning and at the end, and here and there."""
    size = path.stat().st_size
    chosen = {*range(0, 40, 3), *(size - 1 - at for at in range(0, 40, 3)), *(dice.randrange(size) for _ in range(20))}
    for entry in Snapshot(place).manifest.entries:
        for box in getattr(entry, "boxes", ()):
            if Snapshot(place).manifest.files[box.file].name == path.name:
                chosen |= {box.offset - 1, box.offset, box.offset + entry.nbytes - 1}
    return sorted(at for at in chosen if 0 <= at < size)


def check_restore(place: Path, name: str, entry: str) -> None:
    """What a restore from a snapshot whose file is damaged in an entry does."""
    live = state(7)
    try:
        Snapshot(place).restore(live, trust=True)
    except ExpstateError as caught:
        error = str(caught)
    else:
        assert not entry  # of a header: nothing that comes back depends on it
        assert same(state(1), live)
        return
    assert entry
    assert entry in error
    assert name in error


def damage_of(place: Path, name: str, offset: int, bit: int) -> Damage:
    """The one damage that is found when this bit is flipped; it is where the bit is."""
    with Flipped(place / name, offset, bit):
        report = Snapshot(place).verify()
        (damage,) = report.damages
        assert not report.ok
        assert name == damage.file
        assert damage.offset <= offset < damage.offset + damage.nbytes
        if name.startswith(("model", "other")):
            check_restore(place, name, damage.entry)
    return damage


def test_flips_in_data_files_are_found_and_named(place: Path) -> None:
    whole = Snapshot(place)
    dice = random.Random(0)
    seen = set()
    for record in whole.manifest.files:
        for offset in positions(place, place / record.name, dice):
            damage = damage_of(place, record.name, offset, dice.randrange(8))
            assert entry_at(whole, record.name, offset) == damage.entry
            assert damage.nbytes <= (MIB if damage.entry else record.header_bytes)
            seen.add(damage.entry)

    assert {"", "model/weight", "model/bias", "other/thing"} == seen
    assert whole.verify().ok


def test_flips_in_a_large_tensor_and_in_its_digests_are_found(large_place: Path) -> None:
    table, digests = Snapshot(large_place).manifest.files
    for offset in (100, table.header_bytes, table.header_bytes + 40 * MIB + 7, table.size - 1):
        damage = damage_of(large_place, table.name, offset, 3)
        assert ("" if offset == 100 else "large/table") == damage.entry
        assert damage.nbytes <= MIB
    assert "" == damage_of(large_place, digests.name, 100, 3).entry
    for offset in (digests.header_bytes, digests.size - 1):
        # The bytes of the tensor are as they were, but nothing says so any more.
        with Flipped(large_place / digests.name, offset, 3):
            (damage,) = Snapshot(large_place).verify().damages
        assert "large/table" == damage.entry
        assert "digests of its blocks" in damage.reason


def test_flips_in_the_manifest_are_found(place: Path) -> None:
    """It is damaged, not missing: what is missing might be taken anew, and what is damaged may not."""
    path = place / "snapshot.json"
    size = path.stat().st_size
    dice = random.Random(0)
    body = {*range(60), *(dice.randrange(size) for _ in range(100))}
    for offset in sorted(body | set(range(size - TAIL, size))):
        for bit in range(8) if offset >= size - 100 or offset < 20 else [dice.randrange(8)]:
            with Flipped(path, offset, bit), pytest.raises(SnapshotCorruptError):
                Snapshot(place).keys()

    assert Snapshot(place).keys()


def test_every_beginning_of_a_manifest_is_an_interrupted_take(place: Path) -> None:
    data = (place / "snapshot.json").read_bytes()
    for size in range(len(data)):
        with pytest.raises(SnapshotNotFoundError):
            manifests.decode(data[:size])
        assert manifests.is_torn(data[:size])
    assert not manifests.is_torn(data)


@pytest.mark.parametrize("more", [b"\n", b" ", b"\0", b"}", b"x" * 1000])
def test_a_manifest_with_something_after_it_is_damaged_and_not_missing(place: Path, more: bytes) -> None:
    """An editor that adds a line does not make a snapshot disappear, nor let the next take have its place."""
    data = (place / "snapshot.json").read_bytes()
    with pytest.raises(SnapshotCorruptError):
        manifests.decode(data + more)


def test_a_manifest_with_other_line_ends_is_damaged_and_not_missing(place: Path) -> None:
    data = (place / "snapshot.json").read_bytes()
    with pytest.raises(SnapshotCorruptError):
        manifests.decode(data.replace(b"\n", b"\r\n"))


def test_a_flip_does_not_make_the_format_a_newer_one(place: Path) -> None:
    data = bytearray((place / "snapshot.json").read_bytes())
    data[data.index(b'"format":1') + 9] ^= 0x08
    with pytest.raises(SnapshotCorruptError) as caught:
        manifests.decode(bytes(data))

    assert not isinstance(caught.value, UnsupportedFormatError)


# Would it be noticed without the digests?


def test_without_digests_flips_go_unnoticed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tensors they come back as values."""
    record = Snapshot(place).manifest.files[0]
    live = {"model": state(7)["model"]}
    expected = {"model": state(1)["model"]}
    with Flipped(place / record.name, record.size - 3, 0):
        with pytest.raises(ExpstateError):
            Snapshot(place).restore(live)
        Snapshot(place).restore(live, verify=False)
        assert not same(expected, live)

        monkeypatch.setattr(read.PieceReader, "_check", lambda *_: None)
        assert Snapshot(place).verify().ok
        Snapshot(place).restore(live)
        assert not same(expected, live)


def test_without_its_digest_flips_in_the_manifest_go_unnoticed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "snapshot.json"

    class Agreeing:
        """Says of any bytes that they are those of the file's end."""

        def __init__(self, _: object) -> None:
            pass

        def hexdigest(self) -> str:
            return path.read_bytes()[-67:-3].decode("ascii", "replace")

    monkeypatch.setattr(manifests, "blake3", Agreeing)
    with Flipped(path, path.read_bytes().index(b'"created_at":"') + 15, 0):
        Snapshot(place).keys()
