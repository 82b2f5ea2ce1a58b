"""``%load_ext expstate`` and ``%unload_ext expstate``: the magic is registered, and what a dead kernel left is told.

Nothing here imports SQLAlchemy or ipywidgets.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expstate.engine.collect import gc
from expstate.engine.report import counted
from expstate.errors import ExpstateError
from expstate.notebook import complete, place
from expstate.notebook.kernel import Kernel, current, set_current
from expstate.notebook.undo import clean_leftovers

if TYPE_CHECKING:
    from collections.abc import Callable

_after_cell: list[Callable[..., None]] = []
_completion: list[Callable[[], None]] = []


def load(shell: Any) -> None:
    """Register the magic in a shell."""
    from expstate.notebook.magic import SnapshotMagics  # noqa: PLC0415 - needs IPython

    unload(shell)
    kernel = Kernel(shell)
    set_current(kernel)
    kernel.turns.watch()
    shell.register_magics(SnapshotMagics(kernel))

    def tell(*_: object) -> None:
        for failure in kernel.take_failures():
            kernel.say(failure)

    shell.events.register("post_run_cell", tell)
    _after_cell.append(tell)
    _completion.append(complete.register(kernel))
    for text in (place.notice(), _leftovers(kernel), _kept_by_dead()):
        if text is not None:
            kernel.say(text)


def unload(shell: Any) -> None:
    """Take the magic away again."""
    with contextlib.suppress(ExpstateError):
        current().watcher.stop()
        current().turns.leave()
    while _after_cell:
        shell.events.unregister("post_run_cell", _after_cell.pop())
    while _completion:
        _completion.pop()()
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("snapshot", None)
    set_current(None)


def _leftovers(kernel: Kernel) -> str | None:
    """What takes that were killed have left in the kernel's place."""
    root = kernel.place.root
    if "://" in root or not Path(root).is_dir():
        return None
    try:
        found = gc(root, dry_run=True).removed
    except (ExpstateError, OSError):
        return None
    if not found:
        return None
    takes = counted(len(found), "take")
    return f"{takes} in {root!r} did not come to an end and left no snapshot; `%snapshot gc {root} -y` removes the files"


def _kept_by_dead() -> str | None:
    """Remove what kernels that were killed had kept on disk for an undo; nobody can use it any more."""
    try:
        removed = clean_leftovers()
    except OSError:
        return None
    return f"removed {counted(len(removed), 'copy')} that kernels that were killed had kept on disk for an undo" if removed else None
