"""The network: a perceptron from a panel of features to cell types.

Legend: N cells, F features of the panel, H hidden units, C labels. Parameters carry the names of
`spec.parameter_layout`: `layers.<i>.weight` [out, in], `layers.<i>.bias` [out].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from swarmchain.protocol import derive_seed
from swarmchain.spec import CellTypeSpec, parameter_layout

Arrays = Mapping[str, npt.NDArray[Any]]


class Perceptron(nn.Module):
    """[N, F] → [N, C]: linear layers with ReLU and dropout between them; without hidden layers a linear model."""

    def __init__(self, widths: list[int], *, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, C] of standardised cells [N, F]."""
        for layer in self.layers[:-1]:
            x = self.dropout(torch.relu(layer(x)))  # [N, H]
        logits: torch.Tensor = self.layers[-1](x)
        return logits


def build_model(spec: CellTypeSpec) -> Perceptron:
    """The spec's network with arbitrary weights; load some before use."""
    widths = [len(spec.panel.features), *spec.model.hidden, len(spec.labels)]
    return Perceptron(widths, dropout=spec.model.dropout)


def load_parameters(model: nn.Module, parameters: Arrays) -> None:
    """Set every parameter of `model` from arrays of the same names; other arrays are ignored."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(parameters[name]))


def read_parameters(model: nn.Module) -> dict[str, npt.NDArray[np.float32]]:
    """Copies of all parameters, by name."""
    return {name: p.detach().numpy().astype(np.float32, copy=True) for name, p in model.named_parameters()}


def draw_parameters(spec: CellTypeSpec) -> dict[str, npt.NDArray[np.float32]]:
    """Weights of a seed checkpoint: uniform in ±√(6 / inputs) (He et al. 2015, eq. 10), biases 0.

    Drawn by numpy from the spec's seed. Whoever proposes a run draws once; the checkpoint then travels as a blob.
    """
    generator = np.random.default_rng(derive_seed("seed checkpoint", spec.training.seed))
    parameters: dict[str, npt.NDArray[np.float32]] = {}
    for name, (_, shape) in parameter_layout(spec).items():
        bound = np.sqrt(6.0 / shape[1]) if len(shape) == 2 else 0.0
        parameters[name] = generator.uniform(-bound, bound, size=shape).astype(np.float32)
    return parameters


def predict_probabilities(model: nn.Module, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Class probabilities [N, C] of standardised cells [N, F]."""
    model.eval()
    with torch.no_grad():
        probabilities: npt.NDArray[np.float32] = torch.softmax(model(torch.tensor(x)), dim=1).numpy()
    return probabilities
