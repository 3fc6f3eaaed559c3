"""From sums over validation cells to what a model's word is worth: F1, temperature, calibration, "unknown".

The sums are exact and equal at all sites, and so is everything that follows from them here: counts are divided once and
the argmin of float64 sums is taken, ties to the first. Knows neither cells nor networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.spec import EvaluationSpec

Arrays = Mapping[str, npt.NDArray[Any]]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Bars of a reliability diagram, and bins of the calibration error; every spec's bins are a multiple.
BARS = 10


@dataclass(frozen=True)
class Bar:
    """Calls with a confidence of `low` to `high`: how many, the share that was right, and their bins' middle."""

    low: float
    high: float
    cells: int
    right_share: float | None
    confidence: float | None


@dataclass(frozen=True)
class Calibration:
    """What follows from an evaluation's sums.

    `error` is the expected calibration error at `temperature`, `error_before` the one at temperature 1 (None where 1 is
    not on the grid). From `threshold` on, `right_share` of the calls are right, and `known_share` of all cells are
    called; where no threshold reaches the target, it is 1 and `is_reached` is false.
    """

    temperature: float
    error: float
    error_before: float | None
    threshold: float
    is_reached: bool
    right_share: float | None
    known_share: float
    bars: tuple[Bar, ...]


def compute_log_probabilities(logits: npt.NDArray[Any], temperature: float) -> Floats:
    """Ln softmax(logits / temperature), [cells, labels], in float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    found: Floats = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return found


def sum_calls(logits: npt.NDArray[Any], truth: Ints, spec: EvaluationSpec) -> dict[str, npt.NDArray[Any]]:
    """One site's sums, as `layouts.evaluation_layout` names them.

    Parameters
    ----------
    logits
        The network's, [cells, labels].
    truth
        Index into the labels, [cells].
    """
    labels, called = len(spec.labels), logits.argmax(axis=1)
    right = called == truth
    sums: dict[str, npt.NDArray[Any]] = {
        "confusion": np.bincount(truth * labels + called, minlength=labels * labels).reshape(labels, labels),
        "negative_log_likelihood": np.zeros(len(spec.temperatures)),
        "right": np.zeros((len(spec.temperatures), spec.bins), dtype=np.int64),
        "wrong": np.zeros((len(spec.temperatures), spec.bins), dtype=np.int64),
    }
    for i, temperature in enumerate(spec.temperatures):
        found = compute_log_probabilities(logits, temperature)
        sums["negative_log_likelihood"][i] = -found[np.arange(len(truth)), truth].sum()
        bins = np.minimum((np.exp(found.max(axis=1)) * spec.bins).astype(np.int64), spec.bins - 1)
        sums["right"][i] = np.bincount(bins[right], minlength=spec.bins)
        sums["wrong"][i] = np.bincount(bins[~right], minlength=spec.bins)
    return sums


def calibrate(sums: Arrays, spec: EvaluationSpec) -> Calibration:
    """Temperature, calibration error and threshold, the same at whoever has the sums.

    The temperature is the one of the grid with the smallest negative log-likelihood, ties to the smaller (temperature
    scaling; Guo et al. 2017, section 4.2). The expected calibration error is the mean over cells of |share of right
    calls - mean confidence| over `BARS` bins (ibid., eq. 3); a confidence counts as the middle of its bin of the spec.
    """
    best = int(np.argmin(sums["negative_log_likelihood"]))
    right, wrong = sums["right"][best], sums["wrong"][best]
    plain = spec.temperatures.index(1.0) if 1.0 in spec.temperatures else None
    threshold, is_reached = _find_threshold(right, wrong, spec)
    start = round(threshold * spec.bins)
    kept, cells = int((right + wrong)[start:].sum()), int((right + wrong).sum())
    return Calibration(
        temperature=spec.temperatures[best], error=_compute_error(right, wrong),
        error_before=None if plain is None else _compute_error(sums["right"][plain], sums["wrong"][plain]),
        threshold=threshold, is_reached=is_reached, right_share=int(right[start:].sum()) / kept if kept else None,
        known_share=kept / max(cells, 1), bars=_make_bars(right, wrong),
    )


def compute_class_scores(confusion: Ints) -> tuple[list[float | None], list[int]]:
    """F1 and support of every label, from cells by label (row) and call (column); None without any cell.

    F1 = 2 TP / (2 TP + FP + FN).
    """
    support = confusion.sum(axis=1)
    total = support + confusion.sum(axis=0)
    scores = [2 * int(confusion[i, i]) / int(total[i]) if support[i] else None for i in range(len(support))]
    return scores, [int(n) for n in support]


def _find_threshold(right: Ints, wrong: Ints, spec: EvaluationSpec) -> tuple[float, bool]:
    """The smallest edge from which on enough calls are right, among those with `cells_min` calls above them."""
    hits = np.cumsum(right[::-1])[::-1]
    calls = np.cumsum((right + wrong)[::-1])[::-1]
    for i in range(spec.bins):
        if calls[i] >= spec.cells_min and int(hits[i]) / int(calls[i]) >= spec.right_share_min:
            return i / spec.bins, True
    return 1.0, False


def _compute_error(right: Ints, wrong: Ints) -> float:
    bars = _make_bars(right, wrong)
    cells = sum(bar.cells for bar in bars)
    gaps = [bar.cells * abs(bar.right_share - bar.confidence) for bar in bars
            if bar.right_share is not None and bar.confidence is not None]
    return sum(gaps) / max(cells, 1)


def _make_bars(right: Ints, wrong: Ints) -> tuple[Bar, ...]:
    bins = len(right)
    width = bins // BARS
    middles = (np.arange(bins) + 0.5) / bins
    bars = []
    for i in range(BARS):
        here = slice(i * width, (i + 1) * width)
        calls = (right + wrong)[here]
        cells = int(calls.sum())
        bars.append(Bar(i / BARS, (i + 1) / BARS, cells, int(right[here].sum()) / cells if cells else None,
                        float((calls * middles[here]).sum()) / cells if cells else None))
    return tuple(bars)
