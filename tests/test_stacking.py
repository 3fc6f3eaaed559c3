"""Weights of a mixture of models: they are the likeliest, a swarm earns its part, and a score is of unseen cells."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import minimize

from swarmchain.metrics import compute_macro_f1
from swarmchain.stacking import PRIOR, cross_fit, fit_weights, mix

CELLS, LABELS = 600, 3


def make_chances(truth: npt.NDArray[np.int64], right: float, seed: int) -> npt.NDArray[np.float32]:
    """A model that favours the truth with `right`, and else a label at random; [cells, labels]."""
    generator = np.random.default_rng(seed)
    called = np.where(generator.random(len(truth)) < right, truth, generator.integers(LABELS, size=len(truth)))
    chances = np.full((len(truth), LABELS), 0.1)
    chances[np.arange(len(truth)), called] = 0.8
    return chances.astype(np.float32)


@pytest.fixture
def truth() -> npt.NDArray[np.int64]:
    return np.random.default_rng(9).choice(LABELS, size=CELLS, p=[0.6, 0.3, 0.1])


def test_weights_are_those_that_another_optimiser_finds(truth: npt.NDArray[np.int64]) -> None:
    chances = np.stack([make_chances(truth, right, seed) for seed, right in enumerate((0.6, 0.7, 0.3, 0.8))])
    likelihoods = chances[:, np.arange(CELLS), truth].astype(np.float64)
    cells = np.bincount(truth)[truth] ** -0.5

    def lose(free: npt.NDArray[np.float64]) -> float:
        weights = np.exp(free) / np.exp(free).sum()
        return float(-(cells * np.log(weights @ likelihoods)).sum() - PRIOR * cells.sum() * np.log(weights[0]))

    best = minimize(lose, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 10_000})
    expected = np.exp(best.x) / np.exp(best.x).sum()
    found = fit_weights(chances, truth)
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert found.argmax() == 3


def test_swarm_that_is_no_better_has_no_part(truth: npt.NDArray[np.int64]) -> None:
    home = make_chances(truth, 0.9, 0)
    found = fit_weights(np.stack([home, make_chances(truth, 0.0, 1), home, make_chances(truth, 0.1, 2)]), truth)
    assert found[0] > 0.95  # what says the same as the site's own model gets nothing either: the prior decides


def test_score_is_of_cells_that_had_no_part_in_their_weights(truth: npt.NDArray[np.int64]) -> None:
    """Where each cell's class is alone in it, nobody else could tell: then the site's own model calls."""
    chances = np.stack([make_chances(truth, right, seed) for seed, right in enumerate((0.5, 0.9))])
    one_each = np.arange(LABELS)
    np.testing.assert_array_equal(cross_fit(chances[:, :LABELS], one_each), chances[0, :LABELS])
    crossed = cross_fit(chances, truth)
    np.testing.assert_allclose(crossed.sum(axis=1), 1, atol=1e-6)
    at_home, mixed = (compute_macro_f1(truth, p.argmax(axis=1), classes=LABELS) for p in (chances[0], crossed))
    assert mixed > at_home + 0.2
    seen = mix(chances, fit_weights(chances, truth))
    assert not np.array_equal(seen, crossed) and np.abs(seen - crossed).max() < 0.1
