"""What an ``Accelerator`` has prepared is an app state: taken, restored, and gone on from to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from sklearn.datasets import load_digits

from expstate import Snapshot, StateDict, autosave
from expstate.errors import AppStateError, InvalidArgumentError
from expstate.integrations.accelerate import app_state

EPOCHS = 4


class Training:
    """Digits with a scheduler, as accelerate's examples have it."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        digits = load_digits()
        data = torch.utils.data.TensorDataset(torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target))
        model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Dropout(0.1), torch.nn.ReLU(), torch.nn.Linear(16, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, torch.utils.data.DataLoader(data, batch_size=300, shuffle=True)
        )
        self.seen = StateDict(batches=0)
        self.accelerator.register_for_checkpointing(self.seen)

    def epoch(self) -> None:
        for inputs, targets in self.loader:
            loss = torch.nn.functional.cross_entropy(self.model(inputs), targets)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.seen["batches"] += 1
        self.scheduler.step()

    def run(self, root: Path, epochs: int) -> int:
        saver = autosave(app_state(self.accelerator), steps=1, name="digits", root=root, on_busy="wait")
        start = saver.resume() or 0
        with saver:
            for _ in range(start, epochs):
                self.epoch()
                saver.step()
        return start

    @property
    def outcome(self) -> tuple[list[float], int, list[float]]:
        return [value.item() for value in self.model[0].weight.flatten()[:50]], self.seen["batches"], self.scheduler.get_last_lr()


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    once, first, second = Training(), Training(), Training()
    torch.manual_seed(9)
    once.run(tmp_path / "once", EPOCHS)
    torch.manual_seed(9)
    first.run(tmp_path / "twice", 2)
    torch.manual_seed(1)
    start = second.run(tmp_path / "twice", EPOCHS)

    assert 2 == start
    assert once.outcome == second.outcome


def test_all_that_was_prepared_is_in_it(tmp_path: Path) -> None:
    """And what is added; further ones of a kind are numbered."""
    accelerator = Accelerator(cpu=True)
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    loader: Any = torch.utils.data.DataLoader(torch.zeros(4, 2))
    accelerator.prepare(one, two, torch.optim.SGD(one.parameters(), lr=0.1), loader)
    accelerator.register_for_checkpointing(StateDict(x=1), StateDict(y=2))
    state = app_state(accelerator, progress=StateDict(epoch=3))

    assert ["custom", "custom-1", "model", "model-1", "optimizer", "progress", "rng"] == sorted(state)
    snapshot = Snapshot.take(tmp_path / "one", state)
    assert (1, 2, 3) == tuple(snapshot.read_object(path) for path in ("custom/x", "custom-1/y", "progress/epoch"))


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # of torch, when torchdata looks at all that is in it
def test_a_dataloader_with_a_state_is_in_it() -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    accelerator.prepare(torch.nn.Linear(2, 2), torch.utils.data.DataLoader(torch.zeros(4, 2)))

    assert "dataloader" in app_state(accelerator)


def test_what_makes_no_sense_is_refused() -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(InvalidArgumentError, match=r"needs an accelerate\.Accelerator, got Linear"):
        app_state(torch.nn.Linear(1, 1))
    with pytest.raises(InvalidArgumentError, match="prepared nothing yet"):
        app_state(accelerator)
    accelerator.prepare(torch.nn.Linear(1, 1))
    with pytest.raises(AppStateError, match="'model', 'rng'"):
        app_state(accelerator, model=StateDict(), rng=StateDict())
