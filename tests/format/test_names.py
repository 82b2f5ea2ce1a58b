"""Names become parts of paths and of what people type: they are safe there, distinct, and of bounded length."""

from __future__ import annotations

import re
import unicodedata
from enum import Enum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate.errors import InvalidNameError, UnsafePathError
from expstate.format import names

TOKEN = "3f9a2c71"  # noqa: S105 - no secret: the id of an attempt
STEMS = st.text(min_size=1, max_size=200) | st.text(st.sampled_from("aA./_-~\\é"), min_size=1, max_size=4)


def test_ids_are_unlike_each_other() -> None:
    """Each snapshot has an id of its own, and its attempt a part of it."""
    ids = [names.new_id() for _ in range(100)]

    assert 100 == len(set(ids))
    assert all(names.is_id(text) and text.startswith(names.attempt_of(text)) for text in ids)


@pytest.mark.parametrize("text", ["", "3f9a2c71", "g" * 32, "A" * 32, "0" * 33, "0" * 32 + "\n", "\u0660" * 32])
def test_what_is_no_id(text: str) -> None:
    """An id is 32 hexadecimal digits in lower case and nothing else."""
    assert not names.is_id(text)


# Files


@given(st.lists(STEMS, max_size=12))
def test_files_have_distinct_names_that_the_format_allows(stems: list[str]) -> None:
    """Whatever keys are called, their files are told apart on disks that know no case, and readers take the names."""
    namer = names.FileNamer(TOKEN)
    given_names = [namer.name(stem) for stem in stems]

    assert len(stems) == len({name.casefold() for name in given_names})
    for name in given_names:
        names.check_file_name(name)
        names.check_file_name(f"base/{name}")
        assert names.is_of_attempt(name, TOKEN)
        assert len(name) <= 100
        assert not name.startswith((".", "-00"))
        assert ".." not in name


def test_files_of_one_key_are_numbered() -> None:
    """The number comes behind the key, so that listings are in order."""
    namer = names.FileNamer(TOKEN)

    assert [f"model-0000{n}-{TOKEN}.safetensors" for n in (1, 2)] == [namer.name("model") for _ in range(2)]
    assert f"optimizer-00001-{TOKEN}.safetensors" == namer.name("optimizer")


def test_keys_that_differ_in_case_alone_get_different_files() -> None:
    """The second of them gets a number, and keeps it for its further files."""
    namer = names.FileNamer(TOKEN)

    assert ["model-00001", "MODEL_2-00001", "Model_3-00001"] == [namer.name(stem)[:-21] for stem in ("model", "MODEL", "Model")]
    assert "MODEL_2-00002" == namer.name("MODEL")[:-21]


def test_a_number_that_makes_a_name_unique_does_not_make_it_clash() -> None:
    """A key that is called what the numbering would give is told apart too."""
    namer = names.FileNamer(TOKEN)
    found = [namer.name(stem) for stem in ("a_2", "a", "A", "A_2", "a/2")]

    assert 5 == len({name.casefold() for name in found})


def test_long_keys_that_begin_alike_get_different_files() -> None:
    """What a name is cut to is made unique after the cut."""
    namer = names.FileNamer(TOKEN)
    found = [namer.name("k" * 300 + str(number)) for number in range(12)]

    assert 12 == len(set(found))
    assert max(map(len, found)) <= 100


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"model-00001-{TOKEN}.safetensors", True),
        (f"base/model-00001-{TOKEN}.safetensors", True),
        (f".snapshot.json.{TOKEN}", True),
        (f"..attempt-{TOKEN}.json.{TOKEN}", True),
        ("model-00001-00000000.safetensors", False),
        (f"notes-{TOKEN}.txt", False),
        (f"model-00001-{TOKEN}.safetensors.bak", False),
        (f"sub/model-00001-{TOKEN}.safetensors", False),
        (f"../model-00001-{TOKEN}.safetensors", False),
        (f".hidden-{TOKEN}.safetensors", False),
        (f"{TOKEN}", False),
        (f"snapshot.{TOKEN}", False),
        ("snapshot.json", False),
        (f".attempt-{TOKEN}.json", False),
        (f"model-00001-{TOKEN}.safetensors\n", False),
    ],
)
def test_which_files_are_of_an_attempt(name: str, expected: bool) -> None:
    """Data files and temporary files that carry its id where the format puts it, and nothing that people keep."""
    assert expected is names.is_of_attempt(name, TOKEN)


@pytest.mark.parametrize("attempt", ["", ".*", "3f9a2c7", "3F9A2C71", "........", "3f9a2c71|x"])
def test_no_file_is_of_an_attempt_without_an_id(attempt: str) -> None:
    """An id that is a pattern, or none, matches nothing: clean-up removes by it."""
    assert not names.is_of_attempt(f"model-00001-{TOKEN}.safetensors", attempt)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f".attempt-{TOKEN}.json", TOKEN),
        (f"..attempt-{TOKEN}.json.{TOKEN}", TOKEN),
        (f"..attempt-{TOKEN}.json.00000000", None),
        (f"attempt-{TOKEN}.json", None),
        (".attempt-3F9A2C71.json", None),
        (".attempt-.json", None),
        (f".attempt-{TOKEN}.json.bak", None),
        (f".attempt-{TOKEN}.json\n", None),
    ],
)
def test_which_files_are_leases(name: str, expected: str | None) -> None:
    """The lease of an attempt, or the temporary file that was to become it."""
    assert expected == names.attempt_of_lease(name)


@given(st.from_regex(r"[0-9a-f]{8}", fullmatch=True))
def test_a_lease_is_known_by_its_name(attempt: str) -> None:
    """What is called a lease is recognised as one, and is not taken for a file of its attempt."""
    assert attempt == names.attempt_of_lease(names.lease_name(attempt))
    assert not names.is_of_attempt(names.lease_name(attempt), attempt)


@given(st.text(max_size=60) | st.text(st.sampled_from("./\\~:ab-0\0\n"), max_size=40))
def test_a_file_name_that_passes_stays_in_the_folder(name: str) -> None:
    """No text that the check lets through has a part that leads elsewhere."""
    candidate = f"{name}-00001-{TOKEN}.safetensors"
    try:
        names.check_file_name(candidate)
    except UnsafePathError:
        pass
    else:
        assert re.fullmatch(r"(base/)?[A-Za-z0-9_-][A-Za-z0-9._-]*", candidate)
        assert ".." not in candidate.split("/")
        assert len(candidate.rpartition("/")[2]) <= 255


# Labels


@given(st.text(max_size=300))
def test_a_label_that_passes_can_be_typed(text: str) -> None:
    """What a ref cannot carry, or a terminal would not show, is refused; the rest comes back in normal form."""
    try:
        label = names.check_label(text, "name")
    except InvalidNameError as error:
        said = str(error)
        assert said.startswith("name")
        assert said.isprintable()
    else:
        assert unicodedata.normalize("NFC", text) == label
        assert label
        assert label == label.strip()
        assert not set("@:=/") & set(label)
        assert label.replace("\xa0", " ").replace("\u3000", " ").isprintable() or any(unicodedata.category(c) == "Zs" for c in label)
        assert len(label.encode()) <= 255
        assert label == names.check_label(label, "name")


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "baseline",
        "run 7",
        "v1.0-rc_2",
        "größe",
        "日本",
        "🎉",
        "a" * 255,
        "con",
        "%41",
        "--all",
        "a,b",
        "LATEST",
        "latest-1",
        "lives",
        "...",
        "❤️",
    ],
)
def test_labels_of_every_language_are_taken(text: str) -> None:
    """What can be typed and shown is a label."""
    assert text == names.check_label(text, "tag")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a ",
        " a",
        "\ta",
        "latest",
        "latest~2",
        "latest~",
        "live",
        ".",
        "..",
        "a@b",
        "a:b",
        "a=b",
        "a/b",
        "a\nb",
        "a\x00",
        "a" * 256,
        "é" * 128,
    ],
)
def test_labels_that_refs_cannot_carry_are_refused(text: str) -> None:
    """Empty, padded, reserved, of characters that refs are cut at, or too long in bytes."""
    with pytest.raises(InvalidNameError, match="tag"):
        names.check_label(text, "tag")


@pytest.mark.parametrize(
    "text",
    [
        *("a\u200bb", "a\u202eb", "a\u2066b", "a\ufeffb", "a\x1b[0m", "a\x85b", "a\u2028b", "a\ud800", "a\ue000", "a\u0378", "a\u00adb"),
        *("\u3164", "a\u115f", "a\u1160b", "\uffa0", "a\u034fb", "\u2800", "a\u180bb", "a\u17b4", "a\U000e0041b", "\U0001d173"),
    ],
)
def test_labels_that_cannot_be_seen_are_refused(text: str) -> None:
    """Invisible characters make two labels look alike, and control characters change what a terminal shows."""
    with pytest.raises(InvalidNameError, match="control or invisible"):
        names.check_label(text, "name")


@pytest.mark.parametrize("given_value", [None, 3, b"a", ["a"], True])
def test_a_label_is_text(given_value: object) -> None:
    """Other types are refused by name."""
    with pytest.raises(InvalidNameError, match=type(given_value).__name__):
        names.check_label(given_value, "name")


def test_labels_are_compared_in_normal_form() -> None:
    """However an accent was typed, it is one label; what it then is, is what is checked."""
    assert names.check_label("caf\u00e9", "name") == names.check_label("cafe\u0301", "name")
    assert "\u2260" == names.check_label("=\u0338", "name")
    with pytest.raises(InvalidNameError, match="longer than 255 bytes"):
        names.check_label("\u0958" * 50, "name")  # 150 bytes as typed, 300 in normal form


class Kind(str, Enum):
    """A text with a name."""

    SMALL = "small"


@pytest.mark.parametrize(("given_value", "expected"), [(np.str_("a"), "a"), (np.str_("cafe\u0301"), "caf\u00e9"), (Kind.SMALL, "small")])
def test_a_label_is_a_plain_text(given_value: str, expected: str) -> None:
    """Whatever kind of text was given."""
    label = names.check_label(given_value, "tag")

    assert (str, expected) == (type(label), label)


@given(st.text(st.characters(), max_size=20))
def test_halves_of_characters_are_what_utf_8_cannot_hold(text: str) -> None:
    """And nothing else."""
    try:
        text.encode()
    except UnicodeEncodeError:
        assert names.has_lone_surrogates(text)
    else:
        assert not names.has_lone_surrogates(text)
