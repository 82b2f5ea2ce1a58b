"""Names: ids of snapshots and attempts, names of the files of a snapshot, labels that people give.

Everything that becomes part of a path, or of a ref that a person types, is made or checked here.
"""

from __future__ import annotations

import re
import unicodedata
import uuid

from expstate.errors import InvalidNameError, UnsafePathError

MANIFEST = "snapshot.json"
ANNOTATIONS = "annotations.json"

_UNFIT = re.compile(r"[^A-Za-z0-9._-]")
_DOTS = re.compile(r"\.{2,}")
_FILE_NAME = re.compile(r"(?:base/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,230}-[0-9a-f]{8}\.safetensors")
_DATA_FILE = re.compile(r"(?:base/)?[A-Za-z0-9_-][A-Za-z0-9._-]*-[0-9a-f]{8}\.safetensors")
_STEM = re.compile(r"(?:base/)?(.+?)-(?:r[0-9]{5}-)?[0-9]{5,}-[0-9a-f]{8}\.safetensors")
_ID = re.compile(r"[0-9a-f]{32}")
_OF_ATTEMPT = re.compile(r"(?:base/)?[A-Za-z0-9_-][A-Za-z0-9._-]*-([0-9a-f]{8})\.safetensors|\.[A-Za-z0-9.-]*\.([0-9a-f]{8})")
_LEASE = re.compile(r"\.attempt-([0-9a-f]{8})\.json|\.\.attempt-([0-9a-f]{8})\.json\.\2")
_EDIT = re.compile(r"\.annotations\.json\.[0-9a-f]{8}\.([0-9a-f]{8})")
_CLOCK = re.compile(r"\.clock-([0-9a-f]{8})[0-9a-f]{24}")
_LABEL_BYTES = 255
_RESERVED = re.compile(r"latest(?:~[0-9]*)?|live|\.{1,2}")
_CONTROL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0]")
"""Characters that no font shows though their category is that of letters, marks or symbols."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_KEY_LENGTH = 64


def new_id() -> str:
    """The id of a new snapshot: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def is_id(text: str) -> bool:
    """Whether this has the form of a snapshot's id."""
    return _ID.fullmatch(text) is not None


def attempt_of(snapshot_id: str) -> str:
    """The attempt's id, which ends the name of each of its data files.

    >>> attempt_of("3f9a2c71d0e14b6f8a5b4c3d2e1f0a9b")
    '3f9a2c71'
    """
    return snapshot_id[:8]


def lease_name(attempt: str) -> str:
    """The file that says that an attempt is alive."""
    return f".attempt-{attempt}.json"


def attempt_of_lease(name: str) -> str | None:
    """The attempt that a lease is for, or None if this is not the name of one, nor of one that was being written.

    >>> attempt_of_lease(".attempt-3f9a2c71.json"), attempt_of_lease("..attempt-3f9a2c71.json.3f9a2c71"), attempt_of_lease("notes.json")
    ('3f9a2c71', '3f9a2c71', None)
    """
    match = _LEASE.fullmatch(name)
    return match and (match.group(1) or match.group(2))


def scrap_of(name: str) -> tuple[str, str] | None:
    """What was done, and an id, if this is the name of a file that is there for a moment and has no lease; else None.

    ``"edit"`` was writing annotations of the snapshot of this attempt; ``"clock"`` was asking an object store for the time.

    >>> scrap_of(".annotations.json.0c1d2e3f.3f9a2c71"), scrap_of(".clock-0c1d2e3f4a5b6c7d8e9f0a1b2c3d4e5f")
    (('edit', '3f9a2c71'), ('clock', '0c1d2e3f'))
    >>> scrap_of(".annotations.json.3f9a2c71") is None
    True
    """
    for action, pattern in (("edit", _EDIT), ("clock", _CLOCK)):
        match = pattern.fullmatch(name)
        if match is not None:
            return action, match.group(1)
    return None


def is_of_attempt(name: str, attempt: str) -> bool:
    """Whether a file belongs to an attempt by its name: a data file of it, or a temporary file that it made.

    >>> is_of_attempt("model-00001-3f9a2c71.safetensors", "3f9a2c71"), is_of_attempt("notes-3f9a2c71.txt", "3f9a2c71")
    (True, False)
    """
    match = _OF_ATTEMPT.fullmatch(name)
    return match is not None and attempt in match.groups()


def is_data_file(name: str) -> bool:
    """Whether a file is some attempt's data file by its name.

    >>> is_data_file("model-00001-3f9a2c71.safetensors"), is_data_file("weights.safetensors")
    (True, False)
    """
    return _DATA_FILE.fullmatch(name) is not None


def file_stem(key: str) -> str:
    """A key, or what else a file is named after, in characters that every file system takes.

    >>> file_stem("model/a"), file_stem("..")
    ('model_a', '_')
    """
    return _DOTS.sub("_", _UNFIT.sub("_", key))[:_KEY_LENGTH].lstrip(".") or "_"


def stem_of(name: str) -> str:
    """What a data file is named after.

    >>> stem_of("model-00001-3f9a2c71.safetensors"), stem_of("base/model-r00002-00001-3f9a2c71.safetensors")
    ('model', 'model')
    """
    match = _STEM.fullmatch(name)
    return name if match is None else match.group(1)


class FileNamer:
    """Gives the data files of one attempt distinct names, also where case does not count.

    Parameters
    ----------
    attempt : str
        The attempt's id.
    rank : int, optional
        The rank that writes them, where there are several.
    """

    def __init__(self, attempt: str, rank: int | None = None) -> None:
        self._attempt = attempt
        self._rank = "" if rank is None else f"r{rank:05d}-"
        self._stems: dict[str, str] = {}
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def name(self, stem: str) -> str:
        """The next data file of a key, or of what else ``stem`` stands for.

        >>> FileNamer("3f9a2c71").name("model/a")
        'model_a-00001-3f9a2c71.safetensors'
        >>> FileNamer("3f9a2c71", rank=2).name("model")
        'model-r00002-00001-3f9a2c71.safetensors'
        """
        clean = self._stems.get(stem)
        if clean is None:
            first = file_stem(stem)
            clean, number = first, 1
            while clean.casefold() in self._taken:
                number += 1
                clean = f"{first}~{number}".replace("~", "_")
            self._taken.add(clean.casefold())
            self._stems[stem] = clean
        self._counts[clean] = self._counts.get(clean, 0) + 1
        return f"{clean}-{self._rank}{self._counts[clean]:05d}-{self._attempt}.safetensors"


def check_file_name(name: str) -> None:
    """Refuse a data file's name that the format does not allow.

    Raises
    ------
    UnsafePathError
        If it could lead out of the snapshot's folder, or is not that of a data file: a snapshot that is deleted takes nothing with it that
        people keep beside it.
    """
    if _FILE_NAME.fullmatch(name) is None:
        msg = f"the manifest names a file that no snapshot has: {name[:300]!r}"
        raise UnsafePathError(msg)


def has_lone_surrogates(text: str) -> bool:
    r"""Whether a text holds halves of characters, which UTF-8 cannot.

    >>> has_lone_surrogates("\ud83c\udf89"), has_lone_surrogates("\N{PARTY POPPER}")
    (True, False)
    """
    return not text.isascii() and _SURROGATES.search(text) is not None


def check_label(text: object, what: str) -> str:
    """A name or tag that a ref can carry, in normal form (NFC).

    Parameters
    ----------
    text : object
        What the caller gave.
    what : str
        ``"name"`` or ``"tag"``, for the message.

    Raises
    ------
    InvalidNameError
        If it is not text, empty, longer than 255 bytes, reserved, or has ``@ : = /``, control or invisible characters, or spaces at
        its ends.

    Examples
    --------
    >>> check_label("baseline", "name")
    'baseline'
    """
    if not isinstance(text, str):
        msg = f"a {what} must be text, got {type(text).__name__}"
        raise InvalidNameError(msg)
    label = str.__str__(unicodedata.normalize("NFC", text))  # a subclass, such as NumPy's, has nothing to do in a manifest
    problem = None
    if not label or label != label.strip():
        problem = "is empty, or begins or ends with a space"
    elif _RESERVED.fullmatch(label):
        problem = "has a meaning of its own in refs"
    elif any(character in "@:=/" for character in label):
        problem = "has one of @ : = / in it, which refs cannot carry"
    elif _BLANK.search(label) or any(unicodedata.category(character) in _CONTROL for character in label):
        problem = "has control or invisible characters in it"
    elif len(label.encode()) > _LABEL_BYTES:
        problem = f"is longer than {_LABEL_BYTES} bytes"
    if problem:
        msg = f"{what} {label[:80]!r} {problem}"
        raise InvalidNameError(msg)
    return label
