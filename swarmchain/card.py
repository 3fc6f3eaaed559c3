"""A model folder: what a hospital gets that was not in the run, and how it sees that nothing in it was changed.

    model.json            the card for machines, canonical; names every other file by its digest
    model.safetensors     the run's checkpoint, as it stands on chain
    spec.json             the run's law: panel, labels, normalisation, network, training, merge
    manifest.json         the certificate of the round that made the checkpoint
    local.safetensors     only where the spec has parts that never leave a site: this site's own
    model-card.md         the same card for people

What stands in the card is computed from the chain and the store (see `release`); this room knows neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy.typing as npt
from pydantic import Field, ValidationError

from swarmchain.checkpoint import decode_tensors
from swarmchain.errors import CheckpointError, ConfigError
from swarmchain.layouts import checkpoint_layout, local_layout
from swarmchain.protocol import Digest, Strict, compute_digest, first_problem
from swarmchain.spec import RunRef, TrainedSpec, parse_spec

Arrays = Mapping[str, npt.NDArray[Any]]

CARD, WEIGHTS, SPEC, MANIFEST, LOCAL, PAGE = (
    "model.json", "model.safetensors", "spec.json", "manifest.json", "local.safetensors", "model-card.md")
CARD_BYTES_MAX = 64 << 20

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Provenance(Strict):
    """Where the model stands on record: the run, its newest finalized round, and the chained head of all of them."""

    chain_id: int
    contract: Annotated[str, Field(pattern=r"^0x[0-9a-fA-F]{40}$")]
    run: Annotated[int, Field(ge=1)]
    round: Annotated[int, Field(ge=1)]
    spec: Digest
    checkpoint: Digest
    manifest: Digest
    head: Digest
    code: str


class SiteRow(Strict):
    """One site's part in the run: finalized rounds that counted it, its mean weight in those, and claimed cells.

    In a run on donors `cells_train` counts what it trained on, samples.
    """

    site: Count
    name: str
    rounds: Count
    weight: Share | None
    cells_train: Count | None


class RoundRow(Strict):
    """One round; sites by name. Scores are macro-F1, or what the spec says, on own validation cells, as voted."""

    round: Annotated[int, Field(ge=1)]
    outcome: Literal["finalized", "rejected", "expired", "pending"]
    checkpoint: Digest | None
    included: tuple[str, ...]
    excluded: dict[str, str]
    scores: dict[str, float]


class ClassRow(Strict):
    """One label: F1, and the validation cells that it was measured on."""

    label: str
    f1: Share | None
    support: Count


class BarRow(Strict):
    """One bar of the reliability diagram."""

    low: Share
    high: Share
    cells: Count
    right_share: Share | None
    confidence: Share | None


class Evaluated(Strict):
    """What an evaluation run found; see `calibration.Calibration`. `confusion` is label (row) by call (column).

    Where the model calls donors, all that is said of cells here (`cells`, supports, bars) is of samples.
    """

    source: RunRef
    sites: tuple[str, ...]
    cells: Count
    macro_f1: Share
    accuracy: Share
    per_class: tuple[ClassRow, ...]
    confusion: tuple[tuple[Count, ...], ...]
    temperature: Annotated[float, Field(gt=0)]
    error: Share
    error_before: Share | None
    threshold: Share
    is_reached: bool
    right_share_min: Share
    right_share: Share | None
    known_share: Share
    bars: tuple[BarRow, ...]


class ModelCard(Strict):
    """model.json."""

    format: Literal["swarmchain-model/1"] = "swarmchain-model/1"
    name: str
    task: Literal["cell_type", "donor"]
    version: str
    provenance: Provenance
    files: dict[str, Digest]
    sites: tuple[SiteRow, ...]
    rounds: tuple[RoundRow, ...]
    evaluation: Evaluated | None


@dataclass(frozen=True)
class ModelFolder:
    """A model folder, read and checked: card, spec, and all tensors of the network and its standardisation."""

    path: Path
    card: ModelCard
    spec: TrainedSpec
    tensors: Arrays

    @property
    def temperature(self) -> float:
        """What logits are divided by; 1 without an evaluation."""
        return self.card.evaluation.temperature if self.card.evaluation else 1.0

    @property
    def threshold(self) -> float:
        """Confidence below which a call counts as unknown; 0 without an evaluation."""
        return self.card.evaluation.threshold if self.card.evaluation else 0.0

    def drop_evaluation(self) -> ModelFolder:
        """The same without its evaluation, which says nothing of what else is made of the model."""
        return replace(self, card=self.card.model_copy(update={"evaluation": None}))


def read_model_folder(folder: Path) -> ModelFolder:
    """Read a model folder and see that every file in it is the one that the card names.

    Raises
    ------
    ConfigError
        If a file is missing or not what it should be; the message names it.
    CheckpointError
        If the weights are not those of the spec.
    """
    card = _read_card(folder / CARD)
    blobs = {name: _read_named(folder, name, digest) for name, digest in card.files.items()}
    if not {WEIGHTS, SPEC} <= set(blobs):
        raise ConfigError(f"{folder / CARD} names no {WEIGHTS} or no {SPEC}", hint=_HINT)
    record = (card.provenance.checkpoint, card.provenance.spec)
    if (card.files[WEIGHTS], card.files[SPEC]) != record:
        raise ConfigError(f"{folder / CARD}: the files are not those of the run that it names", hint=_HINT)
    spec = parse_spec(blobs[SPEC])
    if not isinstance(spec, TrainedSpec) or spec.task != card.task:
        raise ConfigError(f"{folder / SPEC} is not the spec of a {card.task} run", hint=_HINT)
    if card.evaluation is not None and tuple(row.label for row in card.evaluation.per_class) != spec.labels:
        raise ConfigError(f"{folder / CARD}: evaluation: its labels are not the spec's", hint=_HINT)
    return ModelFolder(folder, card, spec, _read_tensors(folder, spec, blobs))


_HINT = "`swarmchain run export` writes a model folder; get it again from a site of the run"


def _read_card(path: Path) -> ModelCard:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path.parent} is no model folder: cannot read {path.name}: {exc.strerror}", hint=_HINT
                          ) from exc
    if len(data) > CARD_BYTES_MAX:
        raise ConfigError(f"{path}: {len(data)} bytes are over the limit of {CARD_BYTES_MAX}", hint=_HINT)
    try:
        return ModelCard.model_validate_json(data)
    except ValidationError as exc:
        raise ConfigError(f"{path} is no model card: {first_problem(exc)}", hint=_HINT) from exc


def _read_named(folder: Path, name: str, digest: str) -> bytes:
    if name not in (WEIGHTS, SPEC, MANIFEST, LOCAL):
        raise ConfigError(f"{folder / CARD}: files: {name!r} is no file of a model folder", hint=_HINT)
    try:
        data = (folder / name).read_bytes()
    except OSError as exc:
        raise ConfigError(f"cannot read {folder / name}: {exc.strerror}", hint=_HINT) from exc
    if (found := compute_digest(data)) != digest:
        raise ConfigError(f"{folder / name} was altered: its digest is {found[:12]}…, the card names {digest[:12]}…",
                          hint=_HINT)
    return data


def _read_tensors(folder: Path, spec: TrainedSpec, blobs: Mapping[str, bytes]) -> Arrays:
    try:
        tensors = decode_tensors(blobs[WEIGHTS], checkpoint_layout(spec))
        layout = local_layout(spec)
        if not layout:
            return tensors
        if LOCAL not in blobs:
            raise CheckpointError(f"{LOCAL} is missing, and the spec has parts that never leave a site")
        return {**tensors, **decode_tensors(blobs[LOCAL], layout)}
    except CheckpointError as exc:
        raise CheckpointError(f"{folder}: {exc.message}", hint=_HINT) from exc
