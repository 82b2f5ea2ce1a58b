"""``autosave``: a training takes snapshots by itself, takes a last one when it is told to end, and goes on from there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expstate.catalog.recorder import recorder
from expstate.engine import busy, memory, ranks
from expstate.engine.request import globs
from expstate.engine.take import check_app_state
from expstate.errors import InvalidArgumentError
from expstate.format.metadata import make_metadata
from expstate.integrations.rhythm import Rhythm, seconds_of
from expstate.integrations.saver import Autosave
from expstate.integrations.series import PARAM, Series
from expstate.integrations.signals import Signals

if TYPE_CHECKING:
    import datetime as dt
    import os
    from collections.abc import Mapping, Sequence

    from expstate.catalog.origin import CatalogOption
    from expstate.state.stateful import Stateful

_NOT_A_SCRIPT = {"", "-c", "-m", "ipykernel_launcher", "ipython", "colab_kernel_launcher"}


def autosave(
    app_state: dict[str, Stateful],
    *,
    every: str | float | dt.timedelta | None = None,
    steps: int | None = None,
    keep_last: int | None = 3,
    signal: bool = True,
    deadline_seconds: float = 30.0,
    name: str | None = None,
    root: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    base: str | None = "auto",
    on_busy: str = "skip",
    params: Mapping[str, Any] | None = None,
    pg: Any = None,
    replicated: Sequence[str] | None = None,
    timeout: float | None = None,
    memory_budget_bytes: int | None = None,
    catalog: CatalogOption = None,
) -> Autosave:
    """Take snapshots of a training by themselves, in the background, and go on from the last one when it is started again.

    In the ``with`` block ``step()`` is called after each step of the training. A snapshot is taken when one is due, and a last one at the
    end of the block if steps went by since.

    When the process is told to end, by SIGTERM as clusters do before they preempt it, or by Ctrl-C, the last one is taken at the next
    ``step()``, since a signal may come in the midst of an optimizer's. Then what handled the signal before does so, which as a rule ends
    the process. If no step comes within half of the deadline (5 s after Ctrl-C, or at once when it is pressed again) that happens
    without a snapshot, and is said.

    After ``sys.exit`` in the block there is a last snapshot too, in a process by itself; after any other exception there is none, for it
    may come from within a step. A take that fails is warned of, and the training goes on.

    On several ranks all call ``step()`` equally often. What one must know from another, a time or a signal, they tell each other about
    once a second.

    Parameters
    ----------
    app_state : dict of str to Stateful
        What to take, as for ``Snapshot.take``.
    every : str, float or datetime.timedelta, optional
        How much time lies between two takes: ``"10m"``, ``"90s"``, ``"1h"``, or seconds.
    steps : int, optional
        A take at each multiple of so many steps. With ``every`` too, whichever comes first.
    keep_last : int or None, default 3
        How many takes of this series to keep; None for all. Those with a tag, an alias or a pin stay, and so does whatever is not of
        this series.
    signal : bool, default True
        Whether to take a last one after SIGTERM or Ctrl-C; off, with a warning, if the block is entered in another than the main thread.
    deadline_seconds : float, default 30
        How long after SIGTERM the process lives.
    name : str, optional
        Of the series. Runs that must not go on from each other's takes need different ones; default the name of the script.
    root : str or os.PathLike, optional
        Path or URL of the folder that the series has its folder in; default the setting ``root``, else ``expstate-snapshots`` in the
        working folder.
    storage_options : dict, optional
        What the storage needs to connect.
    base : {"auto", None}, default "auto"
        Whether a take goes on from the one before and writes what has changed since, or all.
    on_busy : {"wait", "skip", "replace"}, default "skip"
        What to do when a take is due and the one before has not ended, as for ``Snapshot.async_take``.
    params : dict, optional
        Settings of the experiment, recorded with each take.
    pg, replicated, timeout, memory_budget_bytes, catalog
        As for ``Snapshot.take``.

    Returns
    -------
    Autosave
        To be entered, after ``resume()`` if the training is to go on.

    Raises
    ------
    InvalidArgumentError, InvalidMetadataError, InvalidNameError, MemoryBudgetError, UnsupportedSchemeError
        If neither ``every`` nor ``steps`` is given, or something that was given makes no sense.
    AppStateError
        If the app state is none.

    Examples
    --------
    >>> import tempfile
    >>> from expstate import StateDict, autosave
    >>> folder = tempfile.TemporaryDirectory()
    >>> def train(steps):
    ...     progress = StateDict(total=0)
    ...     saver = autosave({"progress": progress}, steps=2, name="sums", root=folder.name)
    ...     start = saver.resume() or 0
    ...     with saver:
    ...         for step in range(start, steps):
    ...             progress["total"] += step
    ...             saver.step()
    ...     return start, progress["total"]
    >>> train(5), train(7)
    ((0, 10), (5, 21))
    >>> folder.cleanup()
    """
    check_app_state(app_state)
    busy.check_policy(on_busy)
    if every is None and steps is None:
        msg = "say when to take: every='10m', or steps=50, or both"
        raise InvalidArgumentError(msg)
    seconds = None if every is None else seconds_of(every)
    for what, value in (("steps", steps), ("keep_last", keep_last)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            msg = f"{what} must be a whole number from 1 on, got {value!r}"
            raise InvalidArgumentError(msg)
    if isinstance(deadline_seconds, bool) or not isinstance(deadline_seconds, (int, float)) or not 0 < deadline_seconds < float("inf"):
        msg = f"deadline_seconds must be a positive number of seconds, got {deadline_seconds!r}"
        raise InvalidArgumentError(msg)
    make_metadata(name=None, tags=(), params=params, metrics=None, note=None, step=None)
    memory.budget_bytes(memory_budget_bytes)
    ranks.group_of(pg)
    ranks.check_timeout(timeout)
    recorder(catalog)
    if replicated is not None:
        globs(replicated, "replicated")
    if params is not None and PARAM in params:
        msg = f"the param {PARAM!r} holds the name of the series; give it by name="
        raise InvalidArgumentError(msg)
    if base not in {"auto", None}:
        msg = f"base must be 'auto', for what has changed, or None, for all; got {base!r}"
        raise InvalidArgumentError(msg)
    series = Series(_script() if name is None else name, root, storage_options, keep_last, catalog)
    signals = Signals(float(deadline_seconds)) if signal else None
    came = None if signals is None else lambda: signals.came
    options = {
        "pg": pg,
        "replicated": replicated,
        "timeout": timeout,
        "storage_options": storage_options,
        "memory_budget_bytes": memory_budget_bytes,
        "progress": False,
        "catalog": catalog,
        "base": base,
    }
    rhythm = Rhythm(seconds, steps, came, deadline_seconds / 6, pg, timeout)
    return Autosave(dict(app_state), series, rhythm, signals, float(deadline_seconds), on_busy, params, options)


def _script() -> str:
    """The name of the program, as far as it has one."""
    script = sys.argv[0] if sys.argv else ""
    stem = Path(script).stem
    return PARAM if stem in _NOT_A_SCRIPT or stem.startswith("__") else stem
