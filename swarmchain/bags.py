"""Networks for bags of cells: what they say does not depend on the order of the cells.

Legend: B bags, K cells of a bag, F features of the panel, E width of the encoder, A attention units, C labels.
Parameters carry the names of `layouts.state_layout`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from swarmchain.spec import DeepSets, GatedAttention, SetModel


def _stack(widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))


class Attention(nn.Module):
    """[B, K, E] → [B, K]: weights that sum to 1 over a bag, softmax of w·(tanh(V h) ⊙ σ(U h)) (Ilse et al. 2018)."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.content = nn.Linear(width, units)
        self.gate = nn.Linear(width, units)
        self.score = nn.Linear(units, 1)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """Attention weights [B, K] of encoded cells."""
        gated = torch.tanh(self.content(cells)) * torch.sigmoid(self.gate(cells))  # [B, K, A]
        return torch.softmax(self.score(gated).squeeze(-1), dim=-1)


class SetNetwork(nn.Module):
    """[B, K, F] → [B, C]: encode every cell, take their mean (weighted by attention), then a perceptron."""

    def __init__(self, settings: SetModel, features: int, labels: int) -> None:
        super().__init__()
        encoder = settings.encoder if isinstance(settings, DeepSets | GatedAttention) else ()
        width = encoder[-1] if encoder else features
        self.encoder = _stack((features, *encoder))
        self.attention = Attention(width, settings.attention) if isinstance(settings, GatedAttention) else None
        self.layers = _stack((width, *settings.hidden, labels))
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
        for layer in self.layers[:-1]:
            pooled = self.dropout(torch.relu(layer(pooled)))
        logits: torch.Tensor = self.layers[-1](pooled)
        return logits


