"""Random changes of bytes: for a short look at each reader, and where there is no fuzzer that follows what code is reached."""

from __future__ import annotations

import random
from collections.abc import Sequence

_TOKENS = [
    *(
        b"0",
        b"-1",
        b"1e999",
        b"9" * 30,
        b"null",
        b"true",
        b'""',
        b"[]",
        b"{}",
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b"'",
        b"\\",
        b"\\ud800",
        b"(",
        b")",
    ),
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"/", b"..", b"~", b"%", b":", b"://", b" and ", b" not ", b",", b"18446744073709551616"),
]


def mutated(source: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, with up to eight changes."""
    data = bytearray(source.choice(seeds))
    for _ in range(source.randint(1, 8)):
        at, length = source.randint(0, len(data)), source.choice([1, 2, 4, source.randint(1, 64)])
        change = source.randrange(6)
        if change == 0 and at < len(data):
            data[at] ^= 1 << source.randrange(8)
        elif change == 1 and at < len(data):
            data[at] = source.randrange(256)
        elif change == 2:
            data[at : at + source.choice([0, length])] = source.choice(_TOKENS)
        elif change == 3:
            del data[at : at + length]
        elif change == 4:
            data[at:at] = data[at : at + length] * source.choice([1, 1, 2, 50])
        else:
            other = source.choice(seeds)
            begin = source.randint(0, len(other))
            data[at : at + length] = other[begin : begin + length]
    return bytes(data)
