"""From site cards to specs: what a run's proposer writes for all.

Two runs make a model. A statistics run sums means, SDs and class counts over the union of the sites' features; its
finalized checkpoint then fixes panel, standardisation and class balance of the training run, and its seed checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import ValidationError

from swarmchain.certify import Arrays
from swarmchain.checkpoint import encode_tensors
from swarmchain.config import SiteCard
from swarmchain.data import compute_standardization
from swarmchain.errors import BlobMissing, ConfigError, SpecError
from swarmchain.layouts import checkpoint_layout
from swarmchain.merging import ClippedMean, Codec, Merge
from swarmchain.model import draw_state
from swarmchain.protocol import RunView, compute_digest, first_problem
from swarmchain.spec import (
    CellTypeSpec,
    Gate,
    Limits,
    Model,
    Normalization,
    Panel,
    StatisticsRef,
    StatisticsSpec,
    Training,
)
from swarmchain.store import Store, read_checkpoint, read_spec


def plan_statistics(
    cards: Sequence[SiteCard], *, name: str, sites_to_start: int, normalization: Normalization | None = None
) -> StatisticsSpec:
    """A statistics run over all features and labels that the cards name.

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
        normalization=normalization or Normalization(),
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


def plan_cell_type(
    statistics: tuple[StatisticsSpec, Arrays], view: RunView, *, name: str, limits: Limits, sites_per_feature_min: int,
    model: Model | None = None, training: Training | None = None, merge: Merge | None = None, gate: Gate | None = None,
    panel_share_min: float = 0.5, codec: Codec = "float32",
) -> tuple[CellTypeSpec, bytes]:
    """A training run on what a statistics run found, and its seed checkpoint.

    The panel is every feature that at least `sites_per_feature_min` sites have and that varies; the labels are those
    with at least one training cell.

    Raises
    ------
    SpecError
        If no feature is on the panel.
    """
    source, sums = statistics
    cells = sums["cells_per_feature"]
    common = (sums["sites_per_feature"] >= sites_per_feature_min) & (cells > 0) & (sums["sum_of_squares"] > 0)
    features = tuple(str(source.panel.features[i]) for i in np.flatnonzero(common))
    labels = tuple(label for label, n in zip(source.labels, sums["cells_per_label"], strict=True) if n > 0)
    if not features:
        raise SpecError(
            f"no feature is at {sites_per_feature_min} sites", hint="lower --features-at, or use the same feature names"
        )
    draft = CellTypeSpec(
        name=name, panel=Panel(features=features, share_min=panel_share_min), labels=labels,
        normalization=source.normalization, limits=limits, validation_share=source.validation_share,
        model=model or Model(), training=training or Training(), merge=merge or ClippedMean(),
        codec=codec, gate=gate or Gate(),
        statistics=StatisticsRef(run=view.run, spec=view.spec, checkpoint=view.checkpoint), seed_checkpoint="0" * 64,
    )
    constants = compute_standardization(sums, source.panel.features, draft.panel)
    layout = checkpoint_layout(draft)
    zeros = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.items()}
    seed = encode_tensors({**zeros, **draw_state(draft), **constants}, layout)
    return draft.model_copy(update={"seed_checkpoint": compute_digest(seed)}), seed
