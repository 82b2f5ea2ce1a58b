"""The records in ``catalog-0001.sql``, and the script that wrote it: a catalog of the first version, which every later version must read.

It is SQLite's dump of the database. It is never written anew: a version with other tables gets a file and a script of its own.
"""

from __future__ import annotations

import math
import pathlib
import sqlite3
import sys
import tempfile

from expstate import Catalog
from expstate.catalog import rows
from expstate.catalog.model import Body, KeySummary, RecordData
from expstate.format.annotations import Annotations, Mark, Text, Value
from expstate.state.values import encode

FILE = pathlib.Path(__file__).parent / "catalog-0001.sql"
_DAY = 86_400_000_000
_NEW_YEAR = 1_767_225_600_000_000
_FIRST, _SECOND, _ELSEWHERE = ("1" * 32, "2" * 32, "3" * 32)


def records() -> list[RecordData]:
    """A take with all that can be known of one, what came from it and has been changed since, and one of another project."""
    keys = (KeySummary("model", "torch.nn.modules.linear.Linear", 2, 80), KeySummary("progress", "expstate.state.stateful.StateDict", 0, 0))
    given = {"lr": 0.1, "layers": [4, (2, None)], "huge": 2**70, "optimizer": "adam", "amp": True, "nothing": None}
    body = Body(
        tags=("ablation", "für immer"),
        note="A record of the first version.\nIt must be readable for ever.",
        params={name: encode(value) for name, value in given.items()},
        metrics={"loss": encode(0.25), "diverged": encode(math.nan), "steps": encode(2**60 + 1)},
        keys=keys,
        provenance={"host": "node-1", "git": {"commit": "c" * 40, "branch": "main", "dirty": True}, "run": {"argv": ["train.py", "-v"]}},
    )
    since = Annotations(
        format=1,
        id=_SECOND,
        tags={"kept": Mark(_NEW_YEAR + 1, present=True), "ablation": Mark(_NEW_YEAR + 2, present=False)},
        aliases={"best": Mark(_NEW_YEAR + 3, present=True), "worst": Mark(_NEW_YEAR + 4, present=False)},
        pin=Mark(_NEW_YEAR + 5, present=True),
        note=Text(_NEW_YEAR + 6, "changed since"),
        metrics={"acc": Value(_NEW_YEAR + 7, encode(0.75))},
    )
    common = {"host": "node-1", "project": "vision", "user": "ada", "nbytes": 80, "written_bytes": 4176, "world_size": 1}
    packages = {"torch": "2.13.0", "numpy": "2.4.6"}
    return [
        RecordData(
            id=_FIRST, digest="a" * 64, url="/runs/1", name="resnet", step=100, created_at=_NEW_YEAR, duration_seconds=1.5, body=body,
            packages=packages, **common,
        ),
        RecordData(
            id=_SECOND, digest="b" * 64, url="/runs/2", name="resnet", step=200, created_at=_NEW_YEAR + _DAY, parent=_FIRST,
            body=Body(tags=("ablation",), metrics={"loss": encode(0.125)}), annotations=since, packages=packages, **common,
        ),
        RecordData(id=_FIRST, digest="a" * 64, url="s3://bucket/1", created_at=_NEW_YEAR, body=body, **(common | {"host": ""})),
        RecordData(
            id=_ELSEWHERE, digest="d" * 64, url="/runs/3", created_at=_NEW_YEAR - _DAY, body=Body(),
            **(common | {"project": "speech", "user": None, "world_size": 8}),
        ),
    ]  # fmt: skip


def fill(catalog: Catalog) -> None:
    """Enter the records, each seen where it lies at the time of its take."""
    with catalog.database.writing() as connection:
        for record in records():
            rows.put(connection, record, seen_at=record.created_at)


def dump(path: pathlib.Path) -> str:
    """The statements that make the database anew."""
    connection = sqlite3.connect(path)
    try:
        (number,) = connection.execute("PRAGMA application_id").fetchone()
        return "\n".join([f"PRAGMA application_id = {number};", *connection.iterdump()]) + "\n"
    finally:
        connection.close()


if __name__ == "__main__":
    if FILE.exists():
        sys.exit(f"{FILE} exists, and is kept as it is")
    with tempfile.TemporaryDirectory() as folder:
        made = Catalog(pathlib.Path(folder) / "catalog.db")
        fill(made)
        made.close()
        FILE.write_text(dump(pathlib.Path(folder) / "catalog.db"), encoding="utf-8")
