"""Object stores for tests: a server of each kind for the session, a bucket and a proxy for each test.

A test that looks at what goes wrong gives its client ``s3_proxy.url`` as endpoint; one that does not uses ``s3_server.storage_options()``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator

import pytest

from expstate import configure, settings

from .proxy import FaultProxy
from .servers import ENVIRONMENT, GcsServer, S3Server, started
from .stores import MIB, WAYS, Store

# Before a client is imported. Whose account the user has is nobody's business here.
for _name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "GCSFS_", "FSSPEC_", "STORAGE_EMULATOR_"))]:
    del os.environ[_name]
os.environ.update(ENVIRONMENT)

with contextlib.suppress(ImportError):
    from botocore.loaders import JSONFileLoader, Loader

    # Each client of S3 would read a megabyte of JSON, which takes longer than most tests.
    _files = JSONFileLoader()
    _files.load_file = functools.cache(_files.load_file)
    Loader.FILE_LOADER_CLASS = staticmethod(lambda: _files)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that speaks S3, for all tests of this process."""
    with started(S3Server, tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    """A server that speaks GCS, for all tests of this process."""
    with started(GcsServer, tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Iterator[str]:
    """The name of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3_server.make_bucket(name)
    yield name
    s3_server.remove_bucket(name)


@pytest.fixture
def gcs_bucket(gcs_server: GcsServer) -> str:
    """The name of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    gcs_server.make_bucket(name)
    return name


@pytest.fixture
def s3_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the server that speaks S3."""
    with FaultProxy(s3_server.url) as proxy:
        yield proxy


@pytest.fixture
def gcs_proxy(gcs_server: GcsServer) -> Iterator[FaultProxy]:
    """A proxy before the server that speaks GCS."""
    with FaultProxy(gcs_server.url) as proxy:
        yield proxy


# Of snapshots: one bucket for all tests of a module, in which each has folders of its own.


@pytest.fixture(scope="module")
def buckets(s3_server: S3Server, gcs_server: GcsServer) -> dict[str, str]:
    """The names of a bucket of each scheme."""
    names = {"s3": f"snapshots-{uuid.uuid4().hex[:8]}", "gs": f"snapshots-{uuid.uuid4().hex[:8]}"}
    s3_server.make_bucket(names["s3"])
    gcs_server.make_bucket(names["gs"])
    return names


@contextlib.contextmanager
def _reached(server: S3Server | GcsServer, root: str) -> Iterator[Store]:
    with FaultProxy(server.url) as proxy:
        options = server.storage_options(endpoint_url=proxy.url)
        configure(storage_options={root: options})
        yield Store(root, proxy, options, server.storage_options())
        configure(storage_options={root: {}})


@pytest.fixture(params=list(WAYS))
def store(request: pytest.FixtureRequest, buckets: dict[str, str], s3_server: S3Server, gcs_server: GcsServer) -> Iterator[Store]:
    """A store reached in each of the ways that there are."""
    scheme, transport = WAYS[request.param]
    server = s3_server if scheme == "s3" else gcs_server
    with (
        settings.override(transport=transport, retry_seconds=15, object_file_bytes=MIB),
        _reached(server, f"{scheme}://{buckets[scheme]}") as store,
    ):
        yield store


@pytest.fixture
def s3(buckets: dict[str, str], s3_server: S3Server) -> Iterator[Store]:
    """A store that speaks S3, reached in the way that is taken if nobody says which."""
    with settings.override(retry_seconds=15, object_file_bytes=MIB), _reached(s3_server, f"s3://{buckets['s3']}") as store:
        yield store


@pytest.fixture
def gs(buckets: dict[str, str], gcs_server: GcsServer) -> Iterator[Store]:
    """A store that speaks GCS."""
    with settings.override(retry_seconds=15, object_file_bytes=MIB), _reached(gcs_server, f"gs://{buckets['gs']}") as store:
        yield store
