"""Contributions → checkpoint and shares. Pure, streaming, and equal to the last bit on every machine.

What makes it so: every product and every sum is one correctly rounded step in an order that is written here and in
`kernels`, sums over contributions go by the sites' indices, sums over elements by a fixed number of lanes that
`math.fsum` (exactly rounded) adds up, and nowhere does a library choose an order. Contributions are read piece by piece
from wherever they lie; of a merge nothing is in memory but the parent, the result, and one piece of each contribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from swarmchain.codec import list_deltas, read_piece
from swarmchain.errors import CheckpointError, SpecError
from swarmchain.kernels import (
    LANES,
    add_all_products,
    add_between,
    add_middle,
    add_products,
    add_scaled,
    add_scaled_4,
    move,
    pack_keys,
    sort_columns,
)
from swarmchain.layouts import LOW, is_statistic
from swarmchain.merging import Merge, Outer
from swarmchain.methods import Geometry, Pick, Plan, find_method

Arrays = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]
Piece = tuple[str, int, int]

# Elements of one contribution that are worked on at a time: of one alone, and where all are held side by side.
PIECE = 32_768
# Not a power of two: rows that far apart would fall on the same lines of the cache.
PIECE_OF_ALL = 2_056
# A multiple of the lanes, so that an element's lane does not depend on how tensors are cut.
PRODUCT_LANES = 64
PIECE_OF_PAIRS = 32 * PRODUCT_LANES
_SINGLE_MAX = float(np.finfo(np.float32).max)
_SUM_MAX = 2.0**1013


@dataclass(frozen=True)
class Input:
    """One site's verified contribution: coded tensors (see `codec`), and its norm as `compute_norm` gives it."""

    site: int
    samples: int
    tensors: Arrays
    norm: float


@dataclass(frozen=True)
class Share:
    """How one contribution went into a merge: its norm, the factor that clipped it, its weight."""

    site: int
    norm: float
    clip_factor: float
    weight: float


def merge_deltas(
    parent: Arrays, inputs: Sequence[Input], settings: Merge, *, into: Arrays, step_scale: float = 1.0,
    piece: int | None = None,
) -> tuple[list[Share], float | None]:
    """Parent plus the merged delta, as the spec's method and outer optimiser make it.

    Parameters
    ----------
    parent
        Checkpoint; tensors that no contribution names are carried over unchanged.
    inputs
        Contributions in any order, all with the same names and shapes.
    into
        Arrays of the parent's names and shapes that receive the new checkpoint. What does not fit a float32 becomes the
        largest that does.
    step_scale
        1, halved after every rejected round.
    piece
        Elements at a time. The result does not depend on it.

    Returns
    -------
    Every contribution's share, by site, and the norm above which the method clipped, if it has one.

    Raises
    ------
    CheckpointError
        If there is no input.
    SpecError
        If the spec names a method that is not installed here, or that gives no usable plan.
    """
    ordered = _order(inputs)
    names = list_deltas(ordered[0].tensors)
    geometry = Geometry(compute_weights([item.samples for item in ordered], settings),
                        [item.norm for item in ordered], lambda: compute_products(ordered))
    plan = find_method(settings)(geometry, settings)
    _require_usable(plan, len(ordered), settings.method)
    for name, tensor in parent.items():
        if name not in names and not name.startswith("outer."):
            np.copyto(into[name], tensor, casting="no")
    merged = _pick_each(ordered, names, plan, plan.pick, piece) if plan.pick else _sum_all(ordered, names, plan, piece)
    for where, delta in merged:
        _step(parent, into, where, delta, outer=settings.outer, scale=step_scale)
    return [Share(item.site, item.norm, clip, weight)
            for item, clip, weight in zip(ordered, plan.clips, plan.weights, strict=True)], plan.bound


def sum_statistics(inputs: Sequence[Input], *, into: Arrays) -> list[Share]:
    """Sum over sites of every tensor, the same bytes in whatever order the sites come; all weights are 1.

    Counts are int64. A sum is a pair of float64 (`layouts.statistics_layout`): the exact sum over all sites' pairs,
    rounded to the nearest float64, and what that leaves, rounded likewise, so that some 106 bits hold. What is beyond
    ±2^1013 counts as that: no sum of 256 pairs then overflows.

    Raises
    ------
    CheckpointError
        If there is no input.
    """
    ordered = _order(inputs)
    for name in sorted(ordered[0].tensors):
        if name + LOW in into:
            _sum_pairs([item.tensors[part] for item in ordered for part in (name, name + LOW)],
                       into[name], into[name + LOW])
        elif not name.endswith(LOW):
            np.sum([item.tensors[name] for item in ordered], axis=0, out=into[name])
    return [Share(item.site, item.norm, 1.0, 1.0) for item in ordered]


def compute_norm(tensors: Arrays) -> float:
    """Euclidean norm over all deltas of a contribution; infinity or NaN if any of them is."""
    partial: list[float] = []
    with np.errstate(over="ignore", invalid="ignore"):
        for name in list_deltas(tensors):
            lanes = np.zeros(LANES)
            for piece in _read_pieces(tensors, name):
                add_products(lanes, piece, piece)
            partial += lanes.tolist()
    return math.sqrt(math.fsum(partial))


def compute_products(inputs: Sequence[Input]) -> list[list[float]]:
    """Inner products of all pairs of contributions, [n, n], equal to the last bit whatever the machine."""
    n = len(inputs)
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    partial: list[list[float]] = [[] for _ in pairs]
    rows = np.empty((n, PIECE_OF_PAIRS), np.float32)
    for name in list_deltas(inputs[0].tensors):
        lanes = np.zeros((len(pairs), PRODUCT_LANES))
        for start in range(0, inputs[0].tensors[name].size, PIECE_OF_PAIRS):
            size = _fill(rows, inputs, name, start)
            add_all_products(lanes, rows[:, :size])
        for found, lane in zip(partial, lanes.tolist(), strict=True):
            found += lane
    products = [[0.0] * n for _ in range(n)]
    for (i, j), found in zip(pairs, partial, strict=True):
        products[i][j] = products[j][i] = math.fsum(found)
    return products


def compute_weights(samples: Sequence[int], settings: Merge) -> list[float]:
    """Shares that sum to 1: proportional to samples, their roots, or equal; none above `weight_max`.

    What the cap takes from large sites goes to the others in proportion, until no share is above it. With fewer than
    1 / weight_max sites the cap cannot be met, and all shares are equal.
    """
    raw = {
        "samples": [float(n) for n in samples],
        "sqrt_samples": [math.sqrt(n) for n in samples],
        "equal": [1.0 for _ in samples],
    }[settings.weighting]
    if len(raw) * settings.weight_max <= 1.0:
        return [1.0 / len(raw)] * len(raw)
    capped: set[int] = set()
    while True:
        free = math.fsum(w for i, w in enumerate(raw) if i not in capped)
        rest = 1.0 - settings.weight_max * len(capped)
        shares = [settings.weight_max if i in capped else w / free * rest for i, w in enumerate(raw)]
        over = {i for i, share in enumerate(shares) if share > settings.weight_max}
        if not over:
            return shares
        capped |= over


def _sum_all(inputs: Sequence[Input], names: Sequence[str], plan: Plan, size: int | None
             ) -> Iterator[tuple[Piece, Floats]]:
    """Σ clip · weight · delta, piece by piece."""
    pairs = [(item, clip * weight) for item, clip, weight in zip(inputs, plan.clips, plan.weights, strict=True)]
    counted = [item for item, factor in pairs if factor]
    factors = np.array([factor for _, factor in pairs if factor])
    total, scratch = np.empty(size or PIECE), np.empty((4, size or PIECE), np.float32)
    for name in names:
        length = inputs[0].tensors[name].size
        for start in range(0, length, total.size):
            stop = min(start + total.size, length)
            sums = total[: stop - start]
            sums[:] = 0.0
            for at in range(0, len(counted), 4):
                pieces = [read_piece(item.tensors, name, start, stop, scratch=row)
                          for item, row in zip(counted[at : at + 4], scratch, strict=False)]
                if len(pieces) == 4:
                    add_scaled_4(sums, pieces[0], pieces[1], pieces[2], pieces[3], factors[at : at + 4])
                else:
                    for piece, factor in zip(pieces, factors[at:], strict=True):
                        add_scaled(sums, piece, factor)
            yield (name, start, stop), sums


def _pick_each(inputs: Sequence[Input], names: Sequence[str], plan: Plan, pick: Pick, size: int | None
               ) -> Iterator[tuple[Piece, Floats]]:
    """The weighted median, or the mean of what is not trimmed, of every parameter by itself, piece by piece."""
    n = len(inputs)
    width = size or max(PIECE_OF_ALL, PIECE // n + 8)
    network, weights = build_network(n), np.array(plan.weights)
    total = math.fsum(plan.weights)
    scratch, keys = np.empty(width, np.float32), np.empty((n, width), np.int64)
    for name in names:
        length = inputs[0].tensors[name].size
        for start in range(0, length, width):
            stop = min(start + width, length)
            found = keys[:, : stop - start]
            for row, item in enumerate(inputs):
                numbers = read_piece(item.tensors, name, start, stop, scratch=scratch)
                pack_keys(found[row], numbers.view(np.int32), row)
            sort_columns(found, network)
            sums = np.zeros((3, stop - start))
            if pick.is_median:
                add_middle(sums, found, weights, 0.5 * total)
            else:
                add_between(sums, found, weights, pick.low * total, pick.high * total)
            yield (name, start, stop), np.divide(sums[2], sums[1], out=sums[2])


@lru_cache(maxsize=4)
def build_network(n: int) -> npt.NDArray[np.int64]:
    """Comparators [m, 2] that sort n numbers: Batcher's merge exchange (Knuth, vol. 3, algorithm 5.2.2M)."""
    pairs: list[tuple[int, int]] = []
    top = 1 << max(0, (n - 1).bit_length() - 1)
    p = top if n > 1 else 0
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(n - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _step(parent: Arrays, into: Arrays, where: Piece, delta: Floats, *, outer: Outer, scale: float) -> None:
    """Move one piece of a parameter, and what the outer optimiser remembers of it. See `merging.Outer`."""
    name, start, stop = where

    def read(key: str) -> Floats:
        found: Floats = parent[key].reshape(-1)[start:stop].astype(np.float64)
        return found

    def write(key: str, values: Floats) -> None:
        into[key].reshape(-1)[start:stop] = np.clip(values, -_SINGLE_MAX, _SINGLE_MAX)

    moved, lr = delta, outer.lr
    if is_statistic(name):
        lr = 1.0
    elif outer.kind == "fedadam":
        m = outer.momentum * read(f"outer.m.{name}") + (1.0 - outer.momentum) * delta
        v = outer.decay * read(f"outer.v.{name}") + (1.0 - outer.decay) * (delta * delta)
        write(f"outer.m.{name}", m)
        write(f"outer.v.{name}", v)
        moved = m / (np.sqrt(v) + outer.epsilon)
    elif outer.kind != "none":
        m = outer.momentum * read(f"outer.m.{name}") + delta
        write(f"outer.m.{name}", m)
        moved = m if outer.kind == "momentum" else delta + outer.momentum * m
    found = into[name].reshape(-1)[start:stop]
    move(found, parent[name].reshape(-1)[start:stop], moved, scale * lr, _SINGLE_MAX)
    if name.endswith("running_var"):
        np.maximum(found, 0.0, out=found)


def _read_pieces(tensors: Arrays, name: str) -> Iterator[npt.NDArray[Any]]:
    """One tensor, flat: deltas decoded, sums of statistics as float64."""
    tensor = tensors[name]
    if tensor.dtype == np.float32:
        yield tensor.reshape(-1)
        return
    scratch = np.empty(PIECE, np.float32)
    for start in range(0, tensor.size, PIECE):
        stop = min(start + PIECE, tensor.size)
        if tensor.dtype.itemsize == 8:
            yield tensor.reshape(-1)[start:stop].astype(np.float64)
        else:
            yield read_piece(tensors, name, start, stop, scratch=scratch)


def _fill(rows: npt.NDArray[np.float32], inputs: Sequence[Input], name: str, start: int) -> int:
    """The same piece of all contributions, side by side; returns its size."""
    stop = min(start + rows.shape[1], inputs[0].tensors[name].size)
    for row, item in zip(rows, inputs, strict=True):
        row[: stop - start] = read_piece(item.tensors, name, start, stop, scratch=row)
    return int(stop - start)


def _require_usable(plan: Plan, count: int, method: str) -> None:
    """A method of the consortium's own may be wrong; all sites find it so."""
    numbers = [*plan.weights, *plan.clips]
    if len(plan.weights) != count or len(plan.clips) != count or not all(map(math.isfinite, numbers)):
        raise SpecError(f"the merge method {method!r} gave no finite weight and clip factor for each of {count} sites",
                        hint="a new run needs a spec with another method")


def _sum_pairs(terms: Sequence[npt.NDArray[Any]], high: npt.NDArray[Any], low: npt.NDArray[Any]) -> None:
    """The exact sums over `terms`, all [k], as pairs: `math.fsum` is exactly rounded, so that no order matters."""
    for start in range(0, high.size, PIECE_OF_ALL):
        where = slice(start, min(start + PIECE_OF_ALL, high.size))
        columns = np.clip(np.stack([term[where] for term in terms], axis=1), -_SUM_MAX, _SUM_MAX).tolist()
        rounded = [math.fsum(column) for column in columns]
        rest = [math.fsum([*column, -found]) for column, found in zip(columns, rounded, strict=True)]
        for into, found in ((high, rounded), (low, rest)):
            into[where] = np.array(found) + 0.0  # -0.0, which not every Python's fsum keeps, becomes 0.0


def _order(inputs: Sequence[Input]) -> list[Input]:
    if not inputs:
        raise CheckpointError("a merge needs at least one contribution")
    return sorted(inputs, key=lambda item: item.site)


