"""A training on scikit-learn's digits that is interrupted and resumed in fresh objects ends bit for bit where it would have ended."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from expstate import RNGState, Snapshot, StateDict
from expstate.errors import NeedsTrustWarning, RestoreMismatchError
from expstate.format.manifest import AliasEntry
from expstate.state.objects import safe_mode_holds
from tests.state.conftest import assert_same

_DIGITS = load_digits()
INPUTS = torch.tensor(_DIGITS.images, dtype=torch.float32).unsqueeze(1) / 16
LABELS = torch.tensor(_DIGITS.target)
BATCH, STEPS, BREAK = 64, 8, 4


def network() -> torch.nn.Module:
    """Convolution, batch normalisation and dropout: parameters, buffers and random numbers."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(144, 10),
    )


class Training:
    """A training loop with all that real ones have; every object is new, and nothing is shared between two of them."""

    def __init__(
        self,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        wrap: Callable[[torch.nn.Module], Any] | None = None,
        autocast: bool = False,
        scaler: bool = False,
        ema: bool = False,
        channels_last: bool = False,
    ) -> None:
        torch.manual_seed(random.randrange(2**31))
        inner = network().to(memory_format=torch.channels_last) if channels_last else network()
        self.model = wrap(inner) if wrap is not None else inner
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        self.autocast = autocast
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3) if scaler else None
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) if ema else None
        self.shuffle = torch.Generator().manual_seed(random.randrange(2**31))
        self.progress = StateDict(step=0, losses=[], order=None, shuffle=self.shuffle)

    @property
    def app_state(self) -> dict[str, Any]:
        """All of it."""
        found = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "ema": self.ema,
            "progress": self.progress,
            "rng": RNGState(),
        }
        return {key: value for key, value in found.items() if value is not None}

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch of a shuffled epoch, augmented by random numbers of Python, NumPy and PyTorch."""
        place = self.progress["step"] % 4
        if place == 0:
            self.progress["order"] = torch.randperm(len(INPUTS), generator=self.shuffle)[: 4 * BATCH]
        chosen = self.progress["order"][place * BATCH : (place + 1) * BATCH]
        inputs = INPUTS[chosen].roll(random.choice([-1, 0, 1]), dims=-1)
        inputs = inputs * float(np.random.uniform(0.9, 1.1)) + 0.05 * torch.randn_like(inputs)
        return inputs, LABELS[chosen]

    def step(self) -> None:
        """One step."""
        inputs, labels = self._batch()

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = torch.nn.functional.cross_entropy(self.model(inputs), labels)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            return loss

        if self.scaler is not None:
            loss = closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss = self.optimizer.step(closure)  # type: ignore[arg-type,assignment]
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        if isinstance(self.scheduler, schedulers.ReduceLROnPlateau):
            self.scheduler.step(float(loss.detach()))
        elif self.scheduler is not None:
            self.scheduler.step()
        self.progress["losses"] = [*self.progress["losses"], float(loss.detach())]
        self.progress["step"] += 1

    def run(self, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            self.step()

    def facts(self) -> dict[str, Any]:
        """Everything that a later step depends on, as it is now."""
        found = {key: value.state_dict() for key, value in self.app_state.items() if key != "rng"}
        found["progress"] = {**found["progress"], "shuffle": self.shuffle.get_state()}
        return copy.deepcopy({**found, "rng": RNGState().state_dict()})


def _resumed(place: Path, make: Callable[[], Training], *, asynchronous: bool = False, **options: Any) -> None:
    """Train to the end at once; train, take, go on elsewhere, restore into new objects and train to the end: compare."""
    random.seed(1), np.random.seed(1)
    training = make()
    training.run(BREAK)
    if asynchronous:
        taken = Snapshot.async_take(place, training.app_state)
    else:
        Snapshot.take(place, training.app_state)
    training.run(STEPS - BREAK)
    expected = training.facts()
    if asynchronous:
        taken.wait()

    random.seed(2), np.random.seed(2)
    fresh = make()
    before = fresh.facts()
    Snapshot(place).restore(fresh.app_state, **options)
    fresh.run(STEPS - BREAK)
    found = fresh.facts()

    assert STEPS == len(found["progress"]["losses"])
    assert expected["progress"]["losses"] == found["progress"]["losses"]
    assert_same(expected, found)
    assert not torch.equal(next(iter(before["model"].values())), next(iter(found["model"].values())))


def _flat(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3, history_size=3)


def _groups(parameters: Any) -> torch.optim.Optimizer:
    weights = list(parameters)
    return torch.optim.AdamW([{"params": weights[::2], "lr": 0.01}, {"params": weights[1::2], "weight_decay": 0.0}], lr=0.003)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "Adam foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True),
    "Adam tensor lr": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01)),
    "AdamW amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "AdamW groups": _groups,
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "LBFGS": _flat,
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.003, momentum=0.5, centered=True),
    "Adadelta": torch.optim.Adadelta,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adamax": torch.optim.Adamax,
}


class Warmup:
    """A function of a scheduler with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return min(1.0, (step + 1) / 5)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda optimizer: schedulers.StepLR(optimizer, 3, 0.5),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1),
    "CosineAnnealingWarmRestarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 3, 2),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 10),
    "ReduceLROnPlateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.ConstantLR(optimizer, 0.1), schedulers.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
    "LambdaLR with a state": lambda optimizer: schedulers.LambdaLR(optimizer, Warmup()),
    "ChainedScheduler": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.LinearLR(optimizer, 0.1), schedulers.MultiStepLR(optimizer, [2, 6])], optimizer
    ),
    "CyclicLR": lambda optimizer: schedulers.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
    "SWALR": lambda optimizer: SWALR(optimizer, swa_lr=0.05, anneal_epochs=3),
}


@pytest.fixture(autouse=True)
def _quiet_schedulers() -> Iterator[None]:
    """Some of torch's schedulers warn of their own insides; before torch 2.10 what they pickle needs trust."""
    with warnings.catch_warnings():
        if not safe_mode_holds():
            warnings.simplefilter("ignore", NeedsTrustWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.optim.*")
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(place: Path, name: str) -> None:
    """Into a fresh optimizer, whose state is made at its first step, and which has other options until then."""
    _resumed(place, lambda: Training(OPTIMIZERS[name]))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(place: Path, name: str) -> None:
    """Learning rates too are those of the uninterrupted run."""
    _resumed(place, lambda: Training(OPTIMIZERS["SGD momentum"], SCHEDULERS[name]), trust=name == "SWALR" and not safe_mode_holds())


@pytest.mark.parametrize(
    "options",
    [
        {"autocast": True},
        {"scaler": True},
        {"autocast": True, "scaler": True, "ema": True},
        {"ema": True},
        {"channels_last": True},
        {"wrap": functools.partial(torch.compile, backend="eager")},
        {"wrap": torch.nn.DataParallel, "ema": True},
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:Guards may run slower")  # of torch.compile, on the first 3.13
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_trainings_are_made_of_goes_on(place: Path, options: dict[str, Any], asynchronous: bool) -> None:
    """Mixed precision, loss scaling, averaged weights, memory formats, wrappers; taken at once or in the background."""
    _resumed(place, lambda: Training(OPTIMIZERS["AdamW amsgrad"], SCHEDULERS["OneCycleLR"], **options), asynchronous=asynchronous)


@pytest.mark.parametrize("budget", [None, 2 * 2**20])
def test_an_atomic_restore_goes_on(place: Path, budget: int | None) -> None:
    """Held in memory and read twice."""
    _resumed(place, lambda: Training(OPTIMIZERS["Adam"], SCHEDULERS["StepLR"]), atomic=True, memory_budget_bytes=budget)


def test_a_training_is_rewound_in_place(place: Path) -> None:
    """The same objects, back to where they were: optimizers that have a state already."""
    random.seed(1), np.random.seed(1)
    training = Training(OPTIMIZERS["LBFGS"], SCHEDULERS["StepLR"], ema=True)
    training.run(BREAK)
    Snapshot.take(place, training.app_state)
    training.run(STEPS - BREAK)
    expected = training.facts()
    Snapshot(place).restore(training.app_state)
    training.run(STEPS - BREAK)

    assert_same(expected, training.facts())


def test_what_is_left_out_is_noticed(place: Path) -> None:
    """The comparison above sees each part: without the random generators, or the optimizer, the runs differ."""
    for key in ("rng", "optimizer", "model", "scheduler", "progress"):
        with pytest.raises((AssertionError, TypeError, KeyError)):
            _resumed(place / key, lambda: Training(OPTIMIZERS["Adam"], SCHEDULERS["StepLR"]), exclude=key)


def test_a_loader_with_workers_shuffles_on(place: Path) -> None:
    """A ``DataLoader`` whose generator is in the state gives the batches of the next epoch that the uninterrupted run has."""
    data = torch.utils.data.TensorDataset(INPUTS, LABELS)

    def loader(seed: int) -> tuple[Any, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(data, 256, shuffle=True, generator=generator), generator

    batches, generator = loader(1)
    list(batches)
    Snapshot.take(place, {"data": StateDict(generator=generator), "rng": RNGState()})
    expected = [labels.tolist() for _, labels in batches]
    batches, generator = loader(2)
    Snapshot(place).restore({"data": StateDict(generator=generator), "rng": RNGState()})

    assert expected == [labels.tolist() for _, labels in batches]


def _two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    return torch.optim.Adam([{"params": [first]}, {"params": others}])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_two_groups, "1 parameter groups and the live optimizer 2"),
        (lambda model: torch.optim.Adam(list(model.parameters())[:-1]), "group 0 has 6 parameters in the snapshot and 5 live"),
        (lambda model: torch.optim.Adam(list(model.parameters())[::-1]), "and its parameter"),
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_an_optimizer_that_does_not_fit_changes_nothing(place: Path, make: Any, problem: str, started: bool) -> None:
    """Other groups, another count and other shapes are refused before the model or the optimizer changes, with and without a state."""
    training = Training(OPTIMIZERS["Adam"])
    training.run(1)
    Snapshot.take(place, training.app_state)
    model = network()
    optimizer = make(model)
    if started:
        model(INPUTS[:8]).sum().backward()
        optimizer.step()
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))
    with pytest.raises(RestoreMismatchError, match=problem):
        Snapshot(place).restore({"model": model, "optimizer": optimizer})

    assert_same(before, (dict(model.state_dict()), optimizer.state_dict()))


def _bert(seed: int) -> Any:
    """A language model as they are fine-tuned, with other sizes, random weights and no download; its output layer is tied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what transformers says as it is imported
        from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 24}
    return BertForMaskedLM(BertConfig(vocab_size=60, **sizes))


@pytest.mark.parametrize("atomic", [False, True])
def test_a_language_model_goes_on(place: Path, atomic: bool) -> None:
    """Weights stay tied, logits are equal to the bit, and so is the next step."""
    tokens = torch.randint(0, 60, (3, 12))

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    model, other = _bert(1), _bert(2)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01) for one in (model, other)]
    step(model, optimizers[0])
    snapshot = Snapshot.take(place, {"model": model, "optimizer": optimizers[0], "rng": RNGState()})
    model.eval(), other.eval()
    before = torch.equal(model(tokens).logits, other(tokens).logits)
    logits = model(tokens).logits
    model.train(), other.train()
    step(model, optimizers[0])
    embedding = other.bert.embeddings.word_embeddings.weight
    snapshot.restore({"model": other, "optimizer": optimizers[1], "rng": RNGState()}, atomic=atomic)

    assert not before
    assert torch.equal(logits, other.eval()(tokens).logits)
    other.train()
    step(other, optimizers[1])
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert embedding is other.bert.embeddings.word_embeddings.weight is other.cls.predictions.decoder.weight
    assert "model/cls.predictions.decoder.weight" in {entry.path for entry in snapshot.entries() if isinstance(entry, AliasEntry)}
