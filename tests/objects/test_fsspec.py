"""The client by any file system of fsspec: in memory, in folders, and by one that is asynchronous."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from expstate.errors import UnsafePathError, UnsupportedSchemeError
from expstate.storage.objects.client import ABSENT, ObjectClient, TransientError
from expstate.storage.objects.fsspec import client

from .client_tests import SECRET, ClientTests, fails, interrupted
from .faults import Delay, Fault
from .proxy import FaultProxy
from .servers import S3Server


class TestMemory(ClientTests):
    keeps_write_ids = False
    has_buckets = False
    opens_in = """
        from expstate.storage.objects.fsspec import client as open_client
        client = open_client("memory", {bucket!r}, {options!r})
    """

    @pytest.fixture
    def bucket(self) -> Iterator[str]:
        name = f"bucket-{uuid.uuid4().hex}"
        yield name
        for path in [path for path in MemoryFileSystem.store if path.startswith(f"/{name}/")]:
            del MemoryFileSystem.store[path]

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {}

    def open(self, bucket: str, options: dict[str, Any]) -> ObjectClient:
        return client("memory", bucket, options)

    def test_what_fsspec_itself_writes_is_there(self, client: ObjectClient, bucket: str) -> None:
        files = fsspec.filesystem("memory")
        files.pipe_file(f"/{bucket}/folder/theirs", b"data")
        assert client.get_whole("folder/theirs")[0] == b"data"
        client.put("folder/ours", [b"data"])
        assert files.cat_file(f"/{bucket}/folder/ours") == b"data"
        assert [f"/{bucket}/folder/ours", f"/{bucket}/folder/theirs"] == files.find(f"/{bucket}")

    def test_of_clients_of_their_own_exactly_one_creates(self, bucket: str) -> None:
        for turn in range(20):
            barrier = threading.Barrier(6)

            def create(number: int, turn: int = turn, barrier: threading.Barrier = barrier) -> int:
                with contextlib.closing(self.open(bucket, {})) as own:
                    barrier.wait(30)
                    with contextlib.suppress(FileExistsError):
                        own.put(f"key-{turn}", [b"x"], condition=ABSENT)
                        return 1
                return 0

            with ThreadPoolExecutor(6) as pool:
                assert sum(pool.map(create, range(6))) == 1

    def test_a_child_that_was_forked_under_the_lock_is_not_stuck(self, client: ObjectClient) -> None:
        client.put("key", [b"data"])
        held, free = threading.Event(), threading.Event()

        def hold() -> None:
            with client._alone():
                held.set()
                free.wait(60)

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait(60)
        child = os.fork()
        if child == 0:
            os._exit(0 if bytes(client.get("key", 0, 9)) == b"data" else 1)
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
        free.set()
        holder.join()
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)


class TestFolders(ClientTests):
    """A file system with real folders, which must be made, and may be missing."""

    keeps_write_ids = False
    many_objects = 150
    has_buckets = False
    opens_in = """
        from expstate.storage.objects.fsspec import client as open_client
        client = open_client("local", "", {options!r})
        client._root = "/" + {bucket!r} + "/"
    """

    @pytest.fixture
    def bucket(self, tmp_path: Path) -> str:
        return str(tmp_path).strip("/")

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        return {}

    def open(self, bucket: str, options: dict[str, Any]) -> ObjectClient:
        opened = client("local", "", options)
        opened._root = f"/{bucket}/"
        return opened

    # Their times are not fine enough to tell versions of one size apart.

    def test_only_the_version_that_was_seen_is_read(self, client: ObjectClient) -> None:
        """It is not: nobody could see to it."""
        client.put("key", [b"data"])
        assert bytes(client.get("key", 0, 9, version="other")) == b"data"

    def test_it_does_not_claim_to_keep_conditions(self, client: ObjectClient) -> None:
        assert not client.is_conditional

    def test_what_cannot_be_listed_is_not_left_out_without_a_word(self, client: ObjectClient, monkeypatch: pytest.MonkeyPatch) -> None:
        client.put("a/b/key", [b"data"])
        client.put("a/c/key", [b"data"])
        found = LocalFileSystem.ls

        def ls(self: LocalFileSystem, path: str, **kwargs: Any) -> Any:
            if path.endswith("/b"):
                raise PermissionError(13, "Permission denied", path)
            return found(self, path, **kwargs)

        monkeypatch.setattr(LocalFileSystem, "ls", ls)
        with pytest.raises(PermissionError, match="a/b"):
            list(client.list(""))

    def test_a_folder_that_is_removed_meanwhile_is_no_error(self, client: ObjectClient, monkeypatch: pytest.MonkeyPatch) -> None:
        client.put("a/b/key", [b"data"])
        client.put("a/c/key", [b"data"])
        found = LocalFileSystem.ls

        def ls(self: LocalFileSystem, path: str, **kwargs: Any) -> Any:
            if path.endswith("/b"):
                raise FileNotFoundError(path)
            return found(self, path, **kwargs)

        monkeypatch.setattr(LocalFileSystem, "ls", ls)
        assert [info.key for info in client.list("")] == ["a/c/key"]

    def test_a_link_is_not_followed(self, client: ObjectClient, bucket: str) -> None:
        client.put("a/key", [b"data"])
        Path("/", bucket, "a", "loop").symlink_to(Path("/", bucket))
        assert [info.key for info in client.list("")] == ["a/key"]

    def test_a_folder_is_no_object(self, client: ObjectClient) -> None:
        client.put("folder/key", [b"data"])
        fails(lambda: client.head("folder"), FileNotFoundError)
        fails(lambda: client.get_whole("folder"), FileNotFoundError)

    def test_no_key_leads_out_of_the_bucket(self, client: ObjectClient) -> None:
        for key in ("../outside", "a/../../outside", "./key", "a/.", "nul\0"):
            for action in (
                lambda key=key: client.put(key, [b"data"]),
                lambda key=key: client.get(key, 0, 1),
                lambda key=key: client.delete(key),
            ):
                fails(action, UnsafePathError)


class _Flaky(LocalFileSystem):
    """A file system whose connection does not come back once it is lost."""

    made: ClassVar[list[_Flaky]] = []
    is_lost = False
    is_closed = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made.append(self)
        self.client = self

    def close(self) -> None:
        self.is_closed = True

    def cat_file(self, *args: Any, **kwargs: Any) -> bytes:
        if self.is_lost:
            said = "Socket is closed"  # as paramiko does
            raise OSError(said)
        return super().cat_file(*args, **kwargs)


def test_a_connection_that_was_lost_is_made_anew(tmp_path: Path) -> None:
    fsspec.register_implementation("flaky", _Flaky, clobber=True)
    with contextlib.closing(client("flaky", "", {})) as flaky:
        flaky._root, key = f"{tmp_path}/", "key"
        flaky.put(key, [b"data"])
        assert bytes(flaky.get(key, 0, 4)) == b"data"
        _Flaky.made[0].is_lost = True
        try:
            flaky.put(key, [b"data"], condition=ABSENT)
        except FileExistsError:
            fails(lambda: flaky.get(key, 0, 4), TransientError)
        assert bytes(flaky.get(key, 0, 4)) == b"data"
        assert [True, False] == [files.is_closed for files in _Flaky.made]
    assert [True, True] == [files.is_closed for files in _Flaky.made]


def test_a_scheme_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UnsupportedSchemeError, match="nowhere://"):
        client("nowhere", "bucket", {})


@pytest.mark.parametrize(
    ("scheme", "bucket", "shown"),
    [
        ("sftp", f"me:{SECRET}@host:22", "sftp://host:22"),
        ("sftp", "me@host", "sftp://host"),
        ("memory", "bucket?token=x", "memory://bucket"),
        ("abfs", "container@account.dfs.core.windows.net", "abfs://container@account.dfs.core.windows.net"),
        ("abfs", f"me:{SECRET}@account", "abfs://account"),
    ],
)
def test_a_url_is_shown_without_who_logs_in(scheme: str, bucket: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if scheme != "memory":
        monkeypatch.setattr("expstate.storage.objects.fsspec.get_filesystem_class", lambda _: LocalFileSystem)
    found = client(scheme, bucket, {"password": SECRET})
    assert found.url == shown
    assert SECRET not in f"{found!r} {found.store}"


class TestAsynchronous(ClientTests):
    """A file system that is asynchronous: s3fs as any other, without what its own client adds."""

    keeps_write_ids = False
    many_objects = 150
    makes_buckets = True
    lists_missing_buckets = True
    opens_in = """
        from expstate.storage.objects.fsspec import client as open_client
        client = open_client("s3", {bucket!r}, {options!r})
    """

    @pytest.fixture
    def bucket(self, s3_bucket: str) -> str:
        pytest.importorskip("s3fs")
        return s3_bucket

    @pytest.fixture
    def options(self, s3_server: S3Server) -> dict[str, Any]:
        return s3_server.storage_options()

    def open(self, bucket: str, options: dict[str, Any]) -> ObjectClient:
        return client("s3", bucket, options)

    def test_only_the_version_that_was_seen_is_read(self) -> None:
        pytest.skip("it cannot be said to the server")

    def test_nothing_appears_after_an_interrupt(self, bucket: str, options: dict[str, Any], s3_proxy: FaultProxy) -> None:
        with contextlib.closing(self.open(bucket, {**options, "endpoint_url": s3_proxy.url})) as proxied:
            proxied.put("key", [b"data"])
            s3_proxy.add(Fault(Delay(1.5), method="PUT"))
            interrupted(lambda: proxied.put("new", [bytes(1 << 25)]))
            s3_proxy.clear()
            time.sleep(2)
            assert [info.key for info in proxied.list("")] == ["key"]
