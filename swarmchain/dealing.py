"""Data of a demonstration: real PBMC dealt to four hospitals, or a folder with one file per site.

`pbmc68k_reduced` comes inside scanpy's wheel (Zheng et al. 2017, https://doi.org/10.1038/ncomms14049): 700 cells,
765 genes, log1p in `.raw`. Its ten bulk labels are joined to six kinds that RNA tells apart in so few cells; CD34+ (13
cells) is left out. A stratified test set is held out first; the rest is dealt by the table `SHARES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from swarmchain.errors import DataError
from swarmchain.protocol import derive_seed

TEST_SHARE = 0.3
LABELS = {
    "CD14+ Monocyte": "Monocyte",
    "CD19+ B": "B cell",
    "CD4+/CD25 T Reg": "T cell",
    "CD4+/CD45RA+/CD25- Naive T": "T cell",
    "CD4+/CD45RO+ Memory": "T cell",
    "CD8+ Cytotoxic T": "T cell",
    "CD8+/CD45RA+ Naive Cytotoxic": "T cell",
    "CD56+ NK": "NK cell",
    "Dendritic": "Dendritic cell",
}
HOSPITALS = ("North", "East", "South", "West")
# Share of each cell type's training cells at North, East, South and West: every hospital misses two or three types.
SHARES = {
    "B cell": (0.85, 0.15, 0.0, 0.0),
    "Dendritic cell": (0.0, 0.5, 0.5, 0.0),
    "Monocyte": (0.0, 0.0, 0.6, 0.4),
    "NK cell": (0.5, 0.0, 0.0, 0.5),
    "T cell": (0.2, 0.5, 0.0, 0.3),
}


@dataclass(frozen=True)
class Dealt:
    """Training files by site, the held-out cells, and where they came from.

    `test` holds the cells of all sites, each in the state of its own file: `test[site]`.
    """

    title: str
    dataset: str
    files: dict[str, Path]
    test: dict[str, Path]
    label_column: str
    umap: dict[str, tuple[float, float]]
    donor_column: str | None = None
    sample_column: str | None = None


def deal_pbmc(folder: Path, *, seed: int) -> Dealt:
    """Write four hospitals' files and the held-out cells into `folder`."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy on its own old file
        raw = scanpy.datasets.pbmc68k_reduced()
    data = anndata.AnnData(
        X=raw.raw.X.astype(np.float32), obs=pd.DataFrame({"cell_type": raw.obs["bulk_labels"].astype(str).map(LABELS)}),
        var=pd.DataFrame(index=raw.raw.var_names),
    )
    umap = {str(n): (float(a), float(b)) for n, (a, b) in zip(raw.obs_names, raw.obsm["X_umap"], strict=True)}
    data = data[data.obs["cell_type"].notna().to_numpy()].copy()
    train, test = _hold_out(data.obs["cell_type"].to_numpy(), seed=seed)
    hospitals = _deal(data.obs["cell_type"].to_numpy(), train, seed=seed)
    folder.mkdir(parents=True)
    files = {}
    for name, rows in zip(HOSPITALS, hospitals, strict=True):
        files[name] = folder / f"{name}.h5ad"
        _write(data[rows], files[name])
    _write(data[test], folder / "held-out.h5ad")
    return Dealt(
        title="Four hospitals, one PBMC classifier", dataset="pbmc68k_reduced (scanpy), dealt with label skew",
        files=files, test={"held out": folder / "held-out.h5ad"}, label_column="cell_type", umap=umap,
    )


def deal_folder(folder: Path, source: Path, *, splits: Path | None, label_column: str, seed: int) -> Dealt:
    """One site per .h5ad of `source`, split by a table (site, cell, split) or, without one, at random by class.

    Raises
    ------
    DataError
        If there are fewer than two files, or the table lacks a column, a site or its cells.
    """
    paths = {path.stem: path for path in sorted(source.glob("*.h5ad"))}
    if len(paths) < 2:
        raise DataError(f"{source} holds {len(paths)} .h5ad files", hint="a swarm needs one for each of its sites")
    table = _read_splits(splits) if splits else None
    folder.mkdir(parents=True)
    files, test = {}, {}
    for name, path in paths.items():
        data = _read(path)
        if label_column not in data.obs:
            raise DataError(f"{path} has no column {label_column!r} in .obs", hint="choose it with --label-column")
        if table is None:
            train_rows, test_rows = _hold_out(data.obs[label_column].astype(str).to_numpy(), seed=seed)
        else:
            train_rows, test_rows = _look_up(table, name, data, path)
        files[name], test[name] = folder / f"{name}.h5ad", folder / f"{name}.test.h5ad"
        _write(data[train_rows], files[name])
        _write(data[test_rows], test[name])
    return Dealt(
        title=f"{len(files)} sites, one classifier", dataset=source.name, files=files, test=test,
        label_column=label_column, umap={},
    )


def _hold_out(labels: Any, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(derive_seed("hold out", seed))
    chosen: list[int] = []
    for label in sorted(set(labels.tolist())):
        rows = generator.permutation(np.flatnonzero(labels == label))
        chosen.extend(rows[: round(len(rows) * TEST_SHARE)].tolist())
    test = np.array(sorted(chosen))
    return np.setdiff1d(np.arange(len(labels)), test), test


def _deal(labels: Any, train: np.ndarray, *, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(derive_seed("deal", seed))
    hands: list[list[int]] = [[] for _ in HOSPITALS]
    for label, shares in SHARES.items():
        rows = generator.permutation(train[labels[train] == label])
        cuts = np.round(np.cumsum(shares) * len(rows)).astype(int)
        for hand, part in zip(hands, np.split(rows, cuts[:-1]), strict=True):
            hand.extend(part.tolist())
    return [np.array(sorted(hand)) for hand in hands]


def _read_splits(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str)
    except (OSError, ValueError) as exc:
        raise DataError(f"cannot read {path}: {exc}", hint="a CSV with the columns site, cell, split") from exc
    missing = [c for c in ("site", "cell", "split") if c not in table]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}", hint="it needs site, cell and split")
    return table


def _look_up(table: pd.DataFrame, name: str, data: anndata.AnnData, path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = table[table["site"] == name]
    parts: Mapping[str, Any] = {part: set(rows.loc[rows["split"] == part, "cell"]) for part in ("train", "test")}
    found = [np.flatnonzero([str(n) in parts[part] for n in data.obs_names]) for part in ("train", "test")]
    for part, at in zip(("train", "test"), found, strict=True):
        if len(at) == 0:
            raise DataError(f"the splits name no {part} cell of {path.name}", hint=f"their site must be {name!r}")
    return found[0], found[1]


def _read(path: Path) -> anndata.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.read_h5ad(path)


def _write(data: anndata.AnnData, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = anndata.AnnData(X=data.X.copy(), obs=data.obs.copy(), var=pd.DataFrame(index=data.var_names.astype(str)))
        kept.write_h5ad(path)
