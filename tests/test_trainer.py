"""A long local training that is interrupted ends with the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from swarmchain.layouts import constant_layout
from swarmchain.model import draw_state
from swarmchain.rating import Rater
from swarmchain.selection import SiteData
from swarmchain.spec import CellTypeSpec, Limits, Model, Panel, StatisticsRef, Training
from swarmchain.trainer import Contribution, Resume, TrainingSet, compute_loss, prepare_training, train_round
from swarmchain.trust import Claim

SPEC = CellTypeSpec(
    name="t", panel=Panel(features=tuple(f"g{i}" for i in range(6))), labels=("a", "b"),
    limits=Limits(rounds=3, sites_to_start=2), model=Model(hidden=(8,), dropout=0.3),
    training=Training(steps=12, batch_size=4, weight_decay=0.01),
    statistics=StatisticsRef(run=1, spec="0" * 64, checkpoint="0" * 64), seed_checkpoint="0" * 64)


class Killed(Exception):
    """Stands for the process that ends."""


def make_cells(seed: int = 0, *, lacks: tuple[int, ...] = (), spec: CellTypeSpec = SPEC) -> TrainingSet:
    g = np.random.default_rng(seed)
    data = SiteData(x=g.normal(size=(40, 6)).astype(np.float32), y=np.arange(40) % 2,
                    present=~np.isin(np.arange(6), lacks), train=np.arange(30), validation=np.arange(30, 40))
    constants = {name: np.full(shape, float("scale" in name), dtype)
                 for name, (dtype, shape) in constant_layout(SPEC).items()}
    cells = prepare_training(data, spec, constants, np.array([20, 20]))
    assert isinstance(cells, TrainingSet)
    return cells


def fill(cells: TrainingSet) -> TrainingSet:
    """The same cells with zeros for the features that the site lacks."""
    assert cells.columns is not None
    x = torch.zeros(len(cells.x), len(SPEC.panel.features))
    x[:, cells.columns[: cells.features]] = cells.x
    return replace(cells, x=x, columns=None)


class Counting:
    """A clock that ticks at each reading, and ends the process at one of them."""

    def __init__(self, end: int) -> None:
        self.ticks, self.end = 0, end

    def __call__(self) -> float:
        self.ticks += 1
        if self.ticks == self.end:
            raise Killed
        return float(self.ticks)


def train(folder: Path, *, end: int = -1, cells: TrainingSet | None = None, round_id: int = 2) -> Contribution:
    resume = Resume(folder, pause_s=2.0, parent="ab" * 32, clock=Counting(end))
    return train_round(draw_state(SPEC), cells or make_cells(), SPEC, round_id=round_id, site=1, resume=resume)


def is_equal(a: Contribution, b: Contribution) -> bool:
    same = all(a.deltas[name].tobytes() == b.deltas[name].tobytes() for name in a.deltas)
    return same and a.metrics == b.metrics


def test_interrupted_training_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = train_round(draw_state(SPEC), make_cells(), SPEC, round_id=2, site=1)
    found, killed = None, 0
    while found is None:
        try:
            found = train(tmp_path, end=9)
        except Killed:
            killed += 1
            assert (tmp_path / "training.npz").exists()
            torch.manual_seed(killed)  # another process has other random numbers
    assert killed >= 2
    assert is_equal(found, whole)
    assert not (tmp_path / "training.npz").exists()


def test_progress_of_another_round_or_other_cells_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, end=9)
    written = (tmp_path / "training.npz").read_bytes()
    for changes in ({"round_id": 3}, {"cells": make_cells(1)}):
        (tmp_path / "training.npz").write_bytes(written)
        clean = tmp_path / "clean"
        assert is_equal(train(tmp_path, **changes), train(clean, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PK" + b[2:][::-1]])
def test_invalid_progress_file_is_passed_over(tmp_path: Path, spoil: object) -> None:
    with pytest.raises(Killed):
        train(tmp_path, end=9)
    path = tmp_path / "training.npz"
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    assert is_equal(train(tmp_path), train(tmp_path / "clean"))


@pytest.mark.parametrize("mask", [False, True])
def test_features_that_a_site_lacks_cost_and_change_nothing(mask: bool) -> None:
    spec = SPEC.model_copy(update={"model": Model(hidden=(8,), dropout=0.3, mask=mask),
                                   "training": SPEC.training.model_copy(update={"weight_decay": 0.0, "proximal": 0.1})})
    narrow, parent = make_cells(lacks=(1, 4), spec=spec), draw_state(spec)
    assert narrow.features == 4
    few, all_ = (train_round(parent, cells, spec, round_id=1, site=0) for cells in (narrow, fill(narrow)))
    lacking = [1, 4, 7, 10] if mask else [1, 4]
    assert not few.deltas["layers.0.weight"][:, lacking].any() and few.deltas["layers.0.weight"].any()
    for name, delta in few.deltas.items():  # the sums are of fewer terms, so they round otherwise
        np.testing.assert_allclose(delta, all_.deltas[name], rtol=0, atol=2e-6)
    moved = {name: parent[name] + delta for name, delta in few.deltas.items()}
    assert compute_loss(moved, narrow, spec) == pytest.approx(compute_loss(moved, fill(narrow), spec), rel=1e-6)
    claims = [Claim(1, 1.0, (0, 1), few.deltas)]
    assert Rater(narrow, spec).rate(parent, claims) == Rater(fill(narrow), spec).rate(parent, claims)


def test_weights_that_decay_are_trained_for_every_feature() -> None:
    cells = make_cells(lacks=(1, 4))
    assert cells.features == 6 and cells.columns is None
    assert train_round(draw_state(SPEC), cells, SPEC, round_id=1, site=0).deltas["layers.0.weight"][:, [1, 4]].all()
