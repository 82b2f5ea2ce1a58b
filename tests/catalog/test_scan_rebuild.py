"""A catalog that is lost or damaged is built anew from the snapshots, with all that was recorded and added."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expstate import Catalog, Snapshot
from expstate.catalog import model, rows
from expstate.catalog.model import Record
from expstate.errors import CatalogCorruptError

Take = Callable[..., Snapshot]


@pytest.fixture
def filled(catalog: Catalog, take: Take) -> Iterator[Catalog]:
    """A catalog with some of everything, closed."""
    for step in range(6):
        options: dict[str, Any] = {"name": f"name {step}", "tags": ["even"] if step % 2 == 0 else [], "note": f"note {step}"}
        take(
            catalog, f"{step}", value=step, step=step, params={"lr": 0.1 * step, "opt": "adam"}, metrics={"loss": 1 / (step + 1)}, **options
        )
    catalog.tag("name 1", "tried")
    catalog.untag("name 2", "even")
    catalog.alias("name 3", "best")
    catalog.alias("name 4", "best")
    catalog.pin("name 5")
    catalog.note("name 0", "another note")
    catalog.log_metric("name 1", "acc", float("nan"))
    catalog.close()
    yield catalog
    catalog.close()


def path_of(catalog: Catalog) -> Path:
    assert catalog.place.path is not None
    return catalog.place.path


def contents(catalog: Catalog) -> list[str]:
    """All that records say, in their order."""
    return [repr(record) + repr(record.provenance) for record in catalog.search(project="*")]


def test_a_deleted_catalog_is_rebuilt(filled: Catalog) -> None:
    """All records and annotations are as before."""
    before = contents(filled)
    path_of(filled).unlink()
    report = filled.scan()

    assert (6, 0, None) == (len(report.entered), report.known, report.put_aside)
    assert before == contents(filled)
    assert filled.check().ok


@pytest.mark.parametrize("damage", ["garbage", "zeros", "truncated", "empty", "header", "other"])
def test_a_damaged_catalog_is_put_aside_and_rebuilt(filled: Catalog, damage: str) -> None:
    """All records and annotations are as before, and the damaged file is still there."""
    before = contents(filled)
    filled.close()
    path = path_of(filled)
    data = path.read_bytes()
    harmed = {
        "garbage": random.Random(1).randbytes(len(data)),
        "zeros": bytes(len(data)),
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "header": b"x" * 100 + data[100:],
        "other": b"",
    }[damage]
    path.write_bytes(harmed)
    if damage == "other":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE records (seq INTEGER)")
        connection.close()
        harmed = path.read_bytes()
    report = filled.scan()

    assert 6 == len(report.entered)
    assert before == contents(filled)
    assert filled.check().ok
    if damage == "empty":  # in which nothing was that could be put aside
        assert report.put_aside is None
    else:
        assert report.put_aside is not None
        assert harmed == Path(report.put_aside).read_bytes()
        assert report.put_aside in str(report)


def test_a_damaged_catalog_is_rebuilt_whatever_folder_is_scanned(filled: Catalog, take: Take, tmp_path: Path) -> None:
    """Not that folder alone is entered then."""
    elsewhere = take(None, "../elsewhere/x")
    path_of(filled).write_bytes(b"no database")
    report = filled.scan(tmp_path / "elsewhere")

    assert 7 == len(report.entered)
    assert elsewhere.path in report.entered


def test_until_then_it_is_damaged(filled: Catalog) -> None:
    """Nothing is made anew without a scan."""
    path_of(filled).write_bytes(b"no database")
    with pytest.raises(CatalogCorruptError, match="expstate scan"):
        filled.search()


def surely(record: Record) -> str:
    """What the snapshot itself says of a record."""
    listed = (record.name, record.step, record.tags, record.aliases, record.pinned, record.note, record.params, record.metrics, record.keys)
    return repr((*listed, record.user, record.nbytes, record.created_at, record.parent, record.provenance))


@pytest.mark.parametrize("seed", range(6))
def test_after_a_flipped_byte_a_scan_brings_back_what_the_snapshots_say(filled: Catalog, seed: int) -> None:
    """The database does not always notice, so records are compared with the snapshots. What people added is not looked at: a
    time that a bit has put off looks like a later edit.
    """
    before = {record.id: surely(record) for record in filled.search(project="*")}
    filled.close()
    path = path_of(filled)
    data = path.read_bytes()
    chosen = random.Random(seed)
    texts = annotations_in(path)
    used = [place for place in range(len(data)) if data[place] and not any(place in text for text in texts)]
    for place in chosen.sample(used, 10):
        rows._decoded.cache_clear()
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chosen.randrange(8)]) + data[place + 1 :])
        filled.scan()
        found = {record.id: surely(record) for record in filled.search(project="*")}
        filled.close()

        assert before.items() <= found.items()


def annotations_in(path: Path) -> list[range]:
    """Where in the file what people added lies."""
    data = path.read_bytes()
    with sqlite3.connect(path) as connection:
        texts = connection.execute("SELECT annotations FROM bodies WHERE annotations IS NOT NULL").fetchall()
    connection.close()
    return [range(start, start + len(text)) for (text,) in texts if (start := data.find(text.encode())) >= 0]


def test_what_is_searched_is_made_anew_where_it_disagrees(filled: Catalog) -> None:
    """By hand here; a check finds it, a scan mends it, and the record keeps its place."""
    before = contents(filled)
    order = [record.id for record in filled.search()]
    filled.close()
    harm(
        filled,
        "DELETE FROM tags",
        "UPDATE metrics SET number = 7",
        "UPDATE params SET text = 'sgd'",
        "UPDATE records SET pinned = 1 - pinned",
    )
    checked = filled.check()

    assert 6 == len(checked.findings)
    assert {"expstate scan"} == {finding.mend for finding in checked.findings}
    assert 6 == filled.scan().mended
    assert before == contents(filled)
    assert order == [record.id for record in filled.search()]
    assert filled.check().ok


def test_a_record_whose_snapshot_is_away_is_made_anew_from_what_it_holds(filled: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here all lie on the disk of another machine."""
    before = contents(filled)
    filled.close()
    harm(filled, "DELETE FROM tags", "DELETE FROM params")
    monkeypatch.setattr(model, "this_host", lambda: "another")
    monkeypatch.setattr("expstate.catalog.opening.this_host", lambda: "another")
    shutil.rmtree(path_of(filled).parents[1] / "runs")
    report = filled.scan()

    assert 6 == report.mended
    assert before == contents(filled)


def test_a_record_that_cannot_be_read_is_taken_from_the_snapshot(filled: Catalog) -> None:
    """A body that is no body, and annotations that are none."""
    before = contents(filled)
    filled.close()
    harm(filled, "UPDATE bodies SET body = '{'", "UPDATE bodies SET annotations = 'x' WHERE annotations IS NOT NULL")
    assert 6 == len(filled.check().findings)
    filled.scan()

    assert before == contents(filled)


def harm(catalog: Catalog, *statements: str) -> None:
    """Change the database behind the catalog's back."""
    rows._decoded.cache_clear()
    with sqlite3.connect(path_of(catalog)) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
