"""The demo does what it says, and would say so if it did not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parent.parent / "notebooks" / "demo.py"


def run(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, check=False)


def altered(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """A shorter demo with some of its text replaced."""
    text = DEMO.read_text()
    for old, new in [("EPOCHS = 12", "EPOCHS = 4"), ("KILLED_AT = 7", "KILLED_AT = 3"), *changes]:
        assert text.count(old) == 1
        text = text.replace(old, new)
    script = tmp_path / "demo.py"
    script.write_text(text)
    return script


def test_killed_run_ends_like_one_without_a_break_also_over_an_earlier_one(tmp_path: Path) -> None:
    stale = tmp_path / "demo-run" / "broken" / "epoch-12" / "snapshot.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    (tmp_path / "demo-run" / "made-by-expstate-demo").touch()

    done = run(DEMO, tmp_path)

    assert (0, "") == (done.returncode, done.stderr)
    assert "snapshots before it: 6, damaged: 0" in done.stdout
    assert "resumed from epoch-06" in done.stdout
    assert 5 == done.stdout.count("the same\n")


def test_forgetting_the_random_generators_is_noticed(tmp_path: Path) -> None:
    done = run(altered(tmp_path, ('            "rng": RNGState(),\n', "")), tmp_path)

    assert 1 == done.returncode
    assert "the resumed run did not end with the same model" in done.stderr


def test_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo-run").mkdir()
    theirs = tmp_path / "demo-run" / "thesis.txt"
    theirs.write_text("years of work")

    done = run(DEMO, tmp_path)

    assert 1 == done.returncode
    assert "move it away" in done.stderr
    assert "years of work" == theirs.read_text()
