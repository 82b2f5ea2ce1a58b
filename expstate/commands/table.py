"""The table: every verb once, in the order in which help lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate.commands import finding, keeping, marking, measuring, reading

if TYPE_CHECKING:
    from expstate.commands.verb import Verb

VERBS: tuple[Verb, ...] = (*finding.VERBS, *reading.VERBS, *marking.VERBS, *keeping.VERBS, *measuring.VERBS)
"""All verbs."""


def verb_of(name: str) -> Verb:
    """The verb of this name.

    >>> verb_of("list").library
    'catalog.search'
    """
    return next(verb for verb in VERBS if verb.name == name)
