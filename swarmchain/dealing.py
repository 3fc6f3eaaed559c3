"""Data of a demonstration: real PBMC dealt to four hospitals, or a folder with one file per site.

`pbmc68k_reduced` comes inside scanpy's wheel (Zheng et al. 2017, https://doi.org/10.1038/ncomms14049): 700 cells,
765 genes, log1p in `.raw`. Its ten bulk labels are joined to six kinds that RNA tells apart in so few cells; CD34+ (13
cells) is left out. A stratified test set is held out first; the rest is dealt by the table `SHARES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from swarmchain.errors import DataError
from swarmchain.protocol import derive_seed

TEST_SHARE = 0.3
HELD_OUT = "held out"
Part = tuple[anndata.AnnData, Any, Path]  # cells, the split of each, and the file they come from
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


def deal_splits(
    folder: Path, source: Path, *, splits: Path, site_column: str, label_column: str, donor_column: str | None = None,
    fold: str | None = None,
) -> Dealt:
    """Sites and held-out cells as a table says, from a folder with one .h5ad per site, or from one file.

    Parameters
    ----------
    splits
        A CSV with the columns cell and split (`train` or `test`), and site for a folder. Cells without a row are left
        out.
    site_column
        Of one file: a column of the table, or of .obs. Held-out cells that no site trains on the like of (as where only
        training cells were dealt) are tested together, as `held out`.
    donor_column
        Of .obs: no donor may have cells on both sides of the split.
    fold
        Hold out the cells of this one; the table then has a column fold in place of split.

    Raises
    ------
    DataError
        If table and cells do not fit: a column, a site, its cells or its labels are missing, a cell is named twice, a
        donor is on both sides.
    """
    if not source.exists():
        raise DataError(f"--data: {source} does not exist",
                        hint="a folder with one .h5ad per site, or one .h5ad of all")
    is_folder = source.is_dir()
    table = _read_splits(splits, ("site", "cell", "split") if is_folder else ("cell", "split"), fold=fold)
    parts = _read_folder(source, table, splits) if is_folder else _read_file(source, table, splits, site_column)
    folder.mkdir(parents=True)
    files: dict[str, Path] = {}
    test: dict[str, Path] = {}
    for name, (data, split, path) in parts.items():
        if label_column not in data.obs:
            raise DataError(f"{path} has no column {label_column!r} in .obs",
                            hint=f"--label-column: one of {_list(data.obs.columns)}")
        _require_whole_donors(data, split, donor_column, path)
        for part, into in (("train", files), ("test", test)):
            rows = np.flatnonzero(split == part)
            if len(rows):
                into[name] = folder / f"{name.replace('/', '_')}.{part}.h5ad"
                _write(data[rows], into[name])
            elif (part == "train" and name != HELD_OUT) or is_folder:
                raise DataError(f"{splits} names no {part} cell of the site {name!r} ({path.name})",
                                hint="every site needs rows of both kinds, with .obs_names in the column cell")
    if len(files) < 2 or not test:
        raise DataError(f"{splits} makes {len(files)} sites and {'no' if not test else 'some'} held-out cells",
                        hint="a benchmark takes at least two sites, and cells with split = test")
    return Dealt(title=f"{len(files)} sites", dataset=source.stem, files=files, test=test, label_column=label_column,
                 umap={})


def _read_folder(source: Path, table: pd.DataFrame, splits: Path) -> dict[str, Part]:
    paths = {path.stem: path for path in sorted(source.glob("*.h5ad"))}
    lost = sorted(set(table["site"]) - set(paths))
    if lost:
        raise DataError(f"{splits} names the site {lost[0]!r}, and {source} has no {lost[0]}.h5ad",
                        hint="the column site holds the files' names without .h5ad")
    parts = {}
    for name, path in paths.items():
        data, rows = _read(path), table[table["site"] == name]
        parts[name] = (data, _match(rows, data, path, splits), path)
    return parts


def _read_file(source: Path, table: pd.DataFrame, splits: Path, site_column: str) -> dict[str, Part]:
    data = _read(source)
    split = _match(table, data, source, splits)
    if site_column in table:
        sites = table.drop_duplicates("cell").set_index("cell")[site_column].reindex(data.obs_names.astype(str))
    elif site_column in data.obs:
        sites = data.obs[site_column]
    else:
        raise DataError(f"neither {splits} nor .obs of {source} has the column {site_column!r}",
                        hint=f"--site-column: one of {_list([*table.columns, *data.obs.columns])}")
    where = sites.astype("str").to_numpy()
    trained = sorted(set(where[split == "train"].tolist()))
    where[(split == "test") & ~np.isin(where, trained)] = HELD_OUT
    names = [*trained, *([HELD_OUT] if (where[split == "test"] == HELD_OUT).any() else [])]
    chosen = {name: np.flatnonzero((where == name) & (split != "")) for name in names}
    return {name: (data[rows], split[rows], source) for name, rows in chosen.items()}


def _match(rows: pd.DataFrame, data: anndata.AnnData, path: Path, splits: Path) -> Any:
    """The split of every cell of a file: train, test, or empty."""
    if rows["cell"].duplicated().any():
        twice = rows.loc[rows["cell"].duplicated(), "cell"].iloc[0]
        raise DataError(f"{splits} names the cell {twice!r} of {path.name} twice", hint="one row for each cell")
    names = data.obs_names.astype(str)
    lost = ~rows["cell"].isin(names)
    if lost.any():
        first = rows.loc[lost, "cell"].iloc[0]
        raise DataError(f"{splits} names {int(lost.sum())} cells that {path.name} does not hold, {first!r} first",
                        hint="its column cell must hold the file's .obs_names")
    return rows.set_index("cell")["split"].reindex(names, fill_value="").to_numpy(dtype="str")


def _require_whole_donors(data: anndata.AnnData, split: Any, column: str | None, path: Path) -> None:
    if column is None:
        return
    if column not in data.obs:
        raise DataError(f"{path} has no column {column!r} in .obs",
                        hint=f"--donor-column: one of {_list(data.obs.columns)}")
    donors = data.obs[column].astype(str).to_numpy()
    both = sorted(set(donors[split == "train"].tolist()) & set(donors[split == "test"].tolist()))
    if both:
        raise DataError(f"{path}: the donor {both[0]!r} ({column}) has cells in train and in test",
                        hint="split by donor: all cells of one on the same side")


def _list(names: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, names))) or "(none there)"


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


def list_folds(path: Path) -> list[str]:
    """The folds that a table of splits names; none if it has no such column. Raises `DataError`."""
    try:
        table = pd.read_csv(path, dtype=str)
    except (OSError, ValueError) as exc:
        raise DataError(f"cannot read {path}: {exc}", hint="a CSV with the columns cell, and fold or split") from exc
    return sorted(table["fold"].dropna().unique().tolist()) if "fold" in table else []


def _read_splits(path: Path, columns: Sequence[str] = ("site", "cell", "split"), *, fold: str | None = None
                 ) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str)
    except (OSError, ValueError) as exc:
        raise DataError(f"cannot read {path}: {exc}", hint=f"a CSV with the columns {', '.join(columns)}") from exc
    if fold is not None and "fold" in table:
        table["split"] = np.where(table["fold"] == fold, "test", "train")
    missing = [c for c in columns if c not in table]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}", hint=f"it needs {', '.join(columns)}")
    wrong = ~table["split"].isin(("train", "test"))
    if wrong.any():
        raise DataError(f"{path}, line {int(np.argmax(wrong)) + 2}: split is {table['split'][wrong].iloc[0]!r}",
                        hint="train or test; cells without a line are left out")
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return anndata.read_h5ad(path)
    except Exception as exc:  # h5py and anndata raise a dozen kinds on a file that is none of theirs
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise DataError(f"cannot read {path}: {reason}", hint="an AnnData file (.h5ad) with named cells") from exc


def _write(data: anndata.AnnData, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = anndata.AnnData(X=data.X.copy(), obs=data.obs.copy(), var=pd.DataFrame(index=data.var_names.astype(str)))
        kept.write_h5ad(path)
