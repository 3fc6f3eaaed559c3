"""What each contribution of a round does to a site's own validation cells: one forward pass each, over a few hundred.

The effect is the change of the balanced cross-entropy (the mean over classes of the mean over their cells) when a fifth
of the contribution, clipped as the merge clips it, is added to the checkpoint that the round started from. The classes
are those that the contribution claims to be about and that occur here; if none does, all that occur here. A site
without monocytes unlearns them in all honesty, until the merge has the others' word; what it was trained on, it makes
no worse. A fifth, because a whole step of one site's training overshoots on the cells of another: it would say more of
how the sites differ than of who is hostile. The number does not depend on how many sites there are, nor on their
weights.

From the effect one standard error is taken off: a site with a handful of validation cells accuses nobody by chance.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

from swarmchain.codec import list_deltas, read_piece
from swarmchain.examples import Arrays, Examples
from swarmchain.model import build_model, load_state
from swarmchain.protocol import EFFECT_MNAT_MAX, Rating
from swarmchain.spec import TrainedSpec
from swarmchain.trust import CLAIMED_SHARE_MIN, Claim

STEP = 0.2
CELLS_MAX = 256


class Rater:
    """A site's chosen validation cells and a network to try weights in, both made once for all rounds of a run.

    `network` is of the spec, for the inputs of `cells`; whoever uses it loads weights first.
    """

    def __init__(self, cells: Examples, spec: TrainedSpec) -> None:
        self._cells = cells.choose(choose_rows(cells))
        self._y = self._cells.y.numpy()[self._cells.validation]
        self.network = build_model(spec, features=cells.features)

    def rate(self, parent: Arrays, claims: Iterable[Claim]) -> tuple[Rating, ...]:
        """Ratings by site; none without validation cells.

        Parameters
        ----------
        parent
            The network that the round started from, with this site's own local tensors.
        claims
            A contribution's tensors are read before the next is asked for.
        """
        if len(self._y) == 0:
            return ()
        start, found = self._measure(parent), []
        for claim in claims:
            moved = self._measure(_move(parent, claim.tensors, STEP * claim.clip_factor))
            effect = compute_effect(moved - start, self._y, claim.labels)
            found.append(Rating(site=claim.site, effect_mnat=_to_mnat(effect)))
        return tuple(sorted(found, key=lambda rating: rating.site))

    def _measure(self, state: Arrays) -> npt.NDArray[np.float64]:
        load_state(self.network, self._cells.narrow(state))
        return compute_losses(self._cells.predict(self.network, self._cells.validation), self._y)


def find_labels(cells: Examples) -> tuple[int, ...]:
    """The labels that a site's contributions are about: those of at least a twentieth of its training examples."""
    counts = np.bincount(cells.y.numpy()[cells.train])
    return tuple(np.flatnonzero(counts >= max(1.0, CLAIMED_SHARE_MIN * counts.sum())).tolist())


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


def compute_losses(probabilities: npt.NDArray[np.float32], y: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Cross-entropy of each cell, [N], in nat, from class probabilities [N, C] and labels [N]."""
    likelihoods = probabilities[np.arange(len(y)), y].astype(np.float64)
    losses: npt.NDArray[np.float64] = -np.log(np.maximum(likelihoods, np.finfo(np.float32).tiny))
    return losses


def compute_effect(changes: npt.NDArray[np.float64], y: npt.NDArray[np.int64], claimed: Collection[int]) -> float:
    """Mean over the claimed classes of their cells' mean change of loss, less its standard error.

    `changes` and `y` are [N]. Of the classes that occur, the claimed ones count, or all if none of these occurs. The
    standard error is that of a stratified mean, √(Σ s²/n) / classes; of a class with one cell it is the change itself.
    """
    counts = np.bincount(y)
    present = np.flatnonzero(counts).tolist()
    chosen = [label for label in present if label in claimed] or present
    means = np.bincount(y, weights=changes) / np.maximum(counts, 1)
    squares = np.bincount(y, weights=(changes - means[y]) ** 2)
    errors = np.where(counts > 1, squares / np.maximum(counts - 1, 1) / np.maximum(counts, 1), means**2)
    return (math.fsum(means[chosen]) - math.sqrt(math.fsum(errors[chosen]))) / len(chosen)


def _move(parent: Arrays, tensors: Arrays, factor: float) -> Arrays:
    with np.errstate(over="ignore", invalid="ignore"):
        moved = {name: parent[name] + np.float32(factor) * read_piece(tensors, name, 0, parent[name].size).reshape(
            parent[name].shape) for name in list_deltas(tensors)}
    return {**parent, **moved}


def _to_mnat(effect: float) -> int:
    """Whole 1/1000 nat, within bounds; a loss that is no number is as bad as can be."""
    if math.isnan(effect):
        return EFFECT_MNAT_MAX
    return round(min(max(effect * 1000, -EFFECT_MNAT_MAX), EFFECT_MNAT_MAX))
