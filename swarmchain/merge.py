"""Contributions → checkpoint and shares. Pure, and equal to the last bit on every machine.

What makes it so: float64 accumulation element by element in the order of the sites' indices (a product, then a sum,
each rounded once: numpy fuses nothing across two calls), norms from squares that are added row by row in fixed blocks
and then by `math.fsum` (exactly rounded), and nowhere a sum whose order a library chooses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.errors import CheckpointError
from swarmchain.spec import Merge

Arrays = Mapping[str, npt.NDArray[Any]]

_BLOCK = 4096
_ROWS = 4


@dataclass(frozen=True)
class Input:
    """One site's verified contribution."""

    site: int
    samples: int
    tensors: Arrays


@dataclass(frozen=True)
class Share:
    """How one contribution went into a merge: its norm, the factor that clipped it, its weight."""

    site: int
    norm: float
    clip_factor: float
    weight: float


def merge_deltas(
    parent: Arrays, inputs: Sequence[Input], settings: Merge, *, step_scale: float = 1.0
) -> tuple[dict[str, npt.NDArray[np.float32]], list[Share]]:
    """Parent plus the weighted mean of the norm-clipped deltas.

    new = parent + step_scale · Σ weight_i · clip_i · delta_i, with clip_i = min(1, clip_factor · median norm / norm_i).

    Parameters
    ----------
    parent
        Checkpoint; tensors that no contribution names are carried over unchanged.
    inputs
        Contributions in any order, all with the same names and shapes.
    step_scale
        1, halved after every rejected round.

    Raises
    ------
    CheckpointError
        If there is no input, or the result is not finite.
    """
    ordered = sorted(inputs, key=lambda item: item.site)
    if not ordered:
        raise CheckpointError("a merge needs at least one contribution")
    norms = [compute_norm(item.tensors) for item in ordered]
    bound = settings.clip_factor * statistics.median(norms)
    clips = [min(1.0, bound / norm) if norm > 0 else 1.0 for norm in norms]
    weights = compute_weights([item.samples for item in ordered], settings)
    factors = [clip * weight for clip, weight in zip(clips, weights, strict=True)]
    merged = {name: np.asarray(tensor) for name, tensor in parent.items()}
    for name in sorted(ordered[0].tensors):
        total = _sum_scaled([item.tensors[name] for item in ordered], factors)
        merged[name] = (parent[name].astype(np.float64) + total * step_scale).astype(np.float32)
        if not np.isfinite(merged[name]).all():
            raise CheckpointError(f"the merge of {name} is not finite")
    shares = [Share(item.site, *parts) for item, *parts in zip(ordered, norms, clips, weights, strict=True)]
    return merged, shares


def sum_statistics(inputs: Sequence[Input]) -> tuple[dict[str, npt.NDArray[np.generic]], list[Share]]:
    """Sum over sites of every tensor, in the order of the sites' indices; all weights are 1.

    Raises
    ------
    CheckpointError
        If there is no input, a count is negative or a sum is not finite.
    """
    ordered = sorted(inputs, key=lambda item: item.site)
    if not ordered:
        raise CheckpointError("a merge needs at least one contribution")
    merged: dict[str, npt.NDArray[np.generic]] = {}
    for name, first in sorted(ordered[0].tensors.items()):
        total = np.zeros(first.shape, dtype=first.dtype)
        for item in ordered:
            total += item.tensors[name]
        if total.dtype.kind == "f" and not np.isfinite(total).all():
            raise CheckpointError(f"the sum of {name} is not finite")
        merged[name] = total
    return merged, [Share(item.site, compute_norm(item.tensors), 1.0, 1.0) for item in ordered]


def compute_norm(tensors: Arrays) -> float:
    """Euclidean norm over all tensors, the same to the last bit whatever the machine."""
    partial = [part for name in sorted(tensors) for part in _sum_squares(tensors[name])]
    return math.sqrt(math.fsum(partial))


def compute_weights(samples: Sequence[int], settings: Merge) -> list[float]:
    """Shares that sum to 1: proportional to samples, their roots, or equal; none above `weight_max`.

    What the cap takes from large sites goes to the others in proportion, until no share is above it. With fewer than
    1 / weight_max sites the cap cannot be met, and all shares are equal.
    """
    raw = {
        "samples": [float(n) for n in samples],
        "sqrt_samples": [math.sqrt(n) for n in samples],
        "equal": [1.0 for _ in samples],
    }[settings.weighting]
    if len(raw) * settings.weight_max <= 1.0:
        return [1.0 / len(raw)] * len(raw)
    capped: set[int] = set()
    while True:
        free = math.fsum(w for i, w in enumerate(raw) if i not in capped)
        rest = 1.0 - settings.weight_max * len(capped)
        shares = [settings.weight_max if i in capped else w / free * rest for i, w in enumerate(raw)]
        over = {i for i, share in enumerate(shares) if share > settings.weight_max}
        if not over:
            return shares
        capped |= over


def _sum_squares(tensor: npt.NDArray[Any]) -> list[float]:
    """Sums of squares whose total is the tensor's squared norm, reduced in a fixed order.

    The flat tensor is cut into rows of `_BLOCK`; the rows are added to one another, element by element. Some rows are
    squared at a time, and written where the last ones were, so that they stay in the processor's cache.
    """
    flat = tensor.reshape(-1)
    total = np.zeros(_BLOCK, dtype=np.float64)
    squares = np.empty(min(_ROWS * _BLOCK, flat.size), dtype=np.float64)
    for start in range(0, flat.size, _ROWS * _BLOCK):
        part = flat[start : start + _ROWS * _BLOCK]
        piece = squares[: part.size]
        piece[:] = part
        np.multiply(piece, piece, out=piece)
        for at in range(0, part.size, _BLOCK):
            row = piece[at : at + _BLOCK]
            total[: row.size] += row
    return total[: min(_BLOCK, flat.size)].tolist()  # type: ignore[no-any-return]


def _sum_scaled(tensors: Sequence[npt.NDArray[Any]], weights: Sequence[float]) -> npt.NDArray[np.float64]:
    """Σ tensor_i · weight_i in the order given, each product and each sum rounded once.

    Element by element the tensors are added one after the other; the work is cut into pieces that stay in the
    processor's cache while all tensors are added to them.
    """
    flats = [tensor.reshape(-1) for tensor in tensors]
    total = np.zeros(flats[0].size, dtype=np.float64)
    product = np.empty(min(_ROWS * _BLOCK, total.size), dtype=np.float64)
    for start in range(0, total.size, _ROWS * _BLOCK):
        sums = total[start : start + _ROWS * _BLOCK]
        piece = product[: sums.size]
        for flat, weight in zip(flats, weights, strict=True):
            piece[:] = flat[start : start + sums.size]
            np.multiply(piece, weight, out=piece)
            sums += piece
    return total.reshape(tensors[0].shape)
