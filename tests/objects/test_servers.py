"""The servers do what the tests of object stores rely on."""

from __future__ import annotations

import errno
import json

import obstore
import pytest
from obstore.store import GCSStore, S3Store

from .proxy import FaultProxy
from .servers import GcsServer, S3Server, open_filesystem

DATA = bytes(range(256)) * 40


# S3


def test_s3_refuses_to_create_what_is_there(s3_server: S3Server, s3_bucket: str) -> None:
    key = f"{s3_bucket}/key"
    with open_filesystem("s3", **s3_server.storage_options()) as filesystem:
        filesystem.pipe_file(key, b"first", mode="create")
        with pytest.raises(OSError, match="pre-conditions") as caught:
            filesystem.pipe_file(key, b"second", mode="create")

        # Another class on another store, or with another version: the cause is what counts.
        assert errno.EINVAL == caught.value.errno
        assert "PreconditionFailed" == caught.value.__cause__.response["Error"]["Code"]
        assert b"first" == filesystem.cat_file(key)
        filesystem.pipe_file(key, b"second")
        assert b"second" == filesystem.cat_file(key)


def test_s3_replaces_and_removes_only_the_version_that_is_named(s3_server: S3Server, s3_bucket: str) -> None:
    with open_filesystem("s3", **s3_server.storage_options()) as filesystem:
        old = filesystem.call_s3("put_object", Bucket=s3_bucket, Key="key", Body=b"old")["ETag"]
        new = filesystem.call_s3("put_object", Bucket=s3_bucket, Key="key", Body=b"new", IfMatch=old)["ETag"]
        with pytest.raises(OSError, match="pre-conditions"):
            filesystem.call_s3("put_object", Bucket=s3_bucket, Key="key", Body=b"newer", IfMatch=old)
        with pytest.raises(OSError, match="pre-conditions"):
            filesystem.call_s3("delete_object", Bucket=s3_bucket, Key="key", IfMatch=old)

        assert b"new" == filesystem.cat_file(f"{s3_bucket}/key")
        filesystem.call_s3("delete_object", Bucket=s3_bucket, Key="key", IfMatch=new)
        assert not filesystem.exists(f"{s3_bucket}/key")


def test_s3_reads_ranges_and_keeps_metadata(s3_server: S3Server, s3_bucket: str) -> None:
    with open_filesystem("s3", **s3_server.storage_options()) as filesystem:
        filesystem.pipe_file(f"{s3_bucket}/key", DATA, Metadata={"expstate-write-id": "mine"})

        assert DATA[100:300] == filesystem.cat_file(f"{s3_bucket}/key", start=100, end=300)
        assert {"expstate-write-id": "mine"} == filesystem.call_s3("head_object", Bucket=s3_bucket, Key="key")["Metadata"]


def test_s3_refuses_a_wrong_secret(s3_server: S3Server, s3_bucket: str) -> None:
    with open_filesystem("s3", **s3_server.storage_options(secret="wrong")) as stranger, pytest.raises(PermissionError):  # noqa: S106
        stranger.find(s3_bucket)
    with open_filesystem("s3", **s3_server.storage_options()) as filesystem:
        assert [] == filesystem.find(s3_bucket)


def test_s3_lists_objects_and_unfinished_uploads(s3_server: S3Server, s3_bucket: str) -> None:
    with open_filesystem("s3", **s3_server.storage_options()) as filesystem:
        filesystem.pipe({f"{s3_bucket}/folder/{name}": DATA for name in "ab"} | {f"{s3_bucket}/other/c": DATA})
        upload = filesystem.call_s3("create_multipart_upload", Bucket=s3_bucket, Key="folder/begun")["UploadId"]
        filesystem.call_s3("upload_part", Bucket=s3_bucket, Key="folder/begun", PartNumber=1, UploadId=upload, Body=DATA)

        assert [f"{s3_bucket}/folder/a", f"{s3_bucket}/folder/b"] == filesystem.find(f"{s3_bucket}/folder")
        assert [upload] == [each["UploadId"] for each in filesystem.call_s3("list_multipart_uploads", Bucket=s3_bucket)["Uploads"]]
        filesystem.call_s3("abort_multipart_upload", Bucket=s3_bucket, Key="folder/begun", UploadId=upload)
        assert [] == filesystem.call_s3("list_multipart_uploads", Bucket=s3_bucket).get("Uploads", [])


def test_s3_serves_obstore(s3_server: S3Server, s3_bucket: str) -> None:
    store = S3Store(s3_bucket, **s3_server.obstore_options())

    obstore.put(store, "key", b"first", mode="create")
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "key", b"second", mode="create")
    assert b"irs" == bytes(obstore.get_range(store, "key", start=1, end=4))


def test_s3_without_keys_runs_beside_the_other_and_serves_obstores_client_for_gcs(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with S3Server(tmp_path_factory.mktemp("open"), keys=False) as server:
        server.make_bucket("bucket")
        store = GCSStore("bucket", **server.obstore_options())
        obstore.put(store, "folder/key", DATA)

        assert DATA[100:300] == bytes(obstore.get_range(store, "folder/key", start=100, end=300))
        assert ["folder/key"] == [each["path"] for page in obstore.list(store) for each in page]
        obstore.delete(store, "folder/key")
        assert [] == [each["path"] for page in obstore.list(store) for each in page]


def test_a_server_that_cannot_start_says_why(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Server, "_command", lambda self, weed: [weed, "mini", "-nonsense"])

    with pytest.raises(RuntimeError, match=r"S3Server ended; it said:\n(?s:.*)-nonsense"):
        S3Server(tmp_path_factory.mktemp("broken"))


# GCS


def test_gcs_refuses_to_create_what_is_there(gcs_server: GcsServer, gcs_bucket: str) -> None:
    key = f"{gcs_bucket}/key"
    with open_filesystem("gcs", **gcs_server.storage_options()) as filesystem:
        filesystem.pipe_file(key, b"first", mode="create")
        with pytest.raises(FileExistsError):
            filesystem.pipe_file(key, b"second", mode="create")

        assert b"first" == filesystem.cat_file(key)
        filesystem.pipe_file(key, b"second")
        assert b"second" == filesystem.cat_file(key)


def test_gcs_replaces_only_the_generation_that_is_named(gcs_server: GcsServer, gcs_bucket: str) -> None:
    with open_filesystem("gcs", **gcs_server.storage_options()) as filesystem:

        def put(data: bytes, generation: str) -> str:
            body = b'--x\r\n\r\n{"name": "key"}\r\n--x\r\n\r\n' + data + b"\r\n--x--"
            _, reply = filesystem.call(
                "POST",
                f"{gcs_server.url}/upload/storage/v1/b/{gcs_bucket}/o",
                uploadType="multipart",
                ifGenerationMatch=generation,
                headers={"Content-Type": 'multipart/related; boundary="x"'},
                data=body,
            )
            return str(json.loads(reply)["generation"])

        old = put(b"old", "0")
        put(b"new", old)
        with pytest.raises(FileExistsError):
            put(b"newer", old)
        assert b"new" == filesystem.cat_file(f"{gcs_bucket}/key")


def test_gcs_reads_ranges_keeps_metadata_and_lists(gcs_server: GcsServer, gcs_bucket: str) -> None:
    with open_filesystem("gcs", **gcs_server.storage_options()) as filesystem:
        filesystem.pipe({f"{gcs_bucket}/folder/{name}": DATA for name in "ab"} | {f"{gcs_bucket}/other/c": DATA})
        filesystem.pipe_file(f"{gcs_bucket}/key", DATA, metadata={"expstate-write-id": "mine"})

        assert DATA[100:300] == filesystem.cat_file(f"{gcs_bucket}/key", start=100, end=300)
        assert [f"{gcs_bucket}/folder/a", f"{gcs_bucket}/folder/b"] == filesystem.find(f"{gcs_bucket}/folder")
        found = filesystem.info(f"{gcs_bucket}/key")
        assert {"expstate-write-id": "mine"} == found["metadata"]
        assert int(found["generation"]) > 0


def test_gcs_takes_uploads_in_chunks_through_the_proxy_too(gcs_server: GcsServer, gcs_bucket: str, gcs_proxy: FaultProxy) -> None:
    data = DATA * 100
    with open_filesystem("gcs", **gcs_server.storage_options(endpoint_url=gcs_proxy.url)) as filesystem:
        filesystem.pipe_file(f"{gcs_bucket}/key", data, chunksize=1 << 19)
        assert data == filesystem.cat_file(f"{gcs_bucket}/key")

    assert [200, 308, 200, 200] == [request.status for request in gcs_proxy.requests]
