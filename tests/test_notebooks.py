"""The lessons in ``notebooks/`` keep what they show, and check what they claim."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from .objects.servers import SECRET

LESSONS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(lesson: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(lesson, as_version=4).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def test_there_are_lessons() -> None:
    assert ["01", "02", "03", "04", "05", "06", "07"] == [lesson.name[:2] for lesson in LESSONS]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_most_outputs_are_compared(lesson: Path) -> None:
    cells = code_cells(lesson)
    ignored = [cell for cell in cells if "nbval-ignore-output" in tags(cell)]

    assert len(ignored) <= len(cells) / 4


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_restored_values_are_asserted_and_all_cells_were_run(lesson: Path) -> None:
    cells = code_cells(lesson)

    assert any("assert " in cell.source and "torch.equal" in cell.source for cell in cells)
    assert list(range(1, len(cells) + 1)) == [cell.execution_count for cell in cells]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_no_cell_fails_but_those_that_should(lesson: Path) -> None:
    failed = [cell.source for cell in code_cells(lesson) if any(output.output_type == "error" for output in cell.outputs)]

    assert [] == [
        source for source in failed if not any(source == cell.source and "raises-exception" in tags(cell) for cell in code_cells(lesson))
    ]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_nothing_of_the_machine_is_in_the_outputs(lesson: Path) -> None:
    text = lesson.read_text()

    assert "/tmp/" not in text  # noqa: S108 - it is looked for
    assert "/root/" not in text
    assert "/work/" not in text


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_nothing_of_the_server_of_a_lesson_is_in_it(lesson: Path) -> None:
    text = lesson.read_text()

    assert "127.0.0.1" not in text
    assert SECRET not in text
