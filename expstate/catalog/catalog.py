"""``Catalog``: the face of the catalog. Arguments are checked here; each topic's work is done by a module of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expstate.catalog.place import CatalogPlace, catalog_place
from expstate.errors import CatalogUnavailableError

if TYPE_CHECKING:
    import datetime as dt
    import os
    from collections.abc import Iterator

    from expstate.catalog.check import CheckReport
    from expstate.catalog.database import Database
    from expstate.catalog.keep import PrunePlan
    from expstate.catalog.lineage import Lineage
    from expstate.catalog.model import Record
    from expstate.catalog.records import Records
    from expstate.catalog.scan import ScanReport
    from expstate.catalog.status import Status
    from expstate.engine.collect import GcReport


class Catalog:
    """The database of all snapshots that were taken. Nothing is opened until something is asked of it.

    Names, aliases, ``latest``, searches and clean-up act on the current project; ``project="*"`` widens reading to all.

    Parameters
    ----------
    url : str or os.PathLike, optional
        A path or an SQLAlchemy URL, of SQLite or PostgreSQL; default by the setting ``catalog``, else the user's own file.

    Raises
    ------
    InvalidArgumentError
        If it names another kind of database.
    CatalogUnavailableError
        If the catalog is switched off by ``EXPSTATE_CATALOG=off``.

    Examples
    --------
    >>> import tempfile, torch
    >>> from expstate import Catalog, Snapshot
    >>> folder = tempfile.TemporaryDirectory()
    >>> catalog = Catalog(f"{folder.name}/catalog.db")
    >>> for step, loss in ((1, 0.9), (2, 0.1)):
    ...     snapshot = Snapshot.take(
    ...         f"{folder.name}/step-{step}", {"model": torch.nn.Linear(2, 1)}, step=step, metrics={"loss": loss}, catalog=catalog
    ...     )
    >>> [record.step for record in catalog.search("loss < 0.5")]
    [2]
    >>> catalog.alias("latest", "best").aliases
    ('best',)
    >>> Snapshot.find("best", catalog=catalog).metadata.step
    2
    >>> catalog.close()
    >>> folder.cleanup()
    """

    def __init__(self, url: str | os.PathLike[str] | None = None) -> None:
        place = catalog_place(url)
        if place is None:
            msg = "the catalog is switched off: EXPSTATE_CATALOG is 'off'; name one by Catalog(path)"
            raise CatalogUnavailableError(msg)
        self.place: CatalogPlace = place
        self._database: Database | None = None

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        return self.place.shown

    @property
    def database(self) -> Database:
        """The open database; for the modules of the catalog.

        Raises
        ------
        CatalogError
            If it cannot be opened.
        """
        # Without a lock, which a child that is forked meanwhile might wait for without end. Where two threads open it, both have one.
        database = self._database
        if database is None:
            from expstate.catalog.database import Database  # noqa: PLC0415 - SQLAlchemy takes 0.3 s to import

            database = self._database = Database(self.place)
        return database

    def close(self) -> None:
        """Let go of the database; it is opened again when something is asked."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    # Finding

    def search(self, query: str | None = None, *, project: str | None = None, sort: str | None = None, limit: int | None = None) -> Records:
        """Records that fulfil a query.

        Parameters
        ----------
        query : str, optional
            Such as ``'loss < 0.2 and (tag = ablation or not pinned) and size > 1GB and age < 7d and name ~ "resnet"'``.
        project : str, optional
            Another project than the current one; ``"*"`` for all.
        sort : str, optional
            A field, metric or param, with ``:asc`` (default) or ``:desc``; missing values and NaN come last. Default newest first.
        limit : int, optional
            Most records.

        Raises
        ------
        InvalidQueryError
            If query or sort cannot be understood; the message points at the place.
        CatalogError
            If the catalog cannot be read.
        """
        from expstate.catalog import query as queries  # noqa: PLC0415

        return queries.search(self, query, project=project, sort=sort, limit=limit)

    def __getitem__(self, ref: str) -> Record:
        from expstate.catalog import refs  # noqa: PLC0415

        return refs.resolve(self, ref)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.search())

    def __len__(self) -> int:
        return len(self.search())

    def lineage(self, ref: str) -> Lineage:
        """The snapshots that one came from, and those that came from it, as a tree.

        Raises
        ------
        RefNotFoundError
            If no snapshot goes by the ref.
        """
        from expstate.catalog import lineage  # noqa: PLC0415

        return lineage.lineage(self, ref)

    def packages(self, ref: str) -> dict[str, str]:
        """The Python packages and versions that a snapshot was taken with."""
        from expstate.catalog import refs  # noqa: PLC0415

        return refs.packages(self, ref)

    # What people add

    def tag(self, ref: str, *tags: str) -> Record:
        """Add tags.

        Returns
        -------
        Record
            As it is now.

        Raises
        ------
        InvalidNameError
            If a tag has characters that refs cannot carry.
        RefNotFoundError
            If no snapshot goes by the ref.
        """
        from expstate.catalog import edits  # noqa: PLC0415

        return edits.tag(self, ref, tags)

    def untag(self, ref: str, *tags: str) -> Record:
        """Take tags away; those that it does not have are ignored."""
        from expstate.catalog import edits  # noqa: PLC0415

        return edits.untag(self, ref, tags)

    def alias(self, ref: str, alias: str) -> Record:
        """Give it an alias; another snapshot of the project that had it loses it."""
        from expstate.catalog import edits  # noqa: PLC0415

        return edits.alias(self, ref, alias)

    def unalias(self, alias: str) -> Record:
        """Take an alias away from the snapshot of the project that has it."""
        from expstate.catalog import edits  # noqa: PLC0415

        return edits.unalias(self, alias)

    def pin(self, ref: str) -> Record:
        """Protect it from deletion."""
        from expstate.catalog import edits  # noqa: PLC0415

        return edits.pin(self, ref)

    def unpin(self, ref: str) -> Record:
        """End the protection."""
        from expstate.catalog import edits  # noqa: PLC0415

        return edits.unpin(self, ref)

    def note(self, ref: str, text: str | None) -> Record:
        """Put a note in the place of the one it has; None or an empty text takes it away."""
        from expstate.catalog import edits  # noqa: PLC0415

        return edits.note(self, ref, text)

    def log_metric(self, ref: str, name: str, value: Any) -> Record:
        """Record a value that was measured after the take; an earlier one of that name is replaced.

        Parameters
        ----------
        ref : str
            The snapshot.
        name : str
            The metric's.
        value : int, float, 0-d tensor or NumPy scalar
            What was measured.

        Raises
        ------
        InvalidMetadataError
            If it is no number.
        """
        from expstate.catalog import edits  # noqa: PLC0415

        return edits.log_metric(self, ref, name, value)

    # Keeping

    def delete(self, ref: str, *, force: bool = False, project: str | None = None, any_user: bool = False, dry_run: bool = False) -> Record:
        """Delete a snapshot everywhere that this catalog knows it, and its record.

        Parameters
        ----------
        ref : str
            The snapshot.
        force : bool, default False
            Delete it though it is pinned or has an alias.
        project : str, optional
            The project, if it is not the current one.
        any_user : bool, default False
            Delete it though someone else took it.
        dry_run : bool, default False
            Only see whether it may be deleted.

        Returns
        -------
        Record
            As it was.

        Raises
        ------
        SnapshotPinnedError
            If it is pinned or has an alias.
        """
        from expstate.catalog import keep  # noqa: PLC0415

        return keep.delete(self, ref, force=force, project=project, any_user=any_user, dry_run=dry_run)

    def prune(
        self,
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
        """Plan which snapshots may go; ``plan.apply()`` deletes them.

        Parameters
        ----------
        keep_last : int, optional
            The newest so many stay.
        keep_best : (str, str, int), optional
            Metric, ``"min"`` or ``"max"``, and how many of the best stay. A missing value or NaN is never among the best.
        keep_every : int, optional
            Those whose step is a multiple stay.
        older_than : str or datetime.timedelta, optional
            Younger ones stay; ``"7d"``.
        keep_tagged : bool, default True
            Those with a tag stay.
        project : str, optional
            The project, if it is not the current one.
        any_user : bool, default False
            Those of other users may go too.
        force : bool, default False
            Pinned and aliased ones may go too.

        Raises
        ------
        InvalidArgumentError
            If no rule is given, or one makes no sense.
        """
        from expstate.catalog import keep  # noqa: PLC0415

        return keep.plan(
            self,
            keep_last=keep_last,
            keep_best=keep_best,
            keep_every=keep_every,
            older_than=older_than,
            keep_tagged=keep_tagged,
            project=project,
            any_user=any_user,
            force=force,
        )

    def gc(self, *, dry_run: bool = False, project: str | None = None) -> GcReport:
        """Remove what dead takes and interrupted deletions left in the folders of the project's snapshots."""
        from expstate.catalog import keep  # noqa: PLC0415

        return keep.gc(self, dry_run=dry_run, project=project)

    def check(self, *, deep: bool = False, project: str | None = None) -> CheckReport:
        """Compare records and snapshots: each record has its snapshot, each snapshot its record, and sizes are right.

        Parameters
        ----------
        deep : bool, default False
            Read every byte and compare it with its digest.
        """
        from expstate.catalog import check  # noqa: PLC0415

        return check.check(self, deep=deep, project=project)

    def scan(self, url: str | os.PathLike[str] | None = None, *, storage_options: dict[str, Any] | None = None) -> ScanReport:
        """Enter the snapshots that are found below a folder, or in all folders that takes went to.

        A catalog that is damaged is put aside first, and built anew.

        Parameters
        ----------
        url : str or os.PathLike, optional
            A folder; searched with all below it. Default every folder that a take of this user went to.
        storage_options : dict, optional
            What the storage needs to connect.
        """
        from expstate.catalog import scan  # noqa: PLC0415

        return scan.scan(self, url, storage_options=storage_options)

    def status(self) -> Status:
        """What the catalog holds, which records wait to be entered, and which takes and deletions are not finished.

        Returns
        -------
        Status
            Also of a catalog that cannot be opened: then it says why.
        """
        from expstate.catalog import status  # noqa: PLC0415

        return status.status(self)

    def __repr__(self) -> str:
        return f"Catalog({self.url!r})"
