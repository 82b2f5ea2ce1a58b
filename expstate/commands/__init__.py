"""The verbs of expstate, in one table, for the command line and for notebooks.

``VERBS`` says of each what it takes, which call of the library it is and how its result is shown; ``build_parser`` makes an argparse parser
of it; ``run`` performs what was parsed. What a verb needs is imported when it is called.
"""

from expstate.commands.parser import build_parser
from expstate.commands.run import run
from expstate.commands.table import VERBS
from expstate.commands.verb import Session, Verb

__all__ = ["VERBS", "Session", "Verb", "build_parser", "run"]
