"""Records that are entered without a take."""

from __future__ import annotations

import uuid
from typing import Any

from expstate import Catalog
from expstate.catalog import rows
from expstate.catalog.model import Body, RecordData
from expstate.format.annotations import Annotations
from expstate.state.values import encode

DAY = 86400 * 1_000_000
NEW_YEAR = 1_767_225_600_000_000
"""The first microsecond of 2026, since 1970."""
_OF_BODY = ("tags", "note", "keys", "provenance")


def data(**given: Any) -> RecordData:
    """What is known of a snapshot that was never taken; params and metrics are plain values."""
    body = Body(
        params={name: encode(value) for name, value in given.pop("params", {}).items()},
        metrics={name: encode(value) for name, value in given.pop("metrics", {}).items()},
        **{name: given.pop(name) for name in _OF_BODY if name in given},
    )
    made = uuid.uuid4().hex
    fixed: dict[str, Any] = {
        "id": made,
        "digest": made * 2,
        "url": f"/runs/{given.get('id', made)}",
        "host": "here",
        "project": "tests",
        "created_at": NEW_YEAR,
        "nbytes": 1000,
        "written_bytes": 1000,
        "world_size": 1,
    }
    if given.pop("pinned", False):
        given["annotations"] = Annotations(format=1, id=given.get("id", made), pin=_mark())
    return RecordData(body=body, **(fixed | given))


def _mark() -> Any:
    from expstate.format.annotations import Mark

    return Mark(1, present=True)


def enter(catalog: Catalog, *several: RecordData, **given: Any) -> None:
    """Enter records: those that are given, or one of these fields."""
    with catalog.database.writing() as connection:
        for one in several or (data(**given),):
            rows.put(connection, one)
