"""The Pythons and PyTorches that are promised: the long form of the campaign runs the fast tests with each of them.

Interpreters are looked for in ``PYTHONS``, paths of them separated as those in PATH, and on PATH by names such as ``python3.12``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expstate import Snapshot, StateDict
from tests.campaign import IS_LONG, Campaign

PROJECT = Path(__file__).parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TORCHES = ["2.6.0", "newest"]
NO_SUCH_TORCH = 3
HERE = ".".join(map(str, sys.version_info[:2]))
POINTS = list(zip(PYTHONS, TORCHES * 2, strict=True)) if IS_LONG else [(HERE, torch.__version__)]
"""Each Python with one PyTorch, each PyTorch with two Pythons: the oldest of both, and the newest of both."""


def interpreter(version: str) -> str | None:
    """A Python of this version that runs; what is found on PATH may be a stand-in that does not."""
    listed = [path for path in os.environ.get("PYTHONS", "").split(os.pathsep) if path]
    found = [path for path in [*listed, shutil.which(f"python{version}")] if path]
    if version == HERE:
        found.append(getattr(sys, "_base_executable", sys.executable))
    for path in found:
        said = subprocess.run(
            [path, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True, check=False
        )
        if said.stdout.strip() == version:
            return path
    return None


def test_the_matrix_is_what_is_promised() -> None:
    """The Pythons are those that the package says it is for, and the first PyTorch is the oldest that it takes."""
    said = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")

    assert re.findall(r"Python :: (3\.\d+)", said) == PYTHONS
    assert f'requires-python = ">={PYTHONS[0]}"' in said
    assert f'"torch>={TORCHES[0].removesuffix(".0")}"' in said


@pytest.mark.campaign("Kept as it is", "Pythons 3.10 to 3.13, torch 2.6 and the newest")
@pytest.mark.parametrize(("python", "version"), POINTS)
def test_the_fast_tests_pass(python: str, version: str, tmp_path: Path, campaign: Campaign) -> None:
    """With the newest of whatever else is installed; the short form is the environment that all tests run in."""
    if not campaign.is_long:
        Snapshot.take(tmp_path / "a", {"state": StateDict(x=torch.ones(3))})
        assert torch.equal(torch.ones(3), Snapshot(tmp_path / "a").read_object("state/x"))
        campaign.tried()
        return
    program = interpreter(python)
    if program is None:
        campaign.note(f"there is no Python {python} here")
        return
    ended = subprocess.run([PROJECT / ".ci" / "matrix", program, version], capture_output=True, text=True, check=False)
    if ended.returncode == NO_SUCH_TORCH:
        campaign.note(f"there is no torch {version} for Python {python}")
        return
    assert ended.returncode == 0, f"{ended.stdout[-20_000:]}\n{ended.stderr[-2_000:]}"
    campaign.tried()
    for number, what in re.findall(r"(\d+) (passed|skipped)", ended.stdout.splitlines()[-1]):
        campaign.count(f"tests {what}", int(number))
