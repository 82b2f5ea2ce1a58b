"""Refs: how a person names a snapshot, and which record that is.

In this order: takes of this process that go on, ``latest``, an alias, an exact name, the beginning of an id, a path or URL. Aliases, names
and ``latest`` are those of one project; ids and places are the same everywhere. Hands out records, or says what is near.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
import unicodedata
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from expstate.catalog import given, rows, running, schema
from expstate.catalog.model import LOCAL_SCHEMES, Record
from expstate.catalog.provenance import current_project, redact
from expstate.engine import annotate
from expstate.errors import AmbiguousRefError, ExpstateError, RefNotFoundError
from expstate.state.paths import printable
from expstate.storage import registry

if TYPE_CHECKING:
    import os

    from expstate.catalog.catalog import Catalog

ALL = "*"
"""The project that stands for all of them."""

_LATEST = re.compile(r"latest(?:~([0-9]{1,9}))?")
_PREFIX = re.compile(r"[0-9a-fA-F]{4,32}")
_SHORT = re.compile(r"[0-9a-fA-F]{1,3}")
_NO_LABEL = re.compile("[@:=/\0\ud800-\udfff]")
_LABEL_BYTES = 255
_LISTED = 10
_LOOKED_AT = 1000
_SHOWN = 80


def resolve(catalog: Catalog, ref: str | os.PathLike[str], project: str | None = None) -> Record:
    """The record that a ref names.

    Of several with one name the newest that is present, else the newest; ``latest`` counts only those that are present or being taken.

    Parameters
    ----------
    catalog : Catalog
        Where to look.
    ref : str or os.PathLike
        What a person gave.
    project : str, optional
        Another project than the current one; ``"*"`` for all.

    Raises
    ------
    RefNotFoundError
        If no snapshot goes by it; the nearest are listed.
    AmbiguousRefError
        If it is the beginning of several ids; they are listed.
    InvalidArgumentError
        If it is no text.
    """
    text = given.text_of(ref)
    asked = _Asked(catalog, text, project)
    found = asked.pending()
    if found is not None:
        return found
    with catalog.database.reading() as connection:
        seq = asked.seq(connection)
        if isinstance(seq, Record):
            return seq
        if seq is not None:
            records = rows.fetch(connection, [seq])
            if records:
                return records[0]
        hint = asked.nearest(connection)
    msg = f"no snapshot goes by {_short(redact.url(text))}{asked.where()}{hint}"
    raise RefNotFoundError(msg)


class _Asked:
    """One question of a person."""

    def __init__(self, catalog: Catalog, text: str, project: str | None) -> None:
        self._text = text
        self._given = project
        self._project: str | None = None
        self._running = running.takes(catalog.place)
        self._label = unicodedata.normalize("NFC", text) if _is_label(text) else None
        self._prefix = text.lower() if _PREFIX.fullmatch(text) else None
        self._place = given.place_of(text)

    @property
    def project(self) -> str:
        # Not before it is needed: a repository may have to be looked at.
        if self._project is None:
            self._project = current_project() if self._given is None else self._given
        return self._project

    def where(self) -> str:
        if self._label is None:
            return ""
        return " in any project" if self.project == ALL else f" in project {_short(self.project)}"

    def _in_project(self, column: Any) -> Any:
        return sa.true() if self.project == ALL else column == self.project

    def _pending_here(self) -> list[Record]:
        records = [taking.record for taking in self._running]
        return [record for record in records if self.project in {ALL, record.project}]

    # In the order of precedence

    def pending(self) -> Record | None:
        """A take that goes on, by its name, whole id or place; by the beginning of its id only where no other id begins so."""
        if not self._running:
            return None
        for taking in self._running:
            if taking.pending.id == self._prefix or (self._place is not None and self._place[0] == taking.pending.path):
                return taking.record
        if self._label is None:
            return None
        return next((record for record in self._pending_here() if record.name == self._label), None)

    def seq(self, connection: sa.Connection) -> int | Record | None:
        """The number of the record's row, or the record itself if it is that of a take that goes on."""
        latest = _LATEST.fullmatch(self._text)
        if latest:
            return self._latest(connection, int(latest[1] or 0))
        found: int | Record | None = None
        if self._prefix is not None and any(taking.pending.id.startswith(self._prefix) for taking in self._running):
            return self._by_id(connection, self._prefix)
        if self._label is not None:
            found = self._by_alias(connection) or self._by_name(connection)
        if found is None and self._prefix is not None:
            found = self._by_id(connection, self._prefix)
        return self._by_place(connection) if found is None else found

    def _latest(self, connection: sa.Connection, back: int) -> int | Record | None:
        taking = self._pending_here()
        if back < len(taking):
            return taking[back]
        table = schema.records
        query = (
            sa.select(table.c.seq)
            .where(self._in_project(table.c.project), table.c.status == "present", table.c.id.not_in([record.id for record in taking]))
            .order_by(table.c.ordered_at.desc(), table.c.seq.desc())
            .offset(back - len(taking))
            .limit(1)
        )
        return connection.execute(query).scalar()

    def _by_alias(self, connection: sa.Connection) -> int | None:
        table = schema.aliases
        query = sa.select(table.c.record).where(table.c.alias == self._label, self._in_project(table.c.project))
        return connection.execute(query.order_by(table.c.claimed_at.desc(), table.c.record.desc()).limit(1)).scalar()

    def _by_name(self, connection: sa.Connection) -> int | None:
        table = schema.records
        query = sa.select(table.c.seq).where(table.c.name == self._label, self._in_project(table.c.project))
        order = (table.c.status != "present", table.c.ordered_at.desc(), table.c.seq.desc())
        return connection.execute(query.order_by(*order).limit(1)).scalar()

    def _by_id(self, connection: sa.Connection, prefix: str) -> int | Record | None:
        table = schema.records
        query = sa.select(table.c.seq, table.c.id, table.c.name).where(table.c.id.between(prefix.ljust(32, "0"), prefix.ljust(32, "f")))
        found = connection.execute(query.order_by(table.c.id).limit(_LISTED)).all()
        taking = {taken.pending.id: taken.record for taken in self._running if taken.pending.id.startswith(prefix)}
        fitting = {row.id: row.name for row in found} | {record.id: record.name for record in taking.values()}
        if len(fitting) > 1:
            listed = ", ".join(found_id + (f" ({printable(name)})" if name else "") for found_id, name in sorted(fitting.items()))
            count = f"at least {len(fitting)}" if len(found) == _LISTED else str(len(fitting))
            msg = f"{prefix!r} is the beginning of {count} ids: {listed}; give more of it"
            raise AmbiguousRefError(msg)
        if taking:
            return next(iter(taking.values()))
        return found[0].seq if found else None

    def _by_place(self, connection: sa.Connection) -> int | None:
        if self._place is None:
            return None
        table = schema.locations
        query = sa.select(table.c.record).where(table.c.place == rows.place_key(*self._place))
        order = (table.c.status != "present", table.c.seen_at.desc(), table.c.record.desc())
        return connection.execute(query.order_by(*order).limit(1)).scalar()

    # What is near

    def nearest(self, connection: sa.Connection) -> str:
        """The end of a message: what may have been meant, and what to do."""
        if _lies_at(self._text):
            return f"; a snapshot lies there that is not in this catalog: `expstate scan {shlex.quote(printable(self._text))}` enters it"
        if _LATEST.fullmatch(self._text):
            table = schema.records
            query = sa.select(sa.func.count()).select_from(table).where(self._in_project(table.c.project), table.c.status == "present")
            return f", which has {connection.execute(query).scalar_one():,} that are present"
        if self._label is None:
            return "; if a snapshot lies there, `expstate scan` of its folder enters it"
        return self._near(connection)

    def _near(self, connection: sa.Connection) -> str:
        hints = self._near_labels(connection)
        if self._prefix is not None:
            hints += self._near_ids(connection, self._prefix)
        elsewhere = self._elsewhere(connection)
        if elsewhere is not None:
            return f"; project {_short(elsewhere)} has one, which project={_short(elsewhere)} or its id finds"
        if hints:
            return f"; the nearest {'is' if len(hints) == 1 else 'are'} {', '.join(hints)}"
        if _SHORT.fullmatch(self._text):
            return "; of an id at least 4 digits are needed"
        return "; `expstate list` shows those that are there"

    def _near_labels(self, connection: sa.Connection) -> list[str]:
        names, aliases = schema.records, schema.aliases
        found = [
            *connection.execute(sa.select(aliases.c.alias).where(self._in_project(aliases.c.project)).limit(_LOOKED_AT)).scalars(),
            *connection.execute(
                sa.select(names.c.name)
                .where(self._in_project(names.c.project), names.c.name.is_not(None))
                .order_by(names.c.ordered_at.desc())
                .limit(_LOOKED_AT)
            ).scalars(),
        ]
        by_case = {label.casefold(): label for label in reversed(found)}
        near = difflib.get_close_matches((self._label or "").casefold(), by_case, n=5, cutoff=0.5)
        return [_short(by_case[label]) for label in near]

    @staticmethod
    def _near_ids(connection: sa.Connection, prefix: str) -> list[str]:
        column, whole = schema.records.c.id, prefix.ljust(32, "0")
        before = connection.execute(sa.select(column).where(column < whole).order_by(column.desc()).limit(2)).scalars()
        after = connection.execute(sa.select(column).where(column >= whole).order_by(column).limit(2)).scalars()
        return [found for found in (*before, *after) if found[:3] == prefix[:3]]

    def _elsewhere(self, connection: sa.Connection) -> str | None:
        if self.project == ALL:
            return None
        for table, column in ((schema.aliases, schema.aliases.c.alias), (schema.records, schema.records.c.name)):
            found: str | None = connection.execute(sa.select(table.c.project).where(column == self._label).limit(1)).scalar()
            if found is not None:
                return found
        return None


def _is_label(text: str) -> bool:
    return len(text) <= _LABEL_BYTES and _NO_LABEL.search(text) is None


def _lies_at(text: str) -> bool:
    """Whether this is the path of a snapshot on a disk of this host."""
    with contextlib.suppress(ExpstateError, OSError, ValueError):
        return registry.parse(text)[0] in LOCAL_SCHEMES and annotate.committed_id(registry.open_storage(text)) is not None
    return False


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def packages(catalog: Catalog, ref: str) -> dict[str, str]:
    """The Python packages and versions that a snapshot was taken with; none where they were not recorded.

    Raises
    ------
    RefNotFoundError
        If no snapshot goes by the ref.
    """
    record = resolve(catalog, ref)
    records, environments = schema.records, schema.environments
    on = records.c.environment == environments.c.digest
    query = sa.select(environments.c.packages).join(records, on).where(records.c.id == record.id)
    with catalog.database.reading() as connection:
        text = connection.execute(query).scalar()
    return {} if text is None else msgspec.json.decode(text, type=dict[str, str])
