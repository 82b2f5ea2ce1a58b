"""Names from a stranger: dtypes, kinds, devices, paths and labels are looked up in tables, and lead nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, StateDict
from expstate.errors import (
    InvalidNameError,
    ManifestError,
    RestoreMismatchError,
)
from tests.format.forging import (
    Forged,
    app_state,
    digest_text,
    everything,
    guarded,
    refused,
)

WEIGHT = "model/first.weight"
pytestmark = pytest.mark.usefixtures("imported")


# H15: names of things


@pytest.mark.parametrize(
    "dtype",
    [
        "load",
        "hub",
        "__class__",
        "Tensor",
        "os.system",
        "float32 ",
        "FLOAT32",
        "torch.float32",
        "",
        "float",
        "qint8",
        "<f4",
        "O",
        4,
        None,
        [],
        "x" * 10**5,
    ],
    ids=lambda dtype: repr(dtype)[:20],
)
def test_a_dtype_is_one_of_a_fixed_table(forged: Forged, dtype: Any) -> None:
    """No name is looked up in a module (H15)."""
    forged.entry(WEIGHT)[2] = dtype

    refused(forged, ManifestError, repr(WEIGHT) if isinstance(dtype, str) else "entries")


@pytest.mark.parametrize(
    "dtype",
    [
        "|O",
        "O",
        "object",
        "O8",
        "|O8",
        "<f0",
        "<U0",
        "|V0",
        "f4,f4",
        "(2,)f4",
        "<f4 ",
        "[('a','<f4')]",
        "float64",
        "=f8",
        "<f-8",
        "<x8",
        "",
        "<f4[ns]x",
    ],
)
def test_a_numpy_dtype_is_a_plain_one(forged: Forged, dtype: str) -> None:
    """Dtypes that hold pointers, or that NumPy would have to parse, are no dtypes here (H15)."""
    forged.entry("extra/array")[2] = dtype

    refused(forged, ManifestError, "extra/array")


@pytest.mark.parametrize("dtype", ["<f7", "<b9", "<i3", "<c4", "<M8[zz]", "<M4[s]", "<f8[s]", "<u99999999"])
def test_a_numpy_dtype_that_numpy_does_not_know_is_refused(forged: Forged, tmp_path: Path, dtype: str) -> None:
    """A name of the right form without a dtype behind it raises when memory for it is made, before anything live changes (H15)."""
    forged.entry("extra/array")[2:4] = [dtype, [0]]
    forged.box("extra/array")[2] = digest_text(b"")
    forged.write()
    found = everything(forged.folder, tmp_path / "copies")
    for action in ("restore", "atomic restore", "key"):
        assert isinstance(found[action], ManifestError), f"{action} gave {found[action]!r}"
        assert "extra/array" in str(found[action])


@pytest.mark.parametrize(
    "device", ["cuda:99", "cuda", "meta", "xyz", "cpu:7", "", "x" * 10**5, "mps", "privateuseone", "\0", "hpu:0"], ids=lambda name: name[:9]
)
def test_a_device_that_is_not_here_is_the_cpu(forged: Forged, tmp_path: Path, device: str) -> None:
    """The recorded device is a wish: one that is unknown or absent changes nothing else."""
    forged.entry(WEIGHT)[7] = device
    forged.write()
    with guarded(forged.folder):
        found = Snapshot(forged.folder).read_object(WEIGHT)

    if not torch.accelerator.is_available():
        assert torch.device("cpu") == found.device
    assert torch.equal(app_state()["model"].first.weight.cpu(), found.cpu())


@pytest.mark.parametrize("kind", ["dict ", "", "os.system", "builtins.eval", "__class__", "torch.load", "object", 4, None])
def test_a_container_is_of_a_known_kind(forged: Forged, kind: Any) -> None:
    """The name of a codec is looked up in a table of codecs, and nowhere else."""
    forged.entry("extra/keys")[2] = kind

    refused(forged, ManifestError, "extra/keys" if isinstance(kind, str) else "entries")


@pytest.mark.parametrize("kind", ["tensors", "", "Parameter", None, 3])
def test_a_tensor_is_of_a_known_kind(forged: Forged, kind: Any) -> None:
    """A tensor, a parameter or an array, and nothing else."""
    forged.entry(WEIGHT)[5] = kind

    refused(forged, ManifestError, repr(WEIGHT) if isinstance(kind, str) else "entries")


# H30: names that people give


@pytest.mark.parametrize(
    "label", ["x" * 300, ".", "..", "latest", "live", "a/b", "a@b", "a:b", "a=b", "", " a", "a\x1b[0m", "a\u202eb", "a\u200bb", "\ud800", 3]
)
def test_a_name_that_refs_cannot_carry_is_not_taken(tmp_path: Path, label: Any) -> None:
    """Such names are refused before anything is written (H22, H30)."""
    place = tmp_path / "new"
    with pytest.raises(InvalidNameError):
        Snapshot.take(place, {"a": StateDict(x=1)}, name=label)
    with pytest.raises(InvalidNameError):
        Snapshot.take(place, {"a": StateDict(x=1)}, tags=[label])

    assert not place.exists()


def test_names_that_look_alike_are_one_name(tmp_path: Path) -> None:
    """A composed and a decomposed accent are the same (H30)."""
    one = Snapshot.take(tmp_path / "one", {"a": StateDict(x=1)}, name="caf\u00e9", tags=["e\u0301", "\u00e9"])
    other = Snapshot.take(tmp_path / "other", {"a": StateDict(x=1)}, name="cafe\u0301")

    assert one.metadata.name == other.metadata.name
    assert ("\u00e9",) == one.metadata.tags


def test_keys_that_disks_cannot_tell_apart_get_files_of_their_own(tmp_path: Path) -> None:
    """Keys named like devices, that differ in case alone or are very long all come back (H30)."""
    keys = [
        "con",
        "CON",
        "Con",
        "NUL",
        ".",
        "..",
        "a/b",
        "a_b",
        "é",
        "e\u0301",
        "x" * 300,
        "x" * 301,
        "%",
        " ",
        "-",
        "~",
        "digests",
        "a.objects",
    ]
    state = {key: StateDict(value=torch.full((2,), float(number))) for number, key in enumerate(keys)}
    snapshot = Snapshot.take(tmp_path / "new", state)
    files = [record.name for record in snapshot.manifest.files]
    back = {key: StateDict(value=torch.zeros(2)) for key in keys}
    Snapshot(tmp_path / "new").restore(back)

    assert len(keys) == len({name.casefold() for name in files})
    assert max(map(len, files)) <= 100
    assert list(range(len(keys))) == [int(back[key]["value"][0]) for key in keys]


# H31: the paths of entries


def _again(forged: Forged) -> None:
    forged.document["entries"].append(forged.entry("extra/epoch"))


def _again_as_another(forged: Forged) -> None:
    forged.document["entries"].append(["value", WEIGHT, 1, None])


def _below_a_tensor(forged: Forged) -> None:
    forged.document["entries"].append(["value", f"{WEIGHT}/x", 1, None])


def _below_a_value(forged: Forged) -> None:
    forged.document["entries"].append(["value", "extra/epoch/x", 1, None])


def _below_nothing(forged: Forged) -> None:
    forged.document["entries"].append(["value", "extra/not/there", 1, None])


def _before_its_container(forged: Forged) -> None:
    entry = forged.entry("extra/keys/1")
    forged.document["entries"].remove(entry)
    forged.document["entries"].insert(0, entry)


def _without_a_name(forged: Forged) -> None:
    forged.document["entries"].append(["value", "extra/", 1, None])


def _empty_path(forged: Forged) -> None:
    forged.document["entries"].append(["value", "", 1, None])


def _slash(forged: Forged) -> None:
    forged.document["entries"].append(["value", "/", 1, None])


def _double_slash(forged: Forged) -> None:
    forged.document["entries"].append(["value", "extra//x", 1, None])


def _no_key(forged: Forged) -> None:
    forged.document["entries"].append(["value", "other", 1, None])


def _key_without_state(forged: Forged) -> None:
    forged.document["keys"].append(["other", "x"])


def _key_twice(forged: Forged) -> None:
    forged.document["keys"].append(forged.document["keys"][0])


def _below_an_alias(forged: Forged) -> None:
    forged.document["entries"].append(["value", "model/second.weight/x", 1, None])


def _bad_escape(forged: Forged) -> None:
    forged.document["entries"].append(["value", "extra/%FF", 1, None])


def _control_character(forged: Forged) -> None:
    forged.document["entries"].append(["value", "extra/a\x1b[31m", 1, None])


def _bidirectional(forged: Forged) -> None:
    forged.document["entries"].append(["value", "extra/a\u202eb", 1, None])


def _bad_escape_in_module(forged: Forged) -> None:
    forged.document["entries"].append(["value", "model/%FF", 1, None])


@pytest.mark.parametrize(
    "edit",
    [
        _again,
        _again_as_another,
        _below_a_tensor,
        _below_a_value,
        _below_nothing,
        _below_an_alias,
        _before_its_container,
        _without_a_name,
        _empty_path,
        _slash,
        _double_slash,
        _no_key,
        _key_without_state,
        _key_twice,
        _control_character,
        _bidirectional,
    ],
)
def test_paths_that_no_take_writes_are_refused(forged: Forged, edit: Callable[[Forged], None]) -> None:
    """Each path is there once, below a container, under a key, and spelt as paths are (H22, H31)."""
    edit(forged)

    refused(forged, ManifestError, "")


@pytest.mark.parametrize("edit", [_bad_escape, _bad_escape_in_module])
def test_an_escape_that_stands_for_no_text_stands_for_itself(forged: Forged, tmp_path: Path, edit: Callable[[Forged], None]) -> None:
    """Percent signs that no take writes lead to a name that is not there, and not to an error in decoding them."""
    edit(forged)
    forged.write()
    found = everything(forged.folder, tmp_path / "copies")

    assert found["verify"].ok
    if edit is _bad_escape:
        assert 1 == found["key"]["%FF"]
    else:
        assert isinstance(found["restore"], RestoreMismatchError)
        assert "%FF" in str(found["restore"])


@pytest.mark.parametrize(
    "target", ["model/nothing", "", "model", "extra/half", "model/second.weight", "model/second.bias", "extra/epoch", "../x", None]
)
def test_an_alias_of_what_is_no_tensor_of_its_key_is_refused(forged: Forged, target: Any) -> None:
    """An alias names a tensor of the same key before it: no chains, no circles, no containers."""
    forged.entry("model/second.weight")[2] = target

    refused(forged, ManifestError, "model/second.weight" if target is not None else "entries")


def test_a_gradient_is_wanted_only_where_there_can_be_one(forged: Forged) -> None:
    """Integers and arrays that say they want one are refused before torch trips over them."""
    for path in ("extra/table", "extra/array"):
        fresh = Forged(forged.folder)
        fresh.entry(path)[6] = True
        refused(fresh, ManifestError, repr(path))
        fresh.entry(path)[6] = False
        fresh.write()
