"""Equal content under another name: what was renamed, and what is there twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from expstate import Snapshot, StateDict, settings
from expstate.diff.compare import _matched
from expstate.settings import MIB

from .conftest import Take, Thing, TiedModel


def test_a_renamed_entry_is_recognised_on_both_sides(take: Take) -> None:
    diff = take(before=torch.arange(3), epoch=1).diff(take(after=torch.arange(3), epoch=1))

    assert (("state/before", "state/after"),) == diff.renamed
    assert "state/before" == diff["state/after"].renamed_from
    assert "state/after" == diff["state/before"].renamed_to
    assert (("state/after",), ("state/before",)) == (diff.added, diff.removed)
    assert "1 added (1 renamed)" in diff.summary()


def test_a_prefix_that_comes_renames_every_entry_to_its_own(tmp_path: Path) -> None:
    """Entries of equal content too: those whose names end alike belong together."""
    model = torch.nn.Sequential(*(torch.nn.BatchNorm1d(4) for _ in range(5)))
    old = Snapshot.take(tmp_path / "old", {"model": model})
    new = Snapshot.take(tmp_path / "new", {"model": torch.nn.Sequential(model)})
    renamed = old.diff(new).renamed

    assert 25 == len(renamed)
    assert {(name, name.replace("model/", "model/0.")) for name in (entry.path for entry in old.entries("model/*"))} == set(renamed)


@pytest.mark.parametrize("after", [torch.arange(3).float(), torch.arange(3).view(3, 1), torch.arange(1, 4)])
def test_another_dtype_shape_or_content_is_no_rename(take: Take, after: torch.Tensor) -> None:
    assert () == take(before=torch.arange(3)).diff(take(after=after)).renamed


def test_values_and_what_is_empty_are_never_renamed(take: Take) -> None:
    """That they are equal says nothing."""
    diff = take(a=1, b=torch.zeros(0), c={}).diff(take(d=1, e=torch.zeros(0), f={}))

    assert ((), 3, 3) == (diff.renamed, len(diff.added), len(diff.removed))


def test_objects_are_renamed_too(take: Take) -> None:
    with pytest.warns(match="trust=True"):
        old, new = take(before=Thing(3)), take(after=Thing(3))

    assert (("state/before", "state/after"),) == old.diff(new).renamed


def test_a_copy_of_what_is_still_there_is_named(take: Take) -> None:
    old = take(weight=torch.arange(4), copy=torch.arange(4), mean=torch.ones(2))
    new = take(weight=torch.arange(4), average=torch.ones(2), mean=torch.ones(2))
    diff = old.diff(new)

    assert () == diff.renamed
    assert "state/mean" == diff["state/average"].same_content_as
    assert "state/weight" == diff["state/copy"].same_content_as
    assert "same content as state/mean" in diff.summary()


def test_content_that_is_there_no_more_is_not_named(take: Take) -> None:
    old = take(weight=torch.arange(4), copy=torch.arange(4))

    assert None is old.diff(take(weight=torch.ones(4)))["state/copy"].same_content_as


def test_a_new_tie_is_named(tmp_path: Path) -> None:
    class Untied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = TiedModel(tied=True).embedding

    old = Snapshot.take(tmp_path / "old", {"model": Untied()})
    diff = old.diff({"model": TiedModel(tied=True)})
    row = diff["model/head.weight"]

    assert ("added", "model/embedding.weight", "model/embedding.weight") == (row.change, row.same_content_as, row.new.tied_to)


def test_tied_entries_that_are_renamed_together(take: Take) -> None:
    weight = torch.arange(6)
    diff = take(a=weight, b=weight).diff(take(old_a=weight, old_b=weight))

    assert 2 == len(diff.renamed) == len({old for old, _ in diff.renamed})


def test_tensors_cut_alike_are_recognised(take: Take) -> None:
    weight = torch.randn(3000, 300)
    with settings.override(data_file_bytes=MIB):
        assert (("state/before", "state/after"),) == take(before=weight).diff(take(after=weight)).renamed


def test_renamed_live_entries_are_recognised(take: Take) -> None:
    diff = take(before=torch.arange(3)).diff({"state": StateDict(after=torch.arange(3))})

    assert (("state/before", "state/after"),) == diff.renamed


_names = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True)


@given(gone=_names, come=_names)
@hypothesis_settings(max_examples=100)
def test_names_are_matched_one_to_one_and_as_many_as_can_be(gone: list[str], come: list[str]) -> None:
    matched = _matched(gone, come)

    assert min(len(gone), len(come)) == len(matched) == len(set(matched.values()))
    assert set(come) >= set(matched)
    assert set(gone) >= set(matched.values())


@given(names=_names, prefix=st.sampled_from(["module", "x.y"]))
@hypothesis_settings(max_examples=100)
def test_names_with_a_prefix_that_no_name_has_are_matched_to_themselves(names: list[str], prefix: str) -> None:
    matched = _matched(names, [f"{prefix}.{name}" for name in names])

    assert {f"{prefix}.{name}": name for name in names} == matched
