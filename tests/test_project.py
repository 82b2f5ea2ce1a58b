"""The package as it is installed: typed, light to import, complete, and described truthfully by its own files."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import expstate

PROJECT = Path(__file__).parent.parent
PACKAGE = Path(expstate.__file__).parent
# What the library may meet, but never brings in by itself. torch.distributed.tensor alone costs a second.
NOT_AT_IMPORT = ["IPython", "gcsfs", "ipywidgets", "pandas", "s3fs", "safetensors", "sqlalchemy", "torch.distributed.tensor"]


@pytest.fixture(scope="module")
def brought() -> dict[str, set[str]]:
    """The modules that each import brings into a process, one after the other."""
    code = """
import sys
def imported():
    return set(sys.modules)
def show(name, before):
    print(name, *(imported() - before))
import torch
before = imported()
import expstate
show("expstate", before)
import pandas
show("pandas", before)
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return {name: set(modules) for name, *modules in map(str.split, shown.splitlines())}


def test_import_brings_in_nothing_heavy_or_optional(brought: dict[str, set[str]]) -> None:
    assert "expstate.snapshot" in brought["expstate"]
    assert [] == [name for name in NOT_AT_IMPORT if name in brought["expstate"]]


def test_import_brings_in_numpy_only_where_torch_does(brought: dict[str, set[str]]) -> None:
    assert [] == sorted(name for name in brought["expstate"] if name.partition(".")[0] == "numpy")


def test_import_check_notices_what_it_looks_for(brought: dict[str, set[str]]) -> None:
    assert "pandas" in brought["pandas"]


def test_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_every_public_name_is_there_once_and_documented() -> None:
    names = list(expstate.__all__)

    assert sorted(set(names)) == sorted(names)
    assert [] == [name for name in names if not (getattr(expstate, name).__doc__ or "").strip()]


def test_version_is_the_one_of_the_distribution() -> None:
    assert importlib.metadata.version("expstate") == expstate.__version__


def test_every_development_tool_is_pinned() -> None:
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==[0-9][0-9A-Za-z.]*$", (PROJECT / ".ci/constraints.txt").read_text(), flags=re.MULTILINE)
    needed = [re.match(r"[A-Za-z0-9_.-]+", line) for line in importlib.metadata.requires("expstate") or []]

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    names = {normal(match[0]) for match in needed if match}
    assert "pytest" in names
    assert set() == names - {normal(name) for name in pinned} - {"expstate"}


def test_every_module_says_what_lives_there() -> None:
    silent = [str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if not file.read_text().lstrip().startswith('"""')]

    assert [] == silent


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_name_only_targets_and_files_that_exist(document: str) -> None:
    text = (PROJECT / document).read_text()
    targets = set(re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), flags=re.MULTILINE))
    links = re.findall(r"\]\((?!http|#)([^)#]+)", text)

    assert set() == set(re.findall(r"`make ([a-z]+)", text)) - targets
    assert [] == [link for link in links if not (PROJECT / link).exists()]
