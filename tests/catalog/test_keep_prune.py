"""A plan says what may go and why the rest stays; applied it deletes what is still as it was planned."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expstate import Catalog, Snapshot
from expstate.catalog import model, removal
from expstate.catalog.keep import PrunePlan
from expstate.errors import InvalidArgumentError
from expstate.format import annotations as added
from expstate.format import names
from expstate.format.annotations import Annotations, Mark
from expstate.storage.local import LocalStorage
from tests.catalog.clocks import Clock
from tests.catalog.forging import forge

Take = Callable[..., Snapshot]
NAN = float("nan")


@pytest.fixture
def series(catalog: Catalog, take: Take) -> Callable[..., list[Snapshot]]:
    """Takes of steps 0, 1, ... with these losses; None for none."""

    def series(*losses: float | None, **options: Any) -> list[Snapshot]:
        return [
            take(catalog, f"{step}", value=step, step=step, metrics={} if loss is None else {"loss": loss}, **options)
            for step, loss in enumerate(losses)
        ]

    return series


def going(plan: PrunePlan) -> list[int | None]:
    """Steps of what would go."""
    return sorted(record.step or 0 for record in plan.delete)


def why(plan: PrunePlan) -> dict[int | None, tuple[str, ...]]:
    return {kept.record.step: kept.reasons for kept in plan.keep}


def steps(catalog: Catalog) -> list[int | None]:
    return [record.step for record in catalog.search()][::-1]


# Rules


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"keep_last": 2}, [0, 1, 2, 3]),
        ({"keep_best": ("loss", "min", 2)}, [0, 1, 4, 5]),
        ({"keep_best": ("loss", "max", 1)}, [1, 2, 3, 4, 5]),
        ({"keep_every": 2}, [1, 3, 5]),
        ({"keep_last": 1, "keep_best": ("loss", "min", 1), "keep_every": 4}, [1, 2]),
        ({"keep_last": 99}, []),
        ({"older_than": "1d"}, []),
        ({"older_than": "0s"}, [0, 1, 2, 3, 4, 5]),
        ({"older_than": dt.timedelta(0)}, [0, 1, 2, 3, 4, 5]),
        ({"older_than": "0s", "keep_last": 1}, [0, 1, 2, 3, 4]),
    ],
    ids=str,
)
def test_a_snapshot_stays_if_any_rule_keeps_it(
    catalog: Catalog, series: Callable[..., list[Snapshot]], rules: dict[str, Any], expected: list[int]
) -> None:
    """The others would go."""
    series(0.9, 0.5, 0.2, 0.1, 0.4, 0.8)
    plan = catalog.prune(**rules)

    assert expected == going(plan)
    assert sorted({0, 1, 2, 3, 4, 5} - set(expected)) == sorted(kept.record.step or 0 for kept in plan.keep)
    assert 16 * len(expected) == plan.nbytes


def test_age_counts_from_the_take(catalog: Catalog, series: Callable[..., list[Snapshot]], take: Take) -> None:
    """And not from when it was recorded."""
    series(0.1)
    for step, days in ((1, 6), (2, 8)):
        old = take(None, f"{step}", step=step)
        forge(old, created_at=(dt.datetime.now(dt.timezone.utc) - dt.timedelta(days=days)).isoformat())
        catalog.scan(old.path)

    assert [2] == going(catalog.prune(older_than="7d"))
    assert [1, 2] == going(catalog.prune(older_than=dt.timedelta(days=5)))


def test_the_newest_are_those_taken_last_whatever_the_clock_said(catalog: Catalog, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of records does not go back."""
    clock = Clock(monkeypatch)
    for step in range(3):
        clock.days = -step
        take(catalog, f"{step}", step=step)

    assert [0, 1] == going(catalog.prune(keep_last=1))


def test_nan_and_missing_values_are_never_best(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """With fewer than so many numbers, all that have one stay."""
    series(NAN, None, 0.5, NAN)
    for which in ("min", "max"):
        assert [0, 1, 3] == going(catalog.prune(keep_best=("loss", which, 3)))


def test_infinite_values_are_compared(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """They are numbers."""
    series(float("inf"), 1.0, float("-inf"))

    assert [0, 1] == going(catalog.prune(keep_best=("loss", "min", 1)))
    assert [1, 2] == going(catalog.prune(keep_best=("loss", "max", 1)))


def test_of_equal_values_the_newest_is_best(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """As many stay as were asked for."""
    series(0.5, 0.5, 0.5)
    for which in ("min", "max"):
        assert [0] == going(catalog.prune(keep_best=("loss", which, 2)))


def test_metrics_that_were_logged_later_count(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """With their last value."""
    taken = series(0.9, 0.5, 0.2)
    catalog.log_metric(taken[0].id, "loss", 0.1)

    assert [1, 2] == going(catalog.prune(keep_best=("loss", "min", 1)))


def test_protected_and_tagged_snapshots_stay(any_catalog: Catalog, take: Take) -> None:
    """Each with its reason; tagged ones go if that is said, the others by force."""
    taken = [take(any_catalog, f"{step}", step=step, tags=["good"] if step == 2 else []) for step in range(5)]
    any_catalog.pin(taken[0].id)
    any_catalog.alias(taken[1].id, "best")
    plan = any_catalog.prune(keep_last=1)

    assert [3] == going(plan)
    assert {0: ("pinned",), 1: ("alias 'best'",), 2: ("tagged 'good'",), 4: ("among the newest 1",)} == why(plan)
    assert [2, 3] == going(any_catalog.prune(keep_last=1, keep_tagged=False))
    assert [0, 1, 3] == going(any_catalog.prune(keep_last=1, force=True))
    assert [0, 1, 2, 3] == sorted(
        record.step or 0 for record in any_catalog.prune(keep_last=1, force=True, keep_tagged=False).apply().deleted
    )
    assert [4] == steps(any_catalog)


def test_all_reasons_are_given(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """One that is kept for two reasons is not lost with one of them."""
    taken = series(0.1)
    catalog.pin(taken[0].id)
    plan = catalog.prune(keep_last=1, keep_best=("loss", "min", 1), keep_every=1, older_than="1h")

    assert {0: ("among the newest 1", "among the best 1 by loss", "step 0", "young enough", "pinned")} == why(plan)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "no rule"),
        ({"keep_tagged": False}, "no rule"),
        ({"keep_last": 0}, "keep_last"),
        ({"keep_last": True}, "keep_last"),
        ({"keep_last": 1.5}, "keep_last"),
        ({"keep_every": 0}, "keep_every"),
        ({"keep_every": -5}, "keep_every"),
        ({"keep_best": "loss"}, "keep_best"),
        ({"keep_best": ("loss", "min")}, "keep_best"),
        ({"keep_best": ("loss", "least", 3)}, "'min' or 'max'"),
        ({"keep_best": (3, "min", 3)}, "metric"),
        ({"keep_best": ("loss", "min", 0)}, "count"),
        ({"keep_best": ("los", "min", 1)}, "no snapshot .* has the metric 'los'.*'loss'"),
        ({"older_than": "7 parsecs"}, "duration"),
        ({"older_than": 7}, "duration"),
        ({"older_than": "-7d"}, "duration"),
        ({"keep_last": 1, "project": "*"}, "one project at a time"),
    ],
    ids=str,
)
def test_rules_that_make_no_sense_are_errors(
    catalog: Catalog, series: Callable[..., list[Snapshot]], rules: dict[str, Any], message: str
) -> None:
    """Before anything is planned."""
    series(0.5)
    with pytest.raises(InvalidArgumentError, match=message):
        catalog.prune(**rules)


def test_a_project_without_records_has_nothing_to_prune(catalog: Catalog) -> None:
    """No metric is missed where no snapshot is."""
    plan = catalog.prune(keep_best=("loss", "min", 1))

    assert (0, (), 0) == (len(plan.delete), plan.keep, plan.nbytes)
    assert () == plan.apply().deleted


# Whose snapshots


def test_only_those_of_the_project_and_the_user_are_planned(
    catalog: Catalog, series: Callable[..., list[Snapshot]], take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another project if it is named; of other users if it is said."""
    series(0.1, 0.2)
    monkeypatch.setenv("EXPSTATE_PROJECT", "another")
    take(catalog, "x", step=7)
    take(catalog, "y", step=8)

    assert [7] == going(catalog.prune(keep_last=1))
    assert [0] == going(catalog.prune(keep_last=1, project="tests"))
    monkeypatch.setattr(removal, "current_user", lambda: "somebody else")
    plan = catalog.prune(keep_last=1)
    assert [] == going(plan)
    assert all("taken by" in reasons[0] for reasons in why(plan).values())
    assert [7] == going(catalog.prune(keep_last=1, any_user=True))


def test_those_of_other_users_do_not_count_among_the_newest(
    catalog: Catalog, series: Callable[..., list[Snapshot]], monkeypatch: pytest.MonkeyPatch, take: Take
) -> None:
    """Else what somebody else takes would make one's own go."""
    series(0.1, 0.2)
    theirs = take(None, "theirs", step=9)
    forge(theirs, provenance={"project": "tests", "user": "somebody else"})
    catalog.scan(theirs.path)

    assert [0] == going(catalog.prune(keep_last=1))
    assert [0, 1] == going(catalog.prune(keep_last=1, any_user=True))


# What is not there


def test_records_without_a_snapshot_count_for_nothing(catalog: Catalog, series: Callable[..., list[Snapshot]], take: Take) -> None:
    """Gone, replaced, or on another machine: else the ones that are there would go instead."""
    taken = series(0.9, 0.8, 0.7, 0.6, 0.5)
    shutil.rmtree(taken[4].path)
    take(catalog, "3", step=10, metrics={"loss": 1.0}, overwrite=True)
    plan = catalog.prune(keep_last=2, keep_best=("loss", "min", 1))

    assert [0, 1] == going(plan)
    found = why(plan)
    assert ("among the newest 2", "among the best 1 by loss") == found[2]
    assert ("replaced: another snapshot is at its place",) == found[3]
    assert "expstate check" in found[4][0]


def test_snapshots_on_other_machines_are_left_alone(
    catalog: Catalog, series: Callable[..., list[Snapshot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason names the machine."""
    taken = series(0.1, 0.2)
    host = catalog["latest"].locations[0].host
    monkeypatch.setattr(model.socket, "gethostname", lambda: "another")
    plan = catalog.prune(keep_last=1)

    assert [] == going(plan)
    assert {(f"on the disk of {host!r}",)} == set(why(plan).values())
    assert all(snapshot.verify().ok for snapshot in taken)


# Applying


def test_a_plan_is_applied_when_that_is_asked(any_catalog: Catalog, take: Take) -> None:
    """Not before, and then it is done as it was shown."""
    taken = [take(any_catalog, f"{step}", step=step) for step in range(4)]
    plan = any_catalog.prune(keep_last=1)

    assert [0, 1, 2, 3] == steps(any_catalog)
    report = plan.apply()
    assert ([2, 1, 0], ()) == ([record.step for record in report.deleted], report.skipped)
    assert plan.nbytes == report.nbytes == 3 * 16
    assert [False, False, False, True] == [Path(snapshot.path).exists() for snapshot in taken]
    assert [3] == steps(any_catalog)
    assert any_catalog.check().ok


def test_what_has_changed_since_the_plan_is_left_alone(any_catalog: Catalog, take: Take) -> None:
    """Pinned, given an alias, tagged, annotated or deleted; the rest goes."""
    taken = [take(any_catalog, f"{step}", step=step, metrics={"loss": NAN}) for step in range(7)]
    plan = any_catalog.prune(keep_last=1)
    any_catalog.pin(taken[0].id)
    any_catalog.alias(taken[1].id, "best")
    any_catalog.tag(taken[2].id, "good")
    any_catalog.log_metric(taken[3].id, "loss", 0.1)
    any_catalog.delete(taken[4].id)
    report = plan.apply()

    assert [5] == [record.step for record in report.deleted]
    assert {
        0: "it is pinned by now",
        1: "it is alias 'best' by now",
        2: "it is tagged 'good' by now",
        3: "it was changed since the plan was made",
        4: "it is not recorded any more",
    } == {skipped.record.step: skipped.reason for skipped in report.skipped}
    assert [0, 1, 2, 3, 6] == steps(any_catalog)
    assert all(taken[step].verify().ok for step in (0, 1, 2, 3, 6))


@pytest.mark.parametrize("what", ["pin", "tags"])
def test_what_somebody_has_added_in_a_folder_alone_counts(catalog: Catalog, series: Callable[..., list[Snapshot]], what: str) -> None:
    """They may have a catalog of their own."""
    taken = series(0.1, 0.2, 0.3)
    mark = Mark(1, present=True)
    theirs = Annotations(format=1, id=taken[0].id, **{what: mark if what == "pin" else {"good": mark}})
    Path(taken[0].path, names.ANNOTATIONS).write_bytes(added.encode(theirs))
    report = catalog.prune(keep_last=1).apply()

    assert [1] == [record.step for record in report.deleted]
    assert [0] == [skipped.record.step for skipped in report.skipped]
    assert taken[0].verify().ok


def test_what_has_been_replaced_since_the_plan_is_not_harmed(catalog: Catalog, series: Callable[..., list[Snapshot]], take: Take) -> None:
    """The plan was of what lay there before."""
    series(0.1, 0.2)
    plan = catalog.prune(keep_last=1)
    new = take(None, "0", step=5, overwrite=True)
    plan.apply()

    assert new.verify().ok


def test_an_interrupted_prune_has_deleted_whole_snapshots(
    catalog: Catalog, series: Callable[..., list[Snapshot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are as they were, and the plan made again says so."""
    taken = series(*[0.1] * 5)
    plan = catalog.prune(keep_last=1)
    really_delete, count = LocalStorage.delete, 0

    def delete(storage: LocalStorage, name: str, **named: Any) -> None:
        nonlocal count
        count += name == names.MANIFEST
        if count == 3:
            raise KeyboardInterrupt
        really_delete(storage, name, **named)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "delete", delete)
        with pytest.raises(KeyboardInterrupt):
            plan.apply()

    assert [0, 1, 4] == steps(catalog)
    assert all(taken[step].verify().ok for step in (0, 1, 4))
    assert catalog.check().ok
    assert [0, 1] == going(catalog.prune(keep_last=1))


def test_one_that_cannot_be_deleted_does_not_keep_the_others(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """It is reported with the reason."""
    taken = series(0.1, 0.2, 0.3)
    plan = catalog.prune(keep_last=1)
    forge(taken[0], world_size=2)
    report = plan.apply()

    assert [1] == [record.step for record in report.deleted]
    (skipped,) = report.skipped
    assert "not what was recorded" in skipped.reason
    assert "left alone" in str(report)


def test_progress_is_told(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """In bytes of the snapshots."""
    series(0.1, 0.2, 0.3)
    told: list[Any] = []
    catalog.prune(keep_last=1).apply(progress=told.append)

    assert [("prune", 16, 32), ("prune", 32, 32)] == [(update.operation, update.done_bytes, update.total_bytes) for update in told]
    with pytest.raises(InvalidArgumentError, match="progress"):
        catalog.prune(keep_last=1).apply(progress="yes")  # type: ignore[arg-type]


# For people


def test_a_plan_is_frozen(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """What is shown is what is applied."""
    series(0.1, 0.2)
    plan = catalog.prune(keep_last=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.delete = ()  # type: ignore[misc, assignment]


def test_a_plan_shows_what_goes_and_what_stays(catalog: Catalog, series: Callable[..., list[Snapshot]]) -> None:
    """As text, as a table and as plain values."""
    taken = series(0.1, 0.2)
    plan = catalog.prune(keep_last=1)

    assert "would delete 1 snapshot (16 B) and keep 1" in str(plan)
    assert f"{taken[0].id[:8]}, step 0, 16 B: delete" in str(plan)
    assert f"{taken[1].id[:8]}, step 1, 16 B: keep: among the newest 1" in str(plan)
    assert "<table>" in plan._repr_html_()
    assert {
        "project": "tests",
        "delete": [{"id": taken[0].id, "name": None, "step": 0, "url": taken[0].path, "nbytes": 16}],
        "keep": [{"id": taken[1].id, "name": None, "step": 1, "url": taken[1].path, "nbytes": 16, "reasons": ["among the newest 1"]}],
        "nbytes": 16,
        "nbytes_freed": taken[0].nbytes_unique,
    } == plan.to_dict()
    assert [taken[0].id] == [found["id"] for found in plan.apply().to_dict()["deleted"]]


def test_hostile_names_are_inert(catalog: Catalog, take: Take) -> None:
    """In a terminal and in a notebook."""
    for folder in ("a", "b"):
        hostile = take(None, folder)
        forge(hostile, metadata={"name": "\x1b[31m<script>alert(1)</script>", "tags": ["\x1b]0;<b>"] if folder == "b" else []})
        catalog.scan(hostile.path)
    plan = catalog.prune(older_than="0s")
    shown = [str(plan), plan._repr_html_()]
    report = plan.apply()
    shown += [str(report), report._repr_html_()]

    assert 1 == len(report.deleted)
    assert not any("\x1b" in text for text in shown)
    assert not any("<script>" in text or "<b>alert" in text for text in shown[1::2])
    assert "%1B[31m<script>" in shown[0]
