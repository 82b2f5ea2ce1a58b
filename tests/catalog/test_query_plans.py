"""Whatever a query and a sort say and however they are run, what is found is what plain Python finds, in the same order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expstate import Catalog
from expstate.catalog import rows, schema
from expstate.catalog.query import plans
from expstate.catalog.query.parse import parse, parse_sort

from .evaluate import in_order, is_true
from .made import DAY, NEW_YEAR, data, enter

METRICS = frozenset({"loss", "acc", "val/loss"})
NOW = NEW_YEAR + 100 * DAY
NUMBERS = (0, 1, 0.5, -0.5, -3, 2**53, 2**53 + 1, 2**53 + 2, 2.0**53, -(2**53) - 1, 2**70 + 1, 2.0**70, 10**310, -(10**310), 10**311)
NUMBERS = (*NUMBERS, math.nan, math.inf, -math.inf)
TEXTS = ("adam", "Adam", "sgd", "18", "7b", "true", "50%", "5_%", "größe", "GRÖSSE", "")
PARAMS = (*NUMBERS, *TEXTS, True, False, None, [1, 2])

_metrics = st.dictionaries(st.sampled_from(sorted(METRICS)), st.sampled_from(NUMBERS), max_size=3)
_params = st.dictionaries(st.sampled_from(["lr", "optimizer", "flag"]), st.sampled_from(PARAMS), max_size=3)
_records = st.fixed_dictionaries(
    {
        "metrics": _metrics,
        "params": _params,
        "tags": st.sets(st.sampled_from(["ablation", "baseline", "Größe"]), max_size=2).map(tuple),
        "created_at": st.integers(0, 4).map(lambda day: NEW_YEAR + day * DAY + DAY // 2),
        "nbytes": st.sampled_from([0, 1000, 2**30, 2**63 - 1]),
        "pinned": st.booleans(),
        "project": st.sampled_from(["tests", "tests", "others"]),
    },
    optional={
        "name": st.sampled_from(["resnet-18", "RESNET", "vit"]),
        "step": st.sampled_from([0, 1, -5, 2**62 + 1]),
        "note": st.sampled_from(["a note", "50% of it", "Größe"]),
        "duration_seconds": st.sampled_from([0.5, 90.0, 7200.0]),
        "parent": st.just("f" * 32),
    },
)


_number = st.sampled_from([*map(repr, NUMBERS), "1e3", "-.5", "1.", "1KiB", "7 d", "1e400"])
_plain_number = _number.filter(lambda text: "d" not in text and "iB" not in text)
_word = st.sampled_from(["adam", "true", "False", "7b", "'18'", '"50%"', '"_"', "größe", '""', "'none'", "'true'", "nan", "'nan'"])
_op = st.sampled_from(["<", "<=", ">", ">=", "=", "==", "!="])
_text_op = st.sampled_from(["=", "!=", "~", "<", ">="])
_measured = st.sampled_from(["loss", "acc", "metric.loss", 'metric."val/loss"', "val/loss", "lr", "optimizer", "param.flag", "param.lr"])
_perhaps_missing = st.one_of(_measured, st.sampled_from(["name", "tag", "note", "step", "parent", "alias", "duration"]))
_day = st.sampled_from(["2026-01-01", "2026-01-03", "2026-01-03T12:00", "'2026-01-02 12:00:00'", "today"])


def _built(*parts: Any) -> Any:
    return st.builds(lambda *words: " ".join(words), *(st.sampled_from(part) if isinstance(part, list) else part for part in parts))


_leaves = st.one_of(
    _built(_measured, _op, _number),
    _built(_measured, _text_op, _word),
    _built(_perhaps_missing, ["=", "!="], ["none", "None"]),
    _built(["step", "size", "nbytes", "world_size"], _op, _plain_number),
    _built(["size"], _op, ["1KB", "1GiB", "0.5 kb", "9e999", "9223372036854775808"]),
    _built(["name", "note", "status", "project"], _text_op, _word),
    _built(["tag"], ["=", "!=", "~"], ["ablation", "Größe", "größe", "'%'", "line"]),
    _built(["created", "created_at"], _op, _day),
    _built(["age"], _op, ["95.5d", "96d", "14 weeks", "2h"]),
    _built(["duration"], _op, ["1m", "2h", "90", "nan", "inf", "0.5"]),
    _built(["pinned", "pinned = false", "pinned != true", "param.flag", "flag", "url ~ runs", "url = /runs/x"]),
)
queries = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        inner.map("not ({})".format),
        st.builds("{} and {}".format, inner, inner),
        st.builds("({}) or ({})".format, inner, inner),
        st.builds("({}) and ({})".format, inner, inner),
    ),
    max_leaves=5,
)
_by = ["loss", "acc", "metric.'val/loss'", "lr", "optimizer", "step", "name", "size", "created", "age", "tag", "note", "pinned", "duration"]
sorts = st.one_of(st.none(), st.builds("{}{}".format, st.sampled_from(_by), st.sampled_from(["", ":asc", ":desc"])))


def _check(catalog: Catalog, several: list[dict[str, Any]], query: str, sort: str | None, limit: int | None, project: str) -> None:
    # So that every name is known, in both projects.
    everything = {"metrics": dict.fromkeys(METRICS, math.nan), "params": dict.fromkeys(("lr", "optimizer", "flag"))}
    with catalog.database.writing() as connection:
        for table in reversed(schema.metadata.sorted_tables):
            connection.execute(sa.delete(table))
    enter(catalog, *(data(**one) for one in several), *(data(**everything, project=name) for name in ("tests", "others")))
    with catalog.database.reading() as connection:
        numbers = connection.execute(sa.select(schema.records.c.id, schema.records.c.ordered_at, schema.records.c.seq)).all()
        every = rows.fetch(connection, [row.seq for row in numbers])
    place = {row.id: (row.ordered_at, row.seq) for row in numbers}
    searched = [record for record in every if project in {"*", record.project}]
    node = parse(query)
    found = [record for record in searched if is_true(node, record, set(METRICS), NOW)]
    by = None if sort is None else parse_sort(sort)
    expected = in_order(found, place, None if by is None else by.name, descending=by is not None and by.descending, metrics=METRICS)[:limit]
    result = catalog.search(query, project=project, sort=sort, limit=limit)
    assert [record.id for record in expected] == [record.id for record in result]
    assert len(expected) == len(result)


_arguments = given(
    several=st.lists(_records, max_size=8),
    query=queries,
    sort=sorts,
    limit=st.sampled_from([None, None, 0, 1, 3]),
    project=st.sampled_from(["tests", "*"]),
)
_fixtures = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.mark.parametrize(("window", "few", "page"), [(4096, 4000, 100), (2, 0, 2), (4, 2, 1)], ids=["usual", "walking", "all plans"])
@_arguments
@settings(max_examples=30, deadline=None, suppress_health_check=_fixtures)
def test_what_is_found_is_what_plain_python_finds(catalog, window, few, page, several, query, sort, limit, project):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "WINDOW", window)
        patch.setattr(plans, "FEW", few)
        patch.setattr("expstate.catalog.query.finding.PAGE", page)
        patch.setattr(rows, "now", lambda: NOW)
        _check(catalog, several, query, sort, limit, project)


@_arguments
@settings(max_examples=20, deadline=None, suppress_health_check=_fixtures)
def test_postgresql_finds_what_plain_python_finds(postgres_catalog, several, query, sort, limit, project):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "WINDOW", 4)
        patch.setattr(plans, "FEW", 2)
        patch.setattr(rows, "now", lambda: NOW)
        _check(postgres_catalog, several, query, sort, limit, project)
