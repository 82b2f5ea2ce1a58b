"""Values as the page shows them: texts that turn no line, numbers with as many digits as a column has room for, dtypes in three letters."""

from __future__ import annotations

import math
import re
from typing import Any

from expstate.diff import show
from expstate.state import paths

_LONGEST = 200
_LONGEST_TEXT = 64 * 1024
_FEW, _MANY = 1e-3, 1e6
_SURROGATES = re.compile("[\ud800-\udfff]")
_NUMPY = {"b": "bool", "i": "i", "u": "u", "f": "f", "c": "c"}
_SHORT = (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c"))


def clean(text: str, most: int = _LONGEST) -> str:
    r"""A text of one line that shows what it holds.

    >>> clean("step\n\u202e1"), clean("x" * 300)[-3:]
    ('step%0A%E2%80%AE1', 'xx…')
    """
    return paths.printable(text if len(text) <= most else f"{text[: most - 1]}…")


def lines(text: str, most: int = _LONGEST_TEXT) -> str:
    """A text of several lines, such as a note or the source of a cell, with nothing in it that JSON cannot hold."""
    return _SURROGATES.sub("\ufffd", text if len(text) <= most else f"{text[:most]}…")


def metric(value: Any) -> str:
    """A measured value with four decimals, so that a column of them stands in line.

    >>> metric(0.066), metric(12), metric(3.2e-5), metric(float("nan")), metric(None)
    ('0.0660', '12', '3.20e-05', 'nan', '')
    """
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4f}" if value == 0 or _FEW <= abs(value) < _MANY else f"{value:.2e}"
    return show.text(value)


def value(given: Any) -> str:
    """A param, or a value of the state, on one line.

    >>> value("adam"), value(0.1), value(None)
    ('adam', '0.1', 'None')
    """
    return clean(given) if isinstance(given, str) else show.text(given)


def dtype(name: str) -> str:
    """A dtype in few letters.

    >>> dtype("float32"), dtype("bfloat16"), dtype("<f8"), dtype("bool")
    ('f32', 'bf16', 'f64', 'bool')
    """
    if name[:1] in {"<", ">", "|", "="} and name[1:2] in _NUMPY and name[2:].isdigit():
        return "bool" if name[1] == "b" else f"{_NUMPY[name[1]]}{8 * int(name[2:])}"
    for long, short in _SHORT:
        if name.startswith(long):
            return clean(short + name.removeprefix(long), 16)
    return clean(name, 16)


def shape(sizes: tuple[int, ...]) -> str:
    """A shape.

    >>> shape((384,)), shape(())
    ('384', 'scalar')
    """
    return "\N{MULTIPLICATION SIGN}".join(map(str, sizes)) or "scalar"
