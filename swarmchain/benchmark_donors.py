"""The benchmark of classifiers of donors: as `benchmark`, with samples in place of cells, by one split or by folds.

Every arm gives class probabilities of the held-out samples; they are scored by the area under the ROC curve, where
there are two labels, and by macro-F1. With folds every sample is held out once: the score is the mean over the folds,
or, where a fold has few samples, that of all folds' samples together.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.baselines import pool, train_alone
from swarmchain.baselines_donors import load_test, predict_linear, predict_samples
from swarmchain.benchmark import FORMAT, LOCAL, Say, Settings, Swarm, deal, describe_settings, name_cells, play_swarm
from swarmchain.dealing import Dealt, list_folds
from swarmchain.errors import ConfigError, DataError
from swarmchain.intervals import Interval, Resampled, resample_auroc, resample_macro_f1
from swarmchain.metrics import compute_f1
from swarmchain.protocol import derive_seed
from swarmchain.spec import DonorSpec
from swarmchain.trainer import prepare_training, score_checkpoint

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Deal = Callable[[Path, int], Dealt]
Drawn = dict[str, npt.NDArray[np.float64]]

ARMS = ("central", "swarm", "linear")


@dataclass(frozen=True)
class Fold:
    """Held-out samples of one fold and one seed: `truth` [samples], and each arm's probabilities [samples, labels].

    A site whose training samples have one label alone has no local model.
    """

    truth: Ints
    arms: Mapping[str, Floats]


@dataclass
class Played:
    """What all seeds and folds gave: `folds[seed][fold]`, and `home[site]` of (swarm, local) scores at the site."""

    folds: list[list[Fold]] = field(default_factory=list)
    home: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    wall_s: dict[str, list[float]] = field(default_factory=dict)


def run_donor_benchmark(settings: Settings, *, deal_fold: Deal | None = None, folds: int | None = None,
                        say: Say = lambda words: None) -> dict[str, Any]:
    """Train every arm for every seed and fold, and compare.

    Parameters
    ----------
    deal_fold
        Deals the cells of one of `folds` folds into a folder; by default as the settings' table of splits says, by its
        column fold if it has one.

    Returns
    -------
    The content of benchmark.json, as `benchmark.run_benchmark` gives it; with two labels every arm has `auroc` too, and
    `auroc` holds intervals and differences of it.

    Raises
    ------
    DataError
        If data and splits do not fit each other or the task.
    ConfigError
        If the settings name no column of donors.
    """
    if settings.donor_column is None:
        raise ConfigError("the task donor needs a column that tells whose a cell is", hint="name it: --donor-column")
    if settings.leaves_one_out:
        raise ConfigError("--leave-one-out is for the task cell_type", hint="leave it away")
    if deal_fold is None:
        deal_fold, folds = _find_folds(settings)
    played, swarm = Played(), None
    with tempfile.TemporaryDirectory(prefix="swarmchain-benchmark-") as name:
        dealt = [deal_fold(Path(name) / f"data-{fold}", fold) for fold in range(folds or 1)]
        for seed in range(settings.seeds):
            played.folds.append([])
            for fold, one in enumerate(dealt):
                folder = Path(name) / f"{seed}-{fold}"
                swarm = play_swarm(folder, one, settings, seed=seed)
                shutil.rmtree(folder)
                played.folds[-1].append(measure(played, swarm, one, settings))
                played.checkpoints.append(swarm.checkpoint)
            found = {arm: score(_select(played.folds[-1], settings), arm) for arm in ("swarm", "central")}
            say(f"seed {seed}: " + "; ".join(f"{arm} " + ", ".join(f"{key} {value:.3f}" for key, value in one.items())
                                             for arm, one in found.items()))
    assert swarm is not None
    return summarize(played, swarm, settings)


def _find_folds(settings: Settings) -> tuple[Deal, int]:
    names = list_folds(settings.splits)
    if len(names) == 1:
        raise DataError(f"{settings.splits}: the column fold holds {names[0]!r} alone", hint="name two or more")
    return lambda folder, fold: deal(folder, settings, fold=names[fold] if names else None), max(len(names), 1)


def measure(played: Played, swarm: Swarm, dealt: Dealt, settings: Settings) -> Fold:
    """All arms of one seed and fold on its held-out samples; what the sites see at home goes into `played`."""
    spec, rounds = swarm.spec, swarm.spec.limits.rounds
    assert isinstance(spec, DonorSpec)
    test = load_test(dealt.test, name_cells(next(iter(dealt.test.values())), settings), swarm.seed, spec)
    pooled = pool(list(swarm.sites.values()), swarm.seed)
    times = len(swarm.sites) if settings.central_steps == "sum" else 1
    law = spec.model_copy(update={"training": spec.training.model_copy(
        update={"steps": spec.training.steps * times})})
    started = time.perf_counter()
    arms = {"central": predict_samples(train_alone(pooled, swarm.seed, law, site=0, rounds=rounds), test, spec)}
    played.wall_s.setdefault("central", []).append(round(time.perf_counter() - started, 3))
    played.wall_s.setdefault("swarm", []).append(round(swarm.wall_s, 3))
    arms["swarm"] = predict_samples(swarm.tensors, test, spec)
    arms["linear"] = predict_linear(pooled, swarm.seed, test, spec)
    for i, (name, data) in enumerate(swarm.sites.items()):
        if len(np.unique(data.y[data.train])) < 2:
            continue
        alone = train_alone(data, swarm.seed, spec, site=i, rounds=rounds)
        arms[LOCAL + name] = predict_samples(alone, test, spec)
        here = score_checkpoint(alone, prepare_training(data, spec, swarm.seed, swarm.counts), spec)
        shared = swarm.scores.get(name)
        if here is not None and shared is not None:
            played.home.setdefault(name, []).append((shared, here))
    return Fold(test.y.numpy()[test.validation], arms)


def score(folds: Sequence[Fold], arm: str) -> dict[str, float]:
    """Mean over the folds that have the arm: `auroc` (two labels), and `macro_f1`."""
    own = [fold for fold in folds if arm in fold.arms]
    found = {metric: [draw(fold.truth, [fold.arms[arm]], resamples=1, seed=0).plain[0] for fold in own]
             for metric, draw in _list_metrics(folds).items()}
    return {metric: float(np.nanmean(values)) for metric, values in found.items()}


def summarize(played: Played, swarm: Swarm, settings: Settings) -> dict[str, Any]:
    """benchmark.json."""
    seeds = [_select(folds, settings) for folds in played.folds]
    names = dict.fromkeys(arm for folds in seeds for fold in folds for arm in fold.arms)
    sites = [arm for arm in names if arm.startswith(LOCAL)]
    scores = {arm: [score(folds, arm) for folds in seeds] for arm in (*ARMS, *sites)}
    if not sites:
        raise DataError("no site has training samples of two labels, so none has a local model",
                        hint="deal the samples so that a site has both")
    worst = {metric: min(sites, key=partial(_average, scores, metric)) for metric in scores["swarm"][0]}
    scores["local_mean"] = [{metric: float(np.mean([scores[arm][i][metric] for arm in sites])) for metric in found}
                            for i, found in enumerate(scores["swarm"])]
    scores["local_worst"] = [{metric: scores[arm][i][metric] for metric, arm in worst.items()}
                             for i in range(len(seeds))]
    members = {arm: (arm,) for arm in (*ARMS, *sites)} | {
        "local_mean": tuple(sites), "local_worst": (worst["macro_f1"],)}
    labels = swarm.spec.labels
    arms = {arm: _describe_arm(found, _score_classes(seeds, members[arm], labels)) for arm, found in scores.items()}
    arms["local_worst"]["site"] = worst["macro_f1"].removeprefix(LOCAL)
    measured = {metric: _compute_intervals(seeds, {**members, "local_worst": (arm,)}, metric, settings)
                for metric, arm in worst.items()}
    home = {name: dict(zip(("swarm", "local"), np.mean(found, axis=0).tolist(), strict=True))
            | {"difference": float(np.mean([shared - here for shared, here in found])), "trainings": len(found)}
            for name, found in played.home.items()}
    truth = np.concatenate([fold.truth for fold in played.folds[0]])
    return {
        "format": FORMAT, "task": "donor", "metric": "auroc" if "auroc" in measured else "macro_f1",
        "home_metric": swarm.spec.score, "dataset": settings.data.stem, "arms": arms, **measured.pop("macro_f1"),
        **measured, "home": home, "left_out": {}, "folds": len(played.folds[0]), "pools_folds": settings.pools_folds,
        "support": {label: int((truth == i).sum()) for i, label in enumerate(labels)},
        "sites": {name: {"samples_train": len(np.unique(d.samples[d.train])),
                         "samples_validation": len(np.unique(d.samples[d.validation])),
                         "features": int(d.present.sum())} for name, d in swarm.sites.items() if d.samples is not None},
        "settings": describe_settings(swarm.spec, settings),
        "checkpoints": played.checkpoints, "wall_s": played.wall_s,
    }


def _select(folds: list[Fold], settings: Settings) -> list[Fold]:
    """The folds, or one of all their samples, with the arms that every fold has."""
    if not settings.pools_folds:
        return folds
    names = [arm for arm in folds[0].arms if all(arm in fold.arms for fold in folds)]
    return [Fold(np.concatenate([fold.truth for fold in folds]),
                 {arm: np.concatenate([fold.arms[arm] for fold in folds]) for arm in names})]


def _list_metrics(folds: Sequence[Fold]) -> dict[str, Callable[..., Resampled]]:
    """How each metric of probabilities is resampled."""
    classes = next(iter(folds[0].arms.values())).shape[1]

    def draw_f1(truth: Ints, found: Sequence[Floats], *, resamples: int, seed: int) -> Resampled:
        called = [p.argmax(axis=1).astype(np.int64) for p in found]
        return resample_macro_f1(truth, called, classes=classes, resamples=resamples, seed=seed)

    def draw_auroc(truth: Ints, found: Sequence[Floats], *, resamples: int, seed: int) -> Resampled:
        return resample_auroc(truth, [p[:, 1].astype(np.float64) for p in found], resamples=resamples, seed=seed)

    return {"auroc": draw_auroc, "macro_f1": draw_f1} if classes == 2 else {"macro_f1": draw_f1}


def _average(scores: Mapping[str, list[dict[str, float]]], metric: str, arm: str) -> float:
    return float(np.mean([found[metric] for found in scores[arm]]))


def _describe_arm(found: list[dict[str, float]], per_class: dict[str, float]) -> dict[str, Any]:
    about: dict[str, Any] = {"per_class": per_class}
    for metric in found[0]:
        values = [one[metric] for one in found]
        suffix = "" if metric == "macro_f1" else f"_{metric}"
        about |= {metric: float(np.mean(values)), f"seeds{suffix}": values,
                  f"sd{suffix}": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}
    return about


def _score_classes(seeds: list[list[Fold]], members: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    found = [compute_f1(fold.truth, fold.arms[arm].argmax(axis=1).astype(np.int64), classes=len(labels))
             for folds in seeds for fold in folds for arm in members if arm in fold.arms]
    return {label: float(v) for label, v in zip(labels, np.nanmean(found, axis=0), strict=True)}


def _compute_intervals(seeds: list[list[Fold]], members: Mapping[str, Sequence[str]], metric: str, settings: Settings
                       ) -> dict[str, Any]:
    """95 % intervals of every arm, and of the swarm less each other, over the same resamples of held-out samples."""
    parts: dict[str, list[npt.NDArray[np.float64]]] = {}
    for number, same in enumerate(zip(*seeds, strict=True)):
        draw = partial(_list_metrics(same)[metric], resamples=settings.resamples, seed=derive_seed("bootstrap", number))
        flat = [(arm, probabilities) for fold in same for arm, probabilities in fold.arms.items()]
        drawn = draw(same[0].truth, [probabilities for _, probabilities in flat])
        both = np.concatenate([drawn.plain[:, None], drawn.scores], axis=1)
        for arm, names in members.items():
            rows = [i for i, (name, _) in enumerate(flat) if name in names]
            if rows:
                parts.setdefault(arm, []).append(both[rows].mean(axis=0))
    means = {arm: np.nanmean(found, axis=0) for arm, found in parts.items()}
    return {"intervals": {arm: _bound(values) for arm, values in means.items()},
            "differences": {f"swarm - {arm}": _bound(means["swarm"] - values) for arm, values in means.items()
                            if arm != "swarm"}}


def _bound(values: npt.NDArray[np.float64]) -> dict[str, float]:
    """The first value is of the samples as they are, the others of resamples."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    found = Interval(float(values[0]), float(low), float(high))
    return {"value": found.value, "low": found.low, "high": found.high}
