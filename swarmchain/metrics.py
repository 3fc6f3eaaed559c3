"""What is reported of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def compute_f1(truth: Ints, predicted: Ints, *, classes: int) -> npt.NDArray[np.float64]:
    """F1 of every class, [classes]; NaN where a class has no cell in `truth`.

    F1 = 2 TP / (2 TP + FP + FN), as scikit-learn's `f1_score(average=None)`; from one confusion matrix, so that an
    agent need not load scikit-learn for its vote.
    """
    confusion = np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    hits = np.diag(confusion).astype(np.float64)
    support = confusion.sum(axis=1)
    total = support + confusion.sum(axis=0)
    return np.where(support > 0, 2 * hits / np.maximum(total, 1), np.nan)


def compute_macro_f1(truth: Ints, predicted: Ints, *, classes: int) -> float:
    """Mean F1 over the classes that occur in `truth`; 0 without any cell."""
    f1 = compute_f1(truth, predicted, classes=classes)
    return float(np.nanmean(f1)) if len(truth) else 0.0


def summarize_f1(truth: Ints, predicted: Ints, labels: Sequence[str]) -> dict[str, Any]:
    """`macro_f1` and `per_class` (only classes that occur in `truth`), as in summary.json."""
    f1 = compute_f1(truth, predicted, classes=len(labels))
    per_class = {label: float(v) for label, v in zip(labels, f1, strict=True) if not np.isnan(v)}
    return {"macro_f1": float(np.mean(list(per_class.values()))), "per_class": per_class}


def compute_auroc(truth: Ints, scores: npt.NDArray[np.floating[Any]]) -> float:
    """Area under the ROC curve: how often a positive's score is above a negative's, ties half; NaN without either.

    Mann and Whitney's U over its largest value, from mid-ranks (Hanley & McNeil 1982), as scikit-learn's
    `roc_auc_score`. `truth` is 0 or 1.
    """
    positives = int((truth == 1).sum())
    pairs = positives * (len(truth) - positives)
    if pairs == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[truth == 1].sum() - positives * (positives + 1) / 2) / pairs)
