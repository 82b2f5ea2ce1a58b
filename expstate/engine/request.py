"""What the caller asks of a take, checked before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from expstate import settings
from expstate.engine import memory
from expstate.engine.take import TakeRequest, check_app_state
from expstate.errors import InvalidArgumentError
from expstate.format.metadata import make_metadata
from expstate.progress import ProgressOption, check_option
from expstate.storage import registry

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from expstate.engine.ranks import Ranks
    from expstate.state.stateful import Stateful


def globs(given: str | Sequence[str], what: str) -> tuple[str, ...]:
    """One glob or several, as a tuple; ``InvalidArgumentError`` if they are no texts."""
    found = tuple(given) if isinstance(given, (list, tuple, set, frozenset)) else (given,)
    if not all(isinstance(glob, str) and glob for glob in found):
        msg = f"{what} must be globs on entry paths, got {given!r}"
        raise InvalidArgumentError(msg)
    return found


def make_request(
    path: str | os.PathLike[str],
    app_state: dict[str, Stateful],
    ranks: Ranks,
    replicated: Sequence[str] | None,
    check_replicated: bool,
    storage_options: Mapping[str, Any] | None,
    name: str | None,
    tags: Iterable[str],
    params: Mapping[str, Any] | None,
    metrics: Mapping[str, Any] | None,
    note: str | None,
    step: int | None,
    overwrite: bool,
    memory_budget_bytes: int | None,
    progress: ProgressOption,
    force: bool,
    provenance: Callable[[], dict[str, Any]],
    dedup: bool = False,
    trust_fingerprint: bool = True,
    device_staging_bytes: int | None = None,
) -> TakeRequest:
    """Check everything that was given to a take."""
    check_app_state(app_state)
    check_option(progress)
    memory.budget_bytes(memory_budget_bytes)
    given = () if replicated is None else globs(replicated, "replicated")
    return TakeRequest(
        storage=registry.open_storage(path, storage_options),
        app_state=dict(app_state),
        metadata=make_metadata(name=name, tags=tags, params=params, metrics=metrics, note=note, step=step),
        provenance=provenance,
        overwrite=overwrite,
        force=force,
        memory_budget_bytes=memory_budget_bytes,
        progress=progress,
        ranks=ranks,
        replicated=given,
        check_replicated=check_replicated,
        dedup=bool(dedup),
        trust_fingerprint=bool(trust_fingerprint),
        device_staging_bytes=_device_bytes(device_staging_bytes),
    )


def _device_bytes(given: int | None) -> int | None:
    found = settings.current().device_staging_bytes if given is None else given
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 0):
        msg = f"device_staging_bytes must be a number of bytes, or None for what is free, got {found!r}"
        raise InvalidArgumentError(msg)
    return found
