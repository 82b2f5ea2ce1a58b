"""The campaign against what is promised: tests say which promise they attack and how, and count the points at which they did.

A test with the marker ``campaign(promise, means)`` gets the fixture ``campaign``. With the others it runs in a short form; ``make torture``
sets ``EXPSTATE_TORTURE``, which makes it long, and puts what the tests counted into the table of CONTRIBUTING.md. The results are kept, a
line for each test, so that the campaign can be run in parts: the newest result of a test counts.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

Item = TypeVar("Item")

IS_LONG = bool(os.environ.get("EXPSTATE_TORTURE"))
_RESULTS = os.environ.get("EXPSTATE_TORTURE_RESULTS")
_BEGIN, _END = "<!-- made by `make torture`, from here -->", "<!-- to here -->"


class Campaign:
    """What one test tries.

    Attributes
    ----------
    is_long : bool
        Whether this is the long form.
    points : int
        Points that were tried.
    counts : dict of str to int
        What was counted at them, such as snapshots that were lost.
    notes : list of str
        What could not be tried, and why.
    """

    def __init__(self) -> None:
        self.is_long = IS_LONG
        self.points = 0
        self.counts: dict[str, int] = {}
        self.notes: list[str] = []

    def choose(self, short: float, long: float) -> Any:
        """How much to do: so much in the short form, so much in the long one."""
        return long if self.is_long else short

    def some(self, items: Iterable[Item], short: int) -> list[Item]:
        """All points in the long form, else so many of them, from the first to the last."""
        found = list(items)
        if self.is_long or len(found) <= short:
            return found
        return [found[round(number * (len(found) - 1) / (short - 1))] for number in range(short)] if short > 1 else found[-1:]

    def each(self, items: Iterable[Item], short: int) -> Iterator[Item]:
        """The points of ``some``, each counted when it was tried."""
        for item in self.some(items, short):
            yield item
            self.tried()

    def tried(self, points: int = 1) -> None:
        """So many points were tried."""
        self.points += points

    def count(self, what: str, number: int = 1) -> None:
        """Something was seen at a point: shown in the table, also if it is 0."""
        self.counts[what] = self.counts.get(what, 0) + number

    def note(self, text: str) -> None:
        """Something could not be tried."""
        self.notes.append(text)

    def seconds(self, short: float, long: float) -> Iterator[float]:
        """The seconds gone by, until so many have: for what is tried as often as there is time."""
        started = time.monotonic()
        limit = self.choose(short, long)
        while (gone := time.monotonic() - started) < limit:
            yield gone


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Iterator[Campaign]:
    """What this test tries, for the report."""
    marker = request.node.get_closest_marker("campaign")
    assert marker is not None, "say what is attacked: @pytest.mark.campaign(promise, means)"
    promise, means = marker.args
    found = Campaign()
    started = time.monotonic()
    yield found
    report = getattr(request.node, "expstate_report", None)
    if report is None:  # it was interrupted
        return
    outcome = "held" if report.passed else "BROKEN"
    assert found.points or found.notes or outcome != "held", "a test of the campaign counts the points that it tries"
    if _RESULTS:
        record = {
            "test": request.node.nodeid,
            "date": time.strftime("%Y-%m-%d"),
            "machine": _machine(),
            "promise": promise,
            "means": means,
            "points": found.points,
            "counts": found.counts,
            "notes": found.notes,
            "outcome": outcome,
            "seconds": round(time.monotonic() - started, 1),
        }
        with Path(_RESULTS).open("a", encoding="utf-8") as file:  # processes of pytest-xdist share it; a line is written at once
            file.write(json.dumps(record) + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep how the test itself ended, for its fixture."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call":
        item.expstate_report = report  # type: ignore[attr-defined]


# The table


def table(records: Sequence[dict[str, Any]]) -> str:
    """Promises, how each was attacked, and what came of it: one row for all tests that attack one promise by the same means."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        row = rows.setdefault((record["promise"], record["means"]), {"points": 0, "counts": {}, "notes": [], "broken": 0, "tests": 0})
        row["points"] += record["points"]
        row["tests"] += 1
        row["broken"] += record["outcome"] != "held"
        row["notes"] += [note for note in record["notes"] if note not in row["notes"]]
        for what, number in record["counts"].items():
            row["counts"][what] = row["counts"].get(what, 0) + number
    lines = ["| promise | attacked by | points tried | result |", "| --- | --- | --- | --- |"]
    for (promise, means), row in sorted(rows.items()):
        seen = [f"{number:,} {what}" for what, number in row["counts"].items()]
        result = f"BROKEN in {row['broken']} of {row['tests']} tests" if row["broken"] else "held" if row["points"] else "not tried"
        lines.append(f"| {promise} | {means} | {row['points']:,} | {'; '.join([result, *seen, *row['notes']])} |")
    return "\n".join(lines)


def put_into(text: str, made: str, said: str) -> str:
    """A document with the table in its place, below a line that says where it is from."""
    place = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    assert place.search(text), f"the document has no place for the table: {_BEGIN}"
    return place.sub(lambda _: f"{_BEGIN}\n\n{said}\n\n{made}\n\n{_END}", text)


def newest(records: Iterable[dict[str, Any]], tests: Iterable[str]) -> list[dict[str, Any]]:
    """The last result of each of the tests."""
    last = {record["test"]: record for record in records}
    return [last[test] for test in tests if test in last]


def said_of(records: Sequence[dict[str, Any]], tests: Sequence[str]) -> str:
    """When, where and how much was tried: the line above the table."""
    days = sorted(record["date"] for record in records)
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    machines = " and ".join(sorted({record["machine"] for record in records}))
    points = sum(record["points"] for record in records)
    minutes = sum(record["seconds"] for record in records) / 60
    return f"{when}, {machines}: {len(records):,} of {len(tests):,} tests, {points:,} points, {minutes:,.0f} minutes of tests."


def _machine() -> str:
    import torch

    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__.partition('+')[0]}"
    return f"{versions}, Linux {platform.release().partition('-')[0]}, {os.cpu_count()} processors"


def main(arguments: Sequence[str]) -> None:
    """``python -m tests.campaign RESULTS DOCUMENT``: put the table into a document.

    What is on the standard input names the tests that there are; older results, and those of other tests, are dropped from the file.
    """
    results, document = map(Path, arguments)
    tests = [line for line in sys.stdin.read().splitlines() if "::" in line]
    records = newest(map(json.loads, results.read_text(encoding="utf-8").splitlines()), tests)
    results.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    document.write_text(put_into(document.read_text(encoding="utf-8"), table(records), said_of(records, tests)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
