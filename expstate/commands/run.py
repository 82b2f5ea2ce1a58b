"""Performs a parsed command: calls the verb, prints its result, turns errors into one line and an exit status."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any, TextIO

from expstate import settings
from expstate.commands.plain import plain
from expstate.commands.table import verb_of
from expstate.commands.verb import Session
from expstate.commands.view import View, clean, clean_lines
from expstate.errors import ExpstateError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from expstate.commands.verb import Verb

FAILED, INTERRUPTED, NO_READER = 1, 130, 141
_OPTIONAL = frozenset({"alembic", "lark", "numpy", "pandas", "platformdirs", "psycopg", "rich", "safetensors", "sqlalchemy", "tqdm"})


def run(arguments: argparse.Namespace, *, program: str = "expstate") -> int:
    """Perform what was parsed.

    Parameters
    ----------
    arguments : argparse.Namespace
        What a parser of ``build_parser`` gave; there must be a verb.
    program : str, default "expstate"
        What a command begins with.

    Returns
    -------
    int
        The exit status: 0 done, 1 failed, 130 interrupted; 141 when nobody reads the output any more.
    """
    verb = verb_of(arguments.verb)
    as_json = verb.prepare is None and arguments.json
    session = Session(arguments, program)
    try:
        with _messages(program), _project(arguments):
            result = verb.call(session, arguments)
            _print(verb, result, arguments, as_json=as_json)
            sys.stdout.flush()
            return verb.status(result, arguments)
    except KeyboardInterrupt:
        _say(f"{program}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more at its end, and would complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except (ExpstateError, OSError, ImportError) as error:
        message = explain(error, verb)
        if message is None:
            raise
        if as_json:
            with contextlib.suppress(OSError):  # which may be the error
                _print_json({"error": message, "type": type(error).__name__})
                sys.stdout.flush()
        _say(f"{program}: error: {message}")
        return FAILED
    finally:
        session.close()


@contextlib.contextmanager
def _project(arguments: argparse.Namespace) -> Iterator[None]:
    named = getattr(arguments, "project", None)
    if named is None:
        yield
        return
    with settings.override(project=named):
        yield


def _print(verb: Verb, result: Any, arguments: argparse.Namespace, *, as_json: bool) -> None:
    if as_json:
        _print_json(verb.data(result, arguments))
    else:
        verb.show(result, View(sys.stdout), arguments)


def _print_json(document: Any) -> None:
    # ASCII alone: what a terminal would act on, and lone surrogates, are escapes.
    sys.stdout.write(json.dumps(plain(document), indent=2, allow_nan=False) + "\n")


def explain(error: Exception, verb: Verb) -> str | None:
    """What to say of an error to a person who typed a verb; None for one that is not theirs to know.

    Parameters
    ----------
    error : Exception
        What was raised.
    verb : Verb
        What was called.
    """
    message = _message(error)
    return None if message is None else _with_options(message, verb)


def _message(error: Exception) -> str | None:
    """What to say of an error; None for one that is not the user's to know."""
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if package not in _OPTIONAL:
            return None
        return f"the package {package!r} is needed for this and is not installed: python3 -m pip install {package}"
    if isinstance(error, OSError) and not isinstance(error, ExpstateError):
        return f"{error.strerror or type(error).__name__}: {error.filename!r}" if error.filename is not None else str(error)
    return str(error)


def _with_options(message: str, verb: Verb) -> str:
    """A message with the options of the command line in the place of the library's arguments."""
    message = message.replace("Catalog(path)", "--catalog PATH")
    if verb.widens:
        message = message.replace('project="*"', "--all")
    for item in (*verb.arguments, *verb.common_arguments):
        if item.is_option:
            message = message.replace(f"{item.name}=True", item.flags[0])
            message = re.sub(rf"(?<![\w-]){item.name}=", f"{item.flags[0]} ", message)
            if "_" in item.name:
                message = re.sub(rf"(?<![\w-]){item.name}\b", item.flags[0], message)
    return message


def _say(text: str) -> None:
    first, *others = clean_lines(text).split("\n")
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write("\n".join([first, *(f"  {line}" for line in others)]) + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def _messages(program: str) -> Iterator[None]:
    """Warnings in one line each, without the line of our code that they come from."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        del category, filename, lineno, file, line
        _say(f"{program}: warning: {clean(str(message))}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
