"""``python3 -m expstate.bench PATH``: the benchmark as a program of its own.

Gets the command line and hands it to ``run``.
"""

from __future__ import annotations

import argparse
import sys

from expstate.bench import options, run


def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m expstate.bench", description=options.DESCRIPTION)
    options.add_arguments(parser)
    return run.main(parser, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
