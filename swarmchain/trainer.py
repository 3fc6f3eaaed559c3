"""One site's local training for one round, read top to bottom; same seed, same bytes.

A contribution is a pure function of (parent checkpoint, local data, spec, round, site). No optimiser state survives a
round, so a restarted site reproduces the same bytes. PyTorch's results depend on the number of threads and on the
CPU; that is no harm, for nobody else ever recomputes a site's training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from swarmchain.data import SiteData, standardize
from swarmchain.metrics import compute_macro_f1
from swarmchain.model import build_model, load_parameters, predict_probabilities, read_parameters
from swarmchain.protocol import derive_seed
from swarmchain.spec import CellTypeSpec

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class TrainingSet:
    """A site's standardised cells, ready for every round of a run.

    Shapes: `x` float32 [cells, panel], `y` int64 [cells]; `draw` float64 [train cells] sums to 1.
    """

    x: torch.Tensor
    y: torch.Tensor
    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    draw: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Contribution:
    """What one round of local training gives: parameter deltas, the number of training cells, remarks."""

    deltas: dict[str, npt.NDArray[np.float32]]
    samples: int
    metrics: dict[str, float]


def prepare_training(
    data: SiteData, spec: CellTypeSpec, constants: Arrays, cells_per_label: npt.NDArray[np.generic]
) -> TrainingSet:
    """Standardise a site's cells and weigh them for drawing.

    Parameters
    ----------
    constants
        `standardize.mean` and `standardize.scale`, [panel].
    cells_per_label
        Training cells of every class over all sites, [labels].
    """
    x = standardize(data.x, data.present, constants)
    weights = np.ones(len(data.train))
    if spec.training.class_balance == "inverse_sqrt":
        weights = 1.0 / np.sqrt(np.maximum(cells_per_label.astype(np.float64), 1.0))[data.y[data.train]]
    return TrainingSet(
        x=torch.from_numpy(x), y=torch.from_numpy(data.y), train=data.train, validation=data.validation,
        draw=weights / weights.sum(),
    )


def compute_learning_rate(spec: CellTypeSpec, round_id: int) -> float:
    """Half cosine from `lr` in round 1 to `lr · lr_final_share` in the last (Loshchilov & Hutter 2017, eq. 5)."""
    progress = min(round_id - 1, spec.limits.rounds - 1) / max(spec.limits.rounds - 1, 1)
    low = spec.training.lr_final_share
    return spec.training.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_round(parent: Arrays, cells: TrainingSet, spec: CellTypeSpec, *, round_id: int, site: int) -> Contribution:
    """Train from `parent` for the spec's number of steps.

    Parameters
    ----------
    parent
        Parameters by name; see `spec.parameter_layout`.
    """
    settings = spec.training
    seed = derive_seed("train", settings.seed, round_id, site)
    torch.manual_seed(seed)  # dropout
    generator = np.random.default_rng(seed)  # minibatches

    model = build_model(spec)
    load_parameters(model, parent)
    model.train()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=compute_learning_rate(spec, round_id), weight_decay=settings.weight_decay
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    batches = generator.choice(cells.train, size=(settings.steps, settings.batch_size), p=cells.draw)
    losses = np.empty(settings.steps)
    for step, rows in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(model(cells.x[rows]), cells.y[rows])
        loss.backward()
        optimizer.step()
        losses[step] = float(loss.detach())

    deltas = {name: value - parent[name] for name, value in read_parameters(model).items()}
    tail = losses[-max(1, settings.steps // 4) :]
    return Contribution(deltas=deltas, samples=len(cells.train), metrics={"loss": round(float(tail.mean()), 6)})


def score_checkpoint(parameters: Arrays, cells: TrainingSet, spec: CellTypeSpec) -> float | None:
    """Macro-F1 on this site's validation cells, over the classes that occur there; None without such cells."""
    if len(cells.validation) == 0:
        return None
    model = build_model(spec)
    load_parameters(model, parameters)
    probabilities = predict_probabilities(model, cells.x[cells.validation].numpy())
    truth = cells.y[cells.validation].numpy()
    return compute_macro_f1(truth, probabilities.argmax(axis=1), classes=len(spec.labels))
