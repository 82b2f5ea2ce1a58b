"""What is known of two snapshots besides their state: only what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from expstate import Snapshot, StateDict
from expstate.diff.facts import FactDiff, compare_facts
from expstate.format.manifest import Manifest

from .conftest import Take


def facts(old: Snapshot, new: Snapshot, *prefixes: str) -> dict[str, tuple[str, Any, Any]]:
    return {fact.name: (fact.change, fact.old, fact.new) for fact in old.diff(new).metadata if fact.name.startswith(prefixes or ("",))}


@pytest.fixture
def manifest(take: Take) -> Manifest:
    """One without provenance."""
    return msgspec.structs.replace(take(x=1).manifest, provenance={})


def test_two_takes_of_one_state_have_nothing_to_tell(take: Take) -> None:
    assert {} == facts(take(x=1), take(x=1))


def test_only_what_differs_is_told(take: Take) -> None:
    old = take(
        {"name": "one", "step": 1, "tags": ["a", "b"], "params": {"lr": 0.1, "depth": 3}, "metrics": {"loss": 0.5}, "note": "n"}, x=1
    )
    new = take({"name": "two", "step": 1, "tags": ["b", "c"], "params": {"lr": 0.2, "depth": 3}, "metrics": {"acc": 0.9}, "note": "n"}, x=1)

    assert {
        "name": ("changed", "one", "two"),
        "tags": ("changed", ["a", "b"], ["b", "c"]),
        "param.lr": ("changed", 0.1, 0.2),
        "metric.loss": ("removed", 0.5, None),
        "metric.acc": ("added", None, 0.9),
    } == facts(old, new)


def test_the_order_of_tags_is_no_difference(take: Take) -> None:
    assert {} == facts(take({"tags": ["a", "b"]}, x=1), take({"tags": ["b", "a"]}, x=1))


@pytest.mark.parametrize(
    ("old", "new"), [(1, True), (1, 1.0), (float("nan"), float("inf")), (2**70, 2**71), ((1, 2), [1, 2]), ({"a": 1}, {"a": 2}), (None, 0)]
)
def test_params_keep_their_type(take: Take, old: Any, new: Any) -> None:
    found = facts(take({"params": {"p": old}}, x=1), take({"params": {"p": new}}, x=1))

    assert (repr(old), repr(new)) == tuple(map(repr, found["param.p"][1:]))


def test_a_metric_that_stays_nan_is_no_difference(take: Take) -> None:
    options = {"metrics": {"loss": float("nan")}}

    assert {} == facts(take(options, x=1), take(options, x=1))


def test_provenance_is_compared_part_by_part(manifest: Manifest) -> None:
    """Git, Python, torch and packages first, whatever the order in the manifest."""
    old = {"host": "a", "packages": {"numpy": "1", "torch": "2.12", "gone": "1"}, "git": {"commit": "abc", "dirty": False}, "argv": ["x"]}
    new = {
        "argv": ["x", "y"],
        "git": {"commit": "def", "dirty": False},
        "packages": {"numpy": "1", "torch": "2.13", "come": "3"},
        "host": "a",
    }
    found = compare_facts(msgspec.structs.replace(manifest, provenance=old), msgspec.structs.replace(manifest, provenance=new))

    assert (
        FactDiff("git.commit", "changed", "abc", "def"),
        FactDiff("packages.torch", "changed", "2.12", "2.13"),
        FactDiff("packages.gone", "removed", "1", None),
        FactDiff("packages.come", "added", None, "3"),
        FactDiff("argv", "changed", ["x"], ["x", "y"]),
    ) == found


def test_provenance_that_anybody_may_have_written_is_only_data(manifest: Manifest) -> None:
    deep: dict[str, Any] = {"x": 1}
    for _ in range(200):
        deep = {"d": deep}
    old = msgspec.structs.replace(manifest, provenance={"git": "not a dict", "deep": deep, "empty": {}})
    new = msgspec.structs.replace(manifest, provenance={"git": {"commit": "abc"}, "deep": 3, "empty": []})

    assert {"git", "git.commit", "deep", "empty"} == {name.partition(".d")[0] for name in (fact.name for fact in compare_facts(old, new))}


def test_the_real_provenance_of_a_take_is_compared(tmp_path: Path) -> None:
    from expstate import settings

    with settings.override(provenance="full"):
        old = Snapshot.take(tmp_path / "old", {"state": StateDict(x=1)})
    with settings.override(provenance="off"):
        new = Snapshot.take(tmp_path / "new", {"state": StateDict(x=1)})
    if not old.manifest.provenance:
        pytest.skip("nothing was gathered")

    assert all(fact.change == "removed" for fact in old.diff(new).metadata)
    assert "packages.torch" in [fact.name for fact in old.diff(new).metadata]


def test_a_snapshot_without_metadata_against_one_with(take: Take) -> None:
    found = facts(take(x=1), take({"name": "n", "step": 0, "note": "text"}, x=1))

    assert {"name": ("added", None, "n"), "step": ("added", None, 0), "note": ("added", None, "text")} == found
