"""A real snapshot of everything that a manifest can hold, and a copy of it for every test that wants to break one."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
import zoneinfo
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from expstate import Snapshot, StateDict
from expstate.engine import lease
from expstate.errors import ExpstateError, PickleNotAllowedError
from expstate.format import manifest as manifests

if TYPE_CHECKING:
    from tests.format.forging import Forged

pytest.register_assert_rewrite("tests.format.forging")


@pytest.fixture(scope="session")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a snapshot that no test changes."""
    from tests.format.forging import app_state, take

    folder = tmp_path_factory.mktemp("genuine") / "snapshot"
    take(folder, app_state() | {"call": StateDict(call=partial(print, "called"))})
    return folder


@pytest.fixture
def forged(genuine: Path, tmp_path: Path) -> Forged:
    """A copy of it to edit, in a folder with nothing else; files are links, to be replaced and not written to."""
    from tests.format.forging import Forged

    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in genuine.iterdir():
        os.link(path, folder / path.name)
    return Forged(folder)


@pytest.fixture(scope="session")
def imported(genuine: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported, or compiled, when it is first needed has been by then; a guard would take it for the snapshot's doing."""
    from tests.format.forging import ACTIONS, archive

    copies = tmp_path_factory.mktemp("copies")
    for name, action in ACTIONS.items():
        action(Snapshot(genuine), copies / name)
    msgspec.json.decode(b"{}", type=manifests._Features)
    lease.decode_lease(b"{}")
    with contextlib.suppress(zoneinfo.ZoneInfoNotFoundError):
        zoneinfo.ZoneInfo("No/Such_Zone")
    zipfile.ZipFile(io.BytesIO(archive(b""))).close()
    with pytest.raises(ExpstateError, match="did you mean"):
        Snapshot(genuine).read_object("model/first.weigth")
    with pytest.raises(PickleNotAllowedError):
        Snapshot(genuine).read_object("call/call")
