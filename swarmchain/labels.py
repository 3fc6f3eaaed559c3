"""What cells are called: a site's labels → the run's list, by a table of the site's own. Pure, but for reading it.

A mapping file has the columns `label` (the site's), `shared` (the run's; empty leaves the cells out) and, if wanted,
`ontology` (a Cell Ontology id, CL:0000000). A run may say for each label its id and the coarser label that it is a kind
of, so that a site with coarser labels is told what to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from swarmchain.config import DataConfig
from swarmchain.errors import DataError
from swarmchain.spec import CellSpec, Term

if TYPE_CHECKING:
    import pandas as pd

TABLE_BYTES_MAX = 512 << 20
MAP_ROWS_MAX = 100_000
MAP_HINT = ('map it in [data.label_map] or label_file: "its name" = "the run\'s name", or "" to leave it out; or set '
            '[data] unmapped = "exclude"')

_CELL_ONTOLOGY = re.compile(r"^CL:\d{7}$")


@dataclass(frozen=True)
class LabelMap:
    """A site's label → the run's ("" leaves out), and a site's label → its Cell Ontology id."""

    shared: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    source: str = "site.toml"

    def get_shared(self, label: str) -> str:
        """The run's name of a label; its own where none is given."""
        return self.shared.get(label, label)


def read_table(path: Path, *, key: str) -> pd.DataFrame:
    """A CSV or TSV (.gz) as strings; missing values are empty.

    Raises
    ------
    DataError
        If it cannot be read, has no row, or a column twice. `key` is the setting that names it.
    """
    import pandas as pd

    hint = f"[data] {key} must name a CSV or TSV with a header line"
    try:
        if path.stat().st_size > TABLE_BYTES_MAX:
            raise DataError(f"{path} is longer than {TABLE_BYTES_MAX} bytes", hint=hint)
        header = pd.read_csv(path, sep=find_separator(path), dtype=str, header=None, nrows=1, keep_default_na=False)
        table = pd.read_csv(path, sep=find_separator(path), dtype=str, keep_default_na=False, index_col=False)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}", hint=hint) from exc
    except ValueError as exc:  # pandas' parser errors are such
        raise DataError(f"cannot read {path}: {str(exc).splitlines()[0]}", hint=hint) from exc
    names = [str(v) for v in header.iloc[0]]
    twice = next((n for n in names if names.count(n) > 1), None) if len(names) < 1_000 else None
    if twice is not None:
        raise DataError(f"{path}: column {twice!r} stands twice", hint=hint)
    if table.empty:
        raise DataError(f"{path} has no rows", hint=hint)
    return table


def take_keys(table: pd.DataFrame, path: Path, key: str | None) -> pd.Series[str]:
    """The column that names the cells or files, without white space: `key`, or else the first. Raises `DataError`."""
    if key is not None and key not in table:
        raise DataError(f"{path} has no column {key!r}", hint="correct [data] labels_key")
    return table[key or table.columns[0]].str.strip()


def find_separator(path: Path) -> str:
    """Tab for .tsv and .txt, with or without .gz; else a comma."""
    suffixes = {suffix.lower() for suffix in path.suffixes[-2:]}
    return "\t" if suffixes & {".tsv", ".txt"} else ","


def read_label_map(config: DataConfig) -> LabelMap:
    """[data.label_map] and [data] label_file together; the former wins.

    Raises
    ------
    DataError
        If the file lacks a column, names a label twice, or holds an id that is none of the Cell Ontology's.
    """
    if config.label_file is None:
        return LabelMap(dict(config.label_map))
    path = Path(config.label_file)
    table = read_table(path, key="label_file")
    missing = [c for c in ("label", "shared") if c not in table]
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}", hint="it needs label, shared and, if wanted, ontology")
    if len(table) > MAP_ROWS_MAX:
        raise DataError(f"{path} has {len(table)} rows", hint="one row for each label, not for each cell")
    shared: dict[str, str] = {}
    ids: dict[str, str] = {}
    terms = table["ontology"] if "ontology" in table else [""] * len(table)
    for label, name, term in zip(table["label"], table["shared"], terms, strict=True):
        label, name, term = label.strip(), name.strip(), term.strip()
        if label in shared:
            raise DataError(f"{path}: label {label!r} stands twice", hint="one row for each label")
        if term and not is_cell_ontology_id(term):
            raise DataError(f"{path}: ontology {term!r} of label {label!r} is no Cell Ontology id",
                            hint="it has the form CL:0000084; leave it empty where there is none")
        shared[label] = name
        if term:
            ids[label] = term
    return LabelMap({**shared, **config.label_map}, ids, str(path))


def is_cell_ontology_id(term: str) -> bool:
    """Whether a term has the form CL:0000000."""
    return _CELL_ONTOLOGY.match(term) is not None


def encode_labels(column: Any) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Codes [cells] and the labels that they stand for; missing and empty ones have the code -1."""
    import pandas as pd

    categories = pd.Categorical(column)
    words = [str(v).strip() for v in categories.categories]
    unique = sorted(set(words) - {""})
    place = {word: i for i, word in enumerate(unique)}
    lookup = np.array([place.get(word, -1) for word in words] + [-1], dtype=np.int64)
    return lookup[np.asarray(categories.codes, dtype=np.int64)], unique


def explain_unmapped(label: str, ids: Mapping[str, str], spec: CellSpec) -> tuple[str, str]:
    """Why a label is not on a run's list, in words, and what to do about it."""
    finer = [name for name in spec.labels if label in _list_ancestors(name, spec.ontology)]
    if finer:
        return (f"label {label!r} is coarser than the run's ({', '.join(finer)})",
                f'label these cells finer, or leave them out: [data.label_map] "{label}" = ""')
    near = next((name for name in _list_ancestors(label, spec.ontology) if name in spec.labels), None)
    if near is not None:
        return (f"label {label!r} is finer than the run's {near!r}", f'[data.label_map] "{label}" = "{near}"')
    same = next((n for n, term in spec.ontology.items() if label in ids and term.id == ids[label]), None)
    if same in spec.labels:
        return f"label {label!r} is {ids[label]}, which the run calls {same!r}", f'map it: "{label}" = "{same}"'
    return f"label {label!r} is not on the run's list", MAP_HINT


def check_ids(ids: Mapping[str, str], spec: CellSpec, *, source: str) -> None:
    """A label and the run's label of that name must mean the same.

    Raises
    ------
    DataError
        If the site gives another Cell Ontology id than the run.
    """
    for label, term in sorted(ids.items()):
        meant = spec.ontology.get(label)
        if meant is not None and meant.id not in (None, term):
            raise DataError(f"{source}: the site's {label!r} is {term}, the run's is {meant.id}",
                            hint="correct the column ontology of [data] label_file, or map to another label")


def _list_ancestors(label: str, ontology: Mapping[str, Term]) -> Sequence[str]:
    found: list[str] = []
    term = ontology.get(label)
    while term is not None and term.parent is not None and term.parent not in (*found, label):
        found.append(term.parent)
        term = ontology.get(term.parent)
    return found
