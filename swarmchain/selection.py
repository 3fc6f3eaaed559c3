"""A site's cells on a run's panel and list of labels: who is left out, and who is for validation.

Features that the site does not have are marked absent: after standardisation they are 0, which is the federated mean.
Validation cells are chosen by the hash of their names, so that they are the same in every round and on every machine;
where a run splits by donor, donors are chosen, with all their cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from swarmchain.donors import Samples, choose_validation_donors, group_samples
from swarmchain.errors import DataError
from swarmchain.labels import check_ids, explain_unmapped
from swarmchain.spec import CellSpec, DonorSpec, Minimums, Panel

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

HASHED_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Cells:
    """Annotated cells of one file, X in the state that a spec demands.

    `x` is [cells, features] sparse or dense; `labels` and `names` are [cells], as are `donors` and `samples` where
    columns name them.
    `excluded` counts the cells of labels that were left out, by the site's own labels; `ids` are Cell Ontology ids of
    labels; `unmapped` says what becomes of labels that are not on a run's list.
    """

    x: Any
    features: tuple[str, ...]
    labels: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    source: str
    donors: npt.NDArray[np.str_] | None = None
    samples: npt.NDArray[np.str_] | None = None
    excluded: Mapping[str, int] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    unmapped: Literal["refuse", "exclude"] = "refuse"


@dataclass(frozen=True)
class SiteData:
    """One site's cells on a run's panel.

    Shapes: `x` float32 [cells, panel], not standardised; `y` int64 [cells], index into the run's labels; `present`
    bool [panel]; `train` and `validation` are row numbers; `donors` int64 [cells] numbers the donors, None if they are
    not known; where the run splits by donor, `samples` int64 [cells] is an index into `sample_names`. `excluded`
    counts the cells of labels that are not the run's, `left_out` those of every label of which the site has too few
    (see `spec.Minimums`); neither are among the rows.
    """

    x: Floats
    y: Ints
    present: npt.NDArray[np.bool_]
    train: Ints
    validation: Ints
    donors: Ints | None = None
    samples: Ints | None = None
    sample_names: tuple[str, ...] = ()
    excluded: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)


def select_cells(cells: Cells, spec: CellSpec) -> SiteData:
    """Cells on a spec's panel and label list.

    Raises
    ------
    DataError
        If too little of the panel is there, a label is not on the run's list and may not be left out, or fewer cells
        or donors are left to train on than the spec's minimums.
    """
    check_ids(cells.ids, spec, source=cells.source)
    is_train = _choose_training(cells, spec)
    # before labels are held against the run's list: one that no site has enough of is not on it
    few = count_few(cells, is_train, spec.minimums)
    if few:
        keep = ~np.isin(cells.labels, list(few))
        cells, is_train = take_cells(cells, keep), is_train[keep]
    is_known = find_known(cells, spec)
    if not is_known.all():
        unknown, counts = np.unique(cells.labels[~is_known], return_counts=True)
        excluded = dict(zip(unknown.tolist(), counts.tolist(), strict=True))
        cells, is_train = take_cells(cells, is_known), is_train[is_known]
        cells = replace(cells, excluded={**cells.excluded, **excluded})
    x, present = select_panel(cells, spec.panel)
    index = {label: i for i, label in enumerate(spec.labels)}
    inverse, found = _factorize(cells.labels)
    y = np.array([index[label] for label in found], dtype=np.int64)[inverse]
    donors = None if cells.donors is None else _factorize(cells.donors)[0]
    data = SiteData(x=x, y=y, present=present, train=np.flatnonzero(is_train), validation=np.flatnonzero(~is_train),
                    donors=donors, excluded=cells.excluded, left_out=few)
    check_minimums(data, spec.minimums, source=cells.source)
    if spec.split_by == "cell":
        return data
    samples = group_cells(cells)
    if isinstance(spec, DonorSpec):
        check_labels(y[is_train], spec, source=cells.source)
    return replace(data, samples=samples.of_row, sample_names=samples.names)


def _choose_training(cells: Cells, spec: CellSpec) -> npt.NDArray[np.bool_]:
    """Which cells are for training, [cells]: all but the validation cells, or those of the validation donors."""
    if spec.split_by == "donor":
        samples = group_cells(cells)
        donors = choose_validation_donors(samples, share=spec.validation_share)
        chosen: npt.NDArray[np.bool_] = ~np.isin(samples.donor[samples.of_row], donors)
        return chosen
    is_train = np.ones(len(cells.names), dtype=np.bool_)
    codes, _ = _factorize(cells.labels)
    is_train[choose_validation(cells.names, codes, share=spec.validation_share)] = False
    return is_train


def group_cells(cells: Cells) -> Samples:
    """The donors' samples, with labels as numbers in their order.

    Raises
    ------
    DataError
        If a cell's donor is not known, or a sample has two labels or two donors.
    """
    if cells.donors is None or (cells.donors == "").any():
        unknown = "whose cells are whose" if cells.donors is None else (
            f"whose {int((cells.donors == '').sum())} of its labelled cells are")
        raise DataError(f"{cells.source}: the run splits by donor, and nothing tells {unknown}",
                        hint="set [data] donor_column, and sample_column where a donor gave several samples")
    codes, _ = _factorize(cells.labels)
    return group_samples(codes, cells.donors, cells.donors if cells.samples is None else cells.samples,
                         source=cells.source)


def check_labels(y: Ints, spec: DonorSpec, *, source: str) -> None:
    """Whether a site's training donors have enough labels between them. Raises `DataError` if not."""
    labels = sorted(spec.labels[i] for i in np.unique(y))
    if len(labels) < spec.labels_min:
        raise DataError(
            f"{source}: all donors to train on have the label {', '.join(labels)!r}; the run asks for "
            f"{spec.labels_min} labels at each site",
            hint="check [data] label_column, or agree on a run with a lower labels_min",
        )


def find_known(cells: Cells, spec: CellSpec) -> npt.NDArray[np.bool_]:
    """Which cells' labels are on the run's list, [cells]. Raises `DataError` if others may not be left out."""
    inverse, found = _factorize(cells.labels)
    is_known = np.isin(found, spec.labels)
    unknown = [label for label, known in zip(found, is_known, strict=True) if not known]
    if unknown and cells.unmapped == "refuse":
        words, hint = explain_unmapped(unknown[0], cells.ids, spec)
        raise DataError(f"{cells.source}: {words} ({len(unknown)} such labels)", hint=hint)
    chosen: npt.NDArray[np.bool_] = is_known[inverse]
    return chosen


def take_cells(cells: Cells, keep: npt.NDArray[np.bool_]) -> Cells:
    """The cells that `keep`, [cells], marks."""
    return replace(cells, x=cells.x[keep], labels=cells.labels[keep], names=cells.names[keep],
                   donors=None if cells.donors is None else cells.donors[keep],
                   samples=None if cells.samples is None else cells.samples[keep])


def count_few(cells: Cells, is_train: npt.NDArray[np.bool_], minimums: Minimums) -> dict[str, int]:
    """Labels with too few training cells, or with too few donors among them, and how many cells each has in all."""
    few: dict[str, int] = {}
    codes, labels = _factorize(cells.labels)
    for code, label in enumerate(labels):
        has_label = codes == code
        chosen = has_label & is_train
        donors = None if cells.donors is None else len(np.unique(cells.donors[chosen]))
        if chosen.sum() < minimums.cells_per_label or (donors is not None and donors < minimums.donors_per_label):
            few[label] = int(has_label.sum())
    return few


def check_minimums(data: SiteData, minimums: Minimums, *, source: str) -> None:
    """Whether a site has enough to take part. Raises `DataError` if not."""
    if len(data.train) == 0 and not data.left_out:
        raise DataError(f"{source}: no labelled cell to train on", hint="check label_column and label_map")
    if len(data.train) < minimums.cells:
        rest = f", after {sum(data.left_out.values())} of too rare labels were left out" if data.left_out else ""
        raise DataError(f"{source}: {len(data.train)} training cells{rest}, the run asks for {minimums.cells}",
                        hint="a site with so few does not take part, so that no sum is over a handful of cells; "
                             "`run new statistics --cells-min` sets the minimum")
    if not max(minimums.donors, minimums.donors_per_label):
        return
    if data.donors is None:
        raise DataError(f"{source}: the run asks for a minimum of donors, and the cells' donors are not known",
                        hint="set [data] donor_column in site.toml")
    donors = len(np.unique(data.donors[data.train]))
    if donors < minimums.donors:
        raise DataError(f"{source}: {donors} donors among the training cells, the run asks for {minimums.donors}",
                        hint="a site with so few does not take part; `run new statistics --donors-min` sets the number")


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
