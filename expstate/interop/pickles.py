"""Pickles of other libraries, read without running anything that they name.

Gets bytes and a table of what may be named in them; gives plain values. What stands in the table is ours: stand-ins that only keep what
they are given. The unpickler is Python's own, in Python: that of C can be made to ask for any amount of memory.
"""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, ClassVar

from expstate.errors import CheckpointFormatError, PickleNotAllowedError

if TYPE_CHECKING:
    from collections.abc import Callable

Table = dict[tuple[str, str], Any]
"""What a module and a name in it stand for."""


class Record:
    """Stands in for an object: keeps the state that it was pickled with."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def fields(self) -> dict[Any, Any]:
        """The state, if it is that of an object with attributes."""
        return self.state if isinstance(self.state, dict) else {}


def record_class(name: str) -> type[Record]:
    """A class of stand-ins. New ones are made for every file, as a file may put attributes into them."""
    return type(name, (Record,), {})


class _Unpickler(pickle._Unpickler):  # noqa: SLF001 - the one in Python
    # Of opcodes that ask for memory before they have read what goes there, this is the only one.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()  # noqa: SLF001
        if code != pickle.BYTEARRAY8[0]
    }

    def __init__(self, data: bytes, table: Table, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._table = table
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        found = self._table.get((module, name))
        if found is None:
            msg = f"it names {module}.{name}"[:200]
            raise PickleNotAllowedError(msg)
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            msg = "it refers to something outside of it"
            raise PickleNotAllowedError(msg)
        return self._persistent(pid)


def read(data: bytes, table: Table, *, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Read a pickle that names nothing but what is in the table.

    Parameters
    ----------
    data : bytes
        The pickle.
    table : dict of (str, str) to Any
        Modules and names, and what stands for them.
    persistent : callable, optional
        Gives what is meant by a reference to something outside.

    Raises
    ------
    PickleNotAllowedError
        If it names anything else; the message says what.
    CheckpointFormatError
        If it cannot be read.

    Examples
    --------
    >>> read(pickle.dumps({"epoch": 3}), {})
    {'epoch': 3}
    >>> read(pickle.dumps(print), {})
    Traceback (most recent call last):
    expstate.errors.PickleNotAllowedError: it names builtins.print
    """
    try:
        return _Unpickler(data, table, persistent).load()
    except PickleNotAllowedError:
        raise
    except Exception as error:
        # Whatever a file can make the unpickler, or a stand-in, trip over.
        msg = f"it is no pickle of the form that is expected: {type(error).__name__}: {error}"[:300]
        raise CheckpointFormatError(msg) from error


def checked(value: Any, nbytes: int) -> Any:
    """The value that a pickle of so many bytes gave, if it is not more than that: it may hold one thing many times, and itself.

    Raises
    ------
    CheckpointFormatError
        If written out it would be far more.
    """
    left = 1000 + 10 * nbytes
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
        left -= 1
        if left < len(waiting):
            msg = "it unpacks to far more than it is"
            raise CheckpointFormatError(msg)
    return value
