"""Ranks that work on one snapshot together: they agree through the store of their process group, and watch over each other.

``join`` gives the ranks of one operation. There are no collectives: what ranks tell each other lies in the store under names of this
operation alone, so that every backend will do, and any thread. An error on one rank is raised on all; a rank that is gone, or does not
go on, is named.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch

from expstate.engine.watch import Watched, has_ended_here, is_of_here, this_process
from expstate.errors import InvalidArgumentError, RankFailedError, RankTimeoutError
from expstate.settings import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

TIMEOUT_SECONDS = 600.0
"""So long a rank may stand still before it counts as hung."""
_BEAT_SECONDS = 1.0
_DEAD_SECONDS = 7.0
"""A rank of another machine that was not heard of for so long is gone; one of this machine as soon as its process is."""
_CHUNK_BYTES = 4 * MIB
"""The store takes no more than 8 MiB at once."""
_LEAST_PAUSE, _MOST_PAUSE = 0.001, 0.05

_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""For each process group how many operations there were; all ranks count alike."""


class Ranks:
    """The ranks of one operation; this class alone is that of a process by itself.

    Attributes
    ----------
    rank : int
        This one, in the group.
    size : int
        How many there are.
    local_size : int
        How many of them are on this machine, once ``hosts`` are known.
    """

    rank = 0
    size = 1
    local_size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that does what is done once."""
        return self.rank == 0

    def group_rank(self, global_rank: int) -> int | None:
        """A rank's number in this group, or None if it is not in it."""
        is_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        return 0 if global_rank == (torch.distributed.get_rank() if is_group else 0) else None

    def gather(self, name: str, data: bytes, idle: Callable[[], object] | None = None) -> list[bytes]:  # noqa: ARG002 - nobody to wait for
        """What every rank gives under a name, in order; nothing but on the first rank."""
        return [data]

    def spread(self, name: str, data: bytes | None) -> bytes:  # noqa: ARG002 - for others to look up
        """What the first rank gives, on every rank."""
        assert data is not None
        return data

    def went_on(self) -> None:
        """Note that this rank has done something, and does not hang."""

    def decide_to_commit(self) -> None:
        """On the first rank: from here on nobody gives up; raises what has happened on another rank if one has already."""

    def decide_to_give_up(self) -> bool:
        """Whether nothing will be committed; else it may be, and everything must stay where it is."""
        return True

    def wait_until_left(self, seconds: float) -> None:
        """Wait until every other rank has left the operation, but no longer than so many seconds."""

    def fail(self, error: BaseException) -> None:
        """Have every other rank raise what has happened here, unless the first has decided to commit and this is another."""

    def give_up(self, error: BaseException) -> None:
        """Raise an error on all ranks, here where another thread waits for them; without effect once the first has decided to commit."""

    def on_failure(self, told: Callable[[BaseException], object]) -> None:
        """Call this when another rank has failed."""

    def check(self) -> None:
        """Raise what has happened on another rank."""

    def close(self) -> None:
        """The operation is over for this rank."""

    @contextlib.contextmanager
    def failing(self) -> Iterator[Self]:
        """An exception inside of this ``with`` block is one on all ranks."""
        try:
            yield self
        except BaseException as error:
            self.fail(error)
            self.close()
            raise


class _Group(Ranks):
    """Several ranks, which find each other in the store of a process group."""

    def __init__(self, pg: Any, timeout: float) -> None:
        self.rank, self.size = torch.distributed.get_rank(pg), torch.distributed.get_world_size(pg)
        number = _numbers.get(pg, 0)
        _numbers[pg] = number + 1
        self._pg = pg
        self._timeout = timeout
        self._store = _store_of(pg)
        self._prefix = f"expstate/{number}/"
        self._failure: BaseException | None = None
        self._told: list[Callable[[BaseException], object]] = []
        self._lock = threading.Lock()
        self._given: list[str] = []
        self._gathered: list[str] = []
        self._spread: list[str] = []
        self._has_failed = False
        self._processes: dict[int, dict[str, Any]] = {}
        self._steps = 0
        self._waits = False
        self._ended = threading.Event()
        self._gone: set[int] = set()
        self._watcher = threading.Thread(target=self._watch, name="expstate-ranks", daemon=True)
        self._put("process", json.dumps(this_process()).encode(), of=self.rank)
        with self._reachable():
            # Not left to the watcher: who is killed before that begins would not be missed until the timeout.
            self._store.set(f"{self._prefix}beat/{self.rank}", "0 0 0")
        self._watcher.start()

    def group_rank(self, global_rank: int) -> int | None:
        try:
            return torch.distributed.get_group_rank(self._pg, global_rank)
        except (ValueError, RuntimeError):
            return None

    # The store

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except torch.distributed.DistError as error:
            if self._failure is not None:
                raise self._failure from None
            raise self._unreachable(error) from error

    def _unreachable(self, error: BaseException) -> RankFailedError:
        """What it means that the store does not answer: as a rule that the first rank, which keeps it, is gone."""
        first = self._processes.get(0)
        until = time.monotonic() + _BEAT_SECONDS  # a process that ends closes its connections first
        while first is not None and not (is_gone := has_ended_here(first)) and time.monotonic() < until:
            time.sleep(_MOST_PAUSE)
        if first is not None and is_gone:
            return RankFailedError(f"rank 0 is gone: its process {first['pid']} on {first['host']} has ended, and the store with it", 0)
        msg = f"the store of the process group does not answer any more; the rank or launcher that kept it is gone: {_first_line(error)}"
        return RankFailedError(msg)

    def _put(self, name: str, data: bytes, *, of: int | None = None) -> None:
        key = f"{self._prefix}{name}" if of is None else f"{self._prefix}{name}/{of}"
        chunks = [data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]
        with self._reachable():
            for number, chunk in enumerate(chunks):
                self._store.set(f"{key}/{number}", chunk)
            self._store.set(key, str(len(chunks)))
        self._given += [key, *(f"{key}/{number}" for number in range(len(chunks)))]

    def _get(self, name: str, *, of: int | None = None) -> bytes:
        key = f"{self._prefix}{name}" if of is None else f"{self._prefix}{name}/{of}"
        with self._reachable():
            return b"".join(self._store.get(f"{key}/{number}") for number in range(int(self._store.get(key))))

    def _has(self, name: str) -> bool:
        with self._reachable():
            return bool(self._store.check([f"{self._prefix}{name}"]))

    def _count(self, name: str, more: int) -> int:
        with self._reachable():
            return int(self._store.add(f"{self._prefix}{name}", more))

    # Agreeing

    def gather(self, name: str, data: bytes, idle: Callable[[], object] | None = None) -> list[bytes]:
        self._gathered.append(name)
        self._put(name, data, of=self.rank)
        self._count(f"{name}/count", 1)
        self.went_on()
        if not self.is_first:
            return []
        self._wait(lambda: self._count(f"{name}/count", 0) >= self.size, idle)
        return [self._get(name, of=rank) for rank in range(self.size)]

    def spread(self, name: str, data: bytes | None) -> bytes:
        self._spread.append(name)
        if self.is_first:
            assert data is not None
            self._put(name, data)
            self.went_on()
            return data
        self._wait(lambda: self._has(name))
        found = self._get(name)
        self._process_of(0)  # known before it may be gone, and the store with it
        self.went_on()
        return found

    def _wait(self, ready: Callable[[], bool], idle: Callable[[], object] | None = None) -> None:
        pause = _LEAST_PAUSE
        self._waits = True
        try:
            while not ready():
                self._look_for_failure()
                self.check()
                if idle is not None:
                    idle()
                time.sleep(pause)
                pause = min(_MOST_PAUSE, 2 * pause)
        finally:
            self._waits = False

    # Deciding

    def _decide(self, what: str) -> bool:
        return bytes(self._store.compare_set(f"{self._prefix}decision", "", what)).decode() == what

    def decide_to_commit(self) -> None:
        with self._reachable():
            if self._decide("commit"):
                return
        self._look_for_failure()
        self.check()
        msg = "another rank has given up"
        raise RankFailedError(msg)

    def decide_to_give_up(self) -> bool:
        try:
            return self._decide("give up")
        except (torch.distributed.DistError, RuntimeError):
            return False  # who knows what the first rank does

    def wait_until_left(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        left = set(range(self.size)) - {self.rank}
        with contextlib.suppress(torch.distributed.DistError, RuntimeError):
            while left - self._gone and time.monotonic() < until:
                left = {rank for rank in left if self._is_here(rank)}
                time.sleep(_LEAST_PAUSE)

    def _is_here(self, rank: int) -> bool:
        """Whether another rank has joined the operation and not left it."""
        return self._beat_of(rank) not in {"", "closed"} and not has_ended_here(self._process_of(rank))

    # Failing

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def on_failure(self, told: Callable[[BaseException], object]) -> None:
        with self._lock:
            self._told.append(told)
            failure = self._failure
        if failure is not None:
            told(failure)

    def fail(self, error: BaseException) -> None:
        if error is self._failure:
            return
        self._has_failed = True
        text = str(error) or type(error).__name__
        self._tell({"rank": self.rank, "text": f"{type(error).__name__}: {text}" if str(error) else text, "kind": "error"})

    def give_up(self, error: BaseException) -> None:
        self.fail(error)
        if self.decide_to_give_up():
            self._note(error)

    def _tell(self, what: dict[str, Any]) -> None:
        with contextlib.suppress(RankFailedError, torch.distributed.DistError, RuntimeError):
            self._store.compare_set(f"{self._prefix}failed", "", json.dumps(what))

    def _look_for_failure(self) -> None:
        if self._failure is not None or not self._has("failed"):
            return
        with self._reachable():
            what = json.loads(self._store.get(f"{self._prefix}failed"))
        if what["rank"] == self.rank and what["kind"] == "error":
            return  # told by this rank itself, which raises its own
        if what["rank"] != 0 and not self.decide_to_give_up():
            return  # too late: the first rank commits, and only what becomes of it counts
        if what["kind"] == "gone":
            self._gone.add(what["rank"])
        kind = RankTimeoutError if what["kind"] == "hung" else RankFailedError
        verb = {"error": "failed", "gone": "is gone", "hung": "does not go on"}[what["kind"]]
        self._note(kind(f"rank {what['rank']} {verb}: {what['text']}", what["rank"]))

    def _note(self, failure: BaseException) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
            told = list(self._told)
        for call in told:
            call(failure)

    # Watching over each other

    def went_on(self) -> None:
        self._steps += 1

    def _watch(self) -> None:
        watched = [rank for rank in range(self.size) if rank != self.rank] if self.is_first else [0]
        # What is heard of a rank may be a beat old, and so may what it has heard.
        watchers = {rank: Watched(self._timeout + 2 * _BEAT_SECONDS) for rank in watched}
        beats = 0
        try:
            while not self._ended.wait(_BEAT_SECONDS if beats else 0):
                beats += 1
                self._store.set(f"{self._prefix}beat/{self.rank}", f"{beats} {self._steps} {int(self._waits)}")
                self._look_for_failure()
                if self._failure is not None:
                    return
                for rank, one in watchers.items():
                    self._look_at(rank, one)
        except (RankFailedError, RuntimeError) as error:
            if not self._ended.is_set():
                self._note(error if isinstance(error, RankFailedError) else self._unreachable(error))

    def _beat_of(self, rank: int) -> str:
        key = f"{self._prefix}beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _process_of(self, rank: int) -> dict[str, Any]:
        if rank not in self._processes:
            self._processes[rank] = json.loads(self._get("process", of=rank))
        return self._processes[rank]

    def _look_at(self, rank: int, watched: Watched) -> None:
        beat = self._beat_of(rank)
        if beat == "closed" or self._ended.is_set():
            return
        if beat:
            process = self._process_of(rank)
            silence = watched.silence(beat)
            if silence > 2 * _BEAT_SECONDS and has_ended_here(process):
                self._tell({"rank": rank, "text": f"its process {process['pid']} on {process['host']} has ended", "kind": "gone"})
                return
            if silence > _DEAD_SECONDS and not is_of_here(process):
                text = f"its process {process['pid']} on {process['host']} was not heard of for {_DEAD_SECONDS:g} s"
                self._tell({"rank": rank, "text": text, "kind": "gone"})
                return
        if watched.is_hung(beat):
            text = f"for {self._timeout:g} s it " + ("has done nothing" if beat else "has not come to this operation")
            self._tell({"rank": rank, "text": text, "kind": "hung"})

    def close(self) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._watcher.join(_BEAT_SECONDS)  # no beat may come after this
        with contextlib.suppress(RankFailedError, torch.distributed.DistError, RuntimeError):
            self._store.set(f"{self._prefix}beat/{self.rank}", "closed")
            if self._failure is None and not self._has_failed:
                self._clean_up()

    def _clean_up(self) -> None:
        """Remove what this rank has given, and if it is the last to leave all that is left."""
        # Others may look up whose a rank is when it has left already; to ask for what is not there any more would be to wait for it.
        processes = [f"process/{rank}" for rank in range(self.size)]
        spread = {f"{self._prefix}{name}" for name in (*self._spread, *processes)}
        own = [key for key in self._given if not any(key == name or key.startswith(f"{name}/") for name in spread)]
        for key in own:
            self._store.delete_key(key)
        if self._count("closed", 1) == self.size:
            for name in spread:
                for number in range(int(self._store.get(name))):
                    self._store.delete_key(f"{name}/{number}")
                self._store.delete_key(name)
            counts = [f"{name}/count" for name in self._gathered]
            beats = [f"beat/{rank}" for rank in range(self.size)]
            for name in (*counts, *beats, "closed", "decision"):
                self._store.delete_key(f"{self._prefix}{name}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _store_of(pg: Any) -> Any:
    own = getattr(pg, "get_group_store", None)
    store: Any = own() if own is not None else torch.distributed.distributed_c10d._get_process_group_store(pg)  # noqa: SLF001 - no other way
    try:
        return store.clone()  # a connection of its own: a wait of another thread does not hold it up
    except (AttributeError, RuntimeError):
        return store


def group_of(pg: Any) -> Any:
    """The process group to work in: the given, else the default one; None for a process by itself.

    Raises
    ------
    InvalidArgumentError
        If ``pg`` is no process group, or one that this rank does not belong to.
    """
    available = torch.distributed.is_available()
    if pg is not None and not (available and isinstance(pg, torch.distributed.ProcessGroup)):
        msg = f"pg must be a process group of torch.distributed that this rank belongs to, got {pg!r}"
        raise InvalidArgumentError(msg)
    if pg is None and available and torch.distributed.is_initialized():
        pg = torch.distributed.group.WORLD
    return None if pg is None or pg.size() == 1 else pg


def position(pg: Any) -> tuple[int, int]:
    """The rank of this process in a process group, and how many there are."""
    group = group_of(pg)
    return (0, 1) if group is None else (group.rank(), group.size())


def check_timeout(timeout: object) -> None:
    """Refuse what is no positive number of seconds, nor None."""
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        msg = f"timeout must be a positive number of seconds, got {timeout!r}"
        raise InvalidArgumentError(msg)


def join(pg: Any, timeout: float | None = None) -> Ranks:
    """The ranks of an operation that begins on all of them now.

    Parameters
    ----------
    pg : torch.distributed.ProcessGroup or None
        Whose ranks; None for all.
    timeout : float, optional
        Seconds that a rank may stand still.

    Raises
    ------
    InvalidArgumentError
        If ``pg`` is no process group of this rank, or the timeout is not positive.
    """
    check_timeout(timeout)
    group = group_of(pg)
    return Ranks() if group is None else _Group(group, TIMEOUT_SECONDS if timeout is None else float(timeout))
