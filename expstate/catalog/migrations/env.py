"""What Alembic runs around the migrations: they get the connection that the catalog has open, inside its transaction.

``versions.py`` hands it over; nothing is read from an .ini file.
"""

from __future__ import annotations

from alembic import context

from expstate.catalog import schema


def migrate() -> None:
    """Run the migrations that Alembic has chosen."""
    context.configure(connection=context.config.attributes["connection"], target_metadata=schema.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


if __name__ == "env_py":  # so Alembic calls this file when it runs it
    migrate()
