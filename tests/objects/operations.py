"""What is done with snapshots in an object store while the network is disturbed, and all that must hold wherever it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from expstate import Snapshot, StateDict, gc
from expstate.engine.lease import LEASE_SECONDS
from expstate.errors import ExpstateError, RestoreInterruptedError, SnapshotCorruptError, SnapshotNotFoundError
from expstate.storage.registry import open_storage
from expstate.testing.cases import TOKEN

from .stores import Store, files

_FILES = 3
_NOTHING = 99.0
"""What live state holds that nothing was put into."""
_LEASE = '{"id":"%s","action":"take","host":"h","boot":null,"namespace":null,"pid":1,"started":1,"heartbeat":0}'


def state(value: float) -> dict[str, StateDict]:
    """Data files of which some are the same whatever the value, and some are not."""
    own = {f"own.{number}": torch.full((150_000,), float(value + number)) for number in range(_FILES)}
    return {"model": StateDict(**own), "frozen": StateDict(table=torch.arange(200_000)), "progress": StateDict(value=float(value))}


def value_of(live: dict[str, StateDict]) -> float:
    """The value that a whole state was made with."""
    value = float(live["progress"]["value"])
    expected = state(value)
    for key, one in expected.items():
        for name, wanted in one.items():
            assert torch.equal(wanted, live[key][name]) if isinstance(wanted, torch.Tensor) else wanted == live[key][name], f"{key}/{name}"
    return value


def found_at(url: str) -> float | None:
    """The value of the snapshot at a place, all of it verified; None if nothing is visible there."""
    try:
        report = Snapshot(url).verify()
    except SnapshotNotFoundError:
        return None
    assert report.ok, str(report)
    live = state(_NOTHING)
    Snapshot(url).restore(live)
    return value_of(live)


@contextmanager
def two_days_later(url: str) -> Iterator[None]:
    """No lease is renewed any more."""
    storage = open_storage(url)
    ahead = storage.clock() + 2 * LEASE_SECONDS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(storage), "clock", lambda _: ahead)
        yield


class Operation:
    """An operation in folders of its own.

    Attributes
    ----------
    before, after : float or None
        The value that is visible at the place when nothing has been done, and when all has.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self.earlier, self.place = store.new(), store.new()
        self.live = state(_NOTHING)
        Snapshot.take(self.earlier, state(1))
        self.before = 2.0 if name in {"overwrite", "restore", "verify", "delete", "gc"} else None
        if self.before is not None:
            Snapshot.take(self.place, state(self.before))
        if name == "gc":
            storage = open_storage(self.place)
            storage.create(f".attempt-{TOKEN}.json", (_LEASE % (TOKEN + 24 * "0")).encode(), token=TOKEN)
            storage.create(f"model-00001-{TOKEN}.safetensors", b"left", token=TOKEN)
        self.after = {"copy": 1.0, "delete": None}.get(name, self.before or 3.0) if name != "overwrite" else 3.0

    def run(self) -> None:
        """Do it."""
        match self.name:
            case "take" | "overwrite":
                Snapshot.take(self.place, state(3), overwrite=self.name == "overwrite")
            case "async take":
                Snapshot.async_take(self.place, state(3)).wait()
            case "incremental take":
                Snapshot.take(self.place, state(3), base=self.earlier)
            case "restore":
                Snapshot(self.place).restore(self.live)
            case "verify":
                report = Snapshot(self.place).verify()
                if not report.ok:
                    raise SnapshotCorruptError(str(report))
            case "copy":
                Snapshot(self.earlier).copy(self.place)
            case "delete":
                Snapshot(self.place).delete()
            case "gc":
                with two_days_later(self.place):
                    gc(self.place)

    def run_again(self) -> None:
        """Do what failed once more, which must end well, unless it had been done after all."""
        if self.before == self.after or found_at(self.place) == self.before:
            self.run()
            self.check(None)

    def check(self, error: ExpstateError | None) -> None:
        """All that must hold when the network is whole again, however the operation has ended."""
        assert 1 == found_at(self.earlier)
        found = found_at(self.place)
        assert found in {self.before, self.after}
        assert error is not None or self.after == found
        if self.name == "restore":
            self._check_live(error)

    def _check_live(self, error: ExpstateError | None) -> None:
        if isinstance(error, RestoreInterruptedError):
            wanted = state(2)
            for path in error.applied:
                key, _, name = path.partition("/")
                expected = wanted[key].get(name)
                assert not isinstance(expected, torch.Tensor) or torch.equal(expected, self.live[key][name])
        else:
            assert (2 if error is None else _NOTHING) == value_of(self.live)

    def left_after_gc(self) -> list[str]:
        """Files that no manifest names, when all that may be thrown away has been."""
        left = []
        for url in (self.earlier, self.place):
            with two_days_later(url):
                gc(url)
            try:
                named = {"snapshot.json", *(record.name for record in Snapshot(url).manifest.files)}
            except SnapshotNotFoundError:
                named = set()
            left += [f"{url}/{name}" for name in files(url) if name not in named]
        return left


OPERATIONS = ("take", "async take", "incremental take", "overwrite", "restore", "verify", "copy", "delete", "gc")
