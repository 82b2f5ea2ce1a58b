"""``expstate ...``: the command line.

Gets the arguments, hands them to the module of the verb, and returns the exit status. A verb's modules are imported when it is asked for.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from expstate.bench import run as bench

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

    Examples
    --------
    >>> from expstate.cli import main
    >>> main([])  # doctest: +ELLIPSIS
    usage: expstate ...
    """
    parser = argparse.ArgumentParser(prog="expstate", description="Keep the state of PyTorch experiments.")
    verbs = parser.add_subparsers(metavar="VERB")
    verb = verbs.add_parser(
        "bench", help="measure take and restore beside the machine's limits and other libraries", description=bench.DESCRIPTION
    )
    bench.add_arguments(verb)
    verb.set_defaults(run=lambda arguments: bench.main(verb, arguments))
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help()
        return 0
    status: int = arguments.run(arguments)
    return status
