"""The takes of one training in one folder: their places, which of them may go, and which is the last that is whole.

A take belongs to a series if it lies in the folder of its name and says so in the param ``autosave``; whatever else lies there is not
touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expstate.catalog.model import value_of
from expstate.catalog.provenance import redact
from expstate.engine import attempt, collect
from expstate.errors import (
    ExpstateError,
    ExpstateWarning,
    InvalidNameError,
    RestoreInterruptedError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    SnapshotPinnedError,
)
from expstate.format import names
from expstate.integrations.keeping import Keeper
from expstate.integrations.root import default_root, make_root
from expstate.snapshot import Snapshot
from expstate.storage import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from expstate.catalog.origin import CatalogOption
    from expstate.engine.ranks import Ranks
    from expstate.format.manifest import Manifest
    from expstate.storage.base import Storage

PARAM = "autosave"
_FOLDER = re.compile(r"(\d{8,})-step-\d+-[0-9a-f]{8}")
_log = logging.getLogger("expstate")


class Series:
    """A series of takes.

    Parameters
    ----------
    name : str
        What tells it from others in the same folder.
    root : str, os.PathLike or None
        The folder that its own folder is in; None for the default.
    storage_options : mapping or None
        What the storage needs to connect.
    keep_last : int or None
        How many to keep; None for all.
    catalog : Catalog, str, os.PathLike, False or None
        Where its takes are recorded.

    Raises
    ------
    InvalidNameError
        If the name is none.
    UnsupportedSchemeError
        If no storage is known for the folder.
    """

    def __init__(
        self,
        name: str,
        root: str | os.PathLike[str] | None,
        storage_options: Mapping[str, Any] | None,
        keep_last: int | None,
        catalog: CatalogOption,
    ) -> None:
        self.name = names.check_label(name, "name")
        if redact.text(name) != name:
            msg = f"the name of a series must not look like a secret, got {name!r}"
            raise InvalidNameError(msg)
        self._is_default = root is None
        self._root = default_root(Path.cwd()) if root is None else _absolute(root)
        self._folder = f"{self._root.rstrip('/')}/{names.file_stem(name)}"
        self._options = storage_options
        self._keep_last = keep_last
        self._keeper = Keeper(catalog)
        self._storage = registry.open_storage(self._folder, storage_options)
        self._lock = threading.Lock()
        self._own: list[str] | None = None
        self._mark = uuid.uuid4().hex[:8]

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        return self._storage.url

    # Places

    def prepare(self) -> None:
        """Make the default folder; any other is made by the first take.

        Raises
        ------
        StoragePermissionError
            If it cannot be.
        """
        if self._is_default and "://" not in self._root:
            make_root(Path(self._root), "name another folder by root=, or by EXPSTATE_ROOT")

    def begin(self) -> tuple[int, str]:
        """The number of the next take, and what tells it from others of that number; removes what the dead have left."""
        folders = list(self._folders())
        with contextlib.suppress(ExpstateError, OSError):
            collect.collect([storage for _, storage in folders], dry_run=False)
        return max((_number(name) for name, _ in folders), default=0) + 1, self._mark

    def place(self, number: int, step: int, mark: str) -> str:
        """Path or URL of a take. Places are sorted by name as takes are by time."""
        return f"{self._folder}/{number:08d}-step-{step}-{mark}"

    def _folders(self) -> Iterator[tuple[str, Storage]]:
        """Names and storages of the folders that look like those of takes, the newest last."""
        found = {storage.url.rstrip("/").rpartition("/")[2]: storage for storage in self._storage.walk(depth=1)}
        for name in sorted((name for name in found if _FOLDER.fullmatch(name)), key=lambda name: (_number(name), name)):
            yield name, registry.open_storage(f"{self._folder}/{name}", self._options)

    # The last one

    def paths(self) -> list[str]:
        """Where its committed takes are, the newest first. One whose manifest is damaged is among them: it may have been the newest."""
        found = []
        for name, storage in self._folders():
            try:
                is_own = self._is_own(attempt.read_manifest(storage)[0])
            except FileNotFoundError:
                continue
            except SnapshotCorruptError:
                is_own = True
            if is_own:
                found.append(f"{self._folder}/{name}")
        return found[::-1]

    def _is_own(self, manifest: Manifest) -> bool:
        found = manifest.metadata.params.get(PARAM)
        return found is not None and value_of(found) == self.name

    def newest(self, joined: Ranks, restore: Callable[[Snapshot], object]) -> Snapshot | None:
        """The newest take that is whole, restored on all ranks; None if there is none.

        Parameters
        ----------
        joined : Ranks
            Those that restore together.
        restore : callable
            Does it; one that finds damage is called again with the take before.

        Raises
        ------
        SnapshotCorruptError
            If all are damaged.

        Warns
        -----
        ExpstateWarning
            For each that is damaged.
        """
        told = joined.spread("paths", "\n".join(self.paths()).encode() if joined.is_first else None)
        paths = told.decode().splitlines()
        problem = ""
        for number, path in enumerate(paths):
            snapshot = Snapshot(path, self._options)
            problems = joined.gather(f"restored/{number}", _problem_of(snapshot, restore).encode())
            of_all = "; ".join(dict.fromkeys(text.decode() for text in problems if text))
            problem = joined.spread(f"problem/{number}", of_all.encode() if joined.is_first else None).decode()
            if not problem:
                return snapshot
            warnings.warn(f"{snapshot.path!r} is damaged, so the take before it is restored: {problem}", ExpstateWarning, stacklevel=4)
        if problem:
            msg = f"none of the {len(paths)} takes in {self.url!r} is whole; of the oldest: {problem}"
            raise SnapshotCorruptError(msg)
        return None

    # Those that may go

    def committed(self, path: str) -> None:
        """One of its takes is committed: those before the last so many are removed, unless somebody has marked them; never raises."""
        if self._keep_last is None:
            return
        with self._lock:
            try:
                if self._own is None:  # those of earlier processes too
                    self._own = self.paths()[::-1]
                if path not in self._own:
                    self._own.append(path)
                old, last = self._own[: -self._keep_last], self._own[-self._keep_last :]
                self._own = [one for one in old if not self._let_go(one)] + last
            except (ExpstateError, OSError) as error:
                _log.debug("old takes of %r were not looked for: %s", self.url, error)

    def _let_go(self, path: str) -> bool:
        """Remove a take; whether it is none of the series' business any more."""
        storage = registry.open_storage(path, self._options)
        try:
            self._keeper.remove(storage, only=self._is_own)
        except (FileNotFoundError, SnapshotPinnedError):
            return True
        except (ExpstateError, OSError) as error:
            _log.debug("%r was not removed: %s", storage.url, error)
            return False  # tried again after the next take
        return True


def _absolute(root: str | os.PathLike[str]) -> str:
    """A path that a later chdir does not change; URLs stay."""
    text = os.fspath(root)
    return text if "://" in text else os.path.abspath(text)  # noqa: PTH100 - may be a URL


def _problem_of(snapshot: Snapshot, restore: Callable[[Snapshot], object]) -> str:
    """What is damaged in a snapshot that is restored; nothing if it is whole."""
    try:
        snapshot.metadata  # noqa: B018 - read here, so that what is told of it later is there
        restore(snapshot)
    except (SnapshotCorruptError, SnapshotNotFoundError) as error:
        return str(error)
    except RestoreInterruptedError as error:
        if not isinstance(error.__cause__, SnapshotCorruptError):
            raise
        return str(error)
    return ""


def _number(name: str) -> int:
    return int(name.partition("-")[0])
