"""A small experiment to browse: an encoder that is trained a little, its snapshots with metrics, labels and notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from expstate import Catalog, Snapshot
from expstate.notebook.browser.widget import Browser
from expstate.notebook.kernel import Kernel

from .shells import Shell

STEPS = (
    (400, 0.0660, 0.9690),
    (500, 0.0574, 0.9731),
    (600, 0.0522, 0.9760),
    (700, 0.0481, 0.9788),
    (800, 0.0410, 0.9822),
    (900, 0.0367, 0.9849),
)


class Attention(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("query", "key", "value", "out"):
            setattr(self, name, torch.nn.Linear(width, width))


class Layer(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        self.norm = torch.nn.LayerNorm(width)


class Encoder(torch.nn.Module):
    def __init__(self, width: int = 32, layers: int = 6) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(1000, width)
        self.encoder = torch.nn.Module()
        self.encoder.layer = torch.nn.ModuleList(Layer(width) for _ in range(layers))
        self.pooler = torch.nn.Linear(width, width)


def train(model: Encoder, optimizer: torch.optim.Optimizer) -> None:
    """A step that leaves the lower half of the layers as they are."""
    optimizer.zero_grad()
    for layer in model.encoder.layer[len(model.encoder.layer) // 2 :]:
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
    for parameter in model.pooler.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def kernel_of(folder: Path, **names: Any) -> Kernel:
    """A kernel with a namespace and a catalog of its own."""
    kernel = Kernel(Shell(**names))
    kernel._catalog = Catalog(folder / "catalog.db")
    return kernel


def made(folder: Path, *, width: int = 32) -> Browser:
    """A browser of an experiment, and the objects of the last snapshot as names of its kernel."""
    torch.manual_seed(0)
    model = Encoder(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    kernel = kernel_of(folder, model=model, optimizer=optimizer, scheduler=scheduler)
    catalog = kernel.catalog
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for step, loss, acc in STEPS:
        train(model, optimizer)
        name = "baseline" if step == 800 else f"step-{step}"
        tags = ("paper",) if step == 800 else ("ablation",) if step == 900 else ()
        Snapshot.take(
            folder / "runs" / name, state, name=name, step=step, tags=tags, metrics={"loss": loss, "acc": acc},
            params={"lr": 0.003, "optimizer": "adamw", "depth": 6}, catalog=catalog, note=f"after {step} steps" if step == 900 else None,
        )  # fmt: skip
    Snapshot.take(
        folder / "runs" / "surgery", state, name="before surgery", step=800, metrics={"loss": 0.0433, "acc": 0.981}, catalog=catalog
    )
    catalog.pin("before surgery")
    catalog.alias("step-900", "best")
    catalog.alias("baseline", "baseline")
    return Browser(kernel)
