"""The benchmark of several ranks, small: ranks are started for each step, every byte is looked at, and nothing is left behind."""

from __future__ import annotations

import argparse
import multiprocessing

import msgspec
import pytest

from expstate.bench import ranks, run, simulated
from expstate.bench.child import perform
from expstate.bench.options import add_arguments, options_from
from expstate.bench.plan import MIB, RANKS, Outcome, Task, Workload, contenders, operation_names

OPERATIONS = operation_names(device=False, benchmark=RANKS)
BY_TWO = [name for name in OPERATIONS if not name.endswith("_1024")]
SMALL = ["--repeat", "1", "--gib", "0.02", "--tensors", "20", "--ranks", "8", "--small-tensors", "5"]


def _options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(["ranks", *map(str, words)]))


def _measure(folder, *words):
    with pytest.MonkeyPatch.context() as patch:
        # One setting each: which is best is not looked at here.
        patch.setattr(run, "contenders", lambda *names, **options: contenders(*names, **options)[:1])
        records = run.run(_options(folder, *SMALL, *words), execute=perform)
    assert [] == list(folder.iterdir())
    return {(record.operation, record.system): record for record in records}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return _measure(tmp_path_factory.mktemp("bench"), "--systems", "limit", "expstate")


@pytest.fixture
def task(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "now"
    kept.mkdir()
    folder.mkdir()
    return Task("take_sharded", "expstate", Workload(4 * MIB, 5, 5, ranks=8), str(folder), str(kept))


def test_every_operation_is_measured_and_nothing_fails(found):
    expected = {(operation, "expstate") for operation in OPERATIONS} | {(operation, "limit") for operation in BY_TWO}

    assert {} == {key: record.error for key, record in found.items() if record.error}
    assert expected == found.keys()


def test_what_two_ranks_move_is_compared_with_what_two_processes_can(found):
    rows = [found[operation, "expstate"] for operation in BY_TWO]

    assert all(row.ratio_to_limit > 0 and row.gib_per_s > 0 for row in rows)
    assert all(found[operation, "limit"].ratio_to_limit == 1 for operation in BY_TWO)


def test_the_ranks_of_a_take_write_as_much_each_and_nothing_twice(found):
    for operation in ("take_replicated", "take_sharded"):
        (needed,) = found[operation, "expstate"].figures["of_needed"]
        shares = [share for number in (0, 1) for share in found[operation, "expstate"].figures[f"share_of_rank_{number}"]]

        assert 1 <= needed < 1.05
        assert 1 == pytest.approx(sum(shares))
        assert all(0.45 < share < 0.55 for share in shares)


def test_a_restore_in_the_same_shards_reads_nothing_twice(found):
    for operation in ("restore_sharded", "reshard_2_to_1"):
        (needed,) = found[operation, "expstate"].figures["of_needed"]

        assert 1 <= needed < 1.1


def test_the_manifest_of_simulated_ranks_is_told_in_bytes(found):
    merged, planned = (found[operation, "expstate"] for operation in ("merge_1024", "plan_1024"))

    assert merged.figures["manifest_bytes"][0] > 8 * 5 * 32
    assert {"merge", "validate", "encode"} == merged.parts.keys()
    assert {"manifest", "restore"} == planned.parts.keys()
    assert [40] == planned.figures["boxes"]


def test_dcp_takes_part(tmp_path):
    records = _measure(tmp_path, "--systems", "dcp", "--operations", "take_replicated", "reshard_1_to_2")

    assert [""] * 2 == [record.error for record in records.values()]
    assert [("take_replicated", "dcp"), ("reshard_1_to_2", "dcp")] == list(records)


def test_a_rank_that_fails_is_named(task):
    """Here nothing was prepared for it."""
    outcome = perform(msgspec.structs.replace(task, operation="restore_sharded"))

    assert outcome.error.startswith("rank 0: SnapshotNotFoundError: ")


def test_a_rank_that_dies_is_named_and_the_others_are_ended(task, monkeypatch):
    before = multiprocessing.active_children()
    monkeypatch.setattr(ranks, "_AFTER_FAILURE_SECONDS", 0.1)
    monkeypatch.setattr(ranks.rank, "main", _die)

    assert "has died" in perform(task).error
    assert before == multiprocessing.active_children()


def _die(encoded, place, port, connection):
    import os
    import time

    if place.rank == 0:
        os._exit(1)
    time.sleep(60)


def test_a_restore_that_changes_a_byte_is_no_result(task):
    prepare = msgspec.structs.replace(task, operation="prepare_reshard_2_to_1")
    assert "" == perform(prepare).error
    restore = msgspec.structs.replace(task, operation="reshard_2_to_1")
    other = msgspec.structs.replace(restore, workload=msgspec.structs.replace(task.workload, tensors=6))

    assert "" == perform(restore).error
    assert "rank 0: " in perform(other).error


def test_boxes_that_are_lost_in_merging_are_no_result(task, monkeypatch):
    whole = simulated.merging.merge

    def lossy(parts):
        files, entries = whole(parts)
        return files, entries[:-1]

    merge = msgspec.structs.replace(task, operation="merge_1024")
    assert "" == perform(merge).error
    monkeypatch.setattr(simulated.merging, "merge", lossy)
    assert "32 boxes, and the ranks have written 40" in perform(merge).error


def test_words_that_do_not_go_together_are_refused(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match="only follows the word ranks"):
        options_from(parser.parse_args([str(tmp_path), str(tmp_path)]))
    with pytest.raises(ValueError, match="merge_1024: only with `bench ranks`"):
        options_from(parser.parse_args([str(tmp_path), "--operations", "merge_1024", "--gib", "0.02"]))
    with pytest.raises(ValueError, match="is no folder"):
        _options(tmp_path / "missing")
    with pytest.raises(ValueError, match="at least 1"):
        _options(tmp_path, "--ranks", "0")


def test_the_folder_is_the_current_one_unless_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = _options("--gib", "0.02")

    assert (".", 1000, 1024) == (str(options.path), options.workload.small_tensors, options.workload.ranks)
    assert ["limit", "expstate", "dcp"] == options.systems
    assert tmp_path == _options(tmp_path, "--gib", "0.02").path


def test_two_ranks_count_as_fast_as_the_slower_and_cost_as_much_as_both(task, monkeypatch):
    of_ranks = [
        Outcome(1.0, 2.0, 10, figures={"read_bytes": 1.0, "written_bytes": 3.0 * MIB}),
        Outcome(3.0, 4.0, 20, figures={"read_bytes": 1.0, "written_bytes": 1.0 * MIB}),
    ]
    monkeypatch.setattr(ranks, "_run", lambda *given: of_ranks)
    together = perform(task)

    assert (3.0, 6.0, 30, 4 * MIB) == (together.seconds, together.cpu_seconds, together.peak_extra_bytes, together.bytes)
    assert {"written_bytes": 4.0 * MIB, "of_needed": 1.0, "share_of_rank_0": 0.75, "share_of_rank_1": 0.25} == together.figures
