"""The part of a run's law that says how contributions become a checkpoint: merge methods, outer optimisers, codecs.

Settings only; `methods`, `merge` and `codec` do what they say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from swarmchain.errors import SpecError
from swarmchain.protocol import Digest, Strict, encode_canonical, first_problem

Name = Annotated[str, Field(min_length=1, max_length=200)]
Positive = Annotated[float, Field(gt=0)]


class Outer(Strict):
    """What is done with the merged delta d, before it is added to the parent.

    none
        `lr` · d.
    momentum, nesterov
        m ← `momentum` · m + d, then `lr` · m, or `lr` · (d + `momentum` · m) (Sutskever et al. 2013; as DiLoCo's outer
        step, Douillard et al. 2023).
    fedadam
        m ← `momentum` · m + (1 - `momentum`) · d, v ← `decay` · v + (1 - `decay`) · d², then
        `lr` · m / (√v + `epsilon`) (Reddi et al. 2021, algorithm 2).

    m and v start at zero and travel in the checkpoint.
    """

    kind: Literal["none", "momentum", "nesterov", "fedadam"] = "none"
    lr: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    epsilon: Positive = 1e-3


class Trust(Strict):
    """When a site's contributions lose their weight for what they do to the other sites' validation cells; see `trust`.

    A contribution is expected to help a rater at least `benefit_percent` of what its fellows do. What a majority of the
    other sites misses of that, beyond `slack_mnat` in a round, adds up, and what it gets beyond both is taken off;
    above `harm_max_mnat` the site is left out. No more than `memory_mnat` is remembered. In 1/1000 nat of balanced
    cross-entropy. With `rate_first` the first round changes nothing: its contributions are there to be rated, before
    anything is merged.
    """

    rate_first: bool = True
    benefit_percent: Annotated[int, Field(ge=0, le=100)] = 50
    slack_mnat: Annotated[int, Field(ge=0)] = 30
    harm_max_mnat: Annotated[int, Field(ge=1)] = 60
    memory_mnat: Annotated[int, Field(ge=1)] = 2_000


class _Merge(Strict):
    """What all merge methods have: shares proportional to `weighting`, none above `weight_max` where that can be.

    `trust` says who has a share at all; None gives one to everyone whose contribution is good.
    """

    weighting: Literal["samples", "sqrt_samples", "equal"] = "sqrt_samples"
    weight_max: Annotated[float, Field(gt=0, le=1)] = 0.3
    trust: Trust | None = Trust()
    outer: Outer = Outer()


class ClippedMean(_Merge):
    """Weighted mean of deltas that are scaled down to at most `clip_factor` times the median norm."""

    method: Literal["clipped_mean"] = "clipped_mean"
    clip_factor: Positive = 1.0


class Mean(_Merge):
    """Weighted mean; one hostile site moves it as far as it likes."""

    method: Literal["mean"] = "mean"


class CoordinateMedian(_Merge):
    """Weighted median of every parameter by itself (Yin et al. 2018)."""

    method: Literal["coordinate_median"] = "coordinate_median"


class TrimmedMean(_Merge):
    """Weighted mean of every parameter by itself, without the `trim` of all weight at either end (Yin et al. 2018)."""

    method: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2


class GeometricMedian(_Merge):
    """Point of the least weighted sum of distances: Weiszfeld's steps, smoothed (Pillutla et al. 2022)."""

    method: Literal["geometric_median"] = "geometric_median"
    iterations: Annotated[int, Field(ge=1, le=100)] = 8


class MultiKrum(_Merge):
    """Weighted mean of all but the `hostile_max` deltas farthest from their neighbours (Blanchard et al. 2017)."""

    method: Literal["multi_krum"] = "multi_krum"
    hostile_max: Annotated[int, Field(ge=0, le=127)] = 1


class CenteredClipping(_Merge):
    """Steps towards the deltas, none longer than `clip_factor` times the median norm (Karimireddy et al. 2021)."""

    method: Literal["centered_clipping"] = "centered_clipping"
    clip_factor: Positive = 1.0
    iterations: Annotated[int, Field(ge=1, le=100)] = 3


class CustomMerge(_Merge):
    """A method of the consortium's own, from the entry point `name` in the group `swarmchain.merge_methods`.

    `code` is the SHA-256 of the source file that defines it: every site must have installed the same.
    """

    method: Literal["custom"] = "custom"
    name: Name
    code: Digest
    settings: dict[str, float] = {}


Merge = Annotated[
    ClippedMean | Mean | CoordinateMedian | TrimmedMean | GeometricMedian | MultiKrum | CenteredClipping | CustomMerge,
    Field(discriminator="method"),
]


Codec = Literal["float32", "float16", "int8"]
CODECS: tuple[Codec, ...] = get_args(Codec)
_MERGES: TypeAdapter[Merge] = TypeAdapter(Merge)


def parse_merge(settings: Mapping[str, Any]) -> Merge:
    """Merge settings from plain values. Raises `SpecError`."""
    try:
        return _MERGES.validate_json(encode_canonical(dict(settings)))
    except ValidationError as exc:
        raise SpecError(f"merge: {first_problem(exc)}") from exc
