"""What the clients do with a reply as it comes: put its bytes in their place, no more of them than are wanted.

Gets chunks and what the server said of them; hands on bytes, or the error of one who will not read so many.
"""

from __future__ import annotations

import contextlib
from http import HTTPStatus
from typing import TYPE_CHECKING

from expstate.errors import ManifestTooLargeError
from expstate.storage.objects.failures import refusal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


def is_past_end(error: Exception) -> bool:
    """Whether a server has refused a range since the object has no byte of it."""
    answer = refusal(error)
    return answer is not None and answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


async def filled(chunks: AsyncGenerator[bytes, None], size: int, skipped: int = 0) -> memoryview:
    """The bytes of a reply from the one numbered ``skipped`` on, as many as there are but no more than ``size``."""
    target = bytearray(size)
    end = 0
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            part = memoryview(chunk)[skipped:][: size - end]
            skipped = max(0, skipped - len(chunk))
            target[end : end + len(part)] = part
            end += len(part)
    return memoryview(target)[:end]


async def joined(chunks: AsyncGenerator[bytes, None], url: str, size: int, limit: int | None) -> bytes:
    """All bytes of a reply that says that it has ``size`` of them, if these are no more than ``limit``."""
    pieces = []
    async with contextlib.aclosing(chunks):
        check_limit(url, size, limit)
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            check_limit(url, size, limit)
            pieces.append(chunk)
    return b"".join(pieces)


def check_limit(url: str, size: int, limit: int | None) -> None:
    """Raise ``ManifestTooLargeError`` if an object of this size is not read."""
    if limit is not None and size > limit:
        msg = f"{url} has {size:,} bytes or more, more than the {limit:,} that are read"
        raise ManifestTooLargeError(msg)
