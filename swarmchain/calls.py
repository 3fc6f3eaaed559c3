"""What a model says of new cells or samples, and where that is written: a copy of the file, a table, a summary.

The copy of an `.h5ad` is one of its bytes, to which columns are added: X, layers and everything else stay what they
were. Other formats are read as a whole and written by anndata. Nothing is half-written: it is made under another name
and renamed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata.io import write_elem

from swarmchain.agreement import standardize
from swarmchain.calibration import compute_class_scores, compute_log_probabilities
from swarmchain.card import ModelFolder
from swarmchain.config import DataConfig
from swarmchain.errors import ConfigError, DataError
from swarmchain.matrix import BATCH, Matrix, is_modern, read_matrix
from swarmchain.metrics import compute_auroc
from swarmchain.readers import find_kind, open_source
from swarmchain.selection import Cells, select_panel
from swarmchain.source import Source, iterate_blocks, translate_errors
from swarmchain.spec import Panel

LABEL, CONFIDENCE, UNKNOWN, ATTENTION, PROBABILITIES, PROVENANCE = (
    "swarm_label", "swarm_confidence", "swarm_unknown", "swarm_attention", "swarm_probabilities", "swarmchain")

Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Settings:
    """How new cells are read: see `matrix.read_matrix`; `share_min` in place of the spec's own, if not None.

    The columns say whose cells are whose, of which type they are, and what the truth is, where a file knows.
    """

    layer: str | None = None
    state: str = "auto"
    share_min: float | None = None
    batch: int = BATCH
    donor_column: str | None = None
    sample_column: str | None = None
    cell_type_column: str | None = None
    truth_column: str | None = None

    def make_config(self, path: Path) -> DataConfig:
        """The same for `readers`. Columns that are named hold no feature, even where a table has numbers in them."""
        named = (self.sample_column, self.cell_type_column, self.truth_column)
        return DataConfig(path=str(path), label_column="", layer=self.layer, donor_column=self.donor_column,
                          sample_column=self.sample_column, where={name: "" for name in named if name is not None})


@dataclass(frozen=True)
class Truth:
    """Labels that a file carries already: index into the model's [cells], -1 where it is none of the model's.

    `words` [cells] are the labels as they stand there.
    """

    column: str
    label: Ints
    is_given: Bools
    words: npt.NDArray[np.str_]


@dataclass(frozen=True)
class Calls:
    """What a model says of new cells, or of samples.

    `label` [cells] indexes `labels`; `probabilities` [cells, labels] are calibrated; `confidence` [cells] is their
    largest; `unknown` [cells] says where that is below the model's threshold. `columns` are further ones for obs,
    `about` further entries for uns.
    """

    labels: tuple[str, ...]
    label: Ints
    confidence: Singles
    unknown: Bools
    probabilities: Singles
    state: str
    features_found: int
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PanelCells:
    """An open file's cells on a model's panel."""

    matrix: Matrix
    panel: Panel
    model: ModelFolder
    batch: int

    @property
    def features_found(self) -> int:
        """How many of the panel's features the file has."""
        there = set(self.matrix.features)
        return sum(name in there for name in self.panel.features)

    def read_batches(self) -> Iterator[tuple[slice, Singles, Bools]]:
        """Rows, their standardised values [rows, panel], and whether a row has any value but 0 there [rows]."""
        for rows, x in self.matrix.read_batches(self.batch):
            names = np.empty(rows.stop - rows.start, dtype=np.str_)
            chosen, present = select_panel(Cells(x, self.matrix.features, names, names, self.matrix.source), self.panel)
            is_measured = (chosen != 0).any(axis=1)
            yield rows, standardize(chosen, present, self.model.tensors), is_measured


@contextlib.contextmanager
def open_cells(model: ModelFolder, path: Path, settings: Settings) -> Iterator[PanelCells]:
    """A file for reading on a model's panel, while the context lasts. Raises `DataError` as `matrix.read_matrix`."""
    panel = model.spec.panel
    if settings.share_min is not None:
        panel = panel.model_copy(update={"share_min": settings.share_min})
    with read_matrix(path, panel, model.spec.normalization, config=settings.make_config(path),
                     state=settings.state) as matrix:
        yield PanelCells(matrix, panel, model, settings.batch)


def make_calls(model: ModelFolder, logits: Singles, *, state: str, features_found: int) -> Calls:
    """Calls from logits [cells, labels]."""
    probabilities = np.empty(logits.shape, np.float32)
    for start in range(0, len(logits), BATCH):  # in float64, of which a million cells take much
        rows = slice(start, start + BATCH)
        probabilities[rows] = np.exp(compute_log_probabilities(logits[rows], model.temperature))
    confidence = probabilities.max(axis=1)
    return Calls(model.spec.labels, probabilities.argmax(axis=1), confidence, confidence < np.float32(model.threshold),
                 probabilities, state, features_found)


# -- beside labels that a file has already


def read_truth(path: Path, settings: Settings, labels: tuple[str, ...]) -> Truth:
    """The labels that a column holds. Raises `DataError` if there is no such column."""
    column = settings.truth_column or ""
    with open_source(path, settings.make_config(path)) as source:
        values = pd.Series(np.asarray(read_annotation(source, column), dtype=object))
    index = {label: i for i, label in enumerate(labels)}
    words = np.array([str(value) for value in values], dtype=np.str_)
    return Truth(column, np.array([index.get(word, -1) for word in words.tolist()], dtype=np.int64),
                 values.notna().to_numpy(), words)


def read_annotation(source: Source, column: str) -> Any:
    """One annotation of all cells. Raises `DataError` if there is none of that name."""
    if column not in source.columns:
        where = ".obs" if source.kind in ("h5ad", "zarr") else "its columns"
        raise DataError(f"{source.path} has no column {column!r} in {where}",
                        hint=f"its columns: {', '.join(source.columns) or '(none)'}")
    with translate_errors(source.path):
        return source.read_column(column)


def score_calls(truth: Truth, calls: Calls, *, unit: str = "cells") -> dict[str, Any]:
    """F1 on the cells that carry one of the model's labels; of those that carry another, how many are unknown.

    Of samples, and for two labels, the area under the ROC curve too.
    """
    known = truth.label >= 0
    foreign = ~known & truth.is_given
    f1, support = compute_class_scores(count_calls(truth, calls))
    scored = [value for value in f1 if value is not None]
    found = {
        "column": truth.column, unit: int(known.sum()), "macro_f1": sum(scored) / len(scored) if scored else None,
        "per_class": {label: {"f1": value, "support": n}
                      for label, value, n in zip(calls.labels, f1, support, strict=True) if n},
        "foreign": {unit: int(foreign.sum()), "unknown": int((foreign & calls.unknown).sum())},
    }
    if unit == "samples" and len(calls.labels) == 2:
        area = compute_auroc(truth.label[known], calls.probabilities[known, 1])
        found["auroc"] = None if np.isnan(area) else area
    return found


def count_calls(truth: Truth, calls: Calls) -> Ints:
    """Cells by label (row) and call (column), of the cells that carry one of the model's labels."""
    known, labels = truth.label >= 0, len(calls.labels)
    flat = np.bincount(truth.label[known] * labels + calls.label[known], minlength=labels * labels)
    return flat.reshape(labels, labels)


def summarize(model: ModelFolder, calls: Calls, *, unit: str = "cells") -> dict[str, Any]:
    """Counts for a person and for tools."""
    counts = np.bincount(calls.label, minlength=len(calls.labels))
    unknown = np.bincount(calls.label[calls.unknown], minlength=len(calls.labels))
    return {
        unit: len(calls.label), "unknown": int(calls.unknown.sum()), "state": calls.state,
        "features": {"found": calls.features_found, "panel": len(model.spec.panel.features)},
        "labels": {label: {unit: int(n), "unknown": int(u)}
                   for label, n, u in zip(calls.labels, counts, unknown, strict=True)},
        "confidence_mean": float(calls.confidence.mean(dtype=np.float64)),
        "is_calibrated": model.card.evaluation is not None, "temperature": model.temperature,
        "threshold": model.threshold, "checkpoint": model.card.provenance.checkpoint,
    }


# -- the annotated copy


def annotate(path: Path, out: Path, model: ModelFolder, calls: Calls, settings: Settings) -> None:
    """Write a copy of `path` as `.h5ad` with the calls in it.

    Raises
    ------
    ConfigError
        If `out` is the input, or cannot be written.
    DataError
        If the input carries such columns already.
    """
    require_free(path, out)
    obs = _make_columns(calls)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _copy(path, temporary, settings)
        with h5py.File(temporary, "r+") as file:
            _add(file, obs, calls.probabilities, _describe(model, calls), source=path)
        temporary.replace(out)
    except OSError as exc:
        raise ConfigError(f"cannot write {out}: {exc.strerror or exc}", hint="check permissions and free space"
                          ) from exc
    finally:
        temporary.unlink(missing_ok=True)


def require_free(path: Path, out: Path) -> None:
    """See that the output is not the input, and its columns not there yet, before any work. See `annotate`."""
    if out.exists() and path.exists() and out.samefile(path):
        raise ConfigError(f"{out} is the input itself", hint="name another file with --out")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", hint="name a file with --out: calls are written as .h5ad")
    with _open_group(path) as group:
        if group is not None:
            _require_free(group, (LABEL, CONFIDENCE, UNKNOWN, ATTENTION), source=path)


def read_umap(path: Path) -> Any:
    """The file's own UMAP, [cells, 2]; None if it has none."""
    with _open_group(path) as group:
        if group is None or "obsm" not in group or "X_umap" not in group["obsm"]:
            return None
        found = group["obsm"]["X_umap"]
        return np.asarray(found[:, :2]) if len(getattr(found, "shape", ())) == 2 else None


@contextlib.contextmanager
def _open_group(path: Path) -> Iterator[Any]:
    """The root of AnnData's own formats; None for others, and where a reader will say what is wrong."""
    with contextlib.ExitStack() as stack:
        group = None
        with contextlib.suppress(OSError, DataError):
            kind = find_kind(path)
            if kind == "h5ad":
                group = stack.enter_context(h5py.File(path, "r"))
            elif kind == "zarr":
                import zarr

                group = zarr.open_group(path, mode="r")
                stack.callback(group.store.close)
        yield group


def _copy(path: Path, out: Path, settings: Settings) -> None:
    kind = find_kind(path)
    if kind == "h5ad":
        shutil.copyfile(path, out)
        _require_modern(out)
        return
    with translate_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on formats, and on names
        if kind == "zarr":
            anndata.read_zarr(path).write_h5ad(out)
            return
        with open_source(path, settings.make_config(path)) as source:
            _gather(source).write_h5ad(out)


def _gather(source: Source) -> anndata.AnnData:
    """A file of another format in memory: X as it is stored, all cells under their names, all annotations."""
    blocks = [block for _, _, block in iterate_blocks(source)]
    x = sp.vstack(blocks, format="csr") if sp.issparse(blocks[0]) else np.concatenate(blocks)
    obs = pd.DataFrame({name: _to_plain(source.read_column(name)) for name in source.columns},
                       index=source.cells.astype(object))
    var = pd.DataFrame({name: _to_plain(source.read_feature_column(name)) for name in source.feature_columns},
                       index=list(source.features))
    if source.channels:
        var["channel"] = list(source.channels)
    return anndata.AnnData(X=x, obs=obs, var=var)


def _to_plain(values: Any) -> Any:
    """Numbers as they are; everything else as categories of text, which HDF5 can hold whatever stood there."""
    array = np.asarray(values)
    if array.dtype.kind in "iufb":
        return array
    plain = pd.Series(np.asarray(values, dtype=object))
    return pd.Categorical(plain.astype(str).where(plain.notna(), None))


def _make_columns(calls: Calls) -> dict[str, Any]:
    return {LABEL: pd.Categorical.from_codes(calls.label, categories=list(calls.labels)), CONFIDENCE: calls.confidence,
            UNKNOWN: calls.unknown, **calls.columns}


def _describe(model: ModelFolder, calls: Calls) -> dict[str, Any]:
    """What goes into uns: enough to find the run on its chain, and to read the probabilities."""
    record = model.card.provenance
    return {
        "model": model.card.name, "version": model.card.version, "chain_id": record.chain_id,
        "contract": record.contract, "run": record.run, "round": record.round, "spec": record.spec,
        "checkpoint": record.checkpoint, "head": record.head, "temperature": model.temperature,
        "threshold": model.threshold, "is_calibrated": model.card.evaluation is not None, "state": calls.state,
        "features_found": calls.features_found, "features_panel": len(model.spec.panel.features),
        "labels": np.array(calls.labels, dtype=object), **calls.about,
    }


def _require_modern(path: Path) -> None:
    """Rewrite a file of an old anndata in today's format; columns cannot be added to the old one."""
    with h5py.File(path, "r") as file:
        if is_modern(file):
            return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on old files
        anndata.read_h5ad(path).write_h5ad(path)


def _require_free(file: Any, columns: Iterable[str], *, source: Path) -> None:
    wanted = [*(("obs", name) for name in columns), ("obsm", PROBABILITIES), ("uns", PROVENANCE)]
    for group, name in wanted:
        if group in file and hasattr(file[group], "keys") and name in file[group]:
            raise DataError(f"{source} has .{group}[{name!r}] already",
                            hint="call the file as it was before, or remove that entry")


def _add(file: h5py.File, obs: dict[str, Any], probabilities: Singles, about: dict[str, Any], *, source: Path) -> None:
    table = file["obs"]
    _require_free(file, obs, source=source)
    order = [*table.attrs["column-order"].tolist(), *obs]
    for name, column in obs.items():
        write_elem(table, name, column)
    table.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())
    for group in ("obsm", "uns"):
        if group not in file:
            write_elem(file, group, {})
    write_elem(file["obsm"], PROBABILITIES, probabilities)
    write_elem(file["uns"], PROVENANCE, about)
