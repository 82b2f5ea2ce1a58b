"""What does not fit is found before anything changes, and all of it is said at once."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import PickleNotAllowedError, RestoreInterruptedError, RestoreMismatchError, SnapshotCorruptError
from tests.state.conftest import assert_same

from .conftest import Refusing, Watched, digest_of, is_equal, mlp, train


def _refused(snapshot: Snapshot, app_state: dict[str, Any], **options: Any) -> RestoreMismatchError:
    """Restore, see it refused with nothing changed, and give the error."""
    before = digest_of(*(value.state_dict() for value in app_state.values()))
    with pytest.raises(RestoreMismatchError, match="nothing was changed") as found:
        snapshot.restore(app_state, **options)
    assert before == digest_of(*(value.state_dict() for value in app_state.values()))
    with pytest.raises(RestoreMismatchError) as planned:
        snapshot.restore(app_state, dry_run=True, **options)
    assert planned.value.problems == found.value.problems
    return found.value


def test_names_of_modules_must_be_the_same(place: Path) -> None:
    """Missing and unexpected names are listed; with ``strict=False`` they are reported and the rest is restored."""
    stored = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "old": torch.nn.Linear(2, 3)})
    live = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "new": torch.nn.Linear(3, 2)})
    snapshot = Snapshot.take(place, {"model": stored})
    error = _refused(snapshot, {"model": live})
    before = live["new"].weight.clone()
    report = snapshot.restore({"model": live}, strict=False)

    assert "key 'model': the snapshot lacks 'new.weight', 'new.bias'" in error.problems
    assert "key 'model': the snapshot has names that the live module has not: 'old.weight', 'old.bias'" in error.problems
    assert ("new.weight", "new.bias") == report.missing
    assert ("model/old.weight", "model/old.bias") == report.unexpected
    assert ("model/a.weight", "model/a.bias") == report.restored
    assert torch.equal(stored["a"].weight, live["a"].weight)
    assert torch.equal(before, live["new"].weight)


def test_long_lists_of_names_are_cut(place: Path) -> None:
    """Ten names and how many more there are."""
    snapshot = Snapshot.take(place, {"model": torch.nn.Sequential()})
    error = _refused(snapshot, {"model": torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(20)))})

    assert "'0.weight'" in str(error)
    assert "and 30 more" in str(error)


def test_all_problems_come_in_one_error(place: Path) -> None:
    """Of several keys: names, shapes, dtypes, groups and objects."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    snapshot = Snapshot.take(
        place,
        {"model": model, "state": StateDict(x=torch.ones(2), y=1), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)},
    )
    live = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2).double())
    groups = [{"params": live[0].parameters()}, {"params": live[1].parameters()}]
    error = _refused(
        snapshot, {"model": live, "state": StateDict(x=torch.ones(2, dtype=torch.int32)), "optimizer": torch.optim.SGD(groups, lr=0.1)}
    )

    assert [
        "entry 'model/0.weight' has shape (4, 4) in the snapshot and (5, 4) live",
        "entry 'model/0.bias' has shape (4,) in the snapshot and (5,) live",
        "entry 'model/1.weight' has shape (2, 4) in the snapshot and (2, 5) live",
        "entry 'model/1.bias' has dtype float32 in the snapshot and float64 live; pass cast=True to convert",
        "entry 'state/x' has dtype float32 in the snapshot and int32 live; pass cast=True to convert",
        "key 'optimizer': the snapshot has 1 parameter groups and the live optimizer 2",
        "key 'optimizer': group 0 has 4 parameters in the snapshot and 2 live",
    ] == list(error.problems)
    assert all(problem in str(error) for problem in error.problems)


# Dtypes


@pytest.mark.parametrize("atomic", [False, True])
def test_values_are_converted_when_asked(place: Path, atomic: bool) -> None:
    """``cast=True`` reads float32 into bfloat16 and int64, contiguous or not, and reports it."""
    values = torch.linspace(-3, 3, 24).view(4, 6)
    snapshot = Snapshot.take(place, {"state": StateDict(a=values, b=values, c=values, d=values, same=values)})
    live = StateDict(
        a=torch.zeros(4, 6, dtype=torch.bfloat16),
        b=torch.zeros(4, 6, dtype=torch.int64),
        c=torch.zeros(6, 4, dtype=torch.float64).t(),
        d=torch.zeros(4, 6, dtype=torch.complex64),
        same=torch.zeros(4, 6),
    )
    tensors = dict(live)
    report = snapshot.restore({"state": live}, cast=True, atomic=atomic)

    assert ("state/a", "state/b", "state/c", "state/d") == report.cast
    assert all(tensors[name] is live[name] for name in tensors)
    assert_same([values.to(tensor.dtype) for tensor in tensors.values()], list(live.values()))


def test_modules_of_another_dtype(place: Path) -> None:
    """A float32 model into its half in bfloat16; integer buffers are the same and not cast."""
    live = mlp(2).to(torch.bfloat16)
    snapshot = Snapshot.take(place, {"model": mlp(1)})
    error = _refused(snapshot, {"model": live})
    report = snapshot.restore({"model": live}, cast=True)

    assert "entry 'model/0.weight' has dtype float32 in the snapshot and bfloat16 live; pass cast=True to convert" == error.problems[0]
    assert is_equal(mlp(1).to(torch.bfloat16), live)
    assert 8 == len(report.cast)


def test_arrays_of_another_dtype(taken: Any) -> None:
    """NumPy arrays are cast into place too; texts differ in dtype by their length alone and are simply replaced."""
    snapshot = taken(number=np.arange(3.0), text=np.array(["a", "bcd"]), raw=np.array([b"a", b"bcd"]))
    live = StateDict(number=np.zeros(3, np.int16), text=np.array(["x", "y"]), raw=np.array([b"x", b"yz"]))
    number = live["number"]
    error = _refused(snapshot, {"state": live})
    report = snapshot.restore({"state": live}, cast=True)

    assert ("entry 'state/number' has dtype <f8 in the snapshot and <i2 live; pass cast=True to convert",) == error.problems
    assert ("state/number",) == report.cast
    assert number is live["number"]
    assert_same(np.arange(3, dtype=np.int16), number)
    assert_same(np.array(["a", "bcd"]), live["text"])
    assert_same(np.array([b"a", b"bcd"]), live["raw"])


# Optimizers


def _optimizers(stored: Any, live: Any, place: Path, steps: int = 1) -> tuple[Snapshot, Any]:
    train(stored[0], stored[1], steps)
    return Snapshot.take(place, {"optimizer": stored[1]}), {"optimizer": live}


def test_groups_of_an_optimizer_are_counted_beforehand(place: Path) -> None:
    """``load_state_dict`` of the optimizer would say so too, but after the model had been restored."""
    model, other = mlp(1), mlp(2)
    snapshot, app_state = _optimizers((model, torch.optim.Adam(model.parameters())), torch.optim.Adam(list(other.parameters())[:4]), place)
    error = _refused(snapshot, app_state)

    assert "key 'optimizer': group 0 has 6 parameters in the snapshot and 4 live" in error.problems


def test_moments_must_have_the_shape_of_their_parameter(place: Path) -> None:
    """A state that torch would load without a word, and fail at the next step."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    live = torch.optim.Adam(torch.nn.Sequential(torch.nn.Linear(8, 5)).parameters())
    snapshot, app_state = _optimizers((model, torch.optim.Adam(model.parameters())), live, place)
    error = _refused(snapshot, app_state)

    assert "entry 'optimizer/state/0/exp_avg' has shape (4, 8), and its parameter (5, 8)" in error.problems


def test_a_group_of_very_many_parameters_is_counted_too(place: Path) -> None:
    """Their numbers are stored as a tensor and not inline."""
    parameters = [torch.nn.Parameter(torch.empty(0)) for _ in range(10_100)]
    snapshot = Snapshot.take(place, {"optimizer": torch.optim.SGD(parameters, lr=0.5)})
    live = torch.optim.SGD(parameters, lr=0.1)
    error = _refused(snapshot, {"optimizer": torch.optim.SGD(parameters[:-1], lr=0.1)})
    snapshot.restore({"optimizer": live})

    assert ("key 'optimizer': group 0 has 10100 parameters in the snapshot and 10099 live",) == error.problems
    assert 0.5 == live.param_groups[0]["lr"]


def test_another_stateful_under_the_key(place: Path) -> None:
    """A module is not restored from what was no module, nor the other way without a fight."""
    snapshot = Snapshot.take(place, {"value": Watched(), "model": mlp(1)})
    own = Watched()
    Snapshot.take(place.parent / "number", {"model": _Number()})

    assert "lacks" in str(_refused(snapshot, {"value": mlp(2)}))
    assert "not the state of a module" in str(_refused(Snapshot(place.parent / "number"), {"model": mlp(2)}))
    snapshot.restore({"model": own})
    assert_same(dict(mlp(1).state_dict()), own.state)


class _Number:
    """A stateful whose state is a number."""

    def state_dict(self) -> Any:
        return 5

    def load_state_dict(self, state: Any) -> None:
        assert 5 == state


def test_a_state_may_be_any_value(place: Path) -> None:
    """Not only dicts."""
    report = Snapshot.take(place, {"number": _Number()}).restore({"number": _Number()})

    assert ("number",) == report.restored


# Files


@pytest.mark.parametrize("harm", ["missing", "shorter", "longer", "link"])
def test_files_are_looked_at_beforehand(place: Path, harm: str) -> None:
    """A missing file, one of another size or a link is found before a byte of live state changes."""
    snapshot = Snapshot.take(place, {"a": mlp(1), "b": mlp(1)})
    (file,) = place.glob("b-*.safetensors")
    data = file.read_bytes()
    file.unlink()
    if harm == "link":
        (place / "elsewhere").write_bytes(data)
        file.symlink_to("elsewhere")
    elif harm != "missing":
        file.write_bytes(data[:-1] if harm == "shorter" else data + b"0")
    a, b = mlp(2), mlp(3)
    with pytest.raises(SnapshotCorruptError, match=r"b-00001-"):
        snapshot.restore({"a": a, "b": b})

    assert is_equal(mlp(2), a)
    assert is_equal(mlp(3), b)


# After the plan


def test_a_stateful_that_refuses_its_state_interrupts(place: Path) -> None:
    """The error says which entries hold the snapshot's values and which do not, and keeps the cause."""
    Snapshot.take(
        place, {"first": Watched(a=1), "model": mlp(1), "bad": Watched(x=torch.ones(2), y=1, z=torch.ones(1)), "last": Watched(b=2)}
    )
    first, model, last = Watched(a=0), mlp(2), Watched(b=0)
    bad = Refusing(x=torch.zeros(2), y=0)
    with pytest.raises(RestoreInterruptedError, match="RuntimeError: this state is not for me") as found:
        Snapshot(place).restore({"first": first, "model": model, "bad": bad, "last": last})

    assert {"first/a", "bad/x", *(f"model/{name}" for name in model.state_dict())} == set(found.value.applied)
    assert {"bad/y", "bad/z", "last/b"} == set(found.value.unapplied)
    assert isinstance(found.value.__cause__, RuntimeError)
    assert torch.equal(torch.ones(2), bad.state["x"])
    assert ({"a": 1}, {"b": 0}) == (first.state, last.state)
    assert is_equal(mlp(1), model)


def test_damage_interrupts_and_names_what_is_whole(place: Path) -> None:
    """Found while reading: entries in other blocks are applied, those of the damaged one are not."""
    sources = {name: torch.randn(2**19) for name in ("a", "b", "c")}
    snapshot = Snapshot.take(place, {"state": StateDict(sources)})
    (entry,) = snapshot.entries("state/b")
    (file,) = place.glob("*.safetensors")
    file.chmod(0o644)
    with file.open("r+b") as handle:
        handle.seek(entry.boxes[0].offset + 10)  # type: ignore[union-attr]
        handle.write(b"\x01\x02\x03\x04")
    live = StateDict({name: torch.zeros(2**19) for name in sources})
    with pytest.raises(RestoreInterruptedError, match="entry 'state/b' is damaged") as found:
        snapshot.restore({"state": live}, memory_budget_bytes=2 * 2**20)

    assert "state/b" in found.value.unapplied
    assert {"state/a", "state/b", "state/c"} == {*found.value.applied, *found.value.unapplied}
    assert all(torch.equal(sources[path[6:]], live[path[6:]]) for path in found.value.applied)


def test_objects_are_read_before_anything_changes(place: Path) -> None:
    """One that needs trust, beside other problems and alone."""
    with pytest.warns(UserWarning, match="trust=True"):
        snapshot = Snapshot.take(place, {"model": mlp(1), "state": StateDict(opaque=_Number(), x=torch.ones(1))})
    model = mlp(2)
    with pytest.raises(PickleNotAllowedError, match=r"'state/opaque' \(.*_Number\)"):
        snapshot.restore({"model": model, "state": StateDict(x=torch.zeros(1))})
    error = _refused(snapshot, {"model": model, "state": StateDict(x=torch.zeros(1, dtype=torch.int8))})

    assert is_equal(mlp(2), model)
    assert 2 == len(error.problems)
    assert "'state/opaque'" in error.problems[1]


class Wrapped(torch.Tensor):
    """A tensor subclass that can be taken apart."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        found = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        found.inner = inner
        return found

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: Any, context: Any, size: Any, stride: Any) -> Any:
        return Wrapped(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*(argument.inner if isinstance(argument, Wrapped) else argument for argument in arguments), **(options or {}))


def _without(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "class":
        monkeypatch.delattr(sys.modules[__name__], "Wrapped")
    elif what == "enum":
        monkeypatch.delattr(sys.modules[__name__], "Phase")
    elif what == "pandas":
        monkeypatch.setitem(sys.modules, "pandas", None)
    else:
        monkeypatch.setattr(torch, "Generator", _no_generator)


class Phase(enum.Enum):
    """An enum of this module."""

    WARM = 1


def _no_generator(*_: Any) -> Any:
    msg = "no such device"
    raise RuntimeError(msg)


@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("class", Wrapped(torch.ones(2)), "'state/value': class .*Wrapped is not known"),
        ("enum", Phase.WARM, "'state/value': class .*Phase is not known"),
        ("pandas", pd.DataFrame({"x": [1]}), "'state/value.*: pandas is not installed"),
        ("generator", torch.Generator(), "'state/value': a generator of device 'cpu' cannot be made here"),
    ],
)
def test_what_this_process_lacks_is_found_beforehand(
    taken: Any, monkeypatch: pytest.MonkeyPatch, what: str, value: Any, words: str
) -> None:
    """A class that is not imported, a package that is not installed, a device that is not there: and the way around is to exclude it."""
    snapshot = taken(tensor=torch.ones(3), value=value)
    live = Watched(tensor=torch.zeros(3))
    _without(monkeypatch, what)
    with pytest.raises(RestoreMismatchError, match=words):
        snapshot.restore({"state": live})
    assert 0 == live.state["tensor"].count_nonzero()
    snapshot.restore({"state": live}, exclude="state/value")

    assert [{"tensor"}] == [set(state) for state in live.loads]
    assert 3 == live.state["tensor"].count_nonzero()
