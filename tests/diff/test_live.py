"""A snapshot against live state: digested where it lies, within the budget, and left as it is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import RNGState, Snapshot, StateDict, settings
from expstate.engine import inplace
from expstate.engine.unchanged import LiveBox
from expstate.errors import UnsupportedValueError
from expstate.settings import MIB
from tests.snapshot.conftest import digest_of, of_every_layout

from .conftest import Take, Thing, TiedModel


def training(seed: int = 0) -> dict[str, Any]:
    """A model, an optimizer with a state, numbers and generators."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(5, 8)).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "progress": StateDict(epoch=1, best=None), "rng": RNGState()}


def test_state_that_was_just_taken_is_the_same(tmp_path: Path) -> None:
    state = training()
    snapshot = Snapshot.take(tmp_path / "s", state)
    diff = snapshot.diff(state)

    assert diff.is_same
    assert {"added": 0, "removed": 0, "changed": 0, "same": len(diff.same)} == diff.counts
    assert () == diff.metadata
    assert "live state" == str(diff.new)


def test_what_training_changed_is_found(tmp_path: Path) -> None:
    """The newer side is the live one: it has what was added."""
    state = training()
    snapshot = Snapshot.take(tmp_path / "s", state)
    state["optimizer"].step()
    state["progress"]["epoch"] = 2
    state["progress"]["loss"] = 0.5
    del state["progress"]["best"]
    diff = snapshot.diff(state)

    assert ("progress/loss",) == diff.added
    assert ("progress/best",) == diff.removed
    assert {"model/0.weight", "optimizer/state/0/exp_avg", "progress/epoch"} <= set(diff.changed)
    assert {"model/1.running_mean", "rng/torch"} <= set(diff.same)
    assert (1, 2) == (diff["progress/epoch"].old.value, diff["progress/epoch"].new.value)


def test_only_the_keys_that_were_handed_in_are_compared(tmp_path: Path) -> None:
    state = training()
    snapshot = Snapshot.take(tmp_path / "s", {"a": StateDict(x=1), "a/b": StateDict(x=1), "model": state["model"]})
    diff = snapshot.diff({"a": StateDict(x=2), "other": StateDict(y=torch.ones(2))})

    assert (("other/y",), (), ("a/x",), ()) == (diff.added, diff.removed, diff.changed, diff.same)


def test_live_state_does_not_change(tmp_path: Path) -> None:
    """Nor do random generators, though a state dict may draw from them."""

    class Drawing(StateDict):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"drawn": torch.rand(()), "too": random.random()}

    state = training() | {"drawing": Drawing(x=1)}
    snapshot = Snapshot.take(tmp_path / "s", state)
    before = digest_of(*(value.state_dict() for key, value in state.items() if key != "drawing")), torch.get_rng_state()
    diff = snapshot.diff(state, stats=True)

    assert diff.is_same
    assert before[0] == digest_of(*(value.state_dict() for key, value in state.items() if key != "drawing"))
    assert torch.equal(before[1], torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning", "ignore:.*beta state:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_every_layout_and_kind(take: Take) -> None:
    """Sparse, quantised, nested, strided, of other devices' dtypes, arrays and objects."""
    values: dict[str, Any] = {
        **of_every_layout(),
        "strided": torch.randn(700, 900).t(),
        "sliced": torch.randn(40, 40)[::3, 1::2],
        "expanded": torch.randn(1, 5).expand(7, 5),
        "conj": torch.randn(9, dtype=torch.complex64).conj(),
        "negative": torch.randn(9, dtype=torch.complex64).conj().imag,
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "half": torch.randn(5).half(),
        "float8": torch.randn(5).to(torch.float8_e5m2),
        "bool": torch.tensor([True, False]),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "text": np.array(["a", "bcd"]),
        "big": np.arange(5, dtype=">i4"),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "long": "a" * 100_000,
        "dates": np.array(["2026-01-01"], dtype="M8[D]"),
        "object": Thing(3),
    }
    with pytest.warns(match="trust=True"):
        snapshot = take(**values)
    diff = snapshot.diff({"state": StateDict(values)}, memory_budget_bytes=2 * MIB)

    assert () == diff.changed + diff.added + diff.removed


def test_what_is_stored_and_what_is_live_are_measured(take: Take) -> None:
    old = {"plain": torch.zeros(600_000), "strided": torch.zeros(800, 500).t(), "half": torch.zeros(9).half(), "array": np.zeros(3)}
    new = {name: value + 0.5 if name != "strided" else (value.t() + 0.5).t() for name, value in old.items()}
    for budget in (2 * MIB, None):
        diff = take(**old).diff({"state": StateDict(new)}, stats=True, memory_budget_bytes=budget)

        assert dict.fromkeys(("state/plain", "state/strided", "state/half", "state/array"), 0.5) == {
            row.entry: row.statistics.max_abs for row in diff.entries("changed")
        }


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex128])
def test_live_tensors_of_another_dtype_are_measured(take: Take, dtype: torch.dtype) -> None:
    """With buffers so small that no whole blocks of both sides fit."""
    old = torch.zeros(1100, 1000, dtype=torch.int8)
    new = torch.ones(1000, 1100, dtype=dtype).t()
    found = take(x=old).diff({"state": StateDict(x=new)}, stats=True, memory_budget_bytes=2 * MIB)["state/x"].statistics

    assert (1.0, 1_100_000) == (found.max_abs, found.changed_elements)


def test_tensors_of_many_blocks_are_digested_like_those_taken(take: Take) -> None:
    values = {"plain": torch.randn(9 * MIB), "strided": torch.randn(2500, 2000).t(), "odd": torch.randn(300_001, 3)[:, :2]}
    snapshot = take(**values)

    assert snapshot.diff({"state": StateDict(values)}, memory_budget_bytes=2 * MIB).is_same
    values["strided"][1999, 2499] += 1
    values["plain"][-1] += 1
    assert ("state/plain", "state/strided") == snapshot.diff({"state": StateDict(values)}).changed


def test_tied_live_weights(tmp_path: Path) -> None:
    for taken in (True, False):
        snapshot = Snapshot.take(tmp_path / str(taken), {"model": TiedModel(tied=taken)})
        for tied in (True, False):
            assert snapshot.diff({"model": TiedModel(tied=tied)}).is_same


def test_tensors_that_nothing_in_the_snapshot_resembles_are_not_digested(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """No digest could make them the same as anything."""
    digested: list[int] = []
    block_digests = inplace.block_digests
    monkeypatch.setattr(inplace, "block_digests", lambda data: digested.append(len(data)) or block_digests(data))
    diff = take(a=torch.zeros(5)).diff({"state": StateDict(a=torch.zeros(6), b=torch.zeros(7), c=torch.zeros(5))})

    assert [20] == digested
    assert ("state/b", "state/c") == diff.added
    assert ("shape",) == diff["state/a"].differs
    assert None is diff["state/c"].same_content_as


def test_a_tensor_without_values_cannot_be_compared(take: Take) -> None:
    with pytest.raises(UnsupportedValueError, match="'state/x' is on the meta device"):
        take(x=torch.zeros(2)).diff({"state": StateDict(x=torch.zeros(2, device="meta"))})


def test_an_object_that_cannot_be_pickled_is_named(take: Take) -> None:
    with pytest.raises(UnsupportedValueError, match="entry 'state/x' cannot be compared"):
        take(x=1).diff({"state": StateDict(x=lambda: None)})


def test_progress_counts_what_is_digested(take: Take) -> None:
    updates: list[Any] = []
    values = {"x": torch.zeros(3 * MIB), "t": torch.zeros(500, 700).t()}
    take(**values).diff({"state": StateDict(values)}, progress=updates.append)

    assert ("diff", 12 * MIB + 1_400_000) == (updates[-1].operation, updates[-1].done_bytes)


def test_live_state_is_not_kept_alive_by_its_diff(take: Take) -> None:
    import weakref

    values = StateDict(x=torch.zeros(1000))
    watch = weakref.ref(values["x"])
    diff = take(x=torch.ones(1000)).diff({"state": values}, stats=True)
    del values

    assert None is watch()
    assert ("state/x",) == diff.changed


@pytest.mark.parametrize("file_bytes", [2**30, MIB])  # tensors in one box, and in rows
def test_on_an_accelerator_fingerprints_are_compared(take: Take, monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> None:
    """As if the host were one: nothing is digested, and what has changed, moved or come is told as by digests."""
    monkeypatch.setattr(LiveBox, "is_on_device", property(lambda _: True))
    values = {name: torch.randn(900, 300) for name in "abc"} | {"strided": torch.randn(30, 50).t(), "empty": torch.zeros(0, 3)}
    with settings.override(data_file_bytes=file_bytes):
        snapshot = take(**values, gone=torch.ones(900, 300))
    monkeypatch.delattr(inplace, "block_digests")  # nothing can be digested
    live = {**values, "c": values["c"] + 1, "new": torch.ones(900, 300), "x": torch.randn(900, 300)}
    diff = snapshot.diff({"state": StateDict(live)})

    assert snapshot.manifest.fingerprint_key is not None
    assert ("state/c",) == diff.changed
    assert ("state/new", "state/x") == diff.added
    assert ("state/gone",) == diff.removed
    assert (None if file_bytes == MIB else "state/gone") == diff["state/new"].renamed_from
    assert snapshot.diff({"state": StateDict({**values, "gone": torch.ones(900, 300)})}).is_same
