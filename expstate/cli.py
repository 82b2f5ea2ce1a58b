"""``expstate ...``: the command line.

Gets the arguments, hands them to the verb that they name, and returns the exit status. A verb's modules are imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from expstate import commands

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process if not given.

    Returns
    -------
    int
        The exit status.

    Raises
    ------
    SystemExit
        With status 2 if the arguments are not understood; with 0 after ``--help``.

    Examples
    --------
    >>> from expstate.cli import main
    >>> main([])  # doctest: +ELLIPSIS
    usage: expstate ...
    """
    parser = commands.build_parser()
    arguments = parser.parse_args(argv)
    if arguments.verb is None:
        parser.print_help()
        return 0
    return commands.run(arguments)
