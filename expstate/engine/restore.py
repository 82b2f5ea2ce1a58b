"""A restore from beginning to end: planned and checked as a whole, then read into place, then handed to each stateful.

Before the first live byte changes, names, shapes, dtypes, files and objects have been checked. What fails after that is raised as
``RestoreInterruptedError`` with what was applied and what was not.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from expstate import collector, settings
from expstate.engine import crew, memory, meta
from expstate.engine.aim import aim
from expstate.engine.fetch import allocate, check_room, read_object_bytes
from expstate.engine.plan import KeyPlan, Placement, RestoreOptions, plan_key, some
from expstate.engine.read import PieceReader, Read
from expstate.engine.report import RestoreReport
from expstate.engine.source import find_key
from expstate.engine.take import state_dicts
from expstate.errors import EntryNotFoundError, ExpstateError, PickleNotAllowedError, RestoreInterruptedError, RestoreMismatchError
from expstate.format.manifest import ContainerEntry, Entry, ObjectEntry
from expstate.progress import Progress, ProgressOption
from expstate.state import paths, tensors, tree
from expstate.state.objects import unpickle_object
from expstate.state.sharding import sharding_of
from expstate.state.stateful import RNGState, seed_generators

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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
        self._copied: set[int] = set()
        self._loaded: list[KeyPlan] = []
        self._problems: list[str] = []
        self._to_seed: list[str] = []
        self.nbytes = 0

    # Planning

    def plan(self, app_state: Mapping[str, Stateful]) -> None:
        """Plan every key and raise all problems at once."""
        roots = {key: find_key(self._source.manifest, key) for key in app_state}
        selected = self._on_this_rank(app_state, roots, self._selection(set(roots.values())))
        states = state_dicts(app_state)
        for key, stateful in app_state.items():
            if key in self._to_seed:
                continue
            plan = plan_key(self._source, key, stateful, states[key], self._options, selected)
            if plan.items or plan.problems:
                self._plans.append(plan)

    def _selection(self, roots: set[str]) -> Callable[[str], bool] | None:
        options = self._options
        if options.include is None and not options.exclude:
            return None
        known = [entry.path for entry in self._source.entries if entry.path.partition("/")[0] in roots]
        for glob in (*(options.include or ()), *options.exclude):
            matches = paths.matcher([glob])
            if not any(matches(path) for path in known):
                msg = f"the glob {glob!r} matches no entry of {', '.join(map(repr, sorted(roots)))}"
                raise EntryNotFoundError(msg)
        included, excluded = paths.matcher(options.include or ("*",)), paths.matcher(options.exclude)
        return lambda path: included(path) and not excluded(path)

    def _on_this_rank(
        self, app_state: Mapping[str, Stateful], roots: Mapping[str, str], selected: Callable[[str], bool] | None
    ) -> Callable[[str], bool] | None:
        """What comes back here of what each rank had of its own, where there are more or fewer ranks than at the take."""
        manifest, (rank, size) = self._source.manifest, self._options.position
        if manifest.world_size in {1, size}:
            return selected
        generators = {roots[key] for key, stateful in app_state.items() if isinstance(stateful, RNGState)}
        wanted = set(roots.values()) - generators
        own = [
            (entry.path, entry.rank)
            for entry in manifest.entries
            if entry.rank is not None and not isinstance(entry, ContainerEntry) and entry.path.partition("/")[0] in wanted
        ]
        if selected is not None:
            own = [(path, of_rank) for path, of_rank in own if selected(path)]
        gone = list(dict.fromkeys(path for path, of_rank in own if of_rank >= size))
        if gone and self._options.strict:
            ranks = f"{size} to {manifest.world_size - 1}" if manifest.world_size - size > 1 else str(size)
            self._problems.append(f"there is no rank {ranks} any more to take its values of {some(gone)}; pass strict=False to do without")
        if rank < manifest.world_size:
            return selected
        lacking = {path for path, _ in own}
        if lacking and self._options.strict:
            found = some(sorted(lacking))
            self._problems.append(f"rank {rank} was not there at the take, and nothing was taken for it of {found}; pass strict=False")
        self._to_seed = [key for key in app_state if roots[key] in generators and self._has_own(roots[key])]
        return lambda path: path not in lacking and (selected is None or selected(path))

    def _has_own(self, root: str) -> bool:
        return any(entry.rank is not None for entry in self._source.subtree(root))

    def file_numbers(self) -> set[int]:
        """The files that the plan needs."""
        items = [item for plan in self._plans for _, item in plan.items]
        whole: list[Entry] = [item for item in items if isinstance(item, ObjectEntry)]
        numbers: set[int] = set()
        for item in items:
            if isinstance(item, Placement):
                parts = item.parts_here()
                if parts is None:
                    whole.append(item.entry)
                else:
                    numbers |= self._source.files_of_regions(item.entry, [(part.starts, part.sizes) for part in parts])
        return numbers | self._source.files_of(whole)

    def check(self, opened: SnapshotSource) -> None:
        """Decode objects, look for overlaps and meta tensors, raise what was found."""
        self._source = opened
        new = (item for plan in self._plans for _, item in plan.items if isinstance(item, Placement) and item.is_new)
        check_room(opened, sum(item.nbytes for item in new))
        refused = []
        for plan in self._plans:
            for index, (path, item) in enumerate(plan.items):
                if isinstance(item, ObjectEntry):
                    try:
                        data = read_object_bytes(self._source, item, self._budget)
                        plan.items[index] = (path, (unpickle_object(data, trust=self._options.trust),))
                    except PickleNotAllowedError as error:
                        refused.append(f"entry {item.path!r} ({item.type}): {error}")
            self._check_meta(plan)
        self._placements, overlaps = aim(self._plans)
        problems = self._problems + [problem for plan in self._plans for problem in plan.problems] + overlaps
        if refused and not problems:
            raise PickleNotAllowedError("; ".join(refused))
        problems += refused
        if problems:
            text = problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
            msg = f"the snapshot does not fit the live state, and nothing was changed: {text}"
            raise RestoreMismatchError(msg, problems)
        self.nbytes = sum(placement.nbytes for placement in self._placements)

    def _check_meta(self, plan: KeyPlan) -> None:
        """What stays on the meta device is a problem where everything should come back."""
        left = meta.left_out(plan)
        if not left or not plan.is_full:
            return
        plan.missing += [name for name in left if name not in plan.missing]
        if self._options.strict:
            problem = f"on the meta device and not among what is restored: {some(left)}; build these on a device with memory"
            plan.problems.append(f"key {plan.key!r}: {problem}")

    # Moving

    def run(self, *, atomic: bool) -> None:
        """Read everything into place and load it."""
        self._allocate()
        shadows = self._read_first() if atomic else {}
        try:
            for plan in self._plans:
                meta.materialise(plan)
            reads: list[Read] = []
            with collector.paused():
                for placement in self._placements:
                    shadow = shadows.get(id(placement))
                    if shadow is not None:
                        _copy(placement, shadow)
                        self._copied.add(id(placement))
                    elif not (atomic and placement.is_new):
                        reads += self._reads(placement)
            self._read(reads)
            for plan in sorted(self._plans, key=lambda plan: isinstance(plan.stateful, RNGState)):
                with collector.paused():
                    _load(plan, strict=self._options.strict)
                self._loaded.append(plan)
            for key in self._to_seed:
                seed_generators(f"{self._source.manifest.id}/{key}/{self._options.position[0]}")
        except BaseException as error:
            raise self._interrupted(error) from error

    def _reads(self, placement: Placement) -> Iterator[Read]:
        if placement.parts is not None:
            dtype = _stored_dtype(placement) if placement.is_cast else None
            for part in placement.parts:
                yield from self._source.region_reads(placement.entry, part.starts, part.tensor, dtype)
            return
        yield from self._reads_whole(placement)

    def _reads_whole(self, placement: Placement) -> Iterator[Read]:
        if placement.is_cast:
            return self._source.reads(placement.entry, placement.tensor, _stored_dtype(placement))
        known_at = placement.live.address if placement.live is not None else None
        return self._source.reads(placement.entry, placement.tensor, address=known_at)

    def _read_first(self) -> dict[int, list[torch.Tensor]]:
        """Read and verify everything: what goes to live memory into host memory if the budget holds it, else only to verify."""
        live = [placement for placement in self._placements if not placement.is_new]
        fits = sum(placement.nbytes for placement in live) + memory.WINDOW_BYTES + memory.SLACK_BYTES <= self._budget
        shadows: dict[int, list[torch.Tensor]] = {}
        reads: list[Read] = []
        for placement in self._placements:
            if placement.is_new:
                reads += self._reads(placement)
                continue
            if fits:
                shadows[id(placement)] = _shadows(placement)
            if not fits:
                reads += (msgspec.structs.replace(read, target=None) for read in self._reads(placement))
                continue
            if placement.parts is None:
                reads += self._source.reads(placement.entry, shadows[id(placement)][0])
                continue
            for part, shadow in zip(placement.parts, shadows[id(placement)], strict=True):
                reads += self._source.region_reads(placement.entry, part.starts, shadow)
        self._read(reads, held=sum(shadow.nbytes for found in shadows.values() for shadow in found))
        self._reader = None
        return shadows

    def _allocate(self) -> None:
        """Make the tensors that have no live counterpart, or one without memory; what was tied is one tensor again."""
        for plan in self._plans:
            made: dict[tuple[str, int], tuple[Any, torch.Tensor]] = {}
            for placement in plan.placements:
                live = placement.live
                if live is not None and not placement.is_new:
                    placement.value, placement.tensor = live.value, live.tensor
                    placement.parts = live.parts if isinstance(live, tree.Sharded) else None
                    continue
                sharing = plan.sharing(placement)
                if sharing not in made:
                    made[sharing] = _make(placement)
                placement.value, placement.tensor = made[sharing]
                if placement.like is not None:
                    placement.parts = sharding_of(placement.value).parts

    def _read(self, reads: list[Read], *, held: int = 0) -> None:
        threads, budget = memory.means(self._source.storage, max(self._budget - held, 2 * settings.MIB))
        devices = {read.target.tensor.device.type for read in reads if read.target is not None} - {"cpu"}
        staging = memory.Staging(budget, threads, next(iter(devices), None))
        progress = Progress("restore", sum(read.nbytes for read in reads), self._progress_option)
        try:
            self._reader = PieceReader(self._source.files, staging, threads, progress, crew.Stop(), verify=self._verify)
            self._reader.run(reads)
        finally:
            progress.close()
            staging.close()

    def _interrupted(self, error: BaseException) -> RestoreInterruptedError:
        unfinished = self._reader.unfinished() if self._reader is not None else None
        loaded = {id(plan) for plan in self._loaded}
        applied: list[str] = []
        unapplied: list[str] = []
        for plan in self._plans:
            in_place = {
                placement.stored_path
                for placement in plan.placements
                if not placement.is_new
                and (id(placement) in self._copied or (unfinished is not None and placement.entry.path not in unfinished))
            }
            for path in plan.stored_paths:
                (applied if id(plan) in loaded or path in in_place else unapplied).append(path)
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        msg = f"the restore stopped after live state had begun to change ({len(applied):,} entries applied, {len(unapplied):,} not): {what}"
        return RestoreInterruptedError(msg, applied, unapplied)

    def report(self, seconds: float, *, dry_run: bool) -> RestoreReport:
        """What was done."""
        plans = self._plans
        return RestoreReport(
            keys=(*(plan.key for plan in plans), *self._to_seed),
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
    with collector.paused() as pause:
        work.plan(app_state)
        with source.opened(work.file_numbers()) as opened:
            work.check(opened)
            if work.nbytes >= collector.LONG_BYTES:
                pause.end()
            if not dry_run:
                work.run(atomic=atomic)
        return work.report(time.perf_counter() - started, dry_run=dry_run)


def _stored_dtype(placement: Placement) -> torch.dtype | None:
    return None if placement.entry.kind == "numpy" else tensors.DTYPES[placement.entry.dtype]


def _make(placement: Placement) -> tuple[Any, torch.Tensor]:
    """New memory: for a tensor on the meta device, for one that is sharded as its parameter is, or for one that is only stored."""
    live = placement.live
    if live is not None:
        tensor = torch.empty(live.shape, dtype=live.tensor.dtype, device=placement.device)
        return tensor, tensor
    if placement.like is not None:
        dtype = tensors.DTYPES[placement.entry.dtype]
        with torch.no_grad():
            made = torch.empty_like(placement.like, dtype=dtype, requires_grad=False)
        return made, torch.empty(0, dtype=dtype)
    return allocate(placement.entry, placement.device)


def _shadows(placement: Placement) -> list[torch.Tensor]:
    """Host memory for what goes to live memory later."""
    if placement.entry.kind == "numpy":
        return [torch.empty(placement.entry.nbytes, dtype=torch.uint8, device="cpu")]
    shapes = [placement.entry.shape] if placement.parts is None else [part.sizes for part in placement.parts]
    return [torch.empty(shape, dtype=_stored_dtype(placement), device="cpu") for shape in shapes]


def _copy(placement: Placement, shadows: list[torch.Tensor]) -> None:
    assert placement.tensor is not None
    live = [placement.tensor] if placement.parts is None else [part.tensor for part in placement.parts]
    for tensor, shadow in zip(live, shadows, strict=True):
        if not placement.is_cast:
            # The bytes as they are: some dtypes cannot be copied as values.
            tensors.copy_in(tensor, 0, shadow.nbytes, shadow.data_ptr(), tensors.as_bytes(shadow))
        else:
            with torch.no_grad():
                tensor.copy_(shadow)


def _load(plan: KeyPlan, *, strict: bool) -> None:
    """Build the new state dict and hand it to the stateful."""
    parts = []
    for path, item in plan.items:
        if isinstance(item, ContainerEntry):
            parts.append(tree.Part(path, item.type, item.meta, None))
        elif isinstance(item, Placement):
            if item.array is not None:
                item.array[...] = item.value
                item.value = item.array
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
