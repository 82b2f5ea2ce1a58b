"""What a person may want to type: the ids, names, aliases, tags, metrics and params of one project, for completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import running, schema
from expstate.catalog.provenance import current_project
from expstate.catalog.query.fields import FIELDS

if TYPE_CHECKING:
    from expstate.catalog.catalog import Catalog

_MOST = 200
_SHORT_ID = 8


def vocabulary(catalog: Catalog) -> dict[str, tuple[str, ...]]:
    """The words of the current project.

    Returns
    -------
    dict of str to tuple of str
        By what they are: ``id`` (shortened) and ``name`` of the newest snapshots, the newest first; ``alias``, ``tag``, ``metric`` and
        ``param`` in order; ``field``, what every record has.

    Raises
    ------
    CatalogError
        If the catalog cannot be read.
    """
    project = current_project()
    records, aliases, tags, names = schema.records.c, schema.aliases.c, schema.tags.c, schema.names.c
    newest = (
        sa.select(records.id, records.name)
        .where(records.project == project, records.status == "present")
        .order_by(records.ordered_at.desc())
        .limit(_MOST)
    )
    tagged = sa.select(tags.tag).join(schema.records, records.seq == tags.record).where(records.project == project)
    found = [(going_on.record.id, going_on.record.name) for going_on in running.takes(catalog.place)]
    with catalog.database.reading() as connection:

        def words(query: sa.Select[Any]) -> tuple[str, ...]:
            return tuple(connection.execute(query).scalars())

        def named(kind: str) -> tuple[str, ...]:
            return words(sa.select(names.name).where(names.project == project, names.kind == kind).order_by(names.name))

        found += [(record.id, record.name) for record in connection.execute(newest)]
        return {
            "id": tuple(identity[:_SHORT_ID] for identity, _ in found),
            "name": tuple(dict.fromkeys(name for _, name in found if name)),
            "alias": words(sa.select(aliases.alias).where(aliases.project == project).order_by(aliases.alias)),
            "tag": words(tagged.distinct().order_by(tags.tag).limit(_MOST)),
            "metric": named("metric"),
            "param": named("param"),
            "field": tuple(dict.fromkeys(field.name for field in FIELDS.values())),
        }
