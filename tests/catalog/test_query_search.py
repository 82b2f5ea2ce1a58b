"""What a person asks the catalog is what is found, in the order that was asked for; what makes no sense is an error that says where."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import Catalog, Snapshot, settings
from expstate.catalog import rows, schema
from expstate.catalog.query import plans
from expstate.catalog.query.parse import MAX_CHARACTERS, MAX_DEPTH
from expstate.errors import ExpstateError, InvalidArgumentError, InvalidQueryError

from .made import DAY, NEW_YEAR, data, enter
from .plain import count

Take = Callable[..., Snapshot]


def named(catalog: Catalog, query: str | None = None, **options: Any) -> list[str | None]:
    """Names of what is found."""
    return [record.name for record in catalog.search(query, **options)]


def refused(catalog: Catalog, query: str | None = None, **options: Any) -> InvalidQueryError:
    """The error of a question that makes no sense."""
    with pytest.raises(InvalidQueryError) as caught:
        catalog.search(query, **options)
    return caught.value


def several(catalog: Catalog, *records: dict[str, Any]) -> None:
    """Enter records one after the other, the last the newest."""
    for number, fields in enumerate(records):
        enter(catalog, **{"created_at": NEW_YEAR + number * DAY, **fields})


# By real takes


def test_takes_are_found_by_what_was_said_of_them(any_catalog: Catalog, take: Take) -> None:
    """And by what was added since."""
    take(any_catalog, "a", name="resnet-18", metrics={"loss": torch.tensor(0.125)}, params={"lr": 0.1}, tags=["ablation"], step=1)
    take(any_catalog, "b", name="resnet-50", metrics={"loss": np.float32(0.5)}, params={"lr": 0.01, "optimizer": "adam"}, step=2)
    take(any_catalog, "c", name="vit", metrics={"loss": 7}, params={"amp": True})
    any_catalog.pin("vit")
    any_catalog.alias("resnet-50", "best")
    any_catalog.log_metric("vit", "acc", 0.75)

    everything = 'loss < 0.2 and (tag = ablation or not pinned) and size < 1GB and age < 7d and name ~ "ResNet"'
    assert ["resnet-18"] == named(any_catalog, everything)
    assert ["resnet-50"] == named(any_catalog, "optimizer = adam and alias = best and step >= 2")
    assert ["vit"] == named(any_catalog, "acc > 0.5 and amp and pinned and duration < 1h and created = today")
    assert ["resnet-50", "resnet-18"] == named(any_catalog, "not pinned")
    assert ["resnet-18", "resnet-50", "vit"] == named(any_catalog, sort="loss")


def test_what_was_thrown_away_is_found_no_more(catalog: Catalog, take: Take) -> None:
    take(catalog, "a", name="a")
    take(catalog, "b", name="b")
    catalog.delete("a")

    assert ["b"] == named(catalog)


# Names


def test_a_bare_name_is_a_field_else_a_metric_else_a_param(any_catalog: Catalog) -> None:
    """The others are reached by their full names."""
    several(any_catalog, {"name": "a", "step": 1, "metrics": {"step": 2, "loss": 3}, "params": {"step": 4, "size": 5, "lr": 6}})

    for query in ("step = 1", "metric.step = 2", "param.step = 4", "loss = 3", "lr = 6", "param.size = 5", "size = 1000"):
        assert ["a"] == named(any_catalog, query)
    for query in ("step = 2", "step = 4", "size = 5", "metric.step = 4", "metric.lr = 6", "param.loss = 3"):
        assert [] == named(any_catalog, query)


def test_a_name_that_is_a_metric_and_a_param_is_ambiguous(any_catalog: Catalog) -> None:
    """In a query and in a sort; the error names both spellings, and each of them works."""
    several(any_catalog, {"name": "a", "metrics": {"scale": 1}}, {"name": "b", "params": {"scale": 1}})

    for error in (refused(any_catalog, "step = 3 or scale > 0"), refused(any_catalog, sort="scale:desc")):
        assert "write metric.scale or param.scale" in str(error)
    assert [12, 0] == [refused(any_catalog, "step = 3 or scale > 0").position, refused(any_catalog, sort="scale").position]
    assert [["a"], ["b"]] == [named(any_catalog, "metric.scale > 0"), named(any_catalog, "param.scale > 0")]
    assert ["a", "b"] == named(any_catalog, sort="metric.scale")


def test_a_name_of_another_project_is_not_ambiguous(any_catalog: Catalog) -> None:
    """Only where that is searched too."""
    several(any_catalog, {"name": "a", "metrics": {"scale": 1}}, {"name": "b", "project": "other", "params": {"scale": 1}})

    assert [["a"], ["b"]] == [named(any_catalog, "scale = 1"), named(any_catalog, "scale = 1", project="other")]
    assert "is a metric and a param" in str(refused(any_catalog, "scale = 1", project="*"))


def test_a_full_name_is_never_an_error(any_catalog: Catalog) -> None:
    """What no record has is missing from all."""
    several(any_catalog, {"name": "a"})

    assert [] == named(any_catalog, "metric.loss < 1 or param.lr > 0 or metric.__class__ = 1")
    assert ["a"] == named(any_catalog, "not metric.loss < 1 and param.lr = none", sort="metric.acc:desc")


def test_names_of_every_spelling_are_found(any_catalog: Catalog) -> None:
    """In quotes where they are no words."""
    names = [
        "val/loss",
        "val loss",
        "loss@5",
        "größe",
        "损失",
        "it's",
        'a"b',
        "back\\slash",
        "not",
        "metric.x",
        "a.b",
        "line\nbreak",
        "x" * 1500,
    ]
    several(any_catalog, {"name": "a", "metrics": dict(zip(names, range(len(names)), strict=True))})

    for number, name in enumerate(names):
        quoted = '"{}"'.format(name.replace("\\", "\\\\").replace('"', '\\"'))
        assert ["a"] == named(any_catalog, f"metric.{quoted} = {number} and {quoted} < {number + 1}")
        assert [] == named(any_catalog, f"metric.{quoted} != {number}")
    assert ["a"] == named(any_catalog, "val/loss = 0 and größe = 3 and a.b = 10 and metric.a.b = 10")


@pytest.mark.parametrize(
    ("query", "position", "nearest"),
    [
        ("lss < 1", 0, "'loss'"),
        ("pinned and not optimiser = adam", 15, "'optimizer'"),
        ("nam = x", 0, "'name'"),
        ("LOSS < 1", 0, "'loss'"),
        ("creatd > 2026-01-01", 0, "'created'"),
        ("'val los' < 1", 0, "'val loss'"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(catalog: Catalog, query: str, position: int, nearest: str) -> None:
    """And says where it stands."""
    several(catalog, {"metrics": {"loss": 1, "val loss": 2}, "params": {"optimizer": "adam"}})
    error = refused(catalog, query)

    assert position == error.position
    assert "is no field, metric or param of these records; did you mean " in str(error)
    assert nearest in str(error)
    assert ["", f"  {query}", f"  {' ' * position}^"] == ["", *str(error).split("\n")[1:]]


def test_an_unknown_sort_is_an_error_that_names_the_nearest(catalog: Catalog) -> None:
    several(catalog, {"metrics": {"loss": 1}})
    error = refused(catalog, sort="lss:desc")

    assert 0 == error.position
    assert "the sort cannot be understood at character 1: 'lss' is no field" in str(error)
    assert "did you mean 'loss'" in str(error)


def test_nothing_is_known_of_an_empty_project_so_nothing_is_wrong(any_catalog: Catalog) -> None:
    """Before the first take a query finds nothing, in another project too."""
    assert [] == named(any_catalog, "loss < 0.2 and lr > 0", sort="acc")
    several(any_catalog, {"metrics": {"loss": 1}})

    assert [] == named(any_catalog, "lss < 0.2", project="other")


# Times


AGES: list[tuple[str, list[str]]] = [
    ("age > 7d", ["old"]),
    ("age < 7d", ["new", "middle"]),
    ("age >= 6 days and age <= 144h", ["middle"]),
    ("age > 0.5 weeks", ["middle", "old"]),
    ("age < 90s", ["new"]),
    ("age > 99999999999999999999w", []),
    ("created > 2026-01-01", ["new", "middle"]),
    ("created >= 2026-01-01", ["new", "middle", "old"]),
    ("created < 2026-01-05", ["old"]),
    ("created = 2026-01-05", ["middle"]),
    ("created != 2026-01-05", ["new", "old"]),
    ("created <= '2026-01-05 00:00'", ["middle", "old"]),
    ("created > 2026-01-05T01:00+02:00 and created < 2026-01-05T02:00:01+02:00", ["middle"]),
    ("created = today", ["new"]),
    ("created < yesterday", ["middle", "old"]),
]


def test_age_counts_back_and_created_counts_on(any_catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greater is older by age, and newer by time; a day is all of it."""
    monkeypatch.setattr(rows, "now", lambda: NEW_YEAR + 10 * DAY)
    for name, days in (("old", 0), ("middle", 4), ("new", 10)):
        enter(any_catalog, name=name, created_at=NEW_YEAR + days * DAY)

    for query, expected in AGES:
        assert expected == named(any_catalog, query), query


# Texts


CONTAINED: list[tuple[str, list[str]]] = [
    ("50%", ["50% of it"]),
    ("%", ["50% of it"]),
    ("_", ["a_b"]),
    ("5_", []),
    ("a_b", ["a_b"]),
    ("\\", ["back\\slash"]),
    ("\\s", ["back\\slash"]),
    ("RESNET", ["ResNet"]),
    ("größe", ["GRÖSSE"]),
    ("STRASSE", ["Straße"]),
    ("it's", ["it's"]),
    ('"', ['say "x"']),
    ("*", ["a*"]),
    ("[a-z]", []),
    (".*", []),
    ("(a+)+$", []),
    ("a" * 3000 + "!", []),
    ("日本", ["日本語"]),
    ("🎉", ["🎉"]),
    ("ok\n", ["ok\nthen"]),
]
TEXTS = ["50% of it", "a_b", "back\\slash", "ResNet", "GRÖSSE", "Straße", "it's", 'say "x"', "a*", "a" * 30, "日本語", "🎉", "ok\nthen"]


def test_contains_takes_every_character_as_it_is(any_catalog: Catalog) -> None:
    """Neither wildcards nor patterns; letters of all scripts are compared without their case."""
    several(any_catalog, *({"name": str(number), "note": text, "params": {"p": text}} for number, text in enumerate(TEXTS)))

    for part, expected in CONTAINED:
        quoted = '"{}"'.format(part.replace("\\", "\\\\").replace('"', '\\"'))
        wanted = [str(TEXTS.index(text)) for text in expected]
        assert wanted == named(any_catalog, f"note ~ {quoted}"), part
        assert wanted == named(any_catalog, f"p ~ {quoted}"), part
    assert len(TEXTS) == len(any_catalog.search('note ~ ""'))


def test_equal_takes_every_character_as_it_is(any_catalog: Catalog) -> None:
    """And tells cases apart."""
    several(any_catalog, *({"name": str(number), "note": text} for number, text in enumerate(TEXTS)))

    for number, text in enumerate(TEXTS):
        quoted = "'{}'".format(text.replace("\\", "\\\\").replace("'", "\\'"))
        assert [str(number)] == named(any_catalog, f"note = {quoted}")
    assert [] == named(any_catalog, "note = resnet or note = '50_ of it' or note = 'a%'")


def test_a_tag_is_one_of_many(any_catalog: Catalog) -> None:
    """Equal is among them, unequal is not among them; so are aliases and places."""
    several(any_catalog, {"name": "a", "tags": ("x", "y")}, {"name": "b", "tags": ("y", "caf\u00e9")}, {"name": "c"})

    assert [["a"], ["b", "a"], ["c", "b"]] == [named(any_catalog, f"tag {rest}") for rest in ("= x", "= y", "!= x")]
    assert [["c"], ["b", "a"]] == [named(any_catalog, f"tags {rest}") for rest in ("= none", "!= none")]
    assert [["b"], ["b"], ["b"]] == [named(any_catalog, f"tag {rest}") for rest in ("~ AF", "= cafe\u0301", "~ 'fe\u0301'")]
    assert [] == named(any_catalog, "tag = x and tag = 'caf\u00e9'")
    assert ["c", "b", "a"] == named(any_catalog, "url ~ /runs/ and alias != best")


# Missing values


def test_a_comparison_with_what_is_missing_is_false_and_its_not_is_true(any_catalog: Catalog) -> None:
    """Whatever the comparison; ``none`` asks for it."""
    several(any_catalog, {"name": "a"}, {"name": "b", "metrics": {"loss": 1}, "params": {"lr": "1"}, "note": "1", "step": 1, "parent": "1"})

    for name in ("loss", "lr", "note", "step", "parent"):
        for op in ("<", ">=", "=", "!="):
            query = f"{name} {op} {'1' if name in {'loss', 'step'} else repr('1')}"
            holds = op in {">=", "="}
            assert ["b"] * holds == named(any_catalog, query)
            assert ["b"] * (not holds) + ["a"] == named(any_catalog, f"not {query}")
        assert [["a"], ["b"]] == [named(any_catalog, f"{name} = none"), named(any_catalog, f"{name} != none")]
    assert ["a"] == named(any_catalog, "not (loss > 0 or step > 0)")
    assert ["b", "a"] == named(any_catalog, "not (loss > 0 and step > 5)")


def test_a_param_that_is_none_is_missing(any_catalog: Catalog) -> None:
    several(any_catalog, {"name": "a", "params": {"p": None}}, {"name": "b", "params": {"p": "none"}}, {"name": "c"})

    assert [["c", "a"], ["b"], ["b"]] == [named(any_catalog, f"p {rest}") for rest in ("= none", "!= none", "= 'none'")]


# Numbers


def test_numbers_of_every_size_are_compared_right(any_catalog: Catalog) -> None:
    """NaN, infinity, and ints that no float and no column of a database holds."""
    numbers = {
        "-inf": -math.inf,
        "0.1": 0.1,
        "2**53+1": 2**53 + 1,
        "2**64": 2**64,
        "2**64+1": 2**64 + 1,
        "10**400": 10**400,
        "inf": math.inf,
        "nan": math.nan,
    }
    several(any_catalog, *({"name": name, "metrics": {"m": value}, "params": {"p": value}} for name, value in numbers.items()))
    order = list(numbers)[:-1]

    for name, ops in (("m", "< <= = > >= !="), ("p", "< =")):
        for number, value in enumerate(order):
            written = repr(numbers[value])
            for op, expected in (
                ("<", order[:number]),
                ("<=", order[: number + 1]),
                ("=", [value]),
                (">", order[number + 1 :]),
                (">=", order[number:]),
                ("!=", [*order[:number], *order[number + 1 :], "nan"]),
            ):
                if op in ops.split():
                    assert expected[::-1] == named(any_catalog, f"{name} {op} {written}"), (name, op, written)
        assert [["nan"], order[::-1], []] == [named(any_catalog, f"{name} {op} nan") for op in ("=", "!=", "<=")]
        assert ["nan"] == named(any_catalog, f"not {name} <= inf")


def test_whole_numbers_of_fields_are_compared_with_any_number(any_catalog: Catalog) -> None:
    several(any_catalog, {"name": "a", "step": -(2**63)}, {"name": "b", "step": 5}, {"name": "c", "step": 2**63 - 1})

    assert [["b"], ["c"], ["a"]] == [named(any_catalog, f"step {rest}") for rest in ("= 5.0", "> 5.5", "< -1e3")]
    assert ["c", "b", "a"] == named(any_catalog, f"step < {2**63} and step > -inf and step != nan and step != 4.5")
    assert [] == named(any_catalog, f"step > {10**30} or step = 5.5 or step < nan")


def test_sizes_and_durations_have_units(any_catalog: Catalog) -> None:
    """Of a thousand, and of 1024, with or without a space."""
    several(
        any_catalog,
        {"name": "a", "nbytes": 1000, "written_bytes": 0, "duration_seconds": 90.0, "params": {"n": 1500}},
        {"name": "b", "nbytes": 1024, "written_bytes": 1000, "duration_seconds": 5400.0, "params": {"n": 3600}},
        {"name": "c", "nbytes": 3 * 2**30, "written_bytes": 2**20, "params": {"n": "1.5kB"}},
    )

    assert [["a"], ["b"], ["c"]] == [named(any_catalog, f"size {rest}") for rest in ("= 1kB", "= 1KiB", "> 3 GB")]
    assert [["c"], ["c", "b"], ["b"]] == [named(any_catalog, query) for query in ("written = 1MiB", "written >= 1kb", "duration = 1.5h")]
    assert [["a"], ["c", "a"], ["b"]] == [named(any_catalog, query) for query in ("duration < 2 minutes", "n = 1.5kB", "n = 1 hour")]


def test_values_of_params_keep_to_their_type(any_catalog: Catalog) -> None:
    """Texts, numbers, and true and false; those of NumPy as those of Python."""
    several(
        any_catalog,
        {"name": "text", "params": {"p": "18"}},
        {"name": "number", "params": {"p": 18}},
        {"name": "numpy", "params": {"p": np.float32(18)}},
        {"name": "flag", "params": {"p": True}},
        {"name": "numpy flag", "params": {"p": np.array([1]).any()}},
        {"name": "numpy text", "params": {"p": np.str_("18")}},
        {"name": "list", "params": {"p": [18]}},
    )

    assert ["numpy", "number"] == named(any_catalog, "p = 18")
    assert ["numpy text", "text"] == named(any_catalog, "p = '18'")
    assert [["numpy flag", "flag"]] * 3 == [named(any_catalog, query) for query in ("p", "p = True", "p = 'true'")]


# Errors


MISTAKES = [
    ("step < many", 7, "step is compared with a whole number such as 100, not with 'many'"),
    ("size > 1G", 7, "a size such as 1GB or 512 MiB"),
    ("size > 7d", 7, "a size such as 1GB"),
    ("duration > 1GB", 11, "a duration such as 90s"),
    ("age > 7", 6, "a duration such as 7d"),
    ("created > soon", 10, "a time such as 2026-01-31"),
    ("created > 2026-02-30", 10, "a time such as 2026-01-31"),
    ("created ~ 2026", 10, "~ looks into texts, and created is a time"),
    ("pinned = 1", 9, "true or false"),
    ("pinned < true", 9, "true or false"),
    ("tag < x", 6, "compare them by =, != or ~"),
    ("name < none", 7, "none is compared by = and != only"),
    ("loss ~ none", 7, "none is compared by = and != only"),
    ("name", 0, "'name' stands alone"),
    ("not loss", 4, "'loss' stands alone"),
    ("loss < 1 and step = x", 20, "a whole number"),
]


def test_a_value_of_the_wrong_type_is_an_error_that_points_at_it(any_catalog: Catalog) -> None:
    """However little was asked for."""
    several(any_catalog, {"metrics": {"loss": 0.5}})
    for query, position, problem in MISTAKES:
        for limit in (None, 0, 1):
            error = refused(any_catalog, query, limit=limit, sort="loss")
            assert position == error.position
            assert problem in str(error)
            assert f"  {' ' * position}^" == str(error).split("\n")[-1]


def test_the_error_is_one_that_callers_expect(catalog: Catalog) -> None:
    """A wrong value, and of this library."""
    error = refused(catalog, "loss <")

    assert isinstance(error, ValueError)
    assert isinstance(error, ExpstateError)
    assert 6 == error.position


@pytest.mark.parametrize(
    "options", [{"limit": -1}, {"limit": True}, {"limit": 1.5}, {"limit": "1"}, {"project": 5}, {"project": b"tests"}, {"project": ["*"]}]
)
def test_other_arguments_are_checked(catalog: Catalog, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InvalidArgumentError, match=name):
        catalog.search(**options)


# What is meant to do harm


HOSTILE = [
    'name = "x\'; DROP TABLE records; --"',
    "name ~ \"' OR '1'='1\"",
    "name = ''' OR 1=1 --'",
    '"name\' OR 1=1 --" = 1',
    'metric."x\'); DELETE FROM metrics; --" < 1',
    "name = x'; DROP TABLE records; --",
    "name = x; DROP TABLE records",
    "1 = 1",
    "1 = 1 OR 2 = 2",
    "__class__ = x",
    "name.__class__ = x",
    "records.id ~ a",
    "seq = 1",
    "ordered_at > 0",
    "metric.__class__.__mro__ = 1",
    "{{7*7}} = 49",
    "%s = 1",
    ":id = 1",
    "? = 1",
    "name = :id",
    "name = '%(id)s'",
    "name = (SELECT password FROM users)",
    "load_extension('x')",
    "/* name */ = 1",
    "name = x -- and",
    'tag = "x\' UNION SELECT 1 --"',
    'url = "file:///etc/passwd\' --"',
]


def test_no_query_is_more_than_a_question(any_catalog: Catalog) -> None:
    """It finds nothing or is an error that points at a place; the tables are what they were."""
    several(any_catalog, {"name": "a", "metrics": {"loss": 1}, "tags": ("x",)})
    before = {name: count(any_catalog, table) for name, table in schema.metadata.tables.items()}
    for query in HOSTILE:
        try:
            assert [] == named(any_catalog, query), query
        except InvalidQueryError as error:
            assert 0 <= (error.position or 0) <= len(query)

    assert before == {name: count(any_catalog, table) for name, table in schema.metadata.tables.items()}
    assert ["a"] == named(any_catalog, "loss = 1 and tag = x")


SORTS = [
    "1;--",
    "name; DROP TABLE records",
    "(SELECT 1)",
    "name desc",
    "loss, name",
    "__class__",
    "records.id",
    "seq",
    "1",
    "random()",
    "'x' --",
    "",
    " ",
]


def test_no_sort_is_more_than_a_name(any_catalog: Catalog) -> None:
    several(any_catalog, {"name": "a", "metrics": {"loss": 1}})

    for sort in SORTS:
        assert "the sort cannot be understood" in str(refused(any_catalog, sort=sort))
    assert ["a"] == named(any_catalog)


@pytest.mark.parametrize(("few", "window", "sort"), [(4000, 4096, None), (0, 2, "loss")])
def test_what_is_within_the_caps_is_answered(
    any_catalog: Catalog, few: int, window: int, sort: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The databases take the deepest and the longest query that the grammar takes, however it is run."""
    monkeypatch.setattr(plans, "FEW", few)
    monkeypatch.setattr(plans, "WINDOW", window)
    several(any_catalog, *({"name": "a", "metrics": {"loss": 1}, "params": {"lr": 2**70}} for _ in range(2)))
    leaf = f"param.lr != {-(2**70) - 1}"
    for shapes, expected in (
        (["not {}"], []),
        (["(tag = a or {})", "(name ~ a and {})"], ["a"]),
        (["({} or tag = a)", "not {}", "(name ~ a and {})"], []),
    ):
        query = leaf
        for level in range(MAX_DEPTH):
            query = shapes[level % len(shapes)].format(query)
        assert expected == named(any_catalog, query, sort=sort, limit=1)
        with pytest.raises(InvalidQueryError, match="nested"):
            any_catalog.search(f"not (tag = a or {query})")
    assert 2 == len(any_catalog.search(" or ".join(["lr > 0"] * 200), sort=sort))
    assert [] == named(any_catalog, f'name = "{"x" * (MAX_CHARACTERS - 9)}"', sort=sort)


@pytest.mark.parametrize(
    "query", ["(" * 2000, "not " * 900 + "pinned", "x" * (MAX_CHARACTERS + 1), " or ".join(["pinned"] * 201), "\0", "\ud800 = 1"]
)
def test_a_monstrous_query_is_an_error(catalog: Catalog, query: str) -> None:
    """In a catalog that is empty too."""
    assert len(str(refused(catalog, query))) < 1000


# Order


def test_the_newest_come_first(any_catalog: Catalog) -> None:
    several(any_catalog, {"name": "a"}, {"name": "b"}, {"name": "c", "created_at": NEW_YEAR - DAY})

    for query in (None, "", "  ", "step = none"):
        assert ["b", "a", "c"] == named(any_catalog, query)


@pytest.mark.parametrize("window", [4096, 2])
def test_missing_values_and_nan_come_last_in_both_directions(any_catalog: Catalog, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of equals first."""
    monkeypatch.setattr(plans, "WINDOW", window)
    values = {"nan": math.nan, "one": 1, "low": -math.inf, "high": 2**70, "one again": 1.0}
    several(any_catalog, {"name": "missing"}, *({"name": name, "metrics": {"loss": value}} for name, value in values.items()))
    up, down, last = ["low", "one again", "one", "high"], ["high", "one again", "one", "low"], ["nan", "missing"]

    for sort, expected in (("loss", up), ("loss:asc", up), ("loss:desc", down), ("metric.loss:DESC", down)):
        assert [*expected, *last] == named(any_catalog, sort=sort)
        for limit in (1, 2, 5):
            assert [*expected, *last][:limit] == named(any_catalog, sort=sort, limit=limit)


def test_records_are_sorted_by_fields_of_every_kind(any_catalog: Catalog) -> None:
    """Texts by their characters, on every database; what is missing last."""
    several(
        any_catalog,
        {"name": "b", "step": 3, "nbytes": 5, "tags": ("z", "b"), "params": {"p": "x"}, "pinned": True},
        {"name": "B", "step": -1, "nbytes": 9, "tags": ("a",), "params": {"p": 2}},
        {"name": "\u00e4", "nbytes": 7, "params": {"p": 10}},
        {"nbytes": 6},
    )

    for sort, expected in {
        "name": ["B", "b", "\u00e4", None],
        "name:desc": ["\u00e4", "b", "B", None],
        "step": ["B", "b", None, "\u00e4"],
        "size:desc": ["B", "\u00e4", None, "b"],
        "tag": ["B", "b", None, "\u00e4"],
        "p": ["B", "\u00e4", "b", None],
        "p:desc": ["\u00e4", "B", "b", None],
        "age": [None, "\u00e4", "B", "b"],
        "created": ["b", "B", "\u00e4", None],
        "pinned:desc": ["b", None, "\u00e4", "B"],
    }.items():
        assert expected == named(any_catalog, sort=sort), sort


def test_a_limit_is_the_most_that_is_found(any_catalog: Catalog) -> None:
    several(any_catalog, *({"name": name, "step": step} for step, name in enumerate("abcd")))

    assert [[], ["d"], ["d", "c", "b", "a"], ["d", "c", "b", "a"]] == [named(any_catalog, limit=limit) for limit in (0, 1, 4, 10**30)]
    assert ["b"] == named(any_catalog, "step < 2", limit=1)
    assert [0, 2] == [len(any_catalog.search(limit=limit)) for limit in (0, 2)]


# Projects


def test_a_search_is_of_one_project_unless_all_are_asked_for(any_catalog: Catalog) -> None:
    """The current one, another by its name, or all by a star."""
    several(
        any_catalog,
        {"name": "a", "metrics": {"loss": 1}},
        {"name": "b", "metrics": {"loss": 2}, "project": "host/team/other"},
        {"name": "c", "params": {"lr": 1}, "project": "100%"},
    )

    assert [["a"], ["b"], ["c"], []] == [named(any_catalog, project=project) for project in (None, "host/team/other", "100%", "100_")]
    assert ["c", "b", "a"] == named(any_catalog, project="*")
    assert ["b", "a"] == named(any_catalog, "loss > 0", project="*", sort="loss:desc")
    assert ["c"] == named(any_catalog, "project ~ 00% and lr = 1", project="*")
    with settings.override(project="host/team/other"):
        assert ["b"] == named(any_catalog)
    assert "'lr' is no field" in str(refused(any_catalog, "lr = 1"))


def test_iterating_a_catalog_is_a_search_of_everything(catalog: Catalog) -> None:
    several(catalog, {"name": "a"}, {"name": "b"}, {"name": "c", "project": "other"})

    assert (["b", "a"], 2) == ([record.name for record in catalog], len(catalog))


# As it was when it was searched


def test_a_search_does_not_see_what_comes_later(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what it reads later."""
    monkeypatch.setattr("expstate.catalog.query.finding.PAGE", 2)
    several(catalog, *({"name": name} for name in "abcd"))
    found = catalog.search()
    enter(catalog, name="e", created_at=NEW_YEAR + 9 * DAY)

    assert ["d", "c", "b", "a"] == [record.name for record in found]
    assert ["e", "d", "c", "b", "a"] == named(catalog)


def test_a_search_waits_for_nobody(catalog: Catalog, tmp_path: Path) -> None:
    """Someone who writes at the same time does not hold it up, and what is not committed is not seen."""
    several(catalog, {"name": "a"})
    other = Catalog(catalog.url)
    with other.database.writing() as connection:
        rows.put(connection, data(name="b"))
        assert ["a"] == named(catalog)
    other.close()

    assert {"a", "b"} == set(named(catalog))
