"""What is known of one snapshot besides its state: labels, note, measurements, where it came from, its relatives; and the same as Python.

Gets the catalog and ids, hands on plain JSON of texts. Provenance may be anything that a manifest says: it is made flat, short,
printable.
"""

from __future__ import annotations

import keyword
from typing import TYPE_CHECKING, Any

from expstate.commands.texts import sizes_text
from expstate.engine.report import bytes_text, counted
from expstate.errors import RefNotFoundError
from expstate.notebook.browser import texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import Record

_DEEPEST = 4
_MOST_FACTS = 200
_MOST_RELATIVES = 200
_NEAR_RELATIVES = 20
_LONGEST_FACT = 500


def record_of(catalog: Catalog, snapshot_id: str) -> Record:
    """The record of an id, and of nothing that is called like it.

    Raises
    ------
    RefNotFoundError
        If it has no record any more.
    """
    record = catalog[snapshot_id]
    if record.id != snapshot_id:
        msg = f"a snapshot has the name or alias {snapshot_id!r}, which is another's id; unalias it to get at the other"
        raise RefNotFoundError(msg)
    return record


def overview(catalog: Catalog, snapshot_id: str) -> dict[str, Any]:
    """All that the overview shows but for packages and lineage.

    Parameters
    ----------
    catalog : Catalog
        Where its record is.
    snapshot_id : str
        The whole id.
    """
    record = record_of(catalog, snapshot_id)
    provenance = dict(record.provenance)
    run = provenance.get("run")
    source = run.get("source") if isinstance(run, dict) else None
    return {
        "id": record.id,
        "name": texts.clean(record.name or record.id[:8]),
        "status": record.status,
        "pinned": record.pinned,
        "tags": [_label(tag) for tag in record.tags],
        "aliases": [_label(alias) for alias in record.aliases],
        "note": texts.lines(record.note or ""),
        "created": record.created_at.timestamp(),
        "facts": [[name, texts.clean(value, _LONGEST_FACT)] for name, value in _facts(record)],
        "metrics": _values(record.metrics),
        "params": _values(record.params),
        "keys": [
            [texts.clean(key.key), texts.clean(key.type), counted(key.tensors, "tensor"), bytes_text(key.nbytes)] for key in record.keys
        ],
        "provenance": list(_provenance(provenance))[:_MOST_FACTS],
        "source": texts.lines(source) if isinstance(source, str) and source else None,
    }


def _label(text: str) -> dict[str, str]:
    return {"text": texts.clean(text), "value": texts.lines(text)}


def _values(found: Mapping[str, Any]) -> list[list[str]]:
    return [[texts.clean(name), texts.value(value)] for name, value in list(found.items())[:_MOST_FACTS]]


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    yield "id", record.id
    if record.step is not None:
        yield "step", str(record.step)
    yield "taken", f"{record.created_at:%Y-%m-%d %H:%M:%S} UTC"
    if record.duration_seconds is not None:
        yield "duration", f"{record.duration_seconds:.3g} s"
    yield "size", sizes_text(record)
    for location in record.locations:
        where = f" on {location.host}" if location.host else ""
        yield "place", f"{location.url}{where}{'' if location.status == 'present' else f' ({location.status})'}"
    for name, value in (("project", record.project), ("user", record.user)):
        if value:
            yield name, value


def _provenance(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, value in found.items():
        if name not in {"project", "user"}:
            yield from _flat(name, value, _DEEPEST)


def _flat(name: str, value: Any, depth: int) -> Iterator[list[str]]:
    if isinstance(value, dict) and value and depth:
        for part, item in value.items():
            if (name, part) != ("run", "source"):
                yield from _flat(f"{name}.{part}", item, depth - 1)
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        yield [texts.clean(name), texts.clean(" ".join(value), _LONGEST_FACT)]
    else:
        yield [texts.clean(name), texts.value(value)]


def packages(catalog: Catalog, snapshot_id: str) -> list[list[str]]:
    """The packages that it was taken with, and their versions."""
    found = catalog.packages(record_of(catalog, snapshot_id).id)
    return [[texts.clean(name), texts.clean(version)] for name, version in sorted(found.items())]


def lineage(catalog: Catalog, snapshot_id: str) -> dict[str, Any]:
    """The snapshots around one in its lineage, as lines of a drawing; ``more`` says how many are left out."""
    found = catalog.lineage(record_of(catalog, snapshot_id).id)
    lines = str(found).split("\n")
    here = next(place for place, relative in enumerate(found.relatives) if relative.id == snapshot_id)
    first = max(0, here - _NEAR_RELATIVES)
    shown = list(zip(found.relatives, lines, strict=True))[first : first + _MOST_RELATIVES]
    return {
        "relatives": [
            {"id": relative.id, "known": relative.known, "here": relative.id == snapshot_id, "line": texts.clean(line)}
            for relative, line in shown
        ],
        "before": first,
        "more": len(lines) - first - len(shown),
    }


def as_python(records: Sequence[Record], query: str = "", sort: str | None = None) -> str:
    """Lines of Python that find what is selected, or what was searched for."""
    if not records:
        options = "".join([f", sort={sort!r}" if sort else ""])
        return f"from expstate import Catalog\n\nrecords = Catalog().search({query!r}{options})\n"
    if len(records) == 1:
        (record,) = records
        return f"{_found(record, 'snapshot')}\n{_restored(record)}"
    first, *others = records
    names = ["old", "new"] if len(records) == 2 else [f"snapshot_{number}" for number in range(1, len(records) + 1)]  # noqa: PLR2004 - a pair
    lines = [_found(first, names[0]), *(_found(record, name, header=False) for record, name in zip(others, names[1:], strict=True))]
    if len(records) == 2:  # noqa: PLR2004 - a pair
        lines.append("old.diff(new, stats=True)")
    return "\n".join(lines) + "\n"


def _found(record: Record, name: str, *, header: bool = True) -> str:
    begin = "from expstate import Snapshot\n\n" if header else ""
    return f"{begin}{name} = Snapshot.find({record.id!r})  # {texts.clean(record.name or record.id[:8])}"


def _restored(record: Record) -> str:
    """The call that puts all of it back that has a name of Python."""
    names = [key.key for key in record.keys if key.key.isidentifier() and not keyword.iskeyword(key.key) and key.key != "rng_state"]
    state = ", ".join(f"{name!r}: {name}" for name in names)
    return f"snapshot.restore({{{state}}})\n" if names else "snapshot.entries()\n"
