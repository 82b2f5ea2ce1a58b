"""Where a snapshot came from and what came from it: the chain of its ancestors and the tree of its descendants.

Two recursive queries find them, however many there are; everything else is one walk without recursion. Parents that the catalog does not
know, or knows no more, are in it with their id alone. A circle, which only a forged manifest makes, is cut open.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import refs, schema
from expstate.catalog.model import time_of
from expstate.errors import RefNotFoundError
from expstate.state.paths import printable

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterator, Mapping, Sequence

    from expstate.catalog.catalog import Catalog

_SHOWN_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Relative:
    """A snapshot in a lineage.

    Attributes
    ----------
    id : str
        32 hexadecimal digits.
    parent : str or None
        Id of the snapshot that it came from.
    name, step, project, status : str, int, str, str or None
        As in its record; of one without a record the id is all that is known.
    created_at : datetime.datetime or None
        When the take began, in UTC.
    """

    id: str
    parent: str | None = None
    name: str | None = None
    step: int | None = None
    project: str | None = None
    status: str | None = None
    created_at: dt.datetime | None = None

    @property
    def known(self) -> bool:
        """Whether the catalog has a record of it."""
        return self.status is not None

    def __str__(self) -> str:
        if not self.known:
            return f"{printable(self.id[:_SHOWN_DIGITS])} (not in the catalog)"
        parts = [printable(self.id[:_SHOWN_DIGITS])]
        if self.name:
            parts.append(printable(self.name))
        if self.step is not None:
            parts.append(f"step {self.step}")
        if self.status != "present":
            parts.append(f"({printable(self.status or '')})")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Lineage:
    """A tree of snapshots: a chain of ancestors, the snapshot itself, and all that came from it. Iterating gives parents before children.

    Attributes
    ----------
    id : str
        Of the snapshot that was asked for.
    relatives : tuple of Relative
        All of them, as they stand in the tree.
    """

    id: str
    relatives: tuple[Relative, ...]
    _lines: tuple[str, ...] = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[Relative]:
        return iter(self.relatives)

    def __len__(self) -> int:
        return len(self.relatives)

    @property
    def ancestors(self) -> tuple[Relative, ...]:
        """Those that it came from, the oldest first."""
        return self.relatives[: self._position]

    @property
    def descendants(self) -> tuple[Relative, ...]:
        """Those that came from it."""
        return self.relatives[self._position + 1 :]

    @property
    def _position(self) -> int:
        return next(number for number, relative in enumerate(self.relatives) if relative.id == self.id)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON: the id, and the snapshots in the order of the tree, each with its parent's id.

        >>> Lineage("0" * 32, (Relative("0" * 32),), ("",)).to_dict()["snapshots"][0]["known"]
        False
        """
        return {
            "id": self.id,
            "snapshots": [
                {
                    "id": relative.id,
                    "parent": relative.parent,
                    "known": relative.known,
                    "name": relative.name,
                    "step": relative.step,
                    "project": relative.project,
                    "status": relative.status,
                    "created_at": None if relative.created_at is None else relative.created_at.isoformat(),
                }
                for relative in self.relatives
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def lineage(catalog: Catalog, ref: str) -> Lineage:
    """The lineage of a snapshot, as ``Catalog.lineage`` documents it."""
    record = refs.resolve(catalog, ref)
    with catalog.database.reading() as connection:
        known = _related(connection, record.id)
    if record.id not in known:  # a take that goes on, or a record that was deleted just now
        if record.status != "pending":
            msg = f"the record of snapshot {record.id[:_SHOWN_DIGITS]} is gone: it was deleted meanwhile"
            raise RefNotFoundError(msg)
        known[record.id] = Relative(record.id, record.parent, record.name, record.step, record.project, record.status, record.created_at)
    chain = _chain(known, record.id)
    children = _children(known, chain)
    order = _in_order(chain[-1].id, children)
    relatives = tuple(chain[:-1]) + tuple(known[snapshot_id] for snapshot_id in order)
    return Lineage(record.id, relatives, _drawn(relatives, len(chain) - 1, children))


def _related(connection: sa.Connection, snapshot_id: str) -> dict[str, Relative]:
    """All ancestors and descendants that have a record, the snapshot among them, by id, older ones first."""
    table = schema.records
    columns = [table.c.seq, table.c.id, table.c.parent]
    own = sa.select(*columns).where(table.c.id == snapshot_id)
    # UNION leaves out what was found before, so a circle ends.
    up = own.cte("up", recursive=True)
    up = up.union(sa.select(*columns).join(up, table.c.id == up.c.parent))
    down = own.cte("down", recursive=True)
    down = down.union(sa.select(*columns).join(down, table.c.parent == down.c.id))
    related = sa.union(sa.select(up.c.seq), sa.select(down.c.seq)).subquery()
    wanted = [table.c[name] for name in ("id", "parent", "name", "step", "project", "status", "created_at")]
    query = sa.select(*wanted).join(related, related.c.seq == table.c.seq).order_by(table.c.ordered_at, table.c.seq)
    return {
        row.id: Relative(row.id, row.parent, row.name, row.step, row.project, row.status, time_of(row.created_at))
        for row in connection.execute(query)
    }


def _chain(known: Mapping[str, Relative], snapshot_id: str) -> list[Relative]:
    """The snapshot after all that it came from."""
    chain = [known[snapshot_id]]
    seen = {snapshot_id}
    while (parent := chain[-1].parent) is not None and parent not in seen:
        seen.add(parent)
        chain.append(known.get(parent, Relative(parent)))
    return chain[::-1]


def _children(known: Mapping[str, Relative], chain: Sequence[Relative]) -> dict[str, list[str]]:
    """The children of each, older ones first; those of ancestors are not asked for."""
    above = {relative.id for relative in chain}
    children: dict[str, list[str]] = {}
    for relative in known.values():
        if relative.id not in above and relative.parent is not None:
            children.setdefault(relative.parent, []).append(relative.id)
    return children


def _sizes(root: str, children: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many there are below each, itself counted."""
    order = [root]
    for snapshot_id in order:  # grows as it goes
        order += children.get(snapshot_id, ())
    sizes: dict[str, int] = {}
    for snapshot_id in reversed(order):
        sizes[snapshot_id] = 1 + sum(sizes[child] for child in children.get(snapshot_id, ()))
    return sizes


def _in_order(root: str, children: dict[str, list[str]]) -> list[str]:
    """All below a snapshot, itself first, branch by branch; the largest branch of each comes last, as the way that goes on."""
    sizes = _sizes(root, children)
    order = []
    waiting = [root]
    while waiting:
        order.append(waiting.pop())
        branches = children.get(order[-1], [])
        if len(branches) > 1:
            largest = max(reversed(branches), key=sizes.__getitem__)
            branches.remove(largest)
            branches.append(largest)
        waiting += reversed(branches)
    return order


def _drawn(relatives: Sequence[Relative], position: int, children: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """One line for each. The way that goes on stays in its column, so that even a long chain with many branches is not wide."""
    before: dict[str, str] = {}  # what stands left of a branch, and of all that goes on from it
    branches: set[str] = set()
    lines = []
    for number, relative in enumerate(relatives):
        margin = before.get(relative.id, "")
        if number >= position:
            *sides, last = children.get(relative.id, ("",))
            before |= dict.fromkeys(sides, f"{margin}│ ") | {last: margin}
            branches.update(sides)
        mark = "●" if number == position else "○"
        lines.append(f"{margin[:-2]}├─{mark} {relative}" if relative.id in branches else f"{margin}{mark} {relative}")
    return tuple(lines)
