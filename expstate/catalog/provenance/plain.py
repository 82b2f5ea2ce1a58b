"""What is gathered, in a form that a manifest can always hold: JSON values, text without lone surrogates, nothing huge."""

from __future__ import annotations

import math
from typing import Any

from expstate.state import paths

_DEEPEST = 16
_MOST_ITEMS = 10_000
_INT64 = range(-(2**63), 2**63)


def clean_text(text: str) -> str:
    r"""A text without lone surrogates, which stand for bytes of paths that are no UTF-8.

    >>> clean_text("caf\xe9"), clean_text("caf\udce9")
    ('café', 'caf\\udce9')
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def printable_text(text: str) -> str:
    """A text without lone surrogates and control characters."""
    return paths.printable(clean_text(text))


def clean(value: Any, depth: int = 0) -> Any:
    """A value as JSON holds it; what JSON has no form for is its text.

    >>> clean({"path": ("a", 1.5, None), 3: float("inf"), "large": 2**80})
    {'path': ['a', 1.5, None], '3': 'inf', 'large': '1208925819614629174706176'}
    """
    if value is None or isinstance(value, bool):
        return value
    # Subclasses, as NumPy's float64, become what they are derived from.
    if isinstance(value, int) and value in _INT64:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, (dict, list, tuple, set, frozenset)) and depth < _DEEPEST and len(value) <= _MOST_ITEMS:
        if isinstance(value, dict):
            return {clean_text(str(key)): clean(item, depth + 1) for key, item in value.items()}
        return [clean(item, depth + 1) for item in value]
    return clean_text(str(value))
