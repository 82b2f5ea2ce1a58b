"""The fields of records that queries and sorts know, under the names that people use.

``names`` looks names up here; ``conditions`` and ``sort`` make SQL of the columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.catalog import schema

if TYPE_CHECKING:
    import sqlalchemy as sa

TEXT = "text"
INTEGER = "whole number"
SIZE = "size"
DURATION = "duration"
TIME = "time"
AGE = "age"
BOOLEAN = "boolean"
MANY = "many"

EXAMPLES = {
    INTEGER: "a whole number such as 100",
    SIZE: "a size such as 1GB or 512 MiB",
    DURATION: "a duration such as 90s or 2h",
    TIME: "a time such as 2026-01-31, 2026-01-31T12:00 or today, in UTC",
    AGE: "a duration such as 7d or 12h",
    BOOLEAN: "true or false",
}


@dataclass(frozen=True, slots=True)
class Field:
    """A field.

    Attributes
    ----------
    name : str
        What people call it.
    kind : str
        What its values are; of ``MANY`` a record has any number of texts, in rows of another table.
    column : Column
        Where they are.
    label : bool
        Whether they are names, which are stored in normal form (NFC).
    """

    name: str
    kind: str
    column: sa.Column[Any]
    label: bool = False


_records = schema.records.c
_ALL = (
    Field("id", TEXT, _records.id),
    Field("name", TEXT, _records.name, label=True),
    Field("project", TEXT, _records.project),
    Field("user", TEXT, _records.user),
    Field("host", TEXT, _records.host),
    Field("url", MANY, schema.locations.c.url),
    Field("step", INTEGER, _records.step),
    Field("created", TIME, _records.created_at),
    Field("age", AGE, _records.created_at),
    Field("duration", DURATION, _records.duration_seconds),
    Field("size", SIZE, _records.nbytes),
    Field("written", SIZE, _records.written_bytes),
    Field("world_size", INTEGER, _records.world_size),
    Field("tag", MANY, schema.tags.c.tag, label=True),
    Field("alias", MANY, schema.aliases.c.alias, label=True),
    Field("pinned", BOOLEAN, _records.pinned),
    Field("note", TEXT, _records.note),
    Field("parent", TEXT, _records.parent),
    Field("digest", TEXT, _records.digest),
    Field("status", TEXT, _records.status),
    Field("commit", TEXT, _records.git_commit),
    Field("branch", TEXT, _records.git_branch),
)
_SYNONYMS = {
    "created_at": "created",
    "duration_seconds": "duration",
    "nbytes": "size",
    "nbytes_written": "written",
    "tags": "tag",
    "aliases": "alias",
}

FIELDS = {field.name: field for field in _ALL}
FIELDS |= {synonym: FIELDS[name] for synonym, name in _SYNONYMS.items()}
