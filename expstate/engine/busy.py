"""Async takes of this process that have not ended, by their keys, and what a new one does about those that came before it.

Each comes with its keys and a policy, and has its turn from then until it is committed or has failed, in whichever thread. It waits only
for those that came before, so no two wait for each other; and not for ever, if one of them stands still.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from expstate.engine.ranks import TIMEOUT_SECONDS
from expstate.errors import InvalidArgumentError, TakeCancelledError, TakePendingError
from expstate.state.paths import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from expstate.engine.ranks import Ranks
    from expstate.engine.take import Take

POLICIES = ("wait", "skip", "replace")
_LOOK_SECONDS = 0.2

_lock = threading.Lock()
_turns: list[Turn] = []
_skipped: Counter[frozenset[str]] = Counter()
"""How many takes of these keys were skipped since the last that was committed."""


def check_policy(policy: object) -> None:
    """Refuse what is no policy; ``InvalidArgumentError`` lists them."""
    if policy not in POLICIES:
        msg = f"on_busy must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}"
        raise InvalidArgumentError(msg)


class Turn:
    """The time of one async take.

    Parameters
    ----------
    keys : iterable of str
        Of its app state.

    Attributes
    ----------
    facts : dict
        What happened because others had not ended, for its provenance; empty if nothing did.
    caller : int or None
        The thread that it keeps waiting; None once it is in the background.
    skipped : Counter
        The takes that were skipped before it, by their keys.
    is_cancelled : bool
        Whether it was cancelled.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = frozenset(keys)
        self.facts: dict[str, Any] = {}
        self._take: Take | None = None
        self.caller: int | None = threading.get_ident()
        self.skipped: Counter[frozenset[str]] = Counter()
        self._ended = threading.Event()
        self.is_cancelled = False

    def begins(self, take: Take) -> None:
        """The take is made."""
        self._take = take

    def goes_on(self) -> None:
        """The take leaves its caller's thread for the background."""
        self.caller = None

    def end(self, error: BaseException | None = None) -> None:
        """The take is committed, or this has gone wrong; only the first call counts."""
        with _lock:
            if self._ended.is_set():
                return
            if self in _turns:
                _turns.remove(self)
            if error is not None:
                _skipped.update(self.skipped)
            self.is_cancelled = isinstance(error, TakeCancelledError)
            self._take = None
            self._ended.set()

    # What the policies do

    def count_skipped(self) -> None:
        """Note how many takes were skipped before this one; under the lock."""
        for keys in [keys for keys in _skipped if keys & self.keys]:
            self.skipped[keys] = _skipped.pop(keys)

    def wait_for(self, earlier: Sequence[Turn], policy: str, ranks: Ranks, patience_seconds: float) -> None:
        began = time.monotonic()
        replaced = []
        for other in earlier:
            taken = other.wait_until_ended(ranks, patience_seconds, cancel=policy == "replace" and ranks.is_first)
            if other.is_cancelled and taken is not None:
                replaced.append(taken)
        if earlier and policy == "wait":
            self.facts = {"policy": policy, "waited_seconds": round(time.monotonic() - began, 3)}
        elif replaced:
            self.facts = {"policy": policy, "replaced": replaced}
        if self.skipped:
            self.facts = {"policy": policy, **self.facts, "skipped": self.skipped.total()}

    def wait_until_ended(self, ranks: Ranks, patience_seconds: float, *, cancel: bool) -> str | None:
        """Wait, or have it cancelled as soon as it is in the background; its id, if that was known."""
        snapshot_id: str | None = None
        written, since = 0, time.monotonic()
        while True:
            take = self._take
            if take is not None:
                snapshot_id = take.id
                if cancel and self.caller is None:
                    take.cancel()
                    cancel = False
                if take.done_bytes != written:
                    written, since = take.done_bytes, time.monotonic()
                    ranks.went_on()
            if self._ended.wait(_LOOK_SECONDS):
                return snapshot_id
            ranks.check()
            if time.monotonic() - since > patience_seconds:
                keys = ", ".join(map(printable, sorted(self.keys)))
                msg = (
                    f"an earlier take of {keys} has written nothing for {patience_seconds:g} s, and this one does not wait any longer; "
                    "look for what it waits for; timeout= is how long it may stand still"
                )
                raise TakePendingError(msg)


@contextlib.contextmanager
def turn(keys: Iterable[str], policy: str, ranks: Ranks, timeout: float | None) -> Iterator[Turn | None]:
    """The turn of an async take that comes now, once the takes before it are out of its way; it ends with an exception in the block.

    On several ranks the first decides whether the take is skipped, and what is cancelled.

    Parameters
    ----------
    keys : iterable of str
        Of its app state.
    policy : str
        ``"wait"``, ``"skip"`` or ``"replace"``; the same on all ranks.
    ranks : Ranks
        All that take.
    timeout : float or None
        Seconds that an earlier take may stand still.

    Returns
    -------
    context manager
        Gives the turn, or None if the take is skipped.

    Raises
    ------
    TakePendingError
        If an earlier take stands still for too long.
    InvalidArgumentError
        If the first rank has another policy.
    """
    own = Turn(keys)
    earlier = _come(own, skips=policy == "skip" and ranks.is_first)
    try:
        told = ranks.spread("busy", json.dumps([policy, bool(earlier)]).encode() if ranks.is_first else None)
        policy_of_first, is_busy = json.loads(told)
        _check_same(policy, policy_of_first, ranks)
        if policy == "skip" and is_busy:
            with _lock:
                _skipped.update([own.keys])
                _skipped.update(own.skipped)
                own.skipped.clear()
            own.end()
            yield None
            return
        own.wait_for(earlier, policy, ranks, TIMEOUT_SECONDS if timeout is None else timeout)
        yield own
    except BaseException as error:
        own.end(error)
        raise


def _check_same(policy: str, policy_of_first: str, ranks: Ranks) -> None:
    if policy != policy_of_first:
        msg = f"all ranks must take the same: on_busy is {policy_of_first!r} on rank 0, and {policy!r} on rank {ranks.rank}"
        raise InvalidArgumentError(msg)


def _come(own: Turn, *, skips: bool) -> list[Turn]:
    """The takes with one of its keys that have not ended; the new one stands behind them, unless it skips because there are some."""
    with _lock:
        # One inside of another's state_dict() would wait for what waits for it.
        is_inside = any(other.caller == own.caller for other in _turns)
        earlier = [] if is_inside else [other for other in _turns if other.keys & own.keys]
        if not (skips and earlier):
            own.count_skipped()
            _turns.append(own)
        return earlier


def _forget() -> None:
    global _lock  # noqa: PLW0603 - the parent's may be held by a thread that the child does not have
    _lock = threading.Lock()
    _turns.clear()
    _skipped.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
