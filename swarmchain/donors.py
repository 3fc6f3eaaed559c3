"""Whose cells are whose: donors, their samples, and the split between training and validation by donor.

A *donor* is the unit of splitting: all that comes from one person is on one side. A *sample* is the unit of prediction:
what was taken from a donor at one time or under one condition, and has one label. Where a site's file names no
samples, a donor is one sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarmchain.errors import DataError

Ints = npt.NDArray[np.int64]
Strings = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Samples:
    """A site's samples, in the order of their names.

    Shapes: `of_row` int64 [rows] is each row's sample; `y` and `donor` int64 [samples] are its label and its donor,
    an index into `donors`.
    """

    names: tuple[str, ...]
    donors: tuple[str, ...]
    of_row: Ints
    y: Ints
    donor: Ints


def group_samples(y: Ints, donors: Strings, samples: Strings, *, source: str) -> Samples:
    """Rows by sample.

    Parameters
    ----------
    y, donors, samples
        Label, donor and sample of each row, [rows].

    Raises
    ------
    DataError
        If a sample has two labels, or two donors.
    """
    names, first, of_row = np.unique(samples, return_index=True, return_inverse=True)
    donor_names, donor_of_row = np.unique(donors, return_inverse=True)
    found = Samples(
        names=tuple(names.tolist()), donors=tuple(donor_names.tolist()), of_row=of_row.astype(np.int64),
        y=y[first], donor=donor_of_row[first].astype(np.int64),
    )
    for what, values, own, hint in (
        ("labels", y, found.y, "set [data] sample_column to a column that tells one donor's samples apart"),
        ("donors", donor_of_row, found.donor, "check [data] donor_column and sample_column: a sample is one donor's"),
    ):
        mixed = np.flatnonzero(values != own[found.of_row])
        if len(mixed):
            raise DataError(f"{source}: sample {found.names[found.of_row[mixed[0]]]!r} has two {what}", hint=hint)
    return found


def choose_validation_donors(samples: Samples, *, share: float) -> Ints:
    """Donors of the validation split, by index, sorted.

    In the order of their names' hashes, a donor is taken while of every label that it carries no more than `share` of
    the donors (rounded down) are taken: every label keeps donors to train on, and the choice is the same in every round
    and on every machine.
    """
    labels = [np.unique(samples.y[samples.donor == donor]) for donor in range(len(samples.donors))]
    carriers = np.bincount(np.concatenate(labels)) if labels else np.zeros(0, dtype=np.int64)
    left = (carriers * share).astype(np.int64)
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in samples.donors]
    chosen = []
    for donor in sorted(range(len(hashes)), key=hashes.__getitem__):
        if (left[labels[donor]] > 0).all():
            left[labels[donor]] -= 1
            chosen.append(donor)
    return np.array(sorted(chosen), dtype=np.int64)


def check_donor_split(train: Iterable[str], test: Iterable[str], *, source: str) -> None:
    """Whether no donor is on both sides of a split that somebody made. Raises `DataError` naming the first."""
    both = sorted(set(map(str, train)) & set(map(str, test)))
    if both:
        raise DataError(
            f"{source}: a donor in both splits: {both[0]!r} ({len(both)} such donors)",
            hint="put all rows of a donor on one side: a model knows donors again, and its score would say nothing",
        )
