"""Many threads at once, forked children, and staging memory that stays warm for a while: none of them gets in another's way."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import RNGState, Snapshot, StateDict, collector, settings
from expstate.engine import crew, memory
from expstate.errors import SnapshotExistsError
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage

from .campaign import IS_LONG, Campaign
from .engine.processes import in_child

MIB = 2**20
THREADS = 8
WHOLE = memory.WINDOW_BYTES + memory.SLACK_BYTES


@pytest.fixture(autouse=True)
def _cold() -> Iterator[None]:
    """No staging memory of other tests, and none left for them."""
    memory.free_idle()
    yield
    memory.free_idle()


@pytest.fixture
def _counted(campaign: Campaign, turn: int) -> Iterator[None]:
    """One turn is a point of the campaign."""
    yield
    campaign.tried()


def attacked_by(means: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test as one of the campaign, which is tried many times in the long form."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        turns = pytest.mark.parametrize("turn", range(25 if IS_LONG else 1))
        return pytest.mark.campaign("All or nothing", means)(pytest.mark.usefixtures("_counted")(turns(test)))

    return mark


AT_ONCE = attacked_by("takes and restores of eight threads at once")
IN_LOOPS = attacked_by("takes and restores in event loops, of asyncio and of uvloop, that run already")
FORKED = attacked_by("forks while a take goes on in the background")


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """The URL of a storage whose first write waits, what is set when it does, and what lets it go on."""
    storage = FaultyStorage(open_storage(tmp_path / "gated"))
    reached, opened = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        assert opened.wait(60)

    storage.run("write", None, function=wait)
    yield storage.url, reached, opened
    opened.set()


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` gives for each number, all begun at the same moment in threads of their own."""
    barrier = threading.Barrier(THREADS)

    def begin(number: int) -> Any:
        barrier.wait(60)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def state_of(number: int, elements: int = MIB) -> StateDict:
    """A state that tells whose it is: in plain memory, with strides, small, and not a tensor."""
    return StateDict(
        large=torch.full((elements,), float(number)),
        strided=torch.full((300, 500), float(number)).t(),
        small=[torch.full((9,), number) for _ in range(20)],
        number=number,
    )


def numbers_in(state: Any) -> set[float]:
    """The numbers that a state is made of: one, unless threads have mixed them up."""
    tensors = [state["large"], state["strided"], *state["small"]]
    return {float(state["number"]), *(float(value) for tensor in tensors for value in tensor.unique())}


# Threads


@AT_ONCE
def test_one_snapshot_is_read_by_many_threads(tmp_path: Path) -> None:
    """The same object, not opened before: entries, whole keys, restores in place, metadata and verification all at once."""
    Snapshot.take(tmp_path, {"state": state_of(3), "other": state_of(4)}, name="shared")
    snapshot = Snapshot(tmp_path)

    def use(number: int) -> set[float]:
        live = state_of(-number - 1)
        address = live["large"].data_ptr()
        if number % 2:
            live["large"] = snapshot.read_object("state/large")
            live["number"] = snapshot.metadata.name == "shared" and 3
        snapshot.restore({"state": live}, atomic=number % 4 == 0, memory_budget_bytes=5 * MIB)
        assert number % 2 or address == live["large"].data_ptr()
        assert snapshot.verify().ok
        assert {4.0} == numbers_in(snapshot.get_state_dict_for_key("other", verify=number % 3 == 0))
        return numbers_in(live)

    assert [{3.0}] * THREADS == at_once(use)


@AT_ONCE
@pytest.mark.parametrize("method", ["take", "async_take"])
def test_many_threads_take_at_once(tmp_path: Path, method: str) -> None:
    """To paths of their own, with the generators of random numbers, which none of them changes."""
    before = torch.get_rng_state()

    def take(number: int) -> set[float]:
        state = state_of(number)
        taken = getattr(Snapshot, method)(tmp_path / str(number), {"state": state, "rng": RNGState()}, memory_budget_bytes=9 * MIB)
        state["large"].fill_(-1), state["strided"].fill_(-1)
        if method == "async_take":
            taken.wait()
        return numbers_in(Snapshot(tmp_path / str(number)).get_state_dict_for_key("state"))

    assert [{float(number)} for number in range(THREADS)] == at_once(take)
    assert torch.equal(before, torch.get_rng_state())
    assert all(Snapshot(tmp_path / str(number)).verify().ok for number in range(THREADS))


@AT_ONCE
def test_takes_and_restores_at_once(tmp_path: Path) -> None:
    """Half of the threads read what others have taken before, while the other half take: buffers go from one to another."""
    for number in range(THREADS):
        Snapshot.take(tmp_path / str(number), {"state": state_of(number)})

    def use(number: int) -> list[set[float]]:
        found = []
        for turn in range(4):
            if (number + turn) % 2:
                live = state_of(-1)
                Snapshot(tmp_path / str(number)).restore({"state": live})
                found.append(numbers_in(live))
            else:
                place = tmp_path / f"{number} {turn}"
                Snapshot.take(place, {"state": state_of(number)})
                found.append(numbers_in(Snapshot(place).get_state_dict_for_key("state")))
        return found

    assert [[{float(number)}] * 4 for number in range(THREADS)] == at_once(use)


@AT_ONCE
@pytest.mark.parametrize("overwrite", [False, True])
def test_one_path_has_one_winner(tmp_path: Path, overwrite: bool) -> None:
    """Of many threads that take to one path one wins; the others are told, and leave nothing behind."""
    if overwrite:
        Snapshot.take(tmp_path / "place", {"state": state_of(99)})

    def take(number: int) -> int | None:
        try:
            Snapshot.take(tmp_path / "place", {"state": state_of(number, 5)}, overwrite=overwrite)
        except SnapshotExistsError:
            return None
        return number

    winners = {number for number in at_once(take) if number is not None}
    snapshot = Snapshot(tmp_path / "place")
    (found,) = numbers_in(snapshot.get_state_dict_for_key("state"))

    assert int(found) in winners
    assert overwrite or {int(found)} == winners
    assert {"snapshot.json", *(file.name for file in snapshot.manifest.files)} == set(os.listdir(tmp_path / "place"))


def test_settings_are_those_of_the_thread(tmp_path: Path) -> None:
    """An override in one thread is not seen by the others, and goes along into the background."""

    def take(number: int) -> int:
        with settings.override(data_file_bytes=(1 + number) * MIB):
            taken = Snapshot.async_take(tmp_path / str(number), {"state": StateDict(x=torch.zeros(8, MIB // 4))})
        return len(taken.wait().manifest.files)

    assert [-(-8 // (1 + number)) for number in range(THREADS)] == at_once(take)


def test_collections_are_held_back_by_many_threads_and_go_on() -> None:
    """The last one that ends its pause turns the collector on again, in whatever order they come."""
    assert gc.isenabled()

    def pause(number: int) -> bool:
        with collector.paused() as one:
            seen = gc.isenabled()
            if number % 2:
                one.end()
                one.end()
            return seen

    assert [False] * THREADS == at_once(pause)
    assert gc.isenabled()


HAS_UVLOOP = importlib.util.find_spec("uvloop") is not None
LOOPS = ["asyncio", pytest.param("uvloop", marks=pytest.mark.skipif(not HAS_UVLOOP, reason="needs uvloop"))]


def run_in(loop: str, main: Any) -> Any:
    """Run a coroutine in a new loop of this kind."""
    if loop == "asyncio":
        return asyncio.run(main)
    import uvloop

    other = uvloop.new_event_loop()
    try:
        return other.run_until_complete(main)
    finally:
        other.close()


@IN_LOOPS
@pytest.mark.parametrize("loop", LOOPS)
def test_takes_are_awaited_in_many_loops_at_once(tmp_path: Path, loop: str) -> None:
    """Each thread has a loop of its own, in which takes are begun, awaited and read, several at a time."""

    async def main(number: int) -> list[set[float]]:
        async def one(turn: int) -> set[float]:
            state = state_of(10 * number + turn, MIB // 8)
            taken = Snapshot.async_take(tmp_path / f"{number}-{turn}", {"state": state})
            state["large"].fill_(-1)
            await asyncio.sleep(0)
            return numbers_in((await taken).get_state_dict_for_key("state"))

        return list(await asyncio.gather(*(one(turn) for turn in range(3))))

    assert [[{10.0 * number + turn} for turn in range(3)] for number in range(THREADS)] == at_once(
        lambda number: run_in(loop, main(number))
    )


@IN_LOOPS
@pytest.mark.parametrize("loop", LOOPS)
def test_takes_and_restores_inside_of_a_running_loop(tmp_path: Path, loop: str) -> None:
    """As in a cell of a notebook, whose loop is running already."""

    async def main() -> set[float]:
        Snapshot.take(tmp_path / "first", {"state": state_of(1)})
        second = await Snapshot.async_take(tmp_path / "second", {"state": state_of(2)}, base=tmp_path / "first")
        live = state_of(-1)
        second.copy(tmp_path / "copy").restore({"state": live})
        second.delete()
        return numbers_in(live)

    assert {2.0} == run_in(loop, main())


class Doubled(torch.utils.data.Dataset[torch.Tensor]):
    """What its workers give tells that they have run."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(2 * index)


# Forks


@FORKED
def test_workers_of_a_loader_are_forked_while_a_take_goes_on(gated: tuple[str, threading.Event, threading.Event]) -> None:
    """They end as ever, and the take is whole."""
    url, reached, opened = gated
    taken = Snapshot.async_take(url, {"state": state_of(5)})
    assert reached.wait(60)
    loader = torch.utils.data.DataLoader(Doubled(), 4, num_workers=2)
    found = [sorted(int(each) for batch in loader for each in batch) for _ in range(2)]
    opened.set()

    assert [[2 * number for number in range(16)]] * 2 == found
    assert {5.0} == numbers_in(taken.wait().get_state_dict_for_key("state"))


@FORKED
def test_a_forked_child_takes_with_memory_of_its_own(tmp_path: Path) -> None:
    """Where the parent's staging memory is warm: the child begins with none, and both go on."""
    parent = state_of(1)
    with settings.override(staging_idle_seconds=600):
        Snapshot.async_take(tmp_path / "before", {"state": parent}).wait()
        warm = memory._pool.idle_bytes

        def take() -> tuple[int, set[float]]:
            idle = memory._pool.idle_bytes
            Snapshot.async_take(tmp_path / "child", {"state": state_of(2)}).wait()
            live = state_of(-1)
            Snapshot(tmp_path / "before").restore({"state": live})
            return idle, numbers_in(live)

        assert (0, {1.0}) == in_child(take).result
        assert 0 < warm == memory._pool.idle_bytes
        Snapshot.async_take(tmp_path / "after", {"state": parent}).wait()

    assert [{1.0}, {2.0}, {1.0}] == [
        numbers_in(Snapshot(tmp_path / name).get_state_dict_for_key("state")) for name in ("before", "child", "after")
    ]


def test_staging_memory_is_not_shared_with_children() -> None:
    """A child sees zeros, and the parent goes on writing to the very pages that a device may have been told of."""
    buffer = memory.Buffer(2 * MIB, None)
    buffer.view[:] = b"\1" * buffer.size

    def look() -> tuple[int, int]:
        seen = max(buffer.view)
        buffer.view[0] = 7
        return seen, buffer.view[0]

    assert (0, 7) == in_child(look).result
    assert {1} == set(buffer.view)


@FORKED
def test_a_fork_while_a_take_goes_on(tmp_path: Path, gated: tuple[str, threading.Event, threading.Event]) -> None:
    """The child has none of the threads: it takes and restores by itself, and the parent's take is whole."""
    url, reached, opened = gated
    state = state_of(5)
    taken = Snapshot.async_take(url, {"state": state})
    assert reached.wait(60)

    def take() -> set[float]:
        Snapshot.take(tmp_path / "child", {"state": state_of(6)})
        live = state_of(-1)
        Snapshot(tmp_path / "child").restore({"state": live})
        return numbers_in(live)

    assert {6.0} == in_child(take).result
    state["large"].fill_(-1)
    opened.set()
    assert {5.0} == numbers_in(taken.wait().get_state_dict_for_key("state"))
    assert taken.wait().verify().ok


def test_a_fork_while_collections_are_held_back() -> None:
    """A child's collector runs, though the thread that held it back is the parent's; another pause works as ever."""
    inside, over = threading.Event(), threading.Event()

    def hold() -> None:
        with collector.paused():
            inside.set()
            assert over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)

    def look() -> list[bool]:
        before = gc.isenabled()
        with collector.paused():
            during = gc.isenabled()
        return [before, during, gc.isenabled()]

    try:
        assert not gc.isenabled()
        assert [True, False, True] == in_child(look).result
        assert not gc.isenabled()
    finally:
        over.set()
        thread.join()
    assert gc.isenabled()


_EXITS = """
import os, sys, threading, torch
from expstate import Snapshot, StateDict
from expstate.storage.registry import open_storage
from expstate.testing import FaultyStorage

folder = sys.argv[1]
storage = FaultyStorage(open_storage(f"{folder}/parent"))
reached, opened = threading.Event(), threading.Event()
storage.run("write", None, function=lambda: (reached.set(), opened.wait(60)))
taken = Snapshot.async_take(storage.url, {"state": StateDict(x=torch.full((3_000_000,), 1.0))})
assert reached.wait(60)
child = os.fork()
if child == 0:
    Snapshot.async_take(f"{folder}/child", {"state": StateDict(x=torch.full((9,), 2.0))})
else:
    _, status = os.waitpid(child, 0)
    opened.set()
    assert taken.wait().verify().ok
    print("child:", os.waitstatus_to_exitcode(status))
"""


@FORKED
def test_a_forked_child_exits(tmp_path: Path) -> None:
    """By the end of its program, while its parent's take goes on; what it has begun itself is finished before."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _EXITS, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )

    assert ("child: 0\n", "") == (done.stdout, done.stderr)
    assert [1.0, 2.0] == [float(Snapshot(tmp_path / name).read_object("state/x")[0]) for name in ("parent", "child")]


# Staging memory


class _Clock:
    """Timers that go off when they are told to."""

    def __init__(self) -> None:
        self.timers: list[_Clock.Timer] = []
        clock = self

        class Timer:
            def __init__(self, seconds: float, function: Callable[..., None], args: list[Any]) -> None:
                self.seconds, self.fire, self.is_on, self.daemon = seconds, lambda: function(*args), False, False
                clock.timers.append(self)

            def start(self) -> None:
                self.is_on = True

            def cancel(self) -> None:
                self.is_on = False

        self.Timer = Timer


def test_staging_memory_stays_warm_and_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used again by the next take, and freed when nothing has used it for as long as the setting says."""
    clock = _Clock()
    monkeypatch.setattr(memory.threading, "Timer", clock.Timer)
    state = {"state": StateDict(x=torch.zeros(5 * MIB))}
    with settings.override(staging_idle_seconds=7.5):
        Snapshot.async_take(tmp_path / "first", state).wait()
        buffers = {id(buffer) for buffer in memory._pool._idle}
        Snapshot.async_take(tmp_path / "second", state).wait()
    first, *_, last = clock.timers

    assert 2 * WHOLE == memory._pool.idle_bytes
    assert buffers == {id(buffer) for buffer in memory._pool._idle}
    assert {7.5} == {timer.seconds for timer in clock.timers}
    assert [last] == [timer for timer in clock.timers if timer.is_on]
    assert last.daemon
    first.fire()  # it went off as the second take began
    assert 2 * WHOLE == memory._pool.idle_bytes
    last.fire()
    assert 0 == memory._pool.idle_bytes == len(memory._pool._idle)


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_staging_memory_is_freed_by_the_clock(tmp_path: Path, seconds: float) -> None:
    """At once, or by a real timer."""
    with settings.override(staging_idle_seconds=seconds):
        Snapshot.take(tmp_path / "place", {"state": state_of(1)})
        Snapshot(tmp_path / "place").get_state_dict_for_key("state")
    while seconds and memory._pool.idle_bytes:
        time.sleep(0.01)

    assert 0 == memory._pool.idle_bytes


@pytest.mark.parametrize(
    ("budget", "left"), [(200 * MIB, 3 * WHOLE), (40 * MIB, 2 * WHOLE), (20 * MIB, WHOLE), (3 * MIB, MIB + memory.SLACK_BYTES)]
)
def test_idle_memory_counts_towards_the_next_budget(tmp_path: Path, budget: int, left: int) -> None:
    """What an earlier take has left warm is used, or given back as far as the budget of the next does not hold it."""
    with settings.override(staging_idle_seconds=600):
        Snapshot.async_take(tmp_path / "large", {"state": StateDict(x=torch.zeros(12 * MIB))}).wait()
        assert 3 * WHOLE == memory._pool.idle_bytes
        Snapshot.take(tmp_path / "small", {"state": StateDict(x=torch.zeros(5))}, memory_budget_bytes=budget)

    assert left == memory._pool.idle_bytes


def test_a_cancelled_take_gives_its_memory_back(gated: tuple[str, threading.Event, threading.Event]) -> None:
    """Buffers of windows that nobody will write go to the next take as well."""
    url, reached, opened = gated
    with settings.override(staging_idle_seconds=600):
        taken = Snapshot.async_take(url, {"state": StateDict(x=torch.zeros(60 * MIB // 4))}, memory_budget_bytes=5 * WHOLE)
        assert reached.wait(60)
        threading.Timer(0.1, opened.set).start()

        assert taken.cancel()
    assert 4 * WHOLE == memory._pool.idle_bytes


def test_a_budget_is_shared_by_the_threads_of_an_operation() -> None:
    """No more buffers are lent than the budget holds; who waits for one leaves when the operation is over."""
    staging = memory.Staging(2 * WHOLE, THREADS)
    stop = crew.Stop()
    held: list[memory.Buffer] = []

    def lend(number: int) -> str:
        try:
            held.append(staging.acquire(stop))
        except crew.StoppedError:
            return "stopped"
        if len(held) == 2:
            stop.set()
        return "lent"

    assert ["lent"] * 2 + ["stopped"] * (THREADS - 2) == sorted(at_once(lend))
    for buffer in held:
        staging.release(buffer)
    assert 2 * WHOLE == memory._pool.idle_bytes
