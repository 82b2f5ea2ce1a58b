"""The verbs that find snapshots and look at them: list, show, log."""

from __future__ import annotations

import argparse
import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.catalog.model import Location, Record, describe, effective, host_of, value_of
from expstate.catalog.provenance import current_project
from expstate.commands import columns
from expstate.commands.plain import plain
from expstate.commands.texts import age_text, entry_row, joined, sizes_text, unique_here, value_text
from expstate.commands.verb import REF, Verb, argument
from expstate.commands.view import Column
from expstate.engine import annotate
from expstate.engine.report import bytes_text, counted
from expstate.errors import CatalogError, RefNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.catalog.lineage import Lineage
    from expstate.catalog.records import Records
    from expstate.commands.verb import Session
    from expstate.commands.view import View
    from expstate.format.manifest import Entry
    from expstate.snapshot import Snapshot

_SHOWN = 50


def _now() -> dt.datetime:
    return dt.datetime.now(dt.timezone.utc)


# list


def _count(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        msg = f"a whole number from 0 on is needed, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _list(session: Session, arguments: argparse.Namespace) -> Records:
    found = session.catalog.search(arguments.query, project=session.project, sort=arguments.sort)
    limit = arguments.limit if arguments.limit is not None else 0 if arguments.json else _SHOWN
    arguments.found = found
    return found[:limit] if limit else found


def _show_list(records: Records, view: View, arguments: argparse.Namespace) -> None:
    shown = list(records)
    if not shown:
        where = "" if arguments.all else f" in project {current_project()!r}"
        view.line(f"no snapshots{where}" if arguments.query is None else f"no snapshots{where} fulfil the query")
        if arguments.query is None:
            elsewhere = "" if arguments.all else "--all looks in all projects; "
            view.line(f"{elsewhere}`expstate scan` enters those in the folders that takes went to")
        return
    if arguments.columns:
        table = columns.chosen([name.strip() for name in arguments.columns.split(",")], shown)
    else:
        table = columns.usual(shown, f"{arguments.query or ''} {arguments.sort or ''}", with_project=arguments.all)
    now = _now()

    def titles_and_cells() -> tuple[list[Column], list[list[str]]]:
        return [one.column for one in table], [[one.cell(record, now) for one in table] for record in shown]

    left_out = []
    while not arguments.columns and not view.fits(*titles_and_cells()) and (least := columns.to_leave_out(table)) is not None:
        table.remove(least)
        left_out.append(least.column.title)
    view.table(*titles_and_cells())
    if left_out:
        view.line(f"no room for {joined(left_out)}; --columns shows those that you name")
    more = len(arguments.found) - len(records)
    if more > 0 and arguments.limit is None:
        view.line(f"and {more:,} more; --limit 0 shows all")


# show


@dataclass(frozen=True, slots=True)
class Shown:
    """All about one snapshot.

    Attributes
    ----------
    record : Record
        What the catalog knows, or the manifest if the snapshot is not in it.
    packages : dict of str to str
        What it was taken with.
    entries : tuple of Entry or None
        Those that a glob matches.
    """

    record: Record
    packages: dict[str, str]
    entries: tuple[Entry, ...] | None


def _show(session: Session, arguments: argparse.Namespace) -> Shown:
    entries = None
    try:
        record = session.record(arguments.ref)
        packages = session.catalog.packages(record.id)
    except (RefNotFoundError, CatalogError):
        # A path of a snapshot that is in no catalog, or there is none; if it is neither, this says so.
        snapshot = session.snapshot(arguments.ref)
        record = record_of(snapshot)
        packages = {str(name): str(version) for name, version in dict(snapshot.metadata.provenance.get("packages") or {}).items()}
    if arguments.glob is not None:
        entries = session.snapshot(arguments.ref).entries(arguments.glob)
    return Shown(record, packages, entries)


def record_of(snapshot: Snapshot) -> Record:
    """What a record of a snapshot would say that is in no catalog."""
    data = describe(snapshot.manifest, snapshot.metadata.digest, snapshot.path, annotate.read(snapshot._storage, snapshot.id))  # noqa: SLF001 - ours
    now_true = effective(data.body, data.annotations)
    host = data.body.provenance.get("host")
    return Record(
        id=data.id,
        name=data.name,
        project=data.project,
        user=data.user,
        host=host if isinstance(host, str) else None,
        url=data.url,
        locations=(Location(data.url, host_of(data.url), data.digest, "present"),),
        step=data.step,
        created_at=snapshot.created_at,
        duration_seconds=data.duration_seconds,
        nbytes=data.nbytes,
        nbytes_written=data.written_bytes,
        world_size=data.world_size,
        tags=now_true.tags,
        aliases=tuple(sorted(now_true.aliases)),
        pinned=now_true.pinned,
        note=now_true.note,
        params={name: value_of(value) for name, value in data.body.params.items()},
        metrics={name: value_of(value) for name, value in now_true.metrics.items()},
        keys=data.body.keys,
        parent=data.parent,
        digest=data.digest,
        provenance=data.body.provenance,
    )


def _show_shown(shown: Shown, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    if shown.entries is not None:
        titles = [Column("entry"), Column("kind"), Column("type"), Column("shape or value"), Column("size", is_number=True)]
        view.table(titles, [entry_row(entry) for entry in shown.entries])
        return
    record = shown.record
    view.pairs((name, text) for name, text in _facts(record) if text)
    view.line()
    titles = [Column("key"), Column("class"), Column("tensors", is_number=True), Column("size", is_number=True)]
    view.table(titles, [(key.key, key.type, f"{key.tensors:,}", bytes_text(key.nbytes)) for key in record.keys])
    for what, values in (("metric", record.metrics), ("param", record.params)):
        if values:
            view.line()
            view.pairs((f"{what} {name}", repr(value) if isinstance(value, float) else value_text(value)) for name, value in values.items())
    facts = [(name, text) for name, text in _flat("", record.provenance) if name != "project"]
    if facts or shown.packages:
        view.line()
        packages = [("packages", f"{len(shown.packages):,}, listed by --json")] if shown.packages else []
        view.pairs([*facts, *packages])


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    duration = "" if record.duration_seconds is None else f", took {record.duration_seconds:.3g} s"
    yield "name", record.name or ""
    yield "id", record.id
    yield "project", record.project
    yield "taken", f"{record.created_at:%Y-%m-%d %H:%M:%S} UTC, {age_text(record.created_at, _now())} ago{duration}"
    yield "step", value_text(record.step)
    yield "size", sizes_text(record)
    yield "ranks", str(record.world_size) if record.world_size > 1 else ""
    yield "tags", joined(record.tags)
    yield "aliases", joined(record.aliases)
    yield "pinned", "yes" if record.pinned else ""
    yield "note", record.note or ""
    yield "parent", record.parent or ""
    yield "status", "" if record.status == "present" else record.status
    yield "location", "\n".join(_place(place) for place in record.locations) or record.url


def _place(place: Location) -> str:
    on = f" on {place.host}" if place.host and place.host != host_of("/") else ""
    return f"{place.url}{on}{'' if place.status == 'present' else f' ({place.status})'}"


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Provenance as names and texts; what has many lines is only counted."""
    if isinstance(value, dict):
        for part, item in value.items():
            yield from _flat(f"{name}.{part}" if name else str(part), item)
    elif value is not None:
        text = joined(map(str, value)) if isinstance(value, list) else value_text(value)
        lines = text.count("\n")
        yield name, text if lines == 0 else f"{counted(lines + 1, 'line')}, shown by --json"


def _data(shown: Shown, arguments: argparse.Namespace) -> Any:
    del arguments
    found = plain(shown.record) | {"nbytes_unique": unique_here(shown.record), "packages": shown.packages}
    if shown.entries is not None:
        names = ("path", "kind", "type", "shape_or_value", "size")
        found["entries"] = [dict(zip(names, entry_row(entry), strict=True)) | {"nbytes": entry.nbytes} for entry in shown.entries]
    return found


# log


def _log(session: Session, arguments: argparse.Namespace) -> Lineage:
    return session.catalog.lineage(session.record(arguments.ref).id)


def _show_log(lineage: Lineage, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    view.text(str(lineage))


VERBS = (
    Verb(
        name="list",
        aliases=("ls",),
        library="catalog.search",
        help="List snapshots, newest first, or those that a query finds.",
        details="Columns are those that have something to say of the snapshots; numbers are rounded to six digits, which --json has whole.",
        example='expstate list "loss < 0.5 and not tag = broken" --sort loss --limit 10',
        arguments=(
            argument(
                "query",
                nargs="?",
                metavar="QUERY",
                help="such as 'loss < 0.2 and (tag = ablation or not pinned) and size > 1GB and age < 7d'",
            ),
            argument("--sort", metavar="FIELD[:desc]", help="a field, metric or param; missing values come last"),
            argument("--limit", type=_count, metavar="N", help=f"most snapshots; 0 for all (default: {_SHOWN}, with --json all)"),
            argument("--columns", metavar="NAMES", help="columns, separated by commas: fields, metrics, params (metric.x, param.x)"),
        ),
        call=_list,
        show=_show_list,
        data=lambda records, _: [plain(record) for record in records],
        widens=True,
    ),
    Verb(
        name="show",
        library="catalog[ref]",
        help="Show all about a snapshot, or some of its entries.",
        example="expstate show best 'model/*weight'",
        arguments=(REF, argument("glob", nargs="?", metavar="GLOB", help="entries to list; * crosses /")),
        call=_show,
        show=_show_shown,
        data=_data,
        widens=True,
    ),
    Verb(
        name="log",
        library="catalog.lineage",
        help="Draw where a snapshot came from, and what came from it.",
        example="expstate log best",
        arguments=(REF,),
        call=_log,
        show=_show_log,
        widens=True,
    ),
)
