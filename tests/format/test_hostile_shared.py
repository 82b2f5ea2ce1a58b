"""What incremental takes brought, from a stranger: boxes that share a place, fingerprints, files of earlier snapshots, bases that lie."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict, settings
from expstate.engine import memory
from expstate.errors import ExpstateError, ManifestError, MemoryBudgetError, SnapshotCorruptError, UnsafePathError
from expstate.format import names
from tests.campaign import IS_LONG, Campaign
from tests.format.forging import OUTSIDE, Forged, app_state, digest_text, everything, guarded, little_memory, refused, seal, take

WEIGHT = "model/first.weight"
SHARED = "shared_boxes"
SIZE = 50_000
pytestmark = pytest.mark.usefixtures("imported")


# Boxes that share a place


@pytest.fixture
def alike(tmp_path: Path) -> Forged:
    """A snapshot with three equal tensors, stored once."""
    folder = tmp_path / "alike" / "snapshot"
    folder.parent.mkdir()
    one = torch.arange(SIZE, dtype=torch.int32)
    take(folder, app_state() | {"twins": StateDict(a=one, b=one.clone(), c=one.clone(), d=one + 1)}, dedup=True)
    return Forged(folder)


def test_equal_boxes_at_one_place_are_read_under_the_guard(alike: Forged, tmp_path: Path) -> None:
    """What the tests below break is whole."""
    assert alike.box("twins/a")[:3] == alike.box("twins/b")[:3]
    assert [SHARED] == alike.document["requires"]
    found = everything(alike.folder, tmp_path / "copies")

    assert [] == [error for error in found.values() if isinstance(error, Exception)]
    assert found["verify"].ok


def _without_a_word(forged: Forged) -> None:
    forged.document["requires"] = []


def _in_part(forged: Forged) -> None:
    forged.box("twins/b")[1] += 4
    forged.entry("twins/b")[3] = [SIZE - 1]


def _a_beginning(forged: Forged) -> None:
    forged.entry("twins/b")[3] = [SIZE - 1]


def _with_another_digest(forged: Forged) -> None:
    forged.box("twins/b")[2] = digest_text(b"another")


def _over_another_tensor(forged: Forged) -> None:
    forged.box("twins/d")[1] = forged.box("twins/a")[1]


def _over_an_object(forged: Forged) -> None:
    forged.entry("twins/d")[4] = [forged.box("extra/half")]


@pytest.mark.parametrize("edit", [_without_a_word, _in_part, _a_beginning, _with_another_digest, _over_another_tensor, _over_an_object])
def test_boxes_that_share_a_place_are_the_same(alike: Forged, edit: Callable[[Forged], None]) -> None:
    """In whole, said so, and with one digest: else two readers could be shown different things (H10)."""
    edit(alike)

    refused(alike, ManifestError, "")


def test_bytes_that_are_shared_come_back_as_each_says_that_they_are(alike: Forged) -> None:
    """Another dtype and shape of the same bytes, each with memory of its own."""
    alike.entry("twins/b")[2:4] = ["float32", [SIZE // 2, 2]]
    snapshot = alike.write()
    with guarded(alike.folder):
        a, b = snapshot.read_object("twins/a"), snapshot.read_object("twins/b")

    assert torch.equal(a.view(torch.float32).view(-1, 2), b)
    assert a.data_ptr() != b.data_ptr()


def test_damage_in_what_is_shared_names_all_that_have_it(alike: Forged) -> None:
    """Though it is read once."""
    path = alike.file("twins/a")
    data = bytearray(path.read_bytes())
    data[alike.box("twins/a")[1] + 5] ^= 1
    path.unlink()
    path.write_bytes(data)
    report = Snapshot(alike.folder).verify()

    assert {"twins/a", "twins/b", "twins/c"} == {damage.entry for damage in report.damages}


@pytest.mark.campaign("Safe to open", "very many entries of few bytes")
@pytest.mark.timeout(600)
def test_very_many_entries_of_one_box_are_no_more_than_it(
    alike: Forged, tmp_path: Path, campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file says that a million tensors lie at one place: they are listed, verified and copied, and not held at once (H7, H12)."""
    count = campaign.choose(5_000, 1_000_000)
    box = alike.box("twins/a")
    many = [["tensor", f"many/{number}", "int32", [SIZE], [box], "tensor", False, "cpu", None] for number in range(count)]
    alike.document["keys"].append(["many", "x"])
    alike.document["entries"] += [["container", "many", "dict", {"keys": None}, None], *many]
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**29)
    alike.write()
    with guarded(alike.folder, tmp_path), little_memory(2**32 if campaign.is_long else 2**30):
        snapshot = Snapshot(alike.folder)
        assert count == len(snapshot.entries("many/*"))
        report = snapshot.verify()
        assert report.ok
        assert report.nbytes < sum(path.stat().st_size for path in alike.folder.iterdir())
        snapshot.copy(tmp_path / "copy")
        for read in (lambda: snapshot.get_state_dict_for_key("many"), lambda: snapshot.restore({"many": StateDict()}, strict=False)):
            with pytest.raises((MemoryBudgetError, ManifestError)) as caught:
                read()
            assert "memory" in str(caught.value) or "many" in str(caught.value)
        assert SIZE == len(snapshot.read_object(f"many/{count - 1}"))
    campaign.tried(count)


# Fingerprints


@pytest.mark.parametrize("fingerprint", ["", "A" * 20, "A" * 44, "!" * 24, 5, [0] * 16])
def test_a_fingerprint_has_its_length(forged: Forged, fingerprint: Any) -> None:
    """A shorter one would be easier to meet."""
    forged.box(WEIGHT)[6] = fingerprint

    refused(forged, ManifestError, "")


@pytest.mark.parametrize("key", ["", "0" * 31, "A" * 32, "0" * 32 + "\n", "٣" * 32, 5, []])
def test_a_key_of_fingerprints_has_its_form(forged: Forged, key: Any) -> None:
    """It is used as it stands."""
    forged.document["fingerprint_key"] = key

    refused(forged, ManifestError, "")


def test_fingerprints_that_could_be_are_believed_to_be_no_digests(forged: Forged, tmp_path: Path) -> None:
    """What they say changes nothing of what is read, and nothing of what is taken on a CPU."""
    forged.document["fingerprint_key"] = "0" * 32
    forged.box(WEIGHT)[6] = "A" * 22 + "=="
    snapshot = forged.write()
    model = torch.nn.Linear(3, 3)
    with guarded(forged.folder):
        assert snapshot.verify().ok
    taken = Snapshot.take(tmp_path / "new", {"model": model}, base=snapshot)

    assert torch.equal(model.weight, taken.read_object("model/weight"))


# A base that lies


def state() -> dict[str, Any]:
    """What is taken with a base that says that it has it; nearly all of its bytes are one tensor."""
    return {"frozen": StateDict(w=torch.arange(SIZE, dtype=torch.float64)), "head": StateDict(w=torch.ones(3))}


@pytest.fixture
def base(tmp_path: Path) -> Forged:
    """A snapshot of the same, in a folder of its own."""
    folder = tmp_path / "base" / "snapshot"
    folder.parent.mkdir()
    take(folder, state())
    return Forged(folder)


def take_from(base: Forged, place: Path) -> Snapshot:
    """A take that goes on from it, and does nothing that reading it must not."""
    with settings.override(provenance="off"), guarded(base.folder, place):
        return Snapshot.take(place, state(), base=Snapshot(base.folder))


def is_whole(snapshot: Snapshot) -> bool:
    """Whether it has what was taken, in files of its own folder."""
    back = {"frozen": StateDict(w=torch.zeros(SIZE, dtype=torch.float64)), "head": StateDict(w=torch.zeros(3))}
    report = snapshot.verify()
    snapshot.restore(back)
    return report.ok and all(torch.equal(state()[key]["w"], back[key]["w"]) for key in back)


def linked(snapshot: Snapshot) -> list[str]:
    return [record.name for record in snapshot.manifest.files if record.name.startswith("base/")]


def test_an_honest_base_is_linked(base: Forged, tmp_path: Path) -> None:
    """What the tests below forge saves writing."""
    taken = take_from(base, tmp_path / "new")

    assert 1 <= len(linked(taken))
    assert is_whole(taken)


@pytest.mark.parametrize("name", OUTSIDE if IS_LONG else OUTSIDE[::6])
def test_nothing_outside_the_folder_of_a_base_is_linked(base: Forged, tmp_path: Path, name: str) -> None:
    """A base that names such a file is refused, before anything is written (H1 to H5)."""
    secret = tmp_path / "base" / f"x-00001-{base.token}.safetensors"
    secret.write_bytes(base.file("frozen/w").read_bytes())
    for record in base.document["files"]:
        record[0] = name.format(token=base.token)
    base.write()
    with pytest.raises(UnsafePathError):
        take_from(base, tmp_path / "new")

    assert not (tmp_path / "new").exists()
    assert 1 == secret.stat().st_nlink


def _to_a_link(base: Forged, outside: Path) -> None:
    path = base.file("frozen/w")
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


def _to_a_pipe(base: Forged, outside: Path) -> None:
    base.file("frozen/w").unlink()
    os.mkfifo(base.file("frozen/w"))


def _to_a_folder(base: Forged, outside: Path) -> None:
    base.file("frozen/w").unlink()
    base.file("frozen/w").mkdir()


def _to_nothing(base: Forged, outside: Path) -> None:
    base.file("frozen/w").unlink()


def _to_a_shorter_file(base: Forged, outside: Path) -> None:
    path = base.file("frozen/w")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1])


def _below_a_link(base: Forged, outside: Path) -> None:
    path = base.file("frozen/w")
    outside.mkdir()
    shutil.move(path, outside / path.name)
    (base.folder / "base").symlink_to(outside)
    base.document["files"][base.box("frozen/w")[0]][0] = f"base/{path.name}"


def _larger_in_the_manifest(base: Forged, outside: Path) -> None:
    base.document["files"][base.box("frozen/w")[0]][1] += 2**40


def _with_digests_of_nothing(base: Forged, outside: Path) -> None:
    for path in ("frozen/w", "head/w"):
        base.box(path)[2] = digest_text(b"another")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "forge",
    [
        *(_to_a_link, _to_a_pipe, _to_a_folder, _to_nothing, _to_a_shorter_file, _below_a_link),
        *(_larger_in_the_manifest, _with_digests_of_nothing),
    ],
)
def test_what_a_base_has_not_is_written(base: Forged, tmp_path: Path, forge: Callable[[Forged, Path], None]) -> None:
    """The take is as whole as any, and no name of a file outside comes into it (H6)."""
    outside = tmp_path / "outside"
    forge(base, outside)
    base.write()
    taken = take_from(base, tmp_path / "new")

    assert is_whole(taken)
    assert not any("frozen" in name for name in linked(taken))
    files = [path for path in (tmp_path / "new").rglob("*") if path.name.startswith("frozen")]
    assert all(path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1 for path in files)


def _beyond_its_file(base: Forged) -> None:
    base.box("frozen/w")[1] += 8


def _of_a_file_that_is_not(base: Forged) -> None:
    base.box("frozen/w")[0] = 99


def _before_its_data(base: Forged) -> None:
    base.box("frozen/w")[1] = 0


@pytest.mark.parametrize("forge", [_beyond_its_file, _of_a_file_that_is_not, _before_its_data])
def test_a_base_that_cannot_be_is_refused(base: Forged, tmp_path: Path, forge: Callable[[Forged], None]) -> None:
    """As by every reader."""
    forge(base)
    base.write()
    with pytest.raises(ManifestError):
        take_from(base, tmp_path / "new")

    assert not (tmp_path / "new").exists()


def test_a_base_whose_bytes_are_not_what_it_says_is_never_believed_silently(base: Forged, tmp_path: Path) -> None:
    """Digests are compared, not the bytes behind them: so a reader of what was taken is told, and gets no other values."""
    path = base.file("frozen/w")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.unlink()
    path.write_bytes(data)
    taken = take_from(base, tmp_path / "new")
    back = {"frozen": StateDict(w=torch.zeros(SIZE, dtype=torch.float64))}

    assert {"frozen/w"} == {damage.entry for damage in taken.verify().damages}
    with pytest.raises(SnapshotCorruptError, match="frozen/w"):
        taken.read_object("frozen/w")
    with pytest.raises(ExpstateError, match="frozen/w"):
        taken.restore(back, atomic=True)
    assert not back["frozen"]["w"].any()


def test_a_delete_goes_through_no_link(base: Forged, tmp_path: Path) -> None:
    """The folder of shared files may be one that leads to other people's."""
    outside = tmp_path / "outside"
    name = base.file("frozen/w").name
    _below_a_link(base, outside)
    snapshot = base.write()
    with guarded(base.folder), pytest.raises(ExpstateError):
        snapshot.delete()

    assert [name] == [path.name for path in outside.iterdir()]


def test_a_forged_manifest_is_one_byte_for_byte(base: Forged) -> None:
    """The helpers seal as a take does: what they forge is refused for what it says alone."""
    path = base.folder / names.MANIFEST
    data = path.read_bytes()

    assert data == seal(data[: data.rindex(b',"blake3"')])
