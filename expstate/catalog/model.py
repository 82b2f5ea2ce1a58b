"""What the catalog knows of a snapshot, as plain records: ``RecordData`` on its way in, ``Record`` on its way out.

``describe`` makes the first from a manifest; a take, a spool file and a scan all hand it on. Nothing here imports SQLAlchemy.
"""

from __future__ import annotations

import datetime as dt
import math
import socket
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

from expstate.errors import UnknownClassError
from expstate.format.annotations import Annotations  # noqa: TC001 - msgspec reads the annotation
from expstate.format.manifest import Manifest, ObjectEntry, TensorEntry
from expstate.state import paths, values
from expstate.storage import registry

LOCAL_SCHEMES = frozenset({"fs", "file"})


class KeySummary(msgspec.Struct, frozen=True):
    """A key of the app state: its name, the class of its stateful, and the count and bytes of its tensors and objects."""

    key: str
    type: str
    tensors: int
    nbytes: int


class Body(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a row holds in one piece, as it was taken; ``params`` and ``metrics`` in the form of ``state.values``."""

    tags: tuple[str, ...] = ()
    note: str | None = None
    params: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    keys: tuple[KeySummary, ...] = ()
    provenance: dict[str, Any] = {}


class RecordData(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot on its way into the catalog.

    Attributes
    ----------
    id, digest : str
        Of the snapshot and of its manifest.
    url : str
        Where it was found, without secrets.
    host : str
        Whose disk that is; empty for what every host reaches by the same URL.
    project : str
        Empty if the manifest does not say.
    created_at : int
        Microseconds since 1970.
    nbytes, written_bytes : int
        Bytes of its state, and of the data files that the take wrote.
    packages : dict
        Versions by package; stored once per content.
    annotations : Annotations or None
        What was added to it later.
    """

    id: str
    digest: str
    url: str
    host: str
    project: str
    user: str | None = None
    name: str | None = None
    step: int | None = None
    created_at: int
    duration_seconds: float | None = None
    nbytes: int
    written_bytes: int
    world_size: int
    parent: str | None = None
    body: Body
    packages: dict[str, str] = {}
    annotations: Annotations | None = None


@dataclass(frozen=True, slots=True)
class Location:
    """A place where a snapshot was seen: ``status`` is ``present``, ``replaced`` or ``missing``; ``host`` is empty for remote URLs."""

    url: str
    host: str
    digest: str
    status: str


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """A row of the catalog: one snapshot.

    Attributes
    ----------
    id : str
        32 hexadecimal digits.
    name, note, step : str, str, int or None
        As given at the take; the note may have been changed since.
    project, user, host : str, str or None, str or None
        Where it belongs, who took it, and on which machine.
    url : str
        Where it lies: the first of ``locations``.
    locations : tuple of Location
        Every place where it was seen; copies keep the id.
    created_at : datetime.datetime
        When the take began, in UTC.
    duration_seconds : float or None
        How long it took.
    nbytes : int
        Bytes of the state.
    nbytes_written : int
        Bytes of the data files that the take wrote; files that it shares with an earlier snapshot do not count.
    world_size : int
        Ranks that took it.
    tags, aliases : tuple of str
        In order of the alphabet.
    pinned : bool
        Whether it is protected from deletion.
    params, metrics : dict
        As given at the take, and metrics that were logged later.
    keys : tuple of KeySummary
        What is in it.
    parent : str or None
        Id of the snapshot that the state came from.
    digest : str
        The BLAKE3 of the manifest that was recorded first.
    provenance : dict
        Where it came from; without the packages, which ``Catalog.packages`` gives.
    status : str
        ``present``, ``replaced`` (another snapshot was taken to its path), ``missing``, or ``pending`` while it is being taken.
    """

    id: str
    name: str | None
    project: str
    user: str | None
    host: str | None
    url: str
    locations: tuple[Location, ...]
    step: int | None
    created_at: dt.datetime
    duration_seconds: float | None
    nbytes: int
    nbytes_written: int
    world_size: int
    tags: tuple[str, ...]
    aliases: tuple[str, ...]
    pinned: bool
    note: str | None
    params: dict[str, Any]
    metrics: dict[str, Any]
    keys: tuple[KeySummary, ...]
    parent: str | None
    digest: str
    provenance: dict[str, Any] = field(repr=False)
    status: str = "present"

    @property
    def nbytes_unique(self) -> int | None:
        """Bytes that no other snapshot has, at all its places: what deleting it sets free; None if none of them can be read from here.

        It is looked up on storage each time, as ``Snapshot.nbytes_unique``.
        """
        from expstate.catalog import space  # noqa: PLC0415 - records are made without it

        return space.nbytes_unique([self])

    def __hash__(self) -> int:
        return hash((self.id, self.digest))

    def __repr__(self) -> str:
        shown = (f"{one.name}={_shown(getattr(self, one.name))}" for one in fields(self) if one.repr)
        return f"Record({', '.join(shown)})"


def _shown(value: Any) -> str:
    if type(value) is dict:
        return "{" + ", ".join(f"{name!r}: {_shown(item)}" for name, item in value.items()) + "}"
    try:
        return repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "..."


def this_host() -> str:
    """The name of this machine, as locations and leases have it."""
    return socket.gethostname()


def host_of(url: str) -> str:
    """The name of this host if the URL names its disk, else empty.

    >>> host_of("s3://bucket/run")
    ''
    """
    return this_host() if registry.parse(url)[0] in LOCAL_SCHEMES else ""


def microseconds(text: str) -> int:
    """Microseconds since 1970 of a manifest's time; 0 for what is none.

    >>> microseconds("1970-01-01T00:00:01.500+00:00"), microseconds("long ago")
    (1500000, 0)
    """
    try:
        when = dt.datetime.fromisoformat(text)
    except ValueError:
        return 0
    if when.tzinfo is None:
        when = when.replace(tzinfo=dt.timezone.utc)
    return (when - dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)) // dt.timedelta(microseconds=1)


def time_of(count: int) -> dt.datetime:
    """The time that is so many microseconds after 1970, in UTC."""
    return dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc) + dt.timedelta(microseconds=count)


def value_of(encoded: Any) -> Any:
    """A param or metric as it was given; members of enums whose class this process has not imported are texts.

    Parameters
    ----------
    encoded : object
        In the form of ``state.values``.

    Examples
    --------
    >>> value_of([1, {"type": "enum", "value": ["train", "Optimizer", "ADAM", None]}])
    [1, 'Optimizer.ADAM']
    """
    try:
        found = values.decode(encoded)
    except UnknownClassError:
        found = values.decode(_without_enums(encoded))
    # The one NaN that Python takes for the same, so that a record is equal to itself.
    return math.nan if type(found) is float and math.isnan(found) else found


def enum_text(encoded: Any) -> str | None:
    """A member of an enum as ``Class.MEMBER``, whether or not this process knows the class; None for what is none."""
    match encoded:
        case {"type": "enum", "value": [str(), str(qualname), name, number]}:
            return f"{qualname.rpartition('.')[2]}.{number if name is None else name}"
    return None


def _without_enums(encoded: Any) -> Any:
    text = enum_text(encoded)
    if text is not None:
        return text
    if isinstance(encoded, dict):
        return {name: _without_enums(part) for name, part in encoded.items()}
    return [_without_enums(part) for part in encoded] if isinstance(encoded, list) else encoded


def describe(manifest: Manifest, digest: str, url: str, annotations: Annotations | None = None) -> RecordData:
    """What the catalog keeps of a snapshot.

    Parameters
    ----------
    manifest : Manifest
        Its manifest.
    digest : str
        Of the manifest, in hexadecimal digits.
    url : str
        Where it lies, without secrets.
    annotations : Annotations, optional
        Those in its folder; ones of another snapshot are left out.
    """
    given = manifest.metadata
    provenance = dict(manifest.provenance)
    packages = provenance.pop("packages", {})
    return RecordData(
        id=manifest.id,
        digest=digest,
        url=url,
        host=host_of(url),
        project=_text(provenance, "project") or "",
        user=_text(provenance, "user"),
        name=given.name,
        step=given.step,
        created_at=microseconds(manifest.created_at),
        duration_seconds=manifest.duration_seconds,
        nbytes=sum(entry.nbytes for entry in manifest.entries),
        written_bytes=manifest.nbytes_written,
        world_size=manifest.world_size,
        parent=manifest.parent,
        body=Body(
            tags=given.tags,
            note=given.note,
            params=given.params,
            metrics=given.metrics,
            keys=_key_summaries(manifest),
            provenance=provenance,
        ),
        packages={str(name): str(version) for name, version in packages.items()} if isinstance(packages, dict) else {},
        annotations=annotations if annotations is not None and annotations.id == manifest.id else None,
    )


def _text(provenance: dict[str, Any], name: str) -> str | None:
    """A text of a manifest that anybody may have written."""
    value = provenance.get(name)
    return value if isinstance(value, str) and value else None


def _key_summaries(manifest: Manifest) -> tuple[KeySummary, ...]:
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for entry in manifest.entries:
        if isinstance(entry, (TensorEntry, ObjectEntry)):
            root = entry.path.partition("/")[0]
            counts[root] = counts.get(root, 0) + isinstance(entry, TensorEntry)
            sizes[root] = sizes.get(root, 0) + entry.nbytes
    return tuple(
        KeySummary(record.key, record.type, counts.get(paths.quote(record.key), 0), sizes.get(paths.quote(record.key), 0))
        for record in manifest.keys
    )


@dataclass(frozen=True, slots=True)
class Effective:
    """Tags, note, metrics and pin as they are now: those of the take and what was added or taken away since."""

    tags: tuple[str, ...]
    note: str | None
    metrics: dict[str, Any]
    pinned: bool
    aliases: dict[str, int]
    """The aliases that it claims, and since when."""


def effective(body: Body, annotations: Annotations | None) -> Effective:
    """Body and annotations together; ``metrics`` stay in the form of ``state.values``."""
    if annotations is None:
        return Effective(tuple(sorted(body.tags)), body.note, body.metrics, pinned=False, aliases={})
    tags = set(body.tags)
    for tag, mark in annotations.tags.items():
        (tags.add if mark.present else tags.discard)(tag)
    return Effective(
        tags=tuple(sorted(tags)),
        note=body.note if annotations.note is None else annotations.note.text or None,
        metrics=body.metrics | {name: value.value for name, value in annotations.metrics.items()},
        pinned=annotations.pinned,
        aliases={name: mark.at for name, mark in annotations.aliases.items() if mark.present},
    )
