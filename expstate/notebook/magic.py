"""``%snapshot`` and ``%%snapshot``: a line of verbs, alone or above a cell.

Gets what a person typed; the parser is that of the command line, with the notebook's own verbs. Gives the library's objects, which show
themselves; errors are one line.
"""

from __future__ import annotations

import ast
import inspect
import time
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand, output_can_be_silenced
from IPython.core.magic_arguments import MagicArgumentParser
from IPython.utils._process_common import arg_split

from expstate.commands.parser import build_parser, help_of
from expstate.commands.run import explain
from expstate.errors import CellFailedError, ExpstateError
from expstate.notebook import results, verbs
from expstate.notebook.verbs import CELL_VERBS, PROGRAM, TABLE, NotebookSession

if TYPE_CHECKING:
    import argparse

    from expstate.commands.verb import Verb
    from expstate.notebook.kernel import Kernel

_EPILOG = """\
A REF names a snapshot: latest, latest~1 (the one before), an alias, a name, the beginning of its id (4 digits or more), a path or a
URL. NAMES are those of objects of the notebook, looked up at that moment; without any, those of the last take here are meant.

delete, prune and gc only show what would go, until you say -y.
  %snapshot help VERB        explains a verb
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the magic."""
    return build_parser(MagicArgumentParser, PROGRAM, TABLE, _EPILOG)


@magics_class
class SnapshotMagics(Magics):
    """The magic.

    Parameters
    ----------
    kernel : Kernel
        What it works on.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel.shell)
        self._kernel = kernel
        self._parser = make_parser()
        # IPython shows it for `%snapshot?`.
        type(self).snapshot.__doc__ = self._parser.format_help()

    @output_can_be_silenced
    @no_var_expand
    @line_cell_magic
    def snapshot(self, line: str, cell: str | None = None) -> Any:
        # A semicolon at the end silences the output, which IPython sees to.
        words = arg_split(line.rstrip().removesuffix(";"), posix=True)
        if not words or words[0] in {"help", "--help", "-h"}:
            return results.Help(self._help(words[1:]))
        if len(words) > 1 and words[1] in {"--help", "-h"}:
            return results.Help(self._help(words[:1]))
        arguments = self._parser.parse_args(words)
        verb = verbs.verb_of(arguments.verb)
        try:
            return self._run(verb, arguments, cell)
        except CellFailedError as error:
            raise UsageError(str(error)) from error
        except (ExpstateError, OSError, ImportError) as error:
            message = explain(error, verb)
            if message is None:
                raise
            raise UsageError(message.replace("`expstate ", f"`{PROGRAM} ")) from error

    def _run(self, verb: Verb, arguments: argparse.Namespace, cell: str | None) -> Any:
        if cell is not None:
            return self._above(verb, arguments, cell)
        session = NotebookSession(self._kernel, arguments)
        result = verb.call(session, arguments)
        if getattr(arguments, "json", False):
            return verb.data(result, arguments)
        return (
            result
            if result is None or hasattr(type(result), "_repr_html_") or verb in verbs.OWN
            else results.Answer(verb, result, arguments)
        )

    def _help(self, words: list[str]) -> str:
        if not words:
            return self._parser.format_help()
        found = next((verb for verb in TABLE if words[0] in verb.names), None)
        if found is None:
            msg = f"there is no verb {words[0]!r}; `%snapshot help` lists them"
            raise UsageError(msg)
        return help_of(self._parser, found.name)

    # Above a cell

    def _above(self, verb: Verb, arguments: argparse.Namespace, cell: str) -> Any:
        if verb.name not in CELL_VERBS:
            msg = f"{verb.name} does not stand above a cell; {' and '.join(CELL_VERBS)} do"
            raise UsageError(msg)
        self._check_cell(cell)
        if verb.name == "guard":
            with self._kernel.guarded(arguments.names):
                self._cell(cell, "everything named was put back")
            return None
        if arguments.before or arguments.both:
            taken = verbs.take(self._kernel, arguments)
            if not arguments.both:
                self._cell(cell, "the snapshot was taken before it")
                return taken
        started = time.perf_counter()
        self._cell(cell, "nothing was taken after it")
        return verbs.take(self._kernel, arguments, cell_seconds=round(time.perf_counter() - started, 6))

    def _check_cell(self, cell: str) -> None:
        """Refuse what a cell in a cell cannot do, before anything runs."""
        try:
            code = compile(
                self._kernel.shell.transform_cell(cell), "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
            )
        except SyntaxError:
            return  # the cell itself will say so
        if code.co_flags & inspect.CO_COROUTINE:
            msg = "a cell with `await` outside of functions cannot stand under %%snapshot; take in a line of its own after it"
            raise UsageError(msg)

    def _cell(self, cell: str, consequence: str) -> None:
        """Run the cell; raises if it failed, when its error has been shown."""
        done = self._kernel.shell.run_cell(cell, store_history=False)
        error = done.error_before_exec or done.error_in_exec
        if error is not None:
            msg = f"the cell ended with {type(error).__name__}, so {consequence}"
            raise CellFailedError(msg) from error
