"""Settings: one frozen record, read from ``EXPSTATE_...`` variables, overridden in a ``with`` block.

Every setting carries its unit in its name. Functions ask ``current()`` when they run, never at import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.errors import InvalidSettingError

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1024
MIB = 1024**2
GIB = 1024**3

PROVENANCE_LEVELS = ("full", "minimal", "off")
TRANSPORTS = ("", "obstore", "fsspec")


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be tuned. Each field is read from ``EXPSTATE_`` plus its name in capitals.

    Attributes
    ----------
    memory_budget_bytes : int, default 0
        Extra host memory of a take or restore; 0 means half of what is available divided by the ranks of the host, at
        most 32 GiB.
    io_threads : int, default 0
        Threads that move pieces; 0 means twice the cores, at least 4, at most 16.
    data_file_bytes : int, default 16 GiB
        Size at which a new data file is begun on disk.
    object_file_bytes : int, default 16 MiB
        Size at which a new data file is begun in an object store; each moves by a request of its own.
    retry_seconds : float, default 60
        How long a request to an object store that fails is tried again.
    transport : str, default ""
        How ``s3://`` and ``gs://`` are reached: ``obstore`` or ``fsspec`` (s3fs, gcsfs); empty means obstore where it is installed and can.
    direct_io : bool, default True
        Go past the page cache where the file system can.
    staging_idle_seconds : float, default 60
        How long idle staging memory is kept warm for the next take.
    device_staging_bytes : int or None, default None
        Memory of an accelerator that an async take may copy state to, so as to move it to the host later; unset means what is free but for
        a reserve of 1 GiB or a tenth of the device, ``0`` none.
    progress : bool or None, default None
        ``1`` and ``0`` turn progress on and off; unset means on at a terminal or in a notebook.
    progress_delay_seconds : float, default 2
        Operations shorter than this show no progress.
    catalog : str, default ""
        Where takes are recorded: a path, an SQLAlchemy URL, or ``off``; empty means the user's own SQLite file.
    catalog_timeout_seconds : float, default 5
        How long a catalog that does not answer may delay a take.
    project : str, default ""
        The project of takes and searches; empty means the git remote, else the git root, else the folder.
    provenance : str, default "full"
        What takes record of where they came from: ``full``, ``minimal`` (project, git commit, versions of Python and torch) or ``off``.
    provenance_diff : bool, default False
        Record the uncommitted changes of the git repository too.
    provenance_source : bool, default True
        Record the source of the notebook cell that takes.
    schemes : str, default ""
        Schemes that a URL from a catalog may have to be opened besides ``fs``, ``file``, ``s3``, ``s3a``, ``gs`` and ``gcs``, separated by
        commas.
    root : str, default ""
        Where a notebook's snapshots go; empty means ``expstate-snapshots`` beside the notebook.
    undo_budget_bytes : int, default 0
        Host memory for what undo, redo and guarded cells keep; 0 means a tenth of what is available. More goes to the user's cache folder.

    Examples
    --------
    >>> from expstate import settings
    >>> with settings.override(io_threads=2):
    ...     settings.current().io_threads
    2
    """

    memory_budget_bytes: int = 0
    io_threads: int = 0
    data_file_bytes: int = 16 * GIB
    object_file_bytes: int = 16 * MIB
    retry_seconds: float = 60.0
    transport: str = ""
    direct_io: bool = True
    staging_idle_seconds: float = 60.0
    device_staging_bytes: int | None = None
    progress: bool | None = None
    progress_delay_seconds: float = 2.0
    catalog: str = dataclasses.field(default="", repr=False)  # a URL may hold a password
    catalog_timeout_seconds: float = 5.0
    project: str = ""
    provenance: str = "full"
    provenance_diff: bool = False
    provenance_source: bool = True
    schemes: str = ""
    root: str = ""
    undo_budget_bytes: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not value >= 0:  # NaN is not
                msg = f"setting {field.name} must be a number that is not negative, got {value}"
                raise InvalidSettingError(msg)
        for name in ("data_file_bytes", "object_file_bytes"):
            if getattr(self, name) < MIB:
                msg = f"setting {name} must be at least 1 MiB, got {getattr(self, name)}"
                raise InvalidSettingError(msg)
        if self.transport not in TRANSPORTS:
            msg = f"setting transport must be one of {', '.join(filter(None, TRANSPORTS))}, or empty, got {self.transport!r}"
            raise InvalidSettingError(msg)
        if self.project == "*":
            msg = "setting project must name one project, got '*', which stands for all of them"
            raise InvalidSettingError(msg)
        if self.provenance not in PROVENANCE_LEVELS:
            msg = f"setting provenance must be one of {', '.join(PROVENANCE_LEVELS)}, got {self.provenance!r}"
            raise InvalidSettingError(msg)

    @property
    def thread_count(self) -> int:
        """``io_threads``, with its default worked out for this machine."""
        return self.io_threads or max(4, min(16, 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 8))


_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def _parse(variable: str, text: str, annotation: str) -> Any:
    if annotation == "str":
        return text
    try:
        if annotation.startswith("int"):
            return int(text)
        if annotation == "float":
            return float(text)
    except ValueError:
        msg = f"{variable} must be a number, got {text!r}"
        raise InvalidSettingError(msg) from None
    if text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    msg = f"{variable} must be 1 or 0, got {text!r}"
    raise InvalidSettingError(msg)


def from_environment() -> Settings:
    """The settings as the environment has them now."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        variable = f"EXPSTATE_{field.name.upper()}"
        text = os.environ.get(variable, "").strip()
        if text:
            values[field.name] = _parse(variable, text, str(field.type))
    return Settings(**values)


_overridden: ContextVar[Settings | None] = ContextVar("expstate_settings", default=None)


def current() -> Settings:
    """The settings in force here: those of the innermost ``override``, else the environment's."""
    return _overridden.get() or from_environment()


@contextlib.contextmanager
def override(**changes: Any) -> Iterator[Settings]:
    """Change settings inside a ``with`` block, in this context only.

    Parameters
    ----------
    **changes
        Fields of ``Settings``.

    Raises
    ------
    InvalidSettingError
        If a field does not exist or a value is out of range.
    """
    try:
        changed = dataclasses.replace(current(), **changes)
    except TypeError as error:
        raise InvalidSettingError(str(error)) from None
    token = _overridden.set(changed)
    try:
        yield changed
    finally:
        _overridden.reset(token)
