"""A model folder and a file of new cells → a call for each cell or row, and pictures of the calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

from swarmchain.calls import (
    ATTENTION,
    CONFIDENCE,
    LABEL,
    UNKNOWN,
    Calls,
    Ints,
    Settings,
    Singles,
    Truth,
    count_calls,
    make_calls,
    open_cells,
    read_umap,
)
from swarmchain.card import ModelFolder
from swarmchain.errors import ConfigError
from swarmchain.model import load_model, predict_probabilities
from swarmchain.spec import CellTypeSpec, Model
from swarmchain.stacking import HomeModel

# from cells on the panel, standardised [cells, panel], to logits [cells, labels]
Caller = Callable[[Singles], Singles]


def call_cells(model: ModelFolder, path: Path, settings: Settings, *, home: HomeModel | None = None) -> Calls:
    """Call every cell of a file; where the model calls donors from one row each, every row.

    With `home` by a site's mixture, whose probabilities stand as they are: the site's validation cells weighed them.
    Give the model without its evaluation then, which says nothing of a mixture.

    Raises
    ------
    ConfigError
        If the model calls bags of cells: see `predict_donors`.
    DataError
        If the file cannot serve the model: too little of its panel is there, or X is in a state from which the model's
        cannot be made.
    """
    caller = _prepare(model) if home is None else _prepare_mixture(model, home)
    with open_cells(model, path, settings) as cells:
        logits = np.empty((cells.matrix.cells, len(model.spec.labels)), np.float32)
        for rows, x, _ in cells.read_batches():
            logits[rows] = caller(x)
        calls = make_calls(model, logits, state=cells.matrix.state, features_found=cells.features_found)
    about = {} if home is None else {"home_site": home.card.site, "home_weights": dict(home.weights)}
    return replace(calls, about=about)


def draw_calls(folder: Path, model: ModelFolder, path: Path, calls: Calls, settings: Settings, *,
               truth: Truth | None = None, attention: Singles | None = None) -> list[Path]:
    """UMAPs by label, by confidence and by whether a cell is unknown; of the file's own `X_umap`, if it has one.

    With `truth`, one more by whether the call was right; with `attention` [cells], one more by that.
    """
    from swarmchain.plots import CELLS_MAX, compute_umap, plot_umap

    count = len(calls.label)
    rows = np.arange(count) if count <= CELLS_MAX else np.sort(
        np.random.default_rng(0).choice(count, CELLS_MAX, replace=False))
    obs = pd.DataFrame({LABEL: np.array(calls.labels)[calls.label[rows]], CONFIDENCE: calls.confidence[rows],
                        UNKNOWN: np.where(calls.unknown[rows], "unknown", "called")}, index=rows.astype(str))
    embedding = read_umap(path)
    if embedding is None:
        data = compute_umap(anndata.AnnData(_read_panel(model, path, settings, rows), obs=obs))
    else:
        data = anndata.AnnData(obs=obs, obsm={"X_umap": embedding[rows]})
    columns = {LABEL: "Calls", CONFIDENCE: "Confidence", UNKNOWN: "Called and unknown"}
    if truth is not None:
        data.obs["swarm_right"] = (truth.label == calls.label)[rows]
        columns["swarm_right"] = f"Calls against {truth.column}"
    if attention is not None:
        data.obs[ATTENTION] = attention[rows]
        columns[ATTENTION] = "Attention, times that of its sample's mean cell"
    drawn = []
    for kind in ("png", "svg"):
        for column, words in columns.items():
            drawn.append(folder / f"umap-{column.removeprefix('swarm_')}.{kind}")
            plot_umap(data, column, drawn[-1], title=words, is_rare=column == ATTENTION)
    return drawn


def draw_confusion(folder: Path, truth: Truth, calls: Calls, *, unit: str = "cells") -> list[Path]:
    """The confusion matrix of calls against labels that a file has already, as PNG and SVG."""
    from swarmchain.plots import plot_confusion

    drawn = [folder / f"confusion.{kind}" for kind in ("png", "svg")]
    for path in drawn:
        plot_confusion(count_calls(truth, calls), calls.labels, path, title=f"Calls against {truth.column}", unit=unit)
    return drawn


def _prepare(model: ModelFolder) -> Caller:
    if not isinstance(model.spec.model, Model):
        raise ConfigError(f"a model of kind {model.spec.model.kind} calls samples, not cells",
                          hint="say whose cells are whose: --donor-column, --sample-column")
    network = load_model(model.spec, model.tensors).eval()

    def call(x: Singles) -> Singles:
        with torch.inference_mode():
            logits: Singles = network(torch.from_numpy(x)).numpy()
        return logits

    return call


def _prepare_mixture(model: ModelFolder, home: HomeModel) -> Caller:
    assert isinstance(model.spec, CellTypeSpec)
    networks = {name: load_model(model.spec, state)
                for name, state in {**home.networks, "swarm": model.tensors}.items()}

    def call(x: Singles) -> Singles:
        chances = home.mix({name: predict_probabilities(network, x) for name, network in networks.items()})
        found: Singles = np.log(np.maximum(chances, np.finfo(np.float32).tiny))
        return found

    return call


def _read_panel(model: ModelFolder, path: Path, settings: Settings, rows: Ints) -> Singles:
    """Chosen cells, standardised, [rows, panel]."""
    with open_cells(model, path, settings) as cells:
        parts = [x[rows[(rows >= here.start) & (rows < here.stop)] - here.start] for here, x, _ in cells.read_batches()]
    return np.concatenate(parts)
