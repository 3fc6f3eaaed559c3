"""How often the classes are: what training drew, what a site has, and calls that allow for the difference.

A swarm's model expects the classes as often as training drew them. Whoever knows how often they are where the new cells
come from may say so without training: p(c|x) · own share / drawn share, normalised (Saerens, Latinne & Decaestecker
2002, eq. 2.4). It assumes that the cells of one class look alike in both places, and that only the shares differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.spec import TrainedSpec

Counts = npt.NDArray[np.generic]
Floats = npt.NDArray[np.floating[Any]]


def compute_drawn(examples_per_label: Counts, spec: TrainedSpec) -> npt.NDArray[np.float64]:
    """Shares [labels] in which training drew the classes, from their counts over all sites."""
    counts = np.maximum(examples_per_label.astype(np.float64), 1.0)
    powers = {"none": 1.0, "inverse_sqrt": 0.5, "inverse": 0.0}
    return _normalize(counts ** powers[spec.training.class_balance])


def count_own(y: npt.NDArray[np.int64], labels: int) -> npt.NDArray[np.float64]:
    """A site's shares [labels] from its training labels [cells], one cell more of each, so that none is impossible."""
    return _normalize(np.bincount(y, minlength=labels) + np.float64(1))


def apply_shares(probabilities: Floats, own: Floats, drawn: Floats) -> npt.NDArray[np.float32]:
    """Class probabilities [cells, labels] where the classes are as often as `own`, [labels], says."""
    weighed = probabilities.astype(np.float64) * (own / drawn)
    found: npt.NDArray[np.float32] = (weighed / weighed.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def _normalize(weights: Floats) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = (weights / weights.sum()).astype(np.float64)
    return shares
