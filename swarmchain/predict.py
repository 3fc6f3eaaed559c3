"""A model folder and a file of new cells → the same file with calls, confidences and probabilities beside the cells.

The output is a copy of the input's bytes, to which columns are added: X, layers and everything else stay what they
were. Nothing is half-written: it is made under another name and renamed at the end.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from anndata.io import read_elem, write_elem

from swarmchain.agreement import standardize
from swarmchain.calibration import compute_class_scores, compute_log_probabilities
from swarmchain.card import ModelFolder
from swarmchain.errors import ConfigError, DataError
from swarmchain.matrix import BATCH, Matrix, is_modern, read_matrix
from swarmchain.model import build_model, load_state
from swarmchain.selection import Cells, select_panel

LABEL, CONFIDENCE, UNKNOWN, PROBABILITIES, PROVENANCE = (
    "swarm_label", "swarm_confidence", "swarm_unknown", "swarm_probabilities", "swarmchain")

Singles = npt.NDArray[np.float32]
# from cells on the panel, standardised [cells, panel], to logits [cells, labels]
Caller = Callable[[Singles], Singles]


@dataclass(frozen=True)
class Settings:
    """How new cells are read: see `matrix.read_matrix`; `share_min` in place of the spec's own, if not None."""

    layer: str | None = None
    state: str = "auto"
    share_min: float | None = None
    batch: int = BATCH


@dataclass(frozen=True)
class Truth:
    """Labels that a file carries already: index into the model's [cells], -1 where it is none of the model's."""

    column: str
    label: npt.NDArray[np.int64]
    is_given: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Calls:
    """What a model says of new cells.

    `label` [cells] indexes `labels`; `probabilities` [cells, labels] are calibrated; `confidence` [cells] is their
    largest; `unknown` [cells] says where that is below the model's threshold. `columns` are further ones for obs.
    """

    labels: tuple[str, ...]
    label: npt.NDArray[np.int64]
    confidence: Singles
    unknown: npt.NDArray[np.bool_]
    probabilities: Singles
    state: str
    features_found: int
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


def call_cells(model: ModelFolder, path: Path, settings: Settings = Settings()) -> Calls:
    """Call every cell of a file.

    Raises
    ------
    DataError
        If the file cannot serve the model: too little of its panel is there, or X is in a state from which the model's
        cannot be made.
    """
    spec = model.spec
    panel = spec.panel
    if settings.share_min is not None:
        panel = panel.model_copy(update={"share_min": settings.share_min})
    caller = CALLERS[spec.task](model)
    with read_matrix(path, panel, spec.normalization, layer=settings.layer, state=settings.state) as matrix:
        found = _count_features(matrix, panel.features)
        probabilities = np.empty((matrix.cells, len(spec.labels)), np.float32)
        for rows, x in matrix.read_batches(settings.batch):
            names = np.empty(rows.stop - rows.start, dtype=np.str_)
            chosen, present = select_panel(Cells(x, matrix.features, names, names, matrix.source), panel)
            logits = caller(standardize(chosen, present, model.tensors))
            probabilities[rows] = np.exp(compute_log_probabilities(logits, model.temperature))
        confidence = probabilities.max(axis=1)
        return Calls(spec.labels, probabilities.argmax(axis=1), confidence, confidence < np.float32(model.threshold),
                     probabilities, matrix.state, found)


def annotate(path: Path, out: Path, model: ModelFolder, calls: Calls) -> None:
    """Write a copy of `path` with the calls in it.

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
        shutil.copyfile(path, temporary)
        _require_modern(temporary)
        with h5py.File(temporary, "r+") as file:
            _add(file, obs, calls.probabilities, _describe(model, calls), source=path)
        temporary.replace(out)
    except OSError as exc:
        raise ConfigError(f"cannot write {out}: {exc.strerror or exc}", hint="check permissions and free space"
                          ) from exc
    finally:
        temporary.unlink(missing_ok=True)


def read_truth(path: Path, column: str, labels: tuple[str, ...]) -> Truth:
    """The labels that a column of obs holds. Raises `DataError` if there is no such column."""
    with h5py.File(path, "r") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on old files
        obs = read_elem(file["obs"]) if is_modern(file) else anndata.read_h5ad(path).obs
    if column not in obs:
        raise DataError(f"{path} has no column {column!r} in .obs",
                        hint=f"its columns: {', '.join(map(str, obs.columns)) or '(none)'}")
    index = {label: i for i, label in enumerate(labels)}
    return Truth(column, np.array([index.get(str(value), -1) for value in obs[column]], dtype=np.int64),
                 obs[column].notna().to_numpy())


def score_calls(truth: Truth, calls: Calls) -> dict[str, Any]:
    """F1 on the cells that carry one of the model's labels; of those that carry another, how many are unknown."""
    known = truth.label >= 0
    foreign = ~known & truth.is_given
    confusion = _count(truth, calls)
    f1, support = compute_class_scores(confusion)
    scored = [value for value in f1 if value is not None]
    return {
        "column": truth.column, "cells": int(known.sum()), "macro_f1": sum(scored) / len(scored) if scored else None,
        "per_class": {label: {"f1": value, "support": n}
                      for label, value, n in zip(calls.labels, f1, support, strict=True) if n},
        "foreign": {"cells": int(foreign.sum()), "unknown": int((foreign & calls.unknown).sum())},
    }


def require_free(path: Path, out: Path) -> None:
    """See that the output is not the input, and its columns not there yet, before any work. See `annotate`."""
    if out.exists() and path.exists() and out.samefile(path):
        raise ConfigError(f"{out} is the input itself", hint="name another file with --out")
    try:
        with h5py.File(path, "r") as file:
            _require_free(file, (LABEL, CONFIDENCE, UNKNOWN), source=path)
    except OSError:
        return  # whoever reads it says what is wrong


def draw_calls(folder: Path, model: ModelFolder, path: Path, calls: Calls, settings: Settings = Settings(), *,
               truth: Truth | None = None) -> list[Path]:
    """UMAPs by label, by confidence and by whether a cell is unknown; of the file's own `X_umap`, if it has one.

    With `truth`, also one by whether the call was right, and the confusion matrix.
    """
    from swarmchain.plots import CELLS_MAX, compute_umap, plot_confusion, plot_umap

    count = len(calls.label)
    rows = np.arange(count) if count <= CELLS_MAX else np.sort(
        np.random.default_rng(0).choice(count, CELLS_MAX, replace=False))
    obs = pd.DataFrame({LABEL: np.array(calls.labels)[calls.label[rows]], CONFIDENCE: calls.confidence[rows],
                        UNKNOWN: np.where(calls.unknown[rows], "unknown", "called")}, index=rows.astype(str))
    embedding = _read_umap(path)
    if embedding is None:
        data = compute_umap(anndata.AnnData(_read_panel(model, path, settings, rows), obs=obs))
    else:
        data = anndata.AnnData(obs=obs, obsm={"X_umap": embedding[rows]})
    columns = {LABEL: "Calls", CONFIDENCE: "Confidence", UNKNOWN: "Called and unknown"}
    if truth is not None:
        data.obs["swarm_right"] = (truth.label == calls.label)[rows]
        columns["swarm_right"] = f"Calls against {truth.column}"
    drawn = []
    for kind in ("png", "svg"):
        for column, words in columns.items():
            drawn.append(folder / f"umap-{column.removeprefix('swarm_')}.{kind}")
            plot_umap(data, column, drawn[-1], title=words)
        if truth is not None:
            drawn.append(folder / f"confusion.{kind}")
            plot_confusion(_count(truth, calls), calls.labels, drawn[-1], title=f"Calls against {truth.column}")
    return drawn


def summarize(model: ModelFolder, calls: Calls) -> dict[str, Any]:
    """Counts for a person and for tools."""
    counts = np.bincount(calls.label, minlength=len(calls.labels))
    unknown = np.bincount(calls.label[calls.unknown], minlength=len(calls.labels))
    return {
        "cells": len(calls.label), "unknown": int(calls.unknown.sum()), "state": calls.state,
        "features": {"found": calls.features_found, "panel": len(model.spec.panel.features)},
        "labels": {label: {"cells": int(n), "unknown": int(u)}
                   for label, n, u in zip(calls.labels, counts, unknown, strict=True)},
        "confidence_mean": float(calls.confidence.mean(dtype=np.float64)),
        "is_calibrated": model.card.evaluation is not None, "temperature": model.temperature,
        "threshold": model.threshold, "checkpoint": model.card.provenance.checkpoint,
    }


def _prepare_cell_type(model: ModelFolder) -> Caller:
    network = build_model(model.spec)
    load_state(network, model.tensors)
    network.eval()

    def call(x: Singles) -> Singles:
        with torch.inference_mode():
            logits: Singles = network(torch.from_numpy(x)).numpy()
        return logits

    return call


# One entry for each task of `spec` that makes a model; what it makes is asked batch by batch.
CALLERS: dict[str, Callable[[ModelFolder], Caller]] = {"cell_type": _prepare_cell_type}


def _count_features(matrix: Matrix, panel: tuple[str, ...]) -> int:
    there = set(matrix.features)
    return sum(name in there for name in panel)


def _count(truth: Truth, calls: Calls) -> npt.NDArray[np.int64]:
    """Cells by label (row) and call (column), of the cells that carry one of the model's labels."""
    known, labels = truth.label >= 0, len(calls.labels)
    flat = np.bincount(truth.label[known] * labels + calls.label[known], minlength=labels * labels)
    return flat.reshape(labels, labels)


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
        "labels": np.array(calls.labels, dtype=object),
    }


def _require_modern(path: Path) -> None:
    """Rewrite a file of an old anndata in today's format; columns cannot be added to the old one."""
    with h5py.File(path, "r") as file:
        if is_modern(file):
            return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on old files
        anndata.read_h5ad(path).write_h5ad(path)


def _require_free(file: h5py.File, columns: Iterable[str], *, source: Path) -> None:
    wanted = [*(("obs", name) for name in columns), ("obsm", PROBABILITIES), ("uns", PROVENANCE)]
    for group, name in wanted:
        if isinstance(file.get(group), h5py.Group) and name in file[group]:
            raise DataError(f"{source} has .{group}[{name!r}] already",
                            hint="call the file as it was before, or remove that entry")


def _read_umap(path: Path) -> Any:
    with h5py.File(path, "r") as file:
        found = file.get("obsm/X_umap")
        return found[:, :2] if isinstance(found, h5py.Dataset) else None


def _read_panel(model: ModelFolder, path: Path, settings: Settings, rows: npt.NDArray[np.int64]) -> Singles:
    """Chosen cells, standardised, [rows, panel]."""
    panel, parts = model.spec.panel.model_copy(update={"share_min": 0.0}), []
    with read_matrix(path, panel, model.spec.normalization, layer=settings.layer, state=settings.state) as matrix:
        for here, x in matrix.read_batches(settings.batch):
            chosen = rows[(rows >= here.start) & (rows < here.stop)] - here.start
            names = np.empty(len(chosen), dtype=np.str_)
            found, present = select_panel(Cells(x[chosen], matrix.features, names, names, matrix.source), panel)
            parts.append(standardize(found, present, model.tensors))
    return np.concatenate(parts)


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
