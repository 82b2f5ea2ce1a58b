"""What people add to a snapshot is in its folder and in the catalog, whoever else adds, moves or takes away at the same time."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from expstate import Catalog, Snapshot, settings
from expstate.catalog import edits, rows
from expstate.catalog.model import Record, describe
from expstate.engine import annotate
from expstate.errors import (
    CatalogError,
    CatalogUnavailableError,
    CatalogWarning,
    InvalidArgumentError,
    InvalidMetadataError,
    InvalidNameError,
    ProvenanceWarning,
    RefNotFoundError,
    SnapshotCorruptError,
    SnapshotPinnedError,
    UntrustedLocationError,
)
from expstate.format import annotations as added
from expstate.format import names
from expstate.format.annotations import Annotations, Mark
from expstate.storage.local import LocalStorage
from tests.engine.processes import end_of, start_child, unmount

from .made import data, enter

Take = Callable[..., Snapshot]


@pytest.fixture(autouse=True)
def _untold() -> Iterator[None]:
    """No test hears what another was told once."""
    edits._told.clear()
    yield
    edits._told.clear()


def annotations(snapshot: Snapshot) -> Annotations | None:
    return annotate.read(LocalStorage(snapshot.path), snapshot.id)


def rebuilt(tmp_path: Path, *snapshots: Snapshot) -> Catalog:
    """Another catalog, made from the folders alone, in this order."""
    catalog = Catalog(tmp_path / "rebuilt.db")
    with catalog.database.writing() as connection:
        for snapshot in snapshots:
            found = describe(snapshot.manifest, snapshot.metadata.digest, snapshot.path, annotations(snapshot))
            rows.put(connection, msgspec.structs.replace(found, project="tests"))
    return catalog


def now_true(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("tags", "aliases", "pinned", "note", "metrics")}


# Each edit


def test_every_edit_is_in_the_record_and_in_the_folder(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """It gives the record as it is then, a search finds it so, and a catalog that is built anew has the same."""
    taken = take(any_catalog, "one", name="one", tags=["given", "gone"], metrics={"loss": 3, "acc": 0.5}, note="first")
    any_catalog.tag("one", "b", "a", "b")
    any_catalog.untag("one", "gone", "never")
    any_catalog.alias("one", "best")
    any_catalog.pin("one")
    any_catalog.note("one", "second")
    record = any_catalog.log_metric("one", "loss", 0.25)
    expected = {
        "tags": ("a", "b", "given"),
        "aliases": ("best",),
        "pinned": True,
        "note": "second",
        "metrics": {"loss": 0.25, "acc": 0.5},
    }

    assert expected == now_true(record) == now_true(any_catalog["best"])
    assert [taken.id] == [found.id for found in any_catalog.search("tag = a and not tag = gone and pinned and loss < 1")]
    again = rebuilt(tmp_path, taken)
    assert expected == now_true(again["best"])
    again.close()


def test_every_edit_can_be_undone(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """Then the record is as it was, and stays so when the catalog is built anew."""
    taken = take(any_catalog, "one", name="one", tags=["given"])
    before = now_true(any_catalog["one"])
    any_catalog.tag("one", "a")
    any_catalog.alias("one", "best")
    any_catalog.pin("one")
    any_catalog.note("one", "text")
    any_catalog.untag("one", "a")
    any_catalog.unalias("best")
    any_catalog.unpin("one")
    after = any_catalog.note("one", None)

    assert before == now_true(after)
    taken_again = rebuilt(tmp_path, taken)
    assert before == now_true(taken_again["one"])
    taken_again.close()
    taken.delete()


def test_a_note_of_the_take_can_be_taken_away(catalog: Catalog, take: Take) -> None:
    """By None, and by an empty text."""
    for folder, text in (("one", None), ("two", "")):
        take(catalog, folder, note="given")
        assert catalog.note("latest", text).note is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (2**80, 2**80),
        (0.5, 0.5),
        (math.inf, math.inf),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(7), 7),
        (np.float32(0.5), 0.5),
        (np.int64(-1), -1),
    ],
)
def test_metrics_are_numbers_of_any_kind(catalog: Catalog, take: Take, value: Any, expected: float) -> None:
    """With their type, as at a take."""
    take(catalog, "one")
    found = catalog.log_metric("latest", "m", value).metrics["m"]

    assert (type(expected), expected) == (type(found), found)


def test_nan_is_a_metric(catalog: Catalog, take: Take) -> None:
    take(catalog, "one")

    assert math.isnan(catalog.log_metric("latest", "m", math.nan).metrics["m"])


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda catalog: catalog.tag("latest"), InvalidArgumentError),
        (lambda catalog: catalog.tag("latest", "good", "a/b"), InvalidNameError),
        (lambda catalog: catalog.tag("latest", 3), InvalidNameError),
        (lambda catalog: catalog.untag("latest", ""), InvalidNameError),
        (lambda catalog: catalog.alias("latest", "latest"), InvalidNameError),
        (lambda catalog: catalog.alias("latest", "live"), InvalidNameError),
        (lambda catalog: catalog.alias("latest", "a@b"), InvalidNameError),
        (lambda catalog: catalog.alias("latest", "x" * 300), InvalidNameError),
        (lambda catalog: catalog.alias("latest", "\x1b[31m"), InvalidNameError),
        (lambda catalog: catalog.unalias("a:b"), InvalidNameError),
        (lambda catalog: catalog.unalias("nobody"), RefNotFoundError),
        (lambda catalog: catalog.note("latest", 3), InvalidMetadataError),
        (lambda catalog: catalog.note("latest", "x" * 2**21), InvalidMetadataError),
        (lambda catalog: catalog.note("latest", "\ud800"), InvalidMetadataError),
        (lambda catalog: catalog.log_metric("latest", "m", "low"), InvalidMetadataError),
        (lambda catalog: catalog.log_metric("latest", "m", None), InvalidMetadataError),
        (lambda catalog: catalog.log_metric("latest", "m", torch.ones(2)), InvalidMetadataError),
        (lambda catalog: catalog.log_metric("latest", "", 1), InvalidMetadataError),
        (lambda catalog: catalog.log_metric("latest", 3, 1), InvalidMetadataError),
        (lambda catalog: catalog.pin("nobody"), RefNotFoundError),
    ],
)
def test_what_cannot_be_added_changes_nothing(
    catalog: Catalog, take: Take, edit: Callable[[Catalog], object], error: type[Exception]
) -> None:
    """Neither the folder nor the record."""
    taken = take(catalog, "one")
    with pytest.raises(error):
        edit(catalog)

    assert annotations(taken) is None
    assert ((), False, None, {}) == (catalog["latest"].tags, catalog["latest"].pinned, catalog["latest"].note, catalog["latest"].metrics)


def test_labels_are_kept_in_normal_form(catalog: Catalog, take: Take) -> None:
    """Two spellings of one tag are one tag."""
    take(catalog, "one")
    catalog.tag("latest", "caf\u00e9", "cafe\u0301")

    assert ("caf\u00e9",) == catalog["latest"].tags
    assert () == catalog.untag("latest", "cafe\u0301").tags


def test_a_note_that_looks_like_a_secret_is_not_kept(catalog: Catalog, take: Take) -> None:
    """Neither in the folder nor in the catalog; a warning says so."""
    taken = take(catalog, "one")
    secret = "ghp_" + "a1B2c3D4" * 5
    with pytest.warns(ProvenanceWarning, match="secret") as caught:
        record = catalog.note("latest", f"export TOKEN={secret}")

    assert __file__ == caught[0].filename
    assert (record.note or "").startswith("[secret ")
    catalog.close()
    places = [*Path(taken.path).iterdir(), *Path(catalog.url).parent.iterdir()]
    assert not [path for path in places if path.is_file() and secret.encode() in path.read_bytes()]


# Aliases


def test_an_alias_moves(any_catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """The one that had it has it no more, in its folder too; whatever order a rebuilt catalog sees them in."""
    one, two = take(any_catalog, "one", name="one"), take(any_catalog, "two", name="two")
    any_catalog.alias("one", "best")
    assert ("best",) == any_catalog.alias("two", "best").aliases

    assert () == any_catalog["one"].aliases
    for order in ((one, two), (two, one)):
        again = rebuilt(tmp_path, *order)
        assert two.id == again["best"].id
        again.close()
        Path(again.url).unlink()
    one.delete()
    with pytest.raises(SnapshotPinnedError, match="'best'"):
        two.delete()


def test_an_alias_moves_back_and_forth(catalog: Catalog, take: Take) -> None:
    """Each time is later than the one before, though the clock may stand still."""
    take(catalog, "one", name="one")
    take(catalog, "two", name="two")
    for holder in ("one", "two", "one", "one", "two"):
        assert ("best",) == catalog.alias(holder, "best").aliases
        assert holder == catalog["best"].name


def test_an_alias_is_of_its_project(catalog: Catalog, take: Take) -> None:
    """Another project has one of the same name."""
    one = take(catalog, "one")
    catalog.alias("latest", "best")
    with settings.override(project="other"):
        two = take(catalog, "two")
        catalog.alias("latest", "best")
        assert two.id == catalog["best"].id
        catalog.unalias("best")

    assert one.id == catalog["best"].id


def test_an_alias_does_not_differ_from_another_by_case(any_catalog: Catalog, take: Take) -> None:
    """Where case does not count they would be one; the same one may move."""
    take(any_catalog, "one", name="one")
    take(any_catalog, "two", name="two")
    any_catalog.alias("one", "Straße")
    for twin in ("straße", "STRASSE", "strasse"):
        with pytest.raises(InvalidNameError, match="only by case"):
            any_catalog.alias("two", twin)

    assert "two" == any_catalog.alias("two", "Straße").name


def test_an_alias_that_was_claimed_later_elsewhere_is_moved_all_the_same(catalog: Catalog, take: Take) -> None:
    """By a machine whose clock is ahead: who comes last has it."""
    take(catalog, "one", name="one")
    ahead = 2**62
    enter(catalog, id="a" * 32, name="two", annotations=Annotations(format=1, id="a" * 32, aliases={"best": Mark(ahead, present=True)}))
    assert "two" == catalog["best"].name
    with pytest.warns(CatalogWarning, match="disk of host"):  # where the former holder lies
        catalog.alias("one", "best")

    assert "one" == catalog["best"].name
    found = annotations(Snapshot.find("one", catalog=catalog))
    assert found is not None
    assert ahead < found.aliases["best"].at


def test_an_alias_that_is_claimed_by_someone_else_at_the_same_time(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the write of the folder and of the catalog: one of them has it, in the folders as in the catalog."""
    one, two = take(catalog, "one", name="one"), take(catalog, "two", name="two")
    really = annotate.update
    raced = []

    def update(storage: LocalStorage, given: Annotations) -> Annotations:
        done = really(storage, given)
        if not raced:
            raced.append(True)
            Catalog(catalog.url).alias("two", "best")
        return done

    monkeypatch.setattr(annotate, "update", update)
    catalog.alias("one", "best")

    assert "one" == catalog["best"].name
    claims = {snapshot.id: annotations(snapshot) for snapshot in (one, two)}
    assert [one.id] == [snapshot_id for snapshot_id, found in claims.items() if found is not None and found.alias_names]


# Time


def test_an_edit_wins_over_what_it_replaces_whatever_its_clock_said(catalog: Catalog, take: Take) -> None:
    """A pin of a machine that is a day ahead can be taken away."""
    taken = take(catalog, "one")
    ahead = rows.now() + 86400 * 10**6
    annotate.update(LocalStorage(taken.path), msgspec.structs.replace(added.empty(taken.id), pin=Mark(ahead, present=True)))
    record = catalog.unpin("latest")
    found = annotations(taken)

    assert not record.pinned
    assert found is not None
    assert Mark(ahead + 1, present=False) == found.pin


# Several at once, and crashes


def test_processes_that_edit_one_snapshot_lose_nothing(any_catalog: Catalog, take: Take) -> None:
    """In the folder and in the record."""
    taken = take(any_catalog, "one")
    any_catalog.close()
    url = any_catalog.place.url if any_catalog.place.path is None else any_catalog.url

    def work(number: int) -> Callable[[], None]:
        def edit() -> None:
            catalog = Catalog(url)
            for index in range(5):
                catalog.tag("latest", f"{number}.{index}")
            catalog.close()

        return edit

    children = [start_child(work(number)) for number in range(3)]
    for child, result, let_begin in children:
        os.close(let_begin)
        end_of(child, result).result  # noqa: B018 - raises if it failed
    expected = sorted(f"{number}.{index}" for number in range(3) for index in range(5))
    found = annotations(taken)

    assert found is not None
    assert expected == sorted(found.tags) == list(any_catalog["latest"].tags)


def test_a_crash_before_the_catalog_is_mended_by_the_next_edit(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has it already, so a pin protects."""
    taken = take(catalog, "one")

    def refuse(*_: Any, **__: Any) -> Any:
        msg = "the server is gone"
        raise CatalogUnavailableError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(catalog.database, "write", refuse)
        with pytest.raises(CatalogError):
            catalog.pin("latest")
    assert not catalog["latest"].pinned
    with pytest.raises(SnapshotPinnedError):
        taken.delete()

    assert catalog.tag("latest", "a").pinned


def test_what_only_the_catalog_knew_gets_into_the_folder_with_the_next_edit(catalog: Catalog, take: Take) -> None:
    """For instance what was added while the folder could not be written."""
    taken = take(catalog, "one")
    with catalog.database.writing() as connection:
        rows.annotate(connection, 1, msgspec.structs.replace(added.empty(taken.id), pin=Mark(1, present=True)))
    catalog.tag("latest", "a")
    found = annotations(taken)

    assert found is not None
    assert found.pinned


# Where folders cannot be written


def test_every_folder_that_has_it_is_written(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """A copy is the same snapshot, so it is pinned too; what one folder had, all have then."""
    taken = take(catalog, "one")
    copied = taken.copy(tmp_path / "copy")
    with catalog.database.writing() as connection:
        rows.put(connection, msgspec.structs.replace(describe(copied.manifest, copied.metadata.digest, copied.path), project="tests"))
    annotate.update(LocalStorage(copied.path), msgspec.structs.replace(added.empty(taken.id), tags={"old": Mark(1, present=True)}))
    record = catalog.pin("latest")

    assert ("old",) == record.tags
    assert annotations(taken) == annotations(copied)
    for snapshot in (taken, copied):
        with pytest.raises(SnapshotPinnedError):
            snapshot.delete()


def missing(taken: Snapshot) -> None:
    shutil.rmtree(taken.path)


def replaced(taken: Snapshot) -> None:
    Snapshot.take(taken.path, {}, overwrite=True, catalog=False)


@pytest.mark.parametrize("change", [missing, replaced])
def test_what_cannot_be_written_stays_in_the_catalog(catalog: Catalog, take: Take, change: Callable[[Snapshot], None]) -> None:
    """That is said, once."""
    taken = take(catalog, "one")
    change(taken)
    with pytest.warns(CatalogWarning, match=r"catalog alone.*once"):
        assert catalog.tag("latest", "a").tags == ("a",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert catalog.tag(taken.id, "b").tags == ("a", "b")

    assert not Path(taken.path, names.ANNOTATIONS).exists()


def test_a_snapshot_on_the_disk_of_another_host_is_told_apart(catalog: Catalog) -> None:
    """The warning names the host; one that is nowhere any more says that."""
    enter(catalog, data(id="a" * 32, url="/theirs", host="gpu-7"))
    with pytest.warns(CatalogWarning, match="disk of host 'gpu-7'"):
        assert catalog.pin("aaaa").pinned


def test_a_place_that_is_not_trusted_is_not_written(catalog: Catalog) -> None:
    """The edit is in the catalog, and nothing was opened."""
    enter(catalog, data(id="a" * 32, url="http://evil/x", host=""))
    with pytest.warns(CatalogWarning, match="may not open") as caught:
        assert catalog.pin("aaaa").pinned

    assert UntrustedLocationError.__name__ not in str(caught[0].message)


@pytest.mark.root
def test_a_read_only_folder_is_left_alone(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """The reason is in the warning."""
    disk = tmp_path / "runs"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(disk)], capture_output=True, text=True, check=False)  # noqa: S607
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        taken = take(catalog, "one")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)  # noqa: S607
        with pytest.warns(CatalogWarning, match="annotations.json"):
            assert catalog.pin("latest").pinned
        assert annotations(taken) is None
    finally:
        unmount(disk)


def test_damaged_annotations_are_not_edited(catalog: Catalog, take: Take) -> None:
    """The error says where and what to do; nothing is written, here or there."""
    taken = take(catalog, "one")
    path = Path(taken.path, names.ANNOTATIONS)
    path.write_bytes(b"{")
    with pytest.raises(SnapshotCorruptError, match=f"{taken.path}.*remove it"):
        catalog.tag("latest", "a")
    assert (b"{", ()) == (path.read_bytes(), catalog["latest"].tags)
    path.unlink()

    assert ("a",) == catalog.tag("latest", "a").tags


def test_a_former_holder_whose_annotations_are_damaged_loses_the_alias(catalog: Catalog, take: Take) -> None:
    """The catalog says who has it; the folder of the former stays as it is."""
    one = take(catalog, "one", name="one")
    take(catalog, "two", name="two")
    catalog.alias("one", "best")
    Path(one.path, names.ANNOTATIONS).unlink()
    Path(one.path, names.ANNOTATIONS).write_bytes(b"{")
    catalog.alias("two", "best")

    assert ("two", ()) == (catalog["best"].name, catalog["one"].aliases)


def test_a_place_where_the_snapshot_is_no_more_needs_no_warning(catalog: Catalog, take: Take, tmp_path: Path) -> None:
    """What was added is in the folder that has it."""
    taken = take(catalog, "one")
    taken.copy(tmp_path / "copy", catalog=catalog).delete()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ("kept",) == catalog.tag(taken.id, "kept").tags

    assert not (tmp_path / "copy").exists()
