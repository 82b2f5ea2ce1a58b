"""What people add later: two versions become one by the same rule in any order, and nothing that no edit wrote is believed."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate.errors import SnapshotCorruptError, UnsupportedFormatError
from expstate.format.annotations import LAST, Annotations, Mark, Text, Value, after, decode, empty, encode, merge
from expstate.state import values

ID = "0123456789abcdef" * 2

TIME = st.integers(0, 4) | st.integers(0, LAST)
MARK = st.builds(Mark, TIME, st.booleans())
LABEL = st.sampled_from(["a", "best", "café", "ab.c~1"])
NUMBER = st.integers() | st.floats()
METRICS = st.dictionaries(st.sampled_from(["loss", "é/1"]), st.builds(Value, TIME, NUMBER.map(values.encode)))
ANNOTATIONS = st.builds(
    Annotations,
    format=st.just(1),
    id=st.just(ID),
    tags=st.dictionaries(LABEL, MARK),
    aliases=st.dictionaries(LABEL, MARK),
    pin=st.none() | MARK,
    note=st.none() | st.builds(Text, TIME, st.sampled_from(["", "a", "b\n"])),
    metrics=METRICS,
)


@given(ANNOTATIONS, ANNOTATIONS)
def test_the_order_of_two_versions_does_not_matter(one: Annotations, other: Annotations) -> None:
    """So whoever merges gets the same."""
    assert merge(one, other) == merge(other, one)


@given(ANNOTATIONS, ANNOTATIONS, ANNOTATIONS)
def test_the_order_of_three_versions_does_not_matter(one: Annotations, other: Annotations, third: Annotations) -> None:
    """Whichever two meet first."""
    assert merge(merge(one, other), third) == merge(one, merge(other, third))


@given(ANNOTATIONS, ANNOTATIONS)
def test_merging_again_changes_nothing(one: Annotations, other: Annotations) -> None:
    """A lost race is mended by doing the same again."""
    merged = merge(one, other)

    assert one == merge(one, one)
    assert merged == merge(merged, one) == merge(merged, other)


@given(ANNOTATIONS, ANNOTATIONS)
def test_every_item_of_a_merge_is_the_newest(one: Annotations, other: Annotations) -> None:
    """And none is lost."""
    merged = merge(one, other)
    for name in ("tags", "aliases", "metrics"):
        mine, theirs, both = getattr(one, name), getattr(other, name), getattr(merged, name)
        assert mine.keys() | theirs.keys() == both.keys()
        assert all(item.at == max(side[label].at for side in (mine, theirs) if label in side) for label, item in both.items())
        assert all(item in (mine.get(label), theirs.get(label)) for label, item in both.items())


@given(ANNOTATIONS)
def test_what_is_written_is_read_back(one: Annotations) -> None:
    """All of it, and equal annotations are equal bytes."""
    assert one == decode(encode(one))
    assert encode(one) == encode(merge(one, empty(ID)))


def test_an_edit_is_later_than_what_it_replaces() -> None:
    """Whatever the clock said when that was made; and there is a last time."""
    assert 10 == after(10, None, Mark(3, present=True))
    assert 31 == after(10, Mark(30, present=True), Mark(5, present=False))
    assert LAST == after(10, Mark(LAST, present=True))
    assert 0 == after(-5)


def test_a_removal_counts_as_the_rest() -> None:
    """What was taken away later is gone, and not there again because an older version has it."""
    there = Annotations(format=1, id=ID, aliases={"best": Mark(1, present=True)}, pin=Mark(1, present=True))
    gone = Annotations(format=1, id=ID, aliases={"best": Mark(2, present=False)}, pin=Mark(2, present=False))
    merged = merge(there, gone)

    assert (("best",), True) == (there.alias_names, there.pinned)
    assert ((), False) == (merged.alias_names, merged.pinned)


def raw(**changes: Any) -> bytes:
    return json.dumps({"format": 1, "id": ID, **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        encode(empty(ID))[:-10],
        raw(id="../../etc"),
        raw(format="1"),
        raw(pin=True),
        raw(pin=[1, "yes"]),
        raw(pin=[1.5, True]),
        raw(pin=[-1, True]),
        raw(pin=[2**63, True]),
        raw(tags={"a/b": [1, True]}),
        raw(tags={"\x1b[31m": [1, True]}),
        raw(tags={"": [1, True]}),
        raw(tags={"cafe\u0301": [1, True]}),
        raw(aliases={"latest": [1, True]}),
        raw(aliases={"x" * 300: [1, True]}),
        raw(metrics={"loss": [1, "low"]}),
        raw(metrics={"loss": [1, True]}),
        raw(metrics={"loss": [1, None]}),
        raw(metrics={"loss": [1, {"type": "pickle", "value": ""}]}),
        raw(metrics={"loss": [1, [0.5]]}),
        raw(metrics={"": [1, 0.5]}),
    ],
)
def test_what_no_edit_writes_is_damage(data: bytes) -> None:
    """Each is told, with what to do, and none gets into a catalog."""
    with pytest.raises(SnapshotCorruptError, match=r"damaged.*remove it"):
        decode(data)


def test_a_newer_format_is_refused_as_such() -> None:
    """Whatever else is in it."""
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        decode(raw(format=2, tags=["new", "shape"]))


def test_numbers_keep_their_kind() -> None:
    """NaN, infinity and long ints too."""
    given = {"a": math.nan, "b": -math.inf, "c": 2**80, "d": 1, "e": 1.0}
    metrics = {name: Value(1, values.encode(value)) for name, value in given.items()}
    found = decode(encode(msgspec.structs.replace(empty(ID), metrics=metrics))).metrics
    read = {name: values.decode(metric.value) for name, metric in found.items()}

    assert {name: repr(value) for name, value in given.items()} == {name: repr(value) for name, value in read.items()}
