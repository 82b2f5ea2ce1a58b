"""Data files of earlier snapshots put into a new one without being written again: linked, or copied by the storage itself.

A file goes along only while at least half of its bytes are used: what changes again and again is soon in other files than what stays.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from expstate.engine import crew
from expstate.errors import ExpstateError
from expstate.format import names
from expstate.format.manifest import FileRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from expstate.engine.base import Bases, Held
    from expstate.format.names import FileNamer
    from expstate.storage.base import Storage

_THREADS = 8
"""Files that a server copies at once."""


def worth_linking(bases: Bases, used: Iterable[Held]) -> list[tuple[int, int]]:
    """The files, by numbers of base and file, of which these boxes are at least half."""
    spans: dict[tuple[int, int], dict[int, int]] = {}
    for held in used:
        at = spans.setdefault(held.file, {})
        at[held.box.offset] = max(held.nbytes, at.get(held.box.offset, 0))  # what lies at one place counts once
    found = []
    for (base, number), at in spans.items():
        record = bases.sources[base].manifest.files[number]
        if 2 * sum(at.values()) >= record.size - record.header_bytes:
            found.append((base, number))
    return found


class Linker:
    """Puts files of bases into a snapshot's folder.

    Parameters
    ----------
    storage : Storage
        The folder.
    namer : FileNamer
        Gives names to files.
    went_on : callable
        Is called after each file.

    Attributes
    ----------
    created : list of str
        Names of the files that were begun.
    """

    def __init__(self, storage: Storage, namer: FileNamer, went_on: Callable[[], None]) -> None:
        self._storage = storage
        self._namer = namer
        self._went_on = went_on
        self.created: list[str] = []

    def link(self, bases: Bases, files: Iterable[tuple[int, int]], stop: crew.Stop) -> dict[tuple[int, int], FileRecord]:
        """Link files, given by numbers of base and file.

        Returns
        -------
        dict
            The new records of those that could be linked; the others are gone, or the storage cannot.
        """
        linked: dict[tuple[int, int], FileRecord] = {}
        jobs = []
        for base, number in files:
            record = bases.sources[base].manifest.files[number]
            jobs.append(((base, number), record, f"base/{self._namer.name(names.stem_of(record.name))}"))

        def work(job: tuple[tuple[int, int], FileRecord, str]) -> None:
            file, record, name = job
            if self._is_linked(bases.sources[file[0]].storage, record, name):
                linked[file] = FileRecord(name, record.size, record.header_bytes, record.header_digest)
            self._went_on()

        if jobs:
            crew.run(jobs, work, min(_THREADS, len(jobs)), stop)
        return linked

    def _is_linked(self, source: Storage, record: FileRecord, name: str) -> bool:
        # Noted before it is there: an interrupt may come right after.
        self.created.append(name)
        try:
            if self._storage.link_file(name, source, record.name) and self._storage.stat(name).size == record.size:
                return True
        except FileExistsError:
            self.created.remove(name)
            return False
        except (ExpstateError, OSError):
            pass  # whatever the reason: what the file holds is in memory, and is written
        with contextlib.suppress(ExpstateError, OSError):
            self._storage.delete(name)
            self.created.remove(name)
        return False
