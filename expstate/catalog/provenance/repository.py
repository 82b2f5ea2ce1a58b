"""Git repositories as files: where the folder's repository is, its remote, its commit. No process is started.

Gets a folder; hands on a ``Repository``. What cannot be read or understood is None, never an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

_MOST_BYTES = 4 * 1024**2
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_SECTION = re.compile(r"\[\s*([A-Za-z0-9.-]+)(?:\s+\"((?:[^\"\\]|\\.)*)\")?\s*\]")
_URL = re.compile(r"url\s*=\s*(.*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Repository:
    """A git repository.

    Attributes
    ----------
    root : Path
        The folder of its working tree; of a bare one the repository's own.
    git_folder, common_folder : Path
        Where ``HEAD`` is, and where ``config`` is; they differ in a worktree.
    """

    root: Path
    git_folder: Path
    common_folder: Path

    def remote(self) -> str | None:
        """The URL of the remote ``origin``, or of the only one, as it stands in ``config``, secrets and all."""
        text = _read(self.common_folder / "config")
        found: dict[str, str] = {}
        name = None
        for line in (text or "").splitlines():
            line = line.strip()  # noqa: PLW2901 - the same line
            section = _SECTION.match(line)
            if section is not None:
                name = section[2] if section[1].lower() == "remote" else None
                line = line[section.end() :].strip()  # noqa: PLW2901 - what follows the section on the same line
            url = _URL.match(line)
            if name is not None and url is not None and _unquoted(url[1]):
                found.setdefault(name, _unquoted(url[1]))
        return next(iter(found.values())) if len(found) == 1 else found.get("origin")

    def head(self) -> tuple[str | None, str | None]:
        """Commit and branch; None where there is none or they are stored in another form."""
        text = (_read(self.git_folder / "HEAD") or "").strip()
        if not text.startswith("ref:"):
            return (text if _COMMIT.fullmatch(text) else None), None
        ref = text[4:].strip()
        branch = ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") and ref != "refs/heads/.invalid" else None
        if not ref.startswith("refs/") or ".." in ref.split("/"):
            return None, None
        commit = (_read(self.common_folder / ref) or "").strip()
        if not commit:
            for line in (_read(self.common_folder / "packed-refs") or "").splitlines():
                if line.endswith(f" {ref}"):
                    commit = line.partition(" ")[0]
        return (commit if _COMMIT.fullmatch(commit) else None), branch


def find(folder: str) -> Repository | None:
    """The repository that a folder is in."""
    here = Path(folder)
    return next(filter(None, map(_at, (here, *here.parents))), None)


def _at(folder: Path) -> Repository | None:
    place = folder / ".git"
    try:
        mode = place.stat().st_mode
    except (OSError, ValueError):
        # A bare repository is its own folder.
        return _opened(folder, folder) if all((folder / name).exists() for name in ("HEAD", "objects", "refs", "config")) else None
    if stat.S_ISDIR(mode):
        return _opened(folder, place)
    # A worktree or a submodule: the file says where the rest is.
    text = _read(place) or ""
    return _opened(folder, folder / text[7:].strip()) if text.startswith("gitdir:") else None


def _opened(root: Path, git_folder: Path) -> Repository | None:
    if not (git_folder / "HEAD").exists():
        return None
    common = (_read(git_folder / "commondir") or "").strip()
    return Repository(root, git_folder, git_folder / common)


def _read(path: Path) -> str | None:
    """The text of a file that is no pipe or device and not too large."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if stat.S_ISREG(info.st_mode) and info.st_size <= _MOST_BYTES:
                return file.read(_MOST_BYTES).decode("utf-8", "surrogateescape")
    return None


def _unquoted(value: str) -> str:
    """A value of ``config``: comments after it go, quotes and escapes are undone."""
    found = []
    inside = False
    characters = iter(value)
    for character in characters:
        if character == '"':
            inside = not inside
        elif character == "\\":
            found.append(next(characters, ""))
        elif character in "#;" and not inside:
            break
        else:
            found.append(character)
    return "".join(found).strip()
