"""What sites agree on without showing a cell: sums over their cells, and what follows from the sums of all.

A site contributes counts and sums (`compute_statistics`), the merge adds them up exactly (`merge.sum_statistics`), and
from the total anyone computes what the pooled cells would give: mean and SD of every feature, the highly variable
genes, class counts. A feature's moments are over the cells of the sites that have it; a site that lacks it counts for
nothing there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from swarmchain.errors import DataError, SpecError
from swarmchain.kernels import add_moments
from swarmchain.layouts import LOW
from swarmchain.selection import SiteData
from swarmchain.spec import Panel, StatisticsSpec

Arrays = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]
Flavor = Literal["seurat", "cell_ranger"]
Prefix = Literal["", "expm1_"]

STANDARDIZED_MAX = 10.0
SCALE_MIN = 1e-6  # a feature with a smaller SD is taken for constant
# Cells at a time: their float64 copy is all that a site's sums need beside the cells.
ROWS = 1_024
BINS = 20
# The median absolute deviation of a normal distribution with SD 1.
NORMAL_MAD = 0.6744897501960817


def compute_statistics(data: SiteData, spec: StatisticsSpec) -> dict[str, npt.NDArray[Any]]:
    """Counts and sums over this site's training cells; layout: `layouts.statistics_layout`.

    Features that the site lacks contribute nothing. Sums carry some 106 bits, so that an offset costs the variance no
    digits. A donor counts for every label that it has a training cell of.

    Raises
    ------
    DataError
        If values are so large that eˣ - 1 is none that a float64 could hold the square of.
    """
    y, labels = data.y[data.train], len(spec.labels)
    present = data.present.astype(np.int64)
    cells = np.bincount(y, minlength=labels).astype(np.int64)
    named = np.zeros(0, np.int64) if data.donors is None else data.donors[data.train]
    donors = np.unique(named, return_inverse=True)[1].astype(np.int64)
    pairs = np.unique(np.stack([y[: len(donors)], donors]), axis=1)
    found: dict[str, npt.NDArray[Any]] = {
        "cells_per_feature": present * len(data.train),
        "cells_per_label": cells,
        "donors": np.array(len(np.unique(donors)), dtype=np.int64),
        "donors_per_label": np.bincount(pairs[0], minlength=labels).astype(np.int64),
        "sites": np.array(1, dtype=np.int64),
        "sites_per_feature": present,
        "sites_per_label": (cells > 0).astype(np.int64),
    }
    if spec.split_by == "donor":
        found["samples_per_label"] = count_samples(data, labels=labels)
    is_log = spec.normalization.kind == "log1p"
    sums = _sum_cells(data, is_log=is_log)
    if not np.isfinite(sums).all():
        raise DataError("values of X are too large to be log1p", hint="check [data] state and layer in site.toml")
    names = [f"{prefix}{name}{part}" for prefix in (("", "expm1_") if is_log else ("",))
             for name in ("sum", "sum_of_squares") for part in ("", LOW)]
    return found | dict(zip(names, sums, strict=True))


def count_samples(data: SiteData, *, labels: int) -> npt.NDArray[np.int64]:
    """Training samples of every label, [labels]."""
    assert data.samples is not None
    _, first = np.unique(data.samples[data.train], return_index=True)
    return np.bincount(data.y[data.train][first], minlength=labels).astype(np.int64)


def compute_moments(statistics: Arrays, prefix: Prefix = "") -> tuple[Floats, Floats]:
    """Mean and variance (÷ n) of every feature, over the cells of the sites that have it; NaN where none has.

    mean = Σx / n, variance = (n · Σx² - (Σx)²) / n², the difference in twice float64's digits. Only correctly rounded
    operations, so that all sites get the same bits.
    """
    n = statistics["cells_per_feature"].astype(np.float64)
    first, first_low, second, second_low = (
        statistics[f"{prefix}{name}{part}"] for name in ("sum", "sum_of_squares") for part in ("", LOW))
    with np.errstate(all="ignore"):
        n = np.where(n > 0, n, np.nan)
        product, error = _multiply(n, second)
        square, square_error = _multiply(first, first)
        rest = (error - square_error) + (n * second_low - 2.0 * first * first_low)
        variance = ((product - square) + rest) / (n * n)
        return (first + first_low) / n, np.where(variance < 0, 0.0, variance)


def compute_standardization(statistics: Arrays, features: Sequence[str], panel: Panel) -> dict[str, npt.NDArray[Any]]:
    """Federated mean and SD of the panel's features, float32, from the summed statistics over `features`.

    An SD below 1e-6 becomes 1.

    Raises
    ------
    SpecError
        If a feature of the panel was not summed, no site has it, or its sums are out of all bounds.
    """
    position = {name: i for i, name in enumerate(features)}
    missing = [name for name in panel.features if name not in position]
    if missing:
        raise SpecError(f"panel feature {missing[0]!r} is not among the statistics' features")
    rows = np.array([position[name] for name in panel.features], dtype=np.int64)
    count = statistics["cells_per_feature"][rows]
    if (count <= 0).any():
        raise SpecError(f"no site has the panel feature {panel.features[int(np.argmin(count))]!r}")
    mean, variance = (moment[rows] for moment in compute_moments(statistics))
    scale = np.sqrt(variance)
    scale[scale < SCALE_MIN] = 1.0
    # what float32 cannot hold, and NaN, fail this
    is_usable = (np.abs(mean) < np.finfo(np.float32).max) & (scale < np.finfo(np.float32).max)
    if not is_usable.all():
        raise SpecError(f"the sums of {panel.features[int(np.argmin(is_usable))]!r} are out of all bounds",
                        hint="a site contributed nonsense; do without it in a new statistics run")
    return {"standardize.mean": mean.astype(np.float32), "standardize.scale": scale.astype(np.float32)}


def standardize(x: npt.NDArray[np.float32], present: npt.NDArray[np.bool_], constants: Arrays
                ) -> npt.NDArray[np.float32]:
    """(x - mean) / SD, clipped to ±10; 0 where the feature is absent. `x` is [cells, panel]."""
    z = (x - constants["standardize.mean"]) / constants["standardize.scale"]
    np.clip(z, -STANDARDIZED_MAX, STANDARDIZED_MAX, out=z)
    z[:, ~present] = 0.0
    standardized: npt.NDArray[np.float32] = z.astype(np.float32)
    return standardized


def find_common(statistics: Arrays, *, sites_min: int) -> npt.NDArray[np.bool_]:
    """Which features at least `sites_min` sites have, and are not the same in all cells; [features]."""
    variance = compute_moments(statistics)[1]
    return (statistics["sites_per_feature"] >= sites_min) & (variance >= SCALE_MIN**2)


@dataclass(frozen=True)
class Variability:
    """How variable features are, each [features]: as scanpy's `highly_variable_genes` has it on the pooled cells.

    NaN for features that were not compared, and where scanpy has NaN.
    """

    means: Floats
    dispersions: Floats
    dispersions_norm: Floats


@dataclass(frozen=True)
class Cutoffs:
    """Bounds, exclusive, of a highly variable gene's mean and normalised dispersion: scanpy's, and its defaults."""

    mean_min: float = 0.0125
    mean_max: float = 3.0
    dispersion_min: float = 0.5
    dispersion_max: float = np.inf


def compute_variability(statistics: Arrays, *, flavor: Flavor = "seurat", sites_min: int = 1) -> Variability:
    """Normalised dispersions of the features that at least `sites_min` sites have.

    The dispersion is variance (÷ (n - 1)) / mean. `seurat` (Satija et al. 2015): of eˣ - 1, log(dispersion) and
    log(1 + mean); 20 bins of equal width of the mean; (dispersion - the bin's mean) / the bin's SD. `cell_ranger`
    (Zheng et al. 2017): of x, bins between the mean's percentiles 10, 15, …, 100; the bin's median and its median
    absolute deviation. Where sites have different features, n is that of the cells of the sites that have this one, and
    only the features compared share bins.

    Raises
    ------
    SpecError
        If no feature is at so many sites, `seurat` is asked for where values are not log1p, or `cell_ranger` where so
        many features have the same mean that percentiles fall together, as scanpy refuses too.
    """
    if flavor == "seurat" and "expm1_sum" not in statistics:
        raise SpecError("the flavour seurat needs values that are log1p, and the statistics run has none",
                        hint="choose the flavour cell_ranger, or no highly variable genes")
    n = statistics["cells_per_feature"]
    rows = np.flatnonzero((statistics["sites_per_feature"] >= sites_min) & (n > 0))
    if len(rows) == 0:
        raise SpecError(f"no feature is at {sites_min} sites", hint="ask for fewer sites")
    mean, variance = (moment[rows] for moment in compute_moments(statistics, "expm1_" if flavor == "seurat" else ""))
    variance *= n[rows] / np.maximum(n[rows] - 1, 1)
    mean[mean == 0] = 1e-12
    with np.errstate(all="ignore"):
        dispersion = variance / mean
        if flavor == "seurat":
            dispersion = np.log(np.where(dispersion == 0, np.nan, dispersion))
            mean = np.log1p(mean)
    columns = (mean, dispersion, _normalize_dispersions(mean, dispersion, flavor))
    placed = [np.full(len(n), np.nan) for _ in columns]
    for into, column in zip(placed, columns, strict=True):
        into[rows] = column
    return Variability(*placed)


def choose_variable(found: Variability, choice: int | Cutoffs) -> npt.NDArray[np.bool_]:
    """The so many most variable features, or those within the cutoffs; [features].

    As scanpy's: features that tie with the last one come in too, those without a normalised dispersion do not; with
    cutoffs, they count as 0.
    """
    is_within: npt.NDArray[np.bool_]
    if isinstance(choice, int):
        ranked = np.sort(found.dispersions_norm[~np.isnan(found.dispersions_norm)])[::-1]
        last = ranked[min(choice, len(ranked)) - 1] if choice > 0 and len(ranked) else np.inf
        is_within = np.nan_to_num(found.dispersions_norm, nan=-np.inf) >= last
        return is_within
    norm = np.nan_to_num(found.dispersions_norm)
    is_within = (found.means > choice.mean_min) & (found.means < choice.mean_max)
    is_within &= (norm > choice.dispersion_min) & (norm < choice.dispersion_max)
    return is_within


def _sum_cells(data: SiteData, *, is_log: bool) -> Floats:
    """Σx and Σx² of the training cells, and of eˣ - 1 too if `is_log`, as pairs: [4 or 8, features]."""
    columns = np.flatnonzero(data.present)
    sums = np.zeros((8 if is_log else 4, len(columns)))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(data.train), ROWS):
            x = data.x[np.ix_(data.train[start : start + ROWS], columns)].astype(np.float64)
            add_moments(sums[:4], x)
            if is_log:
                add_moments(sums[4:], np.expm1(x))
        for high, low in zip(sums[::2], sums[1::2], strict=True):
            total = high + low
            low -= total - high
            high[:] = total
    placed = np.zeros((len(sums), len(data.present)))
    placed[:, columns] = sums
    return placed


def _multiply(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The product, and what its rounding took: Dekker's (1971), for factors below 2^995."""
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    product = a * b
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(a: Floats) -> tuple[Floats, Floats]:
    """Two halves of 26 bits each (Veltkamp)."""
    scaled = a * 134_217_729.0  # 2^27 + 1
    high = scaled - (scaled - a)
    return high, a - high


def _normalize_dispersions(mean: Floats, dispersion: Floats, flavor: Flavor) -> Floats:
    """Each feature's distance from its bin's centre, in the bin's own units; a bin of one gives 1 (seurat)."""
    edges: Any = BINS if flavor == "seurat" else np.r_[-np.inf, np.percentile(mean, np.arange(10, 105, 5)), np.inf]
    if flavor == "cell_ranger" and len(np.unique(edges)) < len(edges):
        raise SpecError("the flavour cell_ranger needs features of more different means",
                        hint="leave out features that hardly any cell has, or choose the flavour seurat")
    table = pd.DataFrame({"mean": mean, "dispersion": dispersion})
    grouped = table.groupby(pd.cut(table["mean"], bins=edges), observed=True)["dispersion"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a bin in which no feature has a dispersion
        if flavor == "seurat":
            centre, spread = grouped.transform("mean"), grouped.transform("std")
            is_single = spread.isna()
            centre, spread = centre.mask(is_single, 0.0), spread.mask(is_single, centre)
        else:
            centre, spread = grouped.transform("median"), grouped.transform(_compute_mad)
    normalised: Floats = ((table["dispersion"] - centre) / spread).to_numpy(dtype=np.float64)
    return normalised


def _compute_mad(values: pd.Series) -> float:
    """Median absolute deviation, in units of a normal distribution's SD."""
    return float(np.median(np.abs(values - np.median(values)) / NORMAL_MAD))
