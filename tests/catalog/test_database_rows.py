"""Records go in as they are, any number of times, in an order that no clock upsets; and they cost little."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate import Catalog
from expstate.catalog import rows, schema
from expstate.catalog.model import Body, RecordData
from expstate.format import annotations as added
from expstate.format.annotations import Annotations, Mark, Text, Value
from expstate.state.values import encode_tree

from .plain import HOUR, all_of, count, data, put, statements, urls

DAY = 24 * HOUR


def body(**given: Any) -> Body:
    values = {name: {key: encode_tree(value) for key, value in given.pop(name, {}).items()} for name in ("params", "metrics")}
    return Body(**values, **given)


# Once


def test_a_record_that_is_entered_twice_is_there_once(any_catalog: Catalog) -> None:
    one = data(1, body=body(tags=("a",), metrics={"loss": 0.5}, params={"lr": 1}), packages={"torch": "2"})
    put(any_catalog, one, one)
    put(any_catalog, one, live=True)

    tables = (schema.records, schema.bodies, schema.locations, schema.tags, schema.metrics, schema.params, schema.environments)
    assert [1] * 7 == [count(any_catalog, table) for table in tables]
    assert [2] == [count(any_catalog, schema.names)]


def test_several_that_enter_one_record_at_once_enter_it_once(any_catalog: Catalog) -> None:
    one = data(1, body=body(metrics={"loss": 0.5}), packages={"torch": "2"})
    barrier = threading.Barrier(6)

    def enter(_: int) -> None:
        barrier.wait()
        put(any_catalog, one, live=True)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enter, range(6)))

    assert 1 == count(any_catalog)
    assert [{"loss": 0.5}] == [record.metrics for record in all_of(any_catalog)]


def test_packages_are_kept_once_per_content(any_catalog: Catalog) -> None:
    put(any_catalog, *(data(number, packages={"torch": "2", "numpy": str(number % 2)}) for number in range(6)))

    assert 2 == count(any_catalog, schema.environments)


def test_copies_are_places_of_one_record(any_catalog: Catalog) -> None:
    one = data(1)
    put(any_catalog, one, data(2, id=one.id), data(3, id=one.id, host="there"))

    (record,) = all_of(any_catalog)
    assert {("/runs/1", "here"), ("/runs/2", "here"), ("/runs/3", "there")} == {(place.url, place.host) for place in record.locations}


def test_the_last_that_came_to_a_place_is_there(any_catalog: Catalog) -> None:
    put(any_catalog, data(1, url="/runs/same"))
    put(any_catalog, data(2, url="/runs/same"))
    put(any_catalog, data(3, url="/runs/same", host="there"))

    assert ["replaced", "present", "present"] == [record.status for record in all_of(any_catalog)]


def test_a_record_that_comes_late_does_not_take_a_place_from_one_that_came_since(any_catalog: Catalog) -> None:
    """It had waited in the spool."""
    put(any_catalog, data(2, url="/runs/same"))
    put(any_catalog, data(1, url="/runs/same"), seen_at=5)
    put(any_catalog, data(3, url="/runs/other"), seen_at=5)

    assert ["replaced", "present", "present"] == [record.status for record in all_of(any_catalog)]


# In order (F19)


@pytest.mark.parametrize("skew", [-2 * DAY, -1, 0, 2 * DAY])
def test_takes_are_in_the_order_in_which_they_were_recorded(any_catalog: Catalog, skew: int) -> None:
    """Whatever the clock says, whether or not they come from one another."""
    now = 1000 * DAY
    for number, at in enumerate((now, now + skew, now + 2 * skew, now)):
        put(any_catalog, data(number, created_at=at), live=True)

    assert [f"/runs/{number}" for number in range(4)] == urls(any_catalog)


def test_one_clock_of_the_future_does_not_upset_the_order(any_catalog: Catalog) -> None:
    put(any_catalog, data(1, created_at=2**62), live=True)
    put(any_catalog, data(2, created_at=5), live=True)
    put(any_catalog, data(3, created_at=7), live=True)

    assert ["/runs/1", "/runs/2", "/runs/3"] == urls(any_catalog)


def test_projects_have_orders_of_their_own(any_catalog: Catalog) -> None:
    put(any_catalog, data(5), live=True)
    put(any_catalog, data(3, project="other"), live=True)

    assert ["/runs/3", "/runs/5"] == urls(any_catalog)


def test_what_a_scan_finds_is_where_its_time_puts_it(any_catalog: Catalog) -> None:
    put(any_catalog, data(10), data(20), live=True)
    put(any_catalog, data(5), data(15), data(25))

    assert [f"/runs/{number}" for number in (5, 10, 15, 20, 25)] == urls(any_catalog)


def test_what_a_scan_finds_comes_after_its_parent_and_before_its_children(any_catalog: Catalog) -> None:
    """Whichever is found first, and whatever the clock was."""
    first, second, third = data(30), data(20), data(10)
    second = RecordData(**{name: getattr(second, name) for name in second.__struct_fields__} | {"parent": first.id})
    third = RecordData(**{name: getattr(third, name) for name in third.__struct_fields__} | {"parent": second.id})
    put(any_catalog, third, first, second)

    found = urls(any_catalog)
    assert found.index("/runs/20") < found.index("/runs/10")
    with any_catalog.database.writing() as connection:
        for table in reversed(schema.metadata.sorted_tables):
            connection.execute(table.delete())
    put(any_catalog, first, second, third)

    assert ["/runs/30", "/runs/20", "/runs/10"] == urls(any_catalog)


# As they are (H27)


VALUES = {
    "nan": math.nan,
    "inf": math.inf,
    "minus_inf": -math.inf,
    "large": 2**63,
    "huge": 10**400,
    "small": -(2**63),
    "true": True,
    "none": None,
    "text": "a\0b",
    "no text": "\ud800",
    "list": [1, {"a": (2.5, None)}],
    "loss/train; DROP TABLE records": 1.5,
    "nul\0name": 1.5,
    "": 2,
}


def test_values_of_every_kind_come_back(any_catalog: Catalog) -> None:
    numbers = {name: value for name, value in VALUES.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    put(any_catalog, data(1, body=body(params=VALUES, metrics=numbers, note="a\0note", tags=("tag\0tag", "ünï"))))

    (record,) = all_of(any_catalog)
    assert repr(VALUES) == repr(record.params)
    assert repr(numbers) == repr(record.metrics)
    assert ("a\0note", ("tag\0tag", "ünï")) == (record.note, record.tags)


@given(st.dictionaries(st.text(min_size=1), st.floats() | st.integers() | st.text(st.characters()) | st.none(), max_size=5))
def test_any_params_come_back(hypothesis_catalog: Catalog, params: dict[str, Any]) -> None:
    one = data(1, body=body(params=params))
    put(hypothesis_catalog, one)

    with hypothesis_catalog.database.reading() as connection:
        seq = connection.execute(schema.records.select().where(schema.records.c.id == one.id)).scalar_one()
        (record,) = rows.fetch(connection, [seq])
    assert repr(params) == repr(record.params)


@pytest.fixture(scope="module")
def hypothesis_catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """One catalog for all examples."""
    return Catalog(tmp_path_factory.mktemp("any") / "catalog.db")


def test_places_whose_names_are_no_text_come_back(any_catalog: Catalog) -> None:
    names = [os.fsdecode(b"/runs/\xff"), "/runs/line\nbreak", "/runs/\x85\u2028", 'json:"/runs"', "/runs/ünï"]
    put(any_catalog, *(data(number, url=url) for number, url in enumerate(names)))

    assert names == urls(any_catalog)


def test_what_only_a_stranger_writes_does_not_break_it(any_catalog: Catalog) -> None:
    """A manifest may have been written by anybody."""
    long = "x" * 100_000
    mark = Mark(2**63 - 1, present=True)
    strange = data(
        1,
        project=f"p{long}",
        name=f"n{long}",
        user="\0",
        step=2**80,
        created_at=-(2**80),
        nbytes=2**80,
        written_bytes=2**80,
        world_size=2**80,
        body=body(
            tags=(f"t{long}", f"t{long}2", "\0"),
            note=long,
            params={f"a{long}": long[:50_000], f"b{long}": 1},
            metrics={f"m{long}": 1.0},
            provenance={"host": "\0" * 5000, "git": {"commit": long, "branch": ["no text"]}, "strange": [long]},
        ),
        packages={long: long},
        annotations=Annotations(
            format=1,
            id="0" * 32,
            aliases={f"alias{long}": mark},
            tags={f"more{long}": mark},
            note=Text(1, long),
            pin=mark,
            metrics={"late": Value(1, 2)},
        ),
    )
    put(any_catalog, strange, data(2))
    put(any_catalog, data(3), live=True)

    (first, *_) = all_of(any_catalog)
    assert 3 == count(any_catalog)
    assert (2**63 - 1, 2**63 - 1, 2**31 - 1) == (first.step, first.nbytes, first.world_size)
    assert {f"t{long}", f"t{long}2", "\0", f"more{long}"} == set(first.tags)
    assert {f"m{long}": 1.0, "late": 2} == first.metrics


# What people add


def test_annotations_are_merged_into_a_record(any_catalog: Catalog) -> None:
    one = data(1, body=body(tags=("a", "b"), metrics={"loss": 0.5}, note="first"))
    put(any_catalog, one)
    more = Annotations(
        format=1,
        id=one.id,
        tags={"b": Mark(1, present=False), "c": Mark(1, present=True)},
        aliases={"best": Mark(1, present=True)},
        pin=Mark(1, present=True),
        note=Text(1, "second"),
        metrics={"acc": Value(1, 0.9)},
    )
    with any_catalog.database.writing() as connection:
        found = rows.annotate(connection, 1, added.empty(one.id)), rows.annotate(connection, 1, more)

    (record,) = all_of(any_catalog)
    assert (added.empty(one.id), more) == found
    assert (("a", "c"), ("best",), True, "second") == (record.tags, record.aliases, record.pinned, record.note)
    assert {"loss": 0.5, "acc": 0.9} == record.metrics


def test_annotations_that_come_with_a_record_count_at_once(any_catalog: Catalog) -> None:
    one = data(1, body=body(tags=("a",)))
    more = Annotations(format=1, id=one.id, pin=Mark(1, present=True), aliases={"best": Mark(1, present=True)})
    put(any_catalog, data(1, id=one.id, body=one.body, annotations=more))

    (record,) = all_of(any_catalog)
    assert (True, ("best",), ("a",)) == (record.pinned, record.aliases, record.tags)


def test_of_two_that_claim_an_alias_the_later_has_it(any_catalog: Catalog) -> None:
    for number, at in enumerate((2, 3, 1)):
        one = data(number)
        claim = Annotations(format=1, id=one.id, aliases={"best": Mark(at, present=True)})
        put(any_catalog, RecordData(**{name: getattr(one, name) for name in one.__struct_fields__} | {"annotations": claim}))

    assert [(), ("best",), ()] == [record.aliases for record in all_of(any_catalog)]


# At little cost


def test_a_take_that_is_like_others_takes_few_statements(any_catalog: Catalog) -> None:
    def one(number: int) -> RecordData:
        values = {f"value {index}": float(number) for index in range(10)}
        return data(number, body=body(tags=("a", "b", "c"), metrics=values, params=values), packages={"torch": "2"})

    put(any_catalog, one(1), live=True)
    sent = statements(any_catalog, lambda: put(any_catalog, one(2), live=True))

    assert len(sent) <= 12, sent
