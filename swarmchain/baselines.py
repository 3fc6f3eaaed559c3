"""What a swarm is compared with, on the same held-out cells: pooled training, each site alone, a linear model.

The pooled and the local arms use the swarm's own network, preprocessing and optimiser, and take
as many steps as each site of the swarm does. Whoever has all data in one place may do this; a real
consortium cannot, which is why nothing here is part of an agent's work.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.agreement import count_samples, standardize
from swarmchain.certify import Arrays
from swarmchain.metrics import compute_f1, summarize_f1
from swarmchain.model import load_model, predict_probabilities
from swarmchain.selection import SiteData
from swarmchain.spec import CellTypeSpec, DonorSpec, TrainedSpec
from swarmchain.trainer import prepare_training, train_round

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

TRAINED_ON_ROUNDS = 10
TRAINED_ON_LR_SHARE = 0.3


def predict(parameters: Arrays, x: Floats, spec: CellTypeSpec) -> Ints:
    """Label indices [cells] of standardised cells [cells, panel]."""
    model = load_model(spec, parameters)
    called: Ints = predict_probabilities(model, x).argmax(axis=1).astype(np.int64)
    return called


def train_alone(data: SiteData, seed: Arrays, spec: TrainedSpec, *, site: int, rounds: int) -> dict[str, Any]:
    """Parameters after `rounds` of one site's local training without any merge, from the seed checkpoint.

    Class balance is by this site's own counts, since alone it knows no others.
    """
    labels = len(spec.labels)
    counts = count_samples(data, labels=labels) if isinstance(spec, DonorSpec) \
        else np.bincount(data.y[data.train], minlength=labels)
    cells = prepare_training(data, spec, seed, counts)
    parameters = {name: np.asarray(value) for name, value in seed.items() if not name.startswith("standardize.")}
    for round_id in range(1, rounds + 1):
        found = train_round(parameters, cells, spec, round_id=round_id, site=site)
        moved = {name: parameters[name] + delta for name, delta in found.deltas.items()}
        parameters = {**parameters, **moved, **found.local}
    return parameters


def train_on(parameters: Arrays, data: SiteData, spec: CellTypeSpec, *, site: int, constants: Arrays, rounds: int
             ) -> dict[str, Any]:
    """A swarm's model after some rounds more on one site's cells alone, drawn as often as they are there.

    The learning rate starts at `TRAINED_ON_LR_SHARE` of the run's, so that the swarm's knowledge is kept, and falls as
    the run's did.
    """
    settings = {"training": spec.training.model_copy(update={"class_balance": "none",
                                                             "lr": spec.training.lr * TRAINED_ON_LR_SHARE}),
                "limits": spec.limits.model_copy(update={"rounds": rounds})}
    start = {name: value for name, value in parameters.items() if not name.startswith("standardize.")}
    return train_alone(data, {**start, **{n: v for n, v in constants.items() if n.startswith("standardize.")}},
                       spec.model_copy(update=settings), site=site, rounds=rounds)


def pool(parts: Sequence[SiteData], constants: Arrays) -> SiteData:
    """All sites' cells in one place. Features that a site lacks are the federated mean; donors stay each site's own."""
    filled = []
    for part in parts:
        x = part.x.copy()
        x[:, ~part.present] = constants["standardize.mean"][~part.present]
        filled.append(x)
    starts = np.cumsum([0, *(len(part.y) for part in parts[:-1])])
    owners: dict[str, Any] = {}
    if all(part.donors is not None for part in parts):
        owners = {"donors": _renumber([part.donors for part in parts]),
                  "samples": _renumber([part.samples for part in parts]),
                  "sample_names": tuple(name for part in parts for name in part.sample_names)}
    return SiteData(
        x=np.concatenate(filled), y=np.concatenate([part.y for part in parts]),
        present=np.ones(filled[0].shape[1], dtype=np.bool_),
        train=np.concatenate([part.train + start for part, start in zip(parts, starts, strict=True)]),
        validation=np.concatenate([part.validation + start for part, start in zip(parts, starts, strict=True)]),
        **owners,
    )


def _renumber(parts: Sequence[Any]) -> Ints:
    """Numbers of several sites in one count: each site's follow on those of the sites before it."""
    starts = np.cumsum([0, *(int(part.max()) + 1 for part in parts[:-1])])
    return np.concatenate([part + start for part, start in zip(parts, starts, strict=True)])


def predict_linear(pooled: SiteData, constants: Arrays, test_x: Floats) -> Ints:
    """Multinomial logistic regression (scikit-learn, C = 0.01) on the pooled standardised cells."""
    from sklearn.linear_model import LogisticRegression

    x = standardize(pooled.x, pooled.present, constants)[pooled.train]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence remarks; the score tells
        model = LogisticRegression(C=0.01, max_iter=1000).fit(x, pooled.y[pooled.train])
    return np.asarray(model.predict(test_x), dtype=np.int64)


def compare(
    swarm: Arrays, seed: Arrays, sites: Mapping[str, SiteData], test: tuple[Floats, Ints], spec: CellTypeSpec
) -> dict[str, Any]:
    """`metrics` of summary.json: every arm's macro-F1 and per-class F1 on the standardised test cells."""
    x, truth = test
    rounds, labels = spec.limits.rounds, spec.labels
    pooled = pool(list(sites.values()), seed)
    central = train_alone(pooled, seed, spec, site=0, rounds=rounds)
    local = {
        name: predict(train_alone(data, seed, spec, site=i, rounds=rounds), x, spec)
        for i, (name, data) in enumerate(sites.items())
    }
    summaries = {name: summarize_f1(truth, predicted, labels) for name, predicted in local.items()}
    worst = min(summaries, key=lambda name: float(summaries[name]["macro_f1"]))
    return {
        "central": summarize_f1(truth, predict(central, x, spec), labels),
        "swarm": summarize_f1(truth, predict(swarm, x, spec), labels),
        "local_mean": _average(truth, list(local.values()), labels),
        "local_worst": {**summaries[worst], "site": worst},
        "linear": summarize_f1(truth, predict_linear(pooled, seed, x), labels),
        "local": summaries,
    }


def _average(truth: Ints, predictions: Sequence[Ints], labels: Sequence[str]) -> dict[str, Any]:
    f1 = np.mean([compute_f1(truth, p, classes=len(labels)) for p in predictions], axis=0)
    per_class = {label: float(v) for label, v in zip(labels, f1, strict=True) if not np.isnan(v)}
    return {"macro_f1": float(np.mean(list(per_class.values()))), "per_class": per_class}
