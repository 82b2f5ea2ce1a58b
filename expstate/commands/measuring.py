"""The verb that measures: bench. What it can measure, it says itself; it is a program of its own, also without the catalog's packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate.commands.verb import Verb

if TYPE_CHECKING:
    import argparse

    from expstate.commands.verb import Session
    from expstate.commands.view import View


def _prepare(parser: argparse.ArgumentParser) -> None:
    from expstate.bench import options  # noqa: PLC0415 - a verb's modules are imported with the parser or later, not with the table

    options.add_arguments(parser)


def _bench(session: Session, arguments: argparse.Namespace) -> int:
    from expstate.bench import run  # noqa: PLC0415 - as above

    del session
    return run.main(arguments.parser, arguments)


def _show(status: int, view: View, arguments: argparse.Namespace) -> None:
    """It has shown its table itself."""
    del status, view, arguments


VERBS = (
    Verb(
        name="bench",
        library="expstate.bench",
        help="Measure takes, restores and searches beside other libraries.",
        details="Beside the limits of this machine too, in turn, each in a fresh process. Prints progress to stderr, a table to stdout.",
        example="expstate bench . --gib 0.01 --repeat 1 --operations take --systems limit expstate",
        call=_bench,
        show=_show,
        status=lambda status, _: status,
        prepare=_prepare,
    ),
)
