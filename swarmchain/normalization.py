"""What X holds, told from its numbers, and how it is brought to the state that a spec demands. Pure.

All arithmetic is in float64 and rounded to float32 once, so that sparse and dense, float16 and float64 files of the
same numbers give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from swarmchain.errors import DataError
from swarmchain.spec import Normalization

State = Literal["counts", "log1p", "arcsinh", "intensities", "proportions", "scaled", "none"]

LOG1P_MAX = 20.0  # log1p of more than 4e8 counts: no single cell has them
SCALED_MEAN_MAX = 0.25
SCALED_SD_RANGE = (0.5, 1.5)
CONSTANT_SPREAD_MAX = 0.01
SUBSET_FEATURES_MAX = 5_000
TOTAL_MIN = 200

# what a file may hold → what can be made of it, beside itself
MAKES: dict[str, tuple[str, ...]] = {
    "counts": ("log1p", "arcsinh", "proportions"),
    "intensities": ("arcsinh",),
    "none": ("arcsinh",),
}


@dataclass(frozen=True)
class Finding:
    """What a sample of X looks like, and the numbers that say so; `fault` is why it is of no use, if it is."""

    state: State
    why: str
    fault: str = ""


def find_state(x: Any) -> Finding:
    """What X holds. `x` is [cells, features], sparse or dense, finite.

    Non-negative integers are counts; fractions up to 1 proportions, up to 20 log1p; larger ones intensities of a
    cytometer, which may be negative after compensation. Other negative values were scaled.
    """
    values = x.data if sp.issparse(x) else x
    if values.size == 0:
        return Finding("counts", "no value but 0")
    low, high = float(values.min()), float(values.max())
    if low < 0:
        return _find_negative(x, low, high)
    if bool((values == np.rint(values)).all()):
        return Finding("counts", f"all values are whole numbers up to {high:.6g}")
    if high <= 1.0:
        return Finding("proportions", f"fractions up to {high:.3g}, none above 1")
    if high <= LOG1P_MAX:
        return Finding("log1p", f"fractions up to {high:.3g}, none negative")
    return Finding("intensities", f"fractions up to {high:.6g}, none negative",
                   f"X holds fractions up to {high:.6g}: neither counts nor log1p")


def _find_negative(x: Any, low: float, high: float) -> Finding:
    dense = np.asarray(x.toarray() if sp.issparse(x) else x, dtype=np.float64)
    mean, sd = float(np.median(np.abs(dense.mean(axis=0)))), float(np.median(dense.std(axis=0)))
    negative = f"X holds negative values (down to {low:.3g})"
    if len(dense) > 2 and mean < SCALED_MEAN_MAX and SCALED_SD_RANGE[0] < sd < SCALED_SD_RANGE[1]:
        return Finding("scaled", f"features have a mean near 0 (median {mean:.2g}) and an SD near 1 ({sd:.2g})",
                       f"{negative} with mean 0 and SD 1 per feature, so it was scaled")
    if high > LOG1P_MAX:
        return Finding("intensities", f"values from {low:.3g} to {high:.6g}, as of a compensated cytometer",
                       f"{negative} and up to {high:.6g}, as of a compensated cytometer")
    return Finding("scaled", f"small values, some negative, from {low:.3g} to {high:.3g}",
                   f"{negative}, so it was scaled or transformed")


def choose_state(x: Any, state: str, target: Normalization, *, source: str) -> str:
    """The state that site.toml says or, with "auto", a sample shows.

    Raises
    ------
    DataError
        If the demanded state cannot be made of it.
    """
    finding = find_state(x) if state == "auto" else Finding(cast(State, state), "[data] state says so")
    if target.kind == "none":
        return finding.state
    # arcsinh has too many cofactors to be told from log1p: only site.toml can say that X is arcsinh already
    if finding.state == target.kind or target.kind in MAKES.get(finding.state, ()):
        return finding.state
    words = finding.fault or f"X looks like {finding.state} ({finding.why})"
    raise DataError(f"{source}: {words}; {target.kind} cannot be made of it",
                    hint=_REMEDIES.get(finding.state, "point [data] layer at counts, or set [data] state"))


_REMEDIES = {
    "scaled": "point [data] layer at counts or log1p values (scanpy keeps them in .raw: layer = \"raw\")",
    "log1p": "point [data] layer at counts; if X is arcsinh with the run's cofactor set [data] state = \"arcsinh\"",
}


def normalize(x: Any, state: str, target: Normalization, *, source: str, total: int | None = None,
              guessed: bool = False) -> Any:
    """Rows of X in the state that the spec demands, float32, sparse if they were.

    log1p: ln(1 + x / (the cell's sum over all features of the file) · target_sum), as scanpy's `normalize_total` and
    `log1p`. arcsinh: arcsinh(x / cofactor). proportions: x / the row's total.

    Parameters
    ----------
    x
        [cells, all features of the file].
    state
        What X holds, or "auto".
    total
        The feature that holds a row's total; without one it is the row's sum.
    guessed
        Whether the state was told from other rows, so that these have to be looked at too.

    Raises
    ------
    DataError
        If X holds NaN or infinity, values that its state forbids, or is in a state from which the demanded one cannot
        be made.
    """
    x = _widen(x, source)
    chosen = choose_state(x, state, target, source=source)
    _check_values(x, chosen, source, guessed=guessed or state == "auto")
    if target.kind == "none" or chosen == target.kind:
        return x.astype(np.float32)
    if target.kind == "arcsinh":
        return _apply(np.arcsinh, _scale(x, None, 1.0 / target.cofactor))
    totals = compute_totals(x) if total is None else _column(x, total)
    factor = target.target_sum if target.kind == "log1p" else 1.0
    shares = _scale(x, totals, factor)
    return _apply(np.log1p if target.kind == "log1p" else np.positive, shares)


def compute_totals(x: Any) -> npt.NDArray[np.float64]:
    """Sum of each row over all columns, added in the order of the columns whatever the storage."""
    wide = sp.csr_matrix(x, dtype=np.float64)
    return np.asarray(wide.sum(axis=1), dtype=np.float64).ravel()


def describe_totals(x: Any, finding: Finding, *, are_genes: bool) -> list[str]:
    """Warnings about the order of normalisation and choice of features. `x` is a sample of rows, all features."""
    if not are_genes or x.shape[0] == 0:
        return []
    features = x.shape[1]
    if finding.state == "log1p":
        wide = sp.csr_matrix(x, dtype=np.float64)
        totals = compute_totals(wide.expm1())
        low, middle, high = np.percentile(totals, [0, 50, 100])
        if high - low <= CONSTANT_SPREAD_MAX * max(middle, 1.0):
            if features < SUBSET_FEATURES_MAX:
                return [f"each cell's expm1(X) sums to {middle:.6g} over only {features} features: it was normalised "
                        "after features were chosen; normalise on all genes first"]
            return []
        return [f"expm1(X) sums to {low:.0f} to {high:.0f} per cell, not to one number: features were chosen after "
                "normalisation (harmless), or it was normalised otherwise (not)"]
    if finding.state == "counts":
        middle = float(np.median(compute_totals(x)))
        if features < SUBSET_FEATURES_MAX:
            return [f"counts of only {features} features (median total {middle:.0f}): normalisation will be to the "
                    "total of these, not of all genes; give counts of all genes if you have them"]
        if middle < TOTAL_MIN:
            return [f"the median cell has {middle:.0f} counts over {features} features: check that X is complete"]
    return []


def _widen(x: Any, source: str) -> Any:
    """Float64 in canonical form; bool and integers too, no object or complex."""
    if x.dtype.kind not in "fiub":
        raise DataError(f"{source}: X is of type {x.dtype}", hint="store it as float32")
    narrow = x.dtype == np.float16
    if sp.issparse(x):
        x = sp.csr_matrix(x, dtype=np.float64)
        x.sum_duplicates()
    else:
        x = np.asarray(x, dtype=np.float64)
    values = x.data if sp.issparse(x) else x
    if values.size and not np.isfinite(values).all():
        because = " (float16 ends at 65,504: write it as float32)" if narrow else ""
        raise DataError(f"{source}: X holds NaN or infinity{because}", hint="remove those cells or features")
    return x


def _check_values(x: Any, state: str, source: str, *, guessed: bool) -> None:
    """Every row must be what a sample of them was taken for."""
    values = x.data if sp.issparse(x) else x
    if values.size == 0 or state not in ("counts", "log1p", "proportions"):
        return
    low, high = float(values.min()), float(values.max())
    if low < 0:
        raise DataError(f"{source}: X is taken for {state} and holds negative values (down to {low:.3g})",
                        hint="point [data] layer at counts or log1p values, or set [data] state")
    if state == "counts" and guessed and not bool((values == np.rint(values)).all()):
        raise DataError(f"{source}: X is taken for counts and holds fractions", hint="set [data] state or layer")
    if state == "log1p" and high > LOG1P_MAX:
        raise DataError(f"{source}: X is taken for log1p and holds {high:.6g}", hint="set [data] state or layer")


def _scale(x: Any, totals: npt.NDArray[np.float64] | None, factor: float) -> Any:
    """X · factor / totals of the rows; rows whose total is 0 stay 0."""
    if totals is None:
        return x * factor
    factors = factor / np.where(totals > 0, totals, 1.0)
    return (sp.diags(factors) @ x).tocsr() if sp.issparse(x) else x * factors[:, None]


def _apply(function: Any, x: Any) -> Any:
    """A function with f(0) = 0, on stored values alone where X is sparse."""
    if not sp.issparse(x):
        return function(x).astype(np.float32)
    x.data = function(x.data)
    return x.astype(np.float32)


def _column(x: Any, at: int) -> npt.NDArray[np.float64]:
    column = x[:, [at]]
    return np.asarray(column.toarray() if sp.issparse(column) else column, dtype=np.float64).ravel()
