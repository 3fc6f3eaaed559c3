"""How sure a difference between models is that were tested on the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled:
    """Macro-F1 of several models over the same resamples of the test cells: `scores` [models, resamples].

    `plain` [models] is that of the test cells as they are.
    """

    plain: Floats
    scores: Floats

    def interval(self, models: Sequence[int], minus: Sequence[int] = (), *, level: float = 0.95) -> Interval:
        """Mean score of some models (one per seed, say), less that of others: percentiles over the resamples."""
        drawn, value = self.scores[list(models)].mean(axis=0), float(self.plain[list(models)].mean())
        if minus:
            drawn, value = drawn - self.scores[list(minus)].mean(axis=0), value - float(self.plain[list(minus)].mean())
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return Interval(value, float(low), float(high))


def resample_auroc(truth: Ints, scores: Sequence[Floats], *, resamples: int, seed: int) -> Resampled:
    """As `resample_macro_f1`, of the area under the ROC curve: truth is 0 or 1, scores [samples] of each model.

    Every resample draws as many samples of each label as there are. The area is the weighted share of pairs whose
    positive is above the negative, ties half; NaN where a label is missing.
    """
    generator = np.random.default_rng(seed)
    positives, negatives = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    if not len(positives) or not len(negatives):
        nothing = np.full((len(scores), resamples + 1), np.nan)
        return Resampled(plain=nothing[:, 0], scores=nothing[:, 1:])
    drawn = []
    for rows in (positives, negatives):
        counts = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
        drawn.append(np.concatenate([np.ones((1, len(rows))), counts]) / len(rows))  # [resamples + 1, rows]
    areas = []
    for values in scores:
        above = np.sign(values[positives][:, None] - values[negatives][None, :]) / 2 + 0.5
        areas.append(((drawn[0] @ above) * drawn[1]).sum(axis=1))
    found = np.stack(areas)
    return Resampled(plain=found[:, 0], scores=found[:, 1:])


def resample_macro_f1(truth: Ints, predictions: Sequence[Ints], *, classes: int, resamples: int, seed: int
                      ) -> Resampled:
    """Paired bootstrap, stratified by class (Efron & Tibshirani 1993, chapters 6 and 13).

    Every resample draws, of each class, as many test cells as there are, with replacement; the same cells for all
    models, so that what is hard for all of them cancels in a difference. Cells with the same truth and the same
    predictions are alike here, so that a multinomial draw over such kinds gives the same distribution as drawing cells.
    The models are taken as they are: the interval says how much the choice of test cells matters, the spread over seeds
    how much training does. Cells of one donor resemble each other, so that for new donors both say too little.

    Parameters
    ----------
    truth, predictions
        Label indices [cells], and for each model the same.
    """
    generator = np.random.default_rng(seed)
    kinds, counts = np.unique(np.stack([truth, *predictions]), axis=1, return_counts=True)
    drawn = np.zeros((resamples + 1, len(counts)))
    drawn[0] = counts
    for label in np.unique(truth):
        at = np.flatnonzero(kinds[0] == label)
        share = counts[at] / counts[at].sum()
        drawn[1:, at] = generator.multinomial(counts[at].sum(), share, size=resamples)
    scores = np.stack([_score(drawn, kinds[0], row, classes) for row in kinds[1:]])
    return Resampled(plain=scores[:, 0], scores=scores[:, 1:])


def _score(drawn: Floats, truth: Ints, predicted: Ints, classes: int) -> Floats:
    """Macro-F1 [draws] over the classes that occur, from how often each kind of cell was drawn [draws, kinds]."""
    one_truth, one_predicted = np.eye(classes)[truth], np.eye(classes)[predicted]  # [kinds, classes]
    support = drawn @ one_truth
    hits = drawn @ (one_truth * one_predicted)
    f1 = 2 * hits / np.maximum(support + drawn @ one_predicted, 1.0)
    there = np.unique(truth)
    mean: Floats = f1[:, there].mean(axis=1)
    return mean
