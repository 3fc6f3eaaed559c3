"""A file of cells without labels, read a batch at a time and brought to the state that a model wants.

The file is open, not loaded: a million cells take the memory of one batch. What X holds is told from a sample of its
rows, and every batch is checked against it, so that all cells are treated alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from swarmchain.config import DataConfig
from swarmchain.data import name_features
from swarmchain.normalization import choose_state, normalize
from swarmchain.readers import open_source
from swarmchain.source import Source, check_names, read_sample, translate_errors
from swarmchain.spec import Normalization, Panel

BATCH = 8192


@dataclass(frozen=True)
class Matrix:
    """Cells × features in the state of a spec's normalisation; `state` is what the file holds."""

    source: str
    features: tuple[str, ...]
    cells: int
    state: str
    normalization: Normalization
    opened: Source

    def read_batches(self, size: int = BATCH) -> Iterator[tuple[slice, Any]]:
        """Rows and their values, sparse or dense float32 [batch, features]. Raises `DataError`."""
        for start in range(0, self.cells, size):
            rows = slice(start, min(start + size, self.cells))
            with translate_errors(self.opened.path):
                stored = self.opened.read_rows(rows.start, rows.stop)
            yield rows, normalize(stored, self.state, self.normalization, source=self.source)


@contextlib.contextmanager
def read_matrix(path: Path, panel: Panel, normalization: Normalization, *, config: DataConfig,
                state: str = "auto") -> Iterator[Matrix]:
    """Open a file for reading in batches, while the context lasts.

    Parameters
    ----------
    panel
        Features are called as it calls them, where they go by an alias.
    config
        The layer to use in place of X, and columns that hold no features.
    state
        What it holds, as `[data] state` in site.toml.

    Raises
    ------
    DataError
        If the file or layer is missing, holds no cells, names a feature twice, or holds values from which the demanded
        state cannot be made.
    """
    with open_source(path, config) as source:
        check_names(source, config)
        features, _ = name_features(source, config, panel.model_copy(update={"names": None}))
        found = choose_state(read_sample(source), state, normalization, source=str(path))
        yield Matrix(str(path), features, len(source.cells), found, normalization, source)


def is_modern(file: h5py.File) -> bool:
    """Whether obs is stored as today's anndata stores it, a group with one array for each column."""
    return str(file["obs"].attrs.get("encoding-version", "")) == "0.2.0"
