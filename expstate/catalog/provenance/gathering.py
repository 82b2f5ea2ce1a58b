"""``Gathering``: the provenance of one take, looked up in a thread while its data is written, and never in its way.

Gets what the taker gave, hands on what stands in the manifest. Nothing here raises; what could not be found is left out.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from expstate import settings
from expstate.catalog.provenance import project, redact, run
from expstate.catalog.provenance.gatherers import MINIMAL, OWN, Gatherer, Seen, chosen, registered
from expstate.catalog.provenance.plain import clean
from expstate.errors import ProvenanceWarning

if TYPE_CHECKING:
    from collections.abc import Mapping

SECONDS = 5.0
"""How long after its start a gathering may hold a take up."""

_log = logging.getLogger("expstate")
_warned: set[str] = set()


class Gathering:
    """The provenance of one take, being gathered. Settings are those in force where it is made.

    Parameters
    ----------
    given : dict
        What is recorded in any case.

    Raises
    ------
    InvalidSettingError
        If an ``EXPSTATE_...`` variable cannot be read.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._settings = settings.current()
        self._given: dict[str, Any] = clean(dict(given))
        self._seen: Seen | None = None
        self._found: dict[str, Any] = {}
        self._threads: list[threading.Thread] = []
        self._limit = 0.0

    def add(self, name: str, value: Any) -> None:
        """Record this too, in any case."""
        self._given[name] = clean(value)

    def start(self) -> None:
        """Look at what only the caller's thread knows, and begin with the rest in the background; never raises."""
        folder = project.working_folder()
        seen: dict[str, Any] = {}
        if self._settings.provenance == "full":
            try:
                seen = run.look(source=self._settings.provenance_source)
            except Exception as error:  # noqa: BLE001 - a take does not fail for its provenance
                _log.debug("the command or cell of a take could not be seen: %s", type(error).__name__)
        self._seen = Seen(folder, seen, self._settings)
        self._limit = time.monotonic() + SECONDS
        # Ours end soon, and are not frozen in the midst of things when the interpreter ends.
        self._begin(chosen(self._settings.provenance), self._seen, daemon=False)
        # A user's may hang, and nobody waits for it then.
        self._begin(registered(self._settings.provenance), self._seen, daemon=True)

    def _begin(self, gatherers: Mapping[str, Gatherer], seen: Seen, *, daemon: bool) -> None:
        if not gatherers:
            return
        thread = threading.Thread(target=self._gather, args=(gatherers, seen), name="expstate-provenance", daemon=daemon)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending
            self._gather(gatherers, seen)
        else:
            self._threads.append(thread)

    def result(self) -> dict[str, Any]:
        """What was gathered in time, without secrets; never raises."""
        for thread in self._threads:
            thread.join(max(0.0, self._limit - time.monotonic()))
        found = dict(self._found)
        if self._settings.provenance == "off" and self._settings.project:
            found["project"] = self.project()
        return self._given | {name: found[name] for name in (*OWN, *found) if name in found}

    def project(self) -> str:
        """The project of the take, whether it is recorded in the manifest or not."""
        if self._seen is None:
            return project.current_project()
        known = self._found.get("project")
        return known or project.typed_project(self._settings) or project.project_of(self._seen.folder)

    def _gather(self, gatherers: Mapping[str, Gatherer], seen: Seen) -> None:
        for name, gatherer in gatherers.items():
            try:
                value = self._picked(name, gatherer(seen))
            except Exception as error:  # noqa: BLE001 - a take does not fail for its provenance
                _tell(name, gatherer, error)
                continue
            if value is not None:
                self._found[name] = value

    def _picked(self, name: str, value: Any) -> Any:
        """What the level keeps of a gatherer's answer, as it may be recorded."""
        if self._settings.provenance == "minimal" and isinstance(value, dict):
            value = {field: value[field] for field in MINIMAL[name] if field in value}
        if value is None or value == {}:
            return None
        # The project may be what a person typed, packages are no person's words, and the command line was looked through as one.
        return clean(value) if name in {"project", "packages", "run"} else redact.tree(clean(value), name)


def _tell(name: str, gatherer: Gatherer, error: Exception) -> None:
    """Note that a gatherer failed; warn of a user's own, once. Its message is not shown: nobody knows what is in it."""
    _log.debug("the provenance %r could not be gathered: %s", name, type(error).__name__)
    if OWN.get(name) is gatherer or name in _warned:
        return
    _warned.add(name)
    message = f"the gatherer {name!r} failed with {type(error).__name__}: its part of the provenance is left out"
    try:
        warnings.warn(message, ProvenanceWarning, stacklevel=2)
    except ProvenanceWarning:  # where warnings are errors
        _log.warning(message)
