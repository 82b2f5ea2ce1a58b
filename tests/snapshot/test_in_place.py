"""Tensors are read into the memory where they live, whatever its layout; nobody's reference goes stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import RestoreMismatchError
from expstate.state.tensors import DTYPES
from tests.state.conftest import assert_same

from .conftest import Watched, digest_of, is_equal, mlp, of_every_layout, train


@pytest.mark.parametrize("atomic", [False, True])
def test_parameters_and_moments_keep_their_memory(place: Path, atomic: bool) -> None:
    """After a restore every parameter, buffer and moment lies where it lay, and is the same object."""
    model = mlp(1)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    train(model, optimizer)
    Snapshot.take(place, {"model": model, "optimizer": optimizer})
    expected = digest_of(model.state_dict(), optimizer.state_dict())
    train(model, optimizer, seed=9)
    parameters = list(model.parameters())
    memory = [tensor.data_ptr() for tensor in model.state_dict().values()]
    moments = [tensor.data_ptr() for state in optimizer.state.values() for tensor in state.values()]
    Snapshot(place).restore({"model": model, "optimizer": optimizer}, atomic=atomic)

    assert expected == digest_of(model.state_dict(), optimizer.state_dict())
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert memory == [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert moments == [tensor.data_ptr() for state in optimizer.state.values() for tensor in state.values()]


def test_a_training_goes_on_after_a_restore_over_it(place: Path) -> None:
    """Gradients, versions of tensors and graphs are in order: forward and backward work as before."""
    model = mlp(1)
    Snapshot.take(place, {"model": model})
    before = model(torch.ones(4, 8))
    Snapshot(place).restore({"model": model})
    after = model(torch.ones(4, 8))
    after.sum().backward()

    assert model[0].weight.grad is not None
    assert before.shape == after.shape


LIVE: dict[str, Any] = {
    "contiguous": lambda: torch.zeros(2, 3, 4, 5),
    "channels_last": lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.zeros(5, 4, 3, 2).permute(3, 2, 1, 0),
    "strided": lambda: torch.zeros(4, 6, 8, 10)[::2, ::2, ::2, ::2],
    "view of a large storage": lambda: torch.zeros(20, 3, 4, 5)[3:5],
    "parameter": lambda: torch.nn.Parameter(torch.zeros(2, 3, 4, 5)),
    "gradient": lambda: torch.zeros(2, 3, 4, 5, requires_grad=True),
}


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("stored", LIVE)
@pytest.mark.parametrize("live", LIVE)
def test_every_layout_into_every_other(taken: Any, stored: str, live: str, atomic: bool) -> None:
    """What is stored is row-major; the live tensor keeps its strides, flags and surroundings."""
    source, target = LIVE[stored](), LIVE[live]()
    values = torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        source.copy_(values)
    flags = (target.data_ptr(), target.stride(), target.requires_grad, type(target))
    state = StateDict(x=target)
    taken(x=source).restore({"state": state}, atomic=atomic)

    assert target is state["x"]
    assert torch.equal(values, target)
    assert flags == (target.data_ptr(), target.stride(), target.requires_grad, type(target))
    assert values.count_nonzero() == torch.empty(0).set_(target.untyped_storage()).count_nonzero()


def test_expanded_tensors_are_stored_whole_and_replaced(taken: Any) -> None:
    """Values cannot be read into elements that share memory: a ``StateDict`` gets a new tensor, a module an error beforehand."""
    expanded = torch.arange(3.0).expand(4, 3)
    snapshot = taken(x=expanded)
    live = StateDict(x=torch.zeros(3).expand(4, 3))
    snapshot.restore({"state": live})

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.zeros(3).expand(4, 3))

    assert_same(expanded.contiguous(), live["x"])
    with pytest.raises(RestoreMismatchError, match="elements share memory"):
        snapshot.restore({"state": Holder()})


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("atomic", [False, True])
def test_every_dtype_in_place_and_new(taken: Any, atomic: bool) -> None:
    """All that torch has, sub-byte ones too: the same bits in the same memory."""
    raw = torch.randint(0, 2, (3, 16), dtype=torch.uint8)
    values = {name: torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), 0, (48 // dtype.itemsize,)) for name, dtype in DTYPES.items()}
    snapshot = taken(**values)
    live = StateDict({name: torch.zeros(48, dtype=torch.uint8).view(-1) for name in values})
    for name, dtype in DTYPES.items():
        live[name] = torch.empty(0, dtype=dtype).set_(torch.zeros(48, dtype=torch.uint8).untyped_storage(), 0, (48 // dtype.itemsize,))
    kept = dict(live)
    snapshot.restore({"state": live}, atomic=atomic)

    assert all(kept[name] is live[name] for name in kept)
    for state in (live.state_dict(), snapshot.get_state_dict_for_key("state")):
        assert_same(values, state)


@pytest.mark.parametrize("atomic", [False, True])
def test_tensors_in_parts_are_filled_or_replaced(taken: Any, atomic: bool) -> None:
    """Sparse, quantised and nested ones: over their like in place, over something else anew."""
    values = of_every_layout()
    snapshot = taken(**values)
    alike, unlike = StateDict(of_every_layout()), StateDict({name: torch.zeros(3) for name in values})
    kept = dict(alike)
    for live in (alike, unlike):
        snapshot.restore({"state": live}, atomic=atomic)
        assert_same(values, live.state_dict())

    assert kept["csr"] is alike["csr"]
    assert kept["coo"] is alike["coo"]


def test_arrays_keep_their_memory(taken: Any) -> None:
    """Writable and contiguous ones; others are replaced."""
    values = {"plain": np.arange(6.0).reshape(2, 3), "big": np.arange(4, dtype=">i8"), "records": np.array([(1, 2.0)], dtype="i4,f8")}
    fixed = np.zeros((2, 3))
    fixed.flags.writeable = False
    live = StateDict(
        plain=np.zeros((2, 3)), big=np.zeros(4, ">i8"), records=np.zeros(1, "i4,f8"), fixed=fixed, strided=np.zeros((6, 2))[:, 0]
    )
    kept = dict(live)
    taken(**values, fixed=values["plain"], strided=np.arange(6.0)).restore({"state": live})

    assert_same({**values, "fixed": values["plain"], "strided": np.arange(6.0)}, live.state_dict())
    assert [True, True, True, False, False] == [kept[name] is live[name] for name in live]
    assert not fixed.any()


def test_new_tensors_are_parameters_as_they_were(taken: Any) -> None:
    """What a fresh ``StateDict`` gets wants a gradient if it did."""
    values = {
        "w": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "x": torch.ones(2, requires_grad=True),
    }
    live = StateDict()
    taken(**values).restore({"state": live})

    assert_same(values, live.state_dict())
    assert all(tensor.is_leaf for tensor in live.values())


def test_one_memory_under_two_names_of_other_shapes(taken: Any) -> None:
    """A tensor and a flat view of it are taken and restored over themselves, in place."""
    weight = torch.randn(4, 6)
    expected = weight.clone()
    live = StateDict(weight=weight, flat=weight.view(-1))
    snapshot = taken(weight=weight, flat=weight.view(-1))
    weight.zero_()
    snapshot.restore({"state": live})

    assert torch.equal(expected, weight)
    assert weight.data_ptr() == live["flat"].data_ptr()


def test_columns_of_one_matrix_are_apart(taken: Any) -> None:
    """Views that interleave have no element in common, and no problem."""
    matrix = torch.zeros(5, 4)
    live = StateDict(even=matrix[:, ::2], odd=matrix[:, 1::2])
    taken(even=torch.full((5, 2), 2.0), odd=torch.full((5, 2), 3.0)).restore({"state": live})

    assert torch.equal(torch.tensor([2.0, 3.0, 2.0, 3.0]).expand(5, 4), matrix)


BASE = torch.zeros(10, 4)
OVERLAPS: dict[str, dict[str, torch.Tensor]] = {
    "twice the same": {"a": BASE, "b": BASE},
    "part of it": {"a": BASE, "b": BASE[2:5]},
    "partly": {"a": BASE[:5], "b": BASE[4:8]},
    "transposed": {"a": BASE, "b": BASE.t()},
    "after others": {"a": BASE, "b": BASE[8:], "c": BASE[9:]},
    "array": {"a": BASE, "b": BASE.numpy()[3:5]},
}


@pytest.mark.parametrize("live", OVERLAPS.values(), ids=OVERLAPS)
def test_two_values_for_one_memory_are_refused(taken: Any, live: dict[str, Any]) -> None:
    """Different entries that would be read into memory that live tensors share: an error that names both, and nothing changes."""
    BASE.zero_()
    values = {name: torch.full(tuple(value.shape), float(number + 1)) for number, (name, value) in enumerate(live.items())}
    values = {name: values[name].numpy() if isinstance(value, np.ndarray) else values[name] for name, value in live.items()}
    own = Watched(**live)
    with pytest.raises(RestoreMismatchError, match=r"entries 'state/\w' and 'state/\w' differ, and their live tensors are the same memory"):
        taken(**values).restore({"state": own})

    assert 0 == BASE.count_nonzero()
    assert [] == own.loads


def test_one_stateful_under_two_keys(place: Path) -> None:
    """Restored twice from equal entries it is read once; from different ones it is refused."""
    snapshot = Snapshot.take(place, {"one": mlp(1), "two": mlp(1), "three": mlp(3)})
    model = mlp(2)
    snapshot.restore({"one": model, "two": model})

    assert is_equal(mlp(1), model)
    with pytest.raises(RestoreMismatchError, match=r"'one/0\.weight' and 'three/0\.weight' differ"):
        snapshot.restore({"one": model, "three": model})
