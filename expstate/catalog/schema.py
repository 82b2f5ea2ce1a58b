"""The tables of the catalog, for SQLite and PostgreSQL. The migrations make them; ``rows`` fills and reads them.

A record's body is one text and is never changed; what is searched for stands apart from it in columns and in small tables, which are
made from body and annotations whenever a record is entered or annotated.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text

VERSION = "0001"
"""The newest migration: what ``alembic_version`` holds in a catalog of this version."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_Number = BigInteger().with_variant(Integer, "sqlite")  # only INTEGER is SQLite's own row number


def _record(*, primary_key: bool = False, nullable: bool = False) -> Column[int]:
    return Column("record", _Number, ForeignKey("records.seq", ondelete="CASCADE"), primary_key=primary_key, nullable=nullable)


records = Table(
    "records",
    metadata,
    Column("seq", _Number, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("project", Text, nullable=False),
    Column("name", Text),
    Column("user", Text),
    Column("host", Text),
    Column("step", BigInteger),
    Column("created_at", BigInteger, nullable=False),  # microseconds since 1970
    Column("ordered_at", BigInteger, nullable=False),  # like created_at, but never before what was recorded earlier
    Column("duration_seconds", Float),
    Column("nbytes", BigInteger, nullable=False),
    Column("written_bytes", BigInteger, nullable=False),
    Column("world_size", Integer, nullable=False),
    Column("parent", String(32), index=True),
    Column("digest", String(64), nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("note", Text),
    Column("status", Text, nullable=False),
    Column("git_commit", Text),
    Column("git_branch", Text),
    Column("environment", String(64)),
    Index(None, "project", "ordered_at"),
    Index(None, "project", "name"),
    Index(None, "ordered_at"),
    sqlite_autoincrement=True,
)

bodies = Table(  # apart from the records, so that a search that looks at all of them reads little
    "bodies",
    metadata,
    _record(primary_key=True),
    Column("body", Text, nullable=False),  # model.Body as JSON
    Column("annotations", Text),  # format.annotations.Annotations as JSON
)

locations = Table(
    "locations",
    metadata,
    _record(primary_key=True),
    Column("place", String(64), primary_key=True),  # SHA-256 of host and URL: an index takes no long texts
    Column("url", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("status", Text, nullable=False),
    Column("seen_at", BigInteger, nullable=False),
    Index(None, "place"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("project", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    _record(),
    Column("claimed_at", BigInteger, nullable=False),
    Index(None, "record"),
)

tags = Table(
    "tags",
    metadata,
    _record(primary_key=True),
    Column("tag", Text, primary_key=True),
    Index(None, "tag", "record"),
    sqlite_with_rowid=False,  # all of a record's lie together
)

names = Table(  # of metrics and params, once per project
    "names",
    metadata,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("project", Text, nullable=False),
    Column("kind", String(6), nullable=False),  # metric or param
    Column("name", Text, nullable=False),
    Index(None, "project", "kind", "name", unique=True),
)

metrics = Table(
    "metrics",
    metadata,
    _record(primary_key=True),
    Column("name", _Number, ForeignKey("names.id"), primary_key=True),
    Column("number", Float),  # null for NaN
    Column("exact", Text),  # what the number does not tell: hexadecimal digits of an int that no float holds, or nan
    Index(None, "name", "number", "record"),
    sqlite_with_rowid=False,
)

params = Table(
    "params",
    metadata,
    _record(primary_key=True),
    Column("name", _Number, ForeignKey("names.id"), primary_key=True),
    Column("number", Float),  # null for what is no number
    Column("text", Text),  # null for what is no text; true and false are texts
    Column("exact", Text),  # as of metrics; none for None
    Index(None, "name", "number", "record"),
    sqlite_with_rowid=False,
)

environments = Table(
    "environments",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("packages", Text, nullable=False),  # JSON
)
