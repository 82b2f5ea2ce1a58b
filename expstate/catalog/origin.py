"""Where a take comes from and where it is recorded: what ``Snapshot.take`` and ``copy`` hand to provenance and catalog.

Nothing here imports SQLAlchemy before a record is entered.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, Union

import msgspec

from expstate.catalog import model, running
from expstate.catalog.provenance import Gathering, current_project, current_user, redact
from expstate.catalog.recorder import recorder
from expstate.engine import annotate
from expstate.engine.request import globs
from expstate.errors import ExpstateError, InvalidMetadataError, ProvenanceWarning
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.state.paths import printable

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.recorder import Recorder
    from expstate.catalog.running import Pending
    from expstate.format.manifest import Manifest, Metadata
    from expstate.storage.base import Storage

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
    InvalidArgumentError, InvalidMetadataError
        If one of them is not what it should be.

    Warns
    -----
    ProvenanceWarning
        If something was replaced.
    """

    def __init__(
        self, catalog: CatalogOption, replicated: Sequence[str] | None, note: str | None, params: Mapping[str, Any] | None
    ) -> None:
        self._recorder = recorder(catalog)
        given = () if replicated is None else globs(replicated, "replicated")
        if any(map(names.has_lone_surrogates, given)):
            msg = "replicated must not hold lone surrogates"
            raise InvalidMetadataError(msg)
        self._gathering = Gathering({} if replicated is None else {"replicated": list(given)})
        self.note, self.params = _without_secrets(note, params)

    def gather(self) -> None:
        """Begin to look around, in the background."""
        self._gathering.start()
        if self._recorder is not None:
            self._recorder.prepare()

    def note_busy(self, facts: Mapping[str, Any]) -> None:
        """Record what happened because earlier takes had not ended; nothing if nothing did."""
        if facts:
            self._gathering.add("busy", facts)

    def provenance(self) -> dict[str, Any]:
        """What was found; waits for it if need be."""
        return self._gathering.result()

    def goes_on(self, pending: Pending, metadata: Metadata) -> None:
        """Let refs of this process find a take that goes on in the background, until it ends."""
        if self._recorder is not None:
            running.enter(pending, metadata, self._recorder.place, self._gathering.project)

    def record(self, url: str, manifest: Manifest, data: bytes) -> None:
        """Tell the catalog of the committed snapshot; never raises."""
        if self._recorder is not None:
            found = model.describe(manifest, manifests.digest_of(data), redact.url(url))
            # The manifest may not say whose it is; the catalog has to know, to find it and to let others' records alone.
            project, user = found.project or self._gathering.project(), found.user or current_user()
            self._recorder.record(msgspec.structs.replace(found, project=project, user=user))


def record_copy(known_to: Recorder, storage: Storage, manifest: Manifest, data: bytes) -> None:
    """Tell the catalog of another place of a snapshot; never raises.

    Parameters
    ----------
    known_to : Recorder
        The catalog's.
    storage : Storage
        The copy's folder.
    manifest, data : Manifest, bytes
        The copy's manifest, decoded and as it is.
    """
    annotations = None
    with contextlib.suppress(ExpstateError, OSError):  # what cannot be read was copied as it is
        annotations = annotate.read(storage, manifest.id)
    found = model.describe(manifest, manifests.digest_of(data), redact.url(storage.url), annotations)
    project, user = found.project or current_project(), found.user or current_user()
    known_to.record(msgspec.structs.replace(found, project=project, user=user), taken_now=False)


def _without_secrets(note: str | None, params: Mapping[str, Any] | None) -> tuple[str | None, Mapping[str, Any] | None]:
    """Note and params as they may be recorded; what is no text or dict is left to those who check it."""
    replaced: list[str] = []
    if isinstance(note, str):
        shown = redact.text(note)
        if shown != note:
            note = shown
            replaced.append("the note")
    if params is not None and hasattr(params, "items"):
        try:
            params, names = redact.params(params)
        except RecursionError:
            msg = "a param cannot be recorded: it is nested too deeply, or holds itself"
            raise InvalidMetadataError(msg) from None
        replaced += [f"param {printable(name)!r}" for name in names]
    if replaced:
        warnings.warn(
            f"{', '.join(replaced)}: looks like a secret, or holds a URL with one; only a hash, or the URL without user info and query, "
            "was recorded",
            ProvenanceWarning,
            stacklevel=4,
        )
    return note, params
