"""Bytes of the catalog's file that have changed: what it says is right, or it says that it is damaged; and a scan makes it right."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expstate import Catalog
from expstate.catalog import recorder
from expstate.errors import CatalogError, CatalogVersionError
from tests.campaign import Campaign

from .plain import all_of

PAGE = 4096


def fill(catalog: Catalog, take: Callable[..., Any]) -> None:
    """Records with all that they may have."""
    for number in range(6):
        tags = ["draft", f"tag{number}"]
        take(catalog, f"{number}", value=number, step=number, name=f"name{number}", tags=tags, metrics={"loss": 1 / (number + 1)})
    catalog.tag("name1", "paper")
    catalog.alias("name2", "best")
    catalog.pin("name3")
    catalog.note("name4", "a note that is long enough to be seen")
    catalog.log_metric("name5", "accuracy", 0.75)


def told(catalog: Catalog) -> list[Any]:
    """What the catalog says, in several ways: of all, and where indexes are used."""
    names = ("id", "url", "name", "tags", "aliases", "pinned", "note", "step", "project", "created_at", "metrics", "status")
    records = [[repr(getattr(record, name)) for name in names] for record in all_of(catalog)]
    queries = ("tag = draft", "name = name3", "metric.loss < 0.3", "alias = best", "step > 2", "pinned")
    return [records, [[record.id for record in catalog.search(query, project="*")] for query in queries]]


@pytest.mark.campaign("The catalog is an index", "flipped bytes in the file")
def test_a_flipped_byte_is_harmless_or_told_and_a_scan_mends_it(
    catalog: Catalog, take: Callable[..., Any], campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPSTATE_PROVENANCE", "off")
    fill(catalog, take)
    expected = told(catalog)
    catalog.close()
    path = catalog.place.path
    assert path is not None
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    whole = path.read_bytes()
    used = [at for at in range(len(whole)) if whole[at]]
    dice = random.Random(0)
    places = [at for page in range(0, len(whole), PAGE) for at in _some(dice, [at for at in used if page <= at < page + PAGE])]
    problems = []
    for at in campaign.each(places, short=8):
        for left in path.parent.glob("catalog.db*"):
            left.unlink()
        recorder.forget()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :])
        found = problems_of(path, expected, campaign)
        problems += [f"byte {at % PAGE} of page {at // PAGE}: {problem}" for problem in found]
    assert not problems, "\n".join(problems)


def test_an_alias_that_a_flipped_byte_put_into_another_project_goes_back(catalog: Catalog, take: Callable[..., Any]) -> None:
    fill(catalog, take)
    expected = told(catalog)
    catalog.close()
    assert catalog.place.path is not None
    with contextlib.closing(sqlite3.connect(catalog.place.path)) as connection, connection:
        assert 1 == connection.execute("UPDATE aliases SET project = 'tesus'").rowcount

    catalog = Catalog(catalog.place.path)
    assert not catalog.check(deep=True, project="*").ok
    catalog.scan()

    assert expected == told(catalog)
    assert catalog.check(deep=True, project="*").ok
    assert 1 == len([record for record in all_of(catalog) if record.aliases])
    catalog.close()


def _some(dice: random.Random, places: list[int]) -> list[int]:
    return sorted(dice.sample(places, min(4, len(places))))


def problems_of(path: Path, expected: list[Any], campaign: Campaign) -> list[str]:
    """What is not as it must be with this file."""
    found = []
    catalog = Catalog(path)
    try:
        says = told(catalog)
    except CatalogError:
        says = None
        campaign.count("said to be damaged")
    if says not in (None, expected):
        campaign.count("found by check")
        if catalog.check(deep=True, project="*").ok:
            found.append(f"nobody tells that it says {says}")
    catalog.close()
    catalog = Catalog(path)
    try:
        catalog.scan()
    except CatalogVersionError:  # nobody can tell it from one that a newer version has made, and that is left alone
        campaign.count("said to be of another version")
        return found
    after = told(catalog)
    if after != expected:
        found.append(f"a scan has not mended it: {after}")
    catalog.close()
    return found
