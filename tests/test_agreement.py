"""What sites agree on is what the pooled cells give: numpy's moments and scanpy's highly variable genes."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swarmchain.agreement import (
    Cutoffs,
    Flavor,
    choose_variable,
    compute_moments,
    compute_standardization,
    compute_statistics,
    compute_variability,
    find_common,
    standardize,
)
from swarmchain.checkpoint import allocate_tensors, decode_tensors, encode_tensors
from swarmchain.config import DataConfig
from swarmchain.data import read_cells
from swarmchain.errors import DataError, SpecError
from swarmchain.layouts import checkpoint_layout
from swarmchain.merge import Input, compute_norm, sum_statistics
from swarmchain.model import build_model, draw_state, load_state
from swarmchain.planning import plan_cell_type, summarize_statistics
from swarmchain.selection import Cells, SiteData, select_cells, select_panel
from swarmchain.spec import (
    CellTypeSpec,
    Limits,
    Minimums,
    Model,
    Normalization,
    Panel,
    StatisticsRef,
    StatisticsSpec,
)
from swarmchain.tasks import check_standardization

Arrays = Mapping[str, np.ndarray]
FLAVORS: tuple[Flavor, ...] = ("seurat", "cell_ranger")
STUDIES = Path(os.environ.get("SWARMCHAIN_DATA", ROOT.parent / "shared" / "data")) / "pbmc_multistudy"


def make_spec(features: Sequence[str], *, kind: str = "log1p", minimums: Minimums | None = None) -> StatisticsSpec:
    return StatisticsSpec(
        name="s", panel=Panel(features=tuple(features), share_min=0.0), labels=("a", "b", "c"),
        normalization=Normalization(kind=kind), limits=Limits(rounds=1, sites_to_start=1),  # type: ignore[arg-type]
        minimums=minimums or Minimums())


def make_site(x: Any, *, present: np.ndarray | None = None, y: np.ndarray | None = None,
              donors: np.ndarray | None = None) -> SiteData:
    """All cells are for training."""
    cells, features = x.shape
    here = np.ones(features, bool) if present is None else present
    dense = np.asarray(x.toarray() if sp.issparse(x) else x, dtype=np.float32)
    return SiteData(x=np.where(here, dense, 0).astype(np.float32), y=np.zeros(cells, np.int64) if y is None else y,
                    present=here, train=np.arange(cells), validation=np.arange(0), donors=donors)


def add_up(sites: Sequence[SiteData], spec: StatisticsSpec) -> dict[str, np.ndarray]:
    """What the statistics run gives."""
    inputs = []
    for i, data in enumerate(sites):
        sums = compute_statistics(data, spec)
        inputs.append(Input(i, len(data.train), sums, compute_norm(sums)))
    _, merged = allocate_tensors(checkpoint_layout(spec))
    sum_statistics(inputs, into=merged)
    return dict(merged)


def deal(x: Any, sites: int, seed: int) -> list[Any]:
    owner = np.random.default_rng(seed).integers(0, sites, x.shape[0])
    return [x[owner == i] for i in range(sites) if (owner == i).any()]


def run_scanpy(x: Any, flavor: Flavor, choice: int | Cutoffs) -> pd.DataFrame:
    given_ = {"n_top_genes": choice} if isinstance(choice, int) else {
        "min_mean": choice.mean_min, "max_mean": choice.mean_max, "min_disp": choice.dispersion_min,
        "max_disp": choice.dispersion_max}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: pd.DataFrame = scanpy.pp.highly_variable_genes(anndata.AnnData(x.copy()), flavor=flavor, inplace=False,
                                                              **given_)
    return found


def check_variability(sums: Arrays, pooled: Any, flavor: Flavor, choice: int | Cutoffs, *, sites_min: int = 1,
                      is_exact: bool = True) -> None:
    """`pooled` has the features that are at so many sites.

    In bins of two or three features normalised dispersions are equal but for rounding, which then decides: only where
    not `is_exact`, features may differ that are that near to the bound.
    """
    rows = np.flatnonzero(sums["sites_per_feature"] >= sites_min)
    expected = run_scanpy(pooled, flavor, choice)
    found = compute_variability(sums, flavor=flavor, sites_min=sites_min)
    for name in ("means", "dispersions", "dispersions_norm"):
        np.testing.assert_allclose(getattr(found, name)[rows], expected[name].to_numpy(), rtol=1e-6, atol=1e-6)
    chosen = choose_variable(found, choice)
    assert not np.delete(chosen, rows).any()
    differs = chosen[rows] != expected["highly_variable"].to_numpy()
    if is_exact:
        assert not differs.any()
    norm = expected["dispersions_norm"].to_numpy()
    ranked = np.sort(norm[~np.isnan(norm)])[::-1]
    bounds = (ranked[min(choice, len(ranked)) - 1],) if isinstance(choice, int) else (
        choice.dispersion_min, choice.dispersion_max)
    assert all(min(abs(value - bound) for bound in bounds) < 1e-9 for value in norm[differs])


def draw_expression(cells: int, features: int, seed: int) -> np.ndarray:
    """log1p of normalised counts, of features of very different means, some of them not expressed at all."""
    g = np.random.default_rng(seed)
    rates = g.gamma(1.0, 2.0, (cells, 1)) * np.exp(g.normal(-1.0, 2.0, features)) * g.gamma(0.5, 2.0, (cells, features))
    counts = g.poisson(rates).astype(np.float64)
    counts[:, 0] = 0
    return np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4).astype(np.float32)


# percentiles of so many features lie between two of them: on one, rounding would decide its bin
SIZES = st.integers(30, 90).filter(lambda n: math.gcd(n - 1, 20) == 1)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), cells=st.integers(12, 80), features=SIZES, sites=st.integers(1, 6),
       choice=st.one_of(st.integers(1, 100), st.just(Cutoffs()), st.just(Cutoffs(0.1, 5.0, 0.0, 2.0))),
       is_sparse=st.booleans())
@example(seed=0, cells=60, features=62, sites=4, choice=20, is_sparse=True)
def test_highly_variable_genes_are_scanpys_on_pooled_cells(seed: int, cells: int, features: int, sites: int,
                                                           choice: int | Cutoffs, is_sparse: bool) -> None:
    x = draw_expression(cells, features, seed)
    parts = deal(sp.csr_matrix(x) if is_sparse else x, sites, seed)
    sums = add_up([make_site(part) for part in parts], make_spec([f"g{i}" for i in range(features)]))
    check_variability(sums, x.astype(np.float64), "seurat", choice, is_exact=False)
    try:
        expected: Any = run_scanpy(x, "cell_ranger", choice)
    except ValueError:  # too many features are not expressed at all
        expected = None
    if expected is None:
        with pytest.raises(SpecError, match="more different means"):
            compute_variability(sums, flavor="cell_ranger")
    else:
        check_variability(sums, x.astype(np.float64), "cell_ranger", choice, is_exact=False)


@cache
def load_reduced() -> anndata.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: anndata.AnnData = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    return found


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("choice", [10, 100, 300, 764, 765, 5000, Cutoffs()], ids=str)
def test_highly_variable_genes_of_real_cells(flavor: Flavor, choice: int | Cutoffs) -> None:
    data = load_reduced()
    for seed in range(2):
        sums = add_up([make_site(part) for part in deal(data.X, 4, seed)], make_spec(data.var_names))
        check_variability(sums, data.X, flavor, choice)


@cache
def load_studies() -> tuple[list[SiteData], dict[str, np.ndarray]]:
    """Five sites on the genes that two or more of them have, and the sums over them."""
    config = DataConfig(path="", label_column="cell_type")
    studies = [read_cells(path, config, Normalization()) for path in sorted(STUDIES.glob("*.h5ad"))]
    counts = Counter(name for cells in studies for name in cells.features)
    spec = make_spec([name for name, n in sorted(counts.items()) if n > 1])
    sites = [make_site(x, present=here) for x, here in (select_panel(cells, spec.panel) for cells in studies)]
    return sites, add_up(sites, spec)


needs_studies = pytest.mark.skipif(not STUDIES.is_dir(), reason="SWARMCHAIN_DATA names no folder with pbmc_multistudy")


@needs_studies
@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("sites_min", [2, 3, 5])
def test_highly_variable_genes_of_real_studies(flavor: Flavor, sites_min: int) -> None:
    """Five studies with genes of their own. Genes that all have are scanpy's on the pooled cells; where fewer have
    a gene, its moments are those of the cells that have it."""
    sites, sums = load_studies()
    whole = [site.present for site in sites]
    common = np.flatnonzero(np.all(whole, axis=0))
    if sites_min == len(sites):
        check_variability(sums, np.concatenate([s.x[:, common] for s in sites]), flavor, 20, sites_min=sites_min)
    rows = np.flatnonzero(np.sum(whole, axis=0) >= sites_min)
    found = compute_variability(sums, flavor=flavor, sites_min=sites_min)
    assert np.isnan(np.delete(found.means, rows)).all()
    for row in rows[::50]:
        x = np.concatenate([s.x[:, row] for s in sites if s.present[row]]).astype(np.float64)
        x = np.expm1(x) if flavor == "seurat" else x
        mean = x.mean()
        np.testing.assert_allclose(found.means[row], np.log1p(mean) if flavor == "seurat" else mean, rtol=1e-9)
        np.testing.assert_allclose(np.exp(found.dispersions[row]) if flavor == "seurat" else found.dispersions[row],
                                   x.var(ddof=1) / mean, rtol=1e-8)


@given(seed=st.integers(0, 2**32), sites=st.integers(1, 8), offset=st.sampled_from([0.0, 1.0, 1e3, 1e6, -1e6]),
       spread=st.sampled_from([1e-2, 1.0, 30.0]))
def test_mean_and_sd_are_numpys_on_pooled_cells(seed: int, sites: int, offset: float, spread: float) -> None:
    g = np.random.default_rng(seed)
    x = (g.normal(size=(200, 5)) * spread + offset).astype(np.float32)
    spec = make_spec("abcde", kind="none")
    sums = add_up([make_site(part) for part in deal(x, sites, seed)], spec)
    mean, variance = compute_moments(sums)
    wide = x.astype(np.longdouble)
    np.testing.assert_allclose(mean, wide.mean(axis=0).astype(float), rtol=1e-12, atol=1e-12 * spread)
    np.testing.assert_allclose(np.sqrt(variance), wide.std(axis=0).astype(float), rtol=1e-9, atol=1e-300)
    constants = compute_standardization(sums, spec.panel.features, spec.panel)
    np.testing.assert_allclose(constants["standardize.mean"], mean, rtol=1e-6)


def test_mean_and_sd_of_a_million_cells_far_from_zero() -> None:
    x = np.random.default_rng(3).normal((1e6, 1e4), size=(1_000_000, 2)).astype(np.float32)
    sums = add_up([make_site(part) for part in deal(x, 3, 0)], make_spec("ab", kind="none"))
    mean, variance = compute_moments(sums)
    np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.longdouble).astype(float), rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(variance), x.std(axis=0, dtype=np.longdouble).astype(float), rtol=1e-6)


def test_constant_features_have_no_variance() -> None:
    x = np.full((500, 3), 0.1, np.float32)
    x[:, 2] = np.arange(500)
    sums = add_up([make_site(part) for part in deal(x, 3, 1)], make_spec("abc", kind="none"))
    assert compute_moments(sums)[1][:2].tolist() == [0.0, 0.0]
    assert find_common(sums, sites_min=3).tolist() == [False, False, True]
    assert find_common(sums, sites_min=4).tolist() == [False] * 3


number = st.floats(-1e300, 1e300)


@given(values=st.lists(st.tuples(number, number), min_size=1, max_size=12),
       order=st.randoms(use_true_random=False) | st.none())
@example(values=[(1e16, 1.0), (1.0, 0.0), (-1e16, 0.0)], order=None)
@example(values=[(-0.0, -0.0)], order=None)
@example(values=[(1.7e308, 1.7e308)] * 256, order=None)
def test_sum_has_the_same_bytes_in_every_order_of_sites(values: list[tuple[float, float]], order: Any) -> None:
    spec = make_spec("a", kind="none")
    tensors = [{name: np.full(shape, value[name.endswith("_low")] if dtype == "float64" else i, dtype)
                for name, (dtype, shape) in checkpoint_layout(spec).items()} for i, value in enumerate(values)]
    found = set()
    for turn in range(3):
        deck = list(tensors)
        if order is not None and turn:
            order.shuffle(deck)
        _, merged = allocate_tensors(checkpoint_layout(spec))
        sum_statistics([Input(i, 1, item, 1.0) for i, item in enumerate(deck)], into=merged)
        found.add(encode_tensors(merged, checkpoint_layout(spec)))
        assert all(np.isfinite(tensor).all() for tensor in merged.values())
        assert merged["cells_per_label"][0] == sum(range(len(values)))
    assert len(found) == 1


@given(seed=st.integers(0, 2**32), sites=st.integers(1, 5))
def test_counts_are_those_of_pooled_cells(seed: int, sites: int) -> None:
    g = np.random.default_rng(seed)
    cells = [int(n) for n in g.integers(1, 40, sites)]
    parts = [make_site(np.ones((n, 2)), y=g.integers(0, 3, n), donors=g.integers(0, 4, n),
                       present=g.random(2) < 0.7) for n in cells]
    sums = add_up(parts, make_spec("ab"))
    table = pd.concat([pd.DataFrame({"site": i, "y": p.y, "donor": p.donors}) for i, p in enumerate(parts)])
    grouped = table.groupby("y")
    for label in range(3):
        rows = grouped.get_group(label) if label in grouped.groups else table[:0]
        found = [int(sums[f"{what}_per_label"][label]) for what in ("cells", "donors", "sites")]
        assert found == [len(rows), len(rows[["site", "donor"]].drop_duplicates()), rows["site"].nunique()]
    assert int(sums["donors"]) == len(table[["site", "donor"]].drop_duplicates())
    for k in range(2):
        assert sums["cells_per_feature"][k] == sum(n for n, p in zip(cells, parts, strict=True) if p.present[k])
        assert sums["sites_per_feature"][k] == sum(bool(p.present[k]) for p in parts)


# -- minimums


def make_cells(counts: Mapping[str, int], *, donors: int = 0) -> Cells:
    labels = np.array([label for label, n in counts.items() for _ in range(n)])
    n = len(labels)
    return Cells(x=np.arange(2.0 * n, dtype=np.float32).reshape(n, 2), features=("g", "h"), labels=labels,
                 names=np.array([f"c{i}" for i in range(n)]), source="north.h5ad",
                 donors=np.array([f"d{i % donors}" for i in range(n)]) if donors else None)


def test_label_with_too_few_cells_is_left_out_altogether() -> None:
    spec = make_spec("gh", minimums=Minimums(cells_per_label=6))
    cells = make_cells({"a": 30, "b": 7, "c": 6})  # of 7, one is for validation
    without = select_cells(make_cells({"a": 30, "b": 7}), spec)
    data = select_cells(cells, spec)
    assert data.left_out == {}
    data = select_cells(make_cells({"a": 30, "b": 7, "c": 5}), spec)
    assert data.left_out == {"c": 5}
    assert [a.tobytes() for a in (data.x, data.y, data.train, data.validation)] == \
        [a.tobytes() for a in (without.x, without.y, without.train, without.validation)]
    sums, expected = compute_statistics(data, spec), compute_statistics(without, spec)
    assert all(sums[name].tobytes() == expected[name].tobytes() for name in expected)
    assert sums["cells_per_label"].tolist() == [26, 6, 0]


def test_label_of_too_few_donors_is_left_out() -> None:
    spec = make_spec("gh", minimums=Minimums(donors=2, donors_per_label=3))
    cells = make_cells({"a": 30, "b": 20}, donors=5)
    cells.donors[30:] = "d0"  # type: ignore[index]
    data = select_cells(cells, spec)
    assert data.left_out == {"b": 20}
    assert data.donors is not None and len(np.unique(data.donors)) == 5


def test_label_with_too_few_cells_need_not_be_on_the_runs_list() -> None:
    """It is not, if no site has enough."""
    spec = make_spec("gh")
    assert select_cells(make_cells({"a": 30, "z": 4}), spec).left_out == {"z": 4}
    with pytest.raises(DataError, match="'z' is not on the run's list"):
        select_cells(make_cells({"a": 30, "z": 40}), spec)


@pytest.mark.parametrize(("counts", "donors", "minimums", "words"), [
    ({"a": 9}, 0, Minimums(), "8 training cells, the run asks for 10"),
    ({"a": 8, "b": 4}, 0, Minimums(), "7 training cells, after 4 of too rare labels were left out"),
    ({"b": 4}, 0, Minimums(), "0 training cells, after 4"),
    ({"a": 20}, 0, Minimums(donors=2), "donors are not known"),
    ({"a": 20}, 0, Minimums(donors_per_label=2), "donors are not known"),
    ({"a": 20}, 3, Minimums(donors=4), "3 donors among the training cells, the run asks for 4"),
], ids=str)
def test_invalid_site_has_too_few(counts: dict[str, int], donors: int, minimums: Minimums, words: str) -> None:
    with pytest.raises(DataError, match=words):
        select_cells(make_cells(counts, donors=donors), make_spec("gh", minimums=minimums))


# -- what stands on them


def plan(spec: StatisticsSpec, sums: Arrays, **options: Any) -> tuple[CellTypeSpec, dict[str, np.ndarray]]:
    on_record: Any = SimpleNamespace(run=1, spec="0" * 64, checkpoint="0" * 64)
    planned, blob = plan_cell_type((spec, sums), on_record, name="t", limits=Limits(rounds=1, sites_to_start=1),
                                   **{"sites_per_feature_min": 1, **options})
    return planned, dict(decode_tensors(blob, checkpoint_layout(planned)))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_panel_is_the_highly_variable_genes_and_minimums_go_along(flavor: Flavor) -> None:
    data = load_reduced()
    spec = make_spec(data.var_names, minimums=Minimums(cells=20))
    y = np.arange(data.n_obs) % 3
    sums = add_up([make_site(data.X[half], y=y[half]) for half in (slice(0, 300), slice(300, None))], spec)
    planned, seed = plan(spec, sums, hvg=50, flavor=flavor)
    expected = run_scanpy(data.X, flavor, 50)
    assert planned.panel.features == tuple(data.var_names[expected["highly_variable"].to_numpy()])
    assert planned.minimums == spec.minimums
    assert check_standardization(planned, spec, sums, seed)
    other = planned.model_copy(update={"minimums": Minimums(cells=1)})
    with pytest.raises(SpecError, match="minimums is not that of the statistics run"):
        check_standardization(other, spec, sums, seed)


def test_summary_of_what_was_agreed_on() -> None:
    parts = [make_site(draw_expression(40, 30, i), y=np.arange(40) % 2, donors=np.arange(40) % 5,
                       present=np.arange(30) < 20 + 5 * i) for i in range(3)]
    spec = make_spec([f"g{i}" for i in range(30)])
    found = summarize_statistics(spec, add_up(parts, spec), sites_min=2)
    row = {"cells": 60, "donors": 15, "sites": 3}
    assert found["labels"] == {"a": row, "b": row, "c": {"cells": 0, "donors": 0, "sites": 0}}
    assert found["in_all"] == {"cells": 120, "donors": 15, "sites": 3}
    assert found["features_at"] == {1: 30, 2: 25, 3: 20}
    assert 0 < found["highly_variable"] < 25


def test_invalid_plan_has_one_label_or_no_feature() -> None:
    spec = make_spec("ab", kind="none")
    sums = add_up([make_site(np.arange(6.0).reshape(3, 2))], spec)
    with pytest.raises(SpecError, match="1 labels have enough cells"):
        plan(spec, sums)
    with pytest.raises(SpecError, match="no feature is at 2 sites"):
        plan(spec, sums, sites_per_feature_min=2)


def test_mask_tells_which_features_are_there() -> None:
    spec = CellTypeSpec(
        name="t", panel=Panel(features=("g", "h")), labels=("a", "b"), limits=Limits(rounds=1, sites_to_start=1),
        model=Model(hidden=(), mask=True), statistics=StatisticsRef(run=1, spec="0" * 64, checkpoint="0" * 64),
        seed_checkpoint="0" * 64)
    state = draw_state(spec)
    assert state["layers.0.weight"].shape == (2, 4)
    model = build_model(spec)
    load_state(model, state)
    constants = {"standardize.mean": np.ones(2, np.float32), "standardize.scale": np.ones(2, np.float32)}
    x = standardize(np.full((1, 2), 3.0, np.float32), np.array([True, False]), constants)
    weights, logits = state["layers.0.weight"], model(torch.tensor(x)).detach().numpy()[0]
    np.testing.assert_allclose(logits, weights[:, 0] * 2 + weights[:, 2] + state["layers.0.bias"], rtol=1e-6)


def test_invalid_sums_and_choices() -> None:
    spec = make_spec("ab", kind="none")
    sums = add_up([make_site(np.arange(6.0).reshape(3, 2))], spec)
    with pytest.raises(SpecError, match="seurat needs values that are log1p"):
        compute_variability(sums)
    with pytest.raises(SpecError, match="no feature is at 2 sites"):
        compute_variability(sums, flavor="cell_ranger", sites_min=2)
    with pytest.raises(SpecError, match="not among the statistics"):
        compute_standardization(sums, "ab", Panel(features=("c",)))
    for name, value in (("sum", 1e300), ("sum_of_squares", 1e305), ("sum", 1e41)):
        spoilt = {**sums, name: np.array([1.0, value])}
        with pytest.raises(SpecError, match="'b' are out of all bounds"):
            compute_standardization(spoilt, "ab", spec.panel)
    with pytest.raises(SpecError, match="no site has the panel feature 'a'"):
        compute_standardization({**sums, "cells_per_feature": np.array([-1, 3])}, "ab", spec.panel)
    with pytest.raises(DataError, match="too large to be log1p"):
        compute_statistics(make_site(np.full((3, 2), 500.0)), make_spec("ab"))
