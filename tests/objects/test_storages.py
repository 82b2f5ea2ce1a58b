"""Every way to an object store keeps what a storage must keep: the tests of storages, on real servers and in memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from expstate import configure, settings
from expstate.storage.base import Storage
from expstate.storage.registry import open_storage
from expstate.testing.storage import StorageTests

from .servers import KEY, SECRET, GcsServer, S3Server


@pytest.fixture(scope="module")
def shared_s3_bucket(s3_server: S3Server) -> Iterator[str]:
    """A bucket for the tests of this file: making one takes as long as ten of them."""
    name = f"kit-{uuid.uuid4().hex[:12]}"
    s3_server.make_bucket(name)
    yield name
    s3_server.remove_bucket(name)


@pytest.fixture(scope="module")
def shared_gcs_bucket(gcs_server: GcsServer) -> str:
    name = f"kit-{uuid.uuid4().hex[:12]}"
    gcs_server.make_bucket(name)
    return name


class TestMemory(StorageTests):
    """fsspec's own memory."""

    def open(self, place: Path) -> Storage:
        return open_storage(f"memory://tests{place}")

    @pytest.mark.skip(reason="each process has a memory of its own")
    def test_of_several_processes_that_create_a_file_one_wins(self) -> None:
        pass


class _BucketTests(StorageTests):
    """On a server: each test in a folder of a bucket that all share."""

    transport = "fsspec"
    rounds = 3  # whoever loses is let wait for a second

    @pytest.fixture(autouse=True)
    def _connected(self, bucket: tuple[str, Mapping[str, Any]]) -> Iterator[None]:
        self.root, options = bucket
        configure(storage_options={self.root: options})
        with settings.override(transport=self.transport):
            yield
        configure(storage_options={self.root: {}})

    def open(self, place: Path) -> Storage:
        return open_storage(f"{self.root}{place}")


class TestS3(_BucketTests):
    """By s3fs."""

    @pytest.fixture
    def bucket(self, s3_server: S3Server, shared_s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Mapping[str, Any]]:
        # What other processes of a test use.
        found = {"AWS_ENDPOINT_URL": s3_server.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        for name, value in {**found, "EXPSTATE_TRANSPORT": self.transport}.items():
            monkeypatch.setenv(name, value)
        return f"s3://{shared_s3_bucket}", s3_server.storage_options()


class TestS3ByObstore(TestS3):
    """The same by obstore."""

    transport = "obstore"


class TestGcs(_BucketTests):
    """By gcsfs."""

    @pytest.fixture
    def bucket(self, gcs_server: GcsServer, shared_gcs_bucket: str) -> tuple[str, Mapping[str, Any]]:
        return f"gs://{shared_gcs_bucket}", gcs_server.storage_options()

    @pytest.mark.skip(reason="other processes cannot be told to be nobody there")
    def test_of_several_processes_that_create_a_file_one_wins(self) -> None:
        pass
