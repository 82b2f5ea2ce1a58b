"""Names: what becomes part of a path or of a ref is made or checked in one place."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from expstate.errors import InvalidNameError, UnsafePathError
from expstate.format import names


@given(st.lists(st.text(max_size=80), max_size=20))
def test_data_files_of_any_keys_have_distinct_allowed_names(keys: list[str]) -> None:
    """Whatever the keys are, their files differ without regard to case, are allowed by the format and short."""
    namer = names.FileNamer("3f9a2c71")
    found = {key: namer.name(key) for key in dict.fromkeys(keys)}
    assert len(found) == len({name.casefold() for name in found.values()})
    for name in found.values():
        names.check_file_name(name)
        assert len(name) <= 100
        assert names.is_of_attempt(name, "3f9a2c71")


def test_files_of_one_key_are_numbered() -> None:
    """The second file of a key has the next number; a key that looks alike gets a stem of its own."""
    namer = names.FileNamer("3f9a2c71")
    assert ["model-00001-3f9a2c71.safetensors", "model-00002-3f9a2c71.safetensors"] == [namer.name("model"), namer.name("model")]
    assert "Model" == namer.name("Model")[:5]
    assert "Model-00001" != namer.name("Model")[:11]


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/b",
        "base/../x",
        "base/",
        "",
        ".hidden",
        "a\\b",
        "a\0b",
        "file:///x",
        "~/x",
        "snapshot.json",
        "a..b",
        "x" * 256,
        "a b",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    """A manifest names files of its own folder and of ``base`` and no others."""
    with pytest.raises(UnsafePathError):
        names.check_file_name(name)


@pytest.mark.parametrize(
    "label", ["", " a", "a ", "latest", "live", ".", "..", "a@b", "a:b", "a=b", "a/b", "a\nb", "a\u202eb", "a\u200bb", "\ud800", "é" * 128]
)
def test_a_label_that_a_ref_cannot_carry_is_refused(label: str) -> None:
    """Names and tags are printable, short, and free of what notebooks cut words at."""
    with pytest.raises(InvalidNameError):
        names.check_label(label, "name")


def test_labels_are_kept_in_normal_form() -> None:
    """Two ways to write one letter are one name."""
    assert "caf\u00e9" == names.check_label("cafe\u0301", "name")
    assert "lr-3e-4 warm-up" == names.check_label("lr-3e-4 warm-up", "tag")
    with pytest.raises(InvalidNameError, match="must be text"):
        names.check_label(3, "tag")


def test_leases_and_temporary_files_belong_to_their_attempt() -> None:
    """Clean-up tells by the name alone whose a file is."""
    assert "3f9a2c71" == names.attempt_of_lease(names.lease_name("3f9a2c71"))
    assert names.attempt_of_lease("snapshot.json") is None
    assert names.is_of_attempt(".snapshot.json.3f9a2c71", "3f9a2c71")
    assert names.is_of_attempt("..attempt-3f9a2c71.json.3f9a2c71", "3f9a2c71")
    assert not names.is_of_attempt("model-00001-3f9a2c71.safetensors", "3f9a2c72")
    assert not names.is_of_attempt("notes-3f9a2c71.txt", "3f9a2c71")
    assert not names.is_of_attempt("anything", ".*")


def test_ids_are_new_and_recognised() -> None:
    """An id is 32 hexadecimal digits, its first eight the attempt's."""
    one = names.new_id()
    assert names.is_id(one)
    assert one != names.new_id()
    assert one[:8] == names.attempt_of(one)
    assert not names.is_id(one[:31])
