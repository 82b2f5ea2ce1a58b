"""What the engine asks of a storage: one folder of files, written once, read by ranges.

Gets names relative to the snapshot's folder and bytes; hands on bytes and our errors. A backend subclasses ``Storage`` and its two
handles; ``expstate.testing`` holds the tests that every backend must pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from expstate.errors import ExpstateError


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Name, size in bytes and time of last change (seconds since 1970 by the storage's clock) of a file."""

    name: str
    size: int
    modified_at: float


class FileWriter(ABC):
    """A data file being written. ``write`` may be called from several threads at once, in any order."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``, both multiples of the storage's ``alignment`` but for the file's last bytes."""

    @abstractmethod
    def finish(self) -> Sequence[tuple[int, int]]:
        """Make the file durable at exactly the size it was created with.

        Returns
        -------
        sequence of (int, int)
            Ranges (first byte, byte after the last) that the storage may not have written though it said so; the engine reads
            them back before it commits.
        """

    @abstractmethod
    def abort(self) -> None:
        """Let go of the handle; the file may stay, incomplete. Does nothing after ``finish``."""


class FileReader(ABC):
    """A file open for reading; what it reads stays the same even if the name is replaced meanwhile. Usable from several threads.

    Attributes
    ----------
    name : str
        The name it was opened by.
    size : int
        Bytes in the file.
    alignment : int
        Reads are fastest when offset, length and address are multiples of it; 1 where it makes no difference.
    is_remote : bool
        Whether each read is a request that takes its time, so that few large ones are better than many small ones.
    """

    name: str
    size: int
    alignment: int = 1
    is_remote: bool = False

    @abstractmethod
    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``offset`` on, as far as the file goes.

        A read that ends before that is ``SnapshotCorruptError``.
        """

    def is_cached(self, offset: int, length: int) -> bool:  # noqa: ARG002 - the default of an interface
        """Whether these bytes are in memory already: ``read_cached_into`` is then faster, and needs no alignment."""
        return False

    def read_cached_into(self, offset: int, target: memoryview) -> None:
        """As ``read_into``, from memory where ``is_cached`` says that they are there."""
        self.read_into(offset, target)

    @abstractmethod
    def close(self) -> None:
        """Let go of the handle."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Storage(ABC):
    """One folder of a snapshot on some backend.

    Names are relative, their parts joined by ``/``. Errors are those of ``expstate.errors``, or ``FileNotFoundError`` and
    ``FileExistsError`` where the docstring says so.

    Attributes
    ----------
    url : str
        What a person may be shown; never holds a secret.
    alignment : int
        Offsets and lengths of ``FileWriter.write`` and preferred reads are multiples of this many bytes.
    data_file_bytes : int
        Size at which the engine begins a new data file.
    thread_count : int or None
        Threads that should read or write at once; None for as many as the settings say.
    copies : int
        How many times what is written or read is held in memory besides the buffers of the engine.
    """

    url: str
    alignment: int = 1
    data_file_bytes: int
    thread_count: int | None = None
    copies: int = 0

    @abstractmethod
    def create_file(self, name: str, size: int) -> FileWriter:
        """Begin a data file of exactly ``size`` bytes; ``FileExistsError`` if the name is taken, at the latest from ``finish``."""

    @abstractmethod
    def open_file(self, name: str, *, size: int | None = None) -> FileReader:
        """Open a file; ``FileNotFoundError`` if there is none, ``UnsafeFileError`` if it is no regular file.

        ``size`` is what ``sizes`` has just told of it, so that nobody needs to be asked again.
        """

    def sizes(self, names: Sequence[str]) -> dict[str, int]:  # noqa: ARG002 - the default of an interface
        """The sizes of those of these files that are there, where that takes less than asking for each; else nothing."""
        return {}

    @abstractmethod
    def create(self, name: str, data: bytes, *, token: str) -> None:
        """Create a small file at once, whole and durable; of several callers exactly one wins, others get ``FileExistsError``.

        A temporary file, if one is needed, has ``token`` in its name.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes, *, token: str, expected: bytes | None = None) -> None:
        """Put ``data`` in place of a small file atomically and durably.

        With ``expected`` only if the file holds exactly these bytes now, else ``FileExistsError``. ``token`` as in ``create``.
        """

    @abstractmethod
    def read(self, name: str, *, limit: int | None = None) -> bytes:
        """A whole small file; ``FileNotFoundError`` if there is none, ``ManifestTooLargeError`` if it has more than ``limit`` bytes."""

    @abstractmethod
    def stat(self, name: str) -> FileInfo:
        """Size and time of a file; ``FileNotFoundError`` if there is none."""

    @abstractmethod
    def list(self) -> Iterator[FileInfo]:
        """Every regular file of the folder and of its ``base`` folder, as the storage has it now."""

    @abstractmethod
    def delete(self, name: str, *, expected: bytes | None = None) -> None:
        """Remove a file; nothing happens if there is none.

        With ``expected`` only if the file holds exactly these bytes now, else ``FileExistsError``.
        """

    def copy_file(self, name: str, source: Storage, source_name: str) -> bool:  # noqa: ARG002 - the default of an interface
        """Have the storage itself copy a file of another folder; False if it cannot."""
        return False

    def link_file(self, name: str, source: Storage, source_name: str) -> bool:
        """Have a file of another snapshot's folder here too, without moving its bytes through this process.

        Neither is changed by what becomes of the other. On a disk it is one file with two names.

        Returns
        -------
        bool
            False if that cannot be done, or there is no such file: whoever asked has to write the bytes.

        Raises
        ------
        FileExistsError
            If the name is taken, on a disk.
        """
        try:
            return self.copy_file(name, source, source_name)
        except FileNotFoundError:
            return False

    def may_link(self, source: Storage) -> bool:
        """Whether ``link_file`` could have files of that folder, as far as can be told without asking the storage."""
        return type(self) is type(source)

    def links(self, names: Sequence[str]) -> dict[str, tuple[Hashable, int]]:  # noqa: ARG002 - the default of an interface
        """Those of these files that are in other places too: what tells one such file from others, and in how many places it is."""
        return {}

    def end_uploads(self, older_than: float) -> int:  # noqa: ARG002 - the default of an interface
        """Throw away what uploads to this folder have left that were begun before then (seconds since 1970); how many."""
        return 0

    @abstractmethod
    def clock(self) -> float:
        """Seconds since 1970 by the clock that stamps files here."""

    def prepare(self) -> bool:
        """Make the folder if need be, before any state is staged; whether this call made it."""
        return False

    def flush(self) -> None:  # noqa: B027 - object stores have nothing to do
        """Make creations and removals of names durable."""

    def remove_folder(self) -> None:  # noqa: B027 - object stores have no folders
        """Remove the folder if nothing is left in it."""

    def walk(
        self,
        *,
        depth: int | None = None,  # noqa: ARG002 - the default of an interface
        on_error: Callable[[str, ExpstateError], object] | None = None,  # noqa: ARG002 - as above
    ) -> Iterator[Storage]:
        """The folder and those below it, links not followed; only itself where a storage cannot list folders.

        Parameters
        ----------
        depth : int, optional
            How far below; 0 is this folder alone.
        on_error : callable, optional
            Told of folders that cannot be listed, which are given nevertheless.
        """
        yield self
