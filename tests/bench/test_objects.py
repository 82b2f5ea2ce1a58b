"""The benchmark of a bucket, small: every system takes part by its own way, is verified, and leaves nothing behind."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import uuid

import msgspec
import pytest
from torch.distributed.checkpoint import staging

from expstate.bench import object_limits, places, run
from expstate.bench.child import perform
from expstate.bench.measure import Meter
from expstate.bench.options import add_arguments, options_from
from expstate.bench.plan import GIB, MIB, MODULES, OBJECTS, STORAGE_OPTIONS, SYSTEMS, Outcome, contenders, operation_names
from expstate.cli import main
from tests.objects.conftest import gcs_server, s3_server  # noqa: F401 - fixtures
from tests.objects.servers import GcsServer, S3Server, close_filesystem, open_filesystem

pytest.importorskip("s3fs")

OPERATIONS = operation_names(device=False, benchmark=OBJECTS)
INSTALLED = [system for system in SYSTEMS if system == "limit" or importlib.util.find_spec(MODULES[system])]
# It finds a bucket by the environment alone.
MEASURED = [system for system in INSTALLED if system != "torchsnapshot"]


def _close_all(kind):
    """Those of the steps, which end with their processes elsewhere."""
    for filesystem in list(kind._cache.values()):
        close_filesystem(filesystem)
    kind.clear_instance_cache()


@pytest.fixture(scope="module")
def server(s3_server: S3Server):  # noqa: F811 - the fixture
    yield s3_server
    import s3fs

    _close_all(s3fs.S3FileSystem)


@pytest.fixture(scope="module")
def bucket(server):
    name = f"bench-{uuid.uuid4().hex[:12]}"
    server.make_bucket(name)
    yield name
    server.remove_bucket(name)


@pytest.fixture
def keys(server, bucket):
    """A function that gives the names of all objects in the bucket."""
    with open_filesystem("s3", **server.storage_options()) as filesystem:
        yield lambda: filesystem.find(bucket)


def _options(server, bucket, *words, scheme="s3"):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--storage-options", json.dumps(server.storage_options())]
    return options_from(
        parser.parse_args([f"{scheme}://{bucket}/runs/", "--gib", "0.02", "--tensors", "12", "--repeat", "1", *given, *words])
    )


def _measured(server, bucket):
    with open_filesystem("s3", **server.storage_options()) as filesystem:
        filesystem.pipe_file(f"{bucket}/runs/mine", b"of somebody")
        records = run.run(_options(server, bucket, "--systems", *MEASURED), execute=perform)
        assert [f"{bucket}/runs/mine"] == filesystem.find(bucket)
        filesystem.rm_file(f"{bucket}/runs/mine")
    assert STORAGE_OPTIONS not in os.environ
    return records


def test_a_bucket_of_s3_is_measured(server, bucket):
    """Once for all that is seen of it, as it takes long: every system in every row, every byte back, each beside the fastest client."""
    found = _measured(server, bucket)
    expected = []
    for operation in ("take", "take_budget", "restore_cold", "restore_budget", "read_one"):
        for system in MEASURED:
            pairs = contenders(operation, system, device=False, benchmark=OBJECTS)
            rows = {component if system == "expstate" else "" for component, _ in pairs}
            expected += [(operation, system, row) for row in rows]
    rows = [(record.operation, record.system, record.setting if record.system == "expstate" else "") for record in found]
    assert sorted(expected) == sorted(rows)
    assert {"obstore", "fsspec"} == {record.setting for record in found if record.system == "expstate"}

    is_old = not hasattr(staging, "StagingOptions")  # so that dcp's writer takes no options of a bucket either
    errors = {(record.operation, record.system, record.setting): record.error for record in found if record.error}
    assert {} == {row: error for row, error in errors.items() if not (is_old and row[1] == "dcp")}
    found = [record for record in found if not record.error]

    assert {1.0} == {record.ratio_to_limit for record in found if record.system == "limit"}
    assert all(record.ratio_to_limit > 0 and record.gib_per_s > 0 and record.cpu_seconds > 0 for record in found)
    clients = [contenders(operation, "limit", device=False, benchmark=OBJECTS) for operation in ("take", "restore_cold", "read_one")]
    requests = [f"{client} {count} requests" for client in ("obstore", "fsspec") for count in (4, 8, 16)]
    alone = [f"{client} 1 request" for client in ("obstore", "fsspec")]
    assert [("put", requests), ("get", requests), ("get_one", alone)] == [(pairs[0][0], [pair[1] for pair in pairs]) for pairs in clients]


def test_the_fastest_client_is_the_limit_whichever_fails(server, bucket):
    seconds = {"fsspec 4 requests": 2.0, "fsspec 8 requests": 1.0, "obstore 8 requests": 3.0}

    def execute(task):
        if task.system == "expstate":
            return Outcome(seconds=4.0 if task.component == "obstore" else 5.0, bytes=GIB)
        return Outcome(seconds=seconds[task.setting], bytes=GIB) if task.setting in seconds else Outcome(error="ImportError: no")

    limit, *ours = run.run(_options(server, bucket, "--systems", "limit", "expstate", "--operations", "take"), execute)
    assert ("put fsspec 8 requests", 1.0, "") == (limit.setting, limit.ratio_to_limit, limit.error)
    assert {"obstore": 0.25, "fsspec": 0.2} == {record.setting: record.ratio_to_limit for record in ours}


def test_what_a_restore_has_changed_is_no_result(server, bucket, keys):
    def execute(task):
        if task.operation == "restore_cold":
            # Of another system's file, as it is long.
            files = places.filesystem(task.kept)
            data = bytearray(files.cat_file(f"{task.kept}/snapshot"))
            data[len(data) // 2] ^= 1
            files.pipe_file(f"{task.kept}/snapshot", bytes(data))
        return perform(task)

    (record,) = run.run(_options(server, bucket, "--systems", "safetensors", "--operations", "restore_cold"), execute)
    assert "1 of 12 tensors differ" in record.error
    assert [] == keys()


@pytest.mark.parametrize("client", list(object_limits.CLIENTS))
def test_a_limit_stores_and_reads_what_it_says(server, bucket, keys, monkeypatch, client):
    monkeypatch.setenv(STORAGE_OPTIONS, json.dumps(server.storage_options()))
    size = object_limits.PIECE_BYTES + 5
    raw = object_limits.CLIENTS[client](f"s3://{bucket}/raw")
    object_limits.put(raw, size, 2, Meter())
    with open_filesystem("s3", **server.storage_options()) as filesystem:
        sizes = [object_limits.PIECE_BYTES, 5]
        assert sizes == [info["size"] for info in filesystem.find(f"{bucket}/raw", detail=True).values()]
        object_limits.get(raw, size, 2, Meter())
        object_limits.get_one(raw, size, 1, Meter())
        filesystem.rm(f"{bucket}/raw", recursive=True)


def test_a_bucket_of_gcs_is_measured_too(gcs_server: GcsServer):  # noqa: F811 - the fixture
    gcsfs = pytest.importorskip("gcsfs")
    name = f"bench-{uuid.uuid4().hex[:12]}"
    gcs_server.make_bucket(name)
    options = _options(gcs_server, name, "--systems", "limit", "expstate", "--operations", "take", "restore_cold", scheme="gs")
    records = run.run(options, execute=perform)
    # The server of the tests does not speak XML, which is all that obstore writes to GCS.
    rows = {(record.operation, record.system, record.setting): record.error for record in records if record.setting != "obstore"}
    assert {""} == set(rows.values())
    assert {("take", "expstate", "fsspec"), ("restore_cold", "expstate", "fsspec")} <= rows.keys()
    assert all("fsspec" in record.setting for record in records if record.system == "limit")
    with open_filesystem("gcs", **gcs_server.storage_options()) as filesystem:
        assert [] == filesystem.find(name)
    _close_all(gcsfs.GCSFileSystem)


def test_a_limit_that_gets_too_little_is_none(server, bucket):
    def execute(task):
        if task.operation == "restore_cold":
            places.filesystem(task.kept).pipe_file(f"{task.kept}/000000", b"short")
        return perform(task)

    (record,) = run.run(_options(server, bucket, "--systems", "limit", "--operations", "restore_cold"), execute)
    assert "bytes came of" in record.error


def test_nothing_is_left_behind_when_the_benchmark_is_interrupted(server, bucket, keys, tmp_path, monkeypatch):
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    begun = []

    def execute(task):
        files = places.filesystem(task.folder)
        files.pipe_file(f"{task.folder}/half", b"half")
        key = f"{task.folder}/part".removeprefix(f"s3://{bucket}/")
        begun.append(files.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(_options(server, bucket, "--systems", "torch", "--operations", "take"), execute)
    assert begun
    assert [] == keys()
    with open_filesystem("s3", **server.storage_options()) as filesystem:
        assert not filesystem.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")
    assert [] == list(tmp_path.iterdir())
    assert STORAGE_OPTIONS not in os.environ


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gib", "0.0001"], "expected at least"),
        (["--gib", "1000000"], "GiB free"),
        (["--repeat", "0"], "at least 1"),
        (["--operations", "staging"], "staging: only with a folder on a disk"),
        (["--operations", "search"], "search: only with `bench catalog`"),
        (["--device", "cuda"], "measures on the host"),
        (["--storage-options", "{"], "must be an object in JSON"),
        (["--storage-options", "[]"], "must be an object in JSON"),
    ],
)
def test_options_that_cannot_be_met_are_refused(server, bucket, words, message):
    with pytest.raises(ValueError, match=message):
        _options(server, bucket, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ftp://host/folder"], "ftp:// is not measured"),
        (["s3://key:secret@bucket"], "credentials do not belong in a URL"),
        (["s3:///folder"], "a bucket and folders"),
        ([".", "--storage-options", "{}"], "only for a bucket"),
    ],
)
def test_places_that_are_no_bucket_are_refused(words, message):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        options_from(parser.parse_args(words))


def test_a_missing_package_is_named(server, bucket, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "s3fs" else find(name, *more))
    with pytest.raises(ValueError, match="needs the package s3fs"):
        _options(server, bucket)


def test_defaults_are_a_gib_and_all_that_is_installed(server, bucket):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = options_from(parser.parse_args([f"s3://{bucket}"]))
    assert (GIB, 100, INSTALLED, OPERATIONS) == (
        options.workload.total_bytes,
        options.workload.tensors,
        options.systems,
        options.operations,
    )
    assert ("objects", f"s3://{bucket}", {}) == (options.benchmark, options.url, options.storage_options)


def test_a_bucket_that_cannot_be_written_to_is_told_at_once(server, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    given = json.dumps({**server.storage_options(), "secret": "wrong-secret"})
    with pytest.raises(SystemExit):
        main(["bench", f"s3://{bucket}/runs", "--gib", "0.01", "--storage-options", given])
    said = capsys.readouterr().err
    assert f"cannot write to s3://{bucket}/runs: " in said
    assert "wrong-secret" not in said
    assert [] == list(tmp_path.iterdir())
    assert STORAGE_OPTIONS not in os.environ


def test_children_learn_the_storage_options_from_the_environment_and_the_command_shows_no_secret(
    server, bucket, keys, tmp_path, capsys, monkeypatch
):
    seen = []
    start = run.subprocess.run

    def spy(command, **more):
        seen.append((command, more["env"]))
        return start(command, **more)

    monkeypatch.setattr(run.subprocess, "run", spy)
    words = ["--gib", "0.01", "--tensors", "5", "--repeat", "1", "--systems", "expstate", "--operations", "take_budget"]
    given = ["--storage-options", json.dumps(server.storage_options())]
    assert 0 == main(["bench", f"s3://{bucket}", *words, *given, "--json", str(tmp_path / "out.json")])
    rows = msgspec.json.decode((tmp_path / "out.json").read_bytes())
    assert [("obstore", ""), ("fsspec", "")] == [(row["setting"], row["error"]) for row in rows]
    assert all(row["peak_extra_bytes"] < 256 * MIB for row in rows)
    secret = server.storage_options()["secret"]
    assert all(secret not in " ".join(command) and secret in environment[STORAGE_OPTIONS] for command, environment in seen)
    output = capsys.readouterr()
    assert secret not in output.out + output.err
    assert [] == keys()
