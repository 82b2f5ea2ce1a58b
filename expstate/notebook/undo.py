"""What is kept of live state before it is overwritten, so that it can be put back bit by bit.

``keep`` copies it into memory, or into the user's cache folder if that is too much; ``Kept.put_back`` restores exactly what was kept. What
processes that are dead have left in the cache is found by ``leftovers``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import torch

from expstate import settings
from expstate.engine import ancestry, match
from expstate.engine.lease import LEASE_SECONDS, decode_lease, encode_lease, is_dead
from expstate.engine.memory import available_bytes, budget_bytes
from expstate.engine.plan import RestoreOptions
from expstate.engine.ranks import Ranks
from expstate.engine.report import bytes_text
from expstate.engine.request import make_request
from expstate.engine.restore import restore
from expstate.engine.take import Take, check_app_state
from expstate.errors import ExpstateError, NoUndoRoomError, StorageError
from expstate.snapshot import Snapshot
from expstate.state import paths as entry_paths
from expstate.storage import memory
from expstate.storage.local import LocalStorage

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from expstate.engine.report import RestoreReport
    from expstate.progress import ProgressOption
    from expstate.state.stateful import Stateful

_DEFAULT_SHARE = 0.1
_RAM = "ram://"
_OWNER = "owner.json"
"""In each folder of the cache, from before to after all that is kept there: the process that it belongs to, in the form of a lease."""


class _NoRoomError(Exception):
    """So many bytes are to be kept, and one of the two places has no room for them."""

    def __init__(self, nbytes: int, reason: str) -> None:
        super().__init__(nbytes, reason)
        self.nbytes = nbytes
        self.reason = reason


class _Part:
    """Some names of a module's state dict, or all of them; never what has no memory.

    Parameters
    ----------
    module : torch.nn.Module
        The module.
    names : set of str, optional
        The names; all if one of them is not the module's own, as where a wrapper was put around it since.
    """

    def __init__(self, module: torch.nn.Module, names: set[str] | None) -> None:
        self._module = module
        self._names = names

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._module.state_dict()
        names = state.keys() if self._names is None or self._names - state.keys() else self._names
        part = OrderedDict((name, value) for name, value in state.items() if name in names and not getattr(value, "is_meta", False))
        if hasattr(state, "_metadata"):
            part._metadata = state._metadata  # type: ignore[attr-defined]  # noqa: SLF001 - PyTorch's own place
        return part

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not needed: what was kept is put back into the module itself."""


class Kept:
    """A copy of live state; made by ``keep``, gone when it is dropped or garbage, and at the latest when the process ends.

    Attributes
    ----------
    snapshot : Snapshot
        The copy. What it says of itself, so that it can be compared with live state, outlives ``drop``.
    nbytes : int
        Bytes of tensors and objects in it.
    place : str
        ``"memory"`` or ``"disk"``.
    keys : tuple of str
        The keys that it holds anything of.
    """

    def __init__(self, snapshot: Snapshot, parents: Mapping[str, str | None]) -> None:
        self.snapshot = snapshot
        self.nbytes = snapshot.nbytes
        self.place = "memory" if snapshot.path.startswith(_RAM) else "disk"
        self.keys = snapshot.keys()
        self._parents = parents
        # Called once: by ``drop``, when this is garbage, or at exit.
        self._remove = weakref.finalize(self, _remove, snapshot.path, os.getpid())
        _alive.add(self)

    def put_back(self, app_state: dict[str, Stateful], progress: ProgressOption = None) -> RestoreReport:
        """Make what was kept live again, in place, random generators last; the rest of the state stays as it is.

        Parameters
        ----------
        app_state : dict of str to Stateful
            Where to; keys of which nothing was kept are left alone.
        progress : None, bool or callable
            As for ``Snapshot.take``.

        Raises
        ------
        RestoreMismatchError
            If the live state has other names or shapes now; nothing was changed.
        RestoreInterruptedError
            If it was interrupted after live state had begun to change; it can be put back again.
        """
        check_app_state(app_state)
        mine = {key: app_state[key] for key in self.keys if key in app_state}
        # What was live is trusted: nobody else had it meanwhile.
        options = RestoreOptions(None, (), {}, strict=True, cast=False, trust=True, device=None, is_part=True)
        source = self.snapshot._source  # noqa: SLF001 - restored in a way of its own
        report = restore(source, mine, options, budget=budget_bytes(None), progress=progress, verify=True, atomic=False, dry_run=False)
        ancestry.put_back({key: self._parents[key] for key in mine})
        return report

    def drop(self) -> None:
        """Let go of the copy."""
        self._remove()
        _alive.discard(self)

    def __repr__(self) -> str:
        state = self.place if self._remove.alive else "dropped"
        return f"Kept({', '.join(map(entry_paths.printable, self.keys))}, {bytes_text(self.nbytes)}, {state})"


_alive: weakref.WeakSet[Kept] = weakref.WeakSet()


def keep(app_state: dict[str, Stateful], paths: Collection[str] | None, *, budget_bytes: int | None = None) -> Kept:
    """Copy what is live now, before it is overwritten.

    Parameters
    ----------
    app_state : dict of str to Stateful
        What will be overwritten, in whole or in part.
    paths : collection of str, optional
        Paths of the entries that will be: of a module only these are copied, of any other stateful everything. None means all.
    budget_bytes : int, optional
        Most host memory for all that is kept; default the setting ``undo_budget_bytes``.

    Returns
    -------
    Kept
        The copy.

    Raises
    ------
    NoUndoRoomError
        If neither memory nor disk has room for it.
    UnsupportedValueError
        If there is something in it that cannot be stored. The message names its path.

    Examples
    --------
    >>> from expstate import StateDict
    >>> progress = StateDict(step=3)
    >>> kept = keep({"progress": progress}, None)
    >>> progress["step"] = 4
    >>> kept.put_back({"progress": progress}).restored
    ('progress/step',)
    >>> progress["step"]
    3
    >>> kept.drop()
    """
    check_app_state(app_state)
    chosen = _chosen(app_state, paths)
    parents = ancestry.parents_of(chosen)
    room = _room(budget_bytes)
    try:
        return Kept(_copy(f"{_RAM}undo/{uuid.uuid4().hex}", chosen, room), parents)
    except _NoRoomError as error:
        in_memory = error
    folder = None
    try:
        folder = _new_folder()
        return Kept(_copy(str(folder), chosen, shutil.disk_usage(folder).free), parents)
    except BaseException as error:
        if folder is not None:
            _remove_folder(folder)
        if not isinstance(error, (_NoRoomError, OSError)):
            raise
        msg = (
            f"there is no room to keep the {in_memory.nbytes:,} bytes that would be overwritten, neither in memory ({in_memory.reason}) "
            f"nor on disk ({error.reason if isinstance(error, _NoRoomError) else error}), and nothing was changed: free some, "
            "or pass undo=False (--no-undo), after which there is no way back"
        )
        raise NoUndoRoomError(msg) from error


def _chosen(app_state: Mapping[str, Stateful], paths: Collection[str] | None) -> dict[str, Stateful]:
    """What is to be copied: statefuls, and parts of modules."""
    named: dict[str, set[str]] = {}
    for path in paths or ():
        named.setdefault(entry_paths.key_of(path), set()).add(match.name_of(path))
    chosen: dict[str, Stateful] = {}
    for key, stateful in app_state.items():
        if not isinstance(stateful, torch.nn.Module):
            chosen[key] = stateful
        elif paths is None or key in named:
            chosen[key] = _Part(stateful, None if paths is None else named[key])
    return chosen


def _room(asked: int | None) -> int:
    """Bytes of memory that may still be used."""
    held = sum(memory.nbytes(kept.snapshot.path.removeprefix(_RAM)) for kept in _alive)
    budget = settings.current().undo_budget_bytes if asked is None else asked
    if asked is None and budget == 0:
        budget = int(_DEFAULT_SHARE * (available_bytes() + held))
    return max(0, budget - held)


def _copy(url: str, chosen: dict[str, Stateful], room: int) -> Snapshot:
    """Take a snapshot that nothing knows of: neither a catalog nor those that are taken after it."""
    request = make_request(
        url,
        chosen,
        Ranks(),
        replicated=None,
        check_replicated=False,
        storage_options=None,
        name=None,
        tags=(),
        params=None,
        metrics=None,
        note=None,
        step=None,
        overwrite=False,
        memory_budget_bytes=None,
        progress=False,
        force=False,
        provenance=dict,
    )
    take = Take(request)
    with ancestry.unnoted():
        try:
            take.gather()
            _check(take, room)
            take.write()
            committed = take.commit()
            assert committed is not None, "this process is alone"
            return Snapshot._opened(request.storage, *committed)  # noqa: SLF001 - as a take gives it
        except BaseException as error:
            take.abort(error)
            if isinstance(error, (StorageError, MemoryError)):
                raise _NoRoomError(take.total_bytes, str(error)) from error
            raise


def _check(take: Take, room: int) -> None:
    if take.total_bytes > room:
        raise _NoRoomError(take.total_bytes, f"{room:,} bytes are left for it")


def _remove(path: str, pid: int) -> None:
    if path.startswith(_RAM):
        memory.forget(path.removeprefix(_RAM))
    elif pid == os.getpid():  # and not a child that was forked from the owner
        _remove_folder(Path(path))


# On disk


def _root() -> Path | None:
    """Where the folders of this user's processes are; None for a user without a home."""
    try:
        found = Path(platformdirs.user_cache_dir("expstate", appauthor=False))
    except RuntimeError:  # what newer versions say of a user without a home
        return None
    return found / "undo" if found.is_absolute() else None


def _new_folder() -> Path:
    """A folder that only this user can read, and that says whose it is."""
    root = _root()
    if root is None:
        raise _NoRoomError(0, "the user has no home folder for a cache")
    identity = uuid.uuid4().hex
    host = re.sub(r"[^\w.-]", "_", socket.gethostname())
    folder = root / f"{host}-{os.getpid()}-{identity[:8]}"
    folder.mkdir(mode=0o700, parents=True)
    (folder / _OWNER).write_bytes(encode_lease(identity, "undo", ()))
    return folder


def _remove_folder(folder: Path) -> None:
    """Remove a folder and the files in it, as far as possible; who owns it is known to the last."""
    storage = LocalStorage(str(folder))
    with contextlib.suppress(ExpstateError, OSError):
        for name in sorted((info.name for info in storage.list()), key=lambda name: name == _OWNER):
            storage.delete(name)
        storage.remove_folder()


def leftovers() -> list[Path]:
    """Folders that processes of this host, which are dead, have left in the user's cache."""
    root = _root()
    if root is None or not root.is_dir():
        return []
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.is_symlink() and _is_left(folder))


def clean_leftovers() -> list[Path]:
    """Remove what ``leftovers`` finds; those that are gone."""
    found = leftovers()
    for folder in found:
        _remove_folder(folder)
    return [folder for folder in found if not folder.exists()]


def _is_left(folder: Path) -> bool:
    try:
        data = (folder / _OWNER).read_bytes()
        modified_at = (folder / _OWNER).stat().st_mtime
    except OSError:
        data, modified_at = b"", folder.stat().st_mtime
    lease = decode_lease(data)
    if lease is None:  # the process ended before it had written who it is, or is about to
        return time.time() - modified_at > LEASE_SECONDS
    return lease.host == socket.gethostname() and is_dead(lease, modified_at, time.time())
