"""Where the snapshots of a notebook go: a folder beside it, or the one that a person has named.

Gets the shell and the environment; hands on a new path for each take. The folder is fixed when the extension is loaded: a later chdir
changes nothing.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expstate.errors import InvalidArgumentError
from expstate.integrations.root import default_root, make_root
from expstate.storage import registry
from expstate.storage.options import configure

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECRET = ("secret", "password", "token", "key", "credential", "auth")


class Place:
    """The folder for new snapshots.

    Parameters
    ----------
    shell : object
        IPython's shell; its namespace may tell where the notebook is.
    """

    def __init__(self, shell: Any) -> None:
        self._beside = _beside(shell)
        self._chosen: str | None = None

    @property
    def root(self) -> str:
        """Path or URL of the folder."""
        if self._chosen is not None:
            return self._chosen
        return default_root(self._beside)

    def use(self, url: str, options: Mapping[str, str]) -> str:
        """Let snapshots go to another folder from now on.

        Parameters
        ----------
        url : str
            Path or URL.
        options : mapping of str to str
            What the storage needs to connect, without secrets. They are kept in memory, for all that is done with what is below the URL.

        Returns
        -------
        str
            The folder, as it is shown.

        Raises
        ------
        InvalidArgumentError
            If an option is a secret.
        UnsupportedSchemeError
            If no storage is known for the URL.
        """
        for name in options:
            if any(word in name.lower() for word in _SECRET):
                msg = f"the option {name!r} is a secret, which has no place in a notebook; use a profile, or the environment"
                raise InvalidArgumentError(msg)
        scheme, _ = registry.parse(url)
        path = os.path.abspath(os.path.expanduser(url)) if scheme == "fs" and "://" not in url else url  # noqa: PTH100, PTH111 - as above
        storage = registry.open_storage(path, dict(options) or None)
        if options:
            configure(storage_options={storage.url: options})
        self._chosen = path
        return storage.url

    def new(self) -> str:
        """The path of a snapshot to be.

        Raises
        ------
        StoragePermissionError
            If the folder cannot be made or written.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        root = self.root
        if "://" not in root:
            make_root(Path(root), "name another folder by `%snapshot use PATH`, or by EXPSTATE_ROOT")
        return f"{root.rstrip('/')}/{name}"


def _beside(shell: Any) -> Path:
    """The folder of the notebook, as far as that can be known; else the working folder."""
    told = getattr(shell, "user_ns", {}).get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME", "")
    if isinstance(told, str) and told.endswith(".ipynb"):
        folder = Path(told).expanduser().parent
        if folder.is_absolute() and folder.is_dir():
            return folder
    return Path.cwd()


def notice() -> str | None:
    """What should be said of the machine, or None."""
    if "google.colab" in sys.modules:
        return "on Colab the folder /content does not outlive the session: `%snapshot use` names a place that does"
    return None
