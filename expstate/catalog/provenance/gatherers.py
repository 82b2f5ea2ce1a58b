"""The gatherers by name: functions that look at one topic each. Users add theirs by ``register``.

A gatherer gets what the take saw when it began, and gives what is recorded under its name, or None. It runs in a thread of its take's
own; one that fails leaves its part out. Whatever it gives is looked through for secrets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expstate.catalog.provenance import git, machine, project, run
from expstate.errors import InvalidArgumentError

if TYPE_CHECKING:
    from expstate.settings import Settings


@dataclass(frozen=True, slots=True)
class Seen:
    """What a take saw in the thread that called it.

    Attributes
    ----------
    folder : str or None
        The working folder; None if it was removed.
    run : dict
        The command line, or the notebook and its cell; may hold secrets.
    settings : Settings
        Those in force.
    """

    folder: str | None
    run: dict[str, Any] = field(repr=False)
    settings: Settings


Gatherer = Callable[[Seen], Any]

OWN: dict[str, Gatherer] = {
    "project": lambda seen: project.typed_project(seen.settings) or project.project_of(seen.folder),
    "user": machine.user,
    "host": machine.host,
    "git": git.gather,
    "python": machine.python,
    "packages": machine.packages,
    "torch": machine.versions_of_torch,
    "run": lambda seen: run.without_secrets(seen.run),
    "environment": machine.environment,
}
TAKEN = ("replicated", "busy")
"""What the take itself adds."""
MINIMAL: dict[str, tuple[str, ...]] = {"project": (), "git": ("commit", "dirty"), "python": ("version",), "torch": ("version",)}
"""What the level ``minimal`` keeps, and which fields of it."""

_registered: dict[str, Gatherer] = {}


def register(name: str, gatherer: Gatherer) -> None:
    """Record more of where takes come from, in this process and at the level ``full``.

    Parameters
    ----------
    name : str
        What it goes by in ``metadata.provenance``.
    gatherer : callable
        Called with a ``Seen`` for each take, in another thread than the take's and with as little to do as possible; gives plain
        values, or None for nothing.

    Raises
    ------
    InvalidArgumentError
        If the name is none, or one of expstate's own.

    Examples
    --------
    >>> import os
    >>> from expstate.catalog import provenance
    >>> provenance.register("cluster", lambda seen: {"node": os.environ.get("SLURMD_NODENAME")})
    >>> provenance.unregister("cluster")
    """
    if not isinstance(name, str) or not name.isidentifier() or name in {*OWN, *TAKEN}:
        msg = f"a gatherer's name is an identifier and none of {', '.join([*OWN, *TAKEN])}; got {name!r}"
        raise InvalidArgumentError(msg)
    given: object = gatherer
    if not callable(given):
        msg = f"a gatherer is a function of one argument, got {type(given).__name__}"
        raise InvalidArgumentError(msg)
    _registered[name] = gatherer


def unregister(name: str) -> None:
    """Forget a gatherer that was registered; one that was not is ignored."""
    _registered.pop(name, None)


def chosen(level: str) -> dict[str, Gatherer]:
    """Our own gatherers of a level."""
    if level == "off":
        return {}
    return {name: OWN[name] for name in MINIMAL} if level == "minimal" else OWN


def registered(level: str) -> dict[str, Gatherer]:
    """Those of users that count at a level."""
    return dict(_registered) if level == "full" else {}
