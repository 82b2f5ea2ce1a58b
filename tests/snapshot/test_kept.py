"""Snapshots of the first format in its other forms are read by every later version, and gone on from; ``test_compat`` has the plain one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.engine import inplace
from expstate.engine.unchanged import LiveBox
from tests.campaign import Campaign
from tests.state.conftest import assert_same

from .conftest import KEPT
from .data import make_incremental


@pytest.fixture(params=make_incremental.FOLDERS, ids=[folder.name for folder in make_incremental.FOLDERS])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Snapshot:
    """A copy of a committed snapshot."""
    return Snapshot(shutil.copytree(request.param, tmp_path / request.param.name))


@pytest.fixture(params=[False, True], ids=["host", "device"])
def is_on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What is live is compared as if it lay on the host, and on an accelerator."""
    monkeypatch.setattr(LiveBox, "is_on_device", property(lambda _: request.param))
    found: bool = request.param
    return found


def other_state() -> dict[str, StateDict]:
    """Of the same shapes, with other values."""
    state = make_incremental.state()
    return {key: StateDict({name: value * 0 for name, value in values.items()}) for key, values in state.items()}


def written(snapshot: Snapshot) -> set[str]:
    """Data files beside the manifest, by their keys."""
    return {record.name.partition("-")[0] for record in snapshot.manifest.files if not record.name.startswith("base/")}


def test_each_is_of_its_form() -> None:
    """So that the others are of what they say."""
    incremental, shared, fingerprints = (Snapshot(folder) for folder in make_incremental.FOLDERS)
    manifests = [snapshot.manifest for snapshot in (incremental, shared, fingerprints)]

    assert [1, 1, 1] == [manifest.format for manifest in manifests]
    assert [(), ("shared_boxes",), ()] == [manifest.requires for manifest in manifests]
    assert [False, False, True] == [manifest.fingerprint_key is not None for manifest in manifests]
    assert {"model", "progress"} == written(incremental)
    assert {"average", "model"} == {path.name.partition("-")[0] for path in (make_incremental.INCREMENTAL / "base").iterdir()}
    for folder in make_incremental.FOLDERS:
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 50_000


@KEPT
def test_it_is_verified_and_comes_back(kept: Snapshot, campaign: Campaign) -> None:
    """All of it: read anew, and into live tensors."""
    live, expected = other_state(), make_incremental.state()
    tensor = live["model"]["embedding"]
    kept.restore(live)

    assert kept.verify().ok
    assert tuple(expected) == kept.keys()
    assert_same(expected, {key: dict(state) for key, state in live.items()})
    assert_same(expected, {key: kept.get_state_dict_for_key(key) for key in kept.keys()})
    assert tensor is live["model"]["embedding"]
    campaign.tried()


@KEPT
def test_equal_is_not_tied(kept: Snapshot, campaign: Campaign) -> None:
    """Entries at one place come back as tensors of their own."""
    found = {key: kept.get_state_dict_for_key(key) for key in kept.keys()}
    found["model"]["embedding"].zero_()

    assert_same(make_incremental.state()["average"], found["average"])
    campaign.tried()


@KEPT
def test_it_is_a_base(kept: Snapshot, tmp_path: Path, is_on_device: bool, campaign: Campaign) -> None:
    """Of what has not changed since nothing is written, and what is taken stands without it."""
    state: dict[str, Any] = make_incremental.app_state(3)
    second = Snapshot.take(tmp_path / "second", state, base=kept, dedup=False)
    shutil.rmtree(kept.path)

    opened, live = Snapshot(tmp_path / "second"), other_state()
    assert {"model", "progress"} == written(opened)
    assert opened.verify().ok
    opened.restore(live)
    assert_same(make_incremental.state(3), {key: dict(values) for key, values in live.items()})
    assert second.id == opened.id
    campaign.tried()


@KEPT
def test_its_fingerprints_are_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign: Campaign) -> None:
    """Those of today are the same, so that nothing of what has not changed is digested."""
    monkeypatch.setattr(LiveBox, "is_on_device", property(lambda _: True))
    monkeypatch.setattr(inplace, "block_digests", lambda data: pytest.fail("something was digested to compare it"))
    kept = Snapshot(shutil.copytree(make_incremental.FINGERPRINTS, tmp_path / "kept"))
    second = Snapshot(Snapshot.take(tmp_path / "second", make_incremental.app_state(), base=kept, dedup=False).path)

    def fingerprints(snapshot: Snapshot) -> dict[str, Any]:
        return {entry.path: [box.fingerprint for box in getattr(entry, "boxes", ())] for entry in snapshot.entries("*")}

    assert set() == written(second)
    assert kept.manifest.fingerprint_key == second.manifest.fingerprint_key
    assert fingerprints(kept) == fingerprints(second)
    assert torch.equal(make_incremental.state()["model"]["bias"], second.read_object("model/bias"))
    campaign.tried()
