"""A take from beginning to end: state gathered and flattened, laid out, moved, committed.

``Take`` does it in three steps, so that a caller can go on between them: ``gather`` looks at the state, ``write`` (or ``stage``
and later ``write_staged``) moves it, ``commit`` makes it exist. Whatever goes wrong, ``abort`` leaves the place as it was. On several
ranks each does all of this with its share; the first one has the lease and commits.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate import collector
from expstate._version import __version__
from expstate.engine import agreement, ancestry, crew, share
from expstate.engine.arrays import device_name
from expstate.engine.attempt import Attempt, FollowingAttempt
from expstate.engine.base import Bases
from expstate.engine.fingerprint import new_key
from expstate.engine.part import PartWriter
from expstate.engine.placement import Comparison
from expstate.engine.source import SnapshotSource
from expstate.errors import AppStateError, TakeCancelledError
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.format.manifest import (
    Entry,
    FileRecord,
    KeyRecord,
    Manifest,
    Metadata,
    ObjectEntry,
    TensorEntry,
)
from expstate.format.validate import validate
from expstate.progress import Progress, ProgressOption
from expstate.state import tree
from expstate.state.stateful import RNGState, Stateful, preserved_rng

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from expstate.engine.merge import RankPart
    from expstate.engine.ranks import Ranks
    from expstate.storage.base import Storage


@dataclass(frozen=True, slots=True)
class TakeRequest:
    """What to take and where to, checked by the caller; ``provenance`` is asked when the manifest is written."""

    storage: Storage
    app_state: Mapping[str, Stateful]
    metadata: Metadata
    provenance: Callable[[], dict[str, Any]]
    overwrite: bool
    force: bool
    memory_budget_bytes: int | None
    progress: ProgressOption
    ranks: Ranks
    replicated: tuple[str, ...] = ()
    check_replicated: bool = False
    bases: tuple[SnapshotSource, ...] = ()
    dedup: bool = False
    trust_fingerprint: bool = True
    device_staging_bytes: int | None = None


_LEAVE_SECONDS = 10.0
"""So long the first rank waits for others to remove what they have written, when a take has failed."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_app_state(app_state: object) -> None:
    """Refuse what is not a dict of keys and statefuls.

    Raises
    ------
    AppStateError
        Naming the key and what is wrong with it.
    """
    if not isinstance(app_state, dict):
        msg = f"the app state must be a dict of keys and statefuls, got {type(app_state).__name__}"
        raise AppStateError(msg)
    for key, value in app_state.items():
        if not isinstance(key, str) or not key or _SURROGATE.search(key):
            msg = f"a key of the app state must be a text that is not empty and has no lone surrogates, got {key!r}"
            raise AppStateError(msg)
        if isinstance(value, type) or not isinstance(value, Stateful):
            msg = f"{key!r} is a {type(value).__name__} without state_dict() and load_state_dict(); wrap plain values in StateDict"
            raise AppStateError(msg)


def state_dicts(app_state: Mapping[str, Stateful]) -> dict[str, Any]:
    """The state dict of each stateful, in order. Random generators are read before the first and put back after the last."""
    with preserved_rng():
        captured = {key: value.state_dict() for key, value in app_state.items() if isinstance(value, RNGState)}
        return {key: captured[key] if key in captured else value.state_dict() for key, value in app_state.items()}


class Take:
    """One take.

    Parameters
    ----------
    request : TakeRequest
        What and where.

    Attributes
    ----------
    id : str
        Of the snapshot to be.
    total_bytes, done_bytes : int
        Bytes of its tensors and objects, and those that are written.
    """

    def __init__(self, request: TakeRequest) -> None:
        self._request = request
        self._ranks = request.ranks
        self._storage = request.storage
        self._stop = crew.Stop()
        self._ranks.on_failure(self._stop.set)
        bases = Bases(request.bases)
        self.id, self._fingerprint_key = agreement.agree(request, (bases.fingerprint_key or new_key()).hex())
        self._attempt: Attempt | FollowingAttempt
        if self._ranks.is_first:
            self._attempt = Attempt(request.storage, self.id, "take")
        else:
            self._attempt = FollowingAttempt(request.storage, self.id, self._ranks)
        self._created_at = dt.datetime.now(dt.timezone.utc)
        self._begun = time.monotonic()
        self._looked_at = 0
        self._parent: str | None = None
        self._keys: list[KeyRecord] = []
        self._of_all: dict[str, str] = {}
        namer = names.FileNamer(self._attempt.token, self._ranks.rank if self._ranks.size > 1 else None)
        budget, local_ranks = request.memory_budget_bytes, self._ranks.local_size
        key = bytes.fromhex(self._fingerprint_key) if request.trust_fingerprint else None
        comparison = Comparison(bases, request.dedup, key)
        self._may_share_boxes = comparison.finds_something
        self._part = PartWriter(
            request.storage,
            namer,
            budget,
            local_ranks,
            self._stop,
            self._written,
            self._went_on,
            comparison,
            request.device_staging_bytes,
        )
        self._progress: Progress | None = None
        self.total_bytes = 0
        self.done_bytes = 0

    @property
    def needing_trust(self) -> list[tuple[str, str]]:
        """Paths of objects that only ``trust=True`` will bring back, and why."""
        return self._part.needing_trust

    @property
    def name(self) -> str | None:
        """What people call it, if anything."""
        return self._request.metadata.name

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the app state, once they are gathered."""
        return tuple(record.key for record in self._keys)

    # What to write

    def gather(self) -> None:
        """Take hold of the place, then of the state: flattened, objects pickled, everything laid out."""
        self._attempt.begin(overwrite=self._request.overwrite, force=self._request.force)
        agreement.wait_for_first(self._ranks, "begun")
        self._looked_at = ancestry.moment()
        self._parent = ancestry.parent_of(self._request.app_state)
        states = state_dicts(self._request.app_state)
        with collector.paused():
            leaves = {key: tree.flatten(key, state) for key, state in states.items()}
            pieces = self._share(leaves)
            for key in states:
                stateful = type(self._request.app_state[key])
                self._keys.append(KeyRecord(key, f"{stateful.__module__}.{stateful.__qualname__}"))
                self._part.add_key(key, leaves[key], pieces, self._of_all, is_first=self._ranks.is_first)
        self.total_bytes = self._part.total_bytes
        # From here on their state is all that is needed: statefuls are not kept alive by a take that is still being written.
        self._request = dataclasses.replace(self._request, app_state={}, bases=())

    def _share(self, leaves: Mapping[str, Sequence[tree.Leaf]]) -> dict[str, list[share.Piece]]:
        """What this rank writes of the arrays that others have too; their paths, with their devices, are noted in ``_of_all``."""
        ranks = self._ranks
        if ranks.size == 1 and not any(isinstance(leaf, tree.Sharded) for found in leaves.values() for leaf in found):
            return {}
        is_replicated = share.rule(self._request.app_state, self._request.replicated)
        everyone = range(ranks.size)
        holdings = share.Holdings()
        others: list[agreement.Told] = []
        for key, found in leaves.items():
            for leaf in found:
                if isinstance(leaf, tree.Sharded):
                    holders = [number for rank in leaf.holders if (number := ranks.group_rank(rank)) is not None]
                    holdings.add(leaf, holders)
                    self._of_all[leaf.path] = leaf.device
                elif ranks.size == 1 or not is_replicated(key, leaf.path):
                    continue
                elif isinstance(leaf, tree.Array):
                    holdings.add(leaf, everyone)
                    self._of_all[leaf.path] = device_name(leaf.tensor)
                elif isinstance(leaf, tree.Object):
                    self._of_all[leaf.path] = "cpu"
                    others.append(agreement.tell(leaf))
                elif self._request.check_replicated and not isinstance(leaf, tree.Alias):
                    others.append(agreement.tell(leaf))  # those that differ stay each rank's own, unless that is asked for
        agreement.check_alike(ranks, holdings, others, digests=self._request.check_replicated)
        return holdings.pieces(ranks.rank)

    # Moving

    def _written(self, nbytes: int) -> None:
        self.done_bytes += nbytes
        if self._progress is not None:
            self._progress.add(nbytes)
        self._went_on()

    def _went_on(self) -> None:
        self._ranks.went_on()
        self._attempt.renew()

    def _show_progress(self) -> None:
        self._progress = Progress("take", self.total_bytes, self._request.progress if self._ranks.is_first else False)

    def write(self) -> None:
        """Stage, digest and write everything; the state must not change meanwhile."""
        self._show_progress()
        self._part.write()

    def stage(self) -> None:
        """Copy everything, so that the state may change; what the budget does not hold at once is written meanwhile."""
        self._show_progress()
        self._part.stage()

    def write_staged(self) -> None:
        """Digest and write what ``stage`` has copied."""
        self._part.write_staged()

    # Making it exist

    def commit(self) -> tuple[Manifest, bytes] | None:
        """Write the digests that the manifest does not hold itself, then commit.

        Returns
        -------
        Manifest
            As it was written.
        bytes
            Its bytes.

        On another rank than the first, None, once the first has committed.
        """
        part = self._part.record(self._ranks.rank if self._ranks.size > 1 else None)
        self._check_stopped()
        committed = self._commit_all(part)
        self._close()
        ancestry.note((record.key for record in self._keys), self.id, self._looked_at, self._storage)
        self._ranks.close()
        return committed

    def _commit_all(self, part: RankPart) -> tuple[Manifest, bytes] | None:
        ranks = self._ranks
        files, entries = part.files, part.entries
        if ranks.size > 1:
            merged = agreement.merge_parts(ranks, part, self._attempt.renew)
            if merged is None:
                agreement.wait_for_first(ranks, "committed")
                self._attempt.finish()
                return None
            files, entries = merged
        with collector.paused():
            manifest = self._manifest(files, entries)
            if self._of_all:
                validate(manifest)  # ranks that do not hold all of a tensor are noticed here
            data = manifests.encode(manifest)
        self._check_stopped()
        ranks.decide_to_commit()
        assert isinstance(self._attempt, Attempt), "only the first rank commits"
        self._attempt.commit(data, {record.name: record.size for record in manifest.files})
        agreement.wait_for_first(ranks, "committed")
        self._attempt.finish()
        return manifest, data

    def _check_stopped(self) -> None:
        self._ranks.check()
        self._stop.check()

    def _manifest(self, files: tuple[FileRecord, ...], entries: tuple[Entry, ...]) -> Manifest:
        return Manifest(
            format=manifests.FORMAT,
            id=self.id,
            created_at=self._created_at.isoformat(timespec="milliseconds"),
            writer=f"expstate {__version__}",
            requires=(manifests.SHARED_BOXES,) if self._may_share_boxes and _share_boxes(entries) else (),
            world_size=self._ranks.size,
            metadata=self._request.metadata,
            provenance=self._request.provenance(),
            parent=self._parent,
            fingerprint_key=self._fingerprint_key if any(map(_has_fingerprint, entries)) else None,
            duration_seconds=round(time.monotonic() - self._begun, 6),
            keys=tuple(self._keys),
            files=files,
            entries=entries,
        )

    # Ending

    def cancel(self) -> None:
        """Stop as soon as the threads notice, on all ranks; without effect once the commit has begun."""
        self._stop.set()
        self._ranks.give_up(TakeCancelledError("the take was cancelled"))

    def abort(self, error: BaseException | None = None) -> bool:
        """Remove what was written, unless it was committed; whether it was. Other ranks are told of the error."""
        self._stop.set()
        self._ranks.fail(TakeCancelledError("the take was cancelled") if error is None or isinstance(error, crew.StoppedError) else error)
        self._part.abort()
        if isinstance(self._attempt, Attempt) and self._ranks.size > 1:
            # Others remove their own; what is left of one that cannot is found by its name.
            self._ranks.wait_until_left(_LEAVE_SECONDS)
            self._attempt.note_files()
        self._attempt.abort(self._part.created)
        self._close()
        self._ranks.close()
        return self._attempt.committed

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        self._part.close()


def _has_fingerprint(entry: Entry) -> bool:
    return isinstance(entry, TensorEntry) and any(box.fingerprint is not None for box in entry.boxes)


def _share_boxes(entries: Iterable[Entry]) -> bool:
    """Whether boxes of several entries lie at the same place."""
    places: set[tuple[int, int]] = set()
    for entry in entries:
        if isinstance(entry, (TensorEntry, ObjectEntry)):
            for box, nbytes in SnapshotSource.box_sizes(entry):
                if nbytes and (box.file, box.offset) in places:
                    return True
                places.add((box.file, box.offset) if nbytes else (-1, -1))
    return False


def take_now(request: TakeRequest) -> tuple[Take, tuple[Manifest, bytes] | None]:
    """Take and wait for the commit.

    Returns
    -------
    Take
        With what there is to say about it.
    tuple of Manifest and bytes, or None
        As it was committed; None on another rank than the first.
    """
    take = Take(request)
    with collector.paused() as pause:
        try:
            take.gather()
            if take.total_bytes >= collector.LONG_BYTES:
                pause.end()
            take.write()
            return take, take.commit()
        except BaseException as error:
            take.abort(error)
            raise
