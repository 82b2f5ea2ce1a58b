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


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.fixture(scope="module")
def modules_of_torch() -> set[str]:
    return modules_after("import torch")


def test_import_brings_in_nothing_heavy_or_optional(modules_of_torch: set[str]) -> None:
    brought = modules_after("import torch, expstate") - modules_of_torch

    assert "expstate.snapshot" in brought
    assert [] == [name for name in NOT_AT_IMPORT if name in brought]


def test_import_brings_in_numpy_only_where_torch_does(modules_of_torch: set[str]) -> None:
    brought = modules_after("import torch, expstate") - modules_of_torch

    assert [] == sorted(name for name in brought if name.partition(".")[0] == "numpy")


def test_import_check_notices_what_it_looks_for(modules_of_torch: set[str]) -> None:
    brought = modules_after("import torch, expstate, pandas") - modules_of_torch

    assert "pandas" in brought


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
