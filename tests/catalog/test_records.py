"""What a search found is a plain sequence of records that do not change, a table for pandas, and a table for people that is only text."""

from __future__ import annotations

import datetime as dt
import enum
import html.parser
import itertools
import math
import sys
import unicodedata
from dataclasses import FrozenInstanceError
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from expstate import Catalog
from expstate.catalog import rows
from expstate.catalog.frame import _FIELDS
from expstate.catalog.model import Location, Record
from expstate.catalog.records import Records
from expstate.errors import RefNotFoundError
from expstate.format.annotations import Annotations, Mark, Value

from .made import DAY, NEW_YEAR, data, enter

HOSTILE = (
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "javascript:alert(1)",
    "<!-- --><style>*{}</style>",
    "' onmouseover='alert(1)",
    "&lt;b&gt;",
)
UNPRINTABLE = "a\x1b[31m\x1b]0;t\x07\nforged\r\x9b2J\x85\u202egnp\u2066\u200b\ufeff\u2028"


@pytest.fixture(params=[100, 2], ids=["one page", "pages"])
def found(request: pytest.FixtureRequest, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Seven records, from g to a; read at once, or as they are looked at."""
    monkeypatch.setattr("expstate.catalog.query.finding.PAGE", request.param)
    monkeypatch.setattr("expstate.catalog.records._GROUP", 3)
    for number, name in enumerate("abcdefg"):
        enter(catalog, name=name, step=number, created_at=NEW_YEAR + number * DAY, metrics={"loss": math.nan, "acc": number / 8})
    return catalog.search()


def names(records: Any) -> str:
    return "".join(record.name or "-" for record in records)


# A sequence


def test_records_are_a_sequence(found: Records, catalog: Catalog) -> None:
    """As a list would be, whatever was read of it before."""
    for number, name in enumerate("gfedcba"):
        assert name == found[number].name == found[number - 7].name
    assert ("gfedcba", "abcdefg", 7, True) == (names(found), names(reversed(found)), len(found), bool(found))
    assert [2, 1, 0] == [found.index(found[2]), found.count(found[4]), found.index(catalog["g"])]
    assert found[5] in found
    assert data() not in found


@pytest.mark.parametrize("number", [7, -8, 10**30])
def test_a_record_that_is_not_there_is_an_index_error(found: Records, number: int) -> None:
    with pytest.raises(IndexError, match=f"no record {number}, this search found 7"):
        found[number]


def test_other_indexes_are_those_of_python(found: Records) -> None:
    assert "f" == found[np.int64(1)].name
    with pytest.raises(TypeError):
        found["g"]  # type: ignore[call-overload]


def test_a_slice_is_of_the_same_kind(found: Records, catalog: Catalog) -> None:
    """And has what the slice of a list would have, also of what was not read yet."""
    for start, stop, step in itertools.product((None, 0, 3, -2, 99), (None, 0, 2, 5, -1, 99), (None, 2, -1)):
        part = slice(start, stop, step)
        sliced = catalog.search()[part]
        assert Records is type(sliced)
        assert "gfedcba"[part] == names(sliced), part
        assert "gfedcba"[part][1:] == names(sliced[1:]), part
        assert len("gfedcba"[part]) == len(sliced)
        assert "gfedcba"[part] == names(found[part])


def test_what_was_found_twice_is_equal(found: Records, catalog: Catalog) -> None:
    """NaN among its metrics or not."""
    again = catalog.search()

    assert list(again) == list(found)
    assert list(again[3:]) == list(found)[3:]
    assert found[0] != found[1]
    assert set(again) == set(found)
    assert 7 == len(set(found) | set(again))


def test_an_empty_search_is_an_empty_sequence(found: Records, catalog: Catalog) -> None:
    nothing = catalog.search("step > 100")

    assert ([], 0, False) == (list(nothing), len(nothing), bool(nothing))
    assert 0 == len(nothing[:3])
    assert 0 == len(nothing.to_pandas())


def test_what_was_deleted_since_is_left_out(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """By iteration and by the table; by its number it is an error that says what to do."""
    monkeypatch.setattr("expstate.catalog.query.finding.PAGE", 1)
    for number, name in enumerate("abcd"):
        enter(catalog, name=name, created_at=NEW_YEAR + number * DAY)
    found = catalog.search()
    assert 4 == len(found)
    with catalog.database.writing() as connection:
        for table in ("bodies", "locations", "records"):
            column = "seq" if table == "records" else "record"
            connection.exec_driver_sql(f"DELETE FROM {table} WHERE {column} = 2")  # noqa: S608 - names of the line above

    assert "dca" == names(found)
    assert ["d", "c", "a"] == found.to_pandas()["name"].tolist()
    with pytest.raises(RefNotFoundError, match="record 2 of this search was deleted since; search again"):
        found[2]
    assert "a" == found[3].name


# A record


def test_a_record_does_not_change(found: Records) -> None:
    """It is frozen, and has no room for more."""
    for name in ("name", "status", "id"):
        with pytest.raises(FrozenInstanceError):
            setattr(found[0], name, "other")
    with pytest.raises((FrozenInstanceError, TypeError, AttributeError)):
        found[0].extra = 1  # type: ignore[attr-defined]


def test_a_record_has_what_is_known_of_the_snapshot(any_catalog: Catalog) -> None:
    """With the types that were given."""
    one = data(
        name="n", step=3, user="me", host="there", tags=("b", "a"), note="text", pinned=True, duration_seconds=1.5, world_size=4,
        params={"lr": 0.1, "layers": [1, (2, None)], "big": 2**70, "none": None}, metrics={"loss": 0.5, "count": 2**64, "inf": math.inf},
        parent="f" * 32, provenance={"host": "there", "git": {"branch": "main"}},
    )  # fmt: skip
    enter(any_catalog, one)
    (record,) = any_catalog.search()

    assert (
        Record(
            id=one.id,
            name="n",
            project="tests",
            user="me",
            host="there",
            url=one.url,
            locations=(Location(one.url, "there", one.digest, "present"),),
            step=3,
            created_at=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc),
            duration_seconds=1.5,
            nbytes=1000,
            nbytes_written=1000,
            world_size=4,
            tags=("a", "b"),
            aliases=(),
            pinned=True,
            note="text",
            params={"lr": 0.1, "layers": [1, (2, None)], "big": 2**70, "none": None},
            metrics={"loss": 0.5, "count": 2**64, "inf": math.inf},
            keys=(),
            parent="f" * 32,
            digest=one.digest,
            provenance={"host": "there", "git": {"branch": "main"}},
        )
        == record
    )
    assert [float, list, int, type(None)] == [type(value) for value in record.params.values()]


class Optimizer(enum.Enum):
    """An enum of this module."""

    ADAM = "adam"


class Color(enum.Flag):
    """A flag of this module."""

    RED = 1
    BLUE = 2


def test_an_enum_of_a_script_does_not_hide_its_record_from_others(any_catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has not imported its class gets its name, and finds it by that; as does who has."""
    params = {"optimizer": Optimizer.ADAM, "several": [Optimizer.ADAM, (Color.RED,)], "lr": 0.5}
    enter(any_catalog, name="known", params=params)
    assert params == any_catalog.search()[0].params
    monkeypatch.delattr(sys.modules[__name__], "Optimizer")
    monkeypatch.delattr(sys.modules[__name__], "Color")
    enter(any_catalog, name="unknown", params=params)

    for record in any_catalog.search("optimizer = Optimizer.ADAM and optimizer ~ adam and lr = 0.5"):
        assert {"optimizer": "Optimizer.ADAM", "several": ["Optimizer.ADAM", ("Color.RED",)], "lr": 0.5} == record.params
    assert 2 == len(any_catalog.search("optimizer = Optimizer.ADAM"))
    assert ["Optimizer.ADAM"] * 2 == any_catalog.search().to_pandas()["param.optimizer"].tolist()


def test_the_text_of_a_record_is_one_line_that_can_be_printed(catalog: Catalog) -> None:
    """Whatever is in it, numbers of thousands of digits too."""
    hostile = data(id="a" * 32, name=UNPRINTABLE, tags=(UNPRINTABLE,), note=UNPRINTABLE, metrics={UNPRINTABLE: 10**5000, "loss": 0.5})
    enter(catalog, msgspec.structs.replace(hostile, body=msgspec.structs.replace(hostile.body, params={UNPRINTABLE: [UNPRINTABLE]})))
    text = repr(catalog["aaaa"])

    assert text.isprintable()
    assert text.startswith(f"Record(id='{'a' * 32}', name='a\\x1b[31m")
    assert "'loss': 0.5" in text
    assert text == repr(catalog["aaaa"])


# pandas


STABLE = {
    "id": "string",
    "name": "string",
    "project": "string",
    "user": "string",
    "host": "string",
    "url": "string",
    "step": "Int64",
    "created_at": "datetime64[us, UTC]",
    "duration_seconds": "float64",
    "nbytes": "int64",
    "nbytes_written": "int64",
    "world_size": "int64",
    "tags": "object",
    "aliases": "object",
    "pinned": "bool",
    "note": "string",
    "parent": "string",
    "digest": "string",
    "status": "string",
    "commit": "string",
    "branch": "string",
}


def dtypes(table: pd.DataFrame) -> dict[str, str]:
    return {name: str(dtype) for name, dtype in table.dtypes.items()}


@pytest.mark.parametrize("given", [[], [{}], [{"name": "a", "step": 1, "note": "x", "user": "me", "duration_seconds": 1.0}, {}]])
def test_columns_have_their_dtypes_whatever_was_found(any_catalog: Catalog, given: list[dict[str, Any]]) -> None:
    """Nothing, nothing but missing values, or some of both."""
    for fields in given:
        enter(any_catalog, **fields)

    assert list(_FIELDS) == list(STABLE)
    assert STABLE == dtypes(any_catalog.search().to_pandas())


def test_a_table_has_a_row_for_each_record_in_order(any_catalog: Catalog) -> None:
    """With what the record has; tags and aliases are tuples, times are in UTC."""
    claim = {"best": Mark(1, present=True), "a": Mark(1, present=True)}
    enter(any_catalog, data(id="a" * 32, name="one", step=2**62 + 1, tags=("y", "x"), duration_seconds=0.5, metrics={"loss": 0.5}))
    enter(any_catalog, data(id="b" * 32, created_at=NEW_YEAR + DAY, annotations=Annotations(format=1, id="b" * 32, aliases=claim)))
    enter(any_catalog, data(id="b" * 32, url="/copy", host="there", digest="0" * 64))
    records = any_catalog.search()
    table = records.to_pandas()

    assert ["b" * 32, "a" * 32] == table["id"].tolist()
    for place, record in enumerate(records):
        for name in set(STABLE) - {"commit", "branch"}:
            value, expected = table[name][place], getattr(record, name)
            assert (value is pd.NA or math.isnan(value)) if expected is None else expected == value, name
    assert [(), ("x", "y")] == table["tags"].tolist()
    assert [("a", "best"), ()] == table["aliases"].tolist()
    assert "UTC" == str(table["created_at"].dt.tz)
    assert [pd.Timestamp("2026-01-02", tz="UTC"), pd.Timestamp("2026-01-01", tz="UTC")] == table["created_at"].tolist()
    assert 2**62 + 1 == table["step"][1]
    assert [0, 1] == table.index.tolist()


def test_metrics_and_params_have_columns_of_their_own(any_catalog: Catalog) -> None:
    """Of the dtype that all their values fit; missing is not zero, and a whole number stays one."""
    enter(
        any_catalog,
        name="all",
        metrics={"loss": 0.5, "count": 3, "mixed": 1, "nan": math.nan, "big": 2**64, "long": 2**63 - 1},
        params={
            "lr": 0.1,
            "n": 2**62 + 1,
            "text": "adam",
            "flag": True,
            "any": [1, (2,)],
            "odd": 1,
            "null": None,
            "numpy": np.float32(0.5),
        },
    )
    enter(any_catalog, name="some", metrics={"mixed": 0.5, "nan": 1}, params={"odd": "x", "numpy": 2}, created_at=NEW_YEAR - DAY)
    table = any_catalog.search().to_pandas()
    own = table.loc[:, ~table.columns.isin(list(STABLE))]

    assert {
        "metric.big": "object",
        "metric.count": "Int64",
        "metric.long": "Int64",
        "metric.loss": "float64",
        "metric.mixed": "float64",
        "metric.nan": "float64",
        "param.any": "object",
        "param.flag": "boolean",
        "param.lr": "float64",
        "param.n": "Int64",
        "param.null": "object",
        "param.numpy": "float64",
        "param.odd": "object",
        "param.text": "string",
    } == dtypes(own)
    assert {"metric.count": 3, "metric.long": 2**63 - 1, "metric.mixed": 1.0, "metric.big": 2**64, "param.n": 2**62 + 1} == {
        name: own[name][0] for name in ("metric.count", "metric.long", "metric.mixed", "metric.big", "param.n")
    }
    assert ([1, (2,)], True, "adam", 1, 0.5) == tuple(own[f"param.{name}"][0] for name in ("any", "flag", "text", "odd", "numpy"))
    assert [name for name in own if own[name].isna()[1]] == [
        name for name in own if name not in {"metric.mixed", "metric.nan", "param.odd", "param.numpy"}
    ]
    assert [True, False] == own["metric.nan"].isna().tolist()
    assert ["all", "some"] == table.sort_values("metric.mixed", ascending=False)["name"].tolist()


def test_metrics_that_were_logged_later_are_in_the_table(any_catalog: Catalog) -> None:
    """As they are in the record."""
    later = Annotations(format=1, id="a" * 32, metrics={"loss": Value(1, 0.25), "acc": Value(1, 1)}, tags={"x": Mark(1, present=True)})
    enter(any_catalog, data(id="a" * 32, metrics={"loss": 3}, annotations=later))
    (row,) = any_catalog.search().to_pandas()[["metric.loss", "metric.acc", "tags"]].to_dict("records")

    assert {"metric.loss": 0.25, "metric.acc": 1, "tags": ("x",)} == row


def test_a_table_is_of_what_was_found(found: Records) -> None:
    """Slices too; all pages, and groups of any size."""
    assert list("gfedcba") == found.to_pandas()["name"].tolist()
    assert list("ec") == found[2:5:2].to_pandas()["name"].tolist()


def test_a_table_does_not_depend_on_the_size_of_groups(found: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = found.to_pandas()
    monkeypatch.setattr("expstate.catalog.frame._GROUP", 2)

    pd.testing.assert_frame_equal(whole, found.to_pandas())


def test_names_of_columns_are_those_of_metrics(catalog: Catalog) -> None:
    """Whatever these are, also where a metric is called like a field or a param."""
    enter(catalog, metrics={"name": 1, "val/loss": 2, "": 3, "größe": 4}, params={"name": "x", "val/loss": "y"})
    own = catalog.search().to_pandas().iloc[0].to_dict()

    assert {"metric.": 3, "metric.größe": 4, "metric.name": 1, "metric.val/loss": 2, "param.name": "x", "param.val/loss": "y"} == {
        name: value for name, value in own.items() if name.startswith(("metric.", "param."))
    }


# For people


class Page(html.parser.HTMLParser):
    """What a browser makes of a page: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.cells.append(data)

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_a_record_is_more_than_text_on_a_page(catalog: Catalog, text: str) -> None:
    """Names, tags, aliases and names of metrics; what is shown is what was given."""
    claim = {text[:20]: Mark(1, present=True)}
    enter(
        catalog,
        data(
            id="a" * 32,
            name=text,
            tags=(text,),
            note=text,
            metrics={text: 0.5},
            annotations=Annotations(format=1, id="a" * 32, aliases=claim),
        ),
    )
    page = Page(catalog.search()._repr_html_())

    assert {"table", "thead", "tbody", "tr", "th", "td"} == set(page.tags)
    assert {"style"} == page.attributes
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    assert f"{shown}=0.5" in page.cells
    assert shown in page.cells


def test_nothing_in_a_record_acts_on_a_terminal(catalog: Catalog) -> None:
    """Nor forges a line; on a page neither."""
    hostile = data(id="a" * 32, name=UNPRINTABLE[:30], tags=(UNPRINTABLE[20:],), metrics={UNPRINTABLE[:8]: 0.5, "\u202e": 1})
    enter(catalog, hostile)
    found = catalog.search()

    assert 2 == len(repr(found).splitlines())
    for text in (repr(found).replace("\n", ""), found._repr_html_()):
        assert not [character for character in text if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]
    assert "%1B[31m" in repr(found)


def test_a_table_for_people_shows_what_tells_records_apart(catalog: Catalog) -> None:
    """Id, name, step, time, size, marks and metrics, in columns."""
    enter(
        catalog,
        data(
            id="3f9a2c71" + "0" * 24,
            name="one",
            step=7,
            nbytes=3 * 2**20,
            written_bytes=3 * 2**20 + 4096,
            tags=("b", "a"),
            metrics={"loss": 0.123456, "big": 2**200, "nan": math.nan, "n": 3, "more": 1, "most": 2},
            annotations=Annotations(format=1, id="3f9a2c71" + "0" * 24, pin=Mark(1, present=True), aliases={"best": Mark(1, present=True)}),
        ),
    )
    head, line = repr(catalog.search()).splitlines()

    assert ["id", "name", "step", "created", "(UTC)", "size", "tags", "metrics"] == head.split()
    assert "3f9a2c71  one   7     2026-01-01 00:00  3 MiB  pinned, @best, a, b  loss=0.1235, big=0x1000" in line
    assert line.endswith("nan=nan, n=3, and 2 more")
    assert line.index("one") == head.index("name")


def test_what_was_written_is_shown_where_some_of_it_is_shared(catalog: Catalog) -> None:
    """As a column of its own."""
    enter(catalog, nbytes=1000, written_bytes=5096)
    enter(catalog, nbytes=3 * 2**20, written_bytes=4096, created_at=NEW_YEAR + DAY)
    found = catalog.search()
    head, line, other = repr(found).splitlines()

    assert ["id", "name", "step", "created", "(UTC)", "size", "written", "tags", "metrics"] == head.split()
    assert (line.index("4 KiB"), other.index("4.98 KiB")) == (head.index("written"),) * 2
    cells = Page(found._repr_html_()).cells
    assert {"written", "3 MiB", "4 KiB", "4.98 KiB"} <= set(cells)
    assert "written" not in repr(found[1:]) + found[1:]._repr_html_()


def test_a_long_list_is_cut_and_says_so(catalog: Catalog) -> None:
    """Twenty are shown, on a page too; a slice shows the others."""
    for number in range(23):
        enter(catalog, name=f"n{number:02}", created_at=NEW_YEAR + number * DAY)
    found = catalog.search()
    lines = repr(found).splitlines()
    page = Page(found._repr_html_())

    assert (22, "and 3 more") == (len(lines), lines[-1])
    assert "n22" in lines[1]
    assert (21, "and 3 more") == (page.tags.count("tr"), page.cells[-1])
    assert 4 == len(repr(found[20:]).splitlines())
    assert "more" not in repr(found[:20]) + found[:20]._repr_html_()


def test_tables_for_people_are_the_same_each_time(found: Records, catalog: Catalog) -> None:
    again = catalog.search()

    assert (repr(again), again._repr_html_()) == (repr(found), found._repr_html_())


def test_nothing_that_was_found_is_said(catalog: Catalog) -> None:
    assert ("no records", "<i>no records</i>") == (repr(catalog.search()), catalog.search()._repr_html_())


def test_a_table_of_pandas_escapes_what_is_in_it(catalog: Catalog) -> None:
    """Names of its columns too."""
    for text in HOSTILE:
        enter(catalog, name=text, tags=(text,), note=text, metrics={text: 0.5}, params={text: text})
    with pd.option_context("display.max_columns", None):
        page = Page(catalog.search().to_pandas()._repr_html_())

    assert not {"img", "script", "comment", "b"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]


def test_a_damaged_record_is_named(catalog: Catalog) -> None:
    """And how to mend it."""
    from expstate.errors import CatalogCorruptError

    enter(catalog, id="a" * 32)
    with catalog.database.writing() as connection:
        connection.exec_driver_sql('UPDATE bodies SET body = \'{"params": {"x": {"type": "enum", "value": 3}}}\'')
    rows._decoded.cache_clear()

    with pytest.raises(CatalogCorruptError, match=r"'a{32}' is damaged.*expstate scan"):
        catalog.search()
