"""A real IPython kernel in a folder of its own, driven by messages as a front end drives it."""

from __future__ import annotations

import ast
import os
import queue
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import KernelManager
from typing_extensions import Self

_SECONDS = 60


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that must see nothing of the user's, and leave nothing outside of ``folder``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EXPSTATE_", "JUPYTER_", "IPYTHON", "XDG_"))}
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    return kept | {
        "HOME": str(home),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_CONFIG_DIR": str(home / "jupyter"),
        "JUPYTER_DATA_DIR": str(home / "jupyter-data"),
        "JUPYTER_RUNTIME_DIR": str(home / "jupyter-run"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_DATA_HOME": str(home / "data"),
        "EXPSTATE_CATALOG": str(folder / "catalog" / "catalog.db"),
        "EXPSTATE_PROJECT": "tests",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


@dataclass(frozen=True)
class CellError:
    """What a cell has raised, as the front end is told."""

    name: str
    message: str
    traceback: str


@dataclass
class Cell:
    """What a cell has shown so far.

    Attributes
    ----------
    outputs : list of dict
        The outputs of the notebook format, streams joined.
    error : CellError or None
        What it raised.
    execution_count : int or None
        The number in its prompt.
    payload : list of dict
        What the pager was given (``%snapshot?``).
    """

    outputs: list[dict[str, Any]] = field(default_factory=list)
    error: CellError | None = None
    status: str = ""
    execution_count: int | None = None
    payload: list[dict[str, Any]] = field(default_factory=list)

    def stream(self, name: str) -> str:
        return "".join(output["text"] for output in self.outputs if output["output_type"] == "stream" and output["name"] == name)

    @property
    def stdout(self) -> str:
        return self.stream("stdout")

    @property
    def stderr(self) -> str:
        return self.stream("stderr")

    @property
    def displayed(self) -> list[dict[str, str]]:
        """The bundles of the objects that were shown, by media type, the result of the last line last."""
        return [output["data"] for output in self.outputs if "data" in output]

    @property
    def result(self) -> dict[str, str]:
        """The bundle of the value of the last line; empty if it is None."""
        found = [output["data"] for output in self.outputs if output["output_type"] == "execute_result"]
        return found[-1] if found else {}

    @property
    def text(self) -> str:
        """All that a person reads in plain text: streams, objects, the error."""
        parts = [output["text"] if "text" in output else output["data"].get("text/plain", "") for output in self.outputs]
        return "\n".join([*parts, *([f"{self.error.name}: {self.error.message}"] if self.error else [])])

    @property
    def html(self) -> str:
        return "\n".join(bundle.get("text/html", "") for bundle in self.displayed)


class Kernel:
    """A kernel of this Python, working in ``folder``. Not for several threads.

    Each ``run`` is one cell. ``allow_stdin=False`` is what nbconvert, papermill, nbval and Voila send: nobody is there.
    """

    def __init__(self, folder: Path, *, env: dict[str, str] | None = None, work: Path | None = None) -> None:
        self.folder = work or folder / "work"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.env = environment(folder) | (env or {})
        self._manager = KernelManager(kernel_spec_manager=_ThisPython(), connection_file=str(folder / "kernel.json"))
        self._cells: dict[str, Cell] = defaultdict(Cell)
        self._idle: set[str] = set()
        self._replies: dict[str, dict[str, Any]] = {}
        self.messages: list[dict[str, Any]] = []  # all that was published: comms, progress, output of threads after their cell
        self._manager.start_kernel(env=self.env, cwd=str(self.folder))
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=_SECONDS)

    # Cells.

    def start(self, code: str, *, allow_stdin: bool = True, cell_id: str | None = None) -> str:
        """Send a cell and do not wait; gives what ``wait`` is to be asked for."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": allow_stdin,
            "stop_on_error": True,
        }
        metadata = {"cellId": cell_id} if cell_id else {}
        message = self._client.session.msg("execute_request", content, metadata=metadata)
        self._client.shell_channel.send(message)
        identity: str = message["header"]["msg_id"]
        return identity

    def wait(self, identity: str, *, seconds: float = _SECONDS) -> Cell:
        """Wait for the end of a cell that was started."""
        try:
            self._until(lambda: identity in self._idle and identity in self._replies, seconds, "the cell did not end")
        except AssertionError as error:
            msg = f"{error}; it has shown {self._cells[identity].text!r}"
            raise AssertionError(msg) from error
        reply = self._replies[identity]
        cell = self._cells[identity]
        cell.status = reply["status"]
        cell.execution_count = reply.get("execution_count")
        cell.payload = reply.get("payload", [])
        return cell

    def run(self, code: str, *, allow_stdin: bool = True, cell_id: str | None = None, seconds: float = _SECONDS) -> Cell:
        """Run a cell, whatever comes of it."""
        return self.wait(self.start(code, allow_stdin=allow_stdin, cell_id=cell_id), seconds=seconds)

    def do(self, code: str, *, allow_stdin: bool = True, cell_id: str | None = None, seconds: float = _SECONDS) -> Cell:
        """Run a cell that must not fail."""
        cell = self.run(code, allow_stdin=allow_stdin, cell_id=cell_id, seconds=seconds)
        assert cell.error is None, cell.error.traceback
        assert "ok" == cell.status, cell.text
        return cell

    def value(self, expression: str) -> Any:
        """The value of an expression that is a literal: numbers, strings, and what is made of them."""
        # Not a cell: neither the history nor the hooks before and after cells take note of it.
        identity = self._client.execute("", silent=True, user_expressions={"value": expression}, allow_stdin=False)
        self._until(lambda: identity in self._replies, _SECONDS, f"{expression} was not answered")
        answer = self._replies[identity]["user_expressions"]["value"]
        assert "ok" == answer["status"], "\n".join(answer["traceback"])
        return ast.literal_eval(answer["data"]["text/plain"])

    def seen(self, identity: str) -> Cell:
        """What a cell has shown until now; it may still run."""
        self._pump(0)
        return self._cells[identity]

    def until(self, condition: Callable[[], object], *, seconds: float = _SECONDS) -> None:
        """Read what the kernel publishes until ``condition`` holds."""
        self._until(condition, seconds, "the condition did not come to hold")

    # What else a front end asks for.

    def complete(self, code: str, cursor: int | None = None) -> list[str]:
        """What Tab offers."""
        reply = self._ask(self._client.complete(code, len(code) if cursor is None else cursor))
        return list(reply["matches"])

    def inspect(self, code: str) -> str:
        """What Shift-Tab shows, in plain text."""
        reply = self._ask(self._client.inspect(code, len(code)))
        return str(reply["data"].get("text/plain", ""))

    # Its life.

    @property
    def pid(self) -> int:
        return int(self._manager.provisioner.pid)  # type: ignore[union-attr]

    @property
    def is_alive(self) -> bool:
        return bool(self._manager.is_alive())

    def interrupt(self) -> None:
        """The button with the square."""
        self._manager.interrupt_kernel()

    def restart(self, *, now: bool = True) -> None:
        """Restart the kernel: by SIGKILL, or with ``now=False`` by asking first, so that what it does at exit is done."""
        self._manager.restart_kernel(now=now, env=self.env, cwd=str(self.folder))
        self._client.wait_for_ready(timeout=_SECONDS)

    def shutdown(self) -> None:
        """End the kernel by asking, so that what it does at exit is done."""
        self._manager.shutdown_kernel(now=False)

    def close(self) -> None:
        """End it at once, whatever it does."""
        self._client.stop_channels()
        if self._manager.has_kernel:
            self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    # Messages.

    def _ask(self, identity: str) -> dict[str, Any]:
        self._until(lambda: identity in self._replies, _SECONDS, "the request was not answered")
        return self._replies[identity]

    def _until(self, condition: Callable[[], object], seconds: float, complaint: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{complaint} within {seconds} s"
            assert self.is_alive, "the kernel is dead"
            self._pump(0.05)

    def _pump(self, seconds: float) -> None:
        """Take in what has come."""
        for message in _messages(self._client.shell_channel, 0):
            self._replies[message["parent_header"].get("msg_id", "")] = message["content"]
        for message in _messages(self._client.iopub_channel, seconds):
            self.messages.append(message)
            self._publish(message["parent_header"].get("msg_id", ""), message["msg_type"], message["content"])

    def _publish(self, parent: str, kind: str, content: dict[str, Any]) -> None:
        cell = self._cells[parent]
        if kind == "status" and content["execution_state"] == "idle":
            self._idle.add(parent)
        elif kind == "stream":
            last = cell.outputs[-1] if cell.outputs else {}
            if last.get("name") == content["name"]:
                last["text"] += content["text"]
            else:
                cell.outputs.append({"output_type": "stream", "name": content["name"], "text": content["text"]})
        elif kind in {"display_data", "execute_result"}:
            cell.outputs.append({"output_type": kind, "data": content["data"], "transient": content.get("transient", {})})
        elif kind == "update_display_data":
            for output in (output for any_cell in self._cells.values() for output in any_cell.outputs):
                if output.get("transient", {}).get("display_id") == content["transient"]["display_id"]:
                    output["data"] = content["data"]
        elif kind == "clear_output":
            cell.outputs.clear()
        elif kind == "error":
            cell.error = CellError(content["ename"], content["evalue"], "\n".join(content["traceback"]))


class _ThisPython(KernelSpecManager):
    """The kernel is the Python that runs the tests, whatever the user has registered as ``python3``."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python", language="python", interrupt_mode="signal", name=kernel_name)


def _messages(channel: Any, seconds: float) -> list[dict[str, Any]]:
    """All messages that have come, waiting up to ``seconds`` for the first."""
    found = []
    try:
        found.append(channel.get_msg(timeout=seconds))
        while channel.msg_ready():
            found.append(channel.get_msg(timeout=0))
    except queue.Empty:
        pass
    return found
