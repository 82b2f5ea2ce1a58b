"""The catalog on a PostgreSQL server: how it is reached, and how a transaction begins.

Gets an URL, gives what SQLAlchemy needs; ``database`` holds the transactions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlalchemy as sa

_LOCK = 0x45585053  # of those that a program may give a meaning of its own
_STALLED_MILLISECONDS = 600_000

READING = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
WRITING = {"isolation_level": "READ COMMITTED"}


def connect_options(timeout_seconds: float) -> dict[str, Any]:
    """What psycopg is given besides the URL; it counts in whole seconds."""
    return {"connect_timeout": max(2, math.ceil(timeout_seconds)), "application_name": "expstate", "client_encoding": "utf8"}


def begin_writing(connection: sa.Connection, timeout_seconds: float) -> None:
    """Be the only one who writes until the transaction ends, as on SQLite: so nobody meets half of another's names, and order is order."""
    connection.exec_driver_sql(
        "SELECT set_config('lock_timeout', %s, true), set_config('idle_in_transaction_session_timeout', %s, true)",
        (str(max(1, math.ceil(timeout_seconds * 1000))), str(_STALLED_MILLISECONDS)),
    )
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
