"""Where a take comes from and where it is recorded: what ``Snapshot.take`` hands to provenance and catalog.

Nothing here imports SQLAlchemy before a record is entered.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Union

from expstate.catalog import model
from expstate.catalog.provenance import Gathering
from expstate.catalog.recorder import recorder
from expstate.engine.request import globs
from expstate.format import manifest as manifests

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.format.manifest import Manifest

CatalogOption = Union["Catalog", str, "os.PathLike[str]", bool, None]
"""What ``catalog=`` of a take may be; of the booleans only False."""


class Origin:
    """Provenance and record of one take.

    Parameters
    ----------
    catalog : Catalog, str, os.PathLike, False or None
        Where to record it.
    replicated : sequence of str, optional
        Globs that the caller gave; recorded.
    note, params : str, dict, optional
        As the caller gave them; what looks like a secret is replaced.

    Raises
    ------
    InvalidArgumentError
        If one of them is not what it should be.
    """

    def __init__(
        self, catalog: CatalogOption, replicated: Sequence[str] | None, note: str | None, params: Mapping[str, Any] | None
    ) -> None:
        self._recorder = recorder(catalog)
        self._gathering = Gathering({} if replicated is None else {"replicated": list(globs(replicated, "replicated"))})
        self.note = note
        self.params = params

    def gather(self) -> None:
        """Begin to look around, in the background."""
        self._gathering.start()
        if self._recorder is not None:
            self._recorder.prepare()

    def provenance(self) -> dict[str, Any]:
        """What was found; waits for it if need be."""
        return self._gathering.result()

    def record(self, url: str, manifest: Manifest, data: bytes) -> None:
        """Tell the catalog of the committed snapshot; never raises."""
        if self._recorder is not None:
            self._recorder.record(model.describe(manifest, manifests.digest_of(data), url))
