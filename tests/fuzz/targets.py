"""What reads bytes that a stranger may have written: for each, real inputs to begin with, and a call that may raise our errors alone."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from expstate import Catalog, Snapshot
from expstate.catalog import given, opening, refs
from expstate.catalog.query.parse import parse, parse_sort
from expstate.engine import lease
from expstate.errors import ExpstateError
from expstate.format import annotations, manifest
from expstate.format.validate import validate
from expstate.interop import pickles
from expstate.state import values
from tests.catalog.made import enter
from tests.format.forging import Forged, app_state, body_of, seal, take

ID = "0123456789abcdef" * 2


@dataclass(frozen=True, slots=True)
class Target:
    """A reader: inputs that it takes, and the call for one, which raises nothing but ``ExpstateError``."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]

    def __call__(self, data: bytes) -> None:
        """Read an input; errors of ours are what it is for."""
        with contextlib.suppress(ExpstateError):
            self.read(data)


def _snapshot(folder: Path) -> Forged:
    place = folder / "snapshot"
    if not place.exists():
        take(place, app_state(), name="seed", tags=["a", "b"], params={"lr": 0.1}, metrics={"loss": 1.5})
    return Forged(place)


def _short(document: dict[str, Any]) -> dict[str, Any]:
    """A manifest with some entries of each kind, so that a change of a byte hits one more often."""
    kept = [entry for entry in document["entries"] if entry[1].count("/") < 2 or "keys" in entry[1]]
    return document | {"provenance": {}, "entries": [entry for entry in kept if len(json.dumps(entry)) < 2000]}


def _manifest(folder: Path) -> Target:
    """Sealed, so that the digest does not stand before the records, and as it is."""
    found = _snapshot(folder)

    def read(data: bytes) -> None:
        with contextlib.suppress(ExpstateError):
            manifest.decode(data)
        decoded = manifest.decode(seal(data))
        validate(decoded)
        manifest.encode(decoded)

    return Target((body_of(_short(found.document)), body_of(found.document)), read)


def _data_file(folder: Path) -> Target:
    """A whole data file, whose header is that of safetensors: verified, and a tensor read from it."""
    found = _snapshot(folder)
    place = folder / "data-file"
    shutil.copytree(found.folder, place, dirs_exist_ok=True)
    snapshot = Snapshot(place)
    path = found.file("model/first.weight")
    fuzzed = place / path.name
    seed = path.read_bytes()

    def read(data: bytes) -> None:
        fuzzed.unlink(missing_ok=True)
        fuzzed.write_bytes(data)
        assert (data == seed) == snapshot.verify(progress=False).ok, "a change was not noticed"
        snapshot.read_object("model/first.weight")

    return Target((seed,), read)


def _annotations(folder: Path) -> Target:
    """What people add later, read and merged."""
    del folder
    mark, other = annotations.Mark(1, present=True), annotations.Mark(2, present=False)
    full = annotations.Annotations(
        format=1,
        id=ID,
        tags={"a": mark, "é": other},
        aliases={"best": mark},
        pin=mark,
        note=annotations.Text(3, "a note"),
        metrics={"loss": annotations.Value(4, 0.5), "n": annotations.Value(5, values.encode(2**80))},
    )

    def read(data: bytes) -> None:
        one = annotations.decode(data)
        merged = annotations.merge(one, full)
        assert merged == annotations.merge(annotations.decode(annotations.encode(merged)), one)

    return Target((annotations.encode(annotations.empty(ID)), annotations.encode(full)), read)


def _lease(folder: Path) -> Target:
    """Who is at work: decoded, and looked for."""
    del folder

    def read(data: bytes) -> None:
        found = lease.decode_lease(data)
        if found is not None:
            lease.is_dead(found, 0.0, 1.0)

    return Target((lease.encode_lease(ID, "take", ()), lease.encode_lease(ID, "delete", ["a-00001-01234567.safetensors"])), read)


def _catalog(folder: Path) -> Catalog:
    catalog = Catalog(folder / "catalog.db")
    enter(catalog, name="best", metrics={"loss": 0.5}, params={"lr": 0.1}, tags=("a",), note="a note")
    enter(catalog, name="café", metrics={"loss": 2}, params={"lr": "x"}, step=7)
    return catalog


def _query(folder: Path) -> Target:
    """A query and a sort, parsed and asked."""
    catalog = _catalog(folder)

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass")
        with contextlib.suppress(ExpstateError):
            parse_sort(text)
        parse(text)
        for record in catalog.search(text, project="*", limit=2):
            repr(record)

    queries = [
        'loss < 0.5 and (tag = a or not pinned) and size > 1GB and age < 7d and name ~ "best"',
        "created >= 2026-01-02T03:04 or step = 7",
        'metric."val loss" != 1e3 and param.lr == true',
        'metric."val loss":desc',
        "not not (a=1)",
    ]
    return Target(tuple(query.encode() for query in queries), _if_text(read))


def _ref(folder: Path) -> Target:
    """What a person may type for a snapshot: looked up, and opened if it could be a path of this disk."""
    catalog = _catalog(folder)
    record = catalog.search(project="*")[0]

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass")
        with contextlib.suppress(ExpstateError):
            opening.check_trusted(text)
        if "://" in text and not text.startswith(("file://", "s3://")):
            return  # clients of some schemes connect when they are made
        given.place_of(text)
        if not text.startswith("s3://"):
            with contextlib.suppress(ExpstateError):
                opening.find(text, catalog, "*", None)
        refs.resolve(catalog, text, "*")

    texts = ["latest", "latest~1", "best", record.id, record.id[:4], "./runs/1", "file:///runs/1", "s3://bucket/run", "a::s3://b", "~", "@"]
    return Target(tuple(text.encode() for text in texts), _if_text(read))


def _value(folder: Path) -> Target:
    """A plain value in the form of the manifest, as JSON."""
    del folder

    def read(data: bytes) -> None:
        with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
            form = msgspec.json.decode(data)
            values.decode(form)

    return Target(tuple(msgspec.json.encode(values.encode(value)) for value in _plain_values()), read)


def _plain_values() -> Iterable[Any]:
    import datetime as dt
    import decimal
    import fractions
    import re
    import uuid
    import zoneinfo

    import numpy as np

    yield from ([1, 2.5, None, True, "x"], float("nan"), (1, (2,)), {1, "a"}, frozenset({2}), 2**90, b"bytes", 1 + 2j)
    yield from (fractions.Fraction(1, 3), decimal.Decimal("1.50"), range(1, 9, 2), slice(1, None), uuid.UUID(int=1), Path("/a/b"))
    yield from (dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc), dt.date(2026, 1, 2), dt.time(1, 2), dt.timedelta(1, 2))
    yield dt.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Paris"))
    yield from (torch.float32, torch.device("cpu"), torch.Size([1, 2]), torch.strided, np.float32(1.5), np.int64(3), re.IGNORECASE)


def _pickle(folder: Path) -> Target:
    """A pickle that may name nothing, as the import of checkpoints reads it."""
    del folder

    def read(data: bytes) -> None:
        pickles.checked(pickles.read(data, {}), len(data))

    saved = io.BytesIO()
    torch.save({"a": [1, 2.5, "x"]}, saved, _use_new_zipfile_serialization=False)
    plain = ({"a": [1, (2, None)], "b": "é"}, {3}, bytearray(b"x"), [[]] * 3, 2**70)
    return Target((*(pickle.dumps(value, protocol) for value in plain for protocol in (0, 2, 4)), saved.getvalue()), read)


def _if_text(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """What is no text is not read."""

    def read_text(data: bytes) -> None:
        with contextlib.suppress(UnicodeDecodeError):
            read(data)

    return read_text


READERS: dict[str, Callable[[Path], Target]] = {
    "manifest": _manifest,
    "data file": _data_file,
    "annotations": _annotations,
    "lease": _lease,
    "query": _query,
    "ref": _ref,
    "value": _value,
    "pickle": _pickle,
}
