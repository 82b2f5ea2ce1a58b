"""Promise: a snapshot stands alone. Whatever becomes of the others, in whatever order, those that are left are whole."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from expstate import Snapshot, StateDict
from expstate.engine.collect import gc

NAMES = [f"w{number}" for number in range(8)]

STEP = st.fixed_dictionaries(
    {
        "changed": st.sets(st.sampled_from(NAMES), max_size=8),
        "renamed": st.permutations(NAMES),
        "is_renamed": st.booleans(),
        "base": st.integers(0, 5),
        "is_async": st.booleans(),
        "dedup": st.sampled_from([None, False, True]),
    }
)
FATES = st.sampled_from(["delete", "move", "copy", "overwrite"])


@given(steps=st.lists(STEP, min_size=2, max_size=6), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_can_be_deleted_moved_copied_or_replaced_alone(steps: list[dict[str, object]], data: st.DataObject) -> None:
    """A series of takes, each from any of those before it; then one after the other goes, and the rest is verified and read."""
    with tempfile.TemporaryDirectory() as folder:
        values = {name: torch.full((500 * (number + 1),), float(number)) for number, name in enumerate(NAMES)}
        taken: list[tuple[Path, dict[str, torch.Tensor]]] = []
        for number, step in enumerate(steps):
            if step["is_renamed"]:
                values = dict(zip(step["renamed"], values.values(), strict=True))  # type: ignore[call-overload]
            values = {name: tensor + 1 if name in step["changed"] else tensor for name, tensor in values.items()}  # type: ignore[operator]
            base = Snapshot(taken[int(step["base"]) % len(taken)][0]) if taken else None  # type: ignore[call-overload]
            place = Path(folder) / str(number)
            if step["is_async"]:
                Snapshot.async_take(place, {"state": StateDict(values)}, base=base, dedup=step["dedup"]).wait()  # type: ignore[arg-type]
            else:
                Snapshot.take(place, {"state": StateDict(values)}, base=base, dedup=step["dedup"])  # type: ignore[arg-type]
            taken.append((place, values))
        for place, expected in taken:
            check(place, expected)
        while taken:
            place, expected = taken.pop(data.draw(st.integers(0, len(taken) - 1), label="which goes"))
            fate = data.draw(FATES, label="its fate")
            moved = place.with_name(f"{place.name}-again")
            if fate == "move":
                place.rename(moved)
                check(moved, expected)
            elif fate == "copy":
                shutil.copytree(place, moved)
                shutil.rmtree(place)
                check(moved, expected)
            elif fate == "overwrite":
                Snapshot.take(place, {"state": StateDict(new=torch.ones(3))}, overwrite=True)
                assert ["new"] == list(Snapshot(place).read_object("state"))
            else:
                Snapshot(place).delete()
                assert not place.exists()
            for other, values in taken:
                check(other, values)
        assert not gc(folder).removed


def check(place: Path, expected: dict[str, torch.Tensor]) -> None:
    """The snapshot is whole, and what lies beside its manifest is its own."""
    snapshot = Snapshot(place)
    report = snapshot.verify()
    assert report.ok
    assert not report.unknown_files
    found = snapshot.read_object("state")
    assert set(expected) == set(found)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    for file in place.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(expected[name], tensor), (file, name)
