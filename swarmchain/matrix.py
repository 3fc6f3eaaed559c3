"""A file of cells without labels, read a batch at a time and brought to the state that a model wants.

The file is open, not loaded: a million cells take the memory of one batch. What X holds is told from all of its numbers
before the first batch is given, so that all cells are treated alike.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from anndata.io import read_elem, sparse_dataset

from swarmchain.data import guess_state, normalize
from swarmchain.errors import DataError
from swarmchain.spec import Normalization

BATCH = 8192


@dataclass(frozen=True)
class Matrix:
    """Cells × features in the state of a spec's normalisation; `state` is what the file holds."""

    source: str
    features: tuple[str, ...]
    cells: int
    state: str
    normalization: Normalization
    stored: Any

    def read_batches(self, size: int = BATCH) -> Iterator[tuple[slice, Any]]:
        """Rows and their values, sparse or dense float32 [batch, features]."""
        for rows in _cut(self.cells, size):
            yield rows, normalize(_read(self.stored, rows), self.state, self.normalization, source=self.source)


@contextlib.contextmanager
def read_matrix(path: Path, normalization: Normalization, *, layer: str | None = None, state: str = "auto",
                batch: int = BATCH) -> Iterator[Matrix]:
    """Open an .h5ad file for reading in batches, while the context lasts.

    Parameters
    ----------
    layer
        To use in place of X.
    state
        What it holds, as `[data] state` in site.toml.

    Raises
    ------
    DataError
        If the file or layer is missing, holds no cells, names a feature twice, or holds values from which the demanded
        state cannot be made.
    """
    with contextlib.ExitStack() as stack:
        features, stored = _open(path, layer, stack)
        cells = stored.shape[0]
        if cells == 0:
            raise DataError(f"{path} holds no cells", hint="give a file with cells")
        if not features.is_unique:
            twice = str(features[features.duplicated()][0])
            raise DataError(f"{path}: {twice!r} stands twice among its features (var_names)",
                            hint="make the names unique")
        if state == "auto":
            state = _guess(stored, cells, batch, source=str(path)) if normalization.kind != "none" else "none"
        yield Matrix(str(path), tuple(map(str, features)), cells, state, normalization, stored)


def is_modern(file: h5py.File) -> bool:
    """Whether obs is stored as today's anndata stores it, a group with one array for each column."""
    return str(file["obs"].attrs.get("encoding-version", "")) == "0.2.0"


def _open(path: Path, layer: str | None, stack: contextlib.ExitStack) -> tuple[Any, Any]:
    """Feature names, and the chosen matrix: still on disk, unless an old or columnwise file has to be loaded."""
    hint = "give an AnnData .h5ad file"
    if not path.is_file():
        what = "is a folder, no file" if path.is_dir() else "does not exist"
        raise DataError(f"data file {path} {what}", hint=hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old files
            file = stack.enter_context(h5py.File(path, "r"))
            if not is_modern(file):
                data = anndata.read_h5ad(path)
                return data.var_names, _choose(data.X, data.layers, layer, path)
            features = read_elem(file["var"]).index
            node = _choose(file.get("X"), file.get("layers", {}), layer, path)
            if isinstance(node, h5py.Dataset):
                return features, node
            stored = sparse_dataset(node)
            # by columns: a batch of rows would read all of them each time
            return features, stored if stored.format == "csr" else sp.csr_matrix(stored.to_memory())
    except DataError:
        raise
    except Exception as exc:  # h5py and anndata raise a dozen kinds on a file that is none of theirs
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise DataError(f"cannot read {path}: {reason}", hint=hint) from exc


def _choose(x: Any, layers: Any, layer: str | None, path: Path) -> Any:
    if layer is not None and layer not in layers:
        raise DataError(f"{path} has no layer {layer!r}", hint=f"its layers: {', '.join(layers) or '(none)'}")
    found = x if layer is None else layers[layer]
    if found is None:
        raise DataError(f"{path} holds no X", hint="name a layer")
    return found


def _read(stored: Any, rows: slice) -> Any:
    found = stored[rows]
    found = sp.csr_matrix(found) if sp.issparse(found) else np.asarray(found)
    return found.astype(np.float32) if found.dtype == np.float16 else found


def _guess(stored: Any, cells: int, batch: int, *, source: str) -> str:
    """What all values together look like, from the extremes of every batch and one fraction, if there is any."""
    seen: list[float] = []
    fractions: list[float] = []
    for rows in _cut(cells, batch):
        x = _read(stored, rows)
        values: npt.NDArray[Any] = x.data if sp.issparse(x) else x.ravel()
        if not values.size:
            continue
        if not np.isfinite(values).all():
            raise DataError(f"{source}: X holds NaN or infinity", hint="remove those cells or features")
        seen += [float(values.min()), float(values.max())]
        if not fractions:
            is_fraction = values != np.rint(values)
            fractions = [float(values[is_fraction][0])] if is_fraction.any() else []
    return guess_state(np.array(seen + fractions), source=source)


def _cut(cells: int, size: int) -> Iterator[slice]:
    for start in range(0, cells, size):
        yield slice(start, min(start + size, cells))
