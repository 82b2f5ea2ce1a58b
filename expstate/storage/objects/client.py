"""What a storage of objects asks of a client: one bucket, its objects put whole or in parts, read by ranges, listed and removed.

Gets keys (``folder/name``, without the bucket) and bytes; hands on bytes and the few errors that are told apart. A client makes each
request once: it is tried again, and the time for it bounded, by ``retry``. It is used by many threads at once, in one process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from expstate.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Buffer: TypeAlias = bytes | bytearray | memoryview

ABSENT = ""
"""As a condition: only if there is no object of this key. Any other condition is the version that the object must have."""

WRITE_ID = "expstate-write-id"
"""The name of the metadata of an object that says which request has written it."""


class TransientError(StorageError):
    """A request failed in a way that may not happen again: a broken connection, a server's error, too many requests.

    Attributes
    ----------
    throttled : bool
        Whether the server asks for fewer requests.
    """

    def __init__(self, message: str, *, throttled: bool = False) -> None:
        super().__init__(message)
        self.throttled = throttled


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of an object without reading it.

    Attributes
    ----------
    key : str
        Without the bucket.
    size : int
        Bytes.
    modified_at : float
        Seconds since 1970 by the server's clock.
    version : str
        What conditions name: the ETag or the generation; empty where the server tells neither.
    """

    key: str
    size: int
    modified_at: float
    version: str


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts that was begun and not ended: its key, the server's name for it, and when it was begun (seconds since 1970)."""

    key: str
    upload_id: str
    begun_at: float


class ObjectClient(ABC):
    """A bucket.

    Every method raises ``TransientError`` where trying again may help, ``StoragePermissionError`` where the credentials do not suffice,
    and ``StorageError`` for all else that the server or the way to it refuses; the message says what the server said.
    ``FileNotFoundError`` is an object (or bucket) that is not there. No message holds a secret.

    Attributes
    ----------
    url : str
        The bucket as a person may be shown it, such as ``s3://bucket``; no secret in it.
    store : object
        Equal for clients whose objects the server can copy from one to the other by itself.
    is_conditional : bool
        Whether client and server keep conditions, as far as is known.
    is_proven : bool
        Whether the server was seen to keep them.
    least_part_bytes : int or None
        The least size of a part but the last; None where there are no uploads in parts.
    """

    url: str
    store: object
    is_conditional: bool = True
    is_proven: bool = False
    least_part_bytes: int | None = None

    # Whole objects

    @abstractmethod
    def put(self, key: str, data: Sequence[Buffer], *, condition: str | None = None, write_id: str = "") -> None:
        """Store an object by one request: the buffers one after the other, which are not read after the return.

        With ``condition`` only if it is fulfilled, else ``FileExistsError``. A reply that says that the server could not tell (409) is a
        ``TransientError``. ``write_id`` is kept as the metadata ``WRITE_ID``, where there is such a thing.
        """

    @abstractmethod
    def get(self, key: str, start: int, stop: int, *, version: str | None = None) -> Buffer:
        """Bytes ``start`` to ``stop`` of an object, by one request; fewer where the server sends fewer, which is not checked here.

        With ``version`` only of that, else ``FileExistsError``; a client that cannot say so to its server ignores it.
        """

    @abstractmethod
    def get_whole(self, key: str, limit: int | None = None) -> tuple[bytes, str]:
        """All bytes of an object and its version, by one request if possible.

        ``ManifestTooLargeError`` if it has more than ``limit`` bytes, of which no more than these are kept in memory.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """What is known of an object, as the server has it now."""

    @abstractmethod
    def write_id(self, key: str) -> str | None:
        """Which request has written an object, if that is known."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose keys begin with ``prefix``, at any depth, as the server has them now; in any order."""

    @abstractmethod
    def folders(self, prefix: str) -> Iterator[str]:
        """The parts of keys between ``prefix``, which is empty or ends in ``/``, and the next ``/``."""

    @abstractmethod
    def delete(self, key: str, *, version: str | None = None) -> None:
        """Remove an object; nothing happens if there is none.

        With ``version`` only that, else ``FileExistsError``; a client that cannot say so to its server ignores it.
        """

    def copy(self, source: ObjectClient, source_key: str, key: str) -> bool:  # noqa: ARG002 - the default of an interface
        """Have the server copy an object of a client with the same ``store``; False if it cannot."""
        return False

    # In parts

    def begin_upload(self, key: str) -> str:
        """Begin an upload in parts; gives the server's name for it."""
        raise NotImplementedError(key)

    def put_part(self, key: str, upload_id: str, number: int, data: Sequence[Buffer]) -> str:
        """Store a part, numbered from 1; gives what ``finish_upload`` is to be told of it."""
        raise NotImplementedError(key, upload_id, number, data)

    def finish_upload(self, key: str, upload_id: str, parts: Mapping[int, str]) -> None:
        """Make the object of its parts; one that is there is overwritten."""
        raise NotImplementedError(key, upload_id, parts)

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Throw the parts away; nothing happens if there is no such upload."""
        raise NotImplementedError(key, upload_id)

    def uploads(self, prefix: str) -> Iterator[Upload]:  # noqa: ARG002 - the default of an interface
        """Uploads of keys that begin with ``prefix`` and that were not ended."""
        return iter(())

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of connections."""
