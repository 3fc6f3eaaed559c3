"""Home against swarm: whether a hospital's own cells are called better by the swarm's model than by one of its own.

The hospital's own model is trained here and now, from the same seed checkpoint, by the same code and for as many rounds
and steps as the swarm's. Both are scored on this site's validation cells, or the samples of its validation donors,
which neither was trained on. Nothing leaves the site.

A site's own model knows how often its classes are, and a swarm's expects them as often as training drew them. So for
models of cells three more stand beside the swarm's: the same model told the site's own shares of the classes
(`shares`), the same trained for some rounds more on the site's own cells, and a mixture of all of them and the
hospital's own model (`stacking`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.baselines import TRAINED_ON_ROUNDS, train_alone
from swarmchain.baselines_donors import predict_samples
from swarmchain.calibration import compute_class_scores
from swarmchain.config import SiteConfig
from swarmchain.data import load_site_data
from swarmchain.errors import DataError
from swarmchain.examples import TrainingSet, list_owners, prepare_validation
from swarmchain.metrics import compute_auroc, compute_macro_f1
from swarmchain.protocol import RunView, derive_seed
from swarmchain.shares import compute_drawn, count_own
from swarmchain.spec import CellTypeSpec, DonorSpec, TrainedSpec
from swarmchain.stacking import MODELS, VARIANTS, HomeModel, call_at_home, cross_fit, make_home
from swarmchain.store import Store, read_checkpoint
from swarmchain.work import load_statistics_source, read_own

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
RESAMPLES = 1000


@dataclass(frozen=True)
class Variant:
    """The swarm's model as this site may use it: macro-F1, F1 per label, and bounds of its gain over the site's own."""

    macro_f1: float
    f1: tuple[float | None, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Both models on one site's validation cells, or samples. F1 per label is None where none of it is there.

    `home` and `swarm` are macro-F1; `areas` are both models' areas under the ROC curve, home first, where the run
    scores by them and the validation samples have both labels. `low` and `high` bound 95 % of the differences (swarm -
    home) in the run's score over `RESAMPLES` draws with replacement of the validation cells, or the validation donors
    with all their samples (paired bootstrap; Efron & Tibshirani 1993, chapter 13). `mixture` is that of the variant
    `stacked`, made with all validation cells; the variant's scores are of each cell by weights that others gave.
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
    areas: tuple[float, float] | None = None
    unit: str = "cells"
    variants: Mapping[str, Variant] = field(default_factory=dict)
    trained_on_rounds: int = 0
    mixture: HomeModel | None = None

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
        rows = enumerate(zip(self.labels, self.support, self.home_f1, self.swarm_f1, strict=True))
        return {
            "site": self.site, "run": self.run, "rounds": self.rounds, self.unit: self.cells, "score": self.score,
            "macro_f1": {"home": self.home, "swarm": self.swarm,
                         **{name: variant.macro_f1 for name, variant in self.variants.items()}},
            "difference": self.difference,
            "auroc": None if self.areas is None else dict(zip(("home", "swarm"), self.areas, strict=True)),
            "differences": {name: {"value": variant.macro_f1 - self.home, "interval": [variant.low, variant.high]}
                            for name, variant in self.variants.items()},
            "trained_on_rounds": self.trained_on_rounds,
            "weights": self.mixture.weights if self.mixture else None,
            "interval": [self.low, self.high], "verdict": self.verdict,
            "per_class": {label: {"support": n, "home": home, "swarm": swarm,
                                  **{name: variant.f1[i] for name, variant in self.variants.items()}}
                          for i, (label, n, home, swarm) in rows if n},
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
    mixture: HomeModel | None = None
    if isinstance(spec, CellTypeSpec):
        assert isinstance(examples, TrainingSet)
        counts = _read_counts(store, spec)
        chances, more = call_at_home(home, checkpoint, data, examples, spec, counts=counts, constants=seed, site=site,
                                     rounds=rounds)
        mixture = make_home(chances, truth, {"home": home, "trained_on": more}, spec, site=config.name, run=view.run,
                            checkpoint=view.checkpoint,
                            ratios=count_own(data.y[data.train], classes) / compute_drawn(counts, spec))
        chances["stacked"] = cross_fit(np.stack([chances[name] for name in MODELS]), truth)
    else:
        chances = {name: predict_samples(state, examples, spec)
                   for name, state in (("home", home), ("swarm", checkpoint))}
    by_donor = isinstance(spec, DonorSpec)
    owners = list_owners(data, examples) if by_donor else np.arange(len(truth))
    area = isinstance(spec, DonorSpec) and spec.score == "auroc" and len(np.unique(truth)) == 2
    bounds = _resample(truth, chances, owners, score=_score_area if area else _score_f1)
    f1 = {name: _score_classes(truth, found.argmax(axis=1), classes) for name, found in chances.items()}
    return Comparison(
        site=config.name, run=view.run, rounds=view.finalized_round, cells=len(truth), labels=spec.labels,
        support=tuple(np.bincount(truth, minlength=classes).tolist()), home=_score_f1(truth, chances["home"]),
        swarm=_score_f1(truth, chances["swarm"]), home_f1=f1["home"], swarm_f1=f1["swarm"], low=bounds["swarm"][0],
        high=bounds["swarm"][1],
        areas=(_score_area(truth, chances["home"]), _score_area(truth, chances["swarm"])) if area else None,
        unit="samples" if by_donor else "cells", trained_on_rounds=0 if by_donor else rounds,
        variants={name: Variant(_score_f1(truth, chances[name]), f1[name], *bounds[name])
                  for name in VARIANTS if name in chances},
        mixture=mixture)


def _score_f1(truth: Ints, chances: Floats) -> float:
    return compute_macro_f1(truth, chances.argmax(axis=1), classes=chances.shape[1])


def _score_area(truth: Ints, chances: Floats) -> float:
    return compute_auroc(truth, chances[:, 1])


def _read_counts(store: Store, spec: CellTypeSpec) -> npt.NDArray[np.generic]:
    """Training cells of every label of the run over all sites."""
    source = load_statistics_source(store, spec)
    counts = read_checkpoint(store, spec.statistics.checkpoint, source)["cells_per_label"]
    return counts[[source.labels.index(label) for label in spec.labels]]


def _score_classes(truth: Ints, called: Ints, classes: int) -> tuple[float | None, ...]:
    confusion = np.bincount(truth * classes + called, minlength=classes * classes).reshape(classes, classes)
    return tuple(compute_class_scores(confusion)[0])


def _resample(truth: Ints, chances: dict[str, Floats], owners: Ints, *, score: Callable[[Ints, Floats], float]
              ) -> dict[str, tuple[float, float]]:
    """95 % of every arm's gains over `home`, where owners are drawn with all that is theirs.

    Draws without a score do not count.
    """
    generator = np.random.default_rng(derive_seed("compare"))
    _, owner, counts = np.unique(owners, return_inverse=True, return_counts=True)
    order = np.argsort(owner, kind="stable")
    rows_of = np.split(order, np.cumsum(counts)[:-1])
    gains: dict[str, list[float]] = {name: [] for name in chances if name != "home"}
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(rows_of), size=len(rows_of))
        rows = order[drawn] if len(rows_of) == len(truth) else np.concatenate([rows_of[i] for i in drawn])
        at_home = score(truth[rows], chances["home"][rows])
        for name, found in gains.items():
            found.append(score(truth[rows], chances[name][rows]) - at_home)
    return {name: (float(low), float(high)) for name, (low, high) in
            ((name, np.nanquantile(found, [0.025, 0.975])) for name, found in gains.items())}
