"""What the grammar of queries and sorts takes, and where its errors point."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate.catalog.query import literal
from expstate.catalog.query.parse import MAX_CHARACTERS, MAX_DEPTH, parse, parse_sort
from expstate.catalog.query.tree import And, Comparison, Name, Not, Or, comparisons
from expstate.errors import InvalidQueryError

from .made import DAY


def _said(node):
    """A tree as a nested text, without positions."""
    if isinstance(node, Comparison):
        name = f"{node.name.kind}.{node.name.text}" if node.name.kind else node.name.text
        return name if node.value is None else f"{name} {node.op} {node.value.raw}"
    if isinstance(node, Not):
        return ["not", _said(node.operand)]
    return ["and" if isinstance(node, And) else "or", *map(_said, node.operands)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'loss < 0.2 and (tag = ablation or not pinned) and size > 1GB and age < 7d and name ~ "resnet"',
            ["and", "loss < 0.2", ["or", "tag = ablation", ["not", "pinned"]], "size > 1GB", "age < 7d", "name ~ resnet"],
        ),
        ("a=1 or b=2 and c=3", ["or", "a = 1", ["and", "b = 2", "c = 3"]]),
        ("not a=1 and b=2", ["and", ["not", "a = 1"], "b = 2"]),
        ("NOT(a==1)OR b!=2", ["or", ["not", "a = 1"], "b != 2"]),
        ("metric.loss<=-1e-3", "metric.loss <= -1e-3"),
        ('metric."val loss" >= +inf', "metric.val loss >= +inf"),
        ("param.'a.b' = 'it\\'s'", "param.a.b = it's"),
        ('"not" = "and"', "not = and"),
        ("val/loss < 1 and android = 1", ["and", "val/loss < 1", "android = 1"]),
        ("size > 1.5 GiB and age < 7 days", ["and", "size > 1.5 GiB", "age < 7 days"]),
        ("url ~ s3://bucket/run-7", "url ~ s3://bucket/run-7"),
        ("created\n>\t2026-01-01T12:00:00+02:00", "created > 2026-01-01T12:00:00+02:00"),
        ("x = größe", "x = größe"),
        ("metrics = 1", "metrics = 1"),
        ("metric.a.b = 1", "metric.a.b = 1"),
    ],
)
def test_a_query_says_what_is_written(text, expected):
    assert expected == _said(parse(text))


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("", 0, "expected a field"),
        ("loss <", 6, "expected a value"),
        ("loss < and x = 1", 7, "expected a value"),
        ("loss < 0.2 x = 1", 11, "expected and, or, or the end"),
        ("(loss < 1", 9, "or )"),
        ("loss < 1)", 8, "no ( belongs to this )"),
        ("()", 1, "expected a field"),
        ("a & b", 2, "expected a comparison"),
        ("a < 1; DROP TABLE records", 5, "expected and, or, or the end"),
        ('name ~ "resnet', 7, "this quote is not closed"),
        ("a <> 3", 3, "expected a value"),
        ("a = 1 = 2", 6, "expected and, or, or the end"),
        ("not", 3, "expected a field"),
        ("a = 1 and", 9, "expected a field"),
        ("name = 'a\0b'", 9, "a character that no text"),
        ("name = '\ud800'", 8, "a character that no text"),
    ],
)
def test_an_error_points_at_the_place(text, position, problem):
    with pytest.raises(InvalidQueryError, match="the query cannot be understood") as caught:
        parse(text)
    assert position == caught.value.position
    first, line, caret = str(caught.value).split("\n")
    assert problem in first
    assert f"at character {position + 1}:" in first
    if "\0" not in text and "\ud800" not in text:
        assert (f"  {text}", f"  {' ' * position}^") == (line, caret)


def test_the_place_is_shown_in_a_long_query_and_under_what_a_terminal_prints():
    text = f"name ~ '\x1b[31m' and {' and '.join(['loss < 1'] * 50)} and & and {' and '.join(['loss < 1'] * 50)}"
    with pytest.raises(InvalidQueryError) as caught:
        parse(text)
    _, line, caret = str(caught.value).split("\n")
    assert "&" == line[len(caret) - 1]
    assert len(line) < 150
    with pytest.raises(InvalidQueryError) as caught:
        parse("name ~ '\x1b[31m' & x")
    _, line, caret = str(caught.value).split("\n")
    assert ("&", True) == (line[len(caret) - 1], "\x1b" not in str(caught.value))


@pytest.mark.parametrize(
    "text",
    ["(" * 100_000, "(" * 1500, "not " * 900 + "a = 1", "(a=1 and (b=1 or " * 100 + "c=1" + "))" * 100, " and ".join(["a=1"] * 201)],
    ids=["long", "open", "nots", "nested", "many"],
)
def test_a_monstrous_query_is_an_error_and_nothing_worse(text):
    with pytest.raises(InvalidQueryError):
        parse(text)


def test_what_is_within_the_caps_is_parsed():
    assert 200 == len(list(comparisons(parse(" and ".join(["a=1"] * 200)))))
    assert "a = 1" == _said(parse("(" * 1900 + "a = 1" + ")" * 1900))
    assert Not is type(parse("not " * MAX_DEPTH + "a = 1"))
    assert MAX_CHARACTERS == len(parse("x = " + "9" * (MAX_CHARACTERS - 4)).value.raw) + 4


@given(st.text(alphabet=st.sampled_from("ab 1.<>=!~()'\"\\andotr-/é\n,"), max_size=40))
def test_any_text_is_a_query_or_an_error_with_a_place_in_it(text):
    try:
        parse(text)
    except InvalidQueryError as error:
        assert error.position is not None
        assert 0 <= error.position <= len(text)


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
def test_any_text_can_be_a_value_in_either_quotes(text):
    for quote in "'\"":
        escaped = text.replace("\\", "\\\\").replace(quote, f"\\{quote}")
        node = parse(f"metric.{quote}{escaped}{quote} = {quote}{escaped}{quote}")
        assert (Name(text, "metric", 0), text, True) == (node.name, node.value.raw, node.value.quoted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss", (Name("loss", "", 0), False)),
        ("loss:asc", (Name("loss", "", 0), False)),
        ("param.lr:DESC", (Name("lr", "param", 0), True)),
        ("'a b':desc", (Name("a b", "", 0), True)),
        ("a:b", (Name("a:b", "", 0), False)),
    ],
)
def test_a_sort_is_a_name_and_a_direction(text, expected):
    sort = parse_sort(text)
    assert expected == (sort.name, sort.descending)


@pytest.mark.parametrize(("text", "position"), [("", 0), (":desc", 0), ("a b", 2), ("loss < 1", 5), ("1;--", 1), ("not", 0)])
def test_an_error_in_a_sort_points_at_the_place(text, position):
    with pytest.raises(InvalidQueryError, match="the sort cannot be understood") as caught:
        parse_sort(text)
    assert position == caught.value.position


@pytest.mark.parametrize("what", [7, b"loss < 1", ["loss < 1"]])
def test_what_is_no_text_is_no_query(what):
    for read in (parse, parse_sort):
        with pytest.raises(InvalidQueryError, match="is a text, got"):
            read(what)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("1B", 1),
        ("1kb", 1000),
        ("1.5 GiB", 3 * 2**29),
        (".5MB", 500_000),
        ("1PiB", 2**50),
        ("0.1B", 0.1),
        ("-1GB", -(10**9)),
        ("1G", None),
        ("GB", None),
        ("1e3GB", None),
    ],
)
def test_sizes(raw, expected):
    assert expected == literal.size(raw)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [("90s", 90), ("2m", 120), ("2min", 120), ("1.5h", 5400), ("7d", 604_800), ("2 weeks", 1_209_600), ("1 day", 86_400), ("7M", None)],
)
def test_durations(raw, expected):
    assert expected == literal.duration(raw)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("1970-01-02", (DAY, 2 * DAY)),
        ("1970-01-01T00:01", (60_000_000, 120_000_000)),
        ("1970-01-01 00:00:01", (1_000_000, 2_000_000)),
        ("1970-01-01T00:00:00.25Z", (250_000, 250_001)),
        ("1970-01-01T02:00:00+02:00", (0, 1_000_000)),
        ("1969-12-31T23:00:00-0100", (0, 1_000_000)),
        ("9999-12-31", (253_402_214_400_000_000, 253_402_300_800_000_000)),
        ("today", (5 * DAY, 6 * DAY)),
        ("Yesterday", (4 * DAY, 5 * DAY)),
        ("1970-13-01", None),
        ("1970-01-01T24:00", None),
        ("1970-01-01T00:00+99:00", None),
        ("0000-01-01", None),
        ("1970-1-1", None),
    ],
)
def test_times_are_spans_in_utc(raw, expected):
    assert expected == literal.span(raw, 5 * DAY + 12345)


def test_numbers_keep_their_size_and_kind():
    read = [literal.number(raw) for raw in ("007", "-9007199254740993", "1e3", "1.", "+.5", "-Inf", "1e999", "1_000", "0x10", "1a", "")]
    assert [7, -9007199254740993, 1000.0, 1.0, 0.5, -float("inf"), float("inf"), None, None, None, None] == read
    assert [int, int, float] == [type(number) for number in read[:3]]


def test_a_tree_with_or_has_its_operands():
    assert isinstance(parse("a=1 or b=1"), Or)
