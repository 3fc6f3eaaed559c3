"""What a file of cells holds, and what is wrong with it, for the person who keeps it.

Shows no cell's name, and of X only extremes and medians.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from swarmchain.config import DataConfig
from swarmchain.data import name_features
from swarmchain.labels import encode_labels, read_label_map
from swarmchain.names import find_kind
from swarmchain.normalization import Finding, describe_totals, find_state
from swarmchain.readers import open_source
from swarmchain.source import Source, check_names, find_rows, iterate_blocks, read_column, read_donors, read_sample

CELLS_PER_CLASS_MIN = 10
FLOAT16_EXACT = 2048  # whole numbers above it are rounded


@dataclass(frozen=True)
class Inspection:
    """What was found.

    `features` counts those that a run would see; `names` says of what kind they are; `channels` pairs detector and
    antigen, of FCS files; `why` are the numbers that tell `state`. `labels`, `shared` (the run's words) and `donors`
    count cells; `labels` and `donors` are None where no column is named. `unlabelled` cells and `excluded` ones are
    left out.
    """

    path: str
    kind: str
    cells: int
    features: int
    names: str
    storage: str
    dtype: str
    state: str
    why: str
    columns: tuple[str, ...]
    channels: tuple[tuple[str, str], ...]
    labels: dict[str, int] | None
    shared: dict[str, int] | None
    unlabelled: int
    excluded: int
    donors: dict[str, int] | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def inspect_data(path: Path, config: DataConfig) -> Inspection:
    """Look at a file as a run would, without a run.

    Parameters
    ----------
    config
        The site's settings; an empty `label_column` asks for no labels.

    Raises
    ------
    DataError
        If the file cannot be used by any run; the message names the file, the key and the remedy.
    """
    with open_source(path, config) as source:
        check_names(source, config)
        names, kept = name_features(source, config, None)
        keep = find_rows(source, config.where)
        sample = read_sample(source)
        finding = find_state(sample) if config.state == "auto" else Finding(config.state, "[data] state says so")
        labels, unlabelled = _count(source, config.label_column, "label_column", keep)
        donors = _count_donors(source, config, keep)
        shared, excluded = _share(labels, config)
        kind = find_kind([names[i] for i in kept])
        warnings = (
            *source.remarks,
            *_warn_values(source, finding),
            *describe_totals(sample, finding, are_genes=kind != "markers" and source.kind != "table"),
            *_warn_labels(shared, unlabelled, config),
            *_warn_donors(donors),
        )
        return Inspection(
            path=str(path), kind=source.kind, cells=int(keep.sum()), features=len(kept), names=kind,
            storage=source.storage, dtype=str(sample.dtype), state=finding.state, why=finding.why,
            columns=source.columns, channels=tuple(zip(source.channels, source.features, strict=False)),
            labels=labels, shared=shared, unlabelled=unlabelled, excluded=excluded, donors=donors, warnings=warnings,
        )


def _count(source: Source, column: str, key: str, keep: Any) -> tuple[dict[str, int] | None, int]:
    if not column:
        return None, 0
    codes, labels = encode_labels(read_column(source, column, key))
    codes = codes[keep]
    counts = np.bincount(codes[codes >= 0], minlength=len(labels)).tolist()
    return {label: n for label, n in zip(labels, counts, strict=True) if n}, int((codes < 0).sum())


def _count_donors(source: Source, config: DataConfig, keep: Any) -> dict[str, int] | None:
    donors = read_donors(source, config)
    if donors is None:
        return None
    names, counts = np.unique(donors[keep], return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def _share(labels: dict[str, int] | None, config: DataConfig) -> tuple[dict[str, int] | None, int]:
    if labels is None:
        return None, 0
    mapping = read_label_map(config)
    shared: dict[str, int] = {}
    for label, n in labels.items():
        name = mapping.get_shared(label)
        shared[name] = shared.get(name, 0) + n
    excluded = shared.pop("", 0)
    return dict(sorted(shared.items())), excluded


def _warn_values(source: Source, finding: Finding) -> Iterator[str]:
    """Whole numbers, NaN and the like over all rows, not only the sample."""
    broken = negative = rounded = large = empty = 0
    for _, _, x in iterate_blocks(source):
        values = x.data if sp.issparse(x) else x
        if values.dtype == np.float16:
            rounded += int((np.abs(values) > FLOAT16_EXACT).sum())
        broken += int((~np.isfinite(values)).sum()) if values.dtype.kind == "f" else 0
        negative += int((values < 0).sum())
        large += int((values > np.float32(2**24)).sum()) if finding.state == "counts" else 0
        empty += int((np.asarray(abs(x).sum(axis=1)).ravel() == 0).sum())
    if broken:
        yield f"{broken} values of X are NaN or infinite: a run refuses them; remove those cells or features"
    if negative and finding.state in ("counts", "log1p", "proportions"):
        yield f"{negative} values of X are negative though it looks like {finding.state}: a run refuses them"
    if finding.state == "scaled":
        yield f"{finding.fault}: a run refuses it; point [data] layer at counts or log1p values"
    if rounded:
        yield f"X is float16, which rounds whole numbers above {FLOAT16_EXACT}: {rounded} values; write float32"
    if large:
        yield f"{large} counts are above 2^24 and will be rounded to float32"
    if empty:
        yield f"{empty} cells have no value but 0"


def _warn_labels(shared: dict[str, int] | None, unlabelled: int, config: DataConfig) -> Iterator[str]:
    if shared is None:
        return
    if not shared:
        yield f"column {config.label_column!r} holds no label that is kept: no run can use this file"
    elif len(shared) == 1:
        yield f"one class only ({next(iter(shared))!r}): a run refuses it unless [data] classes_min = 1"
    if unlabelled:
        yield f"{unlabelled} cells have no label and are left out"
    few = [label for label, n in shared.items() if n < CELLS_PER_CLASS_MIN]
    if few:
        yield f"fewer than {CELLS_PER_CLASS_MIN} cells of {', '.join(few)}: their sums say much about single cells"


def _warn_donors(donors: dict[str, int] | None) -> Iterator[str]:
    if donors is None:
        return
    if donors.get("", 0):
        yield f"{donors['']} cells have no donor"
    if len(set(donors) - {""}) == 1:
        yield "one donor only: nothing here can tell donors from anything else"
