"""Completion of ``%snapshot``: verbs, options, names of the notebook, refs, keys and entries, tags, metrics and params.

Gets a line up to the cursor; hands on what may come there. What the catalog and snapshots know is asked for in a thread: if it does not
come in time, what it said before is offered.
"""

from __future__ import annotations

import re
import shlex
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from expstate.notebook import names
from expstate.notebook.verbs import CELL_VERBS, TABLE
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from expstate.commands.verb import Argument, Verb
    from expstate.notebook.kernel import Kernel

WAIT_SECONDS = 0.5
"""How long Tab may wait for the catalog; front ends wait about a second."""

_MAGIC = re.compile(r"(?P<before>\s*(?:[^%=\s][^%=]*=\s*)?)(?P<magic>%{1,2})snapshot\s(?P<rest>.*)", re.DOTALL)
_PLAIN = re.compile(r"[^\s\"'\\@:=]+")
"""What can be typed as it is, and is one word for the magic and one fragment for the completer."""

_HELP = ("-h", "--help")
_SIGNS = ("latest", "latest~1")
_WORDS: Mapping[str, Sequence[str]] = {"every": ("cell", "10m", "50steps"), "query": ("and", "or", "not")}
"""What is always the same, by the argument that it may be."""
_KINDS: Mapping[str, Sequence[str]] = {
    "tag": ("tag",),
    "tags": ("tag",),
    "alias": ("alias",),
    "metric": ("metric",),
    "param": ("param",),
    "keep_best": ("metric",),
    "sort": ("field", "metric", "param"),
    "query": ("field", "metric", "param"),
}
"""What the catalog knows of it."""
_REFS = {"ref", "refs"}
_ENTRIES = {"glob", "entry", "include", "exclude"}

_Result = TypeVar("_Result")


class _Slowly(Generic[_Result]):
    """Something that is asked for again and again, and may take long, or fail: what is known of it.

    Parameters
    ----------
    ask : callable
        Gives it; called in a thread, one at a time.
    known : object
        What is given before there is an answer.
    """

    def __init__(self, ask: Callable[[], _Result], known: _Result) -> None:
        self._ask = ask
        self._known = known
        self._lock = threading.Lock()
        self._is_running = False

    def get(self) -> _Result:
        """The answer, if it comes in time, else the one before. An old question that is not answered yet is not waited for again."""
        with self._lock:
            if self._is_running:
                return self._known
            self._is_running = True
        done = threading.Event()
        threading.Thread(target=self._run, args=(done,), name="expstate-complete", daemon=True).start()
        done.wait(WAIT_SECONDS)
        return self._known

    def _run(self, done: threading.Event) -> None:
        try:
            self._known = self._ask()
        except Exception:  # noqa: BLE001, S110 - Tab is no place for an error: whoever runs the verb is told
            pass
        finally:
            with self._lock:
                self._is_running = False
            done.set()


class Completer:
    """What may come at the end of a line of ``%snapshot``.

    Parameters
    ----------
    kernel : Kernel
        Whose names, catalog and snapshots are offered.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._words: _Slowly[dict[str, tuple[str, ...]]] = _Slowly(self._ask_words, {})
        self._entries: dict[str, _Slowly[tuple[str, ...]]] = {}

    def complete(self, line: str) -> tuple[str, list[str]] | None:
        """The last word of a line up to the cursor, and all words that it may become; None for a line that is not ours."""
        found = _MAGIC.fullmatch(line)
        if found is None:
            return None
        rest = found["rest"]
        try:
            words = shlex.split(rest)
        except ValueError:  # inside quotes
            return None
        word = words.pop() if words and not rest[-1:].isspace() else ""
        if not rest.endswith(word):  # quoted
            return None
        if not words:
            offered: Iterable[str] = CELL_VERBS if found["magic"] == "%%" else (*(verb.name for verb in TABLE), "help")
        else:
            offered = self._offered(words, word)
        return word, [one for one in dict.fromkeys(offered) if one.startswith(word) and _PLAIN.fullmatch(one)]

    def _offered(self, words: Sequence[str], word: str) -> Iterable[str]:
        if words[0] in {"help", *_HELP}:
            return (verb.name for verb in TABLE)
        verb = next((verb for verb in TABLE if words[0] in verb.names), None)
        if verb is None:
            return ()
        argument, given = _place(verb, words[1:])
        if word.startswith("-") and (argument is None or not argument.is_option):
            return (*(flag for item in _options(verb) for flag in item.flags), *_HELP)
        return () if argument is None else self._values(verb, argument.name, given, word)

    # What the arguments stand for

    def _values(self, verb: Verb, name: str, given: Sequence[str], word: str) -> Iterable[str]:
        """What an argument, or the value of an option, may be; ``given`` are the arguments before it."""
        if name in _REFS:
            return self._refs(verb, word)
        if name == "other":
            return ("live", *self._refs(verb, word), *self._keys_of(given[0]))
        if name in _ENTRIES:
            return self._entries_of(given[0]) if given else ()
        if name == "names":
            return self._keys_of(given[0]) if any(item.name == "ref" for item in verb.arguments) else self._names(word)
        return (*_WORDS.get(name, ()), *self._known(*_KINDS.get(name, ())))

    def _names(self, word: str) -> Iterable[str]:
        """Names of the notebook; after a dot, what the object before it holds."""
        before, dot, _ = word.rpartition(".")
        if not dot:
            found = names.candidates(self._kernel.namespace, self._kernel.hidden)
            others = [
                name
                for name, value in self._kernel.namespace.items()
                if not name.startswith("_") and name not in self._kernel.hidden and not callable(value) and not _is_module(value)
            ]
            return (*self._kernel.registry.names, *found, *others)
        value: Any = self._kernel.namespace
        for part in before.split("."):
            value = _parts(value).get(part)
        return (f"{before}.{name}" for name in _parts(value) if not name.startswith("_"))

    def _refs(self, verb: Verb, word: str) -> Iterable[str]:
        if "/" in word and verb.name == "show":
            ref = word.partition("/")[0]
            return (f"{ref}/{entry}" for entry in self._entries_of(ref))
        return (*_SIGNS, *self._known("alias", "name", "id"))

    # What takes time

    def _known(self, *kinds: str) -> tuple[str, ...]:
        """What the catalog knows of these kinds."""
        words = self._words.get() if kinds else {}
        return tuple(word for kind in kinds for word in words.get(kind, ()))

    def _ask_words(self) -> dict[str, tuple[str, ...]]:
        from expstate.catalog.vocabulary import vocabulary  # noqa: PLC0415 - SQLAlchemy takes 0.3 s to import

        return vocabulary(self._kernel.catalog)

    def _entries_of(self, ref: str) -> tuple[str, ...]:
        """The paths of the entries of a snapshot, keys first."""
        if ref not in self._entries:
            self._entries.clear()  # of another, which is not typed any more

            def ask() -> tuple[str, ...]:
                entries = self._kernel.find(ref).manifest.entries
                return tuple(sorted((entry.path for entry in entries), key=lambda path: "/" in path))

            self._entries[ref] = _Slowly(ask, ())
        return self._entries[ref].get()

    def _keys_of(self, ref: str) -> Iterable[str]:
        return (paths.key_of(path) for path in self._entries_of(ref) if "/" not in path)


def _options(verb: Verb) -> list[Argument]:
    return [item for item in (*verb.arguments, *verb.common_arguments) if item.is_option]


def _takes_value(item: Argument) -> bool:
    return item.options.get("action") in {None, "append"}


def _place(verb: Verb, words: Sequence[str]) -> tuple[Argument | None, list[str]]:
    """What the word after these is: the value of an option, or an argument; and the arguments among these."""
    flags = {flag: item for item in _options(verb) for flag in item.flags}
    given: list[str] = []
    option: Argument | None = None
    for word in words:
        if option is not None:
            option = None
        elif word in flags:
            option = flags[word] if _takes_value(flags[word]) else None
        elif not word.startswith("-"):
            given.append(word)
    if option is not None:
        return option, given
    left = len(given)
    for item in verb.arguments:
        if not item.is_option:
            if left == 0 or item.options.get("nargs") in {"*", "+"}:
                return item, given
            left -= 1
    return None, given


def _is_module(value: object) -> bool:
    return isinstance(value, type(re))


def _parts(value: Any) -> dict[str, Any]:
    """What an object holds by names, without running code of its own."""
    if isinstance(value, dict):
        return value
    found = dict(getattr(value, "__dict__", {}))
    if isinstance(value, torch.nn.Module):
        for inner in ("_modules", "_parameters", "_buffers"):
            found |= found.get(inner, {})
    return found


def register(kernel: Kernel) -> Callable[[], None]:
    """Let Tab complete ``%snapshot`` in the shell of a kernel; gives what ends that."""
    from IPython.core.completer import SimpleCompletion, completion_matcher  # noqa: PLC0415 - only notebooks have it

    completer = Completer(kernel)

    @completion_matcher(identifier="expstate.snapshot", priority=100, api_version=2)  # type: ignore[untyped-decorator]
    def matcher(context: Any) -> Any:
        lines = context.full_text.split("\n")
        line = lines[context.cursor_line][: context.cursor_position]
        if context.cursor_line > 0 and line.lstrip().startswith("%%"):
            return {"completions": []}
        found = completer.complete(line)
        if found is None:
            return {"completions": []}
        word, offered = found
        completions = [SimpleCompletion(text=one, type="snapshot") for one in offered]
        return {"completions": completions, "matched_fragment": word, "suppress": True, "ordered": True}

    matchers = kernel.shell.Completer.custom_matchers
    matchers.append(matcher)
    return lambda: matchers.remove(matcher)
