"""Manifests of several ranks that no take writes are refused, with the entry named, before anything in them is believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from expstate import Snapshot, StateDict
from expstate.errors import ManifestError
from expstate.format import manifest as manifests
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, Manifest, TensorEntry, ValueEntry
from expstate.format.validate import validate
from tests.ranks import worlds


@pytest.fixture(scope="module")
def taken(tmp_path_factory) -> tuple[Path, Manifest]:
    """A snapshot of two ranks with an entry of every kind."""
    folder = tmp_path_factory.mktemp("hostile") / "a"

    def work(rank):
        x = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (2,)), [Shard(0)])
        own = torch.ones(2) + rank
        state = StateDict(x=x, own=own, tied=own, value=rank, alike=1, inner={"of": rank}, whole=torch.ones(3))
        Snapshot.take(folder, {"s": state}, replicated=["s/whole"])

    worlds.results(2, work)
    return folder, Snapshot(folder).manifest


def _with(manifest: Manifest, change: Callable[[list[Entry]], None]) -> Manifest:
    entries = list(manifest.entries)
    change(entries)
    return msgspec.structs.replace(manifest, entries=tuple(entries))


def _at(entries: list[Entry], path: str, rank: int | None = None) -> int:
    return next(number for number, entry in enumerate(entries) if entry.path == path and entry.rank == rank)


def _replace(path: str, of_rank: int | None, **fields: object) -> Callable[[list[Entry]], None]:
    def change(entries: list[Entry]) -> None:
        number = _at(entries, path, of_rank)
        entries[number] = msgspec.structs.replace(entries[number], **fields)

    return change


def _remove(path: str, rank: int | None) -> Callable[[list[Entry]], None]:
    return lambda entries: entries.pop(_at(entries, path, rank)) and None


def _add(*more: Entry) -> Callable[[list[Entry]], None]:
    return lambda entries: entries.extend(more)


def _boxes(change: Callable[[list[manifests.Box]], None]) -> Callable[[list[Entry]], None]:
    def of_entries(entries: list[Entry]) -> None:
        number = _at(entries, "s/x")
        entry = entries[number]
        assert isinstance(entry, TensorEntry)
        boxes = list(entry.boxes)
        change(boxes)
        entries[number] = msgspec.structs.replace(entry, boxes=tuple(boxes))

    return of_entries


def _moved(number: int, **fields: object) -> Callable[[list[manifests.Box]], None]:
    def change(boxes: list[manifests.Box]) -> None:
        boxes[number] = msgspec.structs.replace(boxes[number], **fields)

    return change


def test_what_was_taken_is_believed(taken):
    _, manifest = taken
    validate(manifest)
    assert {None, 0, 1} == {entry.rank for entry in manifest.entries}
    assert 2 == sum(isinstance(entry, AliasEntry) for entry in manifest.entries)


FORGED = {
    "rank too high": (_replace("s/value", 1, rank=2), "'s/value' is of rank 2, and 2 ranks took it"),
    "rank below zero": (_replace("s/value", 1, rank=-1), "'s/value' is of rank -1, and 2 ranks took it"),
    "twice on a rank": (_replace("s/value", 1, rank=0), "'s/value' is there twice"),
    "of all and of one": (_add(ValueEntry("s/alike", 1, 1)), "'s/alike' is there twice"),
    "of one and of all": (_add(ValueEntry("s/value", 1)), "'s/value' is there twice"),
    "of all twice": (_add(ValueEntry("s/alike", 1)), "'s/alike' is there twice"),
    "no container": (_add(ValueEntry("s/none/x", 1, 0)), "'s/none/x' is not inside a container"),
    "container on another rank": (
        _add(ContainerEntry("s/more", "dict", None, 0), ValueEntry("s/more/x", 1, 1)),
        "'s/more/x' is not inside a container",
    ),
    "container on some ranks": (
        _add(ContainerEntry("s/more", "dict", None, 0), ValueEntry("s/more/x", 1)),
        "'s/more/x' is not inside a container",
    ),
    "container that is a value elsewhere": (
        _add(ContainerEntry("s/more", "dict", None, 0), ValueEntry("s/more", 1, 1), ValueEntry("s/more/x", 1)),
        "'s/more/x' is not inside a container",
    ),
    "container after what is in it": (
        _add(ValueEntry("s/more/x", 1), ContainerEntry("s/more", "dict")),
        "'s/more/x' is not inside a container",
    ),
    "key without a state": (_remove("s", None), "'s/x' is not inside a container"),
    "tied to another rank's": (_remove("s/own", 1), "'s/tied' is tied to something that is no tensor"),
    "tied for all to one rank's": (_add(AliasEntry("s/more", "s/own")), "'s/more' is tied to something that is no tensor"),
    "tied to a value": (_replace("s/tied", 0, target="s/value"), "'s/tied' is tied to something that is no tensor"),
    "a box less": (_boxes(lambda boxes: boxes.pop()), "'s/x' (is not covered by its boxes|has a box)"),
    "boxes over each other": (_boxes(_moved(1, starts=(3,))), "'s/x' is not covered by its boxes, or has boxes that lie over each other"),
    "a gap": (_boxes(_moved(0, sizes=(3,))), "'s/x' is not covered by its boxes"),
    "a box outside": (_boxes(_moved(1, starts=(5,))), "'s/x' has a box outside its shape"),
    "a box before the first": (_boxes(_moved(0, starts=(-1,))), "'s/x' has a box outside its shape"),
    "a box of less than nothing": (_boxes(_moved(0, sizes=(-4,))), "'s/x' has a box outside its shape"),
    "a box of another dimension": (_boxes(_moved(0, starts=(0, 0), sizes=(4, 1))), "'s/x' has a box without a place in its shape"),
    "a box without a place": (_boxes(_moved(0, starts=None, sizes=None)), "'s/x' has a box without a place in its shape"),
    "a box in no file": (_boxes(_moved(0, file=99)), "'s/x' lies in file number 99"),
    "a box beyond its file": (_boxes(_moved(0, offset=10**9)), "'s/x' needs 16 bytes at 1,000,000,000 of file"),
    "a box over another entry": (
        _boxes(lambda boxes: _moved(1, file=boxes[0].file, offset=boxes[0].offset)(boxes)),
        "two entries lie over each other",
    ),
    "no boxes": (_boxes(list.clear), "'s/x' is not covered by its boxes"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_cannot_be_is_refused(taken, name):
    change, match = FORGED[name]
    with pytest.raises(ManifestError, match=match):
        validate(_with(taken[1], change))


@pytest.mark.parametrize("size", [0, -1])
def test_a_world_of_no_ranks_is_refused(taken, size):
    with pytest.raises(ManifestError, match=f"world size {size} is not possible"):
        validate(msgspec.structs.replace(taken[1], world_size=size))


def test_a_smaller_world_than_its_ranks_is_refused(taken):
    with pytest.raises(ManifestError, match=r"is of rank 0, and one process took it"):
        validate(msgspec.structs.replace(taken[1], world_size=1))


def test_a_larger_world_has_ranks_that_lack_nothing_but_their_own(taken):
    """A world of a billion is no reason to count to a billion."""
    validate(msgspec.structs.replace(taken[1], world_size=10**9))


def test_a_key_that_only_some_ranks_have_is_refused(taken):
    def change(entries):
        entries[_at(entries, "s")] = ContainerEntry("s", "dict", None, 0)
        entries[:] = [entry for entry in entries if entry.path == "s"]

    with pytest.raises(ManifestError, match="'s' is a key without a state on some ranks"):
        validate(_with(taken[1], change))


@pytest.mark.parametrize("name", ["rank too high", "a gap", "tied to another rank's"])
def test_nothing_is_done_with_a_forged_snapshot(taken, tmp_path, name):
    folder, manifest = taken
    forged = tmp_path / "a"
    forged.mkdir()
    for path in folder.iterdir():
        (forged / path.name).write_bytes(path.read_bytes())
    (forged / "snapshot.json").write_bytes(manifests.encode(_with(manifest, FORGED[name][0])))
    live = {"s": StateDict(x=torch.zeros(8), value=-1)}
    for action in (
        lambda: Snapshot(forged).entries(),
        lambda: Snapshot(forged).restore(live),
        lambda: Snapshot(forged).read_object("s/x"),
        lambda: Snapshot(forged).get_state_dict_for_key("s", rank=1),
        lambda: Snapshot(forged).verify(),
    ):
        with pytest.raises(ManifestError, match=FORGED[name][1]):
            action()
    assert (0, -1) == (int(live["s"]["x"].sum()), live["s"]["value"])
