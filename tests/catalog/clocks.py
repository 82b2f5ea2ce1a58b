"""A clock that can be put wrong: takes and edits of this process go by it, files are stamped by the system's."""

from __future__ import annotations

import datetime as dt
import time
from types import SimpleNamespace

import pytest

from expstate.catalog import rows
from expstate.engine import take


class Clock:
    """The time, off by as many days as is said.

    Parameters
    ----------
    patch : pytest.MonkeyPatch
        Puts it back.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.days = 0.0
        clock = self

        class Datetime(dt.datetime):
            @classmethod
            def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
                return dt.datetime.now(tz) + dt.timedelta(days=clock.days)

        patch.setattr(take, "dt", SimpleNamespace(datetime=Datetime, timezone=dt.timezone))
        patch.setattr(rows, "now", lambda: int((time.time() + 86400 * clock.days) * 1_000_000))
