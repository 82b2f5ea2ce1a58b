"""Whatever bytes a reader is given, it gives a value or an error of ours, soon."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaign import Campaign
from tests.fuzz import planted
from tests.fuzz.mutator import mutated
from tests.fuzz.targets import READERS

PROJECT = Path(__file__).parent.parent.parent
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
MOST_SECONDS = 1.0
"""Of the processor's time, for one input."""


def _try(target: Callable[[bytes], object], data: bytes) -> None:
    began = time.process_time()
    try:
        target(data)
    except BaseException as error:
        msg = f"{type(error).__name__} for {data!r:.2000}"
        raise AssertionError(msg) from error
    assert time.process_time() - began < MOST_SECONDS, f"it took too long to read {data!r:.2000}"


def _try_all(inputs: list[bytes]) -> None:
    for data in inputs:
        _try(planted.read, data)


def _fuzz(name: str, seconds: float, folder: Path) -> tuple[int, str]:
    """Let the fuzzer look for so long; how it ended and what it said."""
    command = [sys.executable, "-m", "tests.fuzz.drive", name, str(round(seconds)), str(folder)]
    ran = subprocess.run(command, cwd=PROJECT, env={**os.environ, "EXPSTATE_CATALOG": "off"}, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.campaign("Safe to open", "random changes of what each reader gets")
@pytest.mark.parametrize("name", READERS)
def test_changed_bytes_end_in_our_errors(name: str, tmp_path: Path, campaign: Campaign) -> None:
    """Without regard to what code they reach; the first that each begins with is real, and is read."""
    target = READERS[name](tmp_path)
    target.read(target.seeds[0])
    source = random.Random(0 if os.environ.get("CI") else None)
    for _ in campaign.seconds(1, 60 if HAS_ATHERIS else 600):
        _try(target, mutated(source, target.seeds))
        campaign.tried()
    campaign.count("crashes or hangs", 0)


def test_a_mistake_is_found() -> None:
    """What these tests would see, if it were there."""
    source = random.Random(0)
    inputs = [mutated(source, planted.SEEDS) for _ in range(20_000)]
    with pytest.raises(AssertionError, match=r"KeyError for b'FUZ"):
        _try_all(inputs)


@pytest.mark.campaign("Safe to open", "coverage-guided fuzzing of each reader")
@pytest.mark.parametrize("name", READERS)
@pytest.mark.timeout(0)
def test_no_input_that_a_fuzzer_comes_to_breaks_a_reader(name: str, tmp_path: Path, campaign: Campaign) -> None:
    """It keeps the inputs that reach code which none before it has reached, and changes those."""
    if not campaign.is_long:
        pytest.skip("minutes: part of `make torture`")
    if not HAS_ATHERIS:
        campaign.note("not tried: atheris is not installed")
        return
    status, said = _fuzz(name, 600, tmp_path)

    assert status == 0, said[-6000:]
    campaign.tried(int(re.findall(r"stat::number_of_executed_units: (\d+)", said)[-1]))
    campaign.count("crashes or hangs", 0)


@pytest.mark.skipif(not HAS_ATHERIS, reason="atheris is not installed")
def test_the_fuzzer_finds_a_mistake(tmp_path: Path) -> None:
    """One that is behind three conditions; and it says so by its status, and leaves the input."""
    status, said = _fuzz("planted", 30, tmp_path)

    assert status != 0
    assert "KeyError" in said
    assert [b"FUZ"] == [path.read_bytes()[:3] for path in tmp_path.glob("crash-*")]
