"""Where a restore aims: the live memory of all placements together, and what would be written there twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from expstate.engine.plan import KeyPlan, Placement
    from expstate.format.manifest import TensorEntry

Span = tuple[int, int, int, int]
"""Device, first byte, byte after the last, number of the placement."""


def aim(plans: list[KeyPlan]) -> tuple[list[Placement], list[str]]:
    """What to read, and problems where two different entries aim at one live memory.

    Entries with equal bytes that go to the very same memory (tied tensors that were taken untied) are read once.
    """
    problems: dict[str, None] = {}
    found = _unique(plans, problems)
    spans: list[Span] = []
    for number, placement in enumerate(found):
        if placement.live is None or placement.is_new or not placement.live.tensor.numel():
            continue
        tensor, at = placement.live.tensor, placement.live.address  # of a sharded tensor, the first part
        if at is not None:
            spans.append((0, at, at + placement.live.nbytes, number))
        else:
            start = tensor.data_ptr()
            spans.append((0 if tensor.is_cpu else 1 + (tensor.device.index or 0), start, start + _extent(tensor), number))
    spans.sort()
    twice: set[int] = set()
    before = furthest = (-1, 0, 0, 0)
    for span in spans:
        if furthest[0] != span[0] or furthest[2] <= span[1]:
            before = furthest = span
            continue
        # Sorted by where they begin, a span can lie in the one before it, or in a longer one before that.
        for other in {before, furthest}:
            if other[2] > span[1] and other[3] not in twice:
                _compare(found, other, span, twice, problems)
        before = span
        if span[2] > furthest[2]:
            furthest = span
    return [placement for number, placement in enumerate(found) if number not in twice], list(problems)


def _unique(plans: list[KeyPlan], problems: dict[str, None]) -> list[Placement]:
    """All placements, but of those that will share new memory only the first."""
    found = []
    for plan in plans:
        new: dict[Any, Placement] = {}
        for placement in plan.placements:
            if placement.is_new:
                first = new.setdefault(plan.sharing(placement), placement)
                if first is not placement:
                    if not _same_bytes(first, placement):
                        _note(first, placement, problems)
                    continue
            found.append(placement)
    return found


def _compare(found: list[Placement], one: Span, other: Span, twice: set[int], problems: dict[str, None]) -> None:
    """Two placements whose live memory may be the same, the second beginning inside the first."""
    first, second = found[one[3]], found[other[3]]
    assert first.live is not None
    assert second.live is not None
    same_place = one[1:3] == other[1:3] and (
        first.live.tensor.stride() == second.live.tensor.stride() or (_is_dense(first) and _is_dense(second))
    )
    if same_place and _same_bytes(first, second):
        twice.add(other[3])
    # Views that interleave, such as the columns of one matrix, have overlapping extents and no element in common; what begins
    # inside a tensor without holes has its first element in common with it.
    elif same_place or _is_dense(first):
        _note(first, second, problems)


def _note(first: Placement, second: Placement, problems: dict[str, None]) -> None:
    what = f"entries {first.stored_path!r} and {second.stored_path!r} differ"
    problems[f"{what}, and their live tensors are the same memory; exclude one of them"] = None


def _is_dense(placement: Placement) -> bool:
    assert placement.live is not None
    return placement.live.address is not None or _extent(placement.live.tensor) == placement.live.tensor.nbytes


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()


def _same_bytes(first: Placement, second: Placement) -> bool:
    one, other = first.entry, second.entry
    if one is other:
        return True
    if first.is_cast or second.is_cast:
        return one.dtype == other.dtype and one.shape == other.shape and _digests(one) == _digests(other)
    return _digests(one) == _digests(other)


def _digests(entry: TensorEntry) -> list[Any]:
    return [(box.starts, box.sizes, box.digest) for box in entry.boxes]
