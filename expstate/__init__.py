"""expstate keeps the state of PyTorch experiments: take it, find it, compare it, put back just what you want.

Examples
--------
>>> import tempfile, torch
>>> from expstate import Snapshot, StateDict
>>> model, progress = torch.nn.Linear(4, 2), StateDict(epoch=3)
>>> with tempfile.TemporaryDirectory() as folder:
...     snapshot = Snapshot.take(f"{folder}/epoch-3", {"model": model, "progress": progress})
...     progress["epoch"] = 4
...     report = snapshot.restore({"model": model, "progress": progress})
>>> progress["epoch"]
3
"""

from typing import TYPE_CHECKING, Any

from expstate import errors, settings
from expstate._version import __version__
from expstate.catalog.catalog import Catalog
from expstate.catalog.model import Record
from expstate.engine.collect import GcReport, gc
from expstate.engine.export import ExportReport
from expstate.engine.report import RestoreReport, VerifyReport
from expstate.errors import ExpstateError, ExpstateWarning
from expstate.integrations.autosave import autosave
from expstate.integrations.saver import Autosave
from expstate.pending import PendingSnapshot
from expstate.progress import ProgressUpdate
from expstate.snapshot import Snapshot, SnapshotMetadata
from expstate.state.stateful import RNGState, StateDict, Stateful
from expstate.storage.options import configure

__all__ = [
    "Autosave",
    "Catalog",
    "ExportReport",
    "ExpstateError",
    "ExpstateWarning",
    "GcReport",
    "PendingSnapshot",
    "ProgressUpdate",
    "RNGState",
    "Record",
    "RestoreReport",
    "Snapshot",
    "SnapshotMetadata",
    "StateDict",
    "Stateful",
    "VerifyReport",
    "__version__",
    "autosave",
    "browse",
    "configure",
    "errors",
    "gc",
    "lock",
    "register",
    "settings",
]

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def load_ipython_extension(shell: Any) -> None:
    """Register ``%snapshot``: what ``%load_ext expstate`` calls."""
    from expstate.notebook import extension  # noqa: PLC0415 - only notebooks need it

    extension.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Take ``%snapshot`` away again: what ``%unload_ext expstate`` calls."""
    from expstate.notebook import extension  # noqa: PLC0415 - as above

    extension.unload(shell)


def register(**objects: Any) -> None:
    """Keep names for ``%snapshot``: without names, it takes what was registered.

    An object that no name of the notebook stands for is held by a weak reference. If a name stands for another object later, that is
    said when it is used.

    Parameters
    ----------
    **objects
        What is meant, by the names that it goes by.

    Raises
    ------
    NotInNotebookError
        If ``%load_ext expstate`` was not run.
    """
    from expstate.notebook.kernel import current  # noqa: PLC0415 - as above

    kernel = current()
    kernel.registry.add(kernel.namespace, objects)


def lock() -> "AbstractContextManager[bool]":
    """What takes, restores and comparisons of this notebook hold; training threads of your own may hold it too.

    Returns
    -------
    context manager
        A reentrant lock, to be used in a ``with`` block.

    Raises
    ------
    NotInNotebookError
        If ``%load_ext expstate`` was not run.
    """
    from expstate.notebook.kernel import current  # noqa: PLC0415 - as above

    return current().lock


def browse(query: str | None = None, *, project: str | None = None) -> Any:
    """Open the browser of snapshots.

    Parameters
    ----------
    query : str, optional
        What it shows at first, as for ``Catalog.search``.
    project : str, optional
        Another project than the current one; ``"*"`` for all.

    Returns
    -------
    widget
        To be the last value of a cell.
    """
    from expstate.notebook.browser import browse as open_browser  # noqa: PLC0415 - as above

    return open_browser(query, project=project)
