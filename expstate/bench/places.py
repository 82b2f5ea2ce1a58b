"""Where a benchmark works: a new folder on a disk or in a bucket, removed at the end with all that is in it.

Gets options; hands on addresses, paths or URLs, for what the steps write. ``filesystem`` reaches a bucket, here and in the child processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from expstate.bench.plan import STORAGE_OPTIONS

if TYPE_CHECKING:
    from expstate.bench.options import Options

_PREFIX = "expstate-bench-"


class UnreachableError(Exception):
    """Nothing can be written where the benchmark is to work."""


def storage_options() -> dict[str, Any]:
    """How the bucket is reached, as the parent process has said in the environment."""
    return msgspec.json.decode(os.environ.get(STORAGE_OPTIONS, "{}"), type=dict[str, Any])


def filesystem(url: str, **more: Any) -> Any:
    """The fsspec file system of a URL, which remembers no listings: other processes write too."""
    import fsspec

    return fsspec.filesystem(url.partition("://")[0], **{"use_listings_cache": False, **storage_options(), **more})


class Place(ABC):
    """A new folder.

    Attributes
    ----------
    local : Path
        A folder on a disk for what is not measured.
    """

    local: Path

    @abstractmethod
    def address(self, name: str) -> str:
        """The address of something in the folder."""

    @abstractmethod
    def make(self, address: str) -> None:
        """Make an empty folder."""

    @abstractmethod
    def remove(self, address: str) -> None:
        """Remove a folder and all that is in it."""

    @abstractmethod
    def close(self) -> None:
        """Remove all."""


class Disk(Place):
    """A folder on a disk.

    Parameters
    ----------
    path : Path
        What it is made in.
    """

    def __init__(self, path: Path) -> None:
        self.local = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))

    def address(self, name: str) -> str:
        return str(self.local / name)

    def make(self, address: str) -> None:
        Path(address).mkdir()

    def remove(self, address: str) -> None:
        shutil.rmtree(address)

    def close(self) -> None:
        self.remove(str(self.local))


class Bucket(Place):
    """A folder in a bucket, with one on the disk beside it for what is not measured.

    Parameters
    ----------
    url : str
        The folder that it is made in; nothing else there is touched.
    options : mapping
        Storage options; child processes find them in the environment as long as this is open.

    Raises
    ------
    UnreachableError
        If nothing can be written there.
    """

    def __init__(self, url: str, options: Any) -> None:
        self._url = f"{url}/{_PREFIX}{uuid.uuid4().hex[:12]}"
        self._before = os.environ.get(STORAGE_OPTIONS)
        os.environ[STORAGE_OPTIONS] = msgspec.json.encode(options).decode()
        self.local = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            self._files = filesystem(url)
            self._files.pipe_file(f"{self._url}/probe", b"probe")
            self._files.rm_file(f"{self._url}/probe")
        except Exception as error:
            self._forget()
            lines = str(error).strip().splitlines() or [""]
            msg = f"cannot write to {url}: {type(error).__name__}: {lines[0]}"
            raise UnreachableError(msg) from error

    def address(self, name: str) -> str:
        return f"{self._url}/{name}"

    def make(self, address: str) -> None:
        """There are no folders in a bucket."""

    def remove(self, address: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(address, recursive=True)

    def close(self) -> None:
        try:
            self.remove(self._url)
            self._end_uploads()
        finally:
            self._forget()

    def _end_uploads(self) -> None:
        """End what a process has begun that died; it is listed nowhere, and paid for."""
        from expstate import settings
        from expstate.storage.registry import open_storage

        with settings.override(transport="fsspec"):  # obstore cannot list uploads
            open_storage(self._url, storage_options()).end_uploads(float("inf"))

    def _forget(self) -> None:
        shutil.rmtree(self.local)
        if self._before is None:
            del os.environ[STORAGE_OPTIONS]
        else:
            os.environ[STORAGE_OPTIONS] = self._before


def make_place(options: Options) -> Place:
    """A new folder where the options say."""
    return Bucket(options.url, options.storage_options) if options.url else Disk(options.path)
