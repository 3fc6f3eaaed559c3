"""An open file of cells: names and annotations at once, rows of X in blocks. What `readers` make and `data` uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from swarmchain.config import DataConfig
from swarmchain.errors import DataError
from swarmchain.labels import encode_labels

Kind = Literal["h5ad", "zarr", "fcs", "10x", "table"]
Names = npt.NDArray[np.str_]

BLOCK_VALUES = 1 << 22  # of a dense block: 16 MiB as float32, several times that while it is normalised
SPARSE_VALUES = 1 << 25
CHUNK_VALUES_MAX = 1 << 25
HINT = "[data] path must name .h5ad, .zarr, .fcs or a folder of them, a 10x folder or .h5, .csv or .tsv"


@dataclass(frozen=True)
class Source:
    """An open file of cells.

    `features` and `cells` are names as the file has them; `bounds` are row numbers where blocks end; `read_rows` gives
    rows [start, stop) over all features; `read_column` an annotation of the cells, `read_feature_column` one of the
    features. `unlisted` are positions of features that are no markers; `channels` are detectors, for FCS.
    """

    path: Path
    kind: Kind
    features: tuple[str, ...]
    cells: Names
    columns: tuple[str, ...]
    feature_columns: tuple[str, ...]
    bounds: tuple[int, ...]
    storage: str
    read_rows: Callable[[int, int], Any]
    read_column: Callable[[str], Any]
    read_feature_column: Callable[[str], Any]
    channels: tuple[str, ...] = ()
    unlisted: frozenset[int] = frozenset()
    remarks: tuple[str, ...] = ()


def iterate_blocks(source: Source, keep: npt.NDArray[np.bool_] | None = None) -> Iterator[tuple[int, int, Any]]:
    """Start, stop and rows of X, block by block; of a block, from the first row to the last that `keep` wants.

    Raises `DataError`.
    """
    for start, stop in zip((0, *source.bounds[:-1]), source.bounds, strict=True):
        if keep is not None:
            wanted = np.flatnonzero(keep[start:stop])
            if len(wanted) == 0:
                continue
            start, stop = start + int(wanted[0]), start + int(wanted[-1]) + 1
        with translate_errors(source.path):
            block = source.read_rows(start, stop)
        yield start, stop, block


def sample_rows(source: Source, *, runs: int = 16, rows: int = 128) -> Any:
    """X of `runs` runs of neighbouring cells, evenly spread: up to 2,048 cells. Raises `DataError`."""
    total = len(source.cells)
    starts = sorted({min(i * total // runs, max(total - rows, 0)) for i in range(runs)})
    pieces = []
    edge = 0
    for start in starts:
        begin, end = max(start, edge), min(start + rows, total)
        edge = end
        if begin < end:
            with translate_errors(source.path):
                pieces.append(source.read_rows(begin, end))
    return sp.vstack(pieces, format="csr") if sp.issparse(pieces[0]) else np.concatenate(pieces)


def read_sample(source: Source) -> Any:
    """Some rows of X over all features that are markers or genes, to tell its state from. Raises `DataError`."""
    x = sample_rows(source)
    if x.dtype.kind not in "fiub":
        raise DataError(f"{source.path}: X is of type {x.dtype}", hint="store it as float32")
    if x.dtype == np.float16:
        x = x.astype(np.float32)
    values = x.data if sp.issparse(x) else x
    if values.size and not np.isfinite(values).all():
        raise DataError(f"{source.path}: X holds NaN or infinity", hint="remove those cells or features")
    if source.unlisted:
        x = x[:, [i for i in range(x.shape[1]) if i not in source.unlisted]]
    return x


def read_feature_names(source: Source, config: DataConfig) -> tuple[str, ...]:
    """The features' names, from [data] feature_column where it is set. Raises `DataError`."""
    name = config.feature_column
    if name is None:
        return source.features
    if name not in source.feature_columns:
        raise DataError(f"{source.path} has no column {name!r} in .var",
                        hint=f"set [data] feature_column to: {', '.join(source.feature_columns) or '(none)'}")
    return tuple(str(v) for v in source.read_feature_column(name))


def check_names(source: Source, config: DataConfig) -> None:
    """Refuse a file without cells or features, or with names that are missing or stand twice. Raises `DataError`."""
    import pandas as pd

    if len(source.cells) == 0 or not source.features:
        raise DataError(f"{source.path} holds no {'features' if len(source.cells) else 'cells'}",
                        hint="give this site a file with cells")
    features = np.array(read_feature_names(source, config))
    for kind, names in (("features (var_names)", features), ("cells (obs_names)", source.cells)):
        missing = np.flatnonzero(np.isin(names, ("", "nan", "NaN", "None", "<NA>")))
        if len(missing):
            raise DataError(f"{source.path}: {len(missing)} of its {kind} have no name, first number {missing[0]}",
                            hint="give every one a name of its own")
        twice = pd.Index(names).duplicated()
        if twice.any() and kind.startswith("features") and source.feature_columns:
            hint = "make them unique, or name ids in [data] feature_column: " + ", ".join(source.feature_columns)
        else:
            hint = "make the names unique"
        if twice.any():
            word = f"{str(names[twice][0])!r} stands" if kind.startswith("features") else f"{int(twice.sum())} stand"
            raise DataError(f"{source.path}: {word} twice among its {kind}", hint=hint)


def read_column(source: Source, name: str, key: str) -> Any:
    """One annotation of the cells; `key` is the setting that names it. Raises `DataError`."""
    if name not in source.columns:
        where = ".obs" if source.kind in ("h5ad", "zarr") else "its columns or labels"
        raise DataError(f"{source.path} has no column {name!r} in {where}",
                        hint=f"set [data] {key} to one of: {', '.join(source.columns) or '(none there)'}")
    return source.read_column(name)


def read_donors(source: Source, config: DataConfig) -> npt.NDArray[np.str_] | None:
    """Each cell's donor, "" where none is given; an FCS file is a donor where no column says so. Raises `DataError`."""
    name = config.donor_column or ("file" if source.kind == "fcs" else None)
    if name is None:
        return None
    codes, donors = encode_labels(read_column(source, name, "donor_column"))
    return np.array([*donors, ""], dtype=np.str_)[codes]


def read_samples(source: Source, config: DataConfig) -> npt.NDArray[np.str_] | None:
    """Each cell's sample; None where no column tells a donor's samples apart.

    Raises
    ------
    DataError
        If a cell has none.
    """
    if config.sample_column is None:
        return None
    codes, samples = encode_labels(read_column(source, config.sample_column, "sample_column"))
    if (codes < 0).any():
        raise DataError(f"{source.path}: {int((codes < 0).sum())} cells have no {config.sample_column!r}",
                        hint="fill the column that [data] sample_column names")
    return np.array(samples, dtype=np.str_)[codes]


def find_rows(source: Source, where: Mapping[str, str]) -> npt.NDArray[np.bool_]:
    """Which cells [data.where] keeps. Raises `DataError`."""
    keep = np.ones(len(source.cells), dtype=np.bool_)
    for name, value in where.items():
        codes, values = encode_labels(read_column(source, name, "where"))
        if value not in values:
            raise DataError(f"{source.path}: no cell has {value!r} in column {name!r}",
                            hint="correct [data.where] in site.toml")
        keep &= codes == values.index(value)
    return keep


@contextlib.contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Make a `DataError` of whatever the libraries raise on a damaged file; h5py, zarr, anndata have a dozen kinds."""
    try:
        yield
    except DataError:
        raise
    except Exception as exc:
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise DataError(f"cannot read {path}: {reason}", hint=HINT) from exc


def as_names(values: Any) -> Names:
    """Names as an array of numpy's own strings."""
    return np.array(np.asarray(values, dtype=object), dtype=np.str_)


def cut_blocks(rows: int, columns: int, *, is_sparse: bool, chunk: int) -> tuple[int, ...]:
    """Where blocks end: a bounded number of values each, whole chunks of the file if these are not too large."""
    size = max(1, (SPARSE_VALUES if is_sparse else BLOCK_VALUES) // max(columns, 1))
    if size < chunk and chunk * columns <= CHUNK_VALUES_MAX:
        size = chunk
    elif size > chunk:
        size -= size % chunk
    return tuple(range(size, rows, size)) + ((rows,) if rows else ())
