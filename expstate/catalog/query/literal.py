"""The values of a query: numbers, sizes, durations, times, true and false, none, and texts.

Gets a word as it was written; what it stands for depends on what it is compared with, so each meaning is a function of its own.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from fractions import Fraction

_DECIMAL = "kmgtp"
_SIZES = {"b": 1} | {
    f"{letter}{middle}b": base ** (power + 1) for middle, base in (("", 1000), ("i", 1024)) for power, letter in enumerate(_DECIMAL)
}
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_DURATIONS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800, **_SECONDS}
_DURATIONS |= {f"{name}s": count for name, count in _SECONDS.items()}
_UNITS = "|".join(sorted([*(f"(?i:{size})" for size in _SIZES), *_DURATIONS], key=len, reverse=True))

QUANTITY = rf"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[ \t]*(?:{_UNITS})"
"""A number with a unit, as a regular expression."""

_QUANTITY = re.compile(rf"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[ \t]*({_UNITS})")
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|infinity|nan)", re.IGNORECASE)
_TIME = re.compile(
    r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ](?P<hour>[0-9]{2}):(?P<minute>[0-9]{2})(?::(?P<second>[0-9]{2})(?:\.(?P<fraction>[0-9]{1,6}))?)?"
    r"(?P<zone>Z|[+-][0-9]{2}:?[0-9]{2})?)?",
    re.ASCII,
)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)
_MICROSECOND = dt.timedelta(microseconds=1)
_SECOND = 1_000_000
_DAY = 86400 * _SECOND


@dataclass(frozen=True, slots=True)
class Literal:
    """A value of a query as it was written; of a quoted one, what the quotes hold."""

    raw: str
    quoted: bool
    position: int

    @property
    def is_none(self) -> bool:
        """Whether it stands for a missing value."""
        return not self.quoted and self.raw.lower() == "none"


def boolean(raw: str) -> bool | None:
    """True or false, or None if it is neither.

    >>> boolean("true"), boolean("False"), boolean("yes")
    (True, False, None)
    """
    return {"true": True, "false": False}.get(raw.lower())


def number(raw: str) -> int | float | None:
    """An int of any size or a float, or None if it is none.

    >>> number("12345678901234567890"), number("1e-3"), number("-inf"), number("adam")
    (12345678901234567890, 0.001, -inf, None)
    """
    if _INT.fullmatch(raw):
        return int(raw)
    return float(raw) if _FLOAT.fullmatch(raw) else None


def _quantity(raw: str) -> tuple[Fraction, str] | None:
    match = _QUANTITY.fullmatch(raw)
    return None if match is None else (Fraction(match[1].rstrip(".")), match[2])


def size(raw: str) -> int | float | None:
    """Bytes, or None if it is no size.

    >>> size("1GB"), size("1.5 GiB"), size("7d")
    (1000000000, 1610612736, None)
    """
    found = _quantity(raw)
    if found is None or found[1].lower() not in _SIZES:
        return None
    return _plain(found[0] * _SIZES[found[1].lower()])


def duration(raw: str) -> int | float | None:
    """Seconds, or None if it is no duration.

    >>> duration("7d"), duration("1.5 h"), duration("90 seconds"), duration("1GB")
    (604800, 5400, 90, None)
    """
    found = _quantity(raw)
    return None if found is None or found[1] not in _DURATIONS else _plain(found[0] * _DURATIONS[found[1]])


def _plain(value: Fraction) -> int | float:
    try:
        return value.numerator if value.denominator == 1 else float(value)
    except OverflowError:
        return int(value)


def span(raw: str, now: int) -> tuple[int, int] | None:
    """The beginning of a day, minute, second or microsecond and that of the next, or None if it is no time.

    Parameters
    ----------
    raw : str
        As it was written; without a zone it is in UTC.
    now : int
        Microseconds since 1970, for ``today`` and ``yesterday``.

    Examples
    --------
    >>> span("1970-01-02", 0), span("1970-01-01T00:01", 0), span("1970-01-01T01:00:00+01:00", 0), span("soon", 0)
    ((86400000000, 172800000000), (60000000, 120000000), (0, 1000000), None)
    """
    days = {"today": 0, "yesterday": 1}.get(raw.lower())
    if days is not None:
        first = now - now % _DAY - days * _DAY
        return first, first + _DAY
    match = _TIME.fullmatch(raw)
    if match is None:
        return None
    try:
        start = (dt.datetime.combine(dt.date.fromisoformat(match["date"]), dt.time(), dt.timezone.utc) - _EPOCH) // _MICROSECOND
        if match["hour"] is None:
            return start, start + _DAY
        fraction = match["fraction"]
        clock = dt.time(int(match["hour"]), int(match["minute"]), int(match["second"] or 0), int((fraction or "").ljust(6, "0")))
        ahead = _ahead(match["zone"])
    except ValueError:
        return None
    since_midnight = ((clock.hour * 60 + clock.minute) * 60 + clock.second) * _SECOND + clock.microsecond
    start += since_midnight - ahead
    return start, start + (60 * _SECOND if match["second"] is None else _SECOND if fraction is None else 1)


def _ahead(zone: str | None) -> int:
    """Microseconds that a zone's clocks are ahead of UTC."""
    if zone is None or zone == "Z":
        return 0
    clock = dt.time(int(zone[1:3]), int(zone[-2:]))
    return (-1 if zone[0] == "-" else 1) * (clock.hour * 60 + clock.minute) * 60 * _SECOND
