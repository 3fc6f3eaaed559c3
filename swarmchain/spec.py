"""A run's law: everything that must be equal at all sites.

A spec is canonical JSON in the store; its SHA-256 stands on chain. There are three tasks. `statistics` sums, over the
sites' training cells, what the choice of features, standardisation and class balancing need. `cell_type` trains a
classifier on a panel of features, from a seed checkpoint that travels as a blob (layer initialisation is not equal on
all CPUs, so a seed is never replayed elsewhere). `rehearsal` needs no cells: its contributions are random numbers of a
real model's size, so that chain, store, merge and vote can be tried before any data are there.

What a spec does not hold: anything about one site (that is `config`), and the windows and quorum (those are on chain).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from swarmchain.errors import SpecError
from swarmchain.merging import ClippedMean, Codec, Merge, Name, Positive
from swarmchain.protocol import Digest, Strict, compute_digest, encode_canonical, first_problem

SPEC_BYTES_MAX = 16 << 20
FEATURES_MAX = 200_000
CLASSES_MAX = 1_000

Share = Annotated[float, Field(ge=0, le=1)]


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


class Minimums(Strict):
    """What a site must have of training cells, so that nothing that leaves it is about a handful of cells or donors.

    A site with fewer than `cells`, or whose cells come from fewer than `donors` donors, does not take part. A label of
    which a site has fewer than `cells_per_label`, or from fewer than `donors_per_label` donors, is left out there
    altogether: its cells are neither summed, nor trained on, nor scored. Where a minimum of donors is asked for, the
    donors must be known.
    """

    cells: Annotated[int, Field(ge=1)] = 10
    donors: Annotated[int, Field(ge=0)] = 0
    cells_per_label: Annotated[int, Field(ge=1)] = 5
    donors_per_label: Annotated[int, Field(ge=0)] = 0


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
    al. 2021), `head` is the last layer. With `mask` the first layer sees, after the panel's values, 1 for every feature
    that the site has and 0 for one that it lacks.
    """

    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = (128,)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_norm: bool = False
    mask: bool = False
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
    minimums: Minimums = Minimums()
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.15

    @model_validator(mode="after")
    def _unique_labels(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands twice in the list")
        return self


class StatisticsSpec(_CellSpec):
    """Sums over all sites' training cells: moments per feature; cells, donors and sites per label and feature."""

    task: Literal["statistics"] = "statistics"


class _TrainedSpec(_CellSpec):
    """What all tasks have that train a network on a panel, standardised by a statistics run."""

    training: Training = Training()
    merge: Merge = ClippedMean()
    codec: Codec = "float32"
    gate: Gate = Gate()
    statistics: StatisticsRef
    seed_checkpoint: Digest


class CellTypeSpec(_TrainedSpec):
    """A cell-type classifier."""

    task: Literal["cell_type"] = "cell_type"
    model: Model = Model()


class RehearsalSpec(_Spec):
    """A run without cells: `widths` are the layers' widths, from inputs to outputs, of the model that it stands for."""

    task: Literal["rehearsal"] = "rehearsal"
    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=FEATURES_MAX)], ...], Field(min_length=2)]
    merge: Merge = ClippedMean()
    codec: Codec = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


CellSpec = StatisticsSpec | CellTypeSpec
Spec = CellSpec | RehearsalSpec
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


def encode_spec(spec: Spec) -> bytes:
    """Canonical bytes of a spec; its digest is what stands on chain."""
    return encode_canonical(spec)


def compute_spec_digest(spec: Spec) -> str:
    """SHA-256 of the canonical spec."""
    return compute_digest(encode_spec(spec))
