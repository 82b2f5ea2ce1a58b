"""The parser: argparse's, made of the table of verbs.

A notebook's magic gives a parser class of its own; the verbs, their arguments and their help are the same.
"""

from __future__ import annotations

import argparse
import itertools
import re
import textwrap
from typing import TYPE_CHECKING

from expstate.commands.table import VERBS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from expstate.commands.verb import Verb

DESCRIPTION = "Keep the state of PyTorch experiments: find the snapshots that were taken, compare them, read, export and throw them away."
EPILOG = """\
A REF names a snapshot: the beginning of its id (4 digits or more), its name, an alias, latest, latest~1 (the one before), a path
or a URL. Names, aliases and latest are those of the project of this folder, or of --project NAME.

delete, prune and gc only show what would go, until you say --yes.

exit status:
  0    done
  1    it failed; or there is what verify or check look for; or prune could not delete all; or, with diff --exit-code, a difference
  2    the command line was not understood
  130  interrupted
  141  nobody reads the output any more

With --json one JSON document is printed on stdout: the result, or {"error": MESSAGE, "type": CLASS} when it failed. Times are
ISO 8601 in UTC; floats that JSON has not are the texts "nan", "inf" and "-inf", and whole numbers of thousands of digits texts such as
"0x1f". Messages for people go to stderr.
"""


_STATUS = re.compile(r"  \d+ +")
"""What comes before the meaning of an exit status."""


class _Formatter(argparse.HelpFormatter):
    """Folds paragraphs, leaves what is indented as it is, and has room for the longest option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        self._action_max_length += 2  # verbs are indented once more, which argparse does not count

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_table, group in itertools.groupby(text.splitlines(), lambda line: line[:1].isspace()):
            for line in group if is_table else _paragraphs(group):
                status = _STATUS.match(line)
                if is_table and not status:
                    lines.append(indent + line)  # a command, to be copied
                    continue
                hanging = " " * len(status[0]) if status else ""
                lines += textwrap.wrap(line, width, initial_indent=indent, subsequent_indent=indent + hanging) or [""]
        return "\n".join(lines)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Lines that follow each other as one; an empty one stays."""
    for has_text, group in itertools.groupby(lines, bool):
        joined = " ".join(group)
        yield joined if has_text else ""


def build_parser(
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
    program: str = "expstate",
    table: Sequence[Verb] = VERBS,
    epilog: str = EPILOG,
) -> argparse.ArgumentParser:
    """A parser of verbs.

    Parameters
    ----------
    parser_class : type, default argparse.ArgumentParser
        What the parser and those of its verbs are made of.
    program : str, default "expstate"
        What a command begins with.
    table : sequence of Verb, optional
        The verbs; default those of the command line.
    epilog : str, optional
        What else help says.

    Returns
    -------
    argparse.ArgumentParser
        What it parses has the verb's name in ``verb``; None if there was none.

    Examples
    --------
    >>> build_parser().parse_args(["list", "loss < 0.2", "--limit", "3"]).limit
    3
    """
    parser = parser_class(prog=program, description=DESCRIPTION, epilog=epilog, formatter_class=_Formatter)
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", title="verbs", parser_class=parser_class)
    for verb in table:
        _add(verbs, verb)
    parser.set_defaults(verb=None)
    return parser


def help_of(parser: argparse.ArgumentParser, name: str) -> str:
    """The help of one verb of a parser that ``build_parser`` made.

    >>> help_of(build_parser(), "pin").splitlines()[0]
    'usage: expstate pin [-h] [--catalog URL] [--project NAME] [--json] REF'
    """
    (verbs,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001 - argparse has no other way
    text: str = verbs.choices[name].format_help()
    return text


def _add(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: Verb) -> None:
    help_text = verb.help[0].lower() + verb.help[1:].rstrip(".")
    parser = verbs.add_parser(
        verb.name,
        aliases=list(verb.aliases),
        help=help_text,
        description=f"{verb.help} {verb.details}".strip(),
        epilog=f"example:\n  {verb.example}",
        formatter_class=_Formatter,
    )
    for item in verb.arguments:
        parser.add_argument(*item.flags, **item.options)
    if verb.common_arguments:
        common = parser.add_argument_group("common options")
        for item in verb.common_arguments:
            common.add_argument(*item.flags, **item.options)
    if verb.prepare is not None:
        verb.prepare(parser)
    # Under its name, also if it was called by another.
    parser.set_defaults(verb=verb.name, parser=parser)
