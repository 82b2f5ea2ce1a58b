"""A ref finds the snapshot that a person means: in one order of precedence, never by guessing, and a miss says what is near."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate import Catalog, Snapshot, settings
from expstate.catalog import refs, rows
from expstate.catalog.model import this_host
from expstate.errors import AmbiguousRefError, InvalidArgumentError, RefNotFoundError
from expstate.format.annotations import Annotations, Mark

from .made import data, enter

Take = Callable[..., Snapshot]
A, B, C = "a" * 32, "b" * 32, "c" * 32


def claim(snapshot_id: str, alias: str, at: int = 1) -> Annotations:
    return Annotations(format=1, id=snapshot_id, aliases={alias: Mark(at, present=True)})


def status(catalog: Catalog, snapshot_id: str, status: str) -> None:
    """Say that a record made by ``data`` is at its place no more."""
    found = catalog[snapshot_id]
    with catalog.database.writing() as connection:
        seq = rows_of(connection, snapshot_id)
        for location in found.locations:
            rows.set_location_status(connection, seq, location.url, location.host, status)


def rows_of(connection: Any, snapshot_id: str) -> int:
    import sqlalchemy as sa

    from expstate.catalog import schema

    return int(connection.execute(sa.select(schema.records.c.seq).where(schema.records.c.id == snapshot_id)).scalar_one())


def missed(catalog: Catalog, ref: str, **options: Any) -> str:
    """What is said of a ref that finds nothing."""
    with pytest.raises(RefNotFoundError) as error:
        refs.resolve(catalog, ref, **options)
    return str(error.value)


# Each kind


def test_a_name_finds_the_newest(any_catalog: Catalog) -> None:
    """Of those that are still there; an older name is not forgotten while nothing newer has it."""
    for number, snapshot_id in enumerate((A, C, B)):
        enter(any_catalog, id=snapshot_id, name="baseline", created_at=1000 + number)
    enter(any_catalog, name="other", created_at=5000)

    assert B == any_catalog["baseline"].id
    status(any_catalog, B, "missing")
    assert C == any_catalog["baseline"].id
    status(any_catalog, C, "replaced")
    status(any_catalog, A, "replaced")
    assert B == any_catalog["baseline"].id


def test_latest_counts_back_among_those_that_are_there(any_catalog: Catalog) -> None:
    """A snapshot that is gone is not the latest."""
    ids = [f"{number:032x}" for number in range(5)]
    for number, snapshot_id in enumerate(ids):
        enter(any_catalog, id=snapshot_id, created_at=1000 + number)
    status(any_catalog, ids[3], "missing")

    assert [ids[4], ids[4], ids[2], ids[0]] == [any_catalog[ref].id for ref in ("latest", "latest~0", "latest~1", "latest~3")]
    assert "which has 4 that are present" in missed(any_catalog, "latest~4")
    assert "which has 4 that are present" in missed(any_catalog, "latest~999999999")


def test_the_latest_comes_after_its_parent_whatever_the_clock_said(any_catalog: Catalog) -> None:
    """A take on a machine whose clock is two days behind is still the latest."""
    two_days = 2 * 86400 * 10**6
    enter(any_catalog, id=A, created_at=2 * two_days)
    enter(any_catalog, id=B, created_at=two_days, parent=A)

    assert (B, A) == (any_catalog["latest"].id, any_catalog["latest~1"].id)


def test_an_alias_finds_its_holder(any_catalog: Catalog) -> None:
    """The one whose claim is the newest."""
    enter(any_catalog, id=A, annotations=claim(A, "best", 2))
    enter(any_catalog, id=B, annotations=claim(B, "best", 1))

    assert A == any_catalog["best"].id
    enter(any_catalog, id=C, annotations=claim(C, "best", 3))
    assert C == any_catalog["best"].id


def test_the_beginning_of_an_id_finds_it(any_catalog: Catalog) -> None:
    """From four digits on, in capitals too, in whatever project it is."""
    snapshot_id = "0123456789abcdef" * 2
    enter(any_catalog, id=snapshot_id, project="another")
    enter(any_catalog, id="0124" + "0" * 28)

    for length in (4, 5, 31, 32):
        assert snapshot_id == any_catalog[snapshot_id[:length]].id == any_catalog[snapshot_id[:length].upper()].id


def test_three_digits_are_no_id(any_catalog: Catalog) -> None:
    """They fit too easily; the error says so."""
    enter(any_catalog, id=A)

    assert "at least 4 digits" in missed(any_catalog, "aaa")


def test_a_beginning_that_fits_two_ids_lists_both(any_catalog: Catalog) -> None:
    """Nobody is guessed at, across projects too; more digits tell them apart."""
    one, two = "abcd1" + "0" * 27, "abcd2" + "0" * 27
    enter(any_catalog, id=one, name="first")
    enter(any_catalog, id=two, project="another")
    with pytest.raises(AmbiguousRefError, match=rf"2 ids: {one} \(first\), {two}"):
        any_catalog["abcd"]

    assert two == any_catalog["abcd2"].id


def test_a_beginning_that_fits_many_ids_lists_some(any_catalog: Catalog) -> None:
    """The message stays short."""
    enter(any_catalog, *(data(id=f"abcd{number:028x}") for number in range(50)))
    with pytest.raises(AmbiguousRefError, match="at least 10 ids") as error:
        any_catalog["abcd"]

    assert 10 == str(error.value).count("abcd0")


def test_a_path_or_url_finds_what_lies_there(any_catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In every spelling of the same place."""
    monkeypatch.chdir(tmp_path)
    here = this_host()
    enter(any_catalog, id=A, url=f"{tmp_path}/runs/a", host=here)
    enter(any_catalog, id=B, url="s3://bucket/run/b", host="")
    enter(any_catalog, id=C, url=f"{tmp_path}/runs/c", host="another")

    for spelling in ("runs/a", "./runs/a/", f"{tmp_path}/runs/x/../a", f"file://{tmp_path}/runs/a", f"fs://{tmp_path}/runs/a"):
        assert A == any_catalog[spelling].id
    assert A == refs.resolve(any_catalog, tmp_path / "runs" / "a").id
    assert B == any_catalog["s3://bucket/run/b"].id == any_catalog["s3://key:secret@bucket/run/b?sig=1"].id
    assert "scan" in missed(any_catalog, "runs/c")


def test_a_path_finds_what_is_there_before_what_was(any_catalog: Catalog) -> None:
    """And what was, where nothing is known to be."""
    url, here = "/runs/one", this_host()
    enter(any_catalog, id=A, url=url, host=here)
    enter(any_catalog, id=B, url=url, host=here)

    assert B == any_catalog[url].id
    assert "replaced" == any_catalog[A].status
    status(any_catalog, B, "missing")
    assert any_catalog[url].id in {A, B}


# Precedence


def test_refs_are_looked_up_in_one_order(any_catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alias, exact name, id, path; each is found when the one before it is not there."""
    monkeypatch.chdir(tmp_path)
    ref = "beef"
    by_id = ref + "0" * 28
    enter(any_catalog, id=C, url=f"{tmp_path}/{ref}", host=this_host())
    assert C == any_catalog[ref].id
    enter(any_catalog, id=by_id)
    assert by_id == any_catalog[ref].id
    enter(any_catalog, id=A, name=ref)
    assert A == any_catalog[ref].id
    enter(any_catalog, id=B, annotations=claim(B, ref))
    assert B == any_catalog[ref].id
    assert C == any_catalog[f"./{ref}"].id


def test_names_are_compared_in_normal_form(any_catalog: Catalog) -> None:
    """A name typed on one system is found on another; case counts."""
    enter(any_catalog, id=A, name="caf\u00e9")
    enter(any_catalog, id=B, annotations=claim(B, "\u00fcber"))

    assert (A, B) == (any_catalog["cafe\u0301"].id, any_catalog["u\u0308ber"].id)
    assert "'caf\u00e9'" in missed(any_catalog, "Caf\u00e9")


# Projects


def test_names_are_those_of_one_project(any_catalog: Catalog) -> None:
    """Another is named, by the setting or the argument; all of them by a star."""
    for number, (snapshot_id, project) in enumerate(((A, "tests"), (B, "other"), (C, "third"))):
        annotations = claim(snapshot_id, "best", number)
        enter(any_catalog, id=snapshot_id, project=project, name="one", created_at=1000 + number, annotations=annotations)
    for ref in ("one", "best", "latest"):
        assert [A, B, C] == [refs.resolve(any_catalog, ref, project).id for project in (None, "other", "*")]
        with settings.override(project="other"):
            assert B == any_catalog[ref].id


def test_a_miss_names_the_project_that_has_it(any_catalog: Catalog) -> None:
    """And how to reach it."""
    enter(any_catalog, id=A, project="other", name="baseline")
    message = missed(any_catalog, "baseline")

    assert "'other'" in message
    assert "project='other'" in message
    assert "any project" in missed(any_catalog, "base", project="*")


# Misses


def test_a_miss_lists_what_is_near(any_catalog: Catalog) -> None:
    """Names, aliases and ids."""
    enter(any_catalog, id="beef1" + "0" * 27, name="baseline", annotations=claim("beef1" + "0" * 27, "basement"))
    enter(any_catalog, name="unlike", project="other")

    assert {"'baseline'", "'basement'"} <= set(missed(any_catalog, "baselin").replace(",", " ").split())
    assert "beef1" + "0" * 27 in missed(any_catalog, "beef2")
    assert "nearest" not in missed(any_catalog, "zzzzzzzz")


def test_a_snapshot_that_is_not_recorded_is_pointed_at(catalog: Catalog, take: Take) -> None:
    """With the command that enters it, ready to be pasted."""
    snapshot = take(None, "with space")

    assert f"`expstate scan '{snapshot.path}'` enters it" in missed(catalog, snapshot.path)


def test_an_empty_catalog_knows_nothing(any_catalog: Catalog) -> None:
    """And no ref fails in another way than by not being found."""
    for ref in ("latest", "best", "abcd", "runs/a", "s3://bucket/run"):
        assert repr(ref) in missed(any_catalog, ref)


HOSTILE = [
    "x" * 100_000,
    "/" * 5000 + "x",
    "a\0b",
    "\0",
    "\ud800",
    "dir/\udcff",
    "'; DROP TABLE records; --",
    '" OR 1=1 --',
    "%",
    "_",
    "base%",
    "base____",
    "*",
    "latest~",
    "latest~-1",
    "latest~1.5",
    "latest~٣",
    "latest~" + "9" * 400,
    "live",
    "\x1b]0;title\x07",
    "http://user:pass@host/x?y#z",
    "::",
    "://",
    "file://host",
    "s3://",
    "a" * 33,
    "\uff41" * 4,
    "~",
    "..",
    " ",
]


def test_a_hostile_ref_is_not_found(any_catalog: Catalog) -> None:
    """Wildcards, SQL, what no database takes, and what is too long: the message can be shown, and the catalog is what it was."""
    enter(any_catalog, id=A, name="baseline", annotations=claim(A, "best"))
    for ref in HOSTILE:
        message = missed(any_catalog, ref)
        assert len(message) < 2000
        assert message.isprintable()

    assert [A] == [record.id for record in any_catalog.search()]


@given(ref=st.text(min_size=1) | st.text("abcdef0123456789~.-/:@=%_'\"\0", min_size=1))
def test_no_ref_breaks_the_catalog(tmp_path_factory: pytest.TempPathFactory, ref: str) -> None:
    """What is typed finds something or is not found."""
    catalog = Catalog(tmp_path_factory.getbasetemp() / "any-ref" / "catalog.db")
    try:
        if not len(catalog):
            enter(catalog, id=A, name="baseline")
        refs.resolve(catalog, ref)
    except (RefNotFoundError, AmbiguousRefError):
        pass
    finally:
        catalog.close()


@pytest.mark.parametrize("ref", ["", None, 3, b"latest"])
def test_what_is_no_text_is_no_ref(catalog: Catalog, ref: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        catalog[ref]


def test_a_folder_that_is_gone_names_no_path(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other refs are found from there all the same."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    enter(catalog, id=A, name="baseline")

    assert A == catalog["baseline"].id
    assert "'other'" in missed(catalog, "other")


# Packages


def test_packages_are_those_of_the_take(any_catalog: Catalog) -> None:
    """None where they were not recorded."""
    enter(any_catalog, id=A, packages={"torch": "2.6.0", "numpy": "2.2"})
    enter(any_catalog, id=B)

    assert {"numpy": "2.2", "torch": "2.6.0"} == any_catalog.packages("aaaa")
    assert {} == any_catalog.packages("bbbb")
    with pytest.raises(RefNotFoundError):
        any_catalog.packages("cccc")


def test_a_record_holds_what_the_row_does(any_catalog: Catalog) -> None:
    """The same record by every ref."""
    enter(any_catalog, data(id=A, name="baseline", step=3, annotations=claim(A, "best")))
    records = [any_catalog[ref] for ref in ("latest", "best", "baseline", "aaaa")]

    assert [records[0]] * 4 == records
    assert (A, "baseline", 3, ("best",)) == (records[0].id, records[0].name, records[0].step, records[0].aliases)
