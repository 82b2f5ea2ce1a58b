"""Equal states have equal digests, and a run that goes on from any of its snapshots ends bit for bit where it would have ended."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from expstate import RNGState, Snapshot, StateDict, settings
from tests.campaign import Campaign
from tests.engine.processes import in_child
from tests.state.conftest import assert_same

MIB = 2**20

# Digests


def made(seed: int) -> dict[str, Any]:
    """A state of several blocks, with strides, other dtypes, an optimizer and what needs no tensor."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(700, 900), torch.nn.BatchNorm1d(900))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 700)).square().mean().backward()
    optimizer.step()
    others = StateDict(strided=torch.randn(300, 400).t(), half=torch.randn(5, 7).bfloat16(), array=np.arange(1000.0), step=3, text="x")
    return {"model": model, "optimizer": optimizer, "others": others}


def digests_of(snapshot: Snapshot) -> dict[str, Any]:
    """What tells contents from one another: the digests of all boxes, and plain values."""
    found = {}
    for entry in snapshot.entries():
        boxes = getattr(entry, "boxes", None)
        found[entry.path] = repr(entry) if boxes is None else [(box.starts, box.sizes, box.digest) for box in boxes]
    return found


WAYS: dict[str, Callable[[Path, dict[str, Any]], Snapshot]] = {
    "as usual": Snapshot.take,
    "budget": functools.partial(Snapshot.take, memory_budget_bytes=4 * MIB),
    "async": lambda place, state: Snapshot.async_take(place, state).wait(),
    "no shared boxes": functools.partial(Snapshot.take, dedup=False),
}


@pytest.mark.campaign("Verified", "equal states taken in other ways, threads, files and processes")
def test_equal_states_have_equal_digests_however_they_are_taken(tmp_path: Path, campaign: Campaign) -> None:
    state = made(1)
    expected = digests_of(Snapshot.take(tmp_path / "first", state))
    points = [
        (way, threads, file_bytes, elsewhere)
        for way in WAYS
        for threads in (1, 3, 8)
        for file_bytes in (3 * MIB, 5 * MIB, 2**34)  # no tensor is larger, and cut
        for elsewhere in (False, True)
    ]
    for number, (way, threads, file_bytes, elsewhere) in enumerate(campaign.each(points, short=8)):

        def take(place: Path = tmp_path / f"{number}", way: str = way, given: tuple[int, int] = (threads, file_bytes)) -> dict[str, Any]:
            with settings.override(io_threads=given[0], data_file_bytes=given[1]):
                return digests_of(WAYS[way](place, state))

        assert expected == (in_child(take).result if elsewhere else take())
    assert expected != digests_of(Snapshot.take(tmp_path / "other", made(2)))


# Runs that go on


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Points that are changed a little by all generators there are; workers have the first three from the loader's seed."""

    def __init__(self) -> None:
        own = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(64, 6, generator=own)
        self.targets = self.inputs.sum(dim=1, keepdim=True)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.01 * torch.randn(6) + 0.01 * random.random() + 0.01 * float(np.random.uniform())
        return self.inputs[index] + noise, self.targets[index]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
    "Adam": lambda weights: torch.optim.Adam(weights, lr=0.01),
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, amsgrad=True),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, lr=0.003, momentum=0.5, centered=True),
    "Adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.05),
    "LBFGS": lambda weights: torch.optim.LBFGS(weights, lr=0.1, max_iter=3, history_size=3),
}


class Run:
    """A training whose epochs each end in a snapshot."""

    def __init__(self, optimizer: str, workers: int, seed: int) -> None:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.shuffle = torch.Generator().manual_seed(seed)
        self.own = torch.Generator().manual_seed(seed + 1)
        # Workers are started anew for each epoch: their seeds come from the loader's generator, and nothing of them goes on.
        self.loader = DataLoader(Augmented(), 16, shuffle=True, num_workers=workers, generator=self.shuffle)
        self.progress = StateDict(epoch=0, losses=[], shuffle=self.shuffle, own=self.own)

    @property
    def app_state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "progress": self.progress, "rng": RNGState()}

    def epoch(self) -> None:
        for inputs, targets in self.loader:
            changed = inputs + 0.01 * torch.randn(inputs.shape, generator=self.own) + 0.01 * random.random() + 0.01 * np.random.uniform()
            state = torch.get_rng_state()

            def closure(inputs: torch.Tensor = changed, targets: torch.Tensor = targets, state: torch.Tensor = state) -> torch.Tensor:
                torch.set_rng_state(state)  # the same dropout each time that it is asked
                self.optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(self.model(inputs), targets)
                loss.backward()
                return loss

            loss = self.optimizer.step(closure)  # type: ignore[arg-type]
            self.progress["losses"] = [*self.progress["losses"], float(loss.detach())]
        self.progress["epoch"] += 1

    def facts(self) -> dict[str, Any]:
        """Everything that a later step depends on."""
        found = {key: value.state_dict() for key, value in self.app_state.items() if key not in {"progress", "rng"}}
        generators = {"shuffle": self.shuffle.get_state(), "own": self.own.get_state(), "rng": RNGState().state_dict()}
        return {**found, **generators, "losses": list(self.progress["losses"])}


EPOCHS = 4


@pytest.mark.campaign("Kept as it is", "runs that go on from each of their snapshots, bit for bit")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_from_each_of_its_snapshots(tmp_path: Path, optimizer: str, campaign: Campaign) -> None:
    """Taken in the background and incrementally, while the next epoch's workers are forked and the weights change."""
    for workers in campaign.choose((2,), (0, 2)):
        place = tmp_path / f"{workers}"
        run = Run(optimizer, workers, seed=1)
        pending = []
        for epoch in range(EPOCHS):
            pending.append(Snapshot.async_take(place / f"{epoch}", run.app_state, base=pending[-1] if pending else None))
            run.epoch()
        expected = run.facts()
        for taken in pending:
            taken.wait()
        for epoch in campaign.some(range(EPOCHS), short=2):
            fresh = Run(optimizer, workers, seed=100 + epoch)
            Snapshot(place / f"{epoch}").restore(fresh.app_state)
            for _ in range(EPOCHS - epoch):
                fresh.epoch()
            assert_same(expected, fresh.facts())
            campaign.tried()


def test_a_run_that_goes_on_without_one_of_its_generators_is_noticed(tmp_path: Path) -> None:
    """Each of them has its say."""
    run = Run("SGD", 2, seed=1)
    Snapshot.take(tmp_path, run.app_state)
    run.epoch()
    for left_out in ("rng", "progress/own", "progress/shuffle"):
        fresh = Run("SGD", 2, seed=2)
        Snapshot(tmp_path).restore(fresh.app_state, exclude=left_out)
        fresh.epoch()
        with pytest.raises(AssertionError):
            assert_same(run.facts()["losses"], fresh.facts()["losses"])
