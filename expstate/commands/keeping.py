"""The verbs that throw away and look after: delete, prune, gc, verify, check, scan, status.

What would remove data shows what would go, and does it with ``--yes`` alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.catalog.space import nbytes_unique
from expstate.commands.plain import plain
from expstate.commands.texts import joined, value_text
from expstate.commands.verb import REF, YES, Verb, argument, command_line, title
from expstate.commands.view import Column
from expstate.engine import collect
from expstate.engine.report import bytes_text, counted, freed_text
from expstate.errors import ExpstateError, InvalidArgumentError, SnapshotCorruptError, SnapshotNotFoundError
from expstate.storage import registry
from expstate.storage.local import LocalStorage

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from expstate.catalog.check import CheckReport
    from expstate.catalog.model import Record
    from expstate.catalog.prune import PrunePlan, PruneReport
    from expstate.catalog.scan import ScanReport
    from expstate.catalog.status import Status
    from expstate.commands.verb import Session
    from expstate.commands.view import View
    from expstate.engine.collect import GcReport
    from expstate.engine.report import VerifyReport
    from expstate.snapshot import Snapshot

_RECORD = (Column("name"), Column("id"), Column("step", is_number=True), Column("size", is_number=True))
_FORCE = argument("--force", action="store_true", help="also what is pinned or has an alias")
_ANY_USER = argument("--any-user", action="store_true", help="also what others took")


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed, or would be.

    Attributes
    ----------
    what : Any
        The records, plan or report of the library.
    done : bool
        Whether it was done.
    command : str or None
        The command that does it.
    nbytes_freed : int or None
        Bytes on storage that get free, of records; plans and reports say it themselves.
    """

    what: Any
    done: bool
    command: str | None
    nbytes_freed: int | None = None


def _removal_data(name: str) -> Callable[[Removal, argparse.Namespace], Any]:
    return lambda removal, _: {"done": removal.done, "command": removal.command, name: plain(removal.what)}


def _say_how(removal: Removal, view: View) -> None:
    if not removal.done:
        view.line("nothing was removed; to do it:")
        view.line(f"  {removal.command}")


def _record_row(record: Record) -> tuple[str, str, str, str]:
    return record.name or "", record.id[:8], value_text(record.step), bytes_text(record.nbytes)


# delete


def _delete(session: Session, arguments: argparse.Namespace) -> Removal:
    options = {"force": arguments.force, "project": arguments.project, "any_user": arguments.any_user}
    # All of them are found before one goes: latest~1 is another when latest is gone.
    planned = {record.id: record for ref in arguments.refs for record in [session.catalog.delete(ref, **options, dry_run=True)]}
    freed = nbytes_unique(planned.values())
    if not arguments.yes:
        ids = list(planned)
        return Removal(tuple(planned.values()), done=False, command=_again("delete", arguments, session, refs=ids), nbytes_freed=freed)
    deleted: list[Record] = []
    for snapshot_id in planned:
        try:
            deleted.append(session.catalog.delete(snapshot_id, **options))
        except ExpstateError as error:
            if not deleted:
                raise
            msg = f"{error} ({counted(len(deleted), 'snapshot')} of {len(planned)} were deleted before it: {joined(map(title, deleted))})"
            raise type(error)(msg) from error
    return Removal(tuple(deleted), done=True, command=None, nbytes_freed=freed)


def _delete_data(removal: Removal, arguments: argparse.Namespace) -> Any:
    sizes = {"nbytes": sum(record.nbytes for record in removal.what), "nbytes_freed": removal.nbytes_freed}
    return _removal_data("records")(removal, arguments) | sizes


def _show_delete(removal: Removal, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    view.table(_RECORD, map(_record_row, removal.what))
    size = freed_text(sum(record.nbytes for record in removal.what), removal.nbytes_freed)
    view.line(f"{'deleted' if removal.done else 'would delete'} {counted(len(removal.what), 'snapshot')} ({size})")
    _say_how(removal, view)


def _again(name: str, arguments: argparse.Namespace, session: Session, **changes: Any) -> str:
    verb = next(verb for verb in VERBS if verb.name == name)
    return command_line(verb, arguments, session.program, yes=True, **changes)


# prune


def best(text: str) -> tuple[str, str, int]:
    """What ``--keep-best`` says; ``ValueError`` if it does not.

    >>> best("loss:min:3"), best("val:loss:max")
    (('loss', 'min', 3), ('val:loss', 'max', 1))
    """
    head, _, last = text.rpartition(":")
    metric, which, count = (*head.rpartition(":")[::2], int(last)) if last.isdigit() else (head, last, 1)
    if not metric or which not in {"min", "max"}:
        raise ValueError(text)
    return metric, which, count


def _prune(session: Session, arguments: argparse.Namespace) -> Removal:
    plan = session.catalog.prune(
        keep_last=arguments.keep_last,
        keep_best=None if arguments.keep_best is None else _best(arguments.keep_best),
        keep_every=arguments.keep_every,
        older_than=arguments.older_than,
        keep_tagged=not arguments.tagged,
        project=arguments.project,
        any_user=arguments.any_user,
        force=arguments.force,
    )
    if arguments.yes:
        return Removal(plan.apply(), done=True, command=None)
    return Removal(plan, done=False, command=_again("prune", arguments, session))


def _best(text: str) -> tuple[str, str, int]:
    try:
        return best(text)
    except ValueError:
        msg = f"--keep-best must be METRIC:min or METRIC:max, or one of these and how many, as loss:min:3; got {text!r}"
        raise InvalidArgumentError(msg) from None


def _show_prune(removal: Removal, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    if removal.done:
        report: PruneReport = removal.what
        rows = [(*_record_row(record), "") for record in report.deleted]
        rows += [(*_record_row(skipped.record), f"left alone: {skipped.reason}") for skipped in report.skipped]
        last = str(report).partition("\n")[0]
    else:
        plan: PrunePlan = removal.what
        rows = [(*_record_row(record), "would go") for record in plan.delete]
        rows += [(*_record_row(kept.record), f"stays: {joined(kept.reasons)}") for kept in plan.keep]
        last = str(plan).partition("\n")[0]
    if rows:
        view.table([*_RECORD, Column("")], rows)
    view.line(last)
    if removal.done or removal.what.delete:
        _say_how(removal, view)


def _left_alone(removal: Removal, arguments: argparse.Namespace) -> int:
    """1 if something was to go and did not."""
    del arguments
    return int(removal.done and bool(removal.what.skipped))


# gc


def _gc(session: Session, arguments: argparse.Namespace) -> Removal:
    if arguments.paths:
        for path in arguments.paths:
            storage = registry.open_storage(path)
            if isinstance(storage, LocalStorage) and not os.path.isdir(storage.path):  # noqa: PTH112 - as the storage has it
                msg = f"there is no folder {path!r} to look below"
                raise SnapshotNotFoundError(msg)
        report = collect.joined([collect.gc(path, dry_run=not arguments.yes) for path in arguments.paths])
    else:
        report = session.catalog.gc(dry_run=not arguments.yes, project=session.project)
    return Removal(report, done=arguments.yes, command=None if arguments.yes else _again("gc", arguments, session))


def _show_gc(removal: Removal, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    report: GcReport = removal.what
    if report.removed:
        titles = [Column("left behind by"), Column("folder"), Column("files", is_number=True), Column("size", is_number=True)]
        view.table(
            titles,
            [(f"{left.action} {left.attempt}", left.url, f"{len(left.files):,}", bytes_text(left.nbytes)) for left in report.removed],
        )
    verb = "removed" if removal.done else "would remove"
    view.line(f"{verb} {counted(sum(len(left.files) for left in report.removed), 'file')} ({bytes_text(report.nbytes)})")
    if report.uploads:
        view.line(f"ended {counted(report.uploads, 'upload')}")
    for what, found in (("may still be at work", report.alive), ("could not be read, and was left alone", report.damaged)):
        for place in found:
            view.line(f"{what}: {place}")
    if report.removed:
        _say_how(removal, view)


# verify, check, scan, status


@dataclass(frozen=True, slots=True)
class Verified:
    """A snapshot and what was found of it; why nothing was, if its manifest is damaged."""

    path: str
    report: VerifyReport | None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it is whole."""
        return self.report is not None and self.report.ok


def _verify(session: Session, arguments: argparse.Namespace) -> tuple[Verified, ...]:
    # All are found before the first is read, and one without a manifest does not keep the others from being read.
    found: list[Snapshot | Verified] = []
    for ref in arguments.refs:
        try:
            found.append(session.snapshot(ref))
        except SnapshotCorruptError as error:
            found.append(Verified(ref, None, str(error)))
    return tuple(one if isinstance(one, Verified) else _verified(one) for one in found)


def _verified(snapshot: Snapshot) -> Verified:
    try:
        return Verified(snapshot.path, snapshot.verify())
    except SnapshotCorruptError as error:
        return Verified(snapshot.path, None, str(error).removeprefix(f"{snapshot.path!r}: "))


def _show_verify(found: Iterable[Verified], view: View, arguments: argparse.Namespace) -> None:
    del arguments
    for one in found:
        if one.report is None:
            view.line(f"{one.path}: {one.problem}")
            continue
        view.text(f"{one.path}: {_all_damage(one.report)}")
        for name in one.report.unknown_files:
            view.line(f"  not of the snapshot, and harmless: {name}")


def _all_damage(report: VerifyReport) -> str:
    if report.ok:
        return str(report)
    return "\n".join([f"damaged: {counted(len(report.damages), 'place')}", *(f"  {damage}" for damage in report.damages)])


def _check(session: Session, arguments: argparse.Namespace) -> CheckReport:
    return session.catalog.check(deep=arguments.deep, project=session.project)


def _show_check(report: CheckReport, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    view.text(str(report).partition("\n")[0])
    for finding in report.findings:
        view.line(f"  {finding.what} {finding.name}: {finding.problem}")
        view.line(f"    {finding.mend}")


def _scan(session: Session, arguments: argparse.Namespace) -> ScanReport:
    return session.catalog.scan(arguments.url)


def _show_scan(report: ScanReport, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    view.text(str(report))


def _status(session: Session, arguments: argparse.Namespace) -> Status:
    del arguments
    return session.catalog.status()


def _show_status(found: Status, view: View, arguments: argparse.Namespace) -> None:
    del arguments
    view.text(str(found))


_REFS = argument("refs", nargs="+", metavar="REF", help=REF.options["help"])

VERBS = (
    Verb(
        name="delete",
        aliases=("rm",),
        library="catalog.delete",
        help="Delete snapshots wherever the catalog knows them.",
        details="Only shown until you say --yes. Their records go too.",
        example="expstate delete latest",
        arguments=(_REFS, YES, _FORCE, _ANY_USER),
        call=_delete,
        show=_show_delete,
        data=_delete_data,
    ),
    Verb(
        name="prune",
        library="catalog.prune",
        help="Delete the snapshots that no rule keeps.",
        details="Only shown until you say --yes. What is pinned, tagged or has an alias stays, and what others took. "
        "Exits with 1 if one that was to go could not be deleted.",
        example="expstate prune --keep-last 3 --keep-best loss:min:3 --older-than 30d",
        arguments=(
            argument("--keep-last", type=int, metavar="N", help="the newest so many stay"),
            argument(
                "--keep-best", metavar="METRIC:min|max[:N]", help="the best by a metric stay; a missing value or NaN is never among them"
            ),
            argument("--keep-every", type=int, metavar="N", help="those whose step is a multiple stay"),
            argument("--older-than", metavar="AGE", help="younger ones stay; such as 7d or 12h"),
            argument("--tagged", action="store_true", help="also what has a tag may go"),
            YES,
            _FORCE,
            _ANY_USER,
        ),
        call=_prune,
        show=_show_prune,
        data=_removal_data("plan"),
        status=_left_alone,
    ),
    Verb(
        name="gc",
        library="catalog.gc",
        help="Remove what takes left behind when their process died.",
        details="Only shown until you say --yes. Leftovers of copies and deletions go too; what may still be at work is left alone.",
        example="expstate gc",
        arguments=(
            argument("paths", nargs="*", metavar="PATH", help="folders to look below (default: those of the project's snapshots)"),
            YES,
        ),
        call=_gc,
        show=_show_gc,
        data=_removal_data("report"),
        widens=True,
    ),
    Verb(
        name="verify",
        library="snapshot.verify",
        help="Read snapshots and compare every byte with its digest.",
        details="Exits with 1 if there is damage.",
        example="expstate verify best",
        arguments=(_REFS,),
        call=_verify,
        show=_show_verify,
        status=lambda found, _: int(not all(one.ok for one in found)),
        widens=True,
    ),
    Verb(
        name="check",
        library="catalog.check",
        help="Compare the catalog with the snapshots that it tells of.",
        details="Each record has its snapshot, each snapshot its record, sizes are right. Says how to mend what is not; exits with 1 then.",
        example="expstate check",
        arguments=(argument("--deep", action="store_true", help="read every byte too"),),
        call=_check,
        show=_show_check,
        status=lambda report, _: int(not report.ok),
        widens=True,
    ),
    Verb(
        name="scan",
        library="catalog.scan",
        help="Enter the snapshots of a folder into the catalog.",
        details="A catalog that is damaged is put aside and built anew.",
        example="expstate scan",
        arguments=(argument("url", nargs="?", metavar="URL", help="a folder (default: every one that your takes went to)"),),
        call=_scan,
        show=_show_scan,
    ),
    Verb(
        name="status",
        library="catalog.status",
        help="Tell what the catalog holds, and what is not finished.",
        example="expstate status",
        call=_status,
        show=_show_status,
    ),
)
