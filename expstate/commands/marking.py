"""The verbs by which people add to a snapshot: tag, alias, pin, note, metric, and their opposites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate.commands.texts import joined, value_text
from expstate.commands.verb import REF, Verb, argument, title

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from expstate.catalog.model import Record
    from expstate.commands.view import View


def number(text: str) -> int | float:
    """A whole number as such, any other as a float.

    >>> number("3"), number("0.25"), number("nan")
    (3, 0.25, nan)
    """
    try:
        return int(text)
    except ValueError:
        return float(text)


def _shower(what: Callable[[Record, argparse.Namespace], str]) -> Callable[[Record, View, argparse.Namespace], None]:
    def show(record: Record, view: View, arguments: argparse.Namespace) -> None:
        view.line(f"{title(record)}: {what(record, arguments)}")

    return show


_tags = _shower(lambda record, _: f"tags: {joined(record.tags) or 'none'}")
_aliases = _shower(lambda record, _: f"aliases: {joined(record.aliases) or 'none'}")
_pin = _shower(lambda record, _: "pinned" if record.pinned else "not pinned")
_TAGS = argument("tags", nargs="+", metavar="TAG", help="a word")

VERBS = (
    Verb(
        name="tag",
        library="catalog.tag",
        help="Add tags to a snapshot.",
        example="expstate tag best ablation paper",
        arguments=(REF, _TAGS),
        call=lambda session, arguments: session.catalog.tag(arguments.ref, *arguments.tags),
        show=_tags,
    ),
    Verb(
        name="untag",
        library="catalog.untag",
        help="Take tags away from a snapshot.",
        example="expstate untag best ablation",
        arguments=(REF, _TAGS),
        call=lambda session, arguments: session.catalog.untag(arguments.ref, *arguments.tags),
        show=_tags,
    ),
    Verb(
        name="alias",
        library="catalog.alias",
        help="Give a snapshot an alias; it moves if another had it.",
        example="expstate alias latest newest",
        arguments=(REF, argument("alias", metavar="ALIAS", help="a word that will be a ref")),
        call=lambda session, arguments: session.catalog.alias(arguments.ref, arguments.alias),
        show=_aliases,
    ),
    Verb(
        name="unalias",
        library="catalog.unalias",
        help="Take an alias away from the snapshot that has it.",
        example="expstate unalias newest",
        arguments=(argument("alias", metavar="ALIAS", help="the alias"),),
        call=lambda session, arguments: session.catalog.unalias(arguments.alias),
        show=_aliases,
    ),
    Verb(
        name="pin",
        library="catalog.pin",
        help="Protect a snapshot from deletion.",
        example="expstate pin best",
        arguments=(REF,),
        call=lambda session, arguments: session.catalog.pin(arguments.ref),
        show=_pin,
    ),
    Verb(
        name="unpin",
        library="catalog.unpin",
        help="End the protection of a snapshot.",
        example="expstate unpin best",
        arguments=(REF,),
        call=lambda session, arguments: session.catalog.unpin(arguments.ref),
        show=_pin,
    ),
    Verb(
        name="note",
        library="catalog.note",
        help="Put a note on a snapshot, in the place of the one it has.",
        example='expstate note best "the learning rate was halved here"',
        arguments=(REF, argument("text", metavar="TEXT", help="the note; an empty one takes it away")),
        call=lambda session, arguments: session.catalog.note(arguments.ref, arguments.text),
        show=_shower(lambda record, _: f"note: {record.note or 'none'}"),
    ),
    Verb(
        name="metric",
        library="catalog.log_metric",
        help="Record a value that was measured after the take.",
        example="expstate metric best test_accuracy 0.97",
        arguments=(
            REF,
            argument("metric", metavar="NAME", help="the metric's name; an earlier value is replaced"),
            argument("value", type=number, metavar="VALUE", help="a number; nan and inf are numbers too"),
        ),
        call=lambda session, arguments: session.catalog.log_metric(arguments.ref, arguments.metric, arguments.value),
        show=_shower(lambda record, arguments: f"{arguments.metric} {value_text(record.metrics.get(arguments.metric))}"),
    ),
)
