"""A shell without IPython: a namespace, and events that tests trigger, for what needs no more of a notebook."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class Events:
    """Callbacks by the name of the event."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callable[..., Any]]] = {}

    def register(self, name: str, callback: Callable[..., Any]) -> None:
        self._callbacks.setdefault(name, []).append(callback)

    def unregister(self, name: str, callback: Callable[..., Any]) -> None:
        self._callbacks[name].remove(callback)

    def trigger(self, name: str) -> None:
        for callback in tuple(self._callbacks.get(name, ())):
            callback(None)


class Shell:
    """What a kernel of ours asks of a shell; ``is_driven`` says whether a person sits before it."""

    def __init__(self, *, is_driven: bool = True, **names: Any) -> None:
        self.user_ns: dict[str, Any] = dict(names)
        self.user_ns_hidden: dict[str, Any] = {}
        self.events = Events()
        self.kernel = SimpleNamespace(_allow_stdin=is_driven)
