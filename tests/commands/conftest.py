"""Help for the tests of commands: small projects with a few snapshots, and commands run in this process."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.cli import main
from expstate.engine import ancestry

EPOCHS = ((0.9, 0.5), (0.31234567891, 0.8), (0.1, 0.95), (0.2, 0.93))


@dataclass
class Project:
    """A folder with a catalog and snapshots ``epoch-1`` to ``epoch-4``; 1 is ``first`` and broken, 3 is ``best``."""

    folder: Path

    @property
    def url(self) -> str:
        return str(self.folder / "catalog.db")

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.url)

    def path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch}"


def make_project(folder: Path) -> Project:
    folder.mkdir(exist_ok=True)
    ancestry.forget()  # what other tests took is not where this comes from
    project = Project(folder)
    catalog = project.catalog
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    progress = StateDict(epoch=0)
    for epoch, (loss, accuracy) in enumerate(EPOCHS, 1):
        with torch.no_grad():
            model[2].weight += 0.1
        progress["epoch"] = epoch
        Snapshot.take(
            project.path(epoch),
            {"model": model, "progress": progress},
            name=f"epoch-{epoch}",
            step=epoch,
            params={"lr": 1e-3, "optimizer": "adam"},
            metrics={"loss": loss, "accuracy": accuracy},
            tags=["broken"] if epoch == 1 else [],
            catalog=catalog,
        )
    catalog.alias("epoch-1", "first")
    catalog.alias("epoch-3", "best")
    catalog.close()
    return project


def enter(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in the project's folder, with its catalog."""
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("EXPSTATE_CATALOG", project.url)
    monkeypatch.setenv("EXPSTATE_PROJECT", "digits")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project that the test may change."""
    monkeypatch.setenv("EXPSTATE_PROJECT", "digits")
    made = make_project(tmp_path / "project")
    enter(made, monkeypatch)
    return made


@pytest.fixture(scope="session")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Project:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPSTATE_PROJECT", "digits")
        return make_project(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def kept(_kept: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project that the test only reads."""
    enter(_kept, monkeypatch)
    return _kept


@dataclass
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command, given as one line without ``expstate``."""

    def run(line: str) -> Done:
        capsys.readouterr()
        status = main(shlex.split(line))
        return Done(status, *capsys.readouterr())

    return run
