"""A restore from beginning to end: planned and checked as a whole, then read into place, then handed to each stateful.

Before the first live byte changes, names, shapes, dtypes, files and objects have been checked. What fails after that is raised as
``RestoreInterruptedError`` with what was applied and what was not.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from expstate import collector, settings
from expstate.engine import crew, memory
from expstate.engine.fetch import allocate, read_object_bytes
from expstate.engine.plan import KeyPlan, Placement, RestoreOptions, aim, plan_key
from expstate.engine.read import PieceReader, Read
from expstate.engine.report import RestoreReport
from expstate.engine.source import find_key
from expstate.engine.take import state_dicts
from expstate.errors import EntryNotFoundError, ExpstateError, PickleNotAllowedError, RestoreInterruptedError, RestoreMismatchError
from expstate.format.manifest import ContainerEntry, ObjectEntry
from expstate.progress import Progress, ProgressOption
from expstate.state import paths, tensors, tree
from expstate.state.objects import unpickle_object
from expstate.state.stateful import RNGState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from expstate.engine.source import SnapshotSource
    from expstate.state.stateful import Stateful


class _Restore:
    def __init__(self, source: SnapshotSource, options: RestoreOptions, budget: int, progress: ProgressOption, *, verify: bool) -> None:
        self._source = source
        self._options = options
        self._budget = budget
        self._progress_option = progress
        self._verify = verify
        self._plans: list[KeyPlan] = []
        self._placements: list[Placement] = []
        self._reader: PieceReader | None = None
        self._loaded: list[KeyPlan] = []
        self.nbytes = 0

    # Planning

    def plan(self, app_state: Mapping[str, Stateful]) -> None:
        """Plan every key and raise all problems at once."""
        roots = {key: find_key(self._source.manifest, key) for key in app_state}
        selected = self._selection(set(roots.values()))
        states = state_dicts(app_state)
        for key, stateful in app_state.items():
            self._plans.append(plan_key(self._source, key, stateful, states[key], self._options, selected))

    def _selection(self, roots: set[str]) -> Callable[[str], bool] | None:
        options = self._options
        if options.include is None and not options.exclude:
            return None
        known = [entry.path for entry in self._source.manifest.entries if entry.path.partition("/")[0] in roots]
        for glob in (*(options.include or ()), *options.exclude):
            matches = paths.matcher([glob])
            if not any(matches(path) for path in known):
                msg = f"the glob {glob!r} matches no entry of {', '.join(map(repr, sorted(roots)))}"
                raise EntryNotFoundError(msg)
        included, excluded = paths.matcher(options.include or ("*",)), paths.matcher(options.exclude)
        return lambda path: included(path) and not excluded(path)

    def file_numbers(self) -> set[int]:
        """The files that the plan needs."""
        entries = [item.entry if isinstance(item, Placement) else item for plan in self._plans for _, item in plan.items]
        return self._source.files_of(entry for entry in entries if not isinstance(entry, tuple))

    def check(self, opened: SnapshotSource) -> None:
        """Decode objects, look for overlaps and meta tensors, raise what was found."""
        self._source = opened
        refused = []
        for plan in self._plans:
            for index, (path, item) in enumerate(plan.items):
                if isinstance(item, ObjectEntry):
                    try:
                        data = read_object_bytes(self._source, item)
                        plan.items[index] = (path, (unpickle_object(data, trust=self._options.trust),))
                    except PickleNotAllowedError as error:
                        refused.append(f"entry {item.path!r} ({item.type}): {error}")
            plan.problems += _meta_left(plan)
        self._placements, overlaps = aim(self._plans)
        problems = [problem for plan in self._plans for problem in plan.problems] + overlaps
        if refused and not problems:
            raise PickleNotAllowedError("; ".join(refused))
        problems += refused
        if problems:
            text = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
            msg = f"the snapshot does not fit the live state, and nothing was changed: {text}"
            raise RestoreMismatchError(msg, problems)
        self.nbytes = sum(placement.entry.nbytes for placement in self._placements)

    # Moving

    def run(self, *, atomic: bool) -> None:
        """Read everything into place and load it."""
        placements = self._placements
        shadows: dict[int, torch.Tensor] = {}
        if atomic:
            shadows = self._read_first(placements)
        try:
            self._allocate()
            reads: list[Read] = []
            with collector.paused():
                for placement in placements:
                    shadow = shadows.get(id(placement))
                    if shadow is not None and placement.tensor is not None:
                        with torch.no_grad():
                            placement.tensor.copy_(shadow)
                    else:
                        known_at = placement.live.address if placement.live is not None else None
                        reads += self._source.reads(placement.entry, placement.tensor, _stored_dtype(placement), known_at)
            self._read(reads)
            for plan in sorted(self._plans, key=lambda plan: isinstance(plan.stateful, RNGState)):
                with collector.paused():
                    _load(plan, strict=self._options.strict)
                self._loaded.append(plan)
        except BaseException as error:
            raise self._interrupted(error) from error

    def _read_first(self, placements: Sequence[Placement]) -> dict[int, torch.Tensor]:
        """Read and verify everything that goes to live memory: into host memory if the budget holds it, else only to verify."""
        live = [placement for placement in placements if placement.live is not None]
        fits = sum(placement.entry.nbytes for placement in live) + memory.WINDOW_BYTES + memory.SLACK_BYTES <= self._budget
        shadows: dict[int, torch.Tensor] = {}
        reads: list[Read] = []
        for placement in live:
            shadow = None
            if fits and placement.entry.kind != "numpy":
                shadow = shadows[id(placement)] = torch.empty(placement.entry.shape, dtype=_stored_dtype(placement))
            reads += list(self._source.reads(placement.entry, shadow))
        self._read(reads, held=sum(shadow.nbytes for shadow in shadows.values()))
        return shadows

    def _allocate(self) -> None:
        """Make the tensors that have no live counterpart, and put real ones in place of those on the meta device."""
        for plan in self._plans:
            made: dict[int, tuple[Any, torch.Tensor]] = {}
            for placement in plan.placements:
                live = placement.live
                if live is not None and live.tensor.device.type != "meta":
                    placement.value, placement.tensor = live.value, live.tensor
                    continue
                # Tied tensors are one tensor again.
                if id(placement.entry) not in made:
                    made[id(placement.entry)] = allocate(placement.entry, placement.device)
                placement.value, placement.tensor = made[id(placement.entry)]
            if isinstance(plan.stateful, torch.nn.Module):
                _materialise(plan.stateful, plan)

    def _read(self, reads: list[Read], *, held: int = 0) -> None:
        threads = settings.current().thread_count
        devices = {read.target.tensor.device.type for read in reads if read.target is not None} - {"cpu"}
        staging = memory.Staging(max(self._budget - held, 2 * settings.MIB), threads, next(iter(devices), None))
        progress = Progress("restore", sum(read.nbytes for read in reads), self._progress_option)
        try:
            self._reader = PieceReader(self._source.files, staging, threads, progress, crew.Stop(), verify=self._verify)
            self._reader.run(reads)
        finally:
            progress.close()
            staging.close()

    def _interrupted(self, error: BaseException) -> RestoreInterruptedError:
        unfinished = self._reader.unfinished() if self._reader is not None else set()
        loaded = {id(plan) for plan in self._loaded}
        applied: list[str] = []
        unapplied: list[str] = []
        for plan in self._plans:
            in_place = {
                item.stored_path
                for _, item in plan.items
                if isinstance(item, Placement) and item.live is not None and item.tensor is not None and item.entry.path not in unfinished
            }
            for path in plan.stored_paths:
                done = id(plan) in loaded or (path in in_place and self._reader is not None)
                (applied if done else unapplied).append(path)
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        msg = f"the restore stopped after live state had begun to change ({len(applied):,} entries applied, {len(unapplied):,} not): {what}"
        return RestoreInterruptedError(msg, applied, unapplied)

    def report(self, seconds: float, *, dry_run: bool) -> RestoreReport:
        """What was done."""
        plans = self._plans
        return RestoreReport(
            keys=tuple(plan.key for plan in plans),
            restored=tuple(path for plan in plans for path in plan.stored_paths),
            missing=tuple(name for plan in plans for name in plan.missing),
            unexpected=tuple(path for plan in plans for path in plan.unexpected),
            cast=tuple(placement.stored_path for plan in plans for placement in plan.placements if placement.is_cast),
            skipped=tuple(name for plan in plans if isinstance(plan.stateful, RNGState) for name in plan.stateful.skipped),
            nbytes=self.nbytes,
            seconds=seconds,
            dry_run=dry_run,
        )


def restore(
    source: SnapshotSource,
    app_state: Mapping[str, Stateful],
    options: RestoreOptions,
    *,
    budget: int,
    progress: ProgressOption,
    verify: bool,
    atomic: bool,
    dry_run: bool,
) -> RestoreReport:
    """Restore, as ``Snapshot.restore`` documents it."""
    started = time.perf_counter()
    work = _Restore(source, options, budget, progress, verify=verify)
    with collector.paused():
        work.plan(app_state)
        numbers = work.file_numbers()
    with source.opened(numbers) as opened:
        with collector.paused():
            work.check(opened)
        if not dry_run:
            work.run(atomic=atomic)
    return work.report(time.perf_counter() - started, dry_run=dry_run)


def _stored_dtype(placement: Placement) -> torch.dtype | None:
    return None if placement.entry.kind == "numpy" else tensors.DTYPES[placement.entry.dtype]


def _meta_left(plan: KeyPlan) -> list[str]:
    """Tensors of a module on the meta device that the restore does not bring."""
    if not isinstance(plan.stateful, torch.nn.Module):
        return []
    coming = {id(item.live.value) for item in plan.placements if item.live is not None}
    module = plan.stateful
    found = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    on_meta = {name: tensor for name, tensor in found if tensor.device.type == "meta"}
    if not on_meta:
        return []
    names = {paths.unquote(item.path.partition("/")[2]) for item in plan.placements} if coming else set()
    left = [name for name in on_meta if name not in names]
    if not left:
        return []
    return [f"key {plan.key!r}: {left[0]!r} is on the meta device and not among what is restored; build it on a device with memory"]


def _materialise(module: torch.nn.Module, plan: KeyPlan) -> None:
    """Put the new tensors in place of those on the meta device; what was one parameter stays one."""
    new: dict[int, torch.Tensor] = {}
    by_name = {paths.unquote(item.path.partition("/")[2]): item for item in plan.placements}
    for name, old in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        item = by_name.get(name)
        if old.device.type != "meta" or item is None or item.tensor is None:
            continue
        if id(old) not in new:
            tensor = item.tensor if item.tensor.dtype == old.dtype else item.tensor.to(old.dtype)
            new[id(old)] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else tensor
        owner_name, _, last = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        setattr(owner, last, new[id(old)])


def _load(plan: KeyPlan, *, strict: bool) -> None:
    """Build the new state dict and hand it to the stateful."""
    parts = []
    for path, item in plan.items:
        if isinstance(item, ContainerEntry):
            parts.append(tree.Part(path, item.type, item.meta, None))
        elif isinstance(item, Placement):
            parts.append(tree.Part(path, None, None, item.value))
        else:
            parts.append(tree.Part(path, None, None, item[0]))  # type: ignore[index]
    state = tree.build(parts, plan.live_values, plan.kept)
    if isinstance(plan.stateful, torch.nn.Module):
        _load_module(plan.stateful, state, plan, strict=strict)
    else:
        plan.stateful.load_state_dict(state)


def _load_module(module: torch.nn.Module, state: Any, plan: KeyPlan, *, strict: bool) -> None:
    # What is not restored is loaded as it is, so that nothing is missing and every hook of the module sees a whole state dict.
    whole = OrderedDict(plan.live_state)
    versions = getattr(state, "_metadata", None) if set(state) == set(whole) else None
    meta = {name for name, tensor in whole.items() if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"}
    for name in meta - set(state):
        del whole[name]
    whole.update(state)
    whole._metadata = versions or getattr(plan.live_state, "_metadata", None)  # type: ignore[attr-defined]  # noqa: SLF001 - PyTorch's own place
    result = module.load_state_dict(whole, strict=strict and not meta)
    if strict and result is not None and getattr(result, "unexpected_keys", None):
        msg = f"{plan.key!r} did not take {result.unexpected_keys[:3]}"
        raise ExpstateError(msg)
