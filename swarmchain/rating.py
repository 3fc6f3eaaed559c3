"""What each contribution of a round does to a site's own validation cells: one forward pass each, over a few hundred.

The effect is the change of the balanced cross-entropy (the mean over the classes present here of their mean) when a
fifth of the contribution, clipped as the merge clips it, is added to the checkpoint that the round started from. A
fifth, because a whole step of one site's training overshoots on the cells of another: it would say more of how the
sites differ than of who is hostile. The number does not depend on how many sites there are, nor on their weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from swarmchain.codec import list_deltas, read_piece
from swarmchain.examples import Arrays, Examples
from swarmchain.model import build_model, load_state
from swarmchain.protocol import EFFECT_MNAT_MAX, Rating
from swarmchain.spec import TrainedSpec

STEP = 0.2
CELLS_MAX = 256


def rate_contributions(parent: Arrays, contributions: Iterable[tuple[int, float, Arrays]], cells: Examples,
                       spec: TrainedSpec) -> tuple[Rating, ...]:
    """Ratings by site; none without validation cells.

    Parameters
    ----------
    parent
        The network that the round started from, with this site's own local tensors.
    contributions
        Site, clip factor, and coded tensors (see `codec`) of each. A tensor is read before the next is asked for.
    """
    rows = choose_rows(cells)
    if len(rows) == 0:
        return ()
    y, model = cells.y.numpy()[rows], build_model(spec)

    def measure(state: Arrays) -> float:
        load_state(model, state)
        return compute_balanced_loss(cells.predict(model, rows), y)

    start = measure(parent)
    found = [Rating(site=site, effect_mnat=_to_mnat(measure({**parent, **_move(parent, tensors, STEP * clip)}) - start))
             for site, clip, tensors in contributions]
    return tuple(sorted(found, key=lambda rating: rating.site))


def choose_rows(cells: Examples) -> npt.NDArray[np.int64]:
    """At most `CELLS_MAX` validation cells, evenly spaced among those of every class, at least one of each."""
    y = cells.y.numpy()[cells.validation]
    labels = np.unique(y)
    chosen: list[int] = []
    for label in labels:
        rows = cells.validation[y == label]
        count = min(len(rows), max(1, CELLS_MAX // len(labels)))
        chosen += rows[np.arange(count) * len(rows) // count].tolist()
    return np.array(sorted(chosen), dtype=np.int64)


def compute_balanced_loss(probabilities: npt.NDArray[np.float32], y: npt.NDArray[np.int64]) -> float:
    """Mean over the classes in `y` of their cells' mean cross-entropy, in nat, from class probabilities [N, C]."""
    likelihoods = probabilities[np.arange(len(y)), y].astype(np.float64)
    losses = -np.log(np.maximum(likelihoods, np.finfo(np.float32).tiny))
    return float(np.mean([losses[y == label].mean() for label in np.unique(y)]))


def _move(parent: Arrays, tensors: Arrays, factor: float) -> Arrays:
    with np.errstate(over="ignore", invalid="ignore"):
        return {name: parent[name] + np.float32(factor) * read_piece(tensors, name, 0, parent[name].size).reshape(
            parent[name].shape) for name in list_deltas(tensors)}


def _to_mnat(effect: float) -> int:
    """Whole 1/1000 nat, within bounds; a loss that is no number is as bad as can be."""
    if math.isnan(effect):
        return EFFECT_MNAT_MAX
    return round(min(max(effect * 1000, -EFFECT_MNAT_MAX), EFFECT_MNAT_MAX))
