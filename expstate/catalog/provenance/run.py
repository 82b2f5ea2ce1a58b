"""How the process was called: the command line, or the notebook with its cell. Looked at in the thread that takes.

IPython is not imported: if the process has it, it is there already.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from expstate.catalog.provenance import redact

_LONGEST_SOURCE = 64 * 1024
_LONGEST_ARGV = 16 * 1024


def look(*, source: bool) -> dict[str, Any]:
    """What only the thread that takes can see; may hold secrets.

    Parameters
    ----------
    source : bool
        Whether the source of the cell is wanted.
    """
    shell = _shell()
    if shell is None:
        return {"argv": list(sys.argv)}
    parent = _parent(shell)
    names = getattr(shell, "user_ns", {})
    path = names.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME")
    found: dict[str, Any] = {
        "notebook": path if isinstance(path, str) else None,
        "cell": _part(parent, "metadata", "cellId"),
        "execution_count": getattr(shell, "execution_count", None),
    }
    if not hasattr(shell, "kernel"):
        found["argv"] = list(sys.argv)
    if source:
        found["source"] = _part(parent, "content", "code") or _last_input(shell)
    return {name: value for name, value in found.items() if value is not None}


def without_secrets(found: dict[str, Any]) -> dict[str, Any]:
    """The same as it may be recorded."""
    found = dict(found)
    if "argv" in found:
        found["argv"] = _short(redact.argv(map(str, found["argv"])))
    if isinstance(found.get("source"), str):
        # A secret that the cut would go through is seen whole; what comes long after it is not looked at.
        found["source"] = redact.text(found["source"][: 2 * _LONGEST_SOURCE])[:_LONGEST_SOURCE]
    return found


def _short(items: list[str]) -> list[str]:
    room = _LONGEST_ARGV
    for number, item in enumerate(items):
        room -= len(item)
        if room < 0:
            return [*items[:number], f"... {len(items) - number} more"]
    return items


def _shell() -> Any:
    module = sys.modules.get("IPython")
    get = getattr(module, "get_ipython", None)
    return None if get is None else get()


def _parent(shell: Any) -> Any:
    """The message that asked the kernel to run the cell."""
    get = getattr(getattr(shell, "kernel", None), "get_parent", None)
    return None if get is None else get()


def _part(message: Any, *names: str) -> str | None:
    for name in names:
        message = message.get(name) if isinstance(message, dict) else None
    return message if isinstance(message, str) and message else None


def _last_input(shell: Any) -> str | None:
    inputs = getattr(getattr(shell, "history_manager", None), "input_hist_raw", None)
    return inputs[-1] if isinstance(inputs, list) and inputs and isinstance(inputs[-1], str) else None
