"""Decoders are made when their module is imported: msgspec crashes where several threads come first to a type whose decoder is not made."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import msgspec
import pytest

from expstate.engine.lease import encode_lease


def fresh(name: str) -> ModuleType:
    """A module as it is right after its import."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def makes_a_decoder(function: Callable[[], Any]) -> bool:
    """Whether msgspec looks up what the fields of some type are."""
    called = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            called.add(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return "get_class_annotations" in called


def lease(module: ModuleType, _: Path) -> Any:
    return module.decode_lease(encode_lease("0" * 32, "take", ["one", "two"])).action


def features(module: ModuleType, _: Path) -> Any:
    return module._features_of(b'{"requires": ["take"]}')[0]


def spooled(module: ModuleType, path: Path) -> Any:
    return module._lines(path)[0].record.name


@pytest.mark.parametrize(
    ("name", "decode"), [("expstate.engine.lease", lease), ("expstate.format.manifest", features), ("expstate.catalog.spool", spooled)]
)
def test_what_is_decoded_has_its_decoder_already(name: str, decode: Callable[[ModuleType, Path], Any], tmp_path: Path) -> None:
    record = {"id": "0" * 32, "digest": "0" * 64, "url": "/a", "host": "h", "project": "p", "user": "u", "name": "take"}
    record |= {"step": None, "created_at": 1, "nbytes": 1, "written_bytes": 1, "world_size": 1, "parent": None, "body": {}, "packages": {}}
    path = tmp_path / "lines"
    path.write_text(json.dumps({"at": 1, "record": record}) + "\n")
    module = fresh(name)

    assert not makes_a_decoder(lambda: decode(module, path))
    assert "take" == decode(module, path)


def test_that_a_decoder_is_made_would_be_noticed() -> None:
    class Point(msgspec.Struct):
        x: int

    assert makes_a_decoder(lambda: msgspec.convert({"x": 1}, Point))
    assert not makes_a_decoder(lambda: msgspec.convert({"x": 1}, Point))
