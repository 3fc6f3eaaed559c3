"""Home against swarm: whether a hospital's own cells are called better by the swarm's model than by one of its own.

The hospital's own model is trained here and now, from the same seed checkpoint, by the same code and for as many rounds
and steps as the swarm's. Both are scored on this site's validation cells, which neither was trained on. Nothing leaves
the site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.agreement import standardize
from swarmchain.baselines import predict, train_alone
from swarmchain.calibration import compute_class_scores
from swarmchain.config import SiteConfig
from swarmchain.data import load_site_data
from swarmchain.errors import DataError
from swarmchain.metrics import compute_macro_f1
from swarmchain.protocol import RunView, derive_seed
from swarmchain.spec import CellTypeSpec
from swarmchain.store import Store, read_checkpoint
from swarmchain.work import read_own

Ints = npt.NDArray[np.int64]
RESAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """Both models on one site's validation cells. F1 per label is None where no such cell is there.

    `low` and `high` bound 95 % of the differences (swarm - home) in macro-F1 over `RESAMPLES` draws of the validation
    cells with replacement (paired bootstrap; Efron & Tibshirani 1993, chapter 13).
    """

    site: str
    run: int
    rounds: int
    cells: int
    labels: tuple[str, ...]
    support: tuple[int, ...]
    home: float
    swarm: float
    home_f1: tuple[float | None, ...]
    swarm_f1: tuple[float | None, ...]
    low: float
    high: float

    @property
    def difference(self) -> float:
        """Macro-F1 of the swarm's model less that of the hospital's own."""
        return self.swarm - self.home

    @property
    def verdict(self) -> str:
        """`gains`, `loses` or `undecided`: the last where the interval holds 0."""
        return "gains" if self.low > 0 else "loses" if self.high < 0 else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rows = zip(self.labels, self.support, self.home_f1, self.swarm_f1, strict=True)
        return {
            "site": self.site, "run": self.run, "rounds": self.rounds, "cells": self.cells,
            "macro_f1": {"home": self.home, "swarm": self.swarm}, "difference": self.difference,
            "interval": [self.low, self.high], "verdict": self.verdict,
            "per_class": {label: {"support": n, "home": home, "swarm": swarm} for label, n, home, swarm in rows if n},
        }


def compare_site(config: SiteConfig, store: Store, view: RunView, spec: CellTypeSpec, *, site: int,
                 train: Callable[..., dict[str, Any]] = train_alone) -> Comparison:
    """Train this site's own model and score it beside the swarm's.

    Parameters
    ----------
    spec
        As `evaluating.read_trained` gives it.
    site
        This site's index.
    train
        How a model is trained on one site's cells; see `baselines.train_alone`.

    Raises
    ------
    DataError
        If the site's data cannot serve the spec, or hold no validation cell.
    """
    import torch

    torch.set_num_threads(config.agent.threads)
    data = load_site_data(config, spec)
    if len(data.validation) == 0:
        raise DataError(f"{config.name} has no validation cells", hint="a share of each label's cells is set aside; "
                        "there are too few of every label")
    checkpoint = {**read_checkpoint(store, view.checkpoint, spec), **read_own(config, view.run, spec)}
    seed = read_checkpoint(store, spec.seed_checkpoint, spec)
    home = train(data, seed, spec, site=site, rounds=view.finalized_round)
    truth = data.y[data.validation]
    x = standardize(data.x[data.validation], data.present, checkpoint)
    called = {"home": predict(home, x, spec), "swarm": predict(checkpoint, x, spec)}
    low, high = _resample(truth, called, classes=len(spec.labels))
    f1 = {name: _score_classes(truth, found, len(spec.labels)) for name, found in called.items()}
    macro = {name: compute_macro_f1(truth, found, classes=len(spec.labels)) for name, found in called.items()}
    return Comparison(
        site=config.name, run=view.run, rounds=view.finalized_round, cells=len(truth), labels=spec.labels,
        support=tuple(np.bincount(truth, minlength=len(spec.labels)).tolist()), home=macro["home"],
        swarm=macro["swarm"], home_f1=f1["home"], swarm_f1=f1["swarm"], low=low, high=high)


def _score_classes(truth: Ints, called: Ints, classes: int) -> tuple[float | None, ...]:
    confusion = np.bincount(truth * classes + called, minlength=classes * classes).reshape(classes, classes)
    return tuple(compute_class_scores(confusion)[0])


def _resample(truth: Ints, called: dict[str, Ints], *, classes: int) -> tuple[float, float]:
    generator = np.random.default_rng(derive_seed("compare"))
    gains = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = generator.integers(len(truth), size=len(truth))
        scores = {name: compute_macro_f1(truth[rows], found[rows], classes=classes) for name, found in called.items()}
        gains[i] = scores["swarm"] - scores["home"]
    low, high = np.quantile(gains, [0.025, 0.975])
    return float(low), float(high)
