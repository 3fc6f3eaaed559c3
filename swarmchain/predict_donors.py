"""A model of donors and a file of new cells → a call for each sample, and which cells carried it.

Cells are read once, a batch at a time and in the order of the file, whichever sample they are of: what is kept of a
sample is one row, and of a cell with attention one number.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.bags import Pooling, SetNetwork
from swarmchain.calls import (
    ATTENTION,
    Calls,
    Ints,
    Settings,
    Singles,
    Truth,
    make_calls,
    open_cells,
    read_annotation,
    summarize,
)
from swarmchain.card import ModelFolder
from swarmchain.config import write_file
from swarmchain.donors import group_samples
from swarmchain.errors import ConfigError, DataError
from swarmchain.labels import encode_labels
from swarmchain.model import build_model, load_state
from swarmchain.predict import call_cells
from swarmchain.readers import open_source
from swarmchain.source import read_donors, read_samples
from swarmchain.spec import DonorSpec, Model

NO_TYPE = "(none)"


@dataclass(frozen=True)
class Owners:
    """Whose cells are whose: samples by name, the donor of each ("" if not known), the sample of each cell [cells].

    `kinds` are the cells' types and `kind` [cells] an index into them, where a column names them.
    """

    names: tuple[str, ...]
    donors: tuple[str, ...]
    of_cell: Ints
    kinds: tuple[str, ...] = ()
    kind: Ints | None = None


@dataclass(frozen=True)
class SampleCalls:
    """What a model says of new samples. `calls` has a row for each; `attention` [cells] sums to 1 over each sample."""

    owners: Owners
    calls: Calls
    attention: Singles | None = None

    @property
    def cells(self) -> Ints:
        """Number of cells, [samples]."""
        return np.bincount(self.owners.of_cell, minlength=len(self.owners.names))

    def count_kinds(self) -> Ints:
        """Cells by type, [samples, types]."""
        return self._sum_kinds(None).astype(np.int64)

    def sum_attention(self) -> npt.NDArray[np.float64]:
        """Attention by type of cell, [samples, types]; without types [samples, 0]."""
        return self._sum_kinds(self.attention)

    def _sum_kinds(self, weights: Singles | None) -> npt.NDArray[np.float64]:
        owners, count = self.owners, len(self.owners.kinds)
        if owners.kind is None:
            return np.zeros((len(owners.names), 0))
        flat = np.bincount(owners.of_cell * count + owners.kind, weights, minlength=len(owners.names) * count)
        return flat.reshape(-1, count).astype(np.float64)

    def compute_emphasis(self) -> Singles | None:
        """Attention of each cell, times the number of its sample's cells: 1 is what every cell has on average."""
        return None if self.attention is None else (self.attention * self.cells[self.owners.of_cell]).astype(np.float32)

    def spread(self) -> Calls:
        """The same for each cell, as an annotated file holds it."""
        of, calls = self.owners.of_cell, self.calls
        columns = {} if self.attention is None else {ATTENTION: self.attention}
        return replace(calls, label=calls.label[of], confidence=calls.confidence[of], unknown=calls.unknown[of],
                       probabilities=calls.probabilities[of], columns=columns, about={"samples": self._describe()})

    def _describe(self) -> dict[str, Any]:
        """For uns: lists that go together, [samples]; names are values, since a key may not hold every sign."""
        owners, calls = self.owners, self.calls
        about: dict[str, Any] = {
            "sample": np.array(owners.names, dtype=object), "donor": np.array(owners.donors, dtype=object),
            "label": np.array(calls.labels, dtype=object)[calls.label], "confidence": calls.confidence,
            "unknown": calls.unknown, "cells": self.cells, "probabilities": calls.probabilities}
        if self.attention is not None and owners.kinds:
            about |= {"cell_types": np.array(owners.kinds, dtype=object), "attention": self.sum_attention()}
        return about


def call_samples(model: ModelFolder, path: Path, settings: Settings) -> SampleCalls:
    """Call every sample of a file.

    Raises
    ------
    ConfigError
        If types of cells are named and the model has no attention to sum over them.
    DataError
        If the file cannot serve the model: see `predict.call_cells`; it does not say whose cells are whose; or a sample
        has no cell with a value on the panel.
    """
    spec = model.spec
    if not isinstance(spec, DonorSpec):
        raise ConfigError("the model calls cells, not samples", hint="predict without columns of donors and samples")
    if settings.cell_type_column is not None and spec.model.kind != "attention":
        raise ConfigError(f"--cell-type-column: a model of kind {spec.model.kind} has no attention to sum",
                          hint="leave it out, or train a model with `swarmchain run new donor --model attention`")
    owners = read_owners(path, settings, is_row=isinstance(spec.model, Model))
    if isinstance(spec.model, Model):
        return SampleCalls(owners, call_cells(model, path, settings))
    network = build_model(spec)
    load_state(network, model.tensors)
    assert isinstance(network, SetNetwork)
    network.eval()
    pooling, measured = Pooling(network, len(owners.names)), np.zeros(len(owners.names))
    scores = np.zeros(len(owners.of_cell))
    with open_cells(model, path, settings) as cells:
        for rows, x, is_measured in cells.read_batches():
            scores[rows] = pooling.add(x, owners.of_cell[rows])
            measured += np.bincount(owners.of_cell[rows], is_measured, minlength=len(measured))
        state, found = cells.matrix.state, cells.features_found
    if not measured.all():
        name = owners.names[int(np.argmin(measured))]
        raise DataError(f"{path}: sample {name!r} has no cell with a value other than 0 on the model's panel",
                        hint="leave it out, or check that its features have the panel's names")
    calls = make_calls(model, pooling.compute_logits(), state=state, features_found=found)
    attention = None if network.attention is None else pooling.compute_attention(scores, owners.of_cell)
    return SampleCalls(owners, calls, attention)


def read_owners(path: Path, settings: Settings, *, is_row: bool) -> Owners:
    """Whose cells are whose in a file; `is_row`: every row is a sample of its own.

    Raises
    ------
    DataError
        If no column tells, a column is not there, or a sample is of two donors.
    """
    config = settings.make_config(path)
    with open_source(path, config) as source:
        named = [n for n in (config.donor_column, config.sample_column, settings.cell_type_column) if n is not None]
        for name in named:
            read_annotation(source, name)
        donors, samples = read_donors(source, config), read_samples(source, config)
        kinds: tuple[str, ...] = ()
        kind = None
        if settings.cell_type_column is not None:
            codes, words = encode_labels(read_annotation(source, settings.cell_type_column))
            kinds, kind = (*words, *([NO_TYPE] if (codes < 0).any() else ())), np.where(codes < 0, len(words), codes)
        cells = source.cells
    if is_row:
        known = np.full(len(cells), "") if donors is None else donors
        return Owners(tuple(cells.tolist()), tuple(known.tolist()), np.arange(len(cells)), kinds, kind)
    if donors is None and samples is None:
        raise DataError(f"{path}: the model calls samples, and nothing tells whose cells are whose",
                        hint="name the column with --donor-column, and --sample-column where a donor gave several")
    if donors is not None and (donors == "").any():
        raise DataError(f"{path}: {int((donors == '').sum())} cells have no {config.donor_column!r}",
                        hint="fill the column, or leave those cells out")
    owner = samples if donors is None else donors
    assert owner is not None
    of = group_samples(np.zeros(len(cells), dtype=np.int64), owner, owner if samples is None else samples,
                       source=str(path))
    donor = [""] * len(of.names) if donors is None else [of.donors[i] for i in of.donor]
    return Owners(of.names, tuple(donor), of.of_row, kinds, kind)


def group_truth(truth: Truth, owners: Owners, *, source: Path) -> Truth:
    """Labels of samples from those of their cells. Raises `DataError` if a sample has two."""
    _, first = np.unique(owners.of_cell, return_index=True)
    mixed = np.flatnonzero(truth.words != truth.words[first][owners.of_cell])
    if len(mixed):
        raise DataError(f"{source}: sample {owners.names[owners.of_cell[mixed[0]]]!r} has two labels in column "
                        f"{truth.column!r}", hint="--truth names the column with the label of each cell's sample")
    return Truth(truth.column, truth.label[first], truth.is_given[first], truth.words[first])


def list_rows(samples: SampleCalls) -> list[dict[str, Any]]:
    """One dictionary for each sample, for `--json`; attention by type of cell, the largest first."""
    owners, calls = samples.owners, samples.calls
    shares, cells = samples.sum_attention(), samples.cells
    rows = []
    for i, name in enumerate(owners.names):
        row: dict[str, Any] = {
            "sample": name, "donor": owners.donors[i], "cells": int(cells[i]),
            "label": calls.labels[int(calls.label[i])], "confidence": float(calls.confidence[i]),
            "unknown": bool(calls.unknown[i]),
            "probabilities": {label: float(p) for label, p in zip(calls.labels, calls.probabilities[i], strict=True)}}
        if samples.attention is not None and owners.kinds:
            order = np.argsort(-shares[i], kind="stable")
            row["attention"] = {owners.kinds[k]: float(shares[i, k]) for k in order}
        rows.append(row)
    return rows


def summarize_samples(model: ModelFolder, samples: SampleCalls) -> dict[str, Any]:
    """Counts of samples, as `calls.summarize` counts cells, and a row for each."""
    return {**summarize(model, samples.calls, unit="samples"), "cells": len(samples.owners.of_cell),
            "samples": list_rows(samples)}


def write_samples(path: Path, samples: SampleCalls) -> None:
    """A table with a row for each sample, as CSV. Raises `ConfigError` if it cannot be written."""
    labels, kinds = samples.calls.labels, samples.owners.kinds if samples.attention is not None else ()
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["sample", "donor", "cells", "label", "confidence", "unknown",
                    *(f"probability:{label}" for label in labels), *(f"attention:{kind}" for kind in kinds)])
    for row in list_rows(samples):
        attention: Mapping[str, float] = row.get("attention", {})
        table.writerow([row["sample"], row["donor"], row["cells"], row["label"], f"{row['confidence']:.6f}",
                        str(row["unknown"]).lower(), *(f"{row['probabilities'][label]:.6f}" for label in labels),
                        *(f"{attention[kind]:.6f}" for kind in kinds)])
    write_file(path, text.getvalue().encode())


def draw_samples(folder: Path, samples: SampleCalls) -> list[Path]:
    """Attention by type of cell for each sample, as PNG and SVG; nothing where either is not known."""
    owners, calls = samples.owners, samples.calls
    if samples.attention is None or not owners.kinds:
        return []
    from swarmchain.plots import plot_attention

    words = [f"{calls.labels[int(label)]} {confidence:.2f}{' (unknown)' if unknown else ''}"
             for label, confidence, unknown in zip(calls.label, calls.confidence, calls.unknown, strict=True)]
    order = np.lexsort([np.arange(len(words)), calls.label])
    drawn = [folder / f"attention.{kind}" for kind in ("png", "svg")]
    for path in drawn:
        plot_attention(samples.sum_attention()[order], samples.count_kinds()[order], owners.kinds,
                       [owners.names[i] for i in order], [words[i] for i in order], path)
    return drawn
