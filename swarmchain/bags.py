"""Networks for bags of cells: what they say does not depend on the order of the cells.

Legend: B bags, K cells of a bag, F features of the panel, E width of the encoder, A attention units, C labels.
Parameters carry the names of `layouts.state_layout`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import nn

from swarmchain.spec import DeepSets, GatedAttention, SetModel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Linear(nn.Linear):
    """A linear layer whose weights are whatever lay in memory: a network is never used before it is loaded.

    Drawing weights only to replace them took as long as a step of training.
    """

    def reset_parameters(self) -> None:
        """Nothing."""


def stack_layers(widths: Sequence[int]) -> nn.ModuleList:
    """Linear layers from each width to the next."""
    return nn.ModuleList(Linear(a, b) for a, b in itertools.pairwise(widths))


class Attention(nn.Module):
    """[B, K, E] → [B, K]: weights that sum to 1 over a bag, softmax of w·(tanh(V h) ⊙ σ(U h)) (Ilse et al. 2018)."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.content = Linear(width, units)
        self.gate = Linear(width, units)
        self.score = Linear(units, 1)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """Attention weights [B, K] of encoded cells."""
        return torch.softmax(self.weigh(cells), dim=-1)

    def weigh(self, cells: torch.Tensor) -> torch.Tensor:
        """What the softmax is taken of, [B, K]."""
        gated = torch.tanh(self.content(cells)) * torch.sigmoid(self.gate(cells))  # [B, K, A]
        scores: torch.Tensor = self.score(gated).squeeze(-1)
        return scores


class SetNetwork(nn.Module):
    """[B, K, F] → [B, C]: encode every cell, take their mean (weighted by attention), then a perceptron."""

    def __init__(self, settings: SetModel, features: int, labels: int) -> None:
        super().__init__()
        encoder = settings.encoder if isinstance(settings, DeepSets | GatedAttention) else ()
        width = encoder[-1] if encoder else features
        self.width = width  # E
        self.encoder = stack_layers((features, *encoder))
        self.attention = Attention(width, settings.attention) if isinstance(settings, GatedAttention) else None
        self.layers = stack_layers((width, *settings.hidden, labels))
        self.dropout = nn.Dropout(settings.dropout)

    def encode(self, bags: torch.Tensor) -> torch.Tensor:
        """[B, K, F] → [B, K, E]."""
        for layer in self.encoder:
            bags = self.dropout(torch.relu(layer(bags)))
        return bags

    def forward(self, bags: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of bags of standardised cells."""
        cells = self.encode(bags)
        if self.attention is None:
            pooled = cells.mean(dim=1)
        else:
            pooled = (self.attention(cells).unsqueeze(-1) * cells).sum(dim=1)  # [B, E]
        return self.call(pooled)

    def call(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of pooled bags [B, E]."""
        for i in range(len(self.layers) - 1):
            pooled = self.dropout(torch.relu(self.layers[i](pooled)))
        logits: torch.Tensor = self.layers[-1](pooled)
        return logits


class Pooling:
    """Bags pooled a batch of cells at a time, in whatever order cells come: it holds one row for each bag.

    The softmax of attention is taken as it goes: sums are relative to the largest score so far (Milakov & Gimelshein
    2018, algorithm 3). Sums are float64, so that the order of the cells hardly matters.

    Parameters
    ----------
    network
        Loaded, in evaluation mode.
    bags
        How many there are.
    """

    def __init__(self, network: SetNetwork, bags: int) -> None:
        self._network, self._bags = network, bags
        self._top: Floats = np.full(bags, -np.inf)
        self._norm: Floats = np.zeros(bags)
        self._sum: Floats = np.zeros((bags, network.width))

    def add(self, cells: npt.NDArray[np.float32], bag: Ints) -> Floats:
        """Take standardised cells [N, F] and the bag of each; returns their scores [N], 0 without attention."""
        with torch.inference_mode():
            encoded = self._network.encode(torch.from_numpy(cells)[None])
            attention = self._network.attention
            scores: Floats = np.zeros(len(cells)) if attention is None else \
                attention.weigh(encoded)[0].double().numpy()
            rows: Floats = encoded[0].double().numpy()
        top = self._top.copy()
        np.maximum.at(top, bag, scores)
        shrink = np.exp(np.where(np.isinf(self._top), 0.0, self._top - np.where(np.isinf(top), 0.0, top)))
        shares = np.exp(scores - top[bag])
        self._norm = self._norm * shrink + np.bincount(bag, shares, minlength=self._bags)
        into = sp.csr_matrix((shares, (bag, np.arange(len(bag)))), shape=(self._bags, len(bag)))
        self._sum = self._sum * shrink[:, None] + into @ rows
        self._top = top
        return scores

    def compute_logits(self) -> npt.NDArray[np.float32]:
        """Logits [bags, C] of all that was added; NaN for a bag without cells."""
        with np.errstate(invalid="ignore"):
            pooled = (self._sum / self._norm[:, None]).astype(np.float32)
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = self._network.call(torch.from_numpy(pooled)).numpy()
        return logits

    def compute_attention(self, scores: Floats, bag: Ints) -> npt.NDArray[np.float32]:
        """Weights [N] of cells, from the scores that `add` gave: they sum to 1 over each bag."""
        weights: npt.NDArray[np.float32] = (np.exp(scores - self._top[bag]) / self._norm[bag]).astype(np.float32)
        return weights
