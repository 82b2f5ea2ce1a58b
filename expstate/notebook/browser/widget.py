"""The widget: messages of the page in, answers out; takes, restores and edits that happen elsewhere appear by themselves.

A message is ``{"ask": name, "number": text, ...arguments}``; the answer has the same number and ``result``, ``error`` or
``cancelled``. Work may tell ``done`` and ``total`` bytes, or ``text``, before that, and is stopped by
``{"ask": "cancel", "number": text}``. ``{"event": ...}`` goes to the page unasked.
"""

from __future__ import annotations

import contextlib
import contextvars
import html
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets
from IPython.display import display

from expstate.commands.view import clean_lines
from expstate.errors import ExpstateError, InvalidQueryError
from expstate.notebook.browser import browse, page, texts
from expstate.notebook.browser.asks import Asks
from expstate.notebook.browser.changes import Watcher
from expstate.notebook.browser.jobs import Jobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from expstate.notebook.kernel import Kernel

__all__ = ["Browser", "browse"]

_STATIC = Path(__file__).parent / "static"
_LONGEST_MESSAGE = 2000


class Browser(anywidget.AnyWidget):
    """The snapshots of a catalog, to look at, compare and put back; made by ``browse``.

    Parameters
    ----------
    kernel : Kernel
        Whose live state and catalog it is.
    query : str, default ""
        What it shows at first.
    project : str, optional
        Another project than the current one; ``"*"`` for all.

    Attributes
    ----------
    query : str
        What it shows.
    selected : list of str
        Ids of the snapshots that are selected.
    static_class : str
        The class of the table that stands in its place where it does not live.
    """

    _esm = _STATIC / "browser.js"
    _css = _STATIC / "browser.css"
    query = traitlets.Unicode("").tag(sync=True)
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)
    static_class = traitlets.Unicode().tag(sync=True)

    def __init__(self, kernel: Kernel, query: str = "", project: str | None = None) -> None:
        self._kernel = kernel
        self._context = contextvars.copy_context()
        self._asks = Asks(kernel, project)
        self._jobs = Jobs(lambda number, message: self.send({"number": number, **message}), _failure)
        super().__init__(query=query, static_class=f"expstate-static-{uuid.uuid4().hex}")
        self.on_msg(self._receive)
        self._watcher = Watcher(kernel.catalog, self._changed)
        self._leave = [kernel.on_change(self._changed)]
        self._leave += [self._listen("pre_run_cell", busy=True), self._listen("post_run_cell", busy=False)]

    def close(self) -> None:
        """End it: work stops, and nothing is listened to any more."""
        if getattr(self, "_leave", None):
            self._watcher.stop()
            self._jobs.cancel_all()
            for leave in self._leave:
                leave()
            self._leave = []
        super().close()

    # Messages

    def _receive(self, _: Any, message: Any, __: Any) -> None:
        """A message of the page, in whichever thread the front end has it handled; settings are those in force when the widget was made."""
        if isinstance(message, dict):
            self._context.copy().run(self._answer, dict(message))

    def _answer(self, arguments: dict[str, Any]) -> None:
        name, number = str(arguments.pop("ask", "")), str(arguments.pop("number", ""))
        if name == "hello":
            self._watcher.start()
            self.send({"number": number, "result": self._state()})
        elif name == "cancel":
            self._jobs.cancel(number)
        elif name in self._asks.quick:
            try:
                answer = {"result": self._asks.quick[name](**arguments)}
            except Exception as error:  # noqa: BLE001 - shown where it belongs
                answer = {"error": _failure(error)}
            self.send({"number": number, **answer})
        elif name in self._asks.work:
            work = self._asks.work[name]
            self._jobs.start(number, lambda job: work(job, **arguments))
        else:
            self.send({"number": number, "error": {"message": f"there is nothing called {texts.clean(name)!r}", "kind": ""}})

    # What happens elsewhere

    def _listen(self, event: str, *, busy: bool) -> Callable[[], None]:
        """Have the page told when cells begin and end; gives what ends that."""
        events = self._kernel.shell.events

        def told(*_: object) -> None:
            self.send({"event": "state", **self._state(), "busy": busy})

        events.register(event, told)

        def leave() -> None:
            events.unregister(event, told)

        return leave

    def _changed(self) -> None:
        self._asks.table.forget()
        self.send({"event": "changed", **self._state()})

    def _state(self) -> dict[str, Any]:
        kernel = self._kernel
        return {
            "busy": kernel.is_busy,
            "pending": [{"name": take.id[:8], "done": take.done_bytes, "total": take.total_bytes} for take in kernel.pending],
            "failures": [texts.clean(failure, 400) for failure in kernel.failures],
            "can_undo": kernel.can_undo,
            "can_redo": kernel.can_redo,
        }

    # For people

    def __repr__(self) -> str:
        return f"Browser({self.query!r})"

    def _ipython_display_(self, **options: Any) -> None:
        """Show a table of the first snapshots, and the widget, which hides the table as long as it lives.

        They are two outputs because a front end that finds no widget behind an output of that kind says just that, though the output holds
        HTML as well: so is every saved notebook whose kernel is gone.
        """
        show: Any = display
        found: Any = self._repr_mimebundle_(**options)
        data, metadata = found if isinstance(found, tuple) else (found, {})
        show({"text/html": self._static_page(), "text/plain": repr(self)}, raw=True)
        show({**data, "text/plain": "(run the cell to have the browser here)"}, metadata=metadata, raw=True)

    def _static_page(self) -> str:
        """What a saved notebook shows."""
        try:
            found = page.as_html(self._asks.table.search(self.query), self.query)
        except ExpstateError as error:
            found = f"<pre>{html.escape(_failure(error)['message'])}</pre>"
        return f'<div class="{self.static_class}">{found}</div>'


def _failure(error: BaseException) -> dict[str, Any]:
    """An error as the page shows it."""
    text = str(error) if isinstance(error, ExpstateError) else f"{type(error).__name__}: {error}"
    if isinstance(error, InvalidQueryError):
        text = text.split("\n", 1)[0]
    found: dict[str, Any] = {"message": texts.lines(clean_lines(text), _LONGEST_MESSAGE), "kind": type(error).__name__}
    with contextlib.suppress(AttributeError):
        found["position"] = error.position  # type: ignore[attr-defined]
    return found
