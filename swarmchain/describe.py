"""A run's law in words: what a person reads before consenting to it, and how two specs differ.

Nothing is left out: a field of the spec that has no words of its own is shown as it stands, so that a consent never
covers what was not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from swarmchain.layouts import contribution_layout, local_layout, parameter_layout
from swarmchain.protocol import BPS, Terms
from swarmchain.spec import CellTypeSpec, DonorSpec, EvaluationSpec, Model, RowModel, Spec, StatisticsSpec

TASKS = {
    "statistics": "sums over all sites' training cells, for standardisation and class balance; nothing is trained",
    "evaluation": "counts how a finished model does on the sites' validation cells; nothing is trained",
    "cell_type": "trains a classifier of cell types",
    "donor": "trains a classifier of donors' samples",
    "custom": "trains a network of the sites' own, each with a program of its own",
    "rehearsal": "a rehearsal with random numbers; no cell is read",
}
NAMES_SHOWN = 8
# Said elsewhere: the format by the program, the task and the name at the top.
UNSPOKEN = {"format", "task", "name"}

Line = tuple[str, str]


def describe_spec(spec: Spec) -> list[Line]:
    """What a run is, as (what, words) lines, every field of its spec included."""
    lines = [("task", f"{spec.task} “{spec.name}”: {TASKS.get(spec.task, 'see docs for this task')}"),
             ("leaves the site", describe_leaving(spec))]
    for field in type(spec).model_fields:
        if field not in UNSPOKEN:
            lines += _describe_field(field, getattr(spec, field))
    return lines


def describe_leaving(spec: Spec) -> str:
    """What a site that joins sends to the shared store and to the chain."""
    if isinstance(spec, StatisticsSpec):
        samples = ", samples" if spec.split_by == "donor" else ""
        return ("per feature: its number of training cells, their sums and sums of squares; per label: the numbers of "
                f"its training cells, donors{samples} and sites. No cell, no cell's name")
    if isinstance(spec, EvaluationSpec):
        return ("numbers of validation cells (of a model of donors: samples) by label and call, and of right "
                "and wrong calls by confidence; sums of log-likelihoods. No cell, no cell's name")
    numbers = sum(math.prod(shape) for _, shape in contribution_layout(spec).values())
    if spec.task == "rehearsal":
        return f"{numbers:,} random numbers a round"
    kept = sum(math.prod(shape) for _, shape in local_layout(spec).values())
    parameters = sum(math.prod(shape) for _, shape in parameter_layout(spec).values())
    stays = f"; {kept:,} numbers of the network stay here" if kept else ""
    counted = "samples" if isinstance(spec, DonorSpec) else "cells"
    is_rated = isinstance(spec, CellTypeSpec | DonorSpec) and spec.merge.trust is not None
    ratings = f", what each other site's last contribution does to the loss on its validation {counted}" * is_rated
    return (f"a round: changes of the network's {parameters:,} parameters ({spec.codec}), the number of training "
            f"{counted}, this site's score on its validation {counted}{ratings}. No cell, no cell's name{stays}")


def describe_terms(terms: Terms, *, proposer: str) -> list[Line]:
    """What the contract holds of a run: windows, quorum, and who proposed it."""
    share = f"{terms.quorum_bps / BPS:.0%}, and a majority in any case,"
    quorum = "a majority" if terms.quorum_bps * 2 <= BPS else share
    return [
        ("windows", f"a round waits {describe_duration(terms.commit_window_s)} for contributions and "
                    f"{describe_duration(terms.vote_window_s)} for votes"),
        ("quorum", f"{quorum} of a round's members must accept; a round needs {terms.sites_min} contributions"),
        ("proposed by", proposer),
    ]


def describe_duration(seconds: float) -> str:
    """Seconds as a person says them: the two largest units."""
    left = round(seconds)
    parts: list[str] = []
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if left >= size and len(parts) < 2:
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts) or "0 s"


def compare_specs(old: Spec, new: Spec) -> list[Line]:
    """Fields in which two specs differ, by their dotted names, in words; empty if a join would accept the same."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [(name, _describe_change(before.get(name), after.get(name)))
            for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def _describe_change(old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(v, str) for v in (*old, *new)):
        gone, come = [v for v in old if v not in set(new)], [v for v in new if v not in set(old)]
        parts = [f"without {_join(gone)}"] * bool(gone) + [f"with {_join(come)}"] * bool(come)
        return f"{len(old)} → {len(new)}: {', '.join(parts) or 'in another order'}"
    return f"{_show(old)} → {_show(new)}"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {prefix + key: item}
    return flat


def _describe_field(name: str, value: Any) -> Iterator[Line]:
    words = FIELDS.get(name)
    plain = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    yield words(value) if words else (name, _show(plain))


def _describe_panel(panel: Any) -> Line:
    return "panel", (f"{len(panel.features):,} features ({_join(panel.features)}); a site must hold at least "
                     f"{panel.share_min:.0%} of them")


def _describe_labels(labels: Sequence[str]) -> Line:
    return "labels", f"{len(labels)}: {_join(labels)}"


def _describe_ontology(ontology: Mapping[str, Any]) -> Line:
    words = [f"{label}{f' is {term.id}' * (term.id is not None)}{f' (of {term.parent})' * (term.parent is not None)}"
             for label, term in ontology.items()]
    return "ontology", f"{len(words)} terms: {_join(words)}" if words else "none: labels are compared by name alone"


def _describe_split(split_by: str) -> Line:
    return "split by", ("donor: all samples of a donor are for training, or none" if split_by == "donor"
                        else "cell: the validation cells are drawn from each label's")


def _describe_normalization(settings: Any) -> Line:
    words = {"log1p": f"log1p of counts scaled to {settings.target_sum:,.0f} per cell",
             "arcsinh": f"arcsinh of X / {settings.cofactor:g}", "none": "X as it is",
             "proportions": "shares of each row's total"}
    return "normalisation", words[settings.kind]


def _describe_limits(limits: Any) -> Line:
    rounds = f"until the first checkpoint, {limits.rounds} at most" if limits.one_checkpoint else f"{limits.rounds}"
    return "rounds", (f"{rounds}; starts once {limits.sites_to_start} sites have joined, rests after "
                      f"{limits.failures_max} failures in a row; contributions are waited for "
                      f"{describe_duration(limits.opening_timeout_s)} after a round's commitments")


def _describe_model(model: Any) -> Line:
    if not isinstance(model, Model):
        return "model", _show(model.model_dump(mode="json"))
    hidden = " × ".join(map(str, model.hidden)) or "no"
    extras = ["one row for each sample"] * isinstance(model, RowModel)
    extras += [f"dropout {model.dropout:g}"] * bool(model.dropout) + ["batch normalisation"] * model.batch_norm
    extras += ["told which features a site has"] * model.mask
    extras += [f"{_join(model.local)} stay at each site"] * bool(model.local)
    return "model", "; ".join([f"a perceptron, hidden layers {hidden}", *extras])


def _describe_training(training: Any) -> Line:
    balance = {"none": "cells drawn evenly", "inverse_sqrt": "rare classes drawn more often",
               "inverse": "all classes drawn equally often"}
    proximal = f", FedProx {training.proximal:g}" if training.proximal else ""
    return "training", (
        f"{training.steps:,} steps of {training.batch_size} cells a round, learning rate {training.lr:g} down to "
        f"{training.lr * training.lr_final_share:g}, weight decay {training.weight_decay:g}, label smoothing "
        f"{training.label_smoothing:g}, {balance[training.class_balance]}{proximal}, seed {training.seed}")


def _describe_merge(merge: Any) -> Line:
    own = {k: v for k, v in merge.model_dump(mode="json").items()
           if k not in ("method", "weighting", "weight_max", "outer", "trust")}
    settings = "".join(f", {key} {_show(value)}" for key, value in own.items())
    outer = "" if merge.outer.kind == "none" and merge.outer.lr == 1 else f"; then {_show(merge.outer.model_dump())}"
    return "merge", (f"{merge.method}{settings}; shares by {merge.weighting.replace('_', ' ')}, none above "
                     f"{merge.weight_max:.0%}{outer}; {_describe_trust(merge.trust)}")


def _describe_trust(trust: Any) -> str:
    if trust is None:
        return "whoever contributes has a share, whatever it does to the others"
    settings = ", ".join(f"{key} {_show(value)}" for key, value in trust.model_dump(mode="json").items())
    return f"a site that most of the others find harmful on their validation cells has no share ({settings})"


def _describe_gate(gate: Any) -> Line:
    return "gate", (f"this site refuses a checkpoint whose score on its own validation cells falls by more than "
                    f"{gate.score_drop_max:g}")


def _describe_minimums(least: Any) -> Line:
    return "minimums", (f"a site needs {least.cells} training cells and {least.donors} donors; a label of which a site "
                        f"has fewer than {least.cells_per_label} cells or {least.donors_per_label} donors is left out "
                        "there")


def _describe_tensors(tensors: Any) -> Line:
    return "network", f"{len(tensors):,} tensors: {_join([t.name for t in tensors])}"


def _describe_statistics(ref: Any) -> Line:
    return "stands on", f"the statistics of run {ref.run} (checkpoint {ref.checkpoint[:12]}…)"


FIELDS: dict[str, Callable[[Any], Line]] = {
    "panel": _describe_panel, "labels": _describe_labels, "normalization": _describe_normalization,
    "limits": _describe_limits, "model": _describe_model, "training": _describe_training, "merge": _describe_merge,
    "gate": _describe_gate, "statistics": _describe_statistics, "minimums": _describe_minimums,
    "tensors": _describe_tensors,
    "trained": lambda ref: ("evaluates", f"the model of run {ref.run} (checkpoint {ref.checkpoint[:12]}…)"),
    "validation_share": lambda share: ("validation", f"{share:.0%} are never trained on"),
    "ontology": _describe_ontology, "split_by": _describe_split,
    "bag_size": lambda cells: ("bags", f"a network of bags draws {cells:,} cells of a sample at each step"),
    "labels_min": lambda labels: ("labels here", f"a site needs training samples of {labels} labels or more"),
    "score": lambda score: ("score", {"macro_f1": "macro-F1", "auroc": "area under the ROC curve"}[score]),
    "temperatures": lambda tried: ("temperatures", f"{len(tried)} are tried, {tried[0]:g} to {tried[-1]:g}"),
    "bins": lambda bins: ("confidences", f"counted in {bins} bins of equal width"),
    "cells_min": lambda cells: ("minimums", f"a site needs {cells:,} validation cells, or samples of donors"),
    "donors_min": lambda donors: ("donors", f"a site needs validation cells or samples of {donors:,} donors"),
    "right_share_min": lambda share: (
        "unknown", f"calls below the confidence from which on {share:.0%} were right are to count as unknown"),
    "local": lambda names: ("stays here", f"tensors that begin with {_join(names)}" if names else "no tensor"),
    "settings": lambda found: ("settings", _join([f"{k} {_show(v)}" for k, v in found.items()]) or "none"),
    "code": lambda digest: ("code", "any program" if digest is None else f"the file with SHA-256 {digest[:12]}…"),
    "codec": lambda codec: ("codec", f"contributions travel as {codec}"),
    "seed_checkpoint": lambda digest: ("seed", f"training starts from checkpoint {digest[:12]}…"),
    "widths": lambda widths: ("model", f"layers {' × '.join(map(str, widths))}"),
    "seed": lambda seed: ("seed", str(seed)),
}


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(str, names[:NAMES_SHOWN])) + more


def _show(value: Any) -> str:
    """A value on one line, cut where it is long."""
    text = "not there" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "…"
