"""No reader: a mistake that must be found, to show that those who look for one find it."""

from __future__ import annotations

SEEDS = (b"FUN", b"AUZ")


def read(data: bytes) -> None:
    """Go wrong where three conditions meet."""
    if data[:1] == b"F" and data[1:2] == b"U" and data[2:3] == b"Z":
        raise KeyError(data)
