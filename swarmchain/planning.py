"""From site cards to specs: what a run's proposer writes for all.

Two runs make a model. A statistics run sums means, SDs and class counts over the union of the sites' features; its
finalized checkpoint then fixes panel, standardisation and class balance of the training run, and its seed checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import ValidationError

from swarmchain.agreement import (
    Cutoffs,
    Flavor,
    choose_variable,
    compute_standardization,
    compute_variability,
    find_common,
)
from swarmchain.certify import Arrays
from swarmchain.checkpoint import encode_tensors
from swarmchain.config import SiteCard
from swarmchain.errors import BlobMissing, ConfigError, SpecError
from swarmchain.layouts import checkpoint_layout
from swarmchain.merging import ClippedMean, Codec, Merge
from swarmchain.model import draw_state
from swarmchain.protocol import RunView, compute_digest, first_problem
from swarmchain.spec import (
    CellTypeSpec,
    DonorModel,
    DonorSpec,
    Gate,
    Limits,
    Minimums,
    Model,
    Normalization,
    Panel,
    StatisticsRef,
    StatisticsSpec,
    Training,
)
from swarmchain.store import Store, read_checkpoint, read_spec

S = TypeVar("S", CellTypeSpec, DonorSpec)
ROUNDS_TO_RATE_FIRST = 20


def plan_statistics(
    cards: Sequence[SiteCard], *, name: str, sites_to_start: int, normalization: Normalization | None = None,
    minimums: Minimums | None = None, split_by: Literal["cell", "donor"] = "cell",
) -> StatisticsSpec:
    """A statistics run over all features and labels that the cards name; for runs on donors, `split_by` = `donor`.

    Raises
    ------
    SpecError
        If the cards have fewer than two labels between them.
    """
    labels = sorted({label for card in cards for label in card.labels})
    features = sorted({feature for card in cards for feature in card.features})
    if len(labels) < 2:
        raise SpecError(f"the site cards name {len(labels)} labels", hint="a classifier needs at least two")
    return StatisticsSpec(
        name=name, panel=Panel(features=tuple(features), share_min=0.0), labels=tuple(labels),
        normalization=normalization or Normalization(), minimums=minimums or Minimums(), split_by=split_by,
        limits=Limits(rounds=5, one_checkpoint=True, sites_to_start=sites_to_start),
    )


def read_cards(store: Store, *, only: Mapping[str, str] | None = None) -> list[SiteCard]:
    """Cards from the store, by address.

    Parameters
    ----------
    only
        Address → name of the sites whose cards are wanted, all of them; by default whatever is there.

    Raises
    ------
    ConfigError
        If a card is missing, is none, or names another site than the one in whose place it lies.
    """
    addresses = sorted(only, key=str.lower) if only is not None else store.list_cards()
    return [_read_card(store, address, (only or {}).get(address)) for address in addresses]


def _read_card(store: Store, address: str, name: str | None) -> SiteCard:
    whose = f"of {name} ({address})" if name else f"of {address}"
    try:
        card = SiteCard.model_validate_json(store.get_card(address))
    except BlobMissing as exc:
        raise ConfigError(f"the store holds no card {whose}", hint="`swarmchain site card` there puts it in") from exc
    except ValidationError as exc:
        raise ConfigError(f"the card {whose} in the store is none: {first_problem(exc)}",
                          hint="`swarmchain site card` there puts a good one in its place") from exc
    if card.address.lower() != address.lower() or card.name != (name or card.name):
        raise ConfigError(f"the card {whose} in the store is that of {card.name} ({card.address})",
                          hint="somebody altered it: `swarmchain site card` there puts a good one in its place")
    return card


def read_statistics(store: Store, view: RunView) -> tuple[StatisticsSpec, Arrays]:
    """Spec and checkpoint of a finalized statistics run.

    Raises
    ------
    SpecError
        If the run is of another task, or has no checkpoint yet.
    """
    spec = read_spec(store, view.spec)
    if not isinstance(spec, StatisticsSpec):
        raise SpecError(f"run {view.run} is no statistics run", hint="`swarmchain run list` shows the tasks")
    if not view.finalized_round:
        raise SpecError(f"statistics run {view.run} has no checkpoint yet", hint="wait until its agents are done")
    return spec, read_checkpoint(store, view.checkpoint, spec)


def summarize_statistics(
    source: StatisticsSpec, sums: Arrays, *, sites_min: int, flavor: Flavor = "seurat"
) -> dict[str, Any]:
    """What a statistics run found, in numbers that a person wants to see.

    `labels` and `in_all` hold `cells`, `donors` (0 where no site knows them) and `sites`; `features_at` how many
    features at least so many sites have; `highly_variable` how many of those at `sites_min` sites pass scanpy's default
    cutoffs, None if the flavour does not suit the values.
    """
    kinds = ("cells", "donors", "sites")
    rows = zip(*(sums[f"{kind}_per_label"].tolist() for kind in kinds), strict=True)
    sites = sums["sites_per_feature"]
    at = {count: int((sites >= count).sum()) for count in range(1, int(sites.max()) + 1)}
    try:
        found = compute_variability(sums, flavor=flavor, sites_min=sites_min)
        variable = int(choose_variable(found, Cutoffs()).sum())
    except SpecError:
        variable = None
    return {
        "labels": {label: dict(zip(kinds, row, strict=True)) for label, row in zip(source.labels, rows, strict=True)},
        "in_all": {"cells": int(sums["cells_per_label"].sum()), "donors": int(sums["donors"]),
                   "sites": int(sums["sites"])},
        "features_at": at, "highly_variable": variable, "flavor": flavor, "sites_min": sites_min,
    }


def recommend_training(normalization: Normalization) -> Training:
    """Settings that serve a kind of data, found on training cells (docs/benchmarks.md).

    A panel of a few markers (`arcsinh`) makes a small network whose weights have far to go in one round; with the
    learning rate that suits hundreds of genes it is not done when the run is. Half as many rounds of twice as many
    steps give the same scores, and cost half the waiting and half the ratings.
    """
    return Training(steps=40, lr=1e-2) if normalization.kind == "arcsinh" else Training(steps=40)


def plan_cell_type(
    statistics: tuple[StatisticsSpec, Arrays], view: RunView, *, name: str, limits: Limits, sites_per_feature_min: int,
    model: Model | None = None, training: Training | None = None, merge: Merge | None = None, gate: Gate | None = None,
    panel_share_min: float = 0.5, codec: Codec = "float32", hvg: int | None = None, flavor: Flavor = "seurat",
) -> tuple[CellTypeSpec, bytes]:
    """A training run on what a statistics run found, and its seed checkpoint.

    The panel is every feature that at least `sites_per_feature_min` sites have and that varies, or the `hvg` most
    variable of them (`agreement.compute_variability`); the labels are those with at least one training cell. Without
    `training` it is `recommend_training`'s.

    Raises
    ------
    SpecError
        If no feature is on the panel, or fewer than two labels have a training cell.
    """
    source, sums = statistics
    chosen = find_common(sums, sites_min=sites_per_feature_min)
    if not chosen.any():
        raise SpecError(
            f"no feature is at {sites_per_feature_min} sites", hint="lower --features-at, or use the same feature names"
        )
    if hvg is not None:
        chosen &= choose_variable(compute_variability(sums, flavor=flavor, sites_min=sites_per_feature_min), hvg)
    features = tuple(str(source.panel.features[i]) for i in np.flatnonzero(chosen))
    labels = tuple(label for label, n in zip(source.labels, sums["cells_per_label"], strict=True) if n > 0)
    if len(labels) < 2:
        raise SpecError(f"{len(labels)} labels have enough cells at a site",
                        hint="a classifier needs two; `swarmchain run statistics` shows the counts")
    aliases = {other: name for other, name in source.panel.aliases.items() if name in features}
    draft = CellTypeSpec(
        name=name, labels=labels, ontology=source.ontology, split_by=source.split_by,
        panel=Panel(features=features, share_min=panel_share_min, names=source.panel.names, aliases=aliases),
        normalization=source.normalization, minimums=source.minimums, validation_share=source.validation_share,
        limits=limits, model=model or Model(), training=training or recommend_training(source.normalization),
        merge=fit_trust(merge or ClippedMean(), limits),
        codec=codec, gate=gate or Gate(),
        statistics=StatisticsRef(run=view.run, spec=view.spec, checkpoint=view.checkpoint), seed_checkpoint="0" * 64,
    )
    return draw_seed(draft, statistics)


def plan_donor(
    statistics: tuple[StatisticsSpec, Arrays], view: RunView, *, model: DonorModel, bag_size: int = 64,
    labels_min: int = 2, score: Literal["macro_f1", "auroc"] | None = None, **common: Any,
) -> tuple[DonorSpec, bytes]:
    """A training run on donors, and its seed checkpoint; panel and labels as in `plan_cell_type`.

    Parameters
    ----------
    score
        What a site's score is; by default the area under the ROC curve for two labels, else macro-F1.
    common
        Further arguments of `plan_cell_type`, all but its `model`.

    Raises
    ------
    SpecError
        If the statistics run was not split by donor, or no feature is on the panel.
    """
    source, _ = statistics
    if source.split_by != "donor":
        raise SpecError(f"statistics run {view.run} sums over cells of validation donors too",
                        hint="`swarmchain run new statistics --by-donor` writes one that splits by donor")
    plain, _ = plan_cell_type(statistics, view, **common)
    shared = {name: getattr(plain, name) for name in CellTypeSpec.model_fields if name not in ("task", "model")}
    draft = DonorSpec(**shared, model=model, bag_size=bag_size, labels_min=labels_min,
                      score=score or ("auroc" if len(plain.labels) == 2 else "macro_f1"))
    return draw_seed(draft, statistics)


def draw_seed(draft: S, statistics: tuple[StatisticsSpec, Arrays]) -> tuple[S, bytes]:
    """The spec with its seed checkpoint's digest, and the checkpoint."""
    source, sums = statistics
    constants = compute_standardization(sums, source.panel.features, draft.panel)
    layout = checkpoint_layout(draft)
    zeros = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.items()}
    seed = encode_tensors({**zeros, **draw_state(draft), **constants}, layout)
    return draft.model_copy(update={"seed_checkpoint": compute_digest(seed)}), seed


def fit_trust(merge: Merge, limits: Limits) -> Merge:
    """A run of few rounds does not spend the first of them on ratings alone."""
    if merge.trust is None or (limits.rounds >= ROUNDS_TO_RATE_FIRST and not limits.one_checkpoint):
        return merge
    return merge.model_copy(update={"trust": merge.trust.model_copy(update={"rate_first": False})})
