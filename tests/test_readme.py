"""The README keeps its word: its Python blocks run from top to bottom, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from expstate import settings

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")  # of torch, about checkpoints in one process
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # of DCP itself, with torch 2.6
def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPSTATE_CATALOG", str(tmp_path / "catalog.db"))
    text = README.read_text()
    namespace: dict[str, object] = {"__name__": "readme"}
    blocks = list(BLOCK.finditer(text))

    assert len(blocks) >= 5
    for block in blocks:
        # Empty lines put the block where it stands, so that a traceback names the line of the README.
        lines_above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_above + block[1], str(README), "exec"), namespace)  # noqa: S102 - our own text


def test_table_of_settings_is_complete() -> None:
    documented = re.findall(r"^\| `(EXPSTATE_[A-Z_]+)` \|", README.read_text(), flags=re.MULTILINE)

    assert sorted(f"EXPSTATE_{name.upper()}" for name in settings.Settings.__dataclass_fields__) == sorted(documented)
