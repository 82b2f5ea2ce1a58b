"""The check: records, snapshots and the database compared with each other, and for each difference what mends it.

Gets a catalog, changes nothing. Every record of a project has its snapshot, every snapshot in the folders that are known its record, files
have the sizes that the manifests say; on request every byte is read.
"""

from __future__ import annotations

import html
import shlex
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from expstate.catalog import database as databases
from expstate.catalog import folders, mending, rows, status
from expstate.catalog.provenance import current_project
from expstate.engine import memory, verify
from expstate.engine.report import bytes_text, counted
from expstate.engine.source import SnapshotSource
from expstate.errors import CatalogCorruptError, ExpstateError
from expstate.format import annotations as added
from expstate.state import paths

if TYPE_CHECKING:
    from expstate.catalog.catalog import Catalog
    from expstate.catalog.folders import Found, Problem
    from expstate.catalog.model import Location, Record
    from expstate.format.annotations import Annotations
    from expstate.storage.base import Storage

_SHOWN = 50


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes
    ----------
    what : str
        ``catalog``, ``record``, ``snapshot``, ``file`` or ``annotations``.
    name : str
        An id, or a path.
    problem : str
        What is wrong.
    mend : str
        What to do; a command where one does it.
    """

    what: str
    name: str
    problem: str
    mend: str

    def __str__(self) -> str:
        return paths.printable(f"{self.what} {self.name}: {self.problem}\n    {self.mend}".replace("\n    ", "\0")).replace("%00", "\n    ")


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found.

    Attributes
    ----------
    findings : tuple of Finding
        All that is wrong.
    project : str
        Whose records were looked at; ``*`` for all.
    records, snapshots : int
        Records, and snapshots that were found for them.
    replaced, elsewhere : int
        Records whose place was taken by a later snapshot, and of snapshots on disks of other machines: neither can be looked at.
    nbytes : int
        Bytes that were read and compared with their digests.
    seconds : float
        Time it took.
    """

    findings: tuple[Finding, ...]
    project: str
    records: int
    snapshots: int
    replaced: int
    elsewhere: int
    nbytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether all is as it should be."""
        return not self.findings

    def __str__(self) -> str:
        more = "".join(f", {count:,} {what}" for what in ("replaced", "elsewhere") if (count := getattr(self, what)))
        read = f", {bytes_text(self.nbytes)} read and verified" if self.nbytes else ""
        looked = f"{counted(self.records, 'record')}, {counted(self.snapshots, 'snapshot')}{more}{read}"
        if self.ok:
            return f"all is well: {looked}"
        shown = [f"  {finding}" for finding in self.findings[:_SHOWN]]
        left = [f"  ... and {len(self.findings) - _SHOWN:,} more"] if len(self.findings) > _SHOWN else []
        return "\n".join([f"{counted(len(self.findings), 'problem')}: {looked}", *shown, *left])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return {"ok": self.ok, **found}


def check(catalog: Catalog, *, deep: bool = False, project: str | None = None) -> CheckReport:
    """Compare records and snapshots; as ``Catalog.check`` documents it.

    Parameters
    ----------
    project : str, optional
        Another project than the current one; ``"*"`` for all.

    Returns
    -------
    CheckReport
        Also of a damaged catalog, of which nothing else can be told then.

    Raises
    ------
    CatalogError
        If the catalog cannot be read now.
    """
    checking = _Check(catalog, current_project() if project is None else project, deep=deep)
    damage = databases.find_damage(catalog.place)
    if damage is None:
        try:
            checking.run()
        except CatalogCorruptError as error:
            damage = str(error)
    if damage is not None:
        checking.find("catalog", catalog.url, damage, "expstate scan")
    return checking.report()


class _Check:
    """One check: what it has come across so far."""

    def __init__(self, catalog: Catalog, project: str, *, deep: bool) -> None:
        self._catalog = catalog
        self._project = project
        self._deep = deep
        self._begun = time.perf_counter()
        self._findings: list[Finding] = []
        self._records = self._snapshots = self._replaced = self._elsewhere = 0
        self._nbytes = 0
        self._seen: set[str] = set()

    def find(self, what: str, name: str, problem: str, mend: str) -> None:
        self._findings.append(Finding(what, name, problem.removeprefix(f"{name!r}: ").removeprefix(f"the catalog {name!r} "), mend))

    def report(self) -> CheckReport:
        return CheckReport(
            findings=tuple(self._findings),
            project=self._project,
            records=self._records,
            snapshots=self._snapshots,
            replaced=self._replaced,
            elsewhere=self._elsewhere,
            nbytes=self._nbytes,
            seconds=time.perf_counter() - self._begun,
        )

    def run(self) -> None:
        with self._catalog.database.reading() as connection:
            groups = list(mending.numbers(connection, None if self._project == "*" else self._project))
        for group in groups:
            with self._catalog.database.reading() as connection:
                wrong = mending.disagreements(connection, group)
                ids = mending.ids(connection, list(wrong))
                records = rows.fetch(connection, [seq for seq in group if not wrong.get(seq, "").startswith(mending.UNREADABLE)])
            self._records += len(group)
            for seq, problem in wrong.items():
                self.find("record", ids.get(seq, str(seq)), f"it is not found as it was recorded: {problem}", "expstate scan")
            for record in records:
                self._check_record(record)
        for storage in folders.near_roots(self._catalog.place, self._unreadable):
            if storage.url not in self._seen:
                self._check_recorded(storage)

    def _unreadable(self, problem: Problem) -> None:
        if problem.path not in self._seen:
            self._seen.add(problem.path)
            self.find("snapshot", problem.path, problem.reason, "put it back from a copy, or remove it")

    # A record and its snapshot

    def _check_record(self, record: Record) -> None:
        found = False
        reachable = [location for location in record.locations if folders.is_reachable(location, record.id)]
        for location in reachable:
            found |= self._check_location(record, location)
        if found:
            self._snapshots += 1
        elif len(reachable) < len(record.locations):
            self._elsewhere += 1
        elif record.status == "replaced":
            self._replaced += 1
        elif record.status == "missing":
            mend = f"expstate scan FOLDER, if it was moved to one; expstate delete {record.id}, if it is gone"
            self.find("record", record.id, f"no snapshot is at {record.url!r}", mend)

    def _check_location(self, record: Record, location: Location) -> bool:
        """Whether the snapshot is there; what is wrong with it is found."""
        problems: list[Problem] = []
        try:
            storage = folders.open_location(location.url)
        except ExpstateError as error:
            self._seen.add(location.url)
            self.find("record", record.id, f"its place cannot be opened: {error}", "mend what the message names")
            return False
        there = folders.look(storage, problems.append)
        for problem in problems:
            self.find("snapshot", problem.path, problem.reason, "put it back from a copy, or remove it")
        if problems or location.status == "present" or (there is not None and there.data.id == record.id):
            self._seen.add(location.url)  # else what is there now may be recorded nowhere
        if there is None and problems:
            return True  # in pieces, but there
        if there is None or there.data.id != record.id:
            if there is None and _is_half_deleted(storage, record):
                self.find("record", record.id, f"its deletion at {location.url!r} was interrupted", "expstate gc --yes")
            elif location.status == "present":
                what = "no snapshot is there" if there is None else f"another snapshot, {there.data.id[:8]}, is there"
                self.find("record", record.id, f"{what}: {location.url!r}", "expstate scan")
            return False
        if there.data.digest != location.digest:
            self.find("record", record.id, f"its manifest was changed at {location.url!r}", f"expstate scan {shlex.quote(location.url)}")
        elif location.status != "present":
            self.find("record", record.id, f"the catalog does not know that it is at {location.url!r}", "expstate scan")
        self._check_annotations(record, there)
        self._check_files(there)
        return True

    def _check_annotations(self, record: Record, there: Found) -> None:
        with self._catalog.database.reading() as connection:
            known = mending.annotations_of(connection, record.id)
        if there.data.annotations is not None and _is_news(there.data.annotations, known):
            url = there.storage.url
            self.find("annotations", url, "the catalog does not know all of them", f"expstate scan {shlex.quote(url)}")

    # A snapshot and its record

    def _check_recorded(self, storage: Storage) -> None:
        there = folders.look(storage, self._unreadable)
        if there is None or self._project not in {"*", there.data.project or self._project}:
            return
        with self._catalog.database.reading() as connection:
            if mending.is_known(connection, there.data):
                return  # of a record that cannot be read, or has another project
        self._snapshots += 1
        self.find("snapshot", storage.url, "it is not recorded here", f"expstate scan {shlex.quote(storage.url)}")
        self._check_files(there)

    # A snapshot and its files

    def _check_files(self, there: Found) -> None:
        before = len(self._findings)
        try:
            sizes = {info.name: info.size for info in there.storage.list()}
        except (ExpstateError, OSError) as error:
            self.find("snapshot", there.storage.url, str(error), "mend what the message names")
            return
        mend = "put it back from a copy, or delete the snapshot"
        for record in there.manifest.files:
            name = f"{there.storage.url}/{record.name}"
            if record.name not in sizes:
                self.find("file", name, "it is missing", mend)
            elif sizes[record.name] != record.size:
                self.find("file", name, f"it has {sizes[record.name]:,} bytes and should have {record.size:,}", mend)
        if self._deep and before == len(self._findings):
            self._read_all(there, mend)

    def _read_all(self, there: Found, mend: str) -> None:
        url = there.storage.url
        try:
            report = verify.verify(
                SnapshotSource(there.storage, there.manifest, there.raw), budget=memory.budget_bytes(None), progress=False
            )
        except (ExpstateError, OSError) as error:
            self.find("snapshot", url, str(error), mend)
            return
        self._nbytes += report.nbytes
        for damage in report.damages:
            self.find("file", f"{url}/{damage.file}", str(damage), mend)


def _is_half_deleted(storage: Storage, record: Record) -> bool:
    """Whether a process died while it deleted this snapshot."""
    found = status.unfinished_in(iter([storage]))
    return any(one.action == "delete" and one.id == record.id and not one.alive for one in found)


def _is_news(found: Annotations, known: Annotations | None) -> bool:
    return known is None or added.merge(known, found) != known
