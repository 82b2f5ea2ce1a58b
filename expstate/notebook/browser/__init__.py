"""The browser: a widget that shows the catalog's snapshots, what is in them and how they differ, and puts them back.

``widget`` is the face: it gets messages of the page (``static/browser.js``), which ``asks`` hands to the module that has the topic.
``data`` answers what the table asks; ``overview``, ``entries``, ``card`` and ``difference`` what the right side shows. ``putting`` is what
the restore panel does, ``edits`` what people add and take away. ``jobs`` runs what takes long, ``changes`` notices what others do, and
``page`` is the table of a saved notebook. Texts leave here as the page may show them: on one line, without invisible characters; the page
sets them as text and never as markup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate.errors import NotInNotebookError

if TYPE_CHECKING:
    from expstate.notebook.browser.widget import Browser


def browse(query: str | None = None, *, project: str | None = None) -> Browser:
    """The browser of snapshots, as a widget; the last line of a cell shows it.

    Parameters
    ----------
    query : str, optional
        What it shows at first, such as ``"loss < 0.1"``.
    project : str, optional
        Another project than the current one; ``"*"`` for all.

    Raises
    ------
    NotInNotebookError
        If ``%load_ext expstate`` was not run, or the packages for widgets are missing.
    CatalogUnavailableError
        If the catalog is switched off.
    """
    from expstate.notebook.kernel import current  # noqa: PLC0415 - what follows takes 0.3 s to import

    kernel = current()
    try:
        from expstate.notebook.browser.widget import Browser  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        if error.name not in {"anywidget", "ipywidgets", "traitlets"}:
            raise
        msg = f"the browser needs the package {error.name}: pip install 'expstate[notebook]'"
        raise NotInNotebookError(msg) from None
    return Browser(kernel, query or "", project)
