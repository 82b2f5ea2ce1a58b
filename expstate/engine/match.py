"""Which live name an entry of the snapshot belongs to: renames, and wrappers that put a prefix before a module's names.

Names are those below a key, as the state dict has them. ``module.`` (DistributedDataParallel) and ``_orig_mod.`` (torch.compile)
are looked through on either side where the names do not match as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from expstate.errors import InvalidArgumentError
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_COMPILED = "_orig_mod"
_PARALLEL = "module."


def check_rename(rename: object) -> None:
    """Refuse a rename that is not a mapping of prefixes."""
    if rename is not None and not (
        isinstance(rename, Mapping) and all(isinstance(old, str) and isinstance(new, str) for old, new in rename.items())
    ):
        msg = f'rename must map prefixes to prefixes, as in {{"module.": ""}}, got {rename!r}'
        raise InvalidArgumentError(msg)


def renamed(path: str, rename: Mapping[str, str]) -> str:
    """The path under which an entry is looked for: the longest prefix of its name that ``rename`` has is put in place of it.

    A prefix that begins with a key and ``/`` is meant for that key alone.

    >>> renamed("model/module.encoder.weight", {"module.": ""})
    'model/encoder.weight'
    """
    key, slash, name = path.partition("/")
    for old in sorted(rename, key=len, reverse=True):
        if path.startswith(old) and "/" in old:
            return rename[old] + path[len(old) :]
        if slash and name.startswith(old):
            return f"{key}/{rename[old]}{name[len(old) :]}"
    return path


def _canonical(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers add, each with the name it comes from; empty if two become one."""
    originals = list(names)
    stripped = [".".join(part for part in name.split(".") if part != _COMPILED) for name in originals]
    while stripped and all(name.startswith(_PARALLEL) for name in stripped):
        stripped = [name.removeprefix(_PARALLEL) for name in stripped]
    found = dict(zip(stripped, originals, strict=True))
    return found if len(found) == len(originals) else {}


def through_wrappers(stored: Sequence[str], live: Sequence[str]) -> dict[str, str]:
    """Stored names to live names that they belong to. Names that match as they are stay; a name without a counterpart is left out.

    >>> through_wrappers(["module.weight"], ["_orig_mod.weight"])
    {'module.weight': '_orig_mod.weight'}
    """
    known = set(live)
    if all(name in known for name in stored):
        return {name: name for name in stored}
    by_stored, by_live = _canonical(stored), _canonical(live)
    if not by_stored or not by_live:
        return {name: name for name in stored if name in known}
    matched = {original: by_live[name] for name, original in by_stored.items() if name in by_live}
    exact = {name: name for name in stored if name in known}
    return matched if len(matched) > len(exact) else exact


def suggest_rename(missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, str] | None:
    """The rename that would make all unexpected names the missing ones, if a prefix is all that differs.

    >>> suggest_rename(["encoder.weight", "encoder.bias"], ["net.encoder.weight", "net.encoder.bias"])
    {'net.': ''}
    """
    if not missing or len(missing) != len(unexpected):
        return None
    longest_missing, longest_unexpected = max(missing, key=len), max(unexpected, key=len)
    common = 0
    while common < min(len(longest_missing), len(longest_unexpected)) and longest_missing[-1 - common] == longest_unexpected[-1 - common]:
        common += 1
    new, old = longest_missing[: len(longest_missing) - common], longest_unexpected[: len(longest_unexpected) - common]
    # A prefix ends with a dot, so that whole parts of names are replaced.
    if (new and not new.endswith(".")) or (old and not old.endswith(".")):
        shared = 0 if "." not in longest_missing[len(new) :] else longest_missing[len(new) :].index(".") + 1
        if shared == 0:
            return None
        new, old = longest_missing[: len(new) + shared], longest_unexpected[: len(old) + shared]
    if old and sorted(missing) == sorted(new + name.removeprefix(old) for name in unexpected if name.startswith(old)):
        return {old: new}
    if not old and sorted(missing) == sorted(new + name for name in unexpected):
        return {"": new}
    return None


def name_of(path: str) -> str:
    """The name right below the key that a path leads through, as the state dict has it."""
    return paths.unquote(path.split("/", 2)[1]) if "/" in path else ""
