"""``python3 -m expstate``: the command line without an installed script.

Gets the arguments and hands them to ``cli``.
"""

from __future__ import annotations

import sys

from expstate.cli import main

if __name__ == "__main__":
    sys.exit(main())
