"""Plans of what may go: the rules that keep a snapshot, the plan that they make, and what applying it did.

Gets rules, hands on a frozen ``PrunePlan``, which is shown and only then applied; before each removal it is looked again whether the
snapshot is still what was planned.
"""

from __future__ import annotations

import datetime as dt
import html
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import folders, removal, rows, schema, space
from expstate.catalog.model import time_of
from expstate.catalog.query import literal
from expstate.catalog.records import Records
from expstate.engine.report import bytes_text, counted, freed_text
from expstate.errors import CatalogUnavailableError, ExpstateError, InvalidArgumentError
from expstate.progress import Progress, ProgressOption, check_option
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import Record

_GROUP = 500
_SHOWN = 20
_BEST_PARTS = 3


@dataclass(frozen=True, slots=True)
class Rules:
    """What keeps a snapshot: those of ``Catalog.prune``, checked; ``older_than`` in seconds."""

    last: int | None
    best: tuple[str, str, int] | None
    every: int | None
    older_than: float | None
    tagged: bool
    force: bool
    any_user: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """A snapshot that stays, and why."""

    record: Record
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A snapshot that was to go and was left alone, and why."""

    record: Record
    reason: str


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What applying a plan did.

    Attributes
    ----------
    deleted : tuple of Record
        Snapshots that are gone.
    skipped : tuple of Skipped
        Those that were left alone: they have been pinned, tagged or changed since the plan was made, or could not be removed.
    nbytes : int
        Bytes of the snapshots that were deleted.
    nbytes_freed : int
        Bytes on storage that got free: without files that other snapshots share, and with manifests.
    seconds : float
        Time it took.
    """

    deleted: tuple[Record, ...]
    skipped: tuple[Skipped, ...]
    nbytes: int
    nbytes_freed: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"deleted {counted(len(self.deleted), 'snapshot')} ({freed_text(self.nbytes, self.nbytes_freed)})"]
        lines += [f"  left alone: {_name(skipped.record)}: {paths.printable(skipped.reason)}" for skipped in self.skipped]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        skipped = [{**_brief(skipped.record), "reason": skipped.reason} for skipped in self.skipped]
        return {"deleted": list(map(_brief, self.deleted)), "skipped": skipped, **_sizes(self), "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What a prune would delete. Nothing is touched before ``apply``.

    Attributes
    ----------
    delete : Records
        Snapshots that would go, newest first.
    keep : tuple of Kept
        The others of the project, with all reasons for each.
    project : str
        The project.
    nbytes_freed : int
        Bytes on storage that would get free, as they were when the plan was made: a file that several snapshots share counts if all of
        them would go. Manifests count too.
    """

    delete: Records
    keep: tuple[Kept, ...]
    project: str
    nbytes_freed: int
    _catalog: Catalog = field(repr=False)
    _rules: Rules = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshots that would go."""
        return sum(record.nbytes for record in self.delete)

    def apply(self, progress: ProgressOption = None) -> PruneReport:
        """Delete what is planned, one snapshot after the other; an interrupt leaves the others as they are.

        Parameters
        ----------
        progress : None, bool or callable
            As for ``Snapshot.take``; counts the bytes of the snapshots.

        Returns
        -------
        PruneReport
            What was deleted, and what was left alone.

        Raises
        ------
        CatalogUnavailableError
            If the catalog cannot be written any more; what was deleted until then is gone.
        """
        check_option(progress)
        started = time.perf_counter()
        deleted: list[Record] = []
        skipped: list[Skipped] = []
        freed = 0
        bar = Progress("prune", self.nbytes, progress)
        try:
            for record in self.delete:
                # Of files that are shared, what the last one has: those before it have left them to it.
                nbytes = record.nbytes_unique or 0
                reason = self._delete(record)
                if reason is None:
                    deleted.append(record)
                    freed += nbytes
                else:
                    skipped.append(Skipped(record, reason))
                bar.add(record.nbytes)
        finally:
            bar.close()
        nbytes = sum(record.nbytes for record in deleted)
        return PruneReport(tuple(deleted), tuple(skipped), nbytes, freed, time.perf_counter() - started)

    def _delete(self, planned: Record) -> str | None:
        """Delete one; why it was left alone instead."""
        try:
            with self._catalog.database.reading() as connection:
                seq = connection.execute(sa.select(schema.records.c.seq).where(schema.records.c.id == planned.id)).scalar()
                found = [] if seq is None else rows.fetch(connection, [seq])
            if not found:
                return "it is not recorded any more"
            objection = _objection(planned, found[0], self._rules)
            if objection is not None:
                return objection
            remains = removal.remove(self._catalog, found[0], force=self._rules.force, keep_tagged=self._rules.tagged)
        except CatalogUnavailableError:
            raise
        except (ExpstateError, OSError) as error:
            return str(error)
        return "; ".join(map(str, remains)) or None

    def __str__(self) -> str:
        size = freed_text(self.nbytes, self.nbytes_freed)
        lines = [f"would delete {counted(len(self.delete), 'snapshot')} ({size}) and keep {len(self.keep):,}"]
        lines += _lines(((record, "delete") for record in self.delete), len(self.delete))
        lines += _lines(((kept.record, f"keep: {', '.join(kept.reasons)}") for kept in self.keep), len(self.keep))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows_of = [(record, "delete", "") for record in self.delete[:_SHOWN]]
        rows_of += [(kept.record, "keep", ", ".join(kept.reasons)) for kept in self.keep[:_SHOWN]]
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(*row))}</tr>" for row in rows_of)
        head = "".join(f"<th>{name}</th>" for name in ("", "id", "name", "step", "size", "why"))
        more = len(self.delete) + len(self.keep) - len(rows_of)
        after = f"<br>and {more:,} more" if more else ""
        return f"<b>{html.escape(str(self).partition(chr(10))[0])}</b><table><tr>{head}</tr>{body}</table>{after}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        keep = [{**_brief(kept.record), "reasons": list(kept.reasons)} for kept in self.keep]
        return {"project": self.project, "delete": list(map(_brief, self.delete)), "keep": keep, **_sizes(self)}


def _brief(record: Record) -> dict[str, Any]:
    return {"id": record.id, "name": record.name, "step": record.step, "url": record.url, "nbytes": record.nbytes}


def _sizes(found: PrunePlan | PruneReport) -> dict[str, int]:
    return {"nbytes": found.nbytes, "nbytes_freed": found.nbytes_freed}


def _name(record: Record) -> str:
    name = f" {paths.printable(record.name)!r}" if record.name else ""
    return f"{record.id[:8]}{name}"


def _cells(record: Record, action: str, why: str) -> tuple[str, ...]:
    step = "" if record.step is None else str(record.step)
    return action, record.id[:8], paths.printable(record.name or ""), step, bytes_text(record.nbytes), paths.printable(why)


def _lines(items: Iterable[tuple[Record, str]], count: int) -> list[str]:
    lines = []
    for record, what in list(items)[:_SHOWN]:
        step = "" if record.step is None else f", step {record.step}"
        lines.append(f"  {_name(record)}{step}, {bytes_text(record.nbytes)}: {paths.printable(what)}")
    return [*lines, f"  ... and {count - _SHOWN:,} more"] if count > _SHOWN else lines


# Making a plan


def plan(
    catalog: Catalog,
    *,
    keep_last: int | None = None,
    keep_best: tuple[str, str, int] | None = None,
    keep_every: int | None = None,
    older_than: str | dt.timedelta | None = None,
    keep_tagged: bool = True,
    project: str | None = None,
    any_user: bool = False,
    force: bool = False,
) -> PrunePlan:
    """Plan which snapshots may go; as ``Catalog.prune`` documents it.

    Raises
    ------
    InvalidArgumentError
        If no rule is given, one makes no sense, or no snapshot has the metric.
    """
    rules = Rules(
        last=None if keep_last is None else _count("keep_last", keep_last),
        best=None if keep_best is None else _best(keep_best),
        every=None if keep_every is None else _count("keep_every", keep_every),
        older_than=None if older_than is None else _seconds(older_than),
        tagged=keep_tagged,
        force=force,
        any_user=any_user,
    )
    if (rules.last, rules.best, rules.every, rules.older_than) == (None,) * 4:
        msg = "no rule says what is to stay: give keep_last, keep_best, keep_every or older_than"
        raise InvalidArgumentError(msg)
    named = removal.one_project(project)
    numbers, records = _records(catalog, named)
    reasons: dict[str, list[str]] = {}
    candidates = []
    for record in records:
        why = _untouched(record, rules)
        if why is None:
            candidates.append(record)
        else:
            reasons[record.id] = [why]
    for record, why in _kept(candidates, rules):
        reasons.setdefault(record.id, []).append(why)
    chosen = [(seq, record) for seq, record in zip(numbers, records, strict=True) if record.id not in reasons]
    delete = Records(catalog, [seq for seq, _ in chosen], [record for _, record in chosen])
    keep = tuple(Kept(record, tuple(reasons[record.id])) for record in records if record.id in reasons)
    return PrunePlan(delete, keep, named, space.nbytes_unique(record for _, record in chosen) or 0, catalog, rules)


def _count(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"{what} must be a whole number from 1 on, got {value!r}"
        raise InvalidArgumentError(msg)
    return value


def _best(value: object) -> tuple[str, str, int]:
    if not isinstance(value, (tuple, list)) or len(value) != _BEST_PARTS:
        msg = f"keep_best must be (metric, 'min' or 'max', how many), got {value!r}"
        raise InvalidArgumentError(msg)
    metric, which, count = value
    if not isinstance(metric, str) or not metric or which not in {"min", "max"}:
        msg = f"keep_best must name a metric and 'min' or 'max', got {metric!r} and {which!r}"
        raise InvalidArgumentError(msg)
    return metric, which, _count("the count of keep_best", count)


def _seconds(value: object) -> float:
    seconds: float | None = None
    if isinstance(value, dt.timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = literal.duration(value.strip())
    if seconds is None or not 0 <= seconds < math.inf:
        msg = f"older_than must be a duration such as '7d' or '12h', got {value!r}"
        raise InvalidArgumentError(msg)
    return seconds


def _records(catalog: Catalog, project: str) -> tuple[list[int], list[Record]]:
    """The records of a project in their order, newest first."""
    table = schema.records
    query = sa.select(table.c.seq).where(table.c.project == project).order_by(table.c.ordered_at.desc(), table.c.seq.desc())
    with catalog.database.reading() as connection:
        numbers = list(connection.execute(query).scalars())
        return numbers, rows.fetch(connection, numbers)


def _untouched(record: Record, rules: Rules) -> str | None:
    """Why a record has no part in this at all: no rule counts it, and it is not removed."""
    who = None if rules.any_user else removal.taker_if_not_us(record)
    if who is not None:
        return f"taken by {who}"
    if record.status == "replaced":
        return "replaced: another snapshot is at its place"
    if not removal.present(record):
        elsewhere = sorted({location.host for location in record.locations if not folders.is_reachable(location, record.id)})
        return f"on the disk of {elsewhere[0]!r}" if elsewhere else "not found at its place: `expstate check` says why"
    return None


def _kept(candidates: Sequence[Record], rules: Rules) -> list[tuple[Record, str]]:
    """The records that a rule keeps, once for each; ``candidates`` are newest first."""
    found = [(record, f"among the newest {rules.last}") for record in candidates[: rules.last or 0]]
    if rules.best is not None:
        metric, which, count = rules.best
        found += [(record, f"among the best {count} by {metric}") for record in _best_of(candidates, metric, which)[:count]]
    if rules.every is not None:
        every = rules.every
        found += [(record, f"step {record.step}") for record in candidates if record.step is not None and record.step % every == 0]
    if rules.older_than is not None:
        now = time_of(rows.now())
        young = [record for record in candidates if (now - record.created_at).total_seconds() <= rules.older_than]
        found += [(record, "young enough") for record in young]
    for record in candidates:
        found += [(record, why) for why in _protection(record, rules)]
    return found


def _protection(record: Record, rules: Rules) -> list[str]:
    why = [] if rules.force else [*(["pinned"] if record.pinned else []), *(f"alias {alias!r}" for alias in record.aliases)]
    return why + ([f"tagged {record.tags[0]!r}"] if rules.tagged and record.tags else [])


def _best_of(candidates: Sequence[Record], metric: str, which: str) -> list[Record]:
    """Those with a value that can be compared, best first; of equal ones the newest."""
    if candidates and not any(metric in record.metrics for record in candidates):
        known = sorted({name for record in candidates for name in record.metrics})
        listed = ", ".join(map(repr, known[:10])) or "none"
        msg = f"no snapshot of the project has the metric {metric!r}, so none would count as best (there are: {listed})"
        raise InvalidArgumentError(msg)
    valid = [record for record in candidates if _is_number(record.metrics.get(metric))]
    return sorted(valid, key=lambda record: record.metrics[metric], reverse=which == "max")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _objection(planned: Record, found: Record, rules: Rules) -> str | None:
    """Why a snapshot that was to go is left alone now."""
    protection = _protection(found, rules)
    if protection:
        return f"it is {protection[0]} by now"
    return None if _as_known(planned) == _as_known(found) else "it was changed since the plan was made"


def _as_known(record: Record) -> tuple[Any, ...]:
    # As texts, because NaN is not equal to itself.
    return record.digest, record.project, record.tags, record.aliases, record.pinned, record.note, repr(record.metrics)
