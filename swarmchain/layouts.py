"""From a run's law to the tensors of its blobs: names, dtypes and shapes, in canonical (sorted) order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from swarmchain.merging import Codec, Merge
from swarmchain.spec import (
    CustomSpec,
    EvaluationSpec,
    GatedAttention,
    Model,
    NetworkSpec,
    Pseudobulk,
    RehearsalSpec,
    Spec,
    StatisticsSpec,
    SumSpec,
    TrainedSpec,
)

SCALE = ":scale"
STATISTICS = ("running_mean", "running_var")
LOW = "_low"  # of a sum: what its float64 cannot hold

# numpy's names
Layout = Mapping[str, tuple[Literal["float32", "float64", "int64", "float16", "int8"], tuple[int, ...]]]


def statistics_layout(spec: StatisticsSpec) -> Layout:
    """Tensors of a statistics contribution and checkpoint; all count or sum over training cells.

    A sum is a pair of float64: it stands for `<name>` + `<name>_low`. `sum` and `sum_of_squares` are of x, `expm1_sum`
    and `expm1_sum_of_squares` of eˣ - 1, that is of what x was before the logarithm; those are there for log1p alone.
    `donors` is 0, as `donors_per_label` is, at sites that do not know their donors. Samples are counted where the run
    splits by donor.
    """
    features, labels = (len(spec.panel.features),), (len(spec.labels),)
    layout: dict[str, Any] = {"donors": ("int64", ()), "sites": ("int64", ())}
    layout |= {f"{what}_per_feature": ("int64", features) for what in ("cells", "sites")}
    counted = ("cells", "donors", "sites", *(("samples",) if spec.split_by == "donor" else ()))
    layout |= {f"{what}_per_label": ("int64", labels) for what in counted}
    for prefix in ("", "expm1_") if spec.normalization.kind == "log1p" else ("",):
        for name in ("sum", "sum_of_squares"):
            layout |= {f"{prefix}{name}{part}": ("float64", features) for part in ("", LOW)}
    return dict(sorted(layout.items()))


def evaluation_layout(spec: EvaluationSpec) -> Layout:
    """Tensors of an evaluation's contribution and checkpoint; sums are over validation cells.

    `confusion` counts cells by label (row) and call (column). For every temperature, `negative_log_likelihood` is the
    sum over cells of -ln of the probability of the cell's label, and `right` and `wrong` count the calls by the bin
    that their confidence falls into.
    """
    labels, temperatures = len(spec.labels), len(spec.temperatures)
    return {
        "confusion": ("int64", (labels, labels)),
        "negative_log_likelihood": ("float64", (temperatures,)),
        "right": ("int64", (temperatures, spec.bins)),
        "wrong": ("int64", (temperatures, spec.bins)),
    }


def sum_layout(spec: SumSpec) -> Layout:
    """Tensors of a run whose merge is a sum: contributions and checkpoint are alike."""
    return statistics_layout(spec) if isinstance(spec, StatisticsSpec) else evaluation_layout(spec)


def state_layout(spec: NetworkSpec) -> Layout:
    """Tensors of the network: parameters and buffers.

    `layers.<i>.weight` is [out, in] and `layers.<i>.bias` is [out], from the panel (and its mask) to the labels;
    `norms.<i>` is the batch normalisation after layer i, [out] each. A model of sets has `encoder.<i>` in front,
    applied to every cell, and gated attention has `attention.<part>`: `content` and `gate` [units, width], `score`
    [1, units].
    """
    if isinstance(spec, CustomSpec):
        return {tensor.name: (tensor.dtype, tensor.shape) for tensor in spec.tensors}
    if isinstance(spec, RehearsalSpec):
        return dict(sorted(_linear_layers("layers", spec.widths).items()))
    width, outputs, model = len(spec.panel.features), len(spec.labels), spec.model
    layout: dict[str, Any] = {}
    if isinstance(model, Model):
        width *= 1 + model.mask
        if model.batch_norm:
            for i, units in enumerate(model.hidden):
                layout |= {f"norms.{i}.{name}": ("float32", (units,)) for name in ("weight", "bias", *STATISTICS)}
                layout[f"norms.{i}.num_batches_tracked"] = ("int64", ())
    elif not isinstance(model, Pseudobulk):
        layout |= _linear_layers("encoder", (width, *model.encoder))
        width = model.encoder[-1]
    if isinstance(model, GatedAttention):
        for part, shape in (("content", (model.attention, width)), ("gate", (model.attention, width)),
                            ("score", (1, model.attention))):
            layout |= {f"attention.{part}.weight": ("float32", shape), f"attention.{part}.bias": ("float32", shape[:1])}
    layout |= _linear_layers("layers", (width, *model.hidden, outputs))
    return dict(sorted(layout.items()))


def _linear_layers(name: str, widths: Sequence[int]) -> dict[str, Any]:
    layout: dict[str, Any] = {}
    for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        layout[f"{name}.{i}.weight"] = ("float32", (width_out, width_in))
        layout[f"{name}.{i}.bias"] = ("float32", (width_out,))
    return layout


def local_layout(spec: NetworkSpec) -> Layout:
    """Tensors of the network that every site keeps to itself."""
    if isinstance(spec, CustomSpec):
        return {name: entry for name, entry in state_layout(spec).items() if name.startswith(spec.local)}
    if isinstance(spec, RehearsalSpec) or not isinstance(spec.model, Model):
        return {}
    prefixes = {"norms": "norms.", "head": f"layers.{len(spec.model.hidden)}."}
    kept = tuple(prefixes[part] for part in spec.model.local)
    return {name: entry for name, entry in state_layout(spec).items() if kept and name.startswith(kept)}


def parameter_layout(spec: NetworkSpec) -> Layout:
    """Tensors that a contribution holds the deltas of, and a merge moves.

    Those are all floating-point tensors of the network that are not local. Batch normalisation's running means and
    variances are among them: they are merged as parameters are, but no outer optimiser moves them, and a variance does
    not fall below 0. Integer buffers (counters) are not: checkpoints carry the seed checkpoint's.
    """
    local = local_layout(spec)
    return {name: entry for name, entry in state_layout(spec).items() if entry[0] == "float32" and name not in local}


def constant_layout(spec: TrainedSpec) -> Layout:
    """Tensors that every checkpoint of a run carries unchanged: the panel's federated mean and SD."""
    features = len(spec.panel.features)
    return {"standardize.mean": ("float32", (features,)), "standardize.scale": ("float32", (features,))}


def contribution_layout(spec: Spec) -> Layout:
    """Tensors of one site's contribution; with the codec `int8`, `<name>:scale` is what a unit stands for."""
    if isinstance(spec, SumSpec):
        return sum_layout(spec)
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
    if isinstance(spec, SumSpec):
        return sum_layout(spec)
    layout = {**state_layout(spec), **outer_layout(parameter_layout(spec), spec.merge)}
    if isinstance(spec, TrainedSpec):
        layout |= constant_layout(spec)
    return dict(sorted(layout.items()))
