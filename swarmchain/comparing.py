"""Home against swarm: whether a hospital's own cells are called better by the swarm's model than by one of its own.

The hospital's own model is trained here and now, from the same seed checkpoint, by the same code and for as many rounds
and steps as the swarm's. Both are scored on this site's validation cells, which neither was trained on. Nothing leaves
the site.

A site's own model knows how often its classes are, and a swarm's expects them as often as training drew them. So two
more stand beside the swarm's: the same model told the site's own shares of the classes (`shares`), and the same trained
for some rounds more on the site's own cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.agreement import standardize
from swarmchain.baselines import TRAINED_ON_ROUNDS, predict, predict_at_home, train_alone, train_on
from swarmchain.calibration import compute_class_scores
from swarmchain.config import SiteConfig
from swarmchain.data import load_site_data
from swarmchain.errors import DataError
from swarmchain.metrics import compute_macro_f1
from swarmchain.protocol import RunView, derive_seed
from swarmchain.spec import CellTypeSpec
from swarmchain.store import Store, read_checkpoint
from swarmchain.work import load_statistics_source, read_own

Ints = npt.NDArray[np.int64]
RESAMPLES = 1000
VARIANTS = ("own_shares", "trained_on")


@dataclass(frozen=True)
class Variant:
    """The swarm's model as this site may use it: macro-F1, F1 per label, and bounds of its gain over the site's own."""

    macro_f1: float
    f1: tuple[float | None, ...]
    low: float
    high: float


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
    own_shares: Variant
    trained_on: Variant
    trained_on_rounds: int

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
        variants = {"own_shares": self.own_shares, "trained_on": self.trained_on}
        rows = zip(self.labels, self.support, self.home_f1, self.swarm_f1, self.own_shares.f1, self.trained_on.f1,
                   strict=True)
        return {
            "site": self.site, "run": self.run, "rounds": self.rounds, "cells": self.cells,
            "macro_f1": {"home": self.home, "swarm": self.swarm, **{k: v.macro_f1 for k, v in variants.items()}},
            "differences": {key: {"value": variant.macro_f1 - self.home, "interval": [variant.low, variant.high]}
                            for key, variant in variants.items()},
            "trained_on_rounds": self.trained_on_rounds, "difference": self.difference,
            "interval": [self.low, self.high], "verdict": self.verdict,
            "per_class": {label: {"support": n, "home": home, "swarm": swarm, "own_shares": own, "trained_on": on}
                          for label, n, home, swarm, own, on in rows if n},
        }


def compare_site(config: SiteConfig, store: Store, view: RunView, spec: CellTypeSpec, *, site: int,
                 rounds: int = TRAINED_ON_ROUNDS, train: Callable[..., dict[str, Any]] = train_alone) -> Comparison:
    """Train this site's own model and score it beside the swarm's.

    Parameters
    ----------
    spec
        As `evaluating.read_trained` gives it.
    site
        This site's index.
    rounds
        How many the swarm's model is trained on, on this site's own cells.
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
    counts = _read_counts(store, spec)
    more = train_on(checkpoint, data, spec, site=site, constants=seed, rounds=rounds)
    called = {"home": predict(home, x, spec), "swarm": predict(checkpoint, x, spec),
              "own_shares": predict_at_home(checkpoint, x, spec, data=data, cells_per_label=counts),
              "trained_on": predict(more, x, spec)}
    bounds = _resample(truth, called, classes=len(spec.labels))
    f1 = {name: _score_classes(truth, found, len(spec.labels)) for name, found in called.items()}
    macro = {name: compute_macro_f1(truth, found, classes=len(spec.labels)) for name, found in called.items()}
    return Comparison(
        site=config.name, run=view.run, rounds=view.finalized_round, cells=len(truth), labels=spec.labels,
        support=tuple(np.bincount(truth, minlength=len(spec.labels)).tolist()), home=macro["home"],
        swarm=macro["swarm"], home_f1=f1["home"], swarm_f1=f1["swarm"], low=bounds["swarm"][0], high=bounds["swarm"][1],
        trained_on_rounds=rounds, **{key: Variant(macro[key], f1[key], *bounds[key]) for key in VARIANTS})


def _read_counts(store: Store, spec: CellTypeSpec) -> npt.NDArray[np.generic]:
    """Training cells of every label of the run over all sites."""
    source = load_statistics_source(store, spec)
    counts = read_checkpoint(store, spec.statistics.checkpoint, source)["cells_per_label"]
    return counts[[source.labels.index(label) for label in spec.labels]]


def _score_classes(truth: Ints, called: Ints, classes: int) -> tuple[float | None, ...]:
    confusion = np.bincount(truth * classes + called, minlength=classes * classes).reshape(classes, classes)
    return tuple(compute_class_scores(confusion)[0])


def _resample(truth: Ints, called: dict[str, Ints], *, classes: int) -> dict[str, tuple[float, float]]:
    """Bounds of every arm's gain over `home`."""
    generator = np.random.default_rng(derive_seed("compare"))
    gains: dict[str, list[float]] = {name: [] for name in called}
    for _ in range(RESAMPLES):
        rows = generator.integers(len(truth), size=len(truth))
        scores = {name: compute_macro_f1(truth[rows], found[rows], classes=classes) for name, found in called.items()}
        for name, score in scores.items():
            gains[name].append(score - scores["home"])
    low, high = np.quantile(list(gains.values()), [0.025, 0.975], axis=1)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(gains)}
