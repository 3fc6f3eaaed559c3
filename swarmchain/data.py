"""A site's cells: from an AnnData file to arrays on the run's panel. The only room that knows AnnData.

What X holds (counts, log1p of normalised counts, …) is told from the numbers unless site.toml says so, and brought to
the state that the spec demands. Features that the site does not have are marked absent: after standardisation they
are 0, which is the federated mean. Validation cells are chosen by the hash of their names, so that they are the same
in every round and on every machine; where a run splits by donor, donors are chosen, with all their cells.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anndata
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from swarmchain.config import DataConfig, SiteConfig
from swarmchain.donors import choose_validation_donors, group_samples
from swarmchain.errors import DataError, SpecError
from swarmchain.spec import CellSpec, DonorSpec, Normalization, Panel

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
State = Literal["counts", "log1p", "arcsinh", "none"]

STANDARDIZED_MAX = 10.0
LOG1P_MAX = 20.0  # log1p of more than 4e8 counts: no single cell has them


@dataclass(frozen=True)
class Cells:
    """Annotated cells of one file, X in the state that a spec demands.

    `x` is [cells, features] sparse or dense, `labels` and `names` are [cells], as are `donors` and `samples` where
    site.toml names their columns.
    """

    x: Any
    features: tuple[str, ...]
    labels: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    source: str
    donors: npt.NDArray[np.str_] | None = None
    samples: npt.NDArray[np.str_] | None = None


@dataclass(frozen=True)
class SiteData:
    """One site's cells on a run's panel.

    Shapes: `x` float32 [cells, panel], not standardised; `y` int64 [cells], index into the run's labels; `present`
    bool [panel]; `train` and `validation` are row numbers. Where the run splits by donor, `donors` and `samples`
    int64 [cells] say whose a row is: indices into the site's own sorted names of donors, and into `sample_names`.
    """

    x: Floats
    y: Ints
    present: npt.NDArray[np.bool_]
    train: Ints
    validation: Ints
    donors: Ints | None = None
    samples: Ints | None = None
    sample_names: tuple[str, ...] = ()


def load_site_data(config: SiteConfig, spec: CellSpec) -> SiteData:
    """Everything that a run needs of this site's file.

    Raises
    ------
    DataError
        If the file cannot serve the spec; the message names the file, the key and the remedy.
    """
    if config.data is None:
        raise DataError(f"site.toml of {config.name} has no [data] section", hint="name the site's AnnData file there")
    cells = read_cells(config.resolve(config.data.path), config.data, spec.normalization)
    return select_cells(cells, spec)


def read_names(path: Path, label_column: str) -> tuple[list[str], list[str]]:
    """Feature names and label names of a file: what a site card shows. Raises `DataError`."""
    data = _read_h5ad(path, backed=True)
    features = [str(name) for name in data.var_names]
    labels = sorted({str(v) for v in _label_column(data, label_column, path).dropna()})
    return features, labels


def read_cells(path: Path, config: DataConfig, normalization: Normalization) -> Cells:
    """Read, check and normalise one AnnData file.

    Raises
    ------
    DataError
        If the file, the layer or the label column is missing, names stand twice, X holds NaN or infinity, or X is in a
        state from which the demanded one cannot be made.
    """
    data = _read_h5ad(path)
    if data.n_obs == 0:
        raise DataError(f"{path} holds no cells", hint="give this site a file with cells")
    for kind, names in (("features (var_names)", data.var_names), ("cells (obs_names)", data.obs_names)):
        if not names.is_unique:
            twice = str(names[names.duplicated()][0])
            raise DataError(f"{path}: {twice!r} stands twice among its {kind}", hint="make the names unique")
    column = _label_column(data, config.label_column, path)
    x = _choose_matrix(data, config.layer, path)
    keep = column.notna().to_numpy()
    labels = np.array([config.label_map.get(str(v), str(v)) for v in column], dtype=np.str_)
    keep &= labels != ""
    x = normalize(x, config.state, normalization, source=str(path))
    return Cells(
        x=x[keep],
        features=tuple(str(name) for name in data.var_names),
        labels=labels[keep],
        names=np.array([str(n) for n in data.obs_names], dtype=np.str_)[keep],
        source=str(path),
        donors=_read_owners(data, config.donor_column, "donor_column", path, keep),
        samples=_read_owners(data, config.sample_column, "sample_column", path, keep),
    )


def select_cells(cells: Cells, spec: CellSpec) -> SiteData:
    """Cells on a spec's panel and label list.

    Raises
    ------
    DataError
        If too little of the panel is there, a label is not on the run's list, or no cell is left to train on.
    """
    x, present = select_panel(cells, spec.panel)
    index = {label: i for i, label in enumerate(spec.labels)}
    unknown = sorted(set(cells.labels.tolist()) - set(index))
    if unknown:
        raise DataError(
            f"{cells.source}: label {unknown[0]!r} is not on the run's list ({len(unknown)} such labels)",
            hint='map it in site.toml: [data.label_map] "its name" = "the run\'s name", or = "" to leave it out',
        )
    y = np.array([index[label] for label in cells.labels.tolist()], dtype=np.int64)
    if spec.split_by == "donor":
        return select_donors(cells, spec, x=x, present=present, y=y)
    validation = choose_validation(cells.names, y, share=spec.validation_share)
    train = np.setdiff1d(np.arange(len(y)), validation)
    if len(train) == 0:
        raise DataError(f"{cells.source}: no labelled cell to train on", hint="check label_column and label_map")
    return SiteData(x=x, y=y, present=present, train=train, validation=validation)


def select_donors(cells: Cells, spec: CellSpec, *, x: Floats, present: npt.NDArray[np.bool_], y: Ints) -> SiteData:
    """What `select_cells` gives where a run splits by donor.

    Raises
    ------
    DataError
        If the rows' donors are not known, a sample has two labels, no row is left, or those to train on have too few
        labels.
    """
    if cells.donors is None:
        raise DataError(
            f"{cells.source}: the run splits by donor, and site.toml does not say whose cells are whose",
            hint="set [data] donor_column, and sample_column where a donor gave several samples",
        )
    if len(y) == 0:
        raise DataError(f"{cells.source}: no labelled cell to train on", hint="check label_column and label_map")
    found = group_samples(y, cells.donors, cells.donors if cells.samples is None else cells.samples,
                          source=cells.source)
    donors = found.donor[found.of_row]
    held = np.isin(donors, choose_validation_donors(found, share=spec.validation_share))
    labels = sorted(spec.labels[i] for i in set(y[~held].tolist()))
    if isinstance(spec, DonorSpec) and len(labels) < spec.labels_min:
        raise DataError(
            f"{cells.source}: all donors to train on have the label {', '.join(labels)!r}; the run asks for "
            f"{spec.labels_min} labels at each site",
            hint="check [data] label_column, or agree on a run with a lower labels_min",
        )
    return SiteData(x=x, y=y, present=present, train=np.flatnonzero(~held), validation=np.flatnonzero(held),
                    donors=donors, samples=found.of_row, sample_names=found.names)


def select_panel(cells: Cells, panel: Panel) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Dense [cells, panel], 0 where the feature is absent, and which features are present. Raises `DataError`."""
    position = {name: i for i, name in enumerate(cells.features)}
    columns = np.array([position.get(name, -1) for name in panel.features], dtype=np.int64)
    present = columns >= 0
    if present.mean() < panel.share_min:
        raise DataError(
            f"{cells.source} holds {present.sum()} of the panel's {len(columns)} features ({present.mean():.0%}), "
            f"the run needs {panel.share_min:.0%}",
            hint="check that var_names are of the same kind as the panel's (symbols or ENSEMBL)",
        )
    x = np.zeros((len(cells.names), len(columns)), dtype=np.float32)
    chosen = cells.x[:, columns[present]]
    x[:, present] = chosen.toarray() if sp.issparse(chosen) else chosen
    return x, present


def normalize(x: Any, state: str, target: Normalization, *, source: str) -> Any:
    """Bring X to the state that the spec demands.

    log1p: ln(1 + x / (the cell's sum over all features of the file) · target_sum), as scanpy's `normalize_total` and
    `log1p`. arcsinh: arcsinh(x / cofactor).

    Raises
    ------
    DataError
        If X holds NaN or infinity, or is in a state from which the demanded one cannot be made.
    """
    values = x.data if sp.issparse(x) else x
    if values.size and not np.isfinite(values).all():
        raise DataError(f"{source}: X holds NaN or infinity", hint="remove those cells or features")
    if target.kind == "none":
        return x.astype(np.float32)
    found = guess_state(values, source=source) if state == "auto" else state
    if found == target.kind and not (target.kind == "arcsinh" and state == "auto"):
        return x.astype(np.float32)
    if target.kind == "log1p" and found == "counts":
        totals = np.asarray(x.sum(axis=1), dtype=np.float64).ravel()
        factors = target.target_sum / np.where(totals > 0, totals, 1.0)
        scaled = sp.diags(factors) @ x if sp.issparse(x) else x * factors[:, None]
        return scaled.log1p().astype(np.float32).tocsr() if sp.issparse(x) else np.log1p(scaled).astype(np.float32)
    if target.kind == "arcsinh" and found in ("counts", "none"):
        dense = x.toarray() if sp.issparse(x) else x
        return np.arcsinh(dense / target.cofactor).astype(np.float32)
    raise DataError(
        f"{source}: X looks like {found}, from which {target.kind} cannot be made",
        hint="point [data] layer at counts, or set [data] state if the guess is wrong",
    )


def guess_state(values: npt.NDArray[Any], *, source: str) -> State:
    """Counts if all are non-negative integers, log1p if non-negative and small.

    Raises
    ------
    DataError
        If they are neither, as scaled data (negative values) are.
    """
    if values.size == 0:
        return "counts"
    low, high = float(values.min()), float(values.max())
    if low < 0:
        raise DataError(
            f"{source}: X holds negative values (down to {low:.3g}), so it was scaled",
            hint="point [data] layer at counts or log1p values, or set [data] state",
        )
    if bool((values == np.rint(values)).all()):
        return "counts"
    if high <= LOG1P_MAX:
        return "log1p"
    raise DataError(
        f"{source}: X holds fractions up to {high:.3g}: neither counts nor log1p",
        hint="set [data] state or layer in site.toml",
    )


def choose_validation(names: npt.NDArray[np.str_], y: Ints, *, share: float) -> Ints:
    """Row numbers of the validation cells: of every class, the `share` (rounded down) with the lowest name hash."""
    hashes = np.array([hashlib.sha256(n.encode()).hexdigest() for n in names.tolist()])
    chosen: list[int] = []
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        ranked = rows[np.argsort(hashes[rows], kind="stable")]
        chosen.extend(ranked[: int(len(rows) * share)].tolist())
    return np.array(sorted(chosen), dtype=np.int64)


def compute_statistics(data: SiteData, *, labels: int) -> dict[str, npt.NDArray[np.generic]]:
    """Sums over this site's training cells; layout: `layouts.statistics_layout`. Absent features contribute nothing."""
    x = data.x[data.train].astype(np.float64)
    present = data.present.astype(np.int64)
    by_donor = {} if data.samples is None else {"samples_per_label": count_samples(data, labels=labels)}
    return {
        **by_donor,
        "cells_per_feature": present * len(data.train),
        "cells_per_label": np.bincount(data.y[data.train], minlength=labels).astype(np.int64),
        "sites_per_feature": present,
        "sum": x.sum(axis=0),
        "sum_of_squares": (x * x).sum(axis=0),
    }


def count_samples(data: SiteData, *, labels: int) -> Ints:
    """Training samples of every label, [labels]."""
    assert data.samples is not None
    _, first = np.unique(data.samples[data.train], return_index=True)
    return np.bincount(data.y[data.train][first], minlength=labels).astype(np.int64)


def compute_standardization(
    statistics: Mapping[str, npt.NDArray[np.generic]], features: Sequence[str], panel: Panel
) -> dict[str, npt.NDArray[np.generic]]:
    """Federated mean and SD of the panel's features, from the summed statistics over `features`.

    mean = Σx / n, SD = √(Σx²/n - mean²), both float64 and then rounded to float32; only correctly rounded operations,
    so that all sites get the same bits. SD 0 becomes 1.

    Raises
    ------
    SpecError
        If a feature of the panel was not summed, or no site has it.
    """
    position = {name: i for i, name in enumerate(features)}
    missing = [name for name in panel.features if name not in position]
    if missing:
        raise SpecError(f"panel feature {missing[0]!r} is not among the statistics' features")
    rows = np.array([position[name] for name in panel.features], dtype=np.int64)
    count = statistics["cells_per_feature"][rows].astype(np.float64)
    if (count == 0).any():
        raise SpecError(f"no site has the panel feature {panel.features[int(np.argmin(count))]!r}")
    mean = statistics["sum"][rows].astype(np.float64) / count
    variance = statistics["sum_of_squares"][rows].astype(np.float64) / count - mean * mean
    scale = np.sqrt(np.maximum(variance, 0.0))
    scale[scale < 1e-6] = 1.0
    return {"standardize.mean": mean.astype(np.float32), "standardize.scale": scale.astype(np.float32)}


def standardize(x: Floats, present: npt.NDArray[np.bool_], constants: Mapping[str, npt.NDArray[Any]]) -> Floats:
    """(x - mean) / SD, clipped to ±10; 0 where the feature is absent. `x` is [cells, panel]."""
    z = (x - constants["standardize.mean"]) / constants["standardize.scale"]
    np.clip(z, -STANDARDIZED_MAX, STANDARDIZED_MAX, out=z)
    z[:, ~present] = 0.0
    standardized: Floats = z.astype(np.float32)
    return standardized


def _read_h5ad(path: Path, *, backed: bool = False) -> anndata.AnnData:
    hint = "[data] path in site.toml must name an AnnData .h5ad file"
    if not path.is_file():
        raise DataError(f"data file {path} does not exist", hint=hint)
    try:
        with warnings.catch_warnings():
            # Remarks of anndata on old files and on names; what matters of them is checked by us
            warnings.simplefilter("ignore")
            return anndata.read_h5ad(path, backed="r" if backed else None)
    except Exception as exc:  # h5py, zarr and anndata raise a dozen kinds on a file that is none of theirs
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise DataError(f"cannot read {path}: {reason}", hint=hint) from exc


def _label_column(data: anndata.AnnData, column: str, path: Path) -> Any:
    if column not in data.obs:
        raise DataError(
            f"{path} has no column {column!r} in .obs",
            hint=f"set [data] label_column to one of: {', '.join(map(str, data.obs.columns)) or '(none there)'}",
        )
    return data.obs[column]


def _read_owners(data: anndata.AnnData, column: str | None, key: str, path: Path, keep: npt.NDArray[np.bool_]
                 ) -> npt.NDArray[np.str_] | None:
    """Donor or sample of every row that is kept; None where site.toml names no column."""
    if column is None:
        return None
    if column not in data.obs:
        raise DataError(
            f"{path} has no column {column!r} in .obs",
            hint=f"set [data] {key} to one of: {', '.join(map(str, data.obs.columns)) or '(none there)'}",
        )
    values = data.obs[column][keep]
    if values.isna().any():
        raise DataError(f"{path}: {int(values.isna().sum())} labelled cells have no {column!r}",
                        hint=f'fill the column, or leave those cells out with [data.label_map] "label" = "" ({key})')
    return np.array([str(v) for v in values], dtype=np.str_)


def _choose_matrix(data: anndata.AnnData, layer: str | None, path: Path) -> Any:
    if layer is not None and layer not in data.layers:
        raise DataError(f"{path} has no layer {layer!r}", hint=f"its layers: {', '.join(data.layers) or '(none)'}")
    x = data.layers[layer] if layer is not None else data.X
    if x is None:
        raise DataError(f"{path} holds no X", hint="set [data] layer")
    return sp.csr_matrix(x) if sp.issparse(x) else np.asarray(x)
