"""Whole runs of the notebook's benchmark, small: every step does what it says, is checked, and leaves nothing behind."""

from __future__ import annotations

import argparse

import msgspec
import pytest

from expstate.bench import run
from expstate.bench.child import perform
from expstate.bench.options import add_arguments, options_from
from expstate.bench.plan import MIB, NOTEBOOK, OPERATIONS, Task, Workload, operation_names

SMALL = ["--repeat", "1", "--gib", "0.005", "--records", "300", "--small-tensors", "25"]


def _options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(["notebook", *words]))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        records = run.run(_options(*SMALL), execute=perform)
    assert [] == list(folder.iterdir())
    return records


def test_every_operation_is_measured_and_nothing_fails(found):
    assert {} == {(record.operation, record.system): record.error for record in found if record.error}
    assert operation_names(device=False, benchmark=NOTEBOOK) == [record.operation for record in found if record.system == "expstate"]
    assert ["take_cell", "status"] == [record.operation for record in found if record.system == "limit"]


def test_what_moves_bytes_is_compared_with_a_limit(found):
    of_bytes = {record.operation: record for record in found if record.system == "expstate" and record.gib_per_s is not None}

    assert {"take_cell", "status"} == of_bytes.keys()
    assert all(record.ratio_to_limit > 0 for record in of_bytes.values())


def test_browsing_says_what_it_is_made_of(found):
    (browse,) = [record for record in found if record.operation == "browse"]

    assert {"filter", "sort", "last row", "tree"} == browse.parts.keys()
    assert all(min(seconds) > 0 for seconds in browse.parts.values())


def test_other_rows_than_were_prepared_are_no_result(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "now"
    kept.mkdir()
    folder.mkdir()
    task = Task("prepare_browse", "expstate", Workload(4 * MIB, 5, 25, records=30), str(folder), str(kept))
    assert "" == perform(task).error
    more = msgspec.structs.replace(task.workload, records=60)

    assert "" == perform(msgspec.structs.replace(task, operation="browse")).error
    assert "instead of" in perform(msgspec.structs.replace(task, operation="browse", workload=more)).error


def test_a_model_of_one_gib_is_taken_unless_another_size_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = _options()

    assert 1024 * MIB == options.workload.total_bytes
    assert {NOTEBOOK} == {OPERATIONS[name].benchmark for name in options.operations}
    assert ["limit", "expstate"] == options.systems
    with pytest.raises(ValueError, match="status: only with `bench notebook`"):
        options_from(_parsed(str(tmp_path), "--gib", "0.02", "--operations", "status"))


def _parsed(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)
