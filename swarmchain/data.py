"""A site's cells: from its file to what a run calls them, in the state that it wants.

`readers` opens the file, `names` and `labels` say what its features and cells are called in the run, `normalization`
brings X to the state that the spec demands; here they meet, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from swarmchain.config import DataConfig, SiteConfig
from swarmchain.errors import DataError
from swarmchain.labels import LabelMap, encode_labels, read_label_map
from swarmchain.names import Naming, read_name_table, rename_features
from swarmchain.normalization import choose_state, normalize
from swarmchain.readers import open_source
from swarmchain.selection import Cells, SiteData, select_cells
from swarmchain.source import (
    Source,
    check_names,
    find_rows,
    iterate_blocks,
    read_column,
    read_donors,
    read_feature_names,
    read_sample,
    read_samples,
)
from swarmchain.spec import CellSpec, Normalization, Panel

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

HASHED_AT_ONCE = 1 << 16


def load_site_data(config: SiteConfig, spec: CellSpec) -> SiteData:
    """Everything that a run needs of this site's file; only the panel's features are kept in memory.

    Raises
    ------
    DataError
        If the file cannot serve the spec; the message names the file, the key and the remedy.
    """
    settings = config.cells
    if settings is None:
        raise DataError(f"site.toml of {config.name} has no [data] section", hint="name the site's AnnData file there")
    cells = read_cells(Path(settings.path), settings, spec.normalization, panel=spec.panel)
    data = select_cells(cells, spec)
    found = np.unique(data.y)
    if len(found) < settings.classes_min:
        raise DataError(
            f"{cells.source}: column {settings.label_column!r} gives one class only, {spec.labels[int(found[0])]!r}"
            if len(found) == 1 else
            f"{cells.source}: column {settings.label_column!r} gives {len(found)} classes, [data] classes_min is "
            f"{settings.classes_min}",
            hint="check label_column and the mapping of labels; one kind alone is allowed by classes_min = 1",
        )
    return data


def read_names(path: Path, label_column: str, *, settings: DataConfig | None = None) -> tuple[list[str], list[str]]:
    """Feature names and label names of a file: what a site card shows.

    Features have the names that a run without a panel would see (`names`); labels are the site's own, or the shared
    ones where `settings` map them. Raises `DataError`.
    """
    config = settings or DataConfig(path=str(path), label_column=label_column)
    with open_source(path, config) as source:
        check_names(source, config)
        names, kept = name_features(source, config, None)
        _, labels = encode_labels(read_column(source, label_column, "label_column"))
    mapping = read_label_map(config)
    shared = {mapping.get_shared(label) for label in labels} - {""}
    return [names[i] for i in kept], sorted(shared)


def read_cells(
    path: Path, config: DataConfig, normalization: Normalization, *, panel: Panel | None = None
) -> Cells:
    """Read, check and normalise one file of cells.

    Parameters
    ----------
    config
        The site's settings, with paths that do not depend on a folder (`SiteConfig.cells`).
    panel
        Features to keep, under the panel's names; without one, all that are markers or genes.

    Raises
    ------
    DataError
        If the file, the layer or a column is missing, names stand twice, X holds NaN or infinity, or X is in a state
        from which the demanded one cannot be made.
    """
    mapping = read_label_map(config)
    with open_source(path, config) as source:
        check_names(source, config)
        labels, excluded = _map_labels(source, config, mapping)
        keep = (labels != "") & find_rows(source, config.where)
        if not (labels != "").any():
            raise DataError(f"{path}: column {config.label_column!r} holds no label that is kept",
                            hint="check label_column, labels, label_map and label_file")
        if not keep.any():
            raise DataError(f"{path}: [data.where] leaves no labelled cell", hint="check its columns and values")
        features, kept = name_features(source, config, panel)
        x = _read_matrix(source, config, normalization, keep=keep, columns=kept)
        donors, samples = read_donors(source, config), read_samples(source, config)
        return Cells(
            x=x, features=tuple(features[i] for i in kept), labels=labels[keep], names=source.cells[keep],
            source=str(path), donors=None if donors is None else donors[keep], excluded=excluded,
            samples=None if samples is None else samples[keep],
            ids={mapping.get_shared(label): term for label, term in mapping.ids.items()}, unmapped=config.unmapped,
        )


def name_features(source: Source, config: DataConfig, panel: Panel | None) -> tuple[tuple[str, ...], list[int]]:
    """All features under the run's names, and the positions of those to keep.

    Scatter and time channels are kept only where the panel or [data.aliases] name them. Raises `DataError`.
    """
    raw = read_feature_names(source, config)
    pinned = None if panel is None else panel.names
    if pinned is not None and config.feature_table is None:
        raise DataError(f"the run pins a table of names ({pinned[:12]}…), and [data] feature_table names none",
                        hint="get the run's table, and name it in [data] feature_table")
    table = None if config.feature_table is None else read_name_table(Path(config.feature_table), pinned=pinned)
    registered = {} if panel is None else panel.aliases
    naming = Naming(config.features, table, {**registered, **config.aliases})
    wanted = None if panel is None else panel.features
    names = rename_features(raw, naming, wanted=wanted, source=str(source.path))
    panel_names = set(wanted or ())
    hidden = {i for i in source.unlisted if names[i] not in panel_names and raw[i] not in config.aliases}
    hidden |= {i for i, name in enumerate(raw) if name == config.total_column}
    kept = [i for i, name in enumerate(names) if i not in hidden and (wanted is None or name in panel_names)]
    return names, kept


def _map_labels(
    source: Source, config: DataConfig, mapping: LabelMap
) -> tuple[npt.NDArray[np.str_], dict[str, int]]:
    """Each cell's label in the run, "" where it has none, and the cells of each label that is left out."""
    codes, labels = encode_labels(read_column(source, config.label_column, "label_column"))
    shared = [mapping.get_shared(label) for label in labels]
    counts = np.bincount(codes[codes >= 0], minlength=len(labels))
    excluded = {label: int(n) for label, name, n in zip(labels, shared, counts, strict=True) if not name}
    return np.array([*shared, ""], dtype=np.str_)[codes], excluded


def _read_matrix(
    source: Source, config: DataConfig, normalization: Normalization, *, keep: npt.NDArray[np.bool_],
    columns: Sequence[int],
) -> Any:
    """Kept rows and columns of X, normalised over all features: one dense array, or one sparse matrix by rows."""
    label = str(source.path)
    total = None
    if config.total_column is not None:
        if config.total_column not in source.features:
            raise DataError(f"{label} has no feature {config.total_column!r}", hint="correct [data] total_column")
        total = source.features.index(config.total_column)
    state = choose_state(read_sample(source), config.state, normalization, source=label)
    pieces: list[Any] = []
    dense = np.empty((int(keep.sum()), len(columns)), np.float32) if source.storage == "dense" else None
    filled = 0
    for start, stop, block in iterate_blocks(source, keep):
        rows = keep[start:stop]
        x = normalize(block if rows.all() else block[rows], state, normalization, source=label, total=total,
                      guessed=config.state == "auto")
        if dense is None:
            pieces.append(x[:, columns])
        else:
            dense[filled : filled + x.shape[0]] = x[:, columns]
            filled += x.shape[0]
    return dense if dense is not None else sp.vstack(pieces, format="csr")
