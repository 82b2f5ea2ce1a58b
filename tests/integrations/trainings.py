"""A small training that takes snapshots by itself, in this process or in one that is ended from outside."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expstate import Autosave, RNGState, Snapshot, StateDict, autosave

STEPS = 60
FOLDER = Path(__file__).parent.parent.parent


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The images of scikit-learn, and what they show; to import it would take as long as to import torch, in each process."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    table = torch.from_numpy(np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=","))
    return table[:, :-1].float() / 16, table[:, -1].long()


class Training:
    """Digits, a small network, Adam, shuffled batches; the same seeds give the same bits."""

    def __init__(self) -> None:
        self._data, self._target = digits()
        torch.manual_seed(5)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 10))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.progress = StateDict(losses=[])

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "progress": self.progress, "rng": RNGState()}

    def step(self) -> None:
        batch = torch.randint(len(self._data), (64,))
        loss = torch.nn.functional.cross_entropy(self.model(self._data[batch]), self._target[batch])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.progress["losses"].append(loss.item())

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def uninterrupted() -> Training:
    """The training from beginning to end."""
    training = Training()
    for _ in range(STEPS):
        training.step()
    return training


def run(root: Path, **options: Any) -> tuple[Training, int, Autosave]:
    """Go on from the last take, to the end; the training, where it went on, and its autosave."""
    training = Training()
    saver = autosave(training.state, **{"steps": 10, "name": "digits", "root": root, "on_busy": "wait", **options})
    start = saver.resume() or 0
    with saver:
        for _ in range(start, STEPS):
            training.step()
            saver.step()
    return training, start, saver


def takes(root: Path, name: str = "digits") -> list[Snapshot]:
    """The committed takes of a series, the oldest first."""
    return [Snapshot(path.parent) for path in sorted((root / name).glob("*/snapshot.json"))]


def steps_of(root: Path, name: str = "digits") -> list[int]:
    return [snapshot.metadata.step or 0 for snapshot in takes(root, name)]


@contextlib.contextmanager
def started(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs some Python after the imports of this module; ``root`` is its first argument. It ends with the block."""
    imports = "import sys, signal, time, os\nfrom tests.integrations.trainings import *"
    program = f"{imports}\ntorch.set_num_threads(1)\nroot = Path(sys.argv[1])\n{code}"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return (line.strip() for line in process.stdout)


def wait_for(path: Path, pattern: str) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + 60
    while not list(path.glob(pattern)):
        assert time.monotonic() < until, f"no {pattern} in {path}"
        time.sleep(0.01)
