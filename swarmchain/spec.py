"""A run's law: everything that must be equal at all sites.

A spec is canonical JSON in the store; its SHA-256 stands on chain. There are three tasks. `statistics` sums, over the
sites' training cells, what standardisation and class balancing need. `cell_type` trains a classifier on a panel of
features, from a seed checkpoint that travels as a blob (layer initialisation is not equal on all CPUs, so a seed is
never replayed elsewhere). `rehearsal` needs no cells: its contributions are random numbers of a real model's size, so
that chain, store, merge and vote can be tried before any data are there.

What a spec does not hold: anything about one site (that is `config`), and the windows and quorum (those are on chain).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from swarmchain.errors import SpecError
from swarmchain.protocol import Digest, Strict, compute_digest, encode_canonical, first_problem

SPEC_BYTES_MAX = 16 << 20
FEATURES_MAX = 200_000
CLASSES_MAX = 1_000
SCALE = ":scale"
STATISTICS = ("running_mean", "running_var")

Name = Annotated[str, Field(min_length=1, max_length=200)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

# numpy's names; a layout says which tensors a blob holds, in canonical (sorted) order
Layout = Mapping[str, tuple[Literal["float32", "float64", "int64", "float16", "int8"], tuple[int, ...]]]


class Panel(Strict):
    """The features, in order, and the share of them that a site's data must hold."""

    features: Annotated[tuple[Name, ...], Field(min_length=1, max_length=FEATURES_MAX)]
    share_min: Share = 0.5

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len(set(self.features)) != len(self.features):
            raise ValueError("a feature stands twice in the panel")
        return self


class Normalization(Strict):
    """The state of X: `log1p` of counts scaled to `target_sum` per cell, or `arcsinh` of X / `cofactor`."""

    kind: Literal["log1p", "arcsinh", "none"] = "log1p"
    target_sum: Positive = 10_000.0
    cofactor: Positive = 5.0


class Limits(Strict):
    """When a run starts, ends and rests.

    `rounds` counts every round, whatever its outcome; with `one_checkpoint` the first finalized one is the last. The
    first round opens once `sites_to_start` have joined. The run rests after `failures_max` rounds in a row without a
    checkpoint. Openings that are missing `opening_timeout_s` after the end of the Commit phase are not waited for.
    """

    rounds: Annotated[int, Field(ge=1, le=100_000)]
    one_checkpoint: bool = False
    sites_to_start: Annotated[int, Field(ge=1, le=256)]
    failures_max: Annotated[int, Field(ge=1, le=200)] = 5
    opening_timeout_s: Positive = 30.0


class Model(Strict):
    """A perceptron: panel → hidden layers (ReLU, dropout) → one logit per label. No hidden layer: a linear model.

    `batch_norm` normalises every hidden layer before its ReLU. `local` names parts that never leave a site: each site
    trains its own, and the checkpoints carry the seed checkpoint's. `norms` are the normalisation layers (FedBN; Li et
    al. 2021), `head` is the last layer.
    """

    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = (128,)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_norm: bool = False
    local: tuple[Literal["norms", "head"], ...] = ()


class Training(Strict):
    """One site's local training in one round.

    `steps` minibatches of `batch_size` cells, Adam restarted each round, learning rate `lr` decayed over the run's
    rounds by a half cosine to `lr * lr_final_share`. `class_balance` = `inverse_sqrt` draws a cell with probability
    proportional to 1 / sqrt(its class's count over all sites).
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    lr: Positive = 1e-3
    lr_final_share: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_balance: Literal["none", "inverse_sqrt"] = "inverse_sqrt"


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


class _Merge(Strict):
    """What all merge methods have: shares proportional to `weighting`, none above `weight_max` where that can be."""

    weighting: Literal["samples", "sqrt_samples", "equal"] = "sqrt_samples"
    weight_max: Annotated[float, Field(gt=0, le=1)] = 0.3
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


class Gate(Strict):
    """A site accepts a checkpoint unless its macro-F1 on the site's validation cells falls by more than this."""

    score_drop_max: Share = 0.5


class StatisticsRef(Strict):
    """The finalized statistics run that a training run stands on."""

    run: Annotated[int, Field(ge=1)]
    spec: Digest
    checkpoint: Digest


class _Spec(Strict):
    format: Literal["swarmchain-spec/1"] = "swarmchain-spec/1"
    name: Name
    limits: Limits


class _CellSpec(_Spec):
    panel: Panel
    labels: Annotated[tuple[Name, ...], Field(min_length=2, max_length=CLASSES_MAX)]
    normalization: Normalization = Normalization()
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.15

    @model_validator(mode="after")
    def _unique_labels(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands twice in the list")
        return self


class StatisticsSpec(_CellSpec):
    """Sums over all sites' training cells: cells, sums and sums of squares per feature, cells per class."""

    task: Literal["statistics"] = "statistics"


class CellTypeSpec(_CellSpec):
    """A cell-type classifier."""

    task: Literal["cell_type"] = "cell_type"
    model: Model = Model()
    training: Training = Training()
    merge: Merge = ClippedMean()
    codec: Codec = "float32"
    gate: Gate = Gate()
    statistics: StatisticsRef
    seed_checkpoint: Digest


class RehearsalSpec(_Spec):
    """A run without cells: `widths` are the layers' widths, from inputs to outputs, of the model that it stands for."""

    task: Literal["rehearsal"] = "rehearsal"
    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=FEATURES_MAX)], ...], Field(min_length=2)]
    merge: Merge = ClippedMean()
    codec: Codec = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


CellSpec = StatisticsSpec | CellTypeSpec
Spec = CellSpec | RehearsalSpec
_MERGES: TypeAdapter[Merge] = TypeAdapter(Merge)
_ADAPTER: TypeAdapter[Spec] = TypeAdapter(Annotated[Spec, Field(discriminator="task")])


def parse_spec(data: bytes) -> Spec:
    """Read a spec.

    Raises
    ------
    SpecError
        Naming the first field that is wrong.
    """
    if len(data) > SPEC_BYTES_MAX:
        raise SpecError(f"a spec of {len(data)} bytes is over the limit of {SPEC_BYTES_MAX}")
    try:
        return _ADAPTER.validate_json(data)
    except ValidationError as exc:
        raise SpecError(
            f"not a spec: {first_problem(exc)}", hint="`swarmchain run new` writes a valid one to start from"
        ) from exc


def parse_merge(settings: Mapping[str, Any]) -> Merge:
    """Merge settings from plain values. Raises `SpecError`."""
    try:
        return _MERGES.validate_json(encode_canonical(dict(settings)))
    except ValidationError as exc:
        raise SpecError(f"merge: {first_problem(exc)}") from exc


def encode_spec(spec: Spec) -> bytes:
    """Canonical bytes of a spec; its digest is what stands on chain."""
    return encode_canonical(spec)


def compute_spec_digest(spec: Spec) -> str:
    """SHA-256 of the canonical spec."""
    return compute_digest(encode_spec(spec))


def statistics_layout(features: int, labels: int) -> Layout:
    """Tensors of a statistics contribution and checkpoint; sums are over training cells."""
    return {
        "cells_per_feature": ("int64", (features,)),
        "cells_per_label": ("int64", (labels,)),
        "sites_per_feature": ("int64", (features,)),
        "sum": ("float64", (features,)),
        "sum_of_squares": ("float64", (features,)),
    }


def state_layout(spec: CellTypeSpec | RehearsalSpec) -> Layout:
    """Tensors of the network: parameters and buffers.

    `layers.<i>.weight` is [out, in] and `layers.<i>.bias` is [out], from the panel to the labels; `norms.<i>` is the
    batch normalisation after layer i, [out] each.
    """
    if isinstance(spec, RehearsalSpec):
        widths = list(spec.widths)
    else:
        widths = [len(spec.panel.features), *spec.model.hidden, len(spec.labels)]
    layout: dict[str, Any] = {}
    for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        layout[f"layers.{i}.weight"] = ("float32", (width_out, width_in))
        layout[f"layers.{i}.bias"] = ("float32", (width_out,))
    if isinstance(spec, CellTypeSpec) and spec.model.batch_norm:
        for i, width in enumerate(spec.model.hidden):
            layout |= {f"norms.{i}.{name}": ("float32", (width,)) for name in ("weight", "bias", *STATISTICS)}
            layout[f"norms.{i}.num_batches_tracked"] = ("int64", ())
    return dict(sorted(layout.items()))


def local_layout(spec: CellTypeSpec | RehearsalSpec) -> Layout:
    """Tensors of the network that every site keeps to itself."""
    if isinstance(spec, RehearsalSpec):
        return {}
    prefixes = {"norms": "norms.", "head": f"layers.{len(spec.model.hidden)}."}
    kept = tuple(prefixes[part] for part in spec.model.local)
    return {name: entry for name, entry in state_layout(spec).items() if kept and name.startswith(kept)}


def parameter_layout(spec: CellTypeSpec | RehearsalSpec) -> Layout:
    """Tensors that a contribution holds the deltas of, and a merge moves.

    Those are all floating-point tensors of the network that are not local. Batch normalisation's running means and
    variances are among them: they are merged as parameters are, but no outer optimiser moves them, and a variance does
    not fall below 0. Integer buffers (counters) are not: checkpoints carry the seed checkpoint's.
    """
    local = local_layout(spec)
    return {name: entry for name, entry in state_layout(spec).items() if entry[0] == "float32" and name not in local}


def constant_layout(spec: CellTypeSpec) -> Layout:
    """Tensors that every checkpoint of a run carries unchanged: the panel's federated mean and SD."""
    features = len(spec.panel.features)
    return {"standardize.mean": ("float32", (features,)), "standardize.scale": ("float32", (features,))}


def contribution_layout(spec: Spec) -> Layout:
    """Tensors of one site's contribution; with the codec `int8`, `<name>:scale` is what a unit stands for."""
    if isinstance(spec, StatisticsSpec):
        return statistics_layout(len(spec.panel.features), len(spec.labels))
    return code_layout(parameter_layout(spec), spec.codec)


def code_layout(layout: Layout, codec: Codec) -> Layout:
    """The layout of float32 deltas once they are coded."""
    coded: dict[str, Any] = {name: (codec, shape) for name, (_, shape) in layout.items()}
    if codec == "int8":
        coded |= {f"{name}{SCALE}": ("float32", ()) for name in layout}
    return dict(sorted(coded.items()))


def outer_layout(parameters: Layout, merge: Merge) -> Layout:
    """Tensors that the outer optimiser remembers from round to round."""
    moments = {"none": (), "momentum": ("m",), "nesterov": ("m",), "fedadam": ("m", "v")}[merge.outer.kind]
    return {f"outer.{moment}.{name}": entry for moment in moments for name, entry in parameters.items()
            if not is_statistic(name)}


def is_statistic(name: str) -> bool:
    """Whether a tensor is batch normalisation's running mean or variance."""
    return name.endswith(STATISTICS)


def checkpoint_layout(spec: Spec) -> Layout:
    """Tensors of the run's checkpoints."""
    if isinstance(spec, StatisticsSpec):
        return statistics_layout(len(spec.panel.features), len(spec.labels))
    layout = {**state_layout(spec), **outer_layout(parameter_layout(spec), spec.merge)}
    if isinstance(spec, CellTypeSpec):
        layout |= constant_layout(spec)
    return dict(sorted(layout.items()))
