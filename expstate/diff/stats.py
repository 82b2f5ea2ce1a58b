"""How far two tensors are apart: sums over chunks that fit the processor's cache, and the statistics that they make.

``Sums`` is fed pairs of flat tensors, the same elements of both sides in their stored dtypes, in any order; ``statistics`` ends it.
Everything is computed in double precision: inside the cache that costs little, and nothing under- or overflows but squares of float64
beyond 1e300 and below 1e-300.
"""

from __future__ import annotations

import functools
import math

import msgspec
import torch

from expstate.state import tensors

CHUNK = 31 * 1024
"""Elements of a chunk: fewer than torch would share among threads, and with what is made of them small enough for the cache."""

_INTEGERS = {torch.bool, *(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))}
_FROM_NUMPY = {
    "|b1": torch.bool,
    "|u1": torch.uint8,
    "|i1": torch.int8,
    "<u2": torch.uint16,
    "<i2": torch.int16,
    "<u4": torch.uint32,
    "<i4": torch.int32,
    "<u8": torch.uint64,
    "<i8": torch.int64,
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "<c8": torch.complex64,
    "<c16": torch.complex128,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class Statistics(msgspec.Struct, frozen=True):
    """How far a tensor of the newer side is from its counterpart.

    Sums are of the elements that are finite on both sides; a complex number counts as one element. NaN where there is nothing to say.

    Attributes
    ----------
    l2 : float
        The L2 norm of the difference.
    relative : float
        ``l2`` divided by the L2 norm of the older side; 0 if both are 0, infinite if only the latter is.
    max_abs : float
        The largest absolute difference.
    cosine : float
        Of the angle between the two, as real vectors; NaN if one has norm 0.
    changed : float
        Fraction of elements whose bytes differ; with another dtype, whose values do.
    elements, changed_elements : int
        Elements, and those of them that changed.
    nan_old, nan_new, inf_old, inf_new : int
        Elements that are NaN and infinite.
    """

    l2: float
    relative: float
    max_abs: float
    cosine: float
    changed: float
    elements: int
    changed_elements: int
    nan_old: int
    nan_new: int
    inf_old: int
    inf_new: int

    @property
    def has_new_odd(self) -> bool:
        """Whether more elements are NaN, or infinite, than were."""
        return self.nan_new > self.nan_old or self.inf_new > self.inf_old


def torch_dtype(kind: str, dtype: str) -> torch.dtype | None:
    """The dtype to compute with for an entry of this kind and dtype; None for one that is no number to torch."""
    found = _FROM_NUMPY.get(dtype) if kind == "numpy" else tensors.DTYPES.get(dtype)
    return found if found is not None and _is_number(found) else None


@functools.lru_cache(maxsize=64)
def _is_number(dtype: torch.dtype) -> bool:
    if dtype in _INTEGERS or dtype in _PARTS:
        return True
    try:
        return dtype.is_floating_point and torch.zeros(16, dtype=torch.uint8, device="cpu").view(dtype).to(torch.float32).numel() > 0
    except (RuntimeError, NotImplementedError):
        return False


class Scratch:
    """Memory for a thread to compute in, made once for all its chunks."""

    def __init__(self) -> None:
        self._made = {name: torch.empty(CHUNK, dtype=torch.float64, device="cpu") for name in ("old", "new", "apart")}

    def get(self, name: str, count: int) -> torch.Tensor:
        """Room for ``count`` elements."""
        return self._made[name][:count]


class Sums:
    """What is known of one pair of tensors while it is read; to be fed by one thread at a time.

    Parameters
    ----------
    old, new : torch.dtype
        Of the two sides.
    """

    def __init__(self, old: torch.dtype, new: torch.dtype) -> None:
        self._is_complex = old.is_complex or new.is_complex
        self._is_same_dtype = old == new
        self._is_long = old == new and old in {torch.int64, torch.uint64}
        self.elements = 0
        self.changed = 0
        self.finite = 0
        self.difference = 0.0
        self.old = 0.0
        self.new = 0.0
        self.product = 0.0
        self.max_abs = 0.0
        self.odd = [0, 0, 0, 0]

    def add(self, old: torch.Tensor, new: torch.Tensor, scratch: Scratch) -> None:
        """Count the same elements of both sides: flat, contiguous, on the host."""
        step = CHUNK // 2 if self._is_complex else CHUNK
        for start in range(0, old.numel(), step):
            self._add(old[start : start + step], new[start : start + step], scratch)

    def _add(self, old: torch.Tensor, new: torch.Tensor, scratch: Scratch) -> None:
        count = old.numel()
        self.elements += count
        one, other = self._wide("old", old, scratch), self._wide("new", new, scratch)
        if self._is_same_dtype:
            self.changed += _changed_bits(old, new)
        else:
            self.changed += self._changed_values(one, other)
        apart = torch.sub(other, one, out=scratch.get("apart", one.numel()))
        if self._is_long:
            apart = _apart_as_integers(old, new, apart)
        square = torch.dot(apart, apart).item()
        if math.isfinite(square):  # so is everything that it was made of
            self.finite += count
        else:
            one, other, apart = self._finite(one, other, apart)
            square = torch.dot(apart, apart).item()
        self.difference += square
        self.old += torch.dot(one, one).item()
        self.new += torch.dot(other, other).item()
        self.product += torch.dot(one, other).item()
        if apart.numel():
            self.max_abs = max(self.max_abs, self._largest(apart))

    def _wide(self, name: str, side: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """The values in double precision, complex ones as pairs."""
        if side.dtype in _PARTS:
            side = side.view(_PARTS[side.dtype])
        elif self._is_complex:
            pairs = scratch.get(name, 2 * side.numel()).view(-1, 2)
            pairs[:, 0].copy_(side)
            pairs[:, 1].zero_()
            return pairs.view(-1)
        return scratch.get(name, side.numel()).copy_(side)

    def _elements(self, wide: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(wide.view(-1, 2)) if self._is_complex else wide

    def _finite(self, *sides: torch.Tensor) -> list[torch.Tensor]:
        """What is finite on both sides, of the older, the newer and their difference; the rest is counted."""
        nans, infs = ([odd(self._elements(side)) for side in sides[:2]] for odd in (torch.isnan, torch.isinf))
        # A complex number of which one part is NaN is NaN, even if the other is infinite.
        for number, mask in enumerate((*nans, infs[0] & ~nans[0], infs[1] & ~nans[1])):
            self.odd[number] += int(torch.count_nonzero(mask))
        finite = ~(nans[0] | nans[1] | infs[0] | infs[1])
        self.finite += int(torch.count_nonzero(finite))
        kept = [self._elements(side)[finite] for side in sides]
        return [torch.view_as_real(side).view(-1) for side in kept] if self._is_complex else kept

    def _changed_values(self, one: torch.Tensor, other: torch.Tensor) -> int:
        before, after = self._elements(one), self._elements(other)
        return int(torch.count_nonzero((before != after) & ~(torch.isnan(before) & torch.isnan(after))))

    def _largest(self, apart: torch.Tensor) -> float:
        if self._is_complex:
            return self._elements(apart).abs().max().item()
        least, most = torch.aminmax(apart)
        return max(-least.item(), most.item())

    def statistics(self) -> Statistics:
        """What came of it."""
        nothing_finite = self.elements > 0 and self.finite == 0
        l2, old, new = (math.sqrt(square) for square in (self.difference, self.old, self.new))
        relative = l2 / old if old else math.inf if l2 else 0.0
        cosine = max(-1.0, min(1.0, self.product / old / new)) if old and new else math.nan
        return Statistics(
            l2=math.nan if nothing_finite else l2,
            relative=math.nan if nothing_finite else relative,
            max_abs=math.nan if nothing_finite else self.max_abs,
            cosine=cosine,
            changed=self.changed / self.elements if self.elements else 0.0,
            elements=self.elements,
            changed_elements=self.changed,
            nan_old=self.odd[0],
            nan_new=self.odd[1],
            inf_old=self.odd[2],
            inf_new=self.odd[3],
        )


def _apart_as_integers(old: torch.Tensor, new: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """Differences of integers that floats cannot tell apart; of those too far apart for 64 bits the floats say enough."""
    whole = new.view(torch.int64) - old.view(torch.int64)
    return torch.where(apart.abs() < 2.0**62, whole.double(), apart)


def _changed_bits(old: torch.Tensor, new: torch.Tensor) -> int:
    """Elements whose bytes differ."""
    bits = _BITS[old.element_size()]
    differ = torch.bitwise_xor(old.view(bits), new.view(bits))
    return int(torch.count_nonzero(differ.view(-1, 2).any(1) if old.element_size() == 16 else differ))  # noqa: PLR2004 - complex128


def same_bytes(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether two flat uint8 tensors on the host hold the same."""
    return all(torch.equal(old[start : start + CHUNK], new[start : start + CHUNK]) for start in range(0, old.numel(), CHUNK))
