"""The report of the campaign: what was tried is counted, what broke is said, and a test that tries nothing is no proof."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import campaign as campaigns
from tests.campaign import Campaign

CONFTEST = "from tests.campaign import campaign, pytest_runtest_makereport\n"
TESTS = """
import pytest

@pytest.mark.campaign("stands", "pushing")
@pytest.mark.parametrize("number", [1, 2])
def test_held(campaign, number):
    for point in campaign.each(range(10), short=3):
        campaign.count("fallen", 0)

@pytest.mark.campaign("stands", "kicking")
def test_broken(campaign):
    campaign.tried(5)
    campaign.count("fallen")
    assert False

@pytest.mark.campaign("floats", "drowning")
def test_not_tried(campaign):
    campaign.note("there is no water here")

@pytest.mark.campaign("flies", "nothing")
def test_of_nothing(campaign):
    pass
"""


def run(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, object]]]:
    """Run the tests above in a process of their own."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS)
    report = folder / "report"
    report.touch()
    environment = os.environ | {"EXPSTATE_TORTURE_RESULTS": str(report), "PYTHONPATH": str(Path.cwd())} | environment
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", "-W", "ignore", str(folder / "test_it.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    return ended, [json.loads(line) for line in report.read_text().splitlines()]


@pytest.mark.parametrize(("environment", "points"), [({}, 6), ({"EXPSTATE_TORTURE": "1"}, 20)])
def test_what_is_tried_is_in_the_table(tmp_path: Path, environment: dict[str, str], points: int) -> None:
    """In the short form and in the long one; an error at the end of the one that tried nothing."""
    ended, records = run(tmp_path, **environment)
    assert "3 passed" not in ended.stdout
    assert "counts the points that it tries" in ended.stdout
    made = campaigns.table(records)
    assert f"| stands | pushing | {points} | held; 0 fallen |" in made
    assert "| stands | kicking | 5 | BROKEN in 1 of 1 tests; 1 fallen |" in made
    assert "| floats | drowning | 0 | not tried; there is no water here |" in made
    assert "flies" not in made


def test_the_table_takes_the_place_of_the_last_one() -> None:
    text = f"before\n{campaigns._BEGIN}\nold\n{campaigns._END}\nafter\n"
    once = campaigns.put_into(text, "| new |", "said")
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert once == campaigns.put_into(once, "| new |", "said")


def test_the_newest_result_of_each_test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the campaign was run in parts, and what tests are no more is left out."""
    report, document = tmp_path / "report", tmp_path / "document.md"
    document.write_text(f"{campaigns._BEGIN}\n{campaigns._END}\n")
    one = {
        "test": "t.py::one",
        "date": "2026-01-01",
        "machine": "Python 3",
        "promise": "stands",
        "means": "pushing",
        "points": 1,
        "outcome": "BROKEN",
    }
    one |= {"counts": {}, "notes": [], "seconds": 60}
    mended = one | {"date": "2026-01-03", "points": 4, "outcome": "held"}
    gone = one | {"test": "t.py::gone"}
    report.write_text("".join(json.dumps(record) + "\n" for record in (one, gone, mended)))
    monkeypatch.setattr("sys.stdin", io.StringIO("t.py::one\nt.py::another\n\n2 tests collected\n"))
    campaigns.main([str(report), str(document)])
    text = document.read_text()
    assert "| stands | pushing | 4 | held |" in text
    assert "\n2026-01-03, Python 3: 1 of 2 tests, 4 points, 1 minutes of tests.\n" in text
    assert [mended] == [json.loads(line) for line in report.read_text().splitlines()]


def test_some_points_go_from_the_first_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaigns, "IS_LONG", False)
    assert [0, 50, 99] == Campaign().some(range(100), 3)
    assert [99] == Campaign().some(range(100), 1)
    assert [0, 1] == Campaign().some(range(2), 3)
    monkeypatch.setattr(campaigns, "IS_LONG", True)
    assert list(range(100)) == Campaign().some(range(100), 3)
