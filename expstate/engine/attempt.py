"""One try to put a snapshot in place: the lease that says it is alive, the commit, and the clean-up of what did not get there.

An attempt's files carry its id in their names, so that clean-up never touches another's. The manifest is created last and
exclusively; from then on the snapshot exists, and nothing here removes its files.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from expstate.engine import annotate
from expstate.engine.lease import abandon, decode_lease, encode_lease, is_dead
from expstate.errors import (
    ExpstateError,
    SnapshotExistsError,
    SnapshotNotFoundError,
    SnapshotReplacedError,
    SnapshotWriteError,
    StorageError,
)
from expstate.format import manifest as manifests
from expstate.format import names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from expstate.engine.ranks import Ranks
    from expstate.format.manifest import Manifest
    from expstate.storage.base import Storage

RENEW_SECONDS = 60.0
_MOST_TRIES = 10


def read_committed(storage: Storage) -> bytes | None:
    """The bytes of the manifest at this place, whole or damaged, or None if there is no commit (none, or a torn one)."""
    try:
        data = storage.read(names.MANIFEST, limit=manifests.MAX_BYTES)
    except FileNotFoundError:
        return None
    return None if manifests.is_torn(data) else data


def _files_of(data: bytes | None) -> list[str]:
    """The data files that a manifest names; none for a torn or damaged one, which nothing can be learnt from."""
    try:
        files = [record.name for record in manifests.decode(data or b"").files]
        for name in files:
            names.check_file_name(name)
    except ExpstateError:
        return []
    return files


class Attempt:
    """A try to put a snapshot in a folder.

    Parameters
    ----------
    storage : Storage
        The folder.
    snapshot_id : str
        Of the snapshot to be.
    action : str
        ``"take"``, ``"copy"`` or ``"delete"``, for people who find the lease.

    Attributes
    ----------
    lease_files : tuple of str
        Files that the lease names because they do not carry the attempt's id, and that are to go.
    known : sequence of str
        Data files of other ranks, which are to go too if it comes to nothing.
    committed : bool
        Whether the snapshot exists.
    """

    def __init__(self, storage: Storage, snapshot_id: str, action: str) -> None:
        self._storage = storage
        self._action = action
        self._made_folder = False
        self._lease_data: bytes | None = None
        self._renewed = 0.0
        self._renewing = threading.Lock()
        self._replaces: bytes | None = None
        self._force = False
        self.lease_files: tuple[str, ...] = ()
        self.known: Sequence[str] = ()
        self.id = snapshot_id
        self.token = names.attempt_of(snapshot_id)
        self.committed = False

    @property
    def _lease_name(self) -> str:
        return names.lease_name(self.token)

    def _lease(self) -> bytes:
        return encode_lease(self.id, self._action, self.lease_files)

    def begin(self, *, overwrite: bool, force: bool = False) -> None:
        """Make the folder, see that the place is free and put the lease there.

        Raises
        ------
        SnapshotExistsError
            If a snapshot is there and is not to be overwritten, or the same snapshot is being copied there.
        SnapshotPinnedError
            If it is to be overwritten without ``force``, and is pinned or has an alias.
        """
        self._force = force
        for _ in range(_MOST_TRIES):
            try:
                self._made_folder |= self._storage.prepare()
                self._check_free(overwrite=overwrite)
                # The files of a snapshot that will be replaced do not carry this attempt's id: the lease names them for gc.
                self.hold(_files_of(self._replaces))
            except FileNotFoundError:
                continue  # another attempt failed and took away the folder that it had made
            except BaseException:
                self.abort([])
                raise
            return
        msg = f"the folder {self._storage.url!r} disappears as often as it is made"
        raise StorageError(msg)

    def _check_free(self, *, overwrite: bool) -> None:
        try:
            self._replaces = self._storage.read(names.MANIFEST, limit=manifests.MAX_BYTES)
        except FileNotFoundError:
            self._replaces = None
        if self._replaces is not None and not overwrite and not manifests.is_torn(self._replaces):
            instead = "" if self._action == "copy" else ", or pass overwrite=True"
            msg = f"a snapshot is already at {self._storage.url!r}; {self._action} to another path{instead}"
            raise SnapshotExistsError(msg)
        self._check_removable()

    def _check_removable(self) -> None:
        """See that nothing protects the snapshot that will be replaced."""
        if self._replaces is not None and not self._force and not manifests.is_torn(self._replaces):
            annotate.check_removable(self._storage, annotate.id_in(self._replaces))

    def hold(self, files: Iterable[str] = ()) -> None:
        """Create the lease; ``files`` are named in it that do not carry the attempt's id."""
        self.lease_files = tuple(files)
        self._lease_data = self._lease()
        try:
            self._storage.create(self._lease_name, self._lease_data, token=self.token)
        except FileExistsError:
            self._take_over()
        self._renewed = time.monotonic()

    def _take_over(self) -> None:
        """Put this lease in the place of a dead one: of a copy or deletion of the same snapshot that did not finish."""
        msg = f"another process is at work on snapshot {self.token} at {self._storage.url!r}"
        try:
            found = self._storage.read(self._lease_name)
            lease = decode_lease(found)
            modified_at = self._storage.stat(self._lease_name).modified_at
        except FileNotFoundError:
            raise SnapshotExistsError(msg) from None
        if lease is None or not is_dead(lease, modified_at, self._storage.clock()):
            raise SnapshotExistsError(msg)
        # What the dead one was to remove is still to be removed.
        self.lease_files = tuple(dict.fromkeys((*self.lease_files, *(name for name in lease.files if names.is_data_file(name)))))
        self._lease_data = self._lease()
        try:
            self._storage.replace(self._lease_name, self._lease_data, token=self.token, expected=found)
        except FileExistsError:
            raise SnapshotExistsError(msg) from None
        if self._action == "copy":
            for info in list(self._storage.list()):
                if names.is_of_attempt(info.name, self.token):
                    self._storage.delete(info.name)

    def renew(self) -> None:
        """Say that the attempt is alive, if that was long enough ago; called as bytes go by.

        Raises
        ------
        SnapshotWriteError
            If the lease is no longer there.
        """
        with self._renewing:
            if time.monotonic() - self._renewed < RENEW_SECONDS:
                return
            before, self._lease_data = self._lease_data, self._lease()
            try:
                self._storage.replace(self._lease_name, self._lease_data, token=self.token, expected=before)
            except (FileExistsError, FileNotFoundError):
                raise self._lost_lease() from None
            self._renewed = time.monotonic()

    def _lost_lease(self) -> SnapshotWriteError:
        return SnapshotWriteError(f"the lease of this {self._action} is gone from {self._storage.url!r}: someone cleaned up; do it again")

    def commit(self, data: bytes, sizes: dict[str, int]) -> None:
        """Make names durable, check that everything is there, and create the manifest.

        Parameters
        ----------
        data : bytes
            The manifest.
        sizes : dict of str to int
            Every file that it names and its size in bytes.

        Raises
        ------
        SnapshotWriteError
            If a file or the lease is not as it was left.
        SnapshotExistsError
            If someone else committed here first.
        SnapshotPinnedError
            If what is to be overwritten was pinned or given an alias meanwhile.
        """
        try:
            self._storage.flush()
        except FileNotFoundError:
            raise self._lost_lease() from None
        there = self._storage.sizes((*sizes, self._lease_name))
        for name, size in sizes.items():
            try:
                found = there[name] if name in there else self._storage.stat(name).size
            except FileNotFoundError:
                found = -1
            if found != size:
                msg = f"file {name!r} of {self._storage.url!r} was written with {size:,} bytes and now has {max(found, 0):,}"
                raise SnapshotWriteError(msg)
        if self._lease_name not in there:
            try:
                self._storage.stat(self._lease_name)
            except FileNotFoundError:
                raise self._lost_lease() from None
        self._check_removable()
        try:
            if self._replaces is None:
                self._storage.create(names.MANIFEST, data, token=self.token)
            else:
                self._storage.replace(names.MANIFEST, data, token=self.token, expected=self._replaces)
        except FileExistsError:
            msg = f"someone else took a snapshot to {self._storage.url!r} at the same time and was first"
            raise SnapshotExistsError(msg) from None
        except FileNotFoundError:
            raise self._lost_lease() from None
        self.committed = True

    def finish(self) -> None:
        """Remove the files of the snapshot that was replaced, then the lease; what fails here is left to ``gc``."""
        with self._abandoned_if_it_fails():
            if self.lease_files and self._action != "delete":
                kept = set(_files_of(read_committed(self._storage)))
                for name in self.lease_files:
                    if name not in kept:
                        self._storage.delete(name)
            if self._replaces is not None:
                annotate.remove_others(self._storage, self.id)
            self._storage.delete(self._lease_name)
            self._storage.flush()

    def abort(self, created: Iterable[str]) -> None:
        """Remove what this attempt has put there, unless it turns out to be committed; what cannot be removed is left to ``gc``."""
        with self._abandoned_if_it_fails():
            if self._holds_lease():
                self._remove_temporary()
                if self._is_committed():
                    self.committed = True
                    # The commit may have failed in making itself durable, and until it is, what it replaced is still needed.
                    self._storage.flush()
                    self.finish()
                    return
                # The lease goes last, and only if nothing is left that it could lead to.
                left = [name for name in dict.fromkeys((*created, *self.known)) if not self._removed(name)]
                if left:
                    self.abandon()
                    return
                self._storage.delete(self._lease_name)
            else:
                self.abandon()  # it may be there, and what was read not what it is
            if self._made_folder:
                self._storage.remove_folder()

    def abandon(self) -> None:
        """Leave the lease to ``gc``, which need not wait for the end of this process."""
        if self._lease_data is not None:
            abandon(self._lease_data)

    @contextlib.contextmanager
    def _abandoned_if_it_fails(self) -> Iterator[None]:
        """For the last that the attempt does: nobody is told of an error, but what is left can be removed or taken over."""
        try:
            yield
        except (ExpstateError, OSError):
            self.abandon()
        except BaseException:
            self.abandon()
            raise

    def note_files(self) -> None:
        """Look for the data files that there are of this attempt, whoever has written them: they are to go if it comes to nothing."""
        with contextlib.suppress(ExpstateError, OSError):
            found = [info.name for info in self._storage.list() if names.is_of_attempt(info.name, self.token)]
            self.known = (*self.known, *found)

    def _remove_temporary(self) -> None:
        # An interrupt can come between any two steps of the storage's.
        for info in list(self._storage.list()):
            if info.name.startswith(".") and names.is_of_attempt(info.name, self.token):
                self._storage.delete(info.name)

    def release(self) -> None:
        """Give up the lease, if this attempt has it."""
        if self._holds_lease():
            self._storage.delete(self._lease_name)

    def _holds_lease(self) -> bool:
        # Looked at and not remembered: an interrupt can come between the creation and the note of it.
        if self._lease_data is None:
            return False
        try:
            return self._storage.read(self._lease_name) == self._lease_data
        except FileNotFoundError:
            return False

    def _removed(self, name: str) -> bool:
        try:
            self._storage.delete(name)
        except (ExpstateError, OSError):
            return False
        return True

    def _is_committed(self) -> bool:
        # An interrupt can come between the commit and the note of it.
        data = read_committed(self._storage)
        return data is not None and data.startswith(b'{"format":') and f'"id":"{self.id}"'.encode() in data[:100]


class FollowingAttempt:
    """The part of another rank than the first: it has data files of its own, and leaves the lease and the commit to the first.

    Parameters
    ----------
    storage : Storage
        The folder.
    snapshot_id : str
        Of the snapshot to be.
    ranks : Ranks
        Who decide together.

    Attributes
    ----------
    committed : bool
        Whether the snapshot exists.
    """

    def __init__(self, storage: Storage, snapshot_id: str, ranks: Ranks) -> None:
        self._storage = storage
        self._ranks = ranks
        self.id = snapshot_id
        self.token = names.attempt_of(snapshot_id)
        self.committed = False

    def begin(self, *, overwrite: bool, force: bool = False) -> None:
        """Nothing: the first rank has begun."""

    def renew(self) -> None:
        """Nothing: the first rank says that the attempt is alive."""

    def finish(self) -> None:
        """The first rank has committed."""
        self.committed = True

    def abort(self, created: Iterable[str]) -> None:
        """Remove what this rank has put there, unless the first rank may have committed it."""
        if self.committed or not self._ranks.decide_to_give_up():
            return
        for name in created:
            with contextlib.suppress(ExpstateError, OSError):
                self._storage.delete(name)


def read_manifest(storage: Storage, expect_digest: str | None = None) -> tuple[Manifest, bytes]:
    """The manifest of a snapshot, its digest checked but not what it says, and its bytes.

    Raises
    ------
    SnapshotNotFoundError
        If there is no committed snapshot.
    SnapshotChangedError
        If the manifest's digest is not the expected one.
    """
    try:
        data = storage.read(names.MANIFEST, limit=manifests.MAX_BYTES)
    except FileNotFoundError:
        msg = f"no snapshot at {storage.url!r}"
        raise SnapshotNotFoundError(msg) from None
    try:
        return manifests.decode(data, expect_digest), data
    except ExpstateError as error:
        msg = f"{storage.url!r}: {error}"
        raise type(error)(msg) from error


def delete(storage: Storage, *, force: bool = False, expected: tuple[str, str] | None = None) -> None:
    """Remove a snapshot: its manifest first, so that it is gone at once, then its files. ``gc`` finishes what a crash leaves.

    With ``expected``, an id and a manifest's digest, only the snapshot that has them.

    Raises
    ------
    SnapshotNotFoundError
        If there is none.
    SnapshotPinnedError
        If it is pinned or has an alias; ``force`` deletes it all the same.
    SnapshotReplacedError
        If it is replaced while it is being deleted, or is not the expected one.
    """
    manifest, data = read_manifest(storage)
    if expected not in {None, (manifest.id, manifests.digest_of(data))}:
        msg = f"another snapshot lies at {storage.url!r} now"
        raise SnapshotReplacedError(msg)
    files = [record.name for record in manifest.files]
    for name in files:
        names.check_file_name(name)
    if not force:
        annotate.check_removable(storage, manifest.id)
    attempt = Attempt(storage, manifest.id, "delete")
    try:
        attempt.hold(files)
        if not force:  # it may have been pinned since
            annotate.check_removable(storage, manifest.id)
        storage.delete(names.MANIFEST, expected=data)
    except SnapshotExistsError:
        raise
    except (FileExistsError, FileNotFoundError):
        attempt.abandon()  # if the lease cannot be removed either
        attempt.release()
        msg = f"the snapshot at {storage.url!r} was replaced or deleted meanwhile"
        raise SnapshotReplacedError(msg) from None
    except BaseException:
        attempt.abandon()
        with contextlib.suppress(ExpstateError, OSError):
            if read_committed(storage) is None:  # gone in spite of the error
                _delete_all(storage, attempt)
            else:
                attempt.release()
        raise
    try:
        _delete_all(storage, attempt)
    except BaseException:
        # There is no snapshot any more, so what was interrupted is carried on. The lease leads gc to what is left.
        attempt.abandon()
        with contextlib.suppress(ExpstateError, OSError):
            _delete_all(storage, attempt)
        raise


def _delete_all(storage: Storage, attempt: Attempt) -> None:
    """Remove the files of a snapshot whose manifest is gone, once that is durable."""
    storage.flush()
    for name in (*attempt.lease_files, *annotate.temporary_files(storage, attempt.id)):
        storage.delete(name)
    annotate.remove_others(storage, annotate.committed_id(storage))
    storage.delete(names.lease_name(attempt.token))
    storage.remove_folder()
