"""A catalog to search in: any number of records with metrics, tags and params, entered as the catalog itself stores them.

Gets an empty catalog and a count; nothing is taken, only the tables are filled.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from expstate.bench.plan import FILLED_PROJECT
from expstate.catalog import rows, schema
from expstate.catalog.model import Body, KeySummary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.catalog.catalog import Catalog

METRICS = ("loss", "acc", *(f"metric-{number}" for number in range(8)))
TAGS = ("ablation", "baseline", "debug", *(f"tag-{number}" for number in range(9)))
TAGS_EACH = 3
_CHUNK = 5000
_BEGIN = 1_767_225_600_000_000  # 2026, in microseconds
_MINUTE = 60_000_000
_PINNED_SHARE = 0.1
_KEYS = (
    KeySummary("model", "torch.nn.modules.container.Sequential", 60, 400_000_000),
    KeySummary("optimizer", "torch.optim.adam.Adam", 120, 800_000_000),
)
_PROVENANCE = {
    "project": FILLED_PROJECT,
    "argv": ["train.py", "--config", "configs/base.yaml", "--seed", "1"],
    "git": {"commit": "0" * 40, "branch": "main", "dirty": False},
    "host": "node-1",
    "python": "3.12.1",
    "torch": {"version": "2.9.0", "accelerator": "NVIDIA H100 80GB HBM3"},
    "user": "bench",
}


def fill(catalog: Catalog, count: int, *, project: str = FILLED_PROJECT, seed: int = 0) -> None:
    """Enter so many records with ten metrics, three tags and five params each.

    Parameters
    ----------
    catalog : Catalog
        Where; it should be empty.
    count : int
        Records.
    project : str, optional
        Theirs.
    seed : int, default 0
        Of their values.
    """
    numbers = random.Random(seed)  # noqa: S311 - values to search for
    with catalog.database.writing() as connection:
        first = (connection.execute(sa.select(sa.func.max(schema.records.c.seq))).scalar() or 0) + 1
        names = _enter_names(connection, project)
        for start in range(first, first + count, _CHUNK):
            tables: dict[sa.Table, list[dict[str, Any]]] = {}
            for seq in range(start, min(start + _CHUNK, first + count)):
                for table, row in _rows_of(seq, project, names, numbers):
                    tables.setdefault(table, []).append(row)
            for table in schema.metadata.sorted_tables:
                if table in tables:
                    connection.execute(sa.insert(table), tables[table])


def _enter_names(connection: sa.Connection, project: str) -> dict[str, int]:
    """The numbers of the metrics' and params' names."""
    found = {}
    for kind, names in (("metric", METRICS), ("param", ("lr", "optimizer", "depth", "seed", "comment"))):
        for name in names:
            inserted = connection.execute(sa.insert(schema.names), {"project": project, "kind": kind, "name": name})
            found[name] = inserted.inserted_primary_key[0]  # type: ignore[index]
    return found


def _rows_of(seq: int, project: str, names: dict[str, int], numbers: random.Random) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
    metrics = {name: numbers.random() for name in METRICS}
    params = {
        "lr": numbers.choice((0.1, 0.01, 0.001)),
        "optimizer": numbers.choice(("adam", "sgd", "lion")),
        "depth": numbers.choice((18, 34, 50)),
        "seed": seq,
        "comment": f"run {numbers.getrandbits(64):x} of the sweep",
    }
    tags = tuple(sorted(numbers.sample(TAGS, TAGS_EACH)))
    note = f"the run number {seq} of a sweep over rates and depths"
    when = _BEGIN + seq * _MINUTE
    size = numbers.randrange(2**33)
    url = f"/data/bench/run-{seq // 100}/step-{seq % 100}"
    yield (
        schema.records,
        {
            "seq": seq,
            "id": f"{numbers.getrandbits(128):032x}",
            "project": project,
            "name": f"resnet-{seq // 100}",
            "user": "bench",
            "host": "node-1",
            "step": seq % 100 * 1000,
            "created_at": when,
            "ordered_at": when,
            "duration_seconds": numbers.random() * 10,
            "nbytes": size,
            "written_bytes": size // 2,
            "world_size": 1,
            "digest": f"{numbers.getrandbits(256):064x}",
            "pinned": numbers.random() < _PINNED_SHARE,
            "note": note,
            "status": "present",
            "git_commit": "0" * 40,
            "git_branch": "main",
        },
    )
    body = Body(tags=tags, note=note, params=params, metrics=metrics, keys=_KEYS, provenance=_PROVENANCE)
    yield schema.bodies, {"record": seq, "body": msgspec.json.encode(body).decode()}
    place = {"place": rows.place_key(url, "node-1"), "url": url, "host": "node-1", "digest": "0" * 64, "status": "present", "seen_at": when}
    yield schema.locations, {"record": seq, **place}
    for tag in tags:
        yield schema.tags, {"record": seq, "tag": tag}
    for name, value in metrics.items():
        yield schema.metrics, {"record": seq, "name": names[name], "number": value, "exact": None}
    for name, param in params.items():
        number, text, exact = rows.sides_of(param)
        yield schema.params, {"record": seq, "name": names[name], "number": number, "text": text, "exact": exact}
