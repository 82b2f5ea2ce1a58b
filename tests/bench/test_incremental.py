"""The benchmark of incremental takes, small: every operation is there, its bytes are those on the disk, and nothing is left behind."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from expstate import Snapshot
from expstate.bench import incremental, run, state, training
from expstate.bench.child import perform
from expstate.bench.measure import bytes_of_files, disk_usage
from expstate.bench.options import add_arguments, options_from
from expstate.bench.plan import INCREMENTAL, MIB, OPERATIONS, Outcome, Task, Workload, contenders, operation_names
from expstate.bench.report import Record, records, table

SMALL = ["--repeat", "1", "--gib", "0.02", "--tensors", "20"]
ALL = operation_names(device=False, benchmark=INCREMENTAL)


def _parsed(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*map(str, words)])


@pytest.fixture(scope="module", autouse=True)
def _small():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TAKES", 3)
        patch.setattr(training, "EVERY", 2)
        patch.setattr(training, "STEPS_TRAINED", 5)
        patch.setattr(training, "RUNS", 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "contenders", lambda *names, **options: contenders(*names, **options)[:1])
        measured = run.run(options_from(_parsed(INCREMENTAL, folder, *SMALL)), execute=perform)
    assert [] == list(folder.iterdir())
    return {(record.operation, record.system): record for record in measured}


@pytest.fixture
def task(tmp_path):
    folder = tmp_path / "now"
    folder.mkdir()
    return Task("unchanged", "expstate", Workload(4 * MIB, 5, 5), str(folder))


def test_every_operation_is_measured_and_nothing_fails(found):
    expected = {("full", "limit"), *((operation, "expstate") for operation in ALL)}

    assert {} == {key: record.error for key, record in found.items() if record.error}
    assert expected == found.keys()
    assert ["full", "unchanged", "one_percent", "detect", "stall", "finetune_disk", "autosave"] == ALL


def test_every_target_on_the_host_has_a_figure(found):
    on_device = {"of_device_copy", "of_device_copy_without_base", "of_transfer", "of_transfer_without_base"}
    for operation in ALL:
        wanted = {target.figure for target in OPERATIONS[operation].targets} - on_device
        record = found[operation, "expstate"]

        assert record.left_out or wanted <= record.figures.keys()


def test_json_holds_the_records(found):
    data = msgspec.json.encode(list(found.values()))

    assert list(found.values()) == msgspec.json.decode(data, type=list[Record])
    assert ALL == list(dict.fromkeys(row["operation"] for row in msgspec.json.decode(data)))


def _size_of_own(folder):
    """Bytes of the files that lie beside the manifest, and of that."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def test_bytes_written_are_those_of_files_that_the_take_has_made(task):
    for operation, changed in (("unchanged", 0), ("one_percent", task.workload.total_bytes // 100)):
        outcome = perform(msgspec.structs.replace(task, operation=operation))
        second = Path(task.folder) / incremental.SECOND

        assert "" == outcome.error
        assert _size_of_own(second) == outcome.figures["bytes_written"]
        assert 0.9 * changed <= outcome.figures["bytes_written"] <= changed + 64 * 1024
        assert [True] == [file.stat().st_size > 0.9 * task.workload.total_bytes for file in second.glob("base/*")]
        shutil.rmtree(second)


def test_a_full_take_writes_everything(found):
    assert all(0.02 * 2**30 < written < 0.021 * 2**30 for written in found["full", "expstate"].figures["bytes_written"])


def test_adapters_are_one_percent_of_a_state_of_the_same_size():
    workload = Workload(20 * MIB, 10, 1)
    live, adapters = state.adapted_state(workload)

    assert workload.total_bytes == live.nbytes
    assert 0.0095 < adapters.nbytes / live.nbytes <= 0.01
    assert all(live.tensors[name] is tensor for name, tensor in adapters.tensors.items())


def test_files_with_several_names_count_once(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "base").mkdir(parents=True)
    (one / "data").write_bytes(bytes(100_000))
    os.link(one / "data", two / "base" / "linked")
    (two / "manifest").write_bytes(bytes(1000))

    assert (100_000, 101_000, 1000) == (bytes_of_files(one), bytes_of_files(two), bytes_of_files(two, one))
    assert 101_000 == bytes_of_files(tmp_path)
    assert disk_usage(one) <= disk_usage(tmp_path) < disk_usage(one) + disk_usage(two)
    (two / "base" / "linked").unlink()
    (two / "base" / "copied").write_bytes(bytes(100_000))
    assert 101_000 == bytes_of_files(two, one)


@pytest.mark.parametrize("operation", ["unchanged", "one_percent", "stall"])
def test_a_snapshot_that_does_not_bring_everything_back_is_no_result(task, monkeypatch, operation):
    task = msgspec.structs.replace(task, operation=operation)
    assert "" == perform(task).error
    monkeypatch.setattr(Snapshot, "restore", lambda *given, **options: None)
    _empty(task)
    assert "differ after the restore" in perform(task).error


def _empty(task):
    for folder in Path(task.folder).iterdir():
        shutil.rmtree(folder)


def test_a_change_that_is_not_noticed_or_one_that_is_not_there_is_no_result(task, monkeypatch):
    task = msgspec.structs.replace(task, operation="detect")
    assert "" == perform(task).error
    for what in ("_change", "unchanged.compare"):
        with monkeypatch.context() as patch:
            patch.setattr(f"expstate.bench.incremental.{what}", lambda *given, **options: None)
            _empty(task)
            assert "were told rightly" in perform(task).error


@pytest.mark.parametrize("operation", ["finetune_disk", "autosave"])
def test_what_needs_a_package_that_is_missing_is_left_out_with_the_reason(tmp_path, monkeypatch, operation):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in {"transformers", "sklearn"} else object())
    asked = []

    def execute(task):
        asked.append(task)
        return perform(task)

    options = options_from(_parsed(INCREMENTAL, tmp_path, *SMALL[2:], "--repeat", 3, "--systems", "expstate", "--operations", operation))
    (record,) = run.run(options, execute=execute)

    assert ([], "", 1) == (record.seconds, record.error, len(asked))
    assert record.left_out.startswith("needs what is not installed: ")
    text = table([record])
    assert text.splitlines()[-1] == f"{operation} expstate: left out: {record.left_out}"
    assert text.splitlines()[2].split() == [operation, "expstate", "left", "out"]


def test_the_table_says_which_targets_are_met():
    outcomes = [Outcome(1.0, figures={"times_as_fast": times, "bytes_written": 3.0 * MIB}) for times in (3.0, 3.5, 4.0)]
    text = table(records({("unchanged", "expstate", "", ""): outcomes}))

    assert "times_as_fast 3.500 (target: at least 3.5, met), bytes_written 3,145,728 (target: at most 2,097,152, missed)" in text


def test_words_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only follows the word ranks or incremental"):
        options_from(_parsed("catalog", tmp_path))
    with pytest.raises(ValueError, match="stall: only with `bench incremental`"):
        options_from(_parsed(tmp_path, "--operations", "stall", "--gib", "0.02"))
    with pytest.raises(ValueError, match="finds"):
        options_from(_parsed(INCREMENTAL, tmp_path, "--device", "meta"))
    assert tmp_path == options_from(_parsed(INCREMENTAL, tmp_path, *SMALL)).path
