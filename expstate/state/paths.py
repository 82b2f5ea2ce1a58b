"""Entry paths: how the keys of nested containers become one string, and globs on it.

A path is the key of the app state and the names below it, joined by ``/``. A name is its text with ``%``, ``/``, control characters
and lone surrogates percent-encoded, so that every path is printable and splits in one way.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_UNPRINTABLE = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_INVISIBLE = "\u00ad\u061c\u180e\u200b-\u200f\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0001-\U000e007f"
_UNSAFE = re.compile(f"[%/{_UNPRINTABLE}]")
_NO_PATH = re.compile(f"[{_UNPRINTABLE}]")
_NO_TEXT = re.compile(f"[{_UNPRINTABLE}{_INVISIBLE}]")
_ESCAPE = re.compile("%([0-9A-F]{2})")
_EMPTY = "%empty"


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8", "surrogatepass"))


def quote(name: str) -> str:
    """The part of a path that stands for ``name``.

    >>> quote("encoder.0/weight"), quote("100%"), quote("")
    ('encoder.0%2Fweight', '100%25', '%empty')
    """
    if _UNSAFE.search(name) is None:
        return name or _EMPTY
    return _UNSAFE.sub(_percent, name)


def unquote(part: str) -> str:
    """The name that a part of a path stands for; undoes ``quote``. What ``quote`` does not write stands for itself.

    >>> unquote(quote("a/b%"))
    'a/b%'
    """
    if "%" not in part:
        return part
    if part == _EMPTY:
        return ""
    raw = bytearray()
    position = 0
    for match in _ESCAPE.finditer(part):
        raw += part[position : match.start()].encode("utf-8", "surrogatepass")
        raw.append(int(match.group(1), 16))
        position = match.end()
    raw += part[position:].encode("utf-8", "surrogatepass")
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return part


def is_printable(path: str) -> bool:
    r"""Whether a path can be shown as it is: every path that ``quote`` had a part in can.

    >>> is_printable("model/café"), is_printable("model/\x1b[31m")
    (True, False)
    """
    return path.isprintable() or _NO_PATH.search(path) is None


def printable(name: str) -> str:
    r"""A name as a terminal may be given it: control characters, and those that cannot be seen or turn the line, are percent-encoded.

    >>> printable("a/b"), printable("\x1b[31m")
    ('a/b', '%1B[31m')
    """
    return _NO_TEXT.sub(_percent, name)


def key_parts(keys: Sequence[Any]) -> list[str]:
    """A distinct path part for each key of a dict; keys that print alike (``1``, ``"1"``, ``True``) stay apart.

    >>> key_parts(["1", 1, "True", True])
    ['1', '1%int', 'True', 'True%bool']
    """
    if all(type(key) is str for key in keys):
        return [quote(key) for key in keys]
    parts = [quote(key if isinstance(key, str) else str(key)) for key in keys]
    counts = Counter(parts)
    taken: set[str] = set()
    result = []
    for key, part in zip(keys, parts, strict=True):
        candidate = part if counts[part] == 1 or type(key) is str else f"{part}%{type(key).__name__}"
        number = 1
        while candidate in taken:
            number += 1
            candidate = f"{part}%{type(key).__name__}{number}"
        taken.add(candidate)
        result.append(candidate)
    return result


def parent(path: str) -> str:
    """The path of the container that holds ``path``; empty for a key.

    >>> parent("model/encoder/weight")
    'model/encoder'
    """
    return path.rpartition("/")[0]


def key_of(path: str) -> str:
    """The key of the app state (as it was given) that ``path`` lies under."""
    return unquote(path.partition("/")[0])


def matcher(globs: Iterable[str]) -> Callable[[str], bool]:
    """Whether a path, or a container above it, matches one of ``globs``; ``*`` crosses ``/``.

    >>> matches = matcher(["model/encoder.*"])
    >>> matches("model/encoder.0.weight"), matches("model/head.weight")
    (True, False)
    """
    pattern = re.compile("|".join(f"(?:{fnmatch.translate(glob)})" for glob in globs) or "(?!)")

    def matches(path: str) -> bool:
        while path:
            if pattern.match(path):
                return True
            path = parent(path)
        return False

    return matches
