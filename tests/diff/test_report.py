"""What comes out of a comparison: its properties, tables and texts, and what ``Snapshot.diff`` refuses."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from expstate import RNGState, Snapshot, StateDict
from expstate.diff.report import SnapshotDiff
from expstate.errors import EntryNotFoundError, ExpstateError, InvalidArgumentError, SnapshotCorruptError, SnapshotReplacedError
from expstate.format.manifest import Metadata
from tests.snapshot.boxes import Shard, write_boxes

from .conftest import Take, TiedModel, forged

COLUMNS = {"entry": "string", "change": "string", "kind": "string", "shape": "string", "dtype": "string", "nbytes": "int64"}
STATISTICS = {
    **dict.fromkeys(("l2", "relative", "max_abs", "cosine", "changed"), "float64"),
    **dict.fromkeys(("nan_old", "nan_new", "inf_old", "inf_new"), "Int64"),
}
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Cs"}


@pytest.fixture
def mixed(take: Take) -> SnapshotDiff:
    """One entry of each change, with statistics."""
    old = take({"name": "one", "params": {"lr": 0.1}}, w=torch.tensor([1.0, 2.0]), epoch=1, gone=torch.zeros(3), kept=torch.ones(2, 2))
    new = take({"name": "two", "params": {"lr": 0.2}}, w=torch.tensor([1.0, 4.0]), epoch=2, come=np.zeros(4), kept=torch.ones(2, 2))
    return old.diff(new, stats=True)


def has_only_seen(text: str) -> bool:
    """Whether there is nothing in it that a terminal would act on, or that nobody sees."""
    return not any(unicodedata.category(character) in UNSEEN for character in text.replace("\n", ""))


# Properties


def test_both_sides_are_named(mixed: SnapshotDiff, take: Take) -> None:
    snapshot = take(x=1)
    live = snapshot.diff({"state": StateDict(x=1)})

    assert ("one", "two") == (str(mixed.old), str(mixed.new))
    assert (snapshot.id, snapshot.path, None) == (live.old.id, live.old.path, live.old.name)
    assert (snapshot.id[:8], "live state") == (str(live.old), str(live.new))
    assert (None, None) == (live.new.id, live.new.path)


def test_an_entry_is_told_as_it_is_on_both_sides(mixed: SnapshotDiff) -> None:
    changed, added, removed, same = (mixed[f"state/{name}"] for name in ("w", "come", "gone", "kept"))

    assert ("tensor", "float32", (2,), 8) == (changed.kind, changed.dtype, changed.shape, changed.nbytes)
    assert (None, "numpy", "<f8", 32) == (added.old, added.kind, added.dtype, added.nbytes)
    assert (None, (3,), 12) == (removed.new, removed.shape, removed.nbytes)
    assert ("same", (), None) == (same.change, same.differs, same.statistics)
    assert (1, 2) == (mixed["state/epoch"].old.value, mixed["state/epoch"].new.value)
    assert [True, True, True, False] == [row.is_tensor for row in (changed, added, removed, mixed["state/epoch"])]


def test_an_entry_is_had_by_its_path_whatever_it_is(take: Take) -> None:
    """But a container that does not differ is no entry of a comparison."""
    diff = take(a={"x": 1}, e={}).diff(take(a={"x": 1}, f={}))

    assert ["same", "removed", "added"] == [diff[path].change for path in ("state/a/x", "state/e", "state/f")]
    for path in ("state", "state/a", "nothing"):
        with pytest.raises(EntryNotFoundError, match=f"no entry '{path}'"):
            diff[path]


def test_every_entry_that_is_listed_can_be_had(mixed: SnapshotDiff) -> None:
    paths = [*mixed.added, *mixed.removed, *mixed.changed, *mixed.same]

    assert sorted(paths) == sorted(row.entry for row in mixed)
    assert {row.entry: row.change for row in mixed} == {path: mixed[path].change for path in paths}
    assert sum(mixed.counts.values()) == len(paths)


# Tables


def test_a_table_has_a_row_for_every_entry(mixed: SnapshotDiff) -> None:
    frame = mixed.to_pandas()

    assert [*COLUMNS, *STATISTICS] == list(frame.columns)
    assert ["state/w", "state/epoch", "state/come", "state/kept", "state/gone"] == list(frame.entry)
    assert ["changed", "changed", "added", "same", "removed"] == list(frame.change)
    assert ["tensor", "value", "numpy", "tensor", "tensor"] == list(frame.kind)
    assert ["(2,)", "(4,)", "(2, 2)", "(3,)"] == list(frame["shape"].dropna())
    assert [8, 0, 32, 16, 12] == list(frame.nbytes)
    row = frame.iloc[0]
    assert (2.0, 2.0, 0.5) == (row.l2, row.max_abs, row.changed)
    assert (0, 0) == (row.nan_old, row.inf_new)
    assert math.isnan(frame.iloc[1].l2)
    assert [False, True, True, True, True] == list(frame.nan_old.isna())


def test_without_statistics_a_table_has_six_columns(take: Take) -> None:
    assert list(COLUMNS) == list(take(x=1).diff(take(x=2)).to_pandas().columns)


@pytest.mark.parametrize("values", [{}, {"x": 1}, {"x": torch.ones(1)}])
@pytest.mark.parametrize("stats", [False, True])
def test_the_dtypes_of_a_table_do_not_depend_on_what_is_in_it(take: Take, values: dict[str, Any], stats: bool) -> None:
    snapshot = take(**values)
    frame = snapshot.diff(snapshot, stats=stats).to_pandas()

    assert len(values) == len(frame)
    assert COLUMNS | (STATISTICS if stats else {}) == {name: str(dtype) for name, dtype in frame.dtypes.items()}


def test_a_table_says_what_something_was_and_is(take: Take) -> None:
    frame = take(d=torch.ones(2), s=torch.ones(2), k=1).diff(take(d=torch.ones(2).half(), s=torch.ones(3), k=torch.ones(1))).to_pandas()

    assert ["float32 -> float16", "float32", "none -> float32"] == list(frame["dtype"])
    assert ["(2,)", "(2,) -> (3,)", "none -> (1,)"] == list(frame["shape"])
    assert ["tensor", "tensor", "value -> tensor"] == list(frame["kind"])


def test_plain_data_is_json_of_all_that_differs(mixed: SnapshotDiff) -> None:
    found = mixed.to_dict()

    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert ["state/w", "state/epoch", "state/come", "state/gone"] == [row["entry"] for row in found["entries"]]
    assert 2.0 == found["entries"][0]["statistics"]["max_abs"]
    assert {"name": "param.lr", "change": "changed", "old": 0.1, "new": 0.2} in found["metadata"]
    assert (False, mixed.counts) == (found["is_same"], found["counts"])


def test_plain_data_of_values_that_json_has_not(take: Take) -> None:
    odd = {"nan": math.nan, "big": 2**70, "bytes": b"\xff", "text": "\ud800", "complex": 1j, "keys": {1: (2, [math.inf])}}
    text = json.dumps(take(**dict.fromkeys(odd, 0)).diff(take(**odd)).to_dict(), allow_nan=False)

    assert has_only_seen(text)


# Texts


def test_random_generators_are_told_apart(take: Take, tmp_path: Path) -> None:
    """Under whatever key, of snapshots and of live state; who has drawn nothing is not told of it."""
    state = {"progress": StateDict(epoch=1), "the rng": RNGState()}
    old = Snapshot.take(tmp_path / "old", state)
    assert () == old.diff(state).drawn
    torch.rand(1)
    state["progress"]["epoch"] = 2
    new = Snapshot.take(tmp_path / "new", state)

    for diff in (old.diff(new), old.diff(state)):
        assert ("the rng/torch",) == diff.drawn
        assert {"progress/epoch", "the rng/torch"} == set(diff.changed)
        lines = diff.summary().split("\n")
        assert ["  values: progress/epoch: 1 -> 2", "  random numbers were drawn: the rng/torch"] == lines[1:]
        html = diff._repr_html_()
        assert "<div>random numbers were drawn: the rng/torch</div>" in html
        assert "bytes" not in html
    assert () == take(rng={"torch": 1}).diff(take(rng={"torch": 2})).drawn


def test_as_many_entries_are_listed_as_are_asked_for(take: Take) -> None:
    tensors = {f"w{number}": torch.full((2,), 1.0 + number) for number in range(9)}
    diff = take(**tensors).diff(take(**{name: tensor + 1 for name, tensor in tensors.items()}), stats=True)

    for top, listed in ((None, 3), (1, 1), (5, 5), (9, 9), (100, 9)):
        shown = diff if top is None else diff.showing(top)
        lines = shown.summary().split("\n")
        assert [f"state/w{number}" for number in range(listed)] == re.findall(r"state/w\d", "\n".join(lines[1:]))
        assert (listed < 9) == (f"and {9 - listed} more" in lines[-1])
        assert 9 == len(shown.changed)
    for top in (0, -1):
        with pytest.raises(InvalidArgumentError, match="top must be at least 1"):
            diff.showing(top)


def test_a_summary_names_what_matters(mixed: SnapshotDiff) -> None:
    assert [
        "one -> two: 2 changed, 1 added, 1 removed, 1 same",
        "  values: state/epoch: 1 -> 2",
        "  most changed: state/w (relative 0.894, max 2)",
        "  added: state/come",
        "  removed: state/gone",
        "  metadata: name 'one' -> 'two'; param.lr 0.1 -> 0.2",
    ] == mixed.summary().split("\n")
    assert mixed.summary() == str(mixed)
    assert "SnapshotDiff(one -> two: 2 changed, 1 added, 1 removed, 1 same)" == repr(mixed)


def test_nothing_to_tell_is_told(take: Take) -> None:
    snapshot = take({"name": "one"}, x=1, y=2)

    assert "one -> one: all 2 entries are the same" == str(snapshot.diff(snapshot))


def test_two_snapshots_of_one_name_are_told_apart(take: Take) -> None:
    old, new = take({"name": "n"}, x=1), take({"name": "n"}, x=2)

    assert f"n ({old.id[:8]}) -> n ({new.id[:8]}): 1 changed, 0 same" == str(old.diff(new)).split("\n")[0]


def test_of_many_the_first_are_shown_and_the_rest_counted(take: Take) -> None:
    """Each on a line of its own where they do not fit one line."""
    values = {f"a_rather_long_name_{number:03}": number for number in range(100)}
    lines = take(**values, t=torch.ones(2)).diff(take(**dict.fromkeys(values, "x"), t=torch.ones(2))).summary().split("\n")

    assert ["  values:", "    state/a_rather_long_name_000: 0 -> 'x'"] == lines[1:3]
    assert "    and 94 more" == lines[-1]
    assert 9 == len(lines)
    assert all(len(line) <= 80 for line in lines)


def test_what_people_look_for_comes_first(take: Take) -> None:
    """NaN that have come before large changes, counts of steps and what was zero after what can be told in relation."""
    ones, nan = torch.ones(10), torch.ones(10)
    nan[3] = math.nan
    old = take(step=torch.tensor(1.0), little=ones.clone(), zero=torch.zeros(10), much=ones.clone(), nan=ones.clone())
    new = take(step=torch.tensor(9.0), little=ones * 1.01, zero=ones, much=ones * 3, nan=nan)
    diff = old.diff(new, stats=True)

    assert [
        "  most changed:",
        "    state/nan (relative 0, max 0, NaN 0 -> 1)",
        "    state/much (relative 2, max 2)",
        "    state/little (relative 0.01, max 0.01)",
        "    and 2 more",
    ] == diff.summary().split("\n")[1:]
    assert "was zero, max 1" in str(diff["state/zero"])


@pytest.mark.parametrize("name", ["a\x1b[31mred", "a\nb", "a\u202eb", "a\u200bb", "a\x9b2J", "a\u2028b"])
def test_control_characters_reach_no_text(take: Take, name: str) -> None:
    """Whether they are in names, values, metadata or provenance."""
    old = take(**{name: torch.ones(2), "value": 1, "gone": torch.zeros(1), f"old{name}": torch.arange(5)})
    new = take(**{name: torch.zeros(2), "value": name, f"come{name}": {name: name}, f"new{name}": torch.arange(5)})
    new = forged(new, metadata=Metadata(name=name, tags=(name,), params={name: name}, note=name), provenance={name: {name: name}})
    for diff in (old.diff(new), old.diff(new, stats=True), new.diff(old)):
        for text in (str(diff), repr(diff), diff._repr_html_(), *map(str, diff), str(diff.old), json.dumps(diff.to_dict())):
            assert has_only_seen(text)


def test_a_repr_that_fails_is_no_reason_to_fail(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    diff = take(x=torch.float16).diff(take(x=torch.float32))
    monkeypatch.setattr("reprlib.Repr.repr", lambda *_: 1 / 0)

    assert "  values: state/x: <dtype: ZeroDivisionError> -> <dtype: ZeroDivisionError>" in diff.summary()


def test_texts_do_not_depend_on_the_run(take: Take) -> None:
    old = take(**{f"old{number}": torch.tensor([number % 3]) for number in range(20)}, s={"b", "a", "c"})
    new = take(**{f"new{number}": torch.tensor([number % 3]) for number in range(20)}, s={"d", "a", "c"})
    one, other = old.diff(new, stats=True), old.diff(new, stats=True)

    assert (str(one), repr(one), one._repr_html_()) == (str(other), repr(other), other._repr_html_())
    assert "{'a', 'b', 'c'} -> {'a', 'c', 'd'}" in str(one)


def test_renamed_entries_are_told_once(take: Take) -> None:
    text = take(before=torch.arange(3)).diff(take(after=torch.arange(3))).summary()

    assert ["  renamed: state/before -> state/after"] == text.split("\n")[1:]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (True, False, "no longer tied to model/embedding.weight"),
        (False, True, "tied to model/embedding.weight"),
        (True, True, None),
        (False, False, None),
    ],
)
def test_a_tie_that_comes_or_goes_is_told_though_no_content_changed(tmp_path: Path, old: bool, new: bool, told: str | None) -> None:
    one, other = (Snapshot.take(tmp_path / str(number), {"model": TiedModel(tied=tied)}) for number, tied in enumerate((old, new)))
    diff = one.diff(other)

    assert diff.is_same
    assert (("model/head.weight",) if told else ()) == tuple(row.entry for row in diff.kept_otherwise())
    assert (told is not None) == ("the same:" in diff.summary())
    assert (told or "") in diff.summary()


def test_another_layout_of_the_same_content_is_told(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(4, 3)
    halves: list[Shard] = [((0, 0), (2, 3)), ((2, 0), (2, 3))]
    write_boxes(tmp_path / "old", "state/w", value, [((0, 0), (4, 3))])
    write_boxes(tmp_path / "new", "state/w", value, halves)
    old, new = Snapshot(tmp_path / "old"), Snapshot(tmp_path / "new")

    assert "  tensors: state/w: layout differs" in old.diff(new).summary()
    assert "  the same: state/w (same, layout differs)" in old.diff(new, content=True).summary()
    assert "the same:" not in old.diff(old, content=True).summary()


def test_metadata_and_provenance_are_shown_only_where_they_differ(take: Take) -> None:
    given = {"params": {"lr": 0.1, "depth": 3}, "note": "as ever"}
    provenance = {"git": {"commit": "abc", "branch": "main"}, "packages": {"torch": "2.12", "numpy": "2.1"}}
    changed = {"git": {"commit": "def", "branch": "main"}, "packages": {"torch": "2.13", "numpy": "2.1"}}
    old = forged(take(given, x=1), provenance=provenance)
    new = forged(take({**given, "params": {"lr": 0.2, "depth": 3}}, x=1), provenance=changed)
    shown = ["param.lr", "git.commit", "packages.torch"]
    diff = old.diff(new)

    assert shown == [fact.name for fact in diff.metadata]
    for text in (diff.summary(), diff._repr_html_()):
        assert all(name in text for name in shown)
        assert not any(name in text for name in ("depth", "branch", "numpy", "as ever"))
    assert () == old.diff(old).metadata


# What may be handed in


@pytest.mark.parametrize("other", ["best", Path("run/step-1"), None, 3, [], torch.nn.Linear(1, 1), {}, {1: StateDict()}, {"state": 1}])
def test_what_is_no_snapshot_and_no_app_state_is_refused(take: Take, other: Any) -> None:
    with pytest.raises(ExpstateError):
        take(x=1).diff(other)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"progress": "yes"}, "progress"), ({"memory_budget_bytes": "1"}, "budget"), ({"memory_budget_bytes": -1}, "budget")],
)
def test_wrong_options_are_refused_before_anything_is_read(take: Take, options: dict[str, Any], named: str) -> None:
    nowhere = Snapshot("/nonexistent/snapshot")
    for other in (take(x=1), {"state": StateDict(x=1)}):
        with pytest.raises(ExpstateError, match=named):
            nowhere.diff(other, **options)


def test_a_snapshot_that_is_not_there_is_named(take: Take, tmp_path: Path) -> None:
    for old, new in ((take(x=1), Snapshot(tmp_path / "none")), (Snapshot(tmp_path / "none"), take(x=1))):
        with pytest.raises(FileNotFoundError, match="none"):
            old.diff(new)


def test_damage_that_reading_finds_names_the_entry(take: Take) -> None:
    old, new = take(other=torch.zeros(5), w=torch.ones(1000)), take(other=torch.ones(5), w=torch.zeros(1000))
    assert 2 == len(old.diff(new, stats=True).changed)
    (file,) = Path(new.path).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)

    assert 2 == len(old.diff(new).changed)
    with pytest.raises(SnapshotCorruptError, match="entry 'state/w' is damaged"):
        old.diff(new, stats=True)
    with pytest.raises(SnapshotCorruptError, match="entry 'state/w' is damaged"):
        new.diff({"state": StateDict(other=torch.zeros(5), w=torch.ones(1000))}, stats=True)


def test_a_snapshot_that_was_replaced_meanwhile_is_not_read_as_another(take: Take) -> None:
    old, new = take(x=torch.zeros(9)), take(x=torch.ones(9))
    assert ("state/x",) == old.diff(new).changed
    Snapshot.take(new.path, {"state": StateDict(x=torch.full((9,), 7.0))}, overwrite=True)

    with pytest.raises(SnapshotReplacedError):
        old.diff(new, stats=True)
    assert 7.0 == old.diff(Snapshot(new.path), stats=True)["state/x"].statistics.max_abs


def test_every_statistic_is_there(take: Take) -> None:
    found = take(x=torch.ones(4)).diff(take(x=torch.tensor([1.0, 2, math.nan, math.inf])), stats=True)["state/x"].statistics

    assert {
        "l2": 1.0,
        "relative": 1 / math.sqrt(2),
        "max_abs": 1.0,
        "cosine": pytest.approx(3 / math.sqrt(10)),
        "changed": 0.75,
        "elements": 4,
        "changed_elements": 3,
        "nan_old": 0,
        "nan_new": 1,
        "inf_old": 0,
        "inf_new": 1,
    } == msgspec.structs.asdict(found)


def test_a_comparison_can_be_narrowed(mixed: SnapshotDiff) -> None:
    narrow = mixed.only(["state/w", "state/g*"])

    assert (("state/w",), ("state/gone",), (), ()) == (narrow.changed, narrow.removed, narrow.added, narrow.same)
    assert ["state/w", "state/gone"] == [row.entry for row in narrow]
    assert mixed["state/w"] == narrow["state/w"]
    assert not mixed.only(["state/kept"])
    assert {"state/come", "state/epoch", "state/gone", "state/kept", "state/w"} == {row.entry for row in mixed.only(["*"])}
