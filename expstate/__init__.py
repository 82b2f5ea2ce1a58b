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

from expstate import errors, settings
from expstate._version import __version__
from expstate.catalog.catalog import Catalog
from expstate.catalog.model import Record
from expstate.engine.collect import GcReport, gc
from expstate.engine.export import ExportReport
from expstate.engine.report import RestoreReport, VerifyReport
from expstate.errors import ExpstateError, ExpstateWarning
from expstate.pending import PendingSnapshot
from expstate.progress import ProgressUpdate
from expstate.snapshot import Snapshot, SnapshotMetadata
from expstate.state.stateful import RNGState, StateDict, Stateful

__all__ = [
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
    "errors",
    "gc",
    "settings",
]
