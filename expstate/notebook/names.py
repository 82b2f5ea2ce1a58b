"""Names of a namespace and what they stand for, looked up at the moment when that is needed.

A stateful goes into an app state as it is. Any other value goes in by ``Plain``, which captures it by value and puts it back into the
object that is there, so that other references see it; what cannot be changed in place is bound anew by whoever holds the namespace.
"""

from __future__ import annotations

import keyword
import sys
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch

from expstate.errors import InvalidArgumentError, NameNotFoundError
from expstate.state.stateful import RNGState, Stateful

RNG_KEY = "rng_state"
"""The key under which the random generators are taken; no object goes by it."""

_NEAR = 20


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Any = _Missing()
"""What stands for a name that stands for nothing."""


def check_name(name: str) -> str:
    """A Python name or dotted path, as it is.

    Raises
    ------
    InvalidArgumentError
        If it is none, or reserved.

    Examples
    --------
    >>> check_name("trainer.model")
    'trainer.model'
    """
    if name == RNG_KEY:
        msg = f"{RNG_KEY!r} is the key of the random generators, which are taken always; name an object otherwise"
        raise InvalidArgumentError(msg)
    if not name or not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
        msg = f"{name!r} is no Python name or dotted path, such as model or trainer.model"
        raise InvalidArgumentError(msg)
    return name


def is_name(text: str) -> bool:
    """Whether a text is a name or dotted path."""
    try:
        check_name(text)
    except InvalidArgumentError:
        return False
    return True


def look_up(namespace: Mapping[str, Any], name: str) -> Any:
    """What a name or dotted path stands for, or ``MISSING``."""
    first, *others = name.split(".")
    value = namespace.get(first, MISSING)
    for part in others:
        if value is MISSING:
            break
        value = getattr(value, part, MISSING)
    return value


def bind(namespace: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Let a name or the attribute at the end of a dotted path stand for a value; ``MISSING`` takes it away."""
    owner_name, _, last = name.rpartition(".")
    if not owner_name:
        if value is MISSING:
            namespace.pop(last, None)
        else:
            namespace[last] = value
        return
    owner = look_up(namespace, owner_name)
    if owner is MISSING:
        msg = f"{owner_name!r} stands for nothing, so {name!r} cannot be bound; create it first"
        raise NameNotFoundError(msg)
    if value is MISSING:
        delattr(owner, last)
    else:
        setattr(owner, last, value)


def is_stateful(value: object) -> bool:
    """Whether a value has a state of its own: modules, optimizers, ``StateDict``; no classes."""
    return isinstance(value, Stateful) and not isinstance(value, type)


def candidates(namespace: Mapping[str, Any], hidden: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Names that a person may want to take: statefuls first, then tensors and arrays.

    Parameters
    ----------
    namespace : mapping
        The user's names.
    hidden : mapping, optional
        Names that are not the user's own.
    """
    own = {name: value for name, value in namespace.items() if not name.startswith("_") and name not in (hidden or {})}
    statefuls = [name for name, value in own.items() if is_stateful(value)]
    values = [name for name, value in own.items() if name not in statefuls and _is_array(value)]
    return (*statefuls, *values)


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return isinstance(value, torch.Tensor) or (numpy is not None and isinstance(value, numpy.ndarray))


class Plain:
    """A value of a namespace that is no stateful, captured by value.

    Parameters
    ----------
    value : object
        What it is now; ``MISSING`` if the name stands for nothing yet.

    Attributes
    ----------
    value : object
        What it is; after ``load_state_dict`` the same object where it could be refilled, else another one to be bound.

    Examples
    --------
    >>> losses = [1.0]
    >>> plain = Plain(losses)
    >>> plain.load_state_dict({"value": [1.0, 0.5]})
    >>> losses, plain.value is losses
    ([1.0, 0.5], True)
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """The value, as the one item of a dict."""
        return {} if self.value is MISSING else {"value": self.value}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Refill the value, or take the new one."""
        self.value = refill(self.value, state_dict["value"])


PLAIN_TYPE = f"{Plain.__module__}.{Plain.__qualname__}"
"""How a manifest names a key that was captured by value."""


def refill(live: Any, new: Any) -> Any:
    """Put a value into the object that is there, where that can hold it: lists, dicts and sets of one class; else give the new one.

    Tensors and arrays that fit have been read into their own memory before, so they are the same objects here.
    """
    if live is new or type(live) is not type(new):
        return new
    if isinstance(live, list):
        live[:] = [refill(live[number], item) if number < len(live) else item for number, item in enumerate(new)]
        return live
    if isinstance(live, MutableMapping) and isinstance(live, dict):
        items = [(name, refill(live[name], item) if name in live else item) for name, item in new.items()]
        live.clear()
        live.update(items)
        return live
    if isinstance(live, set):
        items_of_set = set(new)
        live.clear()
        live |= items_of_set
        return live
    return new


class Registry:
    """Names that a person has registered, with the objects that they stood for then."""

    def __init__(self) -> None:
        self._objects: dict[str, Callable[[], Any]] = {}
        self._unnamed: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in the order in which they came."""
        return tuple(self._objects)

    @property
    def unnamed(self) -> frozenset[str]:
        """Those whose objects no name of the namespace stood for."""
        return frozenset(self._unnamed)

    def add(self, namespace: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
        """Keep names; an object that no name stands for is kept itself, by a weak reference where that is possible."""
        for name, value in objects.items():
            check_name(name)
            self._objects[name] = _reference(value)
            if look_up(namespace, name) is value:
                self._unnamed.discard(name)
            else:
                self._unnamed.add(name)

    def look_up(self, namespace: Mapping[str, Any], name: str) -> tuple[Any, str | None]:
        """What a name stands for, and what should be said of it: that it is another object than the one that was registered."""
        value = look_up(namespace, name)
        if name not in self._objects:
            return value, None
        registered = self._objects[name]()
        if name in self._unnamed:
            return (MISSING, f"{name!r} was registered, and nobody holds it any more") if registered is None else (registered, None)
        if value is registered or value is MISSING:
            return value, None
        self._objects[name] = _reference(value)
        return value, f"{name!r} is another object than the one that was registered"


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def not_found(name: str, namespace: Mapping[str, Any], hidden: Mapping[str, Any] | None = None) -> NameNotFoundError:
    """The error for a name that stands for nothing."""
    known = candidates(namespace, hidden)[:_NEAR]
    listed = f"; there are {', '.join(known)}" if known else ""
    return NameNotFoundError(f"the name {name!r} stands for nothing in this notebook{listed}")


def stateful_of(value: Any) -> Any:
    """What goes into an app state for a value."""
    return value if is_stateful(value) else Plain(value)


def generators() -> RNGState:
    """What goes into an app state under ``RNG_KEY``."""
    return RNGState()
