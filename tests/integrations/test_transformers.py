"""A ``Trainer`` of transformers takes snapshots by a callback, and goes on from them to the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.datasets import load_digits

from expstate import Snapshot
from expstate.errors import ExpstateWarning, InvalidArgumentError
from expstate.integrations.transformers import SnapshotCallback

from .trainings import steps_of, takes


class Classifier(torch.nn.Module):
    """A network as a trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(24, 10))
        self.seen = 0

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(inputs)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Stop(transformers.TrainerCallback):
    """Ends a training early, or does something else at a step."""

    def __init__(self, step: int, then: Any = None) -> None:
        self._step = step
        self._then = then

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            if self._then is not None:
                self._then()
            else:
                control.should_training_stop = True


def trainer(root: Path, *more: Any, **options: Any) -> tuple[transformers.Trainer, SnapshotCallback]:
    digits = load_digits()
    data = [
        {"inputs": row, "labels": label} for row, label in zip(digits.data.astype(np.float32)[:480] / 16, digits.target[:480], strict=True)
    ]
    args = transformers.TrainingArguments(
        output_dir=str(root / "output"),
        per_device_train_batch_size=16,
        max_steps=75,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10,
        use_cpu=True,
        seed=11,
    )
    callback = SnapshotCallback(**{"steps": 10, "name": "digits", "root": root, "on_busy": "wait", **options})
    return transformers.Trainer(Classifier(), args, train_dataset=data, callbacks=[callback, *more]), callback  # type: ignore[arg-type]


def weights(of: transformers.Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in of.model.parameters()])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> transformers.Trainer:
    """The training from beginning to end."""
    whole, _ = trainer(tmp_path_factory.mktemp("whole"))
    whole.train()
    return whole


@pytest.mark.parametrize("last", [43, 60])
def test_a_training_goes_on_to_the_same_bits(tmp_path: Path, expected: transformers.Trainer, last: int) -> None:
    """In the midst of an epoch, and at its end."""
    first, _ = trainer(tmp_path, Stop(last - 1))
    first.train()
    assert last == steps_of(tmp_path)[-1]
    second, callback = trainer(tmp_path)
    folder = callback.checkpoint(tmp_path / "resumed")
    second.train(resume_from_checkpoint=folder)

    assert torch.equal(weights(expected), weights(second))
    assert 75 == steps_of(tmp_path)[-1]
    assert expected.state.global_step == second.state.global_step
    assert expected.lr_scheduler.get_last_lr() == second.lr_scheduler.get_last_lr()  # type: ignore[union-attr]


def test_the_weights_come_back_without_a_trainer(tmp_path: Path) -> None:
    whole, callback = trainer(tmp_path)
    whole.train()
    model = Classifier()
    takes(tmp_path)[-1].restore({"model": model})

    assert torch.equal(weights(whole), torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert 3 == len(takes(tmp_path))
    assert 0 == callback.saver.failed


def test_nothing_to_go_on_from_is_none(tmp_path: Path) -> None:
    _, callback = trainer(tmp_path)

    assert callback.checkpoint(tmp_path / "resumed") is None
    assert not (tmp_path / "resumed").exists()


def test_a_damaged_snapshot_is_told_and_the_one_before_is_used(tmp_path: Path) -> None:
    trainer(tmp_path)[0].train()
    path = next(Path(takes(tmp_path)[-1].path).glob("optimizer*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    _, callback = trainer(tmp_path)
    with pytest.warns(ExpstateWarning, match="is damaged"):
        folder = callback.checkpoint(tmp_path / "resumed")

    assert folder is not None
    assert 70 == transformers.TrainerState.load_from_json(f"{folder}/trainer_state.json").global_step


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path)[0].train()
    _, callback = trainer(tmp_path)
    assert callback.checkpoint(tmp_path / "resumed") == callback.checkpoint(tmp_path / "resumed")
    (tmp_path / "resumed" / "model.safetensors").write_text("another")
    with pytest.raises(InvalidArgumentError, match=r"model\.safetensors"):
        callback.checkpoint(tmp_path / "resumed")


def test_bad_options_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="steps must be"):
        SnapshotCallback(steps=0, root=tmp_path)


def test_a_signal_leaves_a_snapshot(tmp_path: Path) -> None:
    """And what handled it before does so after the step."""
    passed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: passed.append(steps_of(tmp_path)[-1]))
    try:
        trainer(tmp_path, Stop(22, lambda: os.kill(os.getpid(), signal.SIGTERM)))[0].train()
    finally:
        signal.signal(signal.SIGTERM, before)

    assert [23] == passed
    assert isinstance(Snapshot(takes(tmp_path)[0].path), Snapshot)
