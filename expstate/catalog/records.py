"""``Records``: what a search found, in order. Records are read from the catalog in groups, when they are looked at.

Gets the numbers of rows; hands on records, a pandas table, and tables for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from expstate.errors import RefNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import pandas as pd

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import Record

PAGE = 100
"""Records that a search reads at once."""
_GROUP = 500
_SHOWN = 20


class Records(Sequence["Record"]):
    """What a search found; it does not change.

    The first hundred records are read by the search itself. The others are found when one of them, or the length, is first asked for,
    and read in groups. Iterating leaves out records that were deleted since, and so does ``to_pandas``.

    Parameters
    ----------
    catalog : Catalog
        Where they are.
    rows : sequence of int
        The numbers of their rows, or of the first of them.
    loaded : iterable of Record
        Those of them that were read already, from the first on.
    rest : callable, optional
        Gives the numbers of the other rows.

    Examples
    --------
    >>> import tempfile, torch
    >>> from expstate import Catalog, Snapshot
    >>> folder = tempfile.TemporaryDirectory()
    >>> catalog = Catalog(f"{folder.name}/catalog.db")
    >>> for step in range(3):
    ...     snapshot = Snapshot.take(
    ...         f"{folder.name}/{step}", {"model": torch.nn.Linear(2, 1)}, step=step, metrics={"loss": 0.5**step}, catalog=catalog
    ...     )
    >>> found = catalog.search("loss < 0.9", sort="loss")
    >>> len(found), [record.step for record in found[:1]]
    (2, [2])
    >>> found.to_pandas()[["step", "metric.loss"]].values.tolist()
    [[2, 0.25], [1, 0.5]]
    >>> catalog.close()
    >>> folder.cleanup()
    """

    def __init__(
        self, catalog: Catalog, rows: Sequence[int], loaded: Iterable[Record] = (), rest: Callable[[], list[int]] | None = None
    ) -> None:
        self._catalog = catalog
        self._rows = list(rows)
        self._rest = rest
        # One group beside the first page, so that looking at everything does not keep everything.
        self._loaded = dict(enumerate(loaded))
        self._group: dict[int, Record] = {}

    def _complete(self) -> list[int]:
        if self._rest is not None:
            self._rows = [*self._rows, *self._rest()]
            self._rest = None
        return self._rows

    @property
    def rows(self) -> Sequence[int]:
        """The numbers of all their rows, in order; for what shows many of them without reading each."""
        return self._complete()

    def __len__(self) -> int:
        return len(self._complete())

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            chosen = range(self._least(index))[index]
            records = [self._loaded[place] for place in _while_in(chosen, self._loaded)]
            return Records(self._catalog, [self._rows[place] for place in chosen], records)
        count = len(self._rows) if 0 <= index < len(self._rows) else len(self)
        if not -count <= index < count:
            msg = f"there is no record {index}, this search found {count}"
            raise IndexError(msg)
        place = index % count
        found = self._loaded.get(place) or self._group.get(place)
        if found is None:
            self._group = dict(self._read(range(place - place % _GROUP, min(place - place % _GROUP + _GROUP, len(self._rows)))))
            found = self._group.get(place)
        if found is None:
            msg = f"record {index} of this search was deleted since; search again"
            raise RefNotFoundError(msg)
        return found

    def _least(self, index: slice) -> int:
        """The length, or less of it where no more is needed to know what a slice is of."""
        forward = index.step is None or index.step > 0
        if forward and index.stop is not None and 0 <= index.stop <= len(self._rows) and (index.start is None or index.start >= 0):
            return len(self._rows)
        return len(self)

    def __iter__(self) -> Iterator[Record]:
        start = len(self._loaded)
        yield from list(self._loaded.values())
        while start < len(self._rows) or (self._rest is not None and start < len(self)):
            yield from dict(self._read(range(start, min(start + _GROUP, len(self._rows))))).values()
            start += _GROUP

    def _read(self, places: range) -> Iterator[tuple[int, Record]]:
        from expstate.catalog import rows  # noqa: PLC0415 - SQLAlchemy is imported when there is something to read

        numbers = self._rows[places.start : places.stop]
        with self._catalog.database.reading() as connection:
            there = rows.fetch_by_row(connection, numbers)
        for place, number in zip(places, numbers, strict=True):
            if number in there:
                yield place, there[number]

    def to_pandas(self) -> pd.DataFrame:
        """All of them as a table, one row each.

        Returns
        -------
        pandas.DataFrame
            A column for each field, of the same dtype whatever was found; then ``metric.loss`` and the like, and ``param.lr``. A missing
            value is NA; metrics with fractions are float64, where NaN and missing are the same. Whole numbers that do not fit 64 bits
            make a column of objects. Times are in UTC.
        """
        from expstate.catalog import frame  # noqa: PLC0415 - pandas takes 0.4 s to import

        with self._catalog.database.reading() as connection:
            return frame.frame(connection, self._complete())

    def __repr__(self) -> str:
        from expstate.catalog import shown  # noqa: PLC0415

        return shown.as_text(list(self[:_SHOWN]), len(self))

    def _repr_html_(self) -> str:
        from expstate.catalog import shown  # noqa: PLC0415

        return shown.as_html(list(self[:_SHOWN]), len(self))


def _while_in(places: range, loaded: dict[int, Record]) -> Iterator[int]:
    for place in places:
        if place not in loaded:
            return
        yield place
