"""What can go wrong between a client and an object store, which requests it hits, and what is noted of a request.

Plain values: ``proxy`` acts on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TypeAlias
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Delay:
    """The request is held back for some seconds, then goes its way: to the next fault, or to the server."""

    seconds: float


@dataclass(frozen=True)
class Reset:
    """The connection is reset before anything has reached the server."""


@dataclass(frozen=True)
class Lost:
    """The server does what it is asked, but its reply is lost: the connection is closed instead."""


@dataclass(frozen=True)
class Hang:
    """Nothing is answered; ``clear`` or ``close`` of the proxy ends the connection. If ``stored``, the server has got the request."""

    stored: bool = False


@dataclass(frozen=True)
class Status:
    """This is answered instead of what the server would say, which does not get the request."""

    code: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Truncate:
    """The body of the reply ends before its ``Content-Length``, with the connection: after ``keep`` bytes, or half of them."""

    keep: int | None = None


@dataclass(frozen=True)
class Shrink:
    """The body of the reply has fewer bytes, ``keep`` or half of them, and a ``Content-Length`` that agrees; all else is as it was."""

    keep: int | None = None


@dataclass(frozen=True)
class Flip:
    """One bit of the body of the reply is wrong, or if ``upload`` of that of the request: in byte ``at``, or the middle one.

    Of a body whose length is not told beforehand it is the first one.
    """

    at: int | None = None
    upload: bool = False


Action: TypeAlias = Delay | Reset | Lost | Hang | Status | Truncate | Shrink | Flip


def s3_error(code: int, name: str, **headers: str) -> Status:
    """An error as S3 says it: ``s3_error(503, "SlowDown")``, ``s3_error(409, "ConditionalRequestConflict")``."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{name}</Code><Message>{name}</Message></Error>'
    return Status(code, body.encode(), {"Content-Type": "application/xml"} | headers)


def gcs_error(code: int, reason: str, **headers: str) -> Status:
    """An error as GCS says it: ``gcs_error(429, "rateLimitExceeded")``."""
    error = {"code": code, "message": reason, "errors": [{"domain": "global", "reason": reason, "message": reason}]}
    return Status(code, json.dumps({"error": error}).encode(), {"Content-Type": "application/json"} | headers)


@dataclass
class Fault:
    """An action, and the requests that it hits.

    Attributes
    ----------
    action : Action
        What happens.
    method : str
        A regular expression that the whole method matches; empty for any.
    path : str
        A regular expression that is found in the path and query (``/bucket/key?uploads``), percent signs decoded.
    headers : str
        A regular expression that is found in a header line (``If-None-Match: *``); capitals do not matter.
    nth : int
        The first of the matching requests to be hit, counted from 1.
    times : int or None
        How many are hit from then on; None for all.
    dice : Random or None
        With dice, a request is hit with the probability ``chance``.
    seen, hits : int
        How many have matched, and how many of these were hit.
    """

    action: Action
    method: str = ""
    path: str = ""
    headers: str = ""
    nth: int = 1
    times: int | None = None
    dice: Random | None = None
    chance: float = 1.0
    seen: int = 0
    hits: int = 0

    def strikes(self, request: Request) -> bool:
        """Whether this request is hit; it is counted if it matches."""
        lines = "\n".join(f"{name}: {value}" for name, value in request.headers.items())
        if not (
            re.fullmatch(self.method or ".*", request.method)
            and re.search(self.path, unquote(request.target))
            and re.search(self.headers, lines, re.IGNORECASE | re.MULTILINE)
        ):
            return False
        self.seen += 1
        is_its_turn = self.seen >= self.nth and (self.times is None or self.seen < self.nth + self.times)
        return is_its_turn and (self.dice is None or self.dice.random() < self.chance)


@dataclass
class Request:
    """What went by.

    Attributes
    ----------
    method, target : str
        As sent; ``path`` (decoded) and ``query`` are the parts of the target.
    headers : dict of str to str
        Names in small letters.
    status : int
        Of the reply that the client got, or began to get; 0 while it has none.
    up, down : int
        Bytes of the bodies of request and reply as they went by, with the lengths of chunks where there are such.
    fault : Fault or None
        What hit it; of delays, none.
    """

    method: str
    target: str
    headers: dict[str, str] = field(repr=False)
    status: int = 0
    up: int = 0
    down: int = 0
    fault: Fault | None = None

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> str:
        return urlsplit(self.target).query
