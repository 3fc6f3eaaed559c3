"""What a swarm on donors is compared with, on the same held-out donors; as `baselines`, for rows and bags of cells."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.baselines import pool, train_alone
from swarmchain.certify import Arrays
from swarmchain.config import DataConfig
from swarmchain.data import read_cells
from swarmchain.examples import BagSet, TrainingSet, load_network, prepare_training
from swarmchain.metrics import compute_auroc, summarize_f1
from swarmchain.selection import SiteData, select_cells
from swarmchain.spec import DonorSpec, Minimums, TrainedSpec

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def load_test(files: Mapping[str, Path], config: DataConfig, seed: Arrays, spec: DonorSpec) -> TrainingSet | BagSet:
    """Samples that no site trains on, all of them in `validation`. Raises `DataError` as `data.select_cells` does."""
    asked = spec.model_copy(update={"labels_min": 0, "minimums": Minimums(cells=1, cells_per_label=1),
                                    "panel": spec.panel.model_copy(update={"share_min": 0.0})})
    parts = [select_cells(read_cells(path, config, spec.normalization), asked) for path in files.values()]
    pooled = pool(parts, seed)
    everything = SiteData(x=pooled.x, y=pooled.y, present=pooled.present, train=np.zeros(0, dtype=np.int64),
                          validation=np.arange(len(pooled.y)), donors=pooled.donors, samples=pooled.samples,
                          sample_names=pooled.sample_names)
    return prepare_training(everything, spec, seed, np.ones(len(spec.labels)))


def predict_samples(parameters: Arrays, examples: TrainingSet | BagSet, spec: TrainedSpec) -> Floats:
    """Class probabilities of all samples in `examples.validation`, [samples, labels]."""
    model = load_network(spec, parameters, examples)
    return examples.predict(model, examples.validation)


def predict_linear(pooled: SiteData, seed: Arrays, test: TrainingSet | BagSet, spec: DonorSpec) -> Floats:
    """Logistic regression (scikit-learn, C = 0.01, balanced) on pooled rows or pseudobulks; as `predict_samples`."""
    from sklearn.linear_model import LogisticRegression

    own = prepare_training(pooled, spec, seed, np.ones(len(spec.labels)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence remarks; the score tells
        model = LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced").fit(
            _get_rows(own)[own.train], own.y.numpy()[own.train])
    found = np.zeros((len(test.validation), len(spec.labels)), dtype=np.float32)
    found[:, model.classes_] = model.predict_proba(_get_rows(test)[test.validation])
    return found


def compare_donors(swarm: Arrays, seed: Arrays, sites: Mapping[str, SiteData], test: TrainingSet | BagSet,
                   spec: DonorSpec) -> dict[str, Floats]:
    """Every arm's probabilities of the held-out samples: central, swarm, linear, and `local <site>` for each site.

    Central and local train with the swarm's code and as many steps as each site of the swarm; a site whose training
    samples have one label alone has no local model.
    """
    pooled = pool(list(sites.values()), seed)
    rounds = spec.limits.rounds
    arms = {
        "central": predict_samples(train_alone(pooled, seed, spec, site=0, rounds=rounds), test, spec),
        "swarm": predict_samples(swarm, test, spec),
        "linear": predict_linear(pooled, seed, test, spec),
    }
    for i, (name, data) in enumerate(sites.items()):
        if len(np.unique(data.y[data.train])) > 1:
            alone = train_alone(data, seed, spec, site=i, rounds=rounds)
            arms[f"local {name}"] = predict_samples(alone, test, spec)
    return arms


def summarize_arm(truth: Ints, probabilities: Floats, spec: DonorSpec) -> dict[str, Any]:
    """`macro_f1`, `per_class` and, for two labels, `auroc` of one arm."""
    found = summarize_f1(truth, probabilities.argmax(axis=1), spec.labels)
    return {**found, "auroc": compute_auroc(truth, probabilities[:, 1])} if len(spec.labels) == 2 else found


def _get_rows(examples: TrainingSet | BagSet) -> Floats:
    rows: Floats = examples.compute_means() if isinstance(examples, BagSet) else examples.x.numpy()
    return rows
