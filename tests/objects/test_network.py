"""Whatever goes wrong between a client and an object store, each operation ends right, or in an error of ours with nothing half done."""

from __future__ import annotations

import contextlib
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from expstate import Snapshot, StateDict, settings
from expstate.errors import ExpstateError, SnapshotCorruptError, SnapshotNotFoundError
from tests.campaign import IS_LONG, Campaign

from .faults import Action, Delay, Fault, Flip, Hang, Lost, Reset, Shrink, Truncate, gcs_error, s3_error
from .operations import OPERATIONS, Operation
from .stores import WAYS, Store, few

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes
    ----------
    method : str
        The requests that it can hit.
    passes : bool
        Whether nothing may come of it if it hits one request alone.
    lasts : bool
        Whether it can go on for ever.
    lies : bool
        Whether the server says that nothing is there: what is to be removed counts as removed then.
    """

    method: str = ""
    passes: bool = False
    lasts: bool = True
    lies: bool = False


KINDS = {
    "reset": Kind(passes=True),
    "lost": Kind(passes=True),
    "hang": Kind(passes=True, lasts=False),
    "hang when done": Kind(passes=True, lasts=False),
    "500": Kind(passes=True),
    "503": Kind(passes=True),
    "409": Kind(),
    "412": Kind(),
    "403": Kind(),
    "404": Kind(lies=True),
    "truncated": Kind("GET", passes=True),
    "shrunk": Kind("GET"),
    "flipped": Kind("GET"),
    "flipped upload": Kind("PUT|POST"),
    "slow": Kind(passes=True),
}
_SAID = {
    "s3": {500: "InternalError", 503: "SlowDown", 409: "ConditionalRequestConflict", 412: "PreconditionFailed", 403: "AccessDenied"}
    | {404: "NoSuchKey"},
    "gs": {500: "backendError", 503: "backendError", 409: "conflict", 412: "conditionNotMet", 403: "forbidden", 404: "notFound"},
}


def action_of(name: str, store: Store) -> Action:
    """What happens to a request."""
    if name.isdigit():
        scheme = store.root[:2]
        return (gcs_error if scheme == "gs" else s3_error)(int(name), _SAID[scheme][int(name)])
    actions: dict[str, Action] = {
        "reset": Reset(),
        "lost": Lost(),
        "hang": Hang(),
        "hang when done": Hang(stored=True),
        "truncated": Truncate(),
        "shrunk": Shrink(),
        "flipped": Flip(),
        "flipped upload": Flip(upload=True),
        "slow": Delay(0.3),
    }
    return actions[name]


@contextlib.contextmanager
def healed_when_it_hangs(store: Store, fault: Fault) -> Iterator[None]:
    """A connection on which nothing has come for a while is given up by someone on the way."""
    over = threading.Event()

    def heal() -> None:
        while not over.wait(0.02):
            if fault.hits:
                over.wait(0.2)
                store.proxy.clear()
                return

    thread = threading.Thread(target=heal) if isinstance(fault.action, Hang) else None
    if thread is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread is not None:
            thread.join()


def disturbed(operation: Operation, store: Store, fault: Fault) -> ExpstateError | None:
    """How an operation ends that a fault hits: well, or in an error of ours, which is all that it may raise."""
    patience = 15.0 if fault.times == 1 else 0.3
    store.proxy.add(fault)
    try:
        with settings.override(retry_seconds=patience), healed_when_it_hangs(store, fault):
            operation.run()
    except ExpstateError as error:
        return error
    finally:
        store.proxy.clear()
    return None


def numbers(store: Store, name: str) -> dict[str, int]:
    """How many requests of an operation each kind of fault can hit."""
    operation = Operation(store, name)
    store.proxy.requests.clear()
    operation.run()
    methods = [request.method for request in store.proxy.requests]
    return {kind: sum(bool(re.fullmatch(each.method or ".*", method)) for method in methods) for kind, each in KINDS.items()}


UNCHECKED = {"gs": {"flipped upload"}}
"""What the server here stores all the same, again and again. GCS compares what it gets with the checksum that it is told."""
EVERYWHERE = {"lost", "412"}
"""What hits each request in turn: done and not answered, refused by a condition. Others hit the first, the middle and the last."""


def positions(kind: str, count: int, *, lasts: bool) -> list[int]:
    """Which of so many requests is the first to be hit."""
    if kind in EVERYWHERE and not lasts:
        return list(range(1, count + 1))
    return sorted({1, (count + 1) // 2, count})


# In the short form each operation is done in one of the ways.
PAIRS = [(way, name) for one, way in enumerate(WAYS) for other, name in enumerate(OPERATIONS) if IS_LONG or (one + other) % len(WAYS) == 0]


@pytest.mark.campaign("All or nothing", "faults of the network, at one request or from one on")
@pytest.mark.parametrize(("store", "name"), PAIRS, indirect=["store"])
def test_a_request_that_goes_wrong_leaves_nothing_half_done(store: Store, name: str, campaign: Campaign) -> None:
    campaign.count("visible halves", 0)
    campaign.count("leftovers after gc", 0)
    counts = numbers(store, name)
    points = [
        (kind, nth, lasts)
        for kind, each in KINDS.items()
        for lasts in (False, True)
        if counts[kind] and (each.lasts or not lasts) and not (kind in UNCHECKED.get(store.root[:2], ()) and lasts)
        for nth in positions(kind, counts[kind], lasts=lasts)
    ]
    random.Random(f"{store.root[:2]} {name}").shuffle(points)
    problems = []
    for kind, nth, lasts in campaign.each(points, short=2):
        operation = Operation(store, name)
        error = None
        try:
            error = disturbed(
                operation, store, Fault(action_of(kind, store), method=KINDS[kind].method, nth=nth, times=None if lasts else 1)
            )
            operation.check(error)
            if error is not None:
                assert lasts or not KINDS[kind].passes, "that is no reason to fail"
                operation.run_again()
            assert KINDS[kind].lies or operation.left_after_gc() == []
        except Exception as problem:  # noqa: BLE001 - all that is wrong is told, with where it was
            problems.append(f"{kind} at request {nth}{' and after it' * lasts}: {type(problem).__name__}: {problem}; before that {error!r}")
        campaign.count("ended in an error of ours", error is not None)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("name", "kind", "nth"),
    [
        ("take", "404", 5),
        ("copy", "404", 12),
        ("restore", "412", 1),
        ("take", "412", 1),
        ("take", "flipped", 1),
        ("delete", "412", 9),
        ("copy", "412", 12),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error_of_ours(store: Store, name: str, kind: str, nth: int) -> None:
    """No bucket to write to any more, a condition that nobody made, and bytes that are not what is there, from then on."""
    operation = Operation(store, name)
    error = disturbed(operation, store, Fault(action_of(kind, store), method=KINDS[kind].method, nth=nth))

    operation.check(error)
    assert error is None or type(error).__module__ == "expstate.errors"
    assert KINDS[kind].lies or operation.left_after_gc() == []


OFTEN = {"take": 6, "incremental take": 4, "restore": 4, "verify": 2, "copy": 2, "overwrite": 2, "delete": 6}
"""What is done in a random run, and how often."""


class Run:
    """Snapshots that are taken, changed and removed one after the other while requests go wrong by chance, and what must be there.

    Attributes
    ----------
    may_be : dict of str to set of float or None
        The values that a place may have: one if it is known, several if an error left it open. None stands for nothing.
    """

    def __init__(self, store: Store, dice: random.Random) -> None:
        self.store = store
        self.dice = dice
        self.may_be: dict[str, set[float | None]] = {}
        self.value = 0
        self.refused = 0

    def _place(self) -> str | None:
        """A place where there is a snapshot for sure."""
        known = [url for url, values in self.may_be.items() if len(values) == 1 and None not in values]
        return self.dice.choice(known) if known else None

    def step(self) -> None:
        """One operation. If it ends well, what is there is known; if not, it is what was there, or all that was to be."""
        kind = self.dice.choices(list(OFTEN), list(OFTEN.values()))[0]
        place = self._place()
        if place is None or (kind in {"take", "copy"} and len(self.may_be) > 30):
            kind = "take" if place is None else "delete"
        target = place if kind in {"overwrite", "restore", "verify", "delete"} and place is not None else self.store.new()
        before = self.may_be.get(target, {None})
        self.value += 1
        after: float | None = {"delete": None, "take": self.value, "incremental take": self.value, "overwrite": self.value}.get(
            kind, next(iter(self.may_be[place])) if place is not None else None
        )
        self.may_be[target] = before | {after}
        live = few(-1)
        try:
            self._do(kind, target, place, live)
        except ExpstateError:
            self.refused += 1
            return
        self.may_be[target] = {after}
        assert kind != "restore" or after == _value_in(live)
        if after is None:
            del self.may_be[target]

    def _do(self, kind: str, target: str, place: str | None, live: dict[str, StateDict]) -> None:
        if kind == "restore":
            Snapshot(target).restore(live)
        elif kind == "verify":
            report = Snapshot(target).verify()
            if not report.ok:
                raise SnapshotCorruptError(str(report))
        elif kind == "delete":
            Snapshot(target).delete()
        elif kind == "copy":
            assert place is not None
            Snapshot(place).copy(target)
        else:
            base = place if kind == "incremental take" else None
            Snapshot.take(target, few(self.value), base=base, overwrite=kind == "overwrite")

    def check(self) -> int:
        """Everything is there as it may be; gives how many snapshots are."""
        count = 0
        for url, values in self.may_be.items():
            try:
                report = Snapshot(url).verify()
            except SnapshotNotFoundError:
                assert None in values, url
                continue
            assert report.ok, str(report)
            live = few(-1)
            Snapshot(url).restore(live)
            assert _value_in(live) in values, url
            count += 1
        return count


def _value_in(live: dict[str, StateDict]) -> float:
    (value,) = {float(each) for tensor in live["model"].values() for each in tensor.unique()}
    return value


@pytest.mark.campaign("All or nothing", "one request in a hundred goes wrong, by chance")
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_many_operations_on_a_bad_network_lose_nothing(request: pytest.FixtureRequest, scheme: str, campaign: Campaign) -> None:
    store: Store = request.getfixturevalue(scheme)
    run = Run(store, random.Random(0))
    kinds = [kind for kind, each in KINDS.items() if each.lasts and not each.lies]
    faults = [
        store.proxy.add(
            Fault(action_of(kind, store), method=KINDS[kind].method, times=None, dice=random.Random(kind), chance=0.01 / len(kinds))
        )
        for kind in kinds
    ]
    try:
        for _ in range(campaign.choose(100, 5_000)):
            store.proxy.requests.clear()
            run.step()
            campaign.tried()
    finally:
        store.proxy.clear()
    campaign.count("faults", sum(fault.hits for fault in faults))
    campaign.count("ended in an error of ours", run.refused)
    campaign.count("snapshots lost", 0)
    assert run.check() > 0
