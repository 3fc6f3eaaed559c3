"""A swarm against the alternatives, on fixed splits: what sharing the training is worth, and how sure that is.

Arms, all scored on the same held-out cells: `swarm`; `central`, all training cells in one place; every site alone, with
the mean and the worst of them; `linear`, a multinomial logistic regression on the pooled cells. All networks are
trained with the swarm's own code, from the same seed checkpoint, and stand on the same statistics. A local arm takes
rounds × steps, as each site of the swarm does; the central arm takes as many, or, with `central_steps="sum"`, as many
as all sites take together.

The swarm is played in one process (`inprocess`) or by agents as processes on a chain of their own (`consortium`): the
same checkpoint, bit for bit.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from swarmchain.agreement import standardize
from swarmchain.arena import open_arena
from swarmchain.baselines import pool, predict, predict_linear, train_alone
from swarmchain.certify import Arrays
from swarmchain.config import DataConfig
from swarmchain.data import read_cells, read_names
from swarmchain.dealing import Dealt, deal_splits
from swarmchain.errors import ConfigError, DataError
from swarmchain.intervals import Interval, resample_macro_f1
from swarmchain.layouts import local_layout
from swarmchain.merging import Merge
from swarmchain.metrics import compute_f1, compute_macro_f1
from swarmchain.planning import plan_cell_type, plan_donor, plan_statistics, read_statistics
from swarmchain.protocol import derive_seed, first_problem
from swarmchain.selection import SiteData, select_cells, select_panel
from swarmchain.spec import Limits, Minimums, Model, Normalization, Training
from swarmchain.stacking import score_at_home
from swarmchain.store import read_checkpoint
from swarmchain.trainer import prepare_training, score_checkpoint

Ints = npt.NDArray[np.int64]
State = Literal["auto", "counts", "log1p", "arcsinh", "none"]
Say = Callable[[str], None]
M = TypeVar("M", bound=BaseModel)

FORMAT = "swarmchain-benchmark/1"
LOCAL = "local/"


@dataclass(frozen=True)
class Settings:
    """What a benchmark is run with; see `swarmchain benchmark --help`.

    `donor` are further arguments of `planning.plan_donor` for that task: `model`, `bag_size`, `labels_min`.
    """

    data: Path
    splits: Path
    task: Literal["cell_type", "donor"] = "cell_type"
    site_column: str = "site"
    label_column: str = "cell_type"
    donor_column: str | None = None
    sample_column: str | None = None
    state: State = "auto"
    normalization: Normalization = field(default_factory=Normalization)
    minimums: Minimums = field(default_factory=Minimums)
    sites_per_feature_min: int = 1
    panel_share_min: float = 0.3
    rounds: int = 50
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    merge: Merge | None = None
    donor: Mapping[str, Any] = field(default_factory=dict)
    pools_folds: bool = False
    seeds: int = 3
    central_steps: Literal["site", "sum"] = "site"
    is_real: bool = False
    leaves_one_out: bool = False
    resamples: int = 2_000


@dataclass(frozen=True)
class Swarm:
    """A finished swarm.

    Its law, the seed checkpoint's and the final one's tensors, the digest; each site's last score and cells; training
    cells per label over all sites; seconds that it took.
    """

    spec: Any
    seed: Arrays
    tensors: Arrays
    checkpoint: str
    scores: dict[str, float | None]
    sites: dict[str, SiteData]
    counts: npt.NDArray[np.generic]
    wall_s: float


@dataclass(frozen=True)
class Test:
    """Held-out cells: `x` standardised [cells, panel], `y` [cells], and how many had a label that no site trains on."""

    x: npt.NDArray[np.float32]
    y: Ints
    unknown: int


@dataclass
class Measured:
    """Predictions on the held-out cells, by arm and seed, and what the sites see at home, by seed.

    `home[site]` holds macro-F1 of `swarm` and `local`, and of what the site may make of the swarm's model: see
    `stacking.score_at_home`.
    """

    truth: Ints
    labels: tuple[str, ...]
    unknown: int
    predictions: dict[str, list[Ints]] = field(default_factory=dict)
    home: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    wall_s: dict[str, list[float]] = field(default_factory=dict)

    def add(self, arm: str, predicted: Ints, wall_s: float | None = None) -> None:
        """One more seed of an arm."""
        self.predictions.setdefault(arm, []).append(predicted)
        if wall_s is not None:
            self.wall_s.setdefault(arm, []).append(round(wall_s, 3))


def run_benchmark(settings: Settings, *, say: Say = lambda words: None) -> dict[str, Any]:
    """Train every arm for every seed, and compare.

    Returns
    -------
    The content of benchmark.json: `arms` (each with `macro_f1`, `sd`, `per_class`, `seeds`), `differences` and
    `intervals`, `home`, `left_out`, `support`, `sites`, `settings`, `checkpoints`, `wall_s`.

    Raises
    ------
    DataError
        If data and splits do not fit each other or the task.
    """
    with tempfile.TemporaryDirectory(prefix="swarmchain-benchmark-") as name:
        folder = Path(name)
        dealt = deal(folder / "data", settings)
        swarms: list[Swarm] = []
        measured: Measured | None = None
        for seed in range(settings.seeds):
            swarm = play_swarm(folder / f"seed-{seed}", dealt, settings, seed=seed)
            shutil.rmtree(folder / f"seed-{seed}")
            swarms.append(swarm)
            test = read_test(list(dealt.test.values()), swarm, settings)
            measured = measured or Measured(test.y, swarm.spec.labels, test.unknown)
            measure(measured, swarm, test, settings)
            say(f"seed {seed}: " + ", ".join(f"{arm} {_score(measured, arm)[-1]:.3f}" for arm in ("swarm", "central"))
                + f"; checkpoint {swarm.checkpoint[:12]}…, swarm {swarm.wall_s:.0f} s")
        assert measured is not None
        left_out = leave_each_out(folder, dealt, swarms[0], settings) if settings.leaves_one_out else {}
        return summarize(measured, swarms, settings, left_out)


def change_law(model: M, training: Training, changes: Mapping[str, str]) -> tuple[M, Training]:
    """Model and training with some fields replaced, by names such as `training.lr`; values are JSON or words.

    Raises
    ------
    ConfigError
        If there is no such field, or the value is none for it.
    """
    parts: dict[str, BaseModel] = {"model": model, "training": training}
    for key, text in changes.items():
        part, _, name = key.partition(".")
        if part not in parts or name not in type(parts[part]).model_fields:
            known = [f"{p}.{n}" for p, value in parts.items() for n in type(value).model_fields]
            raise ConfigError(f"there is no setting {key!r}", hint=f"known are {', '.join(known)}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        try:
            parts[part] = type(parts[part]).model_validate_json(
                json.dumps({**parts[part].model_dump(mode="json"), name: value}))
        except ValidationError as exc:
            raise ConfigError(f"{key}={text}: {first_problem(exc)}",
                              hint="docs/benchmarks.md shows settings that serve") from exc
    changed_model, changed_training = parts["model"], parts["training"]
    assert isinstance(changed_model, type(model)) and isinstance(changed_training, Training)
    return changed_model, changed_training


def deal(folder: Path, settings: Settings, *, fold: str | None = None) -> Dealt:
    """One file per site, and the held-out cells, those of `fold`, under `folder`. Raises as `run_benchmark` does."""
    dealt = deal_splits(folder, settings.data, splits=settings.splits, site_column=settings.site_column,
                        label_column=settings.label_column, donor_column=settings.donor_column, fold=fold)
    _require_enough(dealt, settings)
    return dealt


def play_swarm(folder: Path, dealt: Dealt, settings: Settings, *, seed: int) -> Swarm:
    """A statistics run, and the training run that stands on it."""
    started = time.perf_counter()
    cells = {name: name_cells(path, settings) for name, path in dealt.files.items()}
    is_by_donor = settings.task == "donor"
    with open_arena(folder, cells, is_real=settings.is_real, seed=seed) as arena:
        cards = arena.list_cards()
        view, _ = arena.play(plan_statistics(cards, name="statistics", sites_to_start=len(cards),
                                             normalization=settings.normalization, minimums=settings.minimums,
                                             split_by="donor" if is_by_donor else "cell"))
        source, sums = read_statistics(arena.store, view)
        plan: Callable[..., Any] = functools.partial(plan_donor, **settings.donor) if is_by_donor \
            else functools.partial(plan_cell_type, model=settings.model)
        spec, blob = plan(
            (source, sums), view, name=f"benchmark of {dealt.dataset}",
            limits=Limits(rounds=settings.rounds, sites_to_start=len(cards)), merge=settings.merge,
            training=settings.training.model_copy(update={"seed": seed}), panel_share_min=settings.panel_share_min,
            sites_per_feature_min=min(settings.sites_per_feature_min, len(cards)))
        view, scores = arena.play(spec, blob)
        wall_s = time.perf_counter() - started
        first, last = (read_checkpoint(arena.store, digest, spec) for digest in (spec.seed_checkpoint, view.checkpoint))
    sites = {name: select_cells(read_cells(Path(config.path), config, spec.normalization), spec)
             for name, config in cells.items()}
    rows = [source.labels.index(label) for label in spec.labels]
    counts = sums["samples_per_label" if is_by_donor else "cells_per_label"][rows]
    return Swarm(spec, first, last, view.checkpoint, scores, sites, counts, wall_s)


def read_test(paths: Sequence[Path], swarm: Swarm, settings: Settings) -> Test:
    """Held-out cells on the swarm's panel, as every arm gets them."""
    spec, xs, ys, unknown = swarm.spec, [], [], 0
    for path in paths:
        cells = read_cells(path, name_cells(path, settings), spec.normalization)
        x, present = select_panel(cells, spec.panel.model_copy(update={"share_min": 0.0}))
        known = np.isin(cells.labels, spec.labels)
        unknown += int((~known).sum())
        xs.append(standardize(x, present, swarm.seed)[known])
        ys += [spec.labels.index(label) for label in cells.labels[known].tolist()]
    if not ys:
        raise DataError(f"no held-out cell of {settings.splits} has a label that a site trains on",
                        hint=f"look at the column {settings.label_column!r} of train and test cells")
    return Test(np.concatenate(xs), np.array(ys, dtype=np.int64), unknown)


def measure(measured: Measured, swarm: Swarm, test: Test, settings: Settings) -> None:
    """All arms of one seed."""
    spec, rounds = swarm.spec, swarm.spec.limits.rounds
    measured.checkpoints.append(swarm.checkpoint)
    measured.add("swarm", predict(swarm.tensors, test.x, spec), swarm.wall_s)
    pooled = pool(list(swarm.sites.values()), swarm.seed)
    times = len(swarm.sites) if settings.central_steps == "sum" else 1
    law = spec.model_copy(update={"training": spec.training.model_copy(
        update={"steps": spec.training.steps * times})})
    started = time.perf_counter()
    central = train_alone(pooled, swarm.seed, law, site=0, rounds=rounds)
    measured.add("central", predict(central, test.x, spec), time.perf_counter() - started)
    for i, (name, data) in enumerate(swarm.sites.items()):
        alone = train_alone(data, swarm.seed, spec, site=i, rounds=rounds)
        measured.add(LOCAL + name, predict(alone, test.x, spec))
        cells = prepare_training(data, spec, swarm.seed, swarm.counts)
        here = score_checkpoint(alone, cells, spec)
        shared = swarm.scores.get(name)
        if here is not None and shared is not None:
            entry = {"swarm": shared, "local": here}
            if not local_layout(spec):  # else the sites kept parts of the swarm's model to themselves
                entry |= score_at_home(alone, swarm.tensors, data, spec, counts=swarm.counts, constants=swarm.seed,
                                       site=i)
            measured.home.setdefault(name, []).append(entry)
    # it has no seed; fitted again, since the panel is a seed's own by right
    measured.add("linear", predict_linear(pooled, swarm.seed, test.x))


def leave_each_out(folder: Path, dealt: Dealt, full: Swarm, settings: Settings) -> dict[str, dict[str, float]]:
    """For each site with held-out cells: a swarm of the others and the whole swarm, both tested there; the first seed.

    What a hospital would get from the model of a consortium that it is not in.
    """
    found: dict[str, dict[str, float]] = {}
    for name in (name for name in dealt.files if name in dealt.test):
        others = replace(dealt, files={n: p for n, p in dealt.files.items() if n != name})
        swarm = play_swarm(folder / f"without-{len(found)}", others, replace(settings, is_real=False), seed=0)
        shutil.rmtree(folder / f"without-{len(found)}")
        entry: dict[str, float] = {}
        for key, model in (("without", swarm), ("with", full)):
            test = read_test([dealt.test[name]], model, settings)
            entry[key] = compute_macro_f1(test.y, predict(model.tensors, test.x, model.spec),
                                          classes=len(model.spec.labels))
            entry[f"cells_{key}"] = len(test.y)
        found[name] = entry
    return found


def summarize(measured: Measured, swarms: Sequence[Swarm], settings: Settings, left_out: Mapping[str, Any]
              ) -> dict[str, Any]:
    """benchmark.json."""
    labels, truth = measured.labels, measured.truth
    per_class = {arm: np.mean([compute_f1(truth, p, classes=len(labels)) for p in found], axis=0)
                 for arm, found in measured.predictions.items()}
    scores = {arm: _score(measured, arm) for arm in measured.predictions}
    locals_ = [arm for arm in scores if arm.startswith(LOCAL)]
    worst = min(locals_, key=lambda arm: float(np.mean(scores[arm])))
    scores["local_mean"] = np.mean([scores[arm] for arm in locals_], axis=0).tolist()
    per_class["local_mean"] = np.mean([per_class[arm] for arm in locals_], axis=0)
    scores["local_worst"], per_class["local_worst"] = scores[worst], per_class[worst]
    arms: dict[str, dict[str, Any]] = {
        arm: {"macro_f1": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
              "per_class": {label: float(v) for label, v in zip(labels, per_class[arm], strict=True)
                            if not np.isnan(v)},
              "seeds": values}
        for arm, values in scores.items()}
    arms["local_worst"]["site"] = worst.removeprefix(LOCAL)
    intervals, differences = _compute_intervals(measured, worst, settings)
    home = {name: {**{key: float(np.mean([entry[key] for entry in found])) for key in found[0]},
                   "difference": float(np.mean([entry["swarm"] - entry["local"] for entry in found])),
                   "cells": len(swarms[0].sites[name].validation)}
            for name, found in measured.home.items()}
    spec = swarms[0].spec
    return {
        "format": FORMAT, "task": settings.task, "metric": "macro_f1", "dataset": settings.data.stem,
        "arms": arms, "intervals": intervals, "differences": differences, "home": home, "left_out": dict(left_out),
        "support": {label: int((truth == i).sum()) for i, label in enumerate(labels)},
        "cells_of_unknown_labels": measured.unknown,
        "sites": {name: {"cells_train": len(d.train), "cells_validation": len(d.validation),
                         "features": int(d.present.sum())} for name, d in swarms[0].sites.items()},
        "settings": describe_settings(spec, settings),
        "checkpoints": measured.checkpoints, "wall_s": measured.wall_s,
    }


def describe_settings(spec: Any, settings: Settings) -> dict[str, Any]:
    """What the arms were trained with, from a swarm's law and what the benchmark was asked for."""
    return {"rounds": spec.limits.rounds, "features": len(spec.panel.features),
            "model": spec.model.model_dump(mode="json"), "training": spec.training.model_dump(mode="json"),
            "merge": spec.merge.model_dump(mode="json"),
            "normalization": spec.normalization.model_dump(mode="json"),
            "central_steps": settings.central_steps, "seeds": settings.seeds, "real": settings.is_real,
            "resamples": settings.resamples}


def _compute_intervals(measured: Measured, worst: str, settings: Settings
                       ) -> tuple[dict[str, Any], dict[str, Any]]:
    """95 % intervals of every arm, and of the swarm less each other arm, over the same resamples of test cells."""
    flat = [(arm, p) for arm, found in measured.predictions.items() for p in found]
    at = {arm: [i for i, (name, _) in enumerate(flat) if name == arm] for arm in measured.predictions}
    at["local_mean"] = [i for i, (name, _) in enumerate(flat) if name.startswith(LOCAL)]
    at["local_worst"] = at[worst]
    drawn = resample_macro_f1(measured.truth, [p for _, p in flat], classes=len(measured.labels),
                              resamples=settings.resamples, seed=derive_seed("bootstrap", 0))
    intervals = {arm: _describe(drawn.interval(rows)) for arm, rows in at.items()}
    differences = {f"swarm - {arm}": _describe(drawn.interval(at["swarm"], rows))
                   for arm, rows in at.items() if arm != "swarm"}
    return intervals, differences


def _describe(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _score(measured: Measured, arm: str) -> list[float]:
    return [compute_macro_f1(measured.truth, p, classes=len(measured.labels)) for p in measured.predictions[arm]]


def name_cells(path: Path, settings: Settings) -> DataConfig:
    """How a site names a file of cells."""
    owners: Any = {"donor_column": settings.donor_column, "sample_column": settings.sample_column,
                   "classes_min": settings.donor.get("labels_min", 2)}
    return DataConfig(path=str(path.resolve()), label_column=settings.label_column, state=settings.state,
                      **(owners if settings.task == "donor" else {}))


def _require_enough(dealt: Dealt, settings: Settings) -> None:
    """Before any training: more than one class, and sites enough. Raises `DataError` or `ConfigError`."""
    labels = {label for path in dealt.files.values() for label in read_names(path, settings.label_column)[1]}
    if len(labels) < 2:
        raise DataError(f"{settings.data}: the column {settings.label_column!r} of all training cells holds "
                        f"{', '.join(sorted(labels)) or 'nothing'}", hint="a classifier needs at least two classes")
    if settings.leaves_one_out and len(dealt.files) < 3:
        raise ConfigError("--leave-one-out leaves one site of two", hint="it takes at least three sites")
    if settings.leaves_one_out and not set(dealt.files) & set(dealt.test):
        raise ConfigError(f"--leave-one-out: no held-out cell of {settings.splits} belongs to a site",
                          hint="name the site of test cells in the table, too")
