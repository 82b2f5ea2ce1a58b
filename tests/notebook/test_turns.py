"""What was asked for while a cell runs waits for its end."""

from __future__ import annotations

import pytest

from expstate.notebook.turns import Turns

from .shells import Shell


@pytest.fixture
def turns() -> Turns:
    turns = Turns(Shell())
    turns.watch()
    return turns


def test_between_cells_an_action_runs_at_once(turns: Turns) -> None:
    done: list[int] = []
    turn = turns.add(lambda: done.append(1))

    assert [1] == done
    assert turn.done


def test_during_a_cell_it_waits_for_the_end_in_order(turns: Turns) -> None:
    done: list[int] = []
    turns.begin()
    first, second = turns.add(lambda: done.append(1)), turns.add(lambda: done.append(2))

    assert ([], False, True) == (done, first.done, turns.is_busy)
    turns.end()
    assert [1, 2] == done
    assert second.done
    assert not turns.is_busy


def test_a_cell_in_a_cell_does_not_end_the_outer_one(turns: Turns) -> None:
    done: list[int] = []
    turns.begin()
    turns.begin()
    turns.add(lambda: done.append(1))
    turns.end()

    assert ([], True) == (done, turns.is_busy)
    turns.end()
    assert [1] == done


def test_one_that_is_cancelled_does_not_run(turns: Turns) -> None:
    done: list[int] = []
    turns.begin()
    turn = turns.add(lambda: done.append(1))

    assert turn.cancel()
    turns.end()
    assert [] == done
    assert turn.done
    assert not turns.add(lambda: None).cancel()


def test_one_that_fails_does_not_keep_the_next(turns: Turns, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    turns.begin()
    turns.add(lambda: done.append(1 // 0))
    turns.add(lambda: done.append(2))
    turns.end()

    assert [2] == done
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_cell_that_loaded_the_extension_may_end(turns: Turns) -> None:
    turns.end()

    assert not turns.is_busy


def test_the_shell_is_left_alone_afterwards() -> None:
    shell = Shell()
    turns = Turns(shell)
    turns.watch()
    shell.events.trigger("pre_run_cell")
    assert turns.is_busy
    shell.events.trigger("post_run_cell")
    turns.leave()
    shell.events.trigger("pre_run_cell")

    assert not turns.is_busy
