"""An async take that comes before an earlier one has ended waits for it, is skipped, or replaces it, and says so."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, PendingSnapshot, Snapshot, StateDict, cli
from expstate import gc as collect
from expstate.engine import busy
from expstate.errors import InvalidArgumentError, MemoryBudgetError, StorageError, TakeCancelledError, TakePendingError, TakeSkippedError
from expstate.notebook.browser import overview
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage
from tests.engine.processes import in_child


class _Slow:
    """A storage at a path whose writes wait until it is opened."""

    def __init__(self, path: Path) -> None:
        self.storage = FaultyStorage(open_storage(path))
        self.open = threading.Event()
        self.storage.run("write", None, function=self._wait)
        self.taken: list[PendingSnapshot] = []

    def _wait(self) -> None:
        assert self.open.wait(60)

    def take(self, *keys: str, **options: Any) -> PendingSnapshot:
        self.taken.append(Snapshot.async_take(self.storage.url, state(*keys), **options))
        return self.taken[-1]

    def open_after(self, seconds: float) -> None:
        threading.Timer(seconds, self.open.set).start()


def state(*keys: str) -> dict[str, Any]:
    return {key: StateDict(weight=torch.ones(3)) for key in keys or ("model",)}


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Callable[[str], _Slow]]:
    """Makes slow storages by name."""
    made: list[_Slow] = []

    def make(name: str = "slow") -> _Slow:
        made.append(_Slow(tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        one.open.set()
        for pending in one.taken:
            pending.exception()


def at_the_same_time(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Begin ``work`` in a thread of its own; what it gives, or raises."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def busy_of(snapshot: Snapshot) -> Any:
    return snapshot.metadata.provenance.get("busy")


# wait


def test_the_next_take_waits_for_the_one_before(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """By default; it begins when the other has ended, and says how long it has waited."""
    storage = slow()
    first = storage.take()
    thread, results = at_the_same_time(lambda: Snapshot.async_take(tmp_path / "next", state()))
    thread.join(0.3)
    assert thread.is_alive()
    assert not (tmp_path / "next").exists()
    storage.open.set()
    thread.join()

    assert first.done()
    found = busy_of(results[0].wait())
    assert "wait" == found.pop("policy")
    assert 0.2 < found.pop("waited_seconds") < 60
    assert {} == found


def test_a_failure_is_told_by_its_own_take(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """Who waits for the storage to be free is not who has to hear of it."""
    storage = slow()
    storage.storage.fail("finish", error=StorageError("the disk is broken"))
    first = storage.take()
    storage.open_after(0.1)
    snapshot = Snapshot.async_take(tmp_path / "next", state()).wait()

    assert snapshot.verify().ok
    assert isinstance(first.exception(), StorageError)


def test_takes_of_other_keys_do_not_wait(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """Nor does one that is waited for from the beginning."""
    first = slow().take("model", "optimizer")
    other = Snapshot.async_take(tmp_path / "other", state("tokenizer")).wait()
    Snapshot.take(tmp_path / "now", state("model"))

    assert not first.done()
    assert busy_of(other) is None


def test_one_common_key_is_enough(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    first = slow().take("model", "optimizer")

    assert Snapshot.async_take(tmp_path / "one", state("optimizer", "tokenizer"), on_busy="skip").skipped
    assert not first.done()


@pytest.mark.parametrize("on_busy", busy.POLICIES)
def test_nothing_is_said_when_nothing_happened(tmp_path: Path, on_busy: str) -> None:
    for number in range(3):
        pending = Snapshot.async_take(tmp_path / str(number), state(), on_busy=on_busy)
        assert not pending.skipped
        assert busy_of(pending.wait()) is None


def test_a_take_that_stands_still_is_not_waited_for_for_ever(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """The error names its keys, and the way out; nothing is written."""
    storage = slow()
    storage.take()
    with pytest.raises(TakePendingError, match=r"an earlier take of model has written nothing for 0\.3 s.*timeout="):
        Snapshot.async_take(tmp_path / "next", state(), timeout=0.3)
    assert not (tmp_path / "next").exists()
    storage.open.set()

    assert Snapshot.async_take(tmp_path / "next", state()).wait().verify().ok


def test_takes_of_several_threads_come_one_after_the_other(tmp_path: Path) -> None:
    """Whatever keys they have in common."""
    threads = [
        at_the_same_time(
            lambda number=number: Snapshot.async_take(tmp_path / str(number), state("ab"[number % 2], "bc"[number % 2])).wait()
        )
        for number in range(8)
    ]
    for thread, _ in threads:
        thread.join(60)

    assert all(results[0].verify().ok for _, results in threads)
    assert [] == busy._turns


def test_a_take_in_a_done_callback_does_not_wait_for_its_own(tmp_path: Path) -> None:
    taken: list[PendingSnapshot] = []
    first = Snapshot.async_take(tmp_path / "first", state())
    first.add_done_callback(lambda _: taken.append(Snapshot.async_take(tmp_path / "second", state())))
    first.wait()
    first._thread.join()

    assert busy_of(taken[0].wait()) is None


def test_a_take_inside_of_another_does_not_wait_for_it(tmp_path: Path) -> None:
    """A stateful may take snapshots of its own."""

    class Nested:
        def state_dict(self) -> dict[str, Any]:
            return {"inner": Snapshot.async_take(tmp_path / "inner", state()).wait().id}

        def load_state_dict(self, _: dict[str, Any]) -> None: ...

    outer = Snapshot.async_take(tmp_path / "outer", {"model": Nested()}).wait()

    assert Snapshot(tmp_path / "inner").id == outer.read_object("model/inner")


def test_an_interrupt_ends_the_wait(slow: Callable[..., _Slow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left of the take that waited: the next is not held up by it."""
    storage = slow()
    storage.take()
    with monkeypatch.context() as patched:
        patched.setattr(busy.time, "monotonic", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Snapshot.async_take(tmp_path / "next", state())
    storage.open.set()

    assert Snapshot.async_take(tmp_path / "next", state()).wait().verify().ok
    assert [] == busy._turns


# skip


def test_a_skipped_take_says_so(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """It is done, is no snapshot, and has written nothing."""
    storage = slow()
    storage.take()
    skipped = Snapshot.async_take(tmp_path / "next", state(), on_busy="skip")
    told: list[PendingSnapshot] = []
    skipped.add_done_callback(told.append)

    assert (True, True, 0, 0, "") == (skipped.skipped, skipped.done(), skipped.total_bytes, skipped.done_bytes, skipped.id)
    assert isinstance(skipped, PendingSnapshot)
    with pytest.raises(TakeSkippedError, match="earlier take of model had not ended"):
        skipped.wait()
    assert isinstance(skipped.exception(), TakeSkippedError)
    assert skipped.cancel()
    assert [skipped] == told
    assert f"PendingSnapshot({str(tmp_path / 'next')!r}, skipped)" == repr(skipped)
    assert "skipped the take of model: an earlier one had not ended" == str(skipped)
    assert not (tmp_path / "next").exists()


def test_the_next_take_counts_those_that_were_skipped(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """Once, and only those of its keys."""
    storage = slow()
    first = storage.take("model", "other")
    for keys in (["model"], ["model"], ["other"]):
        assert Snapshot.async_take(tmp_path / "next", state(*keys), on_busy="skip").skipped
    storage.open.set()
    first.wait()
    one, two = (Snapshot.async_take(tmp_path / name, state(), on_busy="skip").wait() for name in ("one", "two"))

    assert {"policy": "skip", "skipped": 2} == busy_of(one)
    assert busy_of(two) is None


def test_a_take_that_fails_leaves_the_count_to_the_next(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    storage = slow()
    first = storage.take()
    assert Snapshot.async_take(tmp_path / "next", state(), on_busy="skip").skipped
    storage.open.set()
    first.wait()
    broken = FaultyStorage(open_storage(tmp_path / "broken"))
    broken.fail("write", error=StorageError("the disk is broken"))
    assert Snapshot.async_take(broken.url, state(), on_busy="skip").exception() is not None

    assert {"policy": "skip", "skipped": 1} == busy_of(Snapshot.async_take(tmp_path / "next", state(), on_busy="skip").wait())


# replace


def test_a_take_is_replaced(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """Nothing of it remains, who waits for it is told, and its id stands in the one that came instead."""
    storage = slow()
    first = storage.take()
    storage.open_after(0.1)
    snapshot = Snapshot.async_take(tmp_path / "next", state(), on_busy="replace").wait()

    with pytest.raises(TakeCancelledError):
        first.wait()
    assert not (tmp_path / "slow").exists()
    assert {"policy": "replace", "replaced": [first.id]} == busy_of(snapshot)
    assert () == collect(tmp_path).removed


def test_what_is_committed_already_is_not_replaced(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """It was too late, and both are there."""
    storage = slow()
    first = storage.take()
    cancel = first._take.cancel
    first._take.cancel = lambda: (storage.open.set(), first.wait(), cancel())  # type: ignore[method-assign]
    snapshot = Snapshot.async_take(tmp_path / "next", state(), on_busy="replace").wait()

    assert first.wait().verify().ok
    assert busy_of(snapshot) is None


# All


@pytest.mark.parametrize("given", ["later", "", None, True, "Wait"])
def test_what_is_no_policy_is_refused_at_once(tmp_path: Path, given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"on_busy must be one of 'wait', 'skip', 'replace', got"):
        Snapshot.async_take(tmp_path / "next", state(), on_busy=given)

    assert not (tmp_path / "next").exists()


def test_a_bad_argument_replaces_nothing(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """What would be refused anyway has cancelled no take before."""
    storage = slow()
    first = storage.take()
    with pytest.raises(MemoryBudgetError):
        Snapshot.async_take(tmp_path / "next", state(), on_busy="replace", memory_budget_bytes=-1)
    storage.open.set()

    assert first.wait().verify().ok


def test_a_forked_child_is_not_busy(slow: Callable[..., _Slow], tmp_path: Path) -> None:
    """The threads that would end the take are the parent's."""
    storage = slow()
    storage.take()

    assert in_child(lambda: Snapshot.async_take(tmp_path / "child", state()).wait().verify().ok).result


def test_no_state_is_kept_alive(tmp_path: Path) -> None:
    """Of takes that have ended nothing is known any more."""
    stateful = StateDict(weight=torch.ones(3))
    seen = weakref.ref(stateful)
    pending = Snapshot.async_take(tmp_path / "one", {"model": stateful})
    pending.wait()
    del stateful, pending
    gc.collect()

    assert seen() is None


def test_it_is_shown(slow: Callable[..., _Slow], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By ``expstate show``, in the record, and by the browser."""
    storage = slow()
    catalog = Catalog(tmp_path / "catalog.db")
    first = storage.take()
    for _ in range(2):
        Snapshot.async_take(tmp_path / "next", state(), on_busy="skip")
    storage.open.set()
    first.wait()
    Snapshot.async_take(tmp_path / "next", state(), name="next", catalog=catalog).wait()
    record = catalog["next"]
    catalog.close()
    cli.main(["show", "next", "--catalog", str(tmp_path / "catalog.db")])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    browsed = list(overview._provenance(record.provenance))

    assert {"policy": "wait", "skipped": 2} == record.provenance["busy"]
    for fact in (["busy.policy", "wait"], ["busy.skipped", "2"]):
        assert fact in printed
        assert fact in browsed
