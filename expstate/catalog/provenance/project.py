"""Which project a folder belongs to: the same for a take and for a search in that folder, found without starting a process."""

from __future__ import annotations

import os
import re
from pathlib import Path

from blake3 import blake3

from expstate import settings
from expstate.catalog.provenance import redact, repository
from expstate.catalog.provenance.plain import printable_text

MOST_BYTES = 255
_UNKNOWN = "unknown"
_SCP = re.compile(r"(?![A-Za-z]:\\)(\[[^\]/]*\]|[^/\s:\[]+):(?!//)(.+)")


def current_project(folder: str | os.PathLike[str] | None = None) -> str:
    """The project of takes and searches here: the setting, else the git remote, else the path of the git root, else the folder.

    Parameters
    ----------
    folder : str or os.PathLike, optional
        Default the working folder.

    Returns
    -------
    str
        At most 255 bytes.

    Examples
    --------
    >>> from expstate import settings
    >>> with settings.override(project="resnet"):
    ...     current_project()
    'resnet'
    """
    return typed_project(settings.current()) or project_of(os.fspath(folder) if folder is not None else working_folder())


def typed_project(given: settings.Settings) -> str:
    """The project that a person named; empty if nobody did."""
    return bounded(given.project) if given.project else ""


def project_of(folder: str | None) -> str:
    """The project of a folder, whatever the setting says."""
    if folder is None:
        return _UNKNOWN
    folder = os.path.realpath(folder)
    found = repository.find(folder)
    if found is None:
        return bounded(folder)
    remote = found.remote()
    return bounded((remote and from_remote(remote)) or str(found.root))


def working_folder() -> str | None:
    """The working folder; None if it was removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return None


def from_remote(url: str) -> str | None:
    """Host, owner and repository of a remote; None for one on this machine.

    >>> from_remote("https://user:token@git.example.org:8443/owner/repo.git"), from_remote("git@git.example.org:owner/repo.git")
    ('git.example.org/owner/repo', 'git.example.org/owner/repo')
    >>> from_remote("../mirror.git")
    """
    shown = shown_remote(url)
    scheme, mark, rest = shown.partition("://")
    if mark:
        host, _, path = rest.partition("/")
        host = re.sub(r":\d*\Z", "", host)
        if scheme.lower() == "file":
            return None
    else:
        match = _SCP.fullmatch(shown)
        if match is None:
            return None
        host, path = match[1], match[2]
    path = re.sub(r"/{2,}", "/", path).strip("/").removesuffix(".git").rstrip("/")
    return f"{host.lower()}/{path}" if host and path else None


def shown_remote(url: str) -> str:
    """The URL of a remote as it may be recorded.

    >>> shown_remote("git:token@git.example.org:owner/repo.git"), shown_remote("https://token@git.example.org/owner/repo?x=1")
    ('git.example.org:owner/repo.git', 'https://git.example.org/owner/repo')
    """
    if "://" in url:
        return redact.url(url)
    # All up to the @ is the user's, in the form user@host:path too.
    before, mark, path = url.partition("/")
    return f"{before.rpartition('@')[2]}{mark}{path}"


def bounded(text: str) -> str:
    """A project's name of at most 255 bytes that prints; a longer one ends in a hash."""
    text = printable_text(text)
    data = text.encode()
    if len(data) <= MOST_BYTES:
        return text
    return f"{data[: MOST_BYTES - 17].decode('utf-8', 'ignore')}~{blake3(data).hexdigest()[:16]}"
