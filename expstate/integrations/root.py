"""The folder that snapshots go to which nobody has given a path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from expstate import settings
from expstate.errors import StoragePermissionError

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = "expstate-snapshots"


def default_root(beside: Path) -> str:
    """Path or URL of the folder: the setting ``root``, else ``expstate-snapshots`` in another folder."""
    given = settings.current().root
    if not given:
        return str(beside / FOLDER)
    return os.path.abspath(os.path.expanduser(given)) if "://" not in given else given  # noqa: PTH100, PTH111 - may be a URL


def make_root(root: Path, hint: str) -> None:
    """Make the folder if need be, with a note for git that what is in it is not to be kept there.

    Raises
    ------
    StoragePermissionError
        If it cannot be made or written; ``hint`` says what to do then.
    """
    try:
        if not root.is_dir():
            root.mkdir(parents=True)
            (root / ".gitignore").write_text("*\n")
        if os.access(root, os.W_OK):
            return
        reason = "it is read-only"
    except OSError as error:
        reason = error.strerror or str(error)
    msg = f"snapshots cannot be kept in {str(root)!r} ({reason}); {hint}"
    raise StoragePermissionError(msg)
