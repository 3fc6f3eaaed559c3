"""The merge's inner loops, compiled by Numba: one pass over the numbers each, with no temporary arrays.

Every product and every sum is rounded once, in the order written: without `fastmath` LLVM neither fuses a product with
a sum nor reorders sums, whatever vectors the CPU has. What may be vectorised are the lanes, and those do not meet.
Compiled code is kept beside this file, or in the user's cache folder where that is read-only.

Legend: n contributions, k elements of one piece, L lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

F = TypeVar("F", bound=Callable[..., Any])

LANES = 256


def _compile(function: F) -> F:
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # no folder to keep compiled code in
        return cast(F, numba.njit(nogil=True)(function))


@_compile
def add_scaled(total: Floats, x: Singles, factor: float) -> None:
    """Add x · factor to `total`, both [k]."""
    for j in range(x.size):
        total[j] += np.float64(x[j]) * factor


@_compile
def add_scaled_4(total: Floats, a: Singles, b: Singles, c: Singles, d: Singles, factors: Floats) -> None:
    """Four times `add_scaled`, one after the other for each element: the sums are fetched and put back once."""
    for j in range(a.size):
        t = total[j] + np.float64(a[j]) * factors[0]
        t += np.float64(b[j]) * factors[1]
        t += np.float64(c[j]) * factors[2]
        total[j] = t + np.float64(d[j]) * factors[3]


@_compile
def add_moments(sums: Floats, x: Floats) -> None:
    """Add Σx and Σx² over the rows of `x`, [rows, k], to `sums`, [4, k]: the two sums and what rounding took of each.

    Every addition is Knuth's TwoSum (The Art of Computer Programming, vol. 2, 4.2.2, theorem B): its error is known
    exactly, and summed beside it.
    """
    for i in range(x.shape[0]):
        for k in range(2):
            for j in range(x.shape[1]):
                term = x[i, j] if k == 0 else x[i, j] * x[i, j]
                old = sums[2 * k, j]
                new = old + term
                taken = new - old
                sums[2 * k + 1, j] += (old - (new - taken)) + (term - taken)
                sums[2 * k, j] = new


@_compile
def move(into: Singles, parent: Singles, delta: Floats, factor: float, limit: float) -> None:
    """Parent + delta · factor as float32, at most ±`limit`; all [k]."""
    for j in range(into.size):
        into[j] = np.float32(min(max(np.float64(parent[j]) + delta[j] * factor, -limit), limit))


@_compile
def add_products(lanes: Floats, x: Singles, y: Singles) -> None:
    """Add x_j · y_j to lane j mod L, in the order of j. `lanes` is [L], the others [k]."""
    width = lanes.size
    for start in range(0, x.size, width):
        a = x[start : start + width]
        b = y[start : start + width]
        for j in range(a.size):
            lanes[j] += np.float64(a[j]) * np.float64(b[j])


@_compile
def add_all_products(lanes: Floats, rows: npt.NDArray[np.float32]) -> None:
    """`add_products` for all pairs i ≤ j of the rows, [n, k]; `lanes` is [pairs, L], pair by pair."""
    pair = 0
    for i in range(rows.shape[0]):
        for j in range(i, rows.shape[0]):
            add_products(lanes[pair], rows[i], rows[j])
            pair += 1


@_compile
def pack_keys(keys: npt.NDArray[np.int64], bits: npt.NDArray[np.int32], row: int) -> None:
    """One row of sortable keys: the float32's order above, the contribution's row (below 256) beneath.

    A float32's bits read as an integer are ordered as the numbers are, once those below zero are turned over.
    """
    for j in range(bits.size):
        b = np.int64(bits[j])
        keys[j] = ((b ^ ((b >> np.int64(31)) & np.int64(0x7FFFFFFF))) << np.int64(8)) | np.int64(row)


@_compile
def sort_columns(keys: npt.NDArray[np.int64], pairs: npt.NDArray[np.int64]) -> None:
    """Sort every column of [n, k] by a network of comparators, [m, 2]: the same steps for all columns, no branch."""
    for m in range(pairs.shape[0]):
        low = keys[pairs[m, 0]]
        high = keys[pairs[m, 1]]
        for j in range(low.size):
            a = low[j]
            b = high[j]
            low[j] = min(a, b)
            high[j] = max(a, b)


@_compile
def add_between(sums: Floats, keys: npt.NDArray[np.int64], weights: Floats, low: float, high: float) -> None:
    """Rows of sorted keys, [n, k], into the mean of what lies between two total weights.

    `sums` is [3, k], zeros: the weight of the rows so far, the weight of what was kept, and the kept numbers times
    theirs.
    """
    passed, kept, total = sums[0], sums[1], sums[2]
    for row in keys:
        for j in range(row.size):
            b = row[j] >> np.int64(8)
            value = np.float64(np.int32(b ^ ((b >> np.int64(31)) & np.int64(0x7FFFFFFF))).view(np.float32))
            before = passed[j]
            after = before + weights[row[j] & np.int64(255)]
            part = max(0.0, min(after, high) - max(before, low))
            total[j] += value * part
            kept[j] += part
            passed[j] = after


@_compile
def add_middle(sums: Floats, keys: npt.NDArray[np.int64], weights: Floats, half: float) -> None:
    """As `add_between`, for the median: numbers whose weights reach up to `half` from one side and from the other."""
    passed, kept, total = sums[0], sums[1], sums[2]
    for row in keys:
        for j in range(row.size):
            before = passed[j]
            after = before + weights[row[j] & np.int64(255)]
            passed[j] = after
            hit = 1.0 if before <= half and after >= half and after > before else 0.0
            b = row[j] >> np.int64(8)
            total[j] += hit * np.float64(np.int32(b ^ ((b >> np.int64(31)) & np.int64(0x7FFFFFFF))).view(np.float32))
            kept[j] += hit
