"""What restore and verify give back: frozen records that a person can read."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expstate.state import paths

if TYPE_CHECKING:
    from expstate.engine.read import Damage


def bytes_text(nbytes: int) -> str:
    """A size for people.

    >>> bytes_text(999), bytes_text(91 * 2**20)
    ('999 B', '91 MiB')
    """
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":  # noqa: PLR2004 - the next unit
            return f"{nbytes} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"  # noqa: PLR2004
        size /= 1024
    return ""


def size_text(nbytes: int, nbytes_written: int) -> str:
    """The size of a snapshot, and what its take wrote where that is less: the rest lies in files of earlier snapshots.

    >>> size_text(91 * 2**20, 91 * 2**20 + 4096), size_text(91 * 2**20, 4096)
    ('91 MiB', '91 MiB, 4 KiB of it written')
    """
    more = f", {bytes_text(nbytes_written)} of it written" if nbytes_written < nbytes else ""
    return bytes_text(nbytes) + more


def freed_text(nbytes: int, nbytes_freed: int | None) -> str:
    """The size of snapshots that go, and what gets free where that is less: others share the rest.

    >>> freed_text(91 * 2**20, 91 * 2**20 + 5000), freed_text(91 * 2**20, 4096)
    ('91 MiB', '91 MiB, of which 4 KiB get free')
    """
    more = f", of which {bytes_text(nbytes_freed)} get free" if nbytes_freed is not None and nbytes_freed < nbytes else ""
    return bytes_text(nbytes) + more


def counted(count: int, what: str) -> str:
    """So many of something.

    >>> counted(1, "snapshot"), counted(1200, "snapshot"), counted(2, "entry")
    ('1 snapshot', '1,200 snapshots', '2 entries')
    """
    if count != 1:
        what = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{count:,} {what}"


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did, or with ``dry_run=True`` would do.

    Attributes
    ----------
    keys : tuple of str
        Keys that were restored.
    restored : tuple of str
        Entry paths of tensors, arrays, values and objects that were put back.
    missing : tuple of str
        Live names that the snapshot does not have (``strict=False``).
    unexpected : tuple of str
        Entry paths that have no live counterpart and were left out (``strict=False``).
    cast : tuple of str
        Entry paths whose values were converted to another dtype (``cast=True``).
    skipped : tuple of str
        Random generators of devices that are not there.
    nbytes : int
        Bytes that were read.
    seconds : float
        Time it took.
    dry_run : bool
        Whether nothing was changed.
    """

    keys: tuple[str, ...]
    restored: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    cast: tuple[str, ...]
    skipped: tuple[str, ...]
    nbytes: int
    seconds: float
    dry_run: bool

    def __str__(self) -> str:
        verb = "would restore" if self.dry_run else "restored"
        text = f"{verb} {len(self.restored):,} entries ({bytes_text(self.nbytes)}) of {', '.join(map(paths.printable, self.keys))}"
        for what in ("missing", "unexpected", "cast", "skipped"):
            names = [paths.printable(name) for name in getattr(self, what)]
            if names:
                text += f"; {what}: {', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}"  # noqa: PLR2004
        return text

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found.

    Attributes
    ----------
    ok : bool
        Whether every byte is as it was taken.
    damages : tuple of Damage
        Each damaged block, header or file.
    unknown_files : tuple of str
        Files in the folder that are not the snapshot's; harmless.
    nbytes : int
        Bytes that were read.
    seconds : float
        Time it took.
    """

    ok: bool
    damages: tuple[Damage, ...]
    unknown_files: tuple[str, ...]
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        if self.ok:
            return f"whole: {bytes_text(self.nbytes)} read and verified"
        shown = [f"  {damage}" for damage in self.damages[:20]]
        more = [f"  ... and {len(self.damages) - 20:,} more"] if len(self.damages) > 20 else []  # noqa: PLR2004
        return "\n".join([f"damaged: {len(self.damages):,} places", *shown, *more])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
