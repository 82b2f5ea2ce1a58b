"""The manifest: what is written is read back, what was cut or changed is never believed, and the published schema tells the truth."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from expstate import Snapshot
from expstate.errors import (
    ExpstateError,
    ManifestError,
    ManifestTooLargeError,
    SnapshotCorruptError,
    SnapshotNotFoundError,
    UnsupportedFormatError,
)
from expstate.format import manifest as manifests
from expstate.format import names
from expstate.format.manifest import (
    AliasEntry,
    Box,
    ContainerEntry,
    FileRecord,
    KeyRecord,
    Manifest,
    Metadata,
    ObjectEntry,
    TensorEntry,
    ValueEntry,
    decode,
    encode,
    is_torn,
)
from expstate.format.validate import validate
from tests.campaign import Campaign
from tests.format.forging import Forged, body_of, seal
from tests.format.mutations import mutations
from tests.format.records import DIGEST, small

# There and back

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.integers(-(2**63), 2**63 - 1)
INDEX = st.integers(0, 2**62)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBER | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
BYTES = st.binary(min_size=32, max_size=32)
SHAPE = st.lists(INDEX, max_size=4).map(tuple)
RANK = st.none() | INDEX
BOX = st.builds(
    Box, INDEX, INDEX, BYTES, st.none() | st.binary(max_size=96) | st.tuples(INDEX, INDEX), st.none() | SHAPE, st.none() | SHAPE
)
BOXES = st.lists(BOX, max_size=3).map(tuple)
ENTRY = st.one_of(
    st.builds(TensorEntry, TEXT, TEXT, SHAPE, BOXES, TEXT, st.booleans(), st.none() | TEXT, RANK),
    st.builds(ObjectEntry, TEXT, TEXT, INDEX, st.booleans(), BOXES, RANK),
    st.builds(ValueEntry, TEXT, PLAIN, RANK),
    st.builds(AliasEntry, TEXT, TEXT, RANK),
    st.builds(ContainerEntry, TEXT, TEXT, PLAIN, RANK),
)
MANIFEST = st.builds(
    Manifest,
    format=st.just(1),
    id=st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    created_at=TEXT,
    writer=TEXT,
    requires=st.just(()),
    world_size=INDEX,
    metadata=st.builds(
        Metadata,
        name=st.none() | TEXT,
        tags=st.lists(TEXT, max_size=3).map(tuple),
        params=st.dictionaries(TEXT, PLAIN, max_size=3),
        metrics=st.dictionaries(TEXT, PLAIN, max_size=3),
        note=st.none() | TEXT,
        step=st.none() | NUMBER,
    ),
    provenance=st.dictionaries(TEXT, PLAIN, max_size=3),
    keys=st.lists(st.builds(KeyRecord, TEXT, TEXT), max_size=3).map(tuple),
    files=st.lists(st.builds(FileRecord, TEXT, INDEX, INDEX, BYTES), max_size=3).map(tuple),
    entries=st.lists(ENTRY, max_size=4).map(tuple),
)


@given(MANIFEST)
def test_what_is_encoded_is_decoded(manifest: Manifest) -> None:
    """All records come back equal, and equal manifests are equal bytes."""
    data = encode(manifest)

    assert manifest == decode(data)
    assert data == encode(decode(data))


@given(MANIFEST)
def test_a_manifest_is_json_that_ends_with_its_digest(manifest: Manifest) -> None:
    """Other programs can read it, and check it, with what every language has."""
    data = encode(manifest)
    body, _, _ = data.rpartition(b',"blake3":')
    found = json.loads(data)

    assert blake3(body).hexdigest() == found["blake3"] == manifests.digest_of(data)
    assert ["format", "id"] == list(found)[:2]
    assert "blake3" == list(found)[-1]
    assert data.endswith(b'"}\n')


def test_a_real_one_comes_back(genuine: Path) -> None:
    """The manifest of a snapshot is believed, and encodes to the same bytes again."""
    data = (genuine / names.MANIFEST).read_bytes()
    manifest = decode(data)
    validate(manifest)

    assert data == encode(manifest)
    assert manifest == Snapshot(genuine).manifest


# Cut, changed, followed by something


def test_what_is_cut_short_is_torn(genuine: Path) -> None:
    """Wherever the end of a commit is missing, there is no snapshot: a take was interrupted."""
    data = encode(small())
    whole = (genuine / names.MANIFEST).read_bytes()
    for manifest in (data, whole):
        for missing in [*range(1, 201), len(manifest) // 2, len(manifest) - 1, len(manifest)]:
            cut = manifest[: len(manifest) - missing]
            if missing == 1:
                continue  # only the line feed is missing: told below
            assert is_torn(cut), f"{missing} bytes are missing"
            with pytest.raises(SnapshotNotFoundError, match="interrupted"):
                decode(cut)


def test_what_lacks_its_line_feed_alone_is_not_believed() -> None:
    """All but the last byte is there: whichever it is called, nothing is read from it."""
    with pytest.raises((SnapshotNotFoundError, SnapshotCorruptError)):
        decode(encode(small())[:-1])


def test_every_bit_that_flips_is_noticed() -> None:
    """A single flipped bit anywhere, the digest included, is damage, never another manifest and never a torn one."""
    data = encode(small())
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(SnapshotCorruptError):
                decode(bytes(changed))
            assert not is_torn(bytes(changed))


@pytest.mark.parametrize("more", [b"\n", b" ", b"\0", b"\0" * 4096, b"{}", b'{"format":1'])
def test_what_is_followed_by_something_is_damaged(more: bytes) -> None:
    """A whole manifest with bytes behind it is not one that is being written."""
    data = encode(small()) + more

    assert not is_torn(data)
    with pytest.raises(SnapshotCorruptError):
        decode(data)


@given(st.binary(max_size=400))
def test_noise_is_torn_or_damaged(data: bytes) -> None:
    """Bytes that are no manifest raise nothing but what a caller expects."""
    with pytest.raises((SnapshotNotFoundError, SnapshotCorruptError)):
        decode(data)


@given(st.integers(0, 400), st.integers(0, 400), st.binary(max_size=20))
def test_what_is_overwritten_is_noticed(start: int, length: int, other: bytes) -> None:
    """Any run of bytes replaced by others is torn or damaged."""
    data = encode(small())
    changed = data[:start] + other + data[start + length :]
    if changed == data:
        return
    with pytest.raises((SnapshotNotFoundError, SnapshotCorruptError)):
        decode(changed)


def test_zeros_that_a_crash_left_are_torn() -> None:
    """A file of the right size without its bytes, as some file systems leave, is no commit."""
    data = encode(small())
    for kept in (0, 10, len(data) // 2):
        assert is_torn(data[:kept] + bytes(len(data) - kept))


# Versions and caps


@pytest.mark.parametrize("number", [2, 10, 999_999_999])
def test_a_newer_format_is_refused(number: int) -> None:
    """Even where its records cannot be read, the message is about the version."""
    document = json.loads(encode(small()))
    del document["blake3"]
    document["format"] = number
    document["entries"] = "of another form"
    with pytest.raises(UnsupportedFormatError, match=f"format {number}.*upgrade"):
        decode(seal(body_of(document)))


@pytest.mark.parametrize("readable", [True, False])
def test_a_required_feature_that_is_unknown_is_refused(readable: bool) -> None:
    """A feature is named whether or not it changes the form of the records."""
    document = json.loads(encode(small()))
    del document["blake3"]
    document["requires"] = ["holograms"]
    if not readable:
        document["entries"] = 5
    with pytest.raises(UnsupportedFormatError, match="holograms"):
        decode(seal(body_of(document)))


def test_fields_of_the_future_are_ignored() -> None:
    """A newer version may add fields and items at the end of records that old readers need not know."""
    document = json.loads(encode(small()))
    del document["blake3"]
    document["more"] = {"a": 1}
    document["entries"][1] += ["more"]
    document["files"][0] += [5]
    document["metadata"]["more"] = None

    assert small() == decode(seal(body_of(document)))


def test_a_take_writes_no_more_entries_than_are_read() -> None:
    """What a restore would refuse is refused by the take."""
    with patch.object(manifests, "MAX_ENTRIES", 2), pytest.raises(ManifestTooLargeError, match="3 entries"):
        encode(small())
    with patch.object(manifests, "MAX_ENTRIES", 3):
        encode(small())


def test_a_take_writes_no_larger_manifest_than_is_read() -> None:
    """The cap is that of readers, to the byte."""
    size = len(encode(small()))
    with patch.object(manifests, "MAX_BYTES", size - 1), pytest.raises(ManifestTooLargeError, match="bytes"):
        encode(small())
    with patch.object(manifests, "MAX_BYTES", size):
        assert size == len(encode(small()))


# What the records say


def test_a_sound_one_is_believed() -> None:
    """The manifest that the tests below break passes."""
    validate(small())


SOUND = small()
TENSOR, VALUE = SOUND.entries[1], SOUND.entries[2]
FILE = SOUND.files[0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"world_size": 0}, "world size"),
        ({"files": (FILE, FILE)}, "twice"),
        ({"files": (FILE, FileRecord(FILE.name.replace("a-", "A-"), 4104, 4096, DIGEST))}, "twice"),
        ({"files": (FileRecord(FILE.name, 4095, 4096, DIGEST),)}, "not possible"),
        ({"files": (FileRecord(FILE.name, 4104, 7, DIGEST),)}, "not possible"),
        ({"files": (FileRecord(FILE.name, 2**63, 4096, DIGEST),)}, "not possible"),
        ({"files": (FileRecord(FILE.name, 4104, 4096, DIGEST[:31]),)}, "not possible"),
        ({"files": ()}, "'a/t' lies in file"),
        ({"keys": ()}, "'a' is not one of the keys"),
        ({"keys": (KeyRecord("a", ""), KeyRecord("b", ""))}, "'b' is a key without"),
        ({"keys": (KeyRecord("a", ""), KeyRecord("a", ""))}, "key twice"),
        ({"entries": (*SOUND.entries, VALUE)}, "'a/v' is there twice"),
        ({"entries": (*SOUND.entries, ValueEntry("a/t/x", 1))}, "'a/t/x' is not inside"),
        ({"entries": (*SOUND.entries, ValueEntry("a/", 1))}, "has no name"),
        ({"entries": (*SOUND.entries, ValueEntry("a/\x07", 1))}, "characters"),
        ({"entries": (ContainerEntry("a", "what"), TENSOR)}, "'a' cannot be read.*what"),
        ({"entries": (*SOUND.entries, AliasEntry("a/x", "a/v"))}, "'a/x' is tied"),
        ({"entries": (*SOUND.entries, TensorEntry("a/u", "float32", (1,), (Box(0, 4100, DIGEST),)))}, "over each other"),
        ({"entries": (*SOUND.entries, ObjectEntry("a/o", "", 0, needs_trust=False, boxes=(Box(0, 4096, DIGEST),)))}, "'a/o' has no bytes"),
        ({"entries": (*SOUND.entries, ObjectEntry("a/o", "", 5, needs_trust=False, boxes=()))}, "'a/o' has no bytes"),
    ],
)
def test_records_that_do_not_go_together_are_refused(changes: dict[str, Any], match: str) -> None:
    """Each is named with what is wrong with it."""
    with pytest.raises(ManifestError, match=match):
        validate(small(**changes))


@given(st.integers(0, 6), st.integers(0, 6), st.lists(st.tuples(*[st.integers(0, 6)] * 4), max_size=9), st.booleans())
def test_boxes_are_believed_exactly_if_they_tile(rows: int, columns: int, cuts: list[tuple[int, int, int, int]], made_to: bool) -> None:
    """Compared with counting how many boxes each element is in; one without elements is in one box at least."""
    if made_to and rows and columns:
        middle = (cuts[0][0] % rows, cuts[0][1] % columns) if cuts else (0, 0)
        places = [
            ((0, 0), (middle[0], columns)),
            ((middle[0], 0), (rows - middle[0], middle[1])),
            ((middle[0], middle[1]), (rows - middle[0], columns - middle[1])),
        ]
    else:
        places = [((top, left), (height, width)) for top, left, height, width in cuts if top + height <= rows and left + width <= columns]
    covered = [[0] * columns for _ in range(rows)]
    for (top, left), (height, width) in places:
        for row in range(top, top + height):
            for column in range(left, left + width):
                covered[row][column] += 1
    boxes, position = [], 4096
    for starts, sizes in places:
        boxes.append(Box(0, position, DIGEST, None, starts, sizes))
        position += math.prod(sizes)
    entry = TensorEntry("a/t", "uint8", (rows, columns), tuple(boxes))
    manifest = small(files=(FileRecord(FILE.name, position, 4096, DIGEST),), entries=(SOUND.entries[0], entry))
    if boxes and all(count == 1 for row in covered for count in row):
        validate(manifest)
    else:
        with pytest.raises(ManifestError, match=r"'a/t' (is not covered|has no box)"):
            validate(manifest)


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=5), st.booleans())
def test_rows_are_believed_exactly_if_they_follow_each_other(rows: int, cuts: list[tuple[int, int]], made_to: bool) -> None:
    """Most tensors are cut along one dimension, and the boxes may come in any order."""
    if made_to:
        ends = sorted({0, rows, *(start % rows for start, _ in cuts)})
        cuts = [(start, stop - start) for start, stop in itertools.pairwise(ends)][::-1]
    places = [(start, count) for start, count in cuts if start + count <= rows]
    boxes = tuple(Box(0, 4096 + 32 * number, DIGEST, None, (start, 0), (count, 2)) for number, (start, count) in enumerate(places))
    entry = TensorEntry("a/t", "uint8", (rows, 2), boxes)
    manifest = small(files=(FileRecord(FILE.name, 4096 + 32 * 8, 4096, DIGEST),), entries=(SOUND.entries[0], entry))
    if sorted(row for start, count in places for row in range(start, start + count)) == list(range(rows)):
        validate(manifest)
    else:
        with pytest.raises(ManifestError, match=r"'a/t' (is not covered|has no box)"):
            validate(manifest)


def test_boxes_cut_along_too_many_dimensions_are_refused() -> None:
    """The time that a check takes doubles with each of them."""
    shape = (2,) * 9
    half = (1,) * 9
    boxes = (Box(0, 4096, DIGEST, None, (0,) * 9, half), Box(0, 4097, DIGEST, None, half, half))
    entry = TensorEntry("a/t", "uint8", shape, boxes)
    with pytest.raises(ManifestError, match="9 dimensions"):
        validate(small(entries=(SOUND.entries[0], entry)))


@pytest.mark.campaign("Safe to open", "manifests with random changes")
def test_manifests_changed_at_random_are_refused_by_our_errors(genuine: Path, campaign: Campaign) -> None:
    """Whatever is changed under a digest that is right, decoding and checking raise nothing else."""
    whole = Forged(genuine).document
    # One that is small takes more changes in the same time; one that is whole has something of every kind.
    little = json.loads(encode(small()))
    del little["blake3"]

    @hypothesis_settings(max_examples=campaign.choose(150, 1000), database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.data())
    def check(document: dict[str, Any], data: st.DataObject) -> None:
        with contextlib.suppress(ExpstateError):
            validate(decode(seal(body_of(data.draw(mutations(document))))))
        campaign.tried()

    for document, rounds in ((whole, campaign.choose(1, 100)), (little, campaign.choose(1, 900))):
        for number in range(rounds):
            # Many rounds with seeds of their own: Hypothesis remembers all that it has tried in one.
            (seed(number)(check) if campaign.is_long else check)(document)
    campaign.count("other errors than ours", 0)
