"""The notebook's verbs, in the form of the command line's: those that take, put back, guard and compare live state, and all the others.

Gets parsed arguments and the kernel; hands on what the library gives. ``TABLE`` is what the parser of the magic is made of.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from expstate.commands.table import VERBS
from expstate.commands.verb import ALL, Argument, Session, Verb, argument
from expstate.errors import InvalidArgumentError, RefNotFoundError
from expstate.notebook import results
from expstate.notebook.kernel import LIVE, Kernel

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.records import Records
    from expstate.commands.view import View
    from expstate.diff.report import SnapshotDiff
    from expstate.pending import PendingSnapshot
    from expstate.snapshot import Snapshot

PROGRAM = "%snapshot"
CELL_VERBS = ("take", "guard")
"""Verbs that may stand above a cell."""

_SHOWN = 50


class NotebookSession(Session):
    """What a verb works with in a notebook: the kernel besides the catalog.

    Parameters
    ----------
    kernel : Kernel
        Of this process.
    arguments : argparse.Namespace
        As parsed.
    """

    def __init__(self, kernel: Kernel, arguments: argparse.Namespace) -> None:
        super().__init__(arguments, PROGRAM)
        self.kernel = kernel

    @property
    def catalog(self) -> Catalog:
        return self.kernel.catalog if self._url is None else super().catalog


def kernel_of(session: Session) -> Kernel:
    """The kernel of a session that has one."""
    assert isinstance(session, NotebookSession)
    return session.kernel


def evaluate(kernel: Kernel, expression: str) -> Any:
    """The value of an expression in the user's namespace.

    Raises
    ------
    InvalidArgumentError
        If it cannot be evaluated.
    """
    try:
        return eval(expression, kernel.namespace)  # noqa: S307 - what a person typed in their own notebook
    except Exception as error:
        msg = f"{expression!r} cannot be evaluated: {type(error).__name__}: {error}"
        raise InvalidArgumentError(msg) from error


def _values(kernel: Kernel, given: Sequence[str] | None) -> dict[str, Any]:
    """What ``NAME`` and ``NAME=EXPR`` say."""
    found = {}
    for text in given or ():
        name, equals, expression = text.partition("=")
        found[name] = evaluate(kernel, expression if equals else name)
    return found


# take, guard


def take(kernel: Kernel, arguments: argparse.Namespace, **more: Any) -> PendingSnapshot | Snapshot:
    """Take what the arguments say; ``more`` are params besides those that were given."""
    return kernel.take(
        arguments.names,
        note=arguments.note,
        tags=arguments.tag or (),
        metrics=_values(kernel, arguments.metric),
        params=more | _values(kernel, arguments.param),
        step=None if arguments.step is None else evaluate(kernel, arguments.step),
        name=arguments.name,
        alias=arguments.alias,
        to=arguments.to,
        base=_base(arguments),
        wait=True if arguments.wait else None,
    )


def _base(arguments: argparse.Namespace) -> str | None:
    if not arguments.full:
        return "auto" if arguments.base is None else str(arguments.base)
    if arguments.base is not None:
        msg = "--full takes everything, --base REF what has changed since: only one of them can be meant"
        raise InvalidArgumentError(msg)
    return None


def _take(session: Session, arguments: argparse.Namespace) -> PendingSnapshot | Snapshot:
    if arguments.before or arguments.both:
        msg = "--before and --both are for a cell under `%%snapshot take`"
        raise InvalidArgumentError(msg)
    return take(kernel_of(session), arguments)


def _guard(session: Session, arguments: argparse.Namespace) -> None:
    del session, arguments
    msg = "guard stands above a cell, as `%%snapshot guard model optimizer`"
    raise InvalidArgumentError(msg)


# use, status, wait


def _use(session: Session, arguments: argparse.Namespace) -> results.Place:
    options = {}
    for text in arguments.option or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            msg = f"an option is NAME=VALUE, got {text!r}"
            raise InvalidArgumentError(msg)
        options[name] = value
    return results.Place(kernel_of(session).place.use(arguments.url, options))


def _wait(session: Session, arguments: argparse.Namespace) -> results.Help:
    del arguments
    kernel = kernel_of(session)
    found = kernel.wait()
    return results.Help(f"{results.several(found)} committed" if found else "no take goes on")


def _watch(session: Session, arguments: argparse.Namespace) -> results.Help:
    watcher = kernel_of(session).watcher
    if arguments.off:
        return results.Help(watcher.stop())
    if arguments.every is None:
        msg = "say how often, by --every 10m, --every 50steps or --every cell; or --off to watch no more"
        raise InvalidArgumentError(msg)
    return results.Help(watcher.start(arguments.names, arguments.every, arguments.keep_last))


# list, show, diff


def _list(session: Session, arguments: argparse.Namespace) -> Records:
    query = " ".join(arguments.query) or None
    found = session.catalog.search(query, project=session.project, sort=arguments.sort)
    return found[: _SHOWN if arguments.limit is None else arguments.limit] if arguments.limit != 0 else found


def _show(session: Session, arguments: argparse.Namespace) -> Any:
    ref, slash, rest = arguments.ref.partition("/")
    is_path = not ref or ref in {".", "..", "~"} or "://" in arguments.ref
    if slash and not is_path:
        arguments.ref, arguments.glob = ref, rest if "/" in rest or "*" in rest else f"{rest}/*"
    return _of("show").call(session, arguments)


def _diff(session: Session, arguments: argparse.Namespace) -> SnapshotDiff:
    kernel = kernel_of(session)
    names, other = list(arguments.names), arguments.other
    options = {"stats": arguments.stats, "content": arguments.content}
    try:
        found = kernel.diff(arguments.ref, other, names, **options)
    except RefNotFoundError:
        if other == LIVE or other not in kernel.namespace:
            raise
        # No snapshot goes by it, and an object does: it is the first of the names.
        found = kernel.diff(arguments.ref, LIVE, [other, *names], **options)
    return found if arguments.top is None else found.showing(arguments.top)


# restore, undo, redo


def _restore(session: Session, arguments: argparse.Namespace) -> results.Restored:
    return kernel_of(session).restore(
        arguments.ref,
        arguments.names,
        include=arguments.include,
        exclude=arguments.exclude,
        strict=not arguments.no_strict,
        cast=arguments.cast,
        atomic=arguments.atomic,
        trust=arguments.trust,
        rng=True if arguments.rng else None,
        dry_run=arguments.dry_run,
        undo=not arguments.no_undo,
    )


# browse, help


def _browse(session: Session, arguments: argparse.Namespace) -> Any:
    from expstate.notebook.browser import browse  # noqa: PLC0415 - ipywidgets takes 0.3 s to import, and is optional

    del session
    return browse(" ".join(arguments.query) or None)


def _nothing(result: Any, view: View, arguments: argparse.Namespace) -> None:
    """Results of the notebook show themselves."""
    del arguments
    view.text(str(result))


def _verb(
    name: str, call: Callable[[Session, argparse.Namespace], Any], help_: str, example: str, *arguments: Argument, **more: Any
) -> Verb:
    return Verb(
        name=name,
        library=f"kernel.{name}",
        help=help_,
        example=f"{PROGRAM} {example}",
        call=call,
        show=_nothing,
        arguments=arguments,
        prepare=lambda _: None,
        **more,
    )


_NAMES = argument("names", nargs="*", metavar="NAME", help="names of objects, or dotted paths (default: those of the last take here)")
_REF = argument("ref", metavar="REF", help="a snapshot: latest, latest~1, an alias, a name, the beginning of an id, a path")
_YES = argument("-y", "--yes", dest="yes", action="store_true", help="though the state was changed since")
_QUERY = argument("query", nargs="*", metavar="QUERY", help="such as loss < 0.2 and not tag = broken")

OWN: tuple[Verb, ...] = (
    _verb(
        "take",
        _take,
        "Take a snapshot of objects, and of the random generators.",
        "take model optimizer --metric loss --step epoch",
        _NAMES,
        argument("-m", "--note", metavar="NOTE", help="a note"),
        argument("-t", "--tag", action="append", metavar="TAG", help="a tag; may be given again"),
        argument("--metric", action="append", metavar="NAME[=EXPR]", help="a metric, of this name or with this value"),
        argument("--param", action="append", metavar="NAME[=EXPR]", help="a param likewise"),
        argument("--step", metavar="EXPR", help="the step of the training"),
        argument("--name", metavar="N", help="a name for the snapshot"),
        argument("--alias", metavar="A", help="an alias, which moves to it"),
        argument("--to", metavar="URL", help="where to (default: a new folder beside the notebook)"),
        argument("--base", metavar="REF", help="write only what has changed since this one (default: the last of the same names)"),
        argument("--full", action="store_true", help="write everything, as plain safetensors files with all names in them"),
        argument("--wait", action="store_true", help="wait until it is committed"),
        argument("--before", action="store_true", help="above a cell: before it runs"),
        argument("--both", action="store_true", help="above a cell: before and after"),
        details="Above a cell, as %%snapshot take, the cell is run first; if it raises, nothing is taken.",
    ),
    _verb(
        "guard",
        _guard,
        "Run a cell; if it raises, put everything named back as it was.",
        "guard model optimizer",
        _NAMES,
        details="It stands above a cell, as %%snapshot guard.",
    ),
    _verb(
        "use",
        _use,
        "Say where snapshots go from now on.",
        "use runs",
        argument("url", metavar="URL", help="a path or URL"),
        argument("--option", action="append", metavar="NAME=VALUE", help="what the storage needs; no secrets"),
    ),
    _verb(
        "list",
        _list,
        "List snapshots, newest first, or those that a query finds.",
        "list accuracy > 0.9 --sort loss -n 5",
        _QUERY,
        argument("-n", "--limit", type=int, metavar="N", help=f"most snapshots; 0 for all (default: {_SHOWN})"),
        argument("--sort", metavar="KEY[:desc]", help="a field, metric or param"),
        ALL,
    ),
    _verb("status", lambda session, _: kernel_of(session).status(), "Tell what has changed since the last take here.", "status"),
    _verb(
        "diff",
        _diff,
        "Compare a snapshot with live state, or two snapshots.",
        "diff latest model",
        _REF,
        argument("other", nargs="?", default=LIVE, metavar="B", help="the newer side (default: live)"),
        argument("names", nargs="*", metavar="NAME", help="what to compare (default: all that both have)"),
        argument("--stats", action="store_true", help="read the tensors that changed, and tell how far"),
        argument("--content", action="store_true", help="read tensors that are only cut otherwise"),
        argument("--top", type=int, metavar="N", help="list so many entries, those that changed most first"),
    ),
    _verb(
        "restore",
        _restore,
        "Put back what a snapshot holds.",
        "restore latest model",
        _REF,
        argument("names", nargs="*", metavar="NAME", help="what to put back (default: all that is in it)"),
        argument("--include", action="append", metavar="GLOB", help="only entries that match"),
        argument("--exclude", action="append", metavar="GLOB", help="not entries that match"),
        argument("-n", "--dry-run", action="store_true", help="only tell what would be done"),
        argument("--no-strict", action="store_true", help="though names are missing on either side"),
        argument("--cast", action="store_true", help="convert where the dtype differs"),
        argument("--atomic", action="store_true", help="read and check everything before anything changes"),
        argument("--trust", action="store_true", help="objects that need pickle may run code"),
        argument("--rng", action="store_true", help="random generators too, though names are given"),
        argument("--no-undo", action="store_true", help="keep no copy of what is overwritten"),
    ),
    _verb(
        "undo",
        lambda session, arguments: kernel_of(session).undo(force=arguments.yes),
        "Take the last restore back.",
        "undo",
        _YES,
    ),
    _verb(
        "redo",
        lambda session, arguments: kernel_of(session).redo(force=arguments.yes),
        "Take the last undo back.",
        "redo",
        _YES,
    ),
    _verb(
        "watch",
        _watch,
        "Take by itself: every so often, or after every cell that succeeds.",
        "watch model optimizer --every 50steps --keep-last 3",
        _NAMES,
        argument("--every", metavar="RHYTHM", help="a time such as 10m, steps such as 50steps, or cell"),
        argument("--keep-last", type=int, metavar="N", help="remove older takes of this watch that have no tag, alias or pin"),
        argument("--off", action="store_true", help="watch no more"),
        details=(
            "What is due is taken at the end of the next step of the first optimizer that is named, or at the end of the cell. "
            "Steps are those of that optimizer. One thing is watched at a time."
        ),
    ),
    _verb("browse", _browse, "Open the browser of snapshots.", "browse tag = ablation", _QUERY),
    _verb("wait", _wait, "Wait until all takes are committed.", "wait"),
)
"""Those that need a notebook."""


def _of(name: str) -> Verb:
    return next(verb for verb in VERBS if verb.name == name)


def _adapted(verb: Verb) -> Verb:
    """A verb of the command line as the magic has it."""
    changes: dict[str, Any] = {"example": verb.example.replace("expstate ", f"{PROGRAM} ", 1)}
    if verb.name == "show":
        changes |= {
            "arguments": (argument("ref", metavar="REF[/KEY[/GLOB]]", help="a snapshot, or some of its entries"), _GLOB),
            "call": _show,
        }
    if verb.name == "log":
        changes["arguments"] = (argument("ref", nargs="?", default="latest", metavar="REF", help="a snapshot (default: latest)"),)
    return dataclasses.replace(verb, **changes)


_GLOB = next(item for item in _of("show").arguments if item.name == "glob")
_REPLACED: Mapping[str, Verb] = {verb.name: verb for verb in OWN}
TABLE: tuple[Verb, ...] = (*OWN, *(_adapted(verb) for verb in VERBS if verb.name not in _REPLACED and verb.name != "bench"))
"""All verbs of the magic."""


def verb_of(name: str) -> Verb:
    """The verb of this name."""
    return next(verb for verb in TABLE if verb.name == name)
