"""What a verb is: a row of the table, made of arguments, a call of the library, and ways to show its result.

``Session`` is what a call gets: the catalog and the snapshots that the arguments name.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expstate.catalog.catalog import Catalog
from expstate.catalog.place import package_missing
from expstate.commands.plain import plain
from expstate.errors import CatalogUnavailableError
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from expstate.catalog.model import Record
    from expstate.commands.view import View


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a verb, in argparse's terms; made by ``argument``."""

    flags: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def is_option(self) -> bool:
        """Whether it begins with a dash."""
        return self.flags[0].startswith("-")

    @property
    def name(self) -> str:
        """The attribute that argparse puts it into."""
        found: str = self.options.get("dest") or self.flags[-1].lstrip("-").replace("-", "_")
        return found


def argument(*flags: str, **options: Any) -> Argument:
    """An argument: what ``ArgumentParser.add_argument`` is to be called with."""
    return Argument(flags, options)


CATALOG = argument("--catalog", metavar="URL", help="the catalog: a path or a database URL (default: EXPSTATE_CATALOG, else your own)")
PROJECT = argument("--project", metavar="NAME", help="the project whose names and records are meant (default: that of this folder)")
ALL = argument("--all", action="store_true", help="look in all projects")
JSON = argument("--json", action="store_true", help="print one JSON document")
YES = argument("--yes", "-y", dest="yes", action="store_true", help="do it; without it only what would go is shown")
REF = argument("ref", metavar="REF", help="a snapshot: id or the beginning of one, name, alias, latest, latest~1, path or URL")
EXPECT_DIGEST = argument(
    "--expect-digest", metavar="DIGEST", help="read no other snapshot than the one whose manifest has this digest, whatever lies there"
)


class Session:
    """What a verb works with.

    Parameters
    ----------
    arguments : argparse.Namespace
        As parsed; ``catalog``, ``all`` and ``project`` are looked at.
    program : str, default "expstate"
        What commands begin with that a person is told.
    """

    def __init__(self, arguments: argparse.Namespace, program: str = "expstate") -> None:
        self._url: str | None = getattr(arguments, "catalog", None)
        self._catalog: Catalog | None = None
        self.project: str | None = "*" if getattr(arguments, "all", False) else None
        """All projects, or None for the current one."""
        self.program = program

    @property
    def catalog(self) -> Catalog:
        """The catalog that was named."""
        if self._catalog is None:
            self._catalog = Catalog(self._url)
        return self._catalog

    def record(self, ref: str) -> Record:
        """The record that goes by a ref."""
        try:
            from expstate.catalog import refs  # noqa: PLC0415 - imports SQLAlchemy
        except ImportError as error:
            raise package_missing(error) from None
        return refs.resolve(self.catalog, ref, project=self.project)

    def snapshot(self, ref: str, expect_digest: str | None = None) -> Snapshot:
        """The snapshot that goes by a ref."""
        try:
            return Snapshot.find(ref, catalog=self.catalog, project=self.project, expect_digest=expect_digest)
        except CatalogUnavailableError:
            # Switched off, or a package that it needs is missing: snapshots at paths and URLs are found all the same.
            return Snapshot.find(ref, catalog=self._url, project=self.project, expect_digest=expect_digest)

    def close(self) -> None:
        """Let go of the catalog."""
        if self._catalog is not None:
            self._catalog.close()


def _plain(result: Any, _: argparse.Namespace) -> Any:
    return plain(result)


def _no_trouble(_: Any, __: argparse.Namespace) -> int:
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A row of the table.

    Attributes
    ----------
    name, aliases : str, tuple of str
        What it is called.
    library : str
        The call of the library that it is.
    help, details : str
        What it does, in one line; what else is to be known.
    example : str
        A command that shows it.
    arguments : tuple of Argument
        Its own; ``--catalog``, ``--project`` and ``--json`` come to them.
    call : callable
        Does it: gets the session and the parsed arguments, gives what the library gave.
    show : callable
        Shows that to a person; gets it, the view and the arguments.
    data : callable
        The same as JSON can hold it; gets the result and the arguments.
    status : callable
        The exit status; gets the result and the arguments.
    widens : bool
        Whether it looks in all projects with ``--all``.
    prepare : callable, optional
        Adds arguments itself, for a verb that is a program of its own; it has none of the common ones.
    """

    name: str
    library: str
    help: str
    example: str
    call: Callable[[Session, argparse.Namespace], Any]
    show: Callable[[Any, View, argparse.Namespace], None]
    details: str = ""
    arguments: tuple[Argument, ...] = ()
    aliases: tuple[str, ...] = ()
    data: Callable[[Any, argparse.Namespace], Any] = _plain
    status: Callable[[Any, argparse.Namespace], int] = _no_trouble
    widens: bool = False
    prepare: Callable[[argparse.ArgumentParser], None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.aliases)

    @property
    def common_arguments(self) -> tuple[Argument, ...]:
        """Those that nearly all verbs have."""
        if self.prepare is not None:
            return ()
        return (CATALOG, PROJECT, *((ALL,) if self.widens else ()), JSON)


def command_line(verb: Verb, arguments: argparse.Namespace, program: str, **changes: Any) -> str:
    """The command that gives these arguments to a verb, with some of them changed, as a shell takes it.

    Parameters
    ----------
    verb : Verb
        The verb.
    arguments : argparse.Namespace
        As parsed.
    program : str
        What the command begins with.
    **changes
        Arguments to put in the place of the parsed ones.
    """
    values = vars(arguments) | changes
    named: list[str] = []
    options: list[str] = []
    for item in (*verb.arguments, *verb.common_arguments):
        (options if item.is_option else named).extend(_words(item, values.get(item.name)))
    words = [*named, *options]
    if any(word.startswith("-") for word in named):
        words = [*options, "--", *named]
    return " ".join(map(shlex.quote, [*program.split(), *verb.name.split(), *words]))


def _words(item: Argument, value: Any) -> Iterator[str]:
    if value is None or value is False or value == item.options.get("default", []):
        return
    values = [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    if not item.is_option:
        yield from values
    elif item.options.get("action") == "store_true":
        yield item.flags[0]
    elif item.options.get("action") == "append":
        for one in values:
            yield from (item.flags[0], one)
    else:
        yield from (item.flags[0], *values)


def title(record: Record) -> str:
    """A record in a few words: its name, if it has one, and the beginning of its id."""
    return f"{record.name} ({record.id[:8]})" if record.name else record.id[:8]
