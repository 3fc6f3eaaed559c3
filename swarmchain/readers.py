"""Files of cells behind one interface, chosen by the path. The only room that knows AnnData, 10x folders and tables.

Formats: `.h5ad` and `.zarr` (AnnData, read from disk as rows are asked for), `.fcs` or a folder of such (through
`fcs`), a 10x folder or `.h5` (through scanpy), and `.csv`/`.tsv` tables (`.gz` too). A source gives names and
annotations at once, and rows of X in blocks, so that a million cells need no more memory than one
block and what is kept of them.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from swarmchain.config import DataConfig
from swarmchain.errors import DataError
from swarmchain.fcs import list_fcs, open_fcs
from swarmchain.labels import find_separator, read_table, take_keys
from swarmchain.source import HINT, Kind, Names, Source, as_names, cut_blocks, translate_errors

if TYPE_CHECKING:
    import anndata
    import pandas as pd

def find_kind(path: Path) -> Kind:
    """The format of a path.

    Raises
    ------
    DataError
        If it does not exist or is none that can be read.
    """
    if not path.exists():
        raise DataError(f"data file {path} does not exist", hint=HINT)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    last = suffixes[-1] if suffixes else ""
    if path.is_dir():
        if last == ".zarr" or (path / "zarr.json").exists() or (path / ".zgroup").exists():
            return "zarr"
        if any(path.glob("matrix.mtx*")):
            return "10x"
        if list_fcs(path):
            return "fcs"
        raise DataError(f"{path} holds neither .fcs files nor matrix.mtx nor a zarr group", hint=HINT)
    kinds: dict[str, Kind] = {".h5ad": "h5ad", ".fcs": "fcs", ".lmd": "fcs", ".h5": "10x", ".csv": "table",
                              ".tsv": "table", ".txt": "table"}
    if last not in kinds:
        raise DataError(f"{path} is of no kind that can be read", hint=HINT)
    return kinds[last]


@contextlib.contextmanager
def open_source(path: Path, config: DataConfig) -> Iterator[Source]:
    """The file, while the context lasts.

    Raises
    ------
    DataError
        If it cannot be read, is damaged, or lacks what the settings name.
    """
    kind = find_kind(path)
    with contextlib.ExitStack() as stack:
        if kind == "fcs":
            yield open_fcs(path, config)
            return
        opener = {"h5ad": _open_h5ad, "zarr": _open_zarr, "10x": _open_10x, "table": _open_table}[kind]
        with translate_errors(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks of the libraries on old files and on names
            source = opener(path, config, stack)
        yield source if config.labels is None else _annotate(source, Path(config.labels), config.labels_key)


# -- AnnData


def _open_h5ad(path: Path, config: DataConfig, stack: contextlib.ExitStack) -> Source:
    import h5py

    group = stack.enter_context(h5py.File(path, "r"))
    if "encoding-type" not in group.attrs:
        import anndata

        return _wrap_anndata(path, "h5ad", anndata.read_h5ad(path), config)  # written before anndata 0.7
    return _open_group(path, "h5ad", group, config)


def _open_zarr(path: Path, config: DataConfig, stack: contextlib.ExitStack) -> Source:
    import zarr

    group = zarr.open_group(path, mode="r")
    stack.callback(group.store.close)
    return _open_group(path, "zarr", group, config)


def _open_group(path: Path, kind: Kind, group: Any, config: DataConfig) -> Source:
    from anndata.io import read_elem

    obs, layers = group["obs"], list(group["layers"]) if "layers" in group else []
    at = _choose_matrix(path, config.layer, layers, has_raw="raw" in group, has_x="X" in group)
    var = group["raw/var"] if at == "raw/X" else group["var"]
    matrix = group[at]
    cells = as_names(read_elem(obs[obs.attrs["_index"]]))
    features = as_names(read_elem(var[var.attrs["_index"]]))
    read_rows, storage, chunk = _open_matrix(matrix)
    is_sparse = storage != "dense"
    return Source(
        path=path, kind=kind, features=tuple(features.tolist()), cells=cells,
        columns=_list_columns(obs), feature_columns=_list_columns(var),
        bounds=cut_blocks(len(cells), len(features), is_sparse=is_sparse, chunk=chunk), storage=storage,
        read_rows=read_rows,
        read_column=lambda name: read_elem(obs[name]), read_feature_column=lambda name: read_elem(var[name]),
    )


def _open_matrix(matrix: Any) -> tuple[Callable[[int, int], Any], str, int]:
    """How to read rows, how they are stored, and rows in one chunk of the file."""
    from anndata.io import read_elem, sparse_dataset

    encoding = str(matrix.attrs.get("encoding-type", "array"))
    if encoding == "csr_matrix":
        rows = sparse_dataset(matrix)
        return (lambda start, stop: rows[start:stop]), "sparse by rows", 1
    if encoding == "csc_matrix":
        # rows of a matrix that is stored by columns cannot be read alone
        whole = read_elem(matrix).tocsr()
        return (lambda start, stop: whole[start:stop]), "sparse by columns", 1
    chunks = getattr(matrix, "chunks", None)
    return (lambda start, stop: np.asarray(matrix[start:stop])), "dense", int(chunks[0]) if chunks else 1


def _wrap_anndata(path: Path, kind: Kind, data: anndata.AnnData, config: DataConfig) -> Source:
    """An AnnData object that is in memory as a whole."""
    at = _choose_matrix(path, config.layer, list(data.layers), has_raw=data.raw is not None, has_x=data.X is not None)
    var, x = (data.raw.var, data.raw.X) if at == "raw/X" else (data.var, data.X)
    if at.startswith("layers/"):
        x = data.layers[config.layer]
    x = x.tocsr() if sp.issparse(x) else np.asarray(x)
    return Source(
        path=path, kind=kind, features=tuple(as_names(var.index).tolist()), cells=as_names(data.obs_names),
        columns=tuple(map(str, data.obs.columns)), feature_columns=tuple(map(str, var.columns)),
        bounds=cut_blocks(*x.shape, is_sparse=sp.issparse(x), chunk=1),
        storage="sparse by rows" if sp.issparse(x) else "dense", read_rows=lambda start, stop: x[start:stop],
        read_column=lambda name: data.obs[name], read_feature_column=lambda name: var[name],
    )


def _choose_matrix(path: Path, layer: str | None, layers: Sequence[str], *, has_raw: bool, has_x: bool) -> str:
    if layer is not None and layer in layers:
        return f"layers/{layer}"
    if layer == "raw" and has_raw:
        return "raw/X"
    if layer is not None:
        there = [*layers, *(["raw"] if has_raw else [])]
        raise DataError(f"{path} has no layer {layer!r}", hint=f"its layers: {', '.join(there) or '(none)'}")
    if not has_x:
        raise DataError(f"{path} holds no X", hint="set [data] layer")
    return "X"


def _list_columns(frame: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in frame.attrs["column-order"])


# -- 10x, tables, FCS


def _open_10x(path: Path, config: DataConfig, stack: contextlib.ExitStack) -> Source:
    import scanpy

    data = scanpy.read_10x_mtx(path, make_unique=False) if path.is_dir() else scanpy.read_10x_h5(path)
    return _wrap_anndata(path, "10x", data, config)


def _open_table(path: Path, config: DataConfig, stack: contextlib.ExitStack) -> Source:
    """One row per donor or cell: its name in the first column; columns of numbers are features."""
    import pandas as pd

    separator = find_separator(path)
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    twice = next((name for i, name in enumerate(header) if name and name in header[:i]), None)
    if twice is not None:  # pandas would rename it in silence
        raise DataError(f"{path}: {twice!r} stands twice in the header", hint="make the names unique")
    table = pd.read_csv(path, sep=separator, index_col=0)
    table.index = table.index.astype(str)
    notes = {config.label_column, config.donor_column, config.sample_column, *config.where}
    numeric = [c for c in table.columns if pd.api.types.is_numeric_dtype(table[c]) and str(c) not in notes]
    if not numeric:
        raise DataError(f"{path} has no column of numbers", hint="its first column names the rows, the others hold X")
    x = table[numeric].to_numpy()
    others = {str(c): table[c] for c in table.columns if c not in set(numeric)}
    return Source(
        path=path, kind="table", features=tuple(map(str, numeric)), cells=as_names(table.index),
        columns=tuple(others), feature_columns=(), bounds=cut_blocks(*x.shape, is_sparse=False, chunk=1),
        storage="dense", read_rows=lambda start, stop: x[start:stop], read_column=lambda name: others[name],
        read_feature_column=lambda name: None,
    )


def _annotate(source: Source, path: Path, key: str | None) -> Source:
    """Columns of a table beside the file; its column `key`, or else the first, names the cells."""
    import dataclasses

    table = read_table(path, key="labels")
    keys = take_keys(table, path, key)
    if keys.duplicated().any():
        raise DataError(f"{path}: {int(keys.duplicated().sum())} cells stand twice in its column {keys.name!r}",
                        hint="one row for each cell")
    rows = _find_rows(source.cells, keys)
    if (rows < 0).all():
        raise DataError(f"{path} names none of the {len(source.cells)} cells of {source.path}",
                        hint="name the column of the cells' names in [data] labels_key, or with --labels-key")
    beside = tuple(map(str, table.columns))

    def read_column(name: str) -> Any:
        if name not in beside:
            return source.read_column(name)
        return np.append(table[name].to_numpy(dtype=object), "")[rows]

    columns = tuple(dict.fromkeys((*source.columns, *beside)))
    return dataclasses.replace(source, columns=columns, read_column=read_column)


def _find_rows(cells: Names, keys: pd.Series[str]) -> npt.NDArray[np.int64]:
    import pandas as pd

    rows: npt.NDArray[np.int64] = pd.Index(keys.to_numpy()).get_indexer(pd.Index(cells.astype(object)))
    return rows
