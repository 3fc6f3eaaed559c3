"""Merge methods: from norms, distances and weights of a round's contributions to what each of them counts.

A method is one pure function of a `Geometry` and the spec's settings that returns a `Plan`. Methods that weigh whole
contributions need no more than this; they never touch a tensor, so that the merge may stream. Those that look at every
parameter by itself name a `Pick`. A consortium's own method is such a function, found through the entry point group
`swarmchain.merge_methods`; its name and the digest of its source file stand in the spec.

All arithmetic is Python's own (IEEE 754 doubles, `math.fsum`), in the order of the sites' indices.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from swarmchain.errors import SpecError
from swarmchain.merging import (
    CenteredClipping,
    ClippedMean,
    CustomMerge,
    GeometricMedian,
    Merge,
    MultiKrum,
    TrimmedMean,
)
from swarmchain.protocol import compute_digest

GROUP = "swarmchain.merge_methods"
SMOOTHING = 1e-6

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Geometry:
    """What a method may know of a round's n contributions, in the order of the sites' indices.

    Parameters
    ----------
    weights
        Shares by samples, capped; they sum to 1.
    norms
        Euclidean norms of the deltas.
    compute_products
        Gives the inner products of all pairs; asked at most once, since it takes a pass over all pairs.
    """

    weights: Sequence[float]
    norms: Sequence[float]
    compute_products: Callable[[], Matrix]

    @cached_property
    def products(self) -> Matrix:
        """Inner products of all pairs of deltas, [n, n]."""
        return self.compute_products()

    @property
    def median_norm(self) -> float:
        """Median of the norms."""
        return statistics.median(self.norms)

    def compute_distances(self, mix: Sequence[float]) -> list[float]:
        """Distance of every delta from Σ mix_i · delta_i."""
        dots = [math.fsum(a * c for a, c in zip(row, mix, strict=True)) for row in self.products]
        square = math.fsum(a * c for a, c in zip(dots, mix, strict=True))
        return [math.sqrt(max(0.0, self.products[i][i] - 2 * dot + square)) for i, dot in enumerate(dots)]


@dataclass(frozen=True)
class Pick:
    """Look at every parameter by itself: the mean of the numbers between two shares of all weight, or the median."""

    low: float = 0.5
    high: float = 0.5

    @property
    def is_median(self) -> bool:
        """Whether nothing but the middle is wanted."""
        return self.low >= self.high


@dataclass(frozen=True)
class Plan:
    """What a merge is to do: the merged delta is Σ clips_i · weights_i · delta_i, or, with `pick`, by parameter.

    `bound` is the norm that no contribution may exceed, where the method has one.
    """

    weights: Sequence[float]
    clips: Sequence[float]
    bound: float | None = None
    pick: Pick | None = None


Method = Callable[[Geometry, Any], Plan]


def plan_mean(geometry: Geometry, settings: Any) -> Plan:
    """See `merging.Mean`."""
    return Plan(geometry.weights, _ones(geometry))


def plan_clipped_mean(geometry: Geometry, settings: ClippedMean) -> Plan:
    """See `merging.ClippedMean`."""
    bound = settings.clip_factor * geometry.median_norm
    return Plan(geometry.weights, [_clip(norm, bound) for norm in geometry.norms], bound)


def plan_coordinate_median(geometry: Geometry, settings: Any) -> Plan:
    """See `merging.CoordinateMedian`."""
    return Plan(geometry.weights, _ones(geometry), pick=Pick())


def plan_trimmed_mean(geometry: Geometry, settings: TrimmedMean) -> Plan:
    """See `merging.TrimmedMean`."""
    return Plan(geometry.weights, _ones(geometry), pick=Pick(settings.trim, 1.0 - settings.trim))


def plan_geometric_median(geometry: Geometry, settings: GeometricMedian) -> Plan:
    """See `merging.GeometricMedian`; distances below a millionth of the median norm count as that.

    The first point is the mean of the deltas clipped to the median norm: from the plain mean, a hostile delta 10³⁰ long
    would take some fifty steps to get away from.
    """
    smallest = SMOOTHING * geometry.median_norm
    if smallest == 0.0:
        return plan_coordinate_median(geometry, settings)
    mix = [w * _clip(norm, geometry.median_norm) for w, norm in zip(geometry.weights, geometry.norms, strict=True)]
    for _ in range(settings.iterations):
        raw = [w / max(smallest, d) for w, d in zip(geometry.weights, geometry.compute_distances(mix), strict=True)]
        total = math.fsum(raw)
        mix = [r / total for r in raw]
    return Plan(mix, _ones(geometry))


def plan_multi_krum(geometry: Geometry, settings: MultiKrum) -> Plan:
    """See `merging.MultiKrum`.

    A contribution's score is the sum of its squared distances to its n - hostile_max - 2 nearest (at least one). With
    no more contributions than hostile ones expected, the best one is all that counts.
    """
    n = len(geometry.norms)
    products = geometry.products
    near = max(1, n - settings.hostile_max - 2)
    scores = []
    for i in range(n):
        squares = sorted(max(0.0, products[i][i] - 2 * products[i][j] + products[j][j]) for j in range(n) if j != i)
        scores.append((math.fsum(squares[:near]), i))
    kept = {i for _, i in sorted(scores)[: max(1, n - settings.hostile_max)]}
    total = math.fsum(w for i, w in enumerate(geometry.weights) if i in kept)
    return Plan([w / total if i in kept else 0.0 for i, w in enumerate(geometry.weights)], _ones(geometry))


def plan_centered_clipping(geometry: Geometry, settings: CenteredClipping) -> Plan:
    """See `merging.CenteredClipping`; the first centre is the parent, that is a delta of zero."""
    bound = settings.clip_factor * geometry.median_norm
    mix = [0.0] * len(geometry.norms)
    for _ in range(settings.iterations):
        distances = geometry.compute_distances(mix)
        steps = [w * _clip(d, bound) for w, d in zip(geometry.weights, distances, strict=True)]
        rest = 1.0 - math.fsum(steps)
        mix = [rest * c + step for c, step in zip(mix, steps, strict=True)]
    return Plan(mix, _ones(geometry), bound)


METHODS: dict[str, Method] = {
    "mean": plan_mean,
    "clipped_mean": plan_clipped_mean,
    "coordinate_median": plan_coordinate_median,
    "trimmed_mean": plan_trimmed_mean,
    "geometric_median": plan_geometric_median,
    "multi_krum": plan_multi_krum,
    "centered_clipping": plan_centered_clipping,
}


def find_method(settings: Merge) -> Method:
    """The function that a spec names.

    Raises
    ------
    SpecError
        If a method of the consortium's own is not installed, or another version of it is.
    """
    if not isinstance(settings, CustomMerge):
        return METHODS[settings.method]
    found = {point.name: point for point in entry_points(group=GROUP)}
    if settings.name not in found:
        raise SpecError(f"the merge method {settings.name!r} is not installed",
                        hint=f"install the consortium's package that offers it in {GROUP}")
    method: Method = found[settings.name].load()
    code = digest_code(method)
    if code != settings.code:
        raise SpecError(f"the merge method {settings.name!r} here is {code[:12]}…, the spec's is {settings.code[:12]}…",
                        hint="install the version that the spec was written with")
    return method


def digest_code(method: Method) -> str:
    """SHA-256 of a method's source file, for `merging.CustomMerge`. Raises `SpecError` without a file."""
    try:
        return compute_digest(Path(inspect.getsourcefile(method) or "").read_bytes())
    except (OSError, TypeError) as exc:
        raise SpecError(f"the merge method {method!r} has no source file", hint="a method is a plain function") from exc


def _clip(norm: float, bound: float) -> float:
    return min(1.0, bound / norm) if norm > 0 else 1.0


def _ones(geometry: Geometry) -> list[float]:
    return [1.0] * len(geometry.norms)
