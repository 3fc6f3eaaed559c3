"""A site's cells: from an AnnData file to arrays on the run's panel. The only room that knows AnnData.

What X holds (counts, log1p of normalised counts, …) is told from the numbers unless site.toml says so, and brought to
the state that the spec demands. Features that the site does not have are marked absent: after standardisation they
are 0, which is the federated mean. Validation cells are chosen by the hash of their names, so that they are the same
in every round and on every machine.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import anndata
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from swarmchain.config import DataConfig, SiteConfig
from swarmchain.errors import DataError
from swarmchain.spec import CellSpec, Minimums, Normalization, Panel

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
State = Literal["counts", "log1p", "arcsinh", "none"]

LOG1P_MAX = 20.0  # log1p of more than 4e8 counts: no single cell has them


@dataclass(frozen=True)
class Cells:
    """Annotated cells of one file, X in the state that a spec demands.

    `x` is [cells, features] sparse or dense, `labels`, `names` and `donors` (if they are known) are [cells].
    """

    x: Any
    features: tuple[str, ...]
    labels: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    source: str
    donors: npt.NDArray[np.str_] | None = None


@dataclass(frozen=True)
class SiteData:
    """One site's cells on a run's panel.

    Shapes: `x` float32 [cells, panel], not standardised; `y` int64 [cells], index into the run's labels; `present`
    bool [panel]; `train` and `validation` are row numbers; `donors` int64 [cells] numbers the donors, None if they are
    not known. `left_out` counts the cells of every label of which the site has too few (see `spec.Minimums`); those
    cells are not among the rows.
    """

    x: Floats
    y: Ints
    present: npt.NDArray[np.bool_]
    train: Ints
    validation: Ints
    donors: Ints | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)


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
    )


def select_cells(cells: Cells, spec: CellSpec) -> SiteData:
    """Cells on a spec's panel and label list.

    Raises
    ------
    DataError
        If too little of the panel is there, a label is not on the run's list, or fewer cells or donors are left to
        train on than the spec's minimums.
    """
    is_train = np.ones(len(cells.names), dtype=np.bool_)
    codes = np.unique(cells.labels, return_inverse=True)[1].astype(np.int64)
    is_train[choose_validation(cells.names, codes, share=spec.validation_share)] = False
    few = count_few(cells, is_train, spec.minimums)
    if few:
        keep = ~np.isin(cells.labels, list(few))
        cells, is_train = take_cells(cells, keep), is_train[keep]
    x, present = select_panel(cells, spec.panel)
    index = {label: i for i, label in enumerate(spec.labels)}
    unknown = sorted(set(cells.labels.tolist()) - set(index))
    if unknown:
        raise DataError(
            f"{cells.source}: label {unknown[0]!r} is not on the run's list ({len(unknown)} such labels)",
            hint='map it in site.toml: [data.label_map] "its name" = "the run\'s name", or = "" to leave it out',
        )
    y = np.array([index[label] for label in cells.labels.tolist()], dtype=np.int64)
    donors = None if cells.donors is None else np.unique(cells.donors, return_inverse=True)[1].astype(np.int64)
    data = SiteData(x=x, y=y, present=present, train=np.flatnonzero(is_train), validation=np.flatnonzero(~is_train),
                    donors=donors, left_out=few)
    check_minimums(data, spec.minimums, source=cells.source)
    return data


def take_cells(cells: Cells, keep: npt.NDArray[np.bool_]) -> Cells:
    """The cells that `keep`, [cells], marks."""
    return replace(cells, x=cells.x[keep], labels=cells.labels[keep], names=cells.names[keep],
                   donors=None if cells.donors is None else cells.donors[keep])


def count_few(cells: Cells, is_train: npt.NDArray[np.bool_], minimums: Minimums) -> dict[str, int]:
    """Labels with too few training cells, or with too few donors among them, and how many cells each has in all."""
    few: dict[str, int] = {}
    for label in np.unique(cells.labels).tolist():
        has_label = cells.labels == label
        chosen = has_label & is_train
        donors = None if cells.donors is None else len(np.unique(cells.donors[chosen]))
        if chosen.sum() < minimums.cells_per_label or (donors is not None and donors < minimums.donors_per_label):
            few[label] = int(has_label.sum())
    return few


def check_minimums(data: SiteData, minimums: Minimums, *, source: str) -> None:
    """Whether a site has enough to take part. Raises `DataError` if not."""
    if len(data.train) == 0 and not data.left_out:
        raise DataError(f"{source}: no labelled cell to train on", hint="check label_column and label_map")
    if len(data.train) < minimums.cells:
        rest = f", after {sum(data.left_out.values())} of too rare labels were left out" if data.left_out else ""
        raise DataError(f"{source}: {len(data.train)} training cells{rest}, the run asks for {minimums.cells}",
                        hint="a site with so few does not take part, so that no sum is over a handful of cells; "
                             "`run new statistics --cells-min` sets the minimum")
    if not max(minimums.donors, minimums.donors_per_label):
        return
    if data.donors is None:
        raise DataError(f"{source}: the run asks for a minimum of donors, and the cells' donors are not known",
                        hint="name the column of .obs that tells them in site.toml")
    donors = len(np.unique(data.donors[data.train]))
    if donors < minimums.donors:
        raise DataError(f"{source}: {donors} donors among the training cells, the run asks for {minimums.donors}",
                        hint="a site with so few does not take part; `run new statistics --donors-min` sets the number")


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


def _choose_matrix(data: anndata.AnnData, layer: str | None, path: Path) -> Any:
    if layer is not None and layer not in data.layers:
        raise DataError(f"{path} has no layer {layer!r}", hint=f"its layers: {', '.join(data.layers) or '(none)'}")
    x = data.layers[layer] if layer is not None else data.X
    if x is None:
        raise DataError(f"{path} holds no X", hint="set [data] layer")
    return sp.csr_matrix(x) if sp.issparse(x) else np.asarray(x)
