"""Nothing is imported before it is needed, and where the catalog's packages are missing, all that does without them works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("alembic", "lark", "numpy", "pandas", "platformdirs", "psycopg", "rich", "sqlalchemy", "tqdm")
MISSING = ("alembic", "lark", "pandas", "platformdirs", "psycopg", "rich", "safetensors", "sqlalchemy", "tqdm")
BLOCK = f"import sys\nfor name in {MISSING}: sys.modules[name] = None\n"


def python(code: str, folder: Path, catalog: str = "") -> subprocess.CompletedProcess[str]:
    """Run code in a process whose home is a folder of the test."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2]), "EXPSTATE_CATALOG": catalog}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", ["import torch, expstate.cli, expstate.commands; expstate.commands.build_parser()"])
def test_the_parser_needs_no_package_of_the_catalog(tmp_path: Path, code: str) -> None:
    brought = python(f"import sys, torch; before = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))", tmp_path)

    assert "" == brought.stderr
    assert "expstate.bench.options" in brought.stdout.split()
    assert [] == [name for name in brought.stdout.split() if name.partition(".")[0] in PACKAGES]


def test_take_and_restore_work_without_the_packages_and_warn_once(tmp_path: Path) -> None:
    code = f"""{BLOCK}
import torch, expstate
model = torch.nn.Linear(2, 1)
for step in (1, 2):
    expstate.Snapshot.take(f"step-{{step}}", {{"model": model}}, step=step)
expstate.Snapshot("step-1").restore({{"model": model}})
print(expstate.Snapshot("step-2").verify().ok)
"""
    done = python(code, tmp_path, str(tmp_path / "catalog.db"))

    assert (0, "True\n") == (done.returncode, done.stdout)
    assert 1 == done.stderr.count("CatalogWarning:")


def test_the_catalog_without_its_packages_is_one_clear_error(tmp_path: Path) -> None:
    lines = ["list", "show best", "tag best x", "prune --keep-last 1", "scan .", "check", "list --json"]
    code = f"{BLOCK}\nfrom expstate.cli import main\nfor line in {lines}: assert main(line.split()) == 1, line"
    done = python(code, tmp_path, str(tmp_path / "catalog.db"))

    assert 0 == done.returncode, done.stderr
    errors = done.stderr.splitlines()
    assert len(lines) == len(errors)
    assert all(error.startswith("expstate: error: ") and "sqlalchemy" in error.lower() for error in errors)


def test_help_bench_and_paths_do_without_the_packages(tmp_path: Path) -> None:
    code = f"""{BLOCK}
import os
from expstate import Snapshot, StateDict
from expstate.cli import main
Snapshot.take("here", {{"progress": StateDict(epoch=3)}}, catalog=False)
assert main([]) == 0
for line in ("verify here", "read here progress/epoch", "show here", "show here progress/*", "diff here here", "copy here there", "gc ."):
    assert main(line.split()) == 0, line
os.mkdir("disk")
words = "bench disk --gib 0.01 --repeat 1 --systems limit --operations read_one"
assert main(words.split()) == 0
try:
    main(["bench", "--help"])
except SystemExit as error:
    sys.exit(error.code)
"""
    done = python(code, tmp_path)

    assert 0 == done.returncode, done.stderr
    assert "read_one 1/1" in done.stderr
    assert "usage: expstate bench" in done.stdout
    assert "epoch" in done.stdout
