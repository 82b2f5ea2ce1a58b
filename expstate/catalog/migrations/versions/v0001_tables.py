"""The first tables of the catalog."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER is SQLite's own row number


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "environments",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("packages", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_environments"),
    )
    op.create_table(
        "names",
        sa.Column("id", _Number, autoincrement=True, nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=6), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_names"),
    )
    op.create_index("ix_names_project_kind_name", "names", ["project", "kind", "name"], unique=True)
    op.create_table(
        "records",
        sa.Column("seq", _Number, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("user", sa.Text()),
        sa.Column("host", sa.Text()),
        sa.Column("step", sa.BigInteger()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("ordered_at", sa.BigInteger(), nullable=False),
        sa.Column("duration_seconds", sa.Float()),
        sa.Column("nbytes", sa.BigInteger(), nullable=False),
        sa.Column("written_bytes", sa.BigInteger(), nullable=False),
        sa.Column("world_size", sa.Integer(), nullable=False),
        sa.Column("parent", sa.String(length=32)),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("note", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("git_commit", sa.Text()),
        sa.Column("git_branch", sa.Text()),
        sa.Column("environment", sa.String(length=64)),
        sa.PrimaryKeyConstraint("seq", name="pk_records"),
        sa.UniqueConstraint("id", name="uq_records_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_records_ordered_at", "records", ["ordered_at"])
    op.create_index("ix_records_parent", "records", ["parent"])
    op.create_index("ix_records_project_name", "records", ["project", "name"])
    op.create_index("ix_records_project_ordered_at", "records", ["project", "ordered_at"])
    op.create_table(
        "aliases",
        sa.Column("project", sa.Text(), nullable=False),
        sa.Column("alias", sa.Text(), nullable=False),
        sa.Column("record", _Number, nullable=False),
        sa.Column("claimed_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["record"], ["records.seq"], name="fk_aliases_record", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("project", "alias", name="pk_aliases"),
    )
    op.create_index("ix_aliases_record", "aliases", ["record"])
    op.create_table(
        "bodies",
        sa.Column("record", _Number, nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("annotations", sa.Text()),
        sa.ForeignKeyConstraint(["record"], ["records.seq"], name="fk_bodies_record", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("record", name="pk_bodies"),
    )
    op.create_table(
        "locations",
        sa.Column("record", _Number, nullable=False),
        sa.Column("place", sa.String(length=64), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["record"], ["records.seq"], name="fk_locations_record", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("record", "place", name="pk_locations"),
    )
    op.create_index("ix_locations_place", "locations", ["place"])
    op.create_table(
        "metrics",
        sa.Column("record", _Number, nullable=False),
        sa.Column("name", _Number, nullable=False),
        sa.Column("number", sa.Float()),
        sa.Column("exact", sa.Text()),
        sa.ForeignKeyConstraint(["record"], ["records.seq"], name="fk_metrics_record", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["name"], ["names.id"], name="fk_metrics_name"),
        sa.PrimaryKeyConstraint("record", "name", name="pk_metrics"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_metrics_name_number_record", "metrics", ["name", "number", "record"])
    op.create_table(
        "params",
        sa.Column("record", _Number, nullable=False),
        sa.Column("name", _Number, nullable=False),
        sa.Column("number", sa.Float()),
        sa.Column("text", sa.Text()),
        sa.Column("exact", sa.Text()),
        sa.ForeignKeyConstraint(["record"], ["records.seq"], name="fk_params_record", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["name"], ["names.id"], name="fk_params_name"),
        sa.PrimaryKeyConstraint("record", "name", name="pk_params"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_params_name_number_record", "params", ["name", "number", "record"])
    op.create_table(
        "tags",
        sa.Column("record", _Number, nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["record"], ["records.seq"], name="fk_tags_record", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("record", "tag", name="pk_tags"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_tags_tag_record", "tags", ["tag", "record"])


def downgrade() -> None:
    """There is no way back: an older version refuses the catalog."""
