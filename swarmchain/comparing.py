"""Home against swarm: whether a hospital's own cells are called better by the swarm's model than by one of its own.

The hospital's own model is trained here and now, from the same seed checkpoint, by the same code and for as many rounds
and steps as the swarm's. Both are scored on this site's validation cells, or the samples of its validation donors,
which neither was trained on. Nothing leaves the site.

A site's own model knows how often its classes are, and a swarm's expects them as often as training drew them. So two
variants stand beside the swarm's: the same model told the site's own shares of the classes (`shares`), and the same
trained for some rounds more on the site's own cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.agreement import count_samples
from swarmchain.baselines import TRAINED_ON_ROUNDS, train_alone, train_on
from swarmchain.baselines_donors import predict_samples
from swarmchain.calibration import compute_class_scores
from swarmchain.config import SiteConfig
from swarmchain.data import load_site_data
from swarmchain.errors import DataError
from swarmchain.examples import list_owners, prepare_validation
from swarmchain.metrics import compute_auroc, compute_macro_f1
from swarmchain.protocol import RunView, derive_seed
from swarmchain.selection import SiteData
from swarmchain.shares import apply_shares, compute_drawn, compute_own
from swarmchain.spec import DonorSpec, TrainedSpec
from swarmchain.store import Store, read_checkpoint
from swarmchain.work import load_statistics_source, read_own

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
RESAMPLES = 1000


@dataclass(frozen=True)
class Variant:
    """The swarm's model as this site may use it: its score, and the gain over the site's own model with its bounds."""

    score: float
    gain: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"score": self.score, "difference": self.gain, "interval": [self.low, self.high]}


@dataclass(frozen=True)
class Comparison:
    """Both models on one site's validation cells, or samples. F1 per label is None where none of it is there.

    `home` and `swarm` are macro-F1; `areas` are both models' areas under the ROC curve, home first, where the run
    scores by them and the validation samples have both labels. `low` and `high` bound 95 % of the differences (swarm -
    home) in the run's score over `RESAMPLES` draws with replacement of the validation cells, or the validation donors
    with all their samples (paired bootstrap; Efron & Tibshirani 1993, chapter 13).
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
    areas: tuple[float, float] | None = None
    unit: str = "cells"

    @property
    def difference(self) -> float:
        """The score of the swarm's model less that of the hospital's own."""
        return self.swarm - self.home if self.areas is None else self.areas[1] - self.areas[0]

    @property
    def score(self) -> str:
        """What the difference is of: `macro_f1` or `auroc`."""
        return "macro_f1" if self.areas is None else "auroc"

    @property
    def verdict(self) -> str:
        """`gains`, `loses` or `undecided`: the last where the interval holds 0."""
        return "gains" if self.low > 0 else "loses" if self.high < 0 else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rows = zip(self.labels, self.support, self.home_f1, self.swarm_f1, strict=True)
        return {
            "site": self.site, "run": self.run, "rounds": self.rounds, self.unit: self.cells, "score": self.score,
            "macro_f1": {"home": self.home, "swarm": self.swarm}, "difference": self.difference,
            "auroc": None if self.areas is None else dict(zip(("home", "swarm"), self.areas, strict=True)),
            "interval": [self.low, self.high], "verdict": self.verdict, "own_shares": self.own_shares.to_dict(),
            "trained_on": {**self.trained_on.to_dict(), "rounds": self.trained_on_rounds},
            "per_class": {label: {"support": n, "home": home, "swarm": swarm} for label, n, home, swarm in rows if n},
        }


def compare_site(config: SiteConfig, store: Store, view: RunView, spec: TrainedSpec, *, site: int,
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
        If the site's data cannot serve the spec, or hold no validation cell or donor.
    """
    import torch

    torch.set_num_threads(config.agent.threads)
    data = load_site_data(config, spec)
    if len(data.validation) == 0:
        kind = "donors" if isinstance(spec, DonorSpec) else "cells"
        raise DataError(f"{config.name} has no validation {kind}", hint=f"a share of each label's {kind} is set aside; "
                        "there are too few of every label")
    checkpoint = {**read_checkpoint(store, view.checkpoint, spec), **read_own(config, view.run, spec)}
    seed = read_checkpoint(store, spec.seed_checkpoint, spec)
    home = train(data, seed, spec, site=site, rounds=view.finalized_round)
    examples = prepare_validation(data, spec, checkpoint)
    truth, classes = examples.y.numpy()[examples.validation], len(spec.labels)
    more = train_on(checkpoint, data, spec, site=site, constants=seed, rounds=rounds)
    states = {"home": home, "swarm": checkpoint, "trained_on": more}
    chances = {name: predict_samples(state, examples, spec) for name, state in states.items()}
    chances["own_shares"] = _tell_shares(chances["swarm"], data, store, spec)
    by_donor = isinstance(spec, DonorSpec)
    owners = list_owners(data, examples) if by_donor else np.arange(len(truth))
    area = isinstance(spec, DonorSpec) and spec.score == "auroc" and len(np.unique(truth)) == 2
    score = _score_area if area else _score_f1
    bounds = _resample(truth, chances, owners, score=score)
    scores = {name: score(truth, found) for name, found in chances.items()}
    own, on = (Variant(scores[key], scores[key] - scores["home"], *bounds[key]) for key in ("own_shares", "trained_on"))
    f1 = {name: _score_classes(truth, found.argmax(axis=1), classes) for name, found in chances.items()}
    return Comparison(
        site=config.name, run=view.run, rounds=view.finalized_round, cells=len(truth), labels=spec.labels,
        support=tuple(np.bincount(truth, minlength=classes).tolist()), home=_score_f1(truth, chances["home"]),
        swarm=_score_f1(truth, chances["swarm"]), home_f1=f1["home"], swarm_f1=f1["swarm"], low=bounds["swarm"][0],
        high=bounds["swarm"][1], areas=(scores["home"], scores["swarm"]) if area else None, own_shares=own,
        trained_on=on, trained_on_rounds=rounds,
        unit="samples" if by_donor else "cells")


def _tell_shares(chances: Floats, data: SiteData, store: Store, spec: TrainedSpec) -> Floats:
    """The swarm's probabilities once this site's shares of the labels are allowed for."""
    source, labels = load_statistics_source(store, spec), len(spec.labels)
    sums = read_checkpoint(store, spec.statistics.checkpoint, source)
    is_by_donor = isinstance(spec, DonorSpec)
    counts = sums["samples_per_label" if is_by_donor else "cells_per_label"]
    drawn = compute_drawn(counts[[source.labels.index(label) for label in spec.labels]], spec)
    own = count_samples(data, labels=labels) if is_by_donor else np.bincount(data.y[data.train], minlength=labels)
    return apply_shares(chances, compute_own(own), drawn)


def _score_f1(truth: Ints, chances: Floats) -> float:
    return compute_macro_f1(truth, chances.argmax(axis=1), classes=chances.shape[1])


def _score_area(truth: Ints, chances: Floats) -> float:
    return compute_auroc(truth, chances[:, 1])


def _score_classes(truth: Ints, called: Ints, classes: int) -> tuple[float | None, ...]:
    confusion = np.bincount(truth * classes + called, minlength=classes * classes).reshape(classes, classes)
    return tuple(compute_class_scores(confusion)[0])


def _resample(truth: Ints, chances: dict[str, Floats], owners: Ints, *, score: Callable[[Ints, Floats], float]
              ) -> dict[str, tuple[float, float]]:
    """95 % of every model's gains over `home`, over draws of owners with all that is theirs.

    Draws without a score do not count.
    """
    generator = np.random.default_rng(derive_seed("compare"))
    _, owner, counts = np.unique(owners, return_inverse=True, return_counts=True)
    order = np.argsort(owner, kind="stable")
    rows_of = np.split(order, np.cumsum(counts)[:-1])
    gains = []  # [resamples][models]
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(rows_of), size=len(rows_of))
        rows = order[drawn] if len(rows_of) == len(truth) else np.concatenate([rows_of[i] for i in drawn])
        scores = {name: score(truth[rows], found[rows]) for name, found in chances.items()}
        gains.append([value - scores["home"] for value in scores.values()])
    low, high = np.nanquantile(gains, [0.025, 0.975], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(chances)}
