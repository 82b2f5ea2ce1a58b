"""What is found is shown as it is: lists with the columns that matter, all about one snapshot, values, differences, files."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expstate import Snapshot, StateDict
from expstate.commands import columns
from expstate.commands.texts import age_text

from .conftest import EPOCHS, Done, Project

Run = Callable[[str], Done]


def column(text: str, title: str) -> list[str]:
    """What stands below a title, in a table whose columns are two spaces apart."""
    head, *rows = text.splitlines()
    end = head.index(title) + len(title)
    start = head.index(title)
    return [row[max(0, start - 12) : end].split("  ")[-1].strip() for row in rows if not row.startswith("and ")]


# list


def test_list_shows_the_newest_first_with_the_columns_that_say_something(kept: Project, run: Run) -> None:
    text = run("list").out

    assert ["name", "id", "age", "step", "size", "tags", "aliases", "loss", "accuracy"] == text.splitlines()[0].split()
    assert ["epoch-4", "epoch-3", "epoch-2", "epoch-1"] == [line.split()[0] for line in text.splitlines()[1:]]
    assert ["0.2", "0.1", "0.312346", "0.9"] == column(text, "loss")


def test_list_takes_a_query_a_sort_and_a_limit(kept: Project, run: Run) -> None:
    found = run("list 'loss < 0.5 and not tag = broken' --sort loss:desc --limit 2 --json").json

    assert ["epoch-2", "epoch-4"] == [record["name"] for record in found]
    assert [0.31234567891, 0.2] == [record["metrics"]["loss"] for record in found]
    assert "no snapshots in project 'digits' fulfil the query\n" == run("list 'loss > 7'").out


def test_metrics_of_the_question_come_first(project: Project, run: Run) -> None:
    for name in ("a", "b", "c", "d", "e"):
        project.catalog.log_metric("latest", name, 1)
    assert "e" not in run("list").out.splitlines()[0].split()
    assert "e" == run("list 'e > 0'").out.splitlines()[0].split()[-4]


def test_columns_are_those_that_are_asked_for(kept: Project, run: Run) -> None:
    text = run("list --columns id,param.lr,optimizer,metric.loss,alias,nbytes --limit 1").out

    assert ["id", "param.lr", "optimizer", "metric.loss", "aliases", "size"] == text.splitlines()[0].split()
    assert ["0.001", "adam", "0.2"] == text.splitlines()[1].split()[1:4]


@pytest.mark.parametrize("name", sorted(columns.FIELDS))
def test_every_field_can_be_a_column(kept: Project, run: Run, name: str) -> None:
    assert name == run(f"list --columns {name}").out.splitlines()[0].strip()


def test_a_list_that_was_cut_says_so_unless_that_was_asked_for(project: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from expstate.commands import finding

    monkeypatch.setattr(finding, "_SHOWN", 3)
    assert "and 1 more; --limit 0 shows all" == run("list").out.splitlines()[-1]
    assert 5 == len(run("list --limit 0").out.splitlines())
    assert 3 == len(run("list --limit 2").out.splitlines())
    assert 4 == len(run("list --json").json)


def test_projects_are_apart_unless_all_are_asked_for(project: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_PROJECT", "other")
    first, next_step = run("list").out.splitlines()
    assert "no snapshots in project 'other'" == first
    assert "--all" in next_step
    assert "`expstate scan`" in next_step
    assert "project" in run("list --all").out.splitlines()[0].split()
    assert 4 == len(run("list --json --project digits").json)
    assert 1 == run("show best").status
    assert "--project 'digits'" in run("show best").err
    for line in ("show best --all", "show best --project digits", "read best progress/epoch --all", "verify best --all", "log best --all"):
        assert 0 == run(line).status


def test_another_catalog_can_be_named(kept: Project, run: Run, tmp_path: Path) -> None:
    assert [] == run(f"list --json --catalog {tmp_path}/empty.db").json
    assert 4 == len(run(f"list --json --catalog sqlite:///{kept.url}").json)


@pytest.mark.parametrize(("seconds", "text"), [(-5, "0s"), (59, "59s"), (3600, "1h"), (86399, "23h"), (86400, "1d"), (800 * 86400, "2y")])
def test_ages_are_in_their_largest_unit(seconds: int, text: str) -> None:
    now = dt.datetime(2026, 11, 24, tzinfo=dt.timezone.utc)

    assert text == age_text(now - dt.timedelta(seconds=seconds), now)


# show and log


def test_show_tells_all_about_a_snapshot(project: Project, run: Run) -> None:
    project.catalog.note("best", "first line\nsecond line")
    project.catalog.pin("best")
    text = run("show best").out
    record = project.catalog["best"]

    for part in (record.id, record.parent, "digits", "epoch-3", "first line\n", "  second line", "pinned", str(project.path(3))):
        assert str(part) in text
    assert "metric loss      0.1\n" in text
    assert "param lr         0.001\n" in text
    assert "torch.nn.modules.container.Sequential" in text
    found = run("show best --json").json
    assert (record.id, {"lr": 1e-3, "optimizer": "adam"}) == (found["id"], found["params"])
    assert importlib.metadata.version("torch") == found["packages"]["torch"]
    assert found["created_at"] == record.created_at.isoformat()


def test_show_lists_entries(kept: Project, run: Run) -> None:
    text = run("show best '*weight'").out

    assert ["model/0.weight", "model/2.weight"] == [line.split()[0] for line in text.splitlines()[1:]]
    (entry,) = run("show best progress/epoch --json").json["entries"]
    assert ("progress/epoch", "value", "int", "3") == (entry["path"], entry["kind"], entry["type"], entry["shape_or_value"])


def test_a_snapshot_that_is_in_no_catalog_is_shown_by_its_path(kept: Project, run: Run, tmp_path: Path) -> None:
    project_free = Snapshot.take(tmp_path / "alone", {"progress": StateDict(epoch=9)}, name="alone", tags=["x"], catalog=False)
    for place in ("", f"--catalog {tmp_path}/empty.db", "--catalog off"):
        found = run(f"show {tmp_path}/alone --json {place}").json
        assert (project_free.id, "alone", ["x"]) == (found["id"], found["name"], found["tags"])
        assert "9\n" == run(f"read {tmp_path}/alone progress/epoch {place}").out


def test_log_draws_the_lineage(kept: Project, run: Run) -> None:
    text = run("log epoch-2").out

    assert [1, 2, 3, 4] == [int(line.split()[-1]) for line in text.splitlines()]
    assert 4 == len(run("log epoch-2 --json").json["snapshots"])


# read and diff


def test_read_prints_values_and_small_tensors_whole(kept: Project, run: Run) -> None:
    expected = Snapshot.find("best").read_object("model/2.bias")

    assert "3\n" == run("read best progress/epoch").out
    assert "{'epoch': 3}\n" == run("read best progress").out
    assert f"float32 (3,), 12 B\n{expected!r}\n" == run("read best model/2.bias").out
    found = run("read best model/2.bias --rows 1:3 --json").json
    assert {"path": "model/2.bias", "type": "tensor", "dtype": "float32", "shape": [2], "value": expected[1:].tolist()} == found
    assert expected[1].item() == run("read best model/2.bias --rows 1 --json").json["value"][0]


def test_read_sums_large_tensors_up(project: Project, run: Run) -> None:
    large = torch.arange(20_000.0)
    large[0], large[1] = float("nan"), float("inf")
    Snapshot.take(project.folder / "large", {"s": StateDict(t=large)}, name="large")
    lines = dict(line.split(None, 1) for line in run("read large s/t").out.splitlines()[1:-1])
    found = run("read large s/t --json").json

    assert ("2", "19999", "1", "1", "0") == tuple(lines[name] for name in ("min", "max", "nan", "inf", "zero"))
    assert (2.0, 19999.0, 1, None) == (found["min"], found["max"], found["nan"], found["value"])


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
        torch.tensor([1 + 2j]),
        torch.ones((), dtype=torch.bool),
        torch.zeros(0, 3),
        torch.eye(2).to_sparse(),
        np.arange(3, dtype="<u2"),
        np.array(["a", "b"]),
        {"nested": [torch.ones(1), float("nan"), b"x", 2**70]},
        "text \x1b[31m",
        dt.date(2026, 11, 24),
    ],
    ids=str,
)
def test_read_takes_every_kind_of_value(project: Project, run: Run, value: object) -> None:
    Snapshot.take(project.folder / "odd", {"s": StateDict(v=value)}, name="odd")
    done = run("read odd s/v")

    assert (0, "") == (done.status, done.err)
    assert "\x1b" not in done.out
    assert "s/v" == run("read odd s/v --json").json["path"]


def test_read_writes_an_array_for_others_once(project: Project, run: Run) -> None:
    assert 0 == run("read best model/0.weight --out w.npy").status
    assert np.array_equal(np.load("w.npy", allow_pickle=False), Snapshot.find("best").read_object("model/0.weight").numpy())
    assert 1 == run("read best model/0.bias --out w.npy").status
    assert (16, 8) == np.load("w.npy").shape


def test_diff_shows_each_entry_that_differs(kept: Project, run: Run) -> None:
    lines = run("diff first best").out.splitlines()

    assert lines[0].startswith("epoch-1 -> epoch-3: ")
    assert "    metric.loss 0.9 -> 0.1".strip() in [line.strip() for line in lines]
    assert ["model/2.weight  changed  content differs", "progress/epoch  changed  1 -> 3"] == lines[-2:]
    assert ["progress/epoch  changed  1 -> 3"] == run("diff first best --only 'progress/*'").out.splitlines()[-1:]
    assert ["model/2.weight"] == [row["entry"] for row in run("diff first best --only 'model/*' --json").json["entries"]]


def test_diff_shows_as_many_entries_as_it_is_told(kept: Project, run: Run) -> None:
    lines = run("diff first best --top 1").out.splitlines()
    assert "model/2.weight  changed  content differs" == lines[-2]
    assert "and 1 more, listed by --json" == lines[-1]
    assert 2 == len(run("diff first best --top 1 --json").json["entries"])
    assert "top must be at least 1" in run("diff first best --top 0").err


def test_diff_is_with_the_latest_unless_another_is_named(kept: Project, run: Run) -> None:
    assert run("diff first").out.startswith("epoch-1 -> epoch-4: ")


def test_diff_measures_when_it_is_asked_to(kept: Project, run: Run) -> None:
    head, row = run("diff first best --stats --only 'model/*'").out.splitlines()[-2:]
    found = run("diff first best --stats --json").json["entries"][0]["statistics"]

    assert ["relative", "max", "cosine", "share"] == head.split()[-4:]
    assert ["0.2", "1"] == [row.split()[3], row.split()[-1]]
    assert pytest.approx(0.2, rel=1e-4) == found["max_abs"]


# What people add, and what is made of snapshots


def test_marks_are_made_and_taken_back(project: Project, run: Run) -> None:
    for line, expected in [
        ("tag best a b", "tags: a, b"),
        ("untag best a", "tags: b"),
        ("alias latest newest", "aliases: newest"),
        ("unalias newest", "aliases: none"),
        ("pin latest", ": pinned"),
        ("unpin latest", "not pinned"),
        ("note best 'all is well'", "note: all is well"),
        ("note best ''", "note: none"),
        ("metric best f1 0.75", "f1 0.75"),
        ("metric best f1 nan", "f1 nan"),
        ("metric best count 12", "count 12"),
    ]:
        done = run(line)
        assert (0, "") == (done.status, done.err)
        assert expected in done.out
    record = project.catalog["best"]
    assert (("b",), 12, None) == (record.tags, record.metrics["count"], record.note)
    assert "nan" == run("metric best f1 nan --json").json["metrics"]["f1"]


def test_copy_and_export_write_where_they_are_told_and_never_twice(project: Project, run: Run) -> None:
    copied = run("copy best archive/best --json").json
    assert (Snapshot.find("best").id, str(project.folder / "archive/best")) == (copied["id"], copied["url"])
    assert Snapshot("archive/best").verify().ok
    assert 1 == run("copy best archive/best").status

    exported = run("export best out").out
    assert "left out, as no tensors: progress/epoch" in exported
    assert ["model.safetensors"] == os.listdir("out")
    assert torch.equal(Snapshot.find("best").read_object("model/0.bias"), load_file("out/model.safetensors")["0.bias"])
    assert 1 == run("export best out").status
    assert ["0.bias"] == list(load_file(run("export best b.safetensors --include model/0.bias --json").json["files"][0]))


def test_copy_can_leave_provenance_behind(project: Project, run: Run) -> None:
    run("copy best bare --no-provenance")

    assert {} == Snapshot("bare").metadata.provenance
    assert project.catalog["best"].provenance


def test_scan_enters_what_is_in_a_folder(project: Project, run: Run, tmp_path: Path) -> None:
    empty = tmp_path / "empty.db"
    assert 4 == len(run(f"scan . --catalog {empty} --json").json["entered"])
    assert len(EPOCHS) == len(run(f"list --json --catalog {empty} --project digits").json)


def test_status_tells_what_the_catalog_holds(kept: Project, run: Run) -> None:
    assert kept.url in run("status").out
    assert {"digits": 4} == run("status --json").json["records"]


def test_diff_tells_of_nan_that_came(project: Project, run: Run) -> None:
    state = StateDict(weight=torch.ones(4), bias=torch.zeros(2))
    Snapshot.take(project.folder / "well", {"model": state}, name="well")
    state["weight"][0] = float("nan")
    Snapshot.take(project.folder / "ill", {"model": state}, name="ill")

    assert re.search(r"^model/weight +changed +NaN 0 -> 1 ", run("diff well ill --stats").out, flags=re.MULTILINE)
