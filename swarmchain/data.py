"""A site's cells: from its file to arrays on the run's panel.

`readers` opens the file, `names` and `labels` say what its features and cells are called in the run, `normalization`
brings X to the state that the spec demands; here they meet, block by block. Features that the site does not have are
marked absent: after standardisation they are 0, which is the federated mean. Validation cells are chosen by the hash of
their names, so that they are the same in every round and on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from swarmchain.config import DataConfig, SiteConfig
from swarmchain.errors import DataError, SpecError
from swarmchain.labels import LabelMap, check_ids, encode_labels, explain_unmapped, read_label_map
from swarmchain.names import Naming, read_name_table, rename_features
from swarmchain.normalization import choose_state, normalize
from swarmchain.readers import open_source
from swarmchain.source import (
    Source,
    check_names,
    find_rows,
    iterate_blocks,
    read_column,
    read_donors,
    read_feature_names,
    read_sample,
)
from swarmchain.spec import CellSpec, Normalization, Panel

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

STANDARDIZED_MAX = 10.0
HASHED_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Cells:
    """Annotated cells of one file, X in the state that a spec demands.

    `x` is [cells, features] sparse or dense; `labels`, `names` and, where a column names them, `donors` are [cells].
    `excluded` counts the cells of labels that were left out, by the site's own labels; `ids` are Cell Ontology ids of
    labels; `unmapped` says what becomes of labels that are not on a run's list.
    """

    x: Any
    features: tuple[str, ...]
    labels: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    source: str
    donors: npt.NDArray[np.str_] | None = None
    excluded: Mapping[str, int] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    unmapped: Literal["refuse", "exclude"] = "refuse"


@dataclass(frozen=True)
class SiteData:
    """One site's cells on a run's panel.

    Shapes: `x` float32 [cells, panel], not standardised; `y` int64 [cells], index into the run's labels; `present`
    bool [panel]; `train` and `validation` are row numbers; `donors` [cells], where the site names them. `excluded`
    counts the cells that were left out, by label.
    """

    x: Floats
    y: Ints
    present: npt.NDArray[np.bool_]
    train: Ints
    validation: Ints
    donors: npt.NDArray[np.str_] | None = None
    excluded: Mapping[str, int] = field(default_factory=dict)


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
        donors = read_donors(source, config)
        return Cells(
            x=x, features=tuple(features[i] for i in kept), labels=labels[keep], names=source.cells[keep],
            source=str(path), donors=None if donors is None else donors[keep], excluded=excluded,
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


def select_cells(cells: Cells, spec: CellSpec) -> SiteData:
    """Cells on a spec's panel and label list.

    Raises
    ------
    DataError
        If too little of the panel is there, a label is not on the run's list and may not be left out, or no cell is
        left to train on.
    """
    check_ids(cells.ids, spec, source=cells.source)
    inverse, found = _factorize(cells.labels)
    index = {label: i for i, label in enumerate(spec.labels)}
    unknown = [label for label in found if label not in index]
    if unknown and cells.unmapped == "refuse":
        words, hint = explain_unmapped(unknown[0], cells.ids, spec)
        raise DataError(f"{cells.source}: {words} ({len(unknown)} such labels)", hint=hint)
    y = np.array([index.get(label, -1) for label in found], dtype=np.int64)[inverse]
    counts = np.bincount(inverse, minlength=len(found)).tolist()
    left_out = {label: n for label, n in zip(found, counts, strict=True) if label not in index}
    x, present = select_panel(cells, spec.panel)
    names, donors = cells.names, cells.donors
    if left_out:
        rows = y >= 0
        x, y, names, donors = x[rows], y[rows], names[rows], None if donors is None else donors[rows]
    validation = choose_validation(names, y, share=spec.validation_share)
    train = np.setdiff1d(np.arange(len(y)), validation)
    if len(train) == 0:
        raise DataError(f"{cells.source}: no labelled cell to train on", hint="check label_column and label_map")
    return SiteData(x=x, y=y, present=present, train=train, validation=validation, donors=donors,
                    excluded={**cells.excluded, **left_out})


def _factorize(labels: npt.NDArray[np.str_]) -> tuple[Ints, list[str]]:
    """Code of each label, and the labels in order; hashed, since to sort a million strings takes seconds."""
    import pandas as pd

    codes, found = pd.factorize(labels.astype(object), sort=True)
    return codes.astype(np.int64), [str(label) for label in found]


def select_panel(cells: Cells, panel: Panel) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Dense [cells, panel], 0 where the feature is absent, and which features are present. Raises `DataError`."""
    position = {name: i for i, name in enumerate(cells.features)}
    columns = np.array([position.get(name, -1) for name in panel.features], dtype=np.int64)
    present = columns >= 0
    if present.mean() < panel.share_min:
        absent = panel.features[int(np.argmin(present))]
        raise DataError(
            f"{cells.source} holds {present.sum()} of the panel's {len(columns)} features ({present.mean():.0%}), "
            f"the run needs {panel.share_min:.0%}; {absent!r} is absent",
            hint="check that var_names are of the same kind as the panel's (symbols or ENSEMBL), or set [data] "
            "feature_column, feature_table or [data.aliases]",
        )
    if cells.features == panel.features and not sp.issparse(cells.x):
        return cells.x, present
    x = np.zeros((len(cells.names), len(columns)), dtype=np.float32)
    chosen = cells.x[:, columns[present]]
    x[:, present] = chosen.toarray() if sp.issparse(chosen) else chosen
    return x, present


def choose_validation(names: npt.NDArray[np.str_], y: Ints, *, share: float) -> Ints:
    """Row numbers of the validation cells: of every class, the `share` (rounded down) with the lowest name hash."""
    hashes = np.empty((len(names), 4), dtype=">u8")
    for start in range(0, len(names), HASHED_AT_ONCE):
        some = names[start : start + HASHED_AT_ONCE].tolist()
        digests = b"".join(hashlib.sha256(name.encode()).digest() for name in some)
        hashes[start : start + len(some)] = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)
    chosen = [np.empty(0, dtype=np.int64)]
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        # the first eight bytes decide unless they are equal
        ranked = rows[np.lexsort(hashes[rows].T[::-1])]
        chosen.append(ranked[: int(len(rows) * share)])
    return np.sort(np.concatenate(chosen))


def compute_statistics(data: SiteData, *, labels: int) -> dict[str, npt.NDArray[np.generic]]:
    """Sums over this site's training cells; layout: `layouts.statistics_layout`. Absent features contribute nothing."""
    x = data.x[data.train].astype(np.float64)
    present = data.present.astype(np.int64)
    return {
        "cells_per_feature": present * len(data.train),
        "cells_per_label": np.bincount(data.y[data.train], minlength=labels).astype(np.int64),
        "sites_per_feature": present,
        "sum": x.sum(axis=0),
        "sum_of_squares": (x * x).sum(axis=0),
    }


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
