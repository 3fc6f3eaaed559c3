"""A run's law: everything that must be equal at all sites.

A spec is canonical JSON in the store; its SHA-256 stands on chain. The tasks:

statistics
    Sums, over the sites' training cells, what the choice of features, standardisation and class balancing need.
cell_type
    Trains a classifier of cells, from a seed checkpoint that travels as a blob: initialisation differs between CPUs.
donor
    Trains a classifier of donors' samples, each a row or a bag of cells.
evaluation
    Sums how a finished model does on every site's validation cells.
rehearsal, custom
    Tries all of that with random numbers before any data are there; merges and votes on a network of the sites' own.

A spec holds nothing about one site (that is `config`), and no windows and quorum (those are on chain).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from swarmchain.errors import SpecError
from swarmchain.merging import ClippedMean, Codec, Merge, Name, Positive
from swarmchain.protocol import LABELS_MAX, Digest, Strict, compute_digest, encode_canonical, first_problem

SPEC_BYTES_MAX = 16 << 20
FEATURES_MAX = 200_000

Share = Annotated[float, Field(ge=0, le=1)]
Widths = tuple[Annotated[int, Field(ge=1, le=65_536)], ...]


class Panel(Strict):
    """The features, in order, and the share of them that a site's data must hold.

    `names` pins the table of ENSEMBL ids and symbols (a blob) by which sites translate theirs. `aliases` registers
    other names of features: the name as some sites have it = the panel's.
    """

    features: Annotated[tuple[Name, ...], Field(min_length=1, max_length=FEATURES_MAX)]
    share_min: Share = 0.5
    names: Digest | None = None
    aliases: dict[Name, Name] = {}

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len(set(self.features)) != len(self.features):
            raise ValueError("a feature stands twice in the panel")
        strange = sorted(set(self.aliases.values()) - set(self.features))
        if strange:
            raise ValueError(f"the alias of {strange[0]!r} stands for no feature of the panel")
        return self


class Normalization(Strict):
    """The state of X.

    `log1p` of counts scaled to `target_sum` per cell; `arcsinh` of X / `cofactor` (customary: 5 for mass cytometry,
    about 150 for flow cytometry); `proportions` of a row's total; or as it is.
    """

    kind: Literal["log1p", "arcsinh", "proportions", "none"] = "log1p"
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


class Term(Strict):
    """What a label means: its Cell Ontology id, and the coarser label that it is a kind of."""

    id: Annotated[str, Field(pattern=r"^CL:\d{7}$")] | None = None
    parent: Name | None = None


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

    hidden: Widths = (128,)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_norm: bool = False
    mask: bool = False
    local: tuple[Literal["norms", "head"], ...] = ()


class RowModel(Model):
    """`Model`, for one row per donor's sample: population proportions, or bulk transcriptomes."""

    kind: Literal["perceptron"] = "perceptron"


class _SetModel(Strict):
    hidden: Widths = ()
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Pseudobulk(_SetModel):
    """Mean of a bag's standardised cells → hidden layers → one logit per label. No hidden layer: a linear model."""

    kind: Literal["pseudobulk"] = "pseudobulk"


class DeepSets(_SetModel):
    """Every cell → `encoder` (ReLU after each layer); their mean → hidden layers → logits (Zaheer et al. 2017)."""

    kind: Literal["deep_sets"] = "deep_sets"
    encoder: Annotated[Widths, Field(min_length=1)] = (64,)


class GatedAttention(_SetModel):
    """As `DeepSets`, but a mean weighted by gated attention of `attention` units (Ilse et al. 2018, eq. 9)."""

    kind: Literal["attention"] = "attention"
    encoder: Annotated[Widths, Field(min_length=1)] = (64,)
    attention: Annotated[int, Field(ge=1, le=65_536)] = 32


SetModel = Pseudobulk | DeepSets | GatedAttention
DonorModel = Annotated[RowModel | Pseudobulk | DeepSets | GatedAttention, Field(discriminator="kind")]


class Training(Strict):
    """One site's local training in one round.

    `steps` minibatches of `batch_size` cells (task `donor`: rows or bags), Adam restarted each round, learning rate
    `lr` decayed over the run's rounds by a half cosine to `lr * lr_final_share`. `class_balance` = `inverse_sqrt` draws
    a cell with probability proportional to 1 / sqrt(its class's count over all sites), `inverse` to 1 / count.
    `proximal` is FedProx's μ (Li et al. 2020, eq. 2): μ/2 · ‖w - parent‖² is added to the loss, over the parameters
    that are merged.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    lr: Positive = 1e-3
    lr_final_share: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_balance: Literal["none", "inverse_sqrt", "inverse"] = "inverse_sqrt"
    proximal: Annotated[float, Field(ge=0)] = 0.0


class Gate(Strict):
    """A site accepts a checkpoint unless its score on the site's validation cells falls by more than this."""

    score_drop_max: Share = 0.5


class RunRef(Strict):
    """A finalized run that another stands on: its number, and the digests that the chain must show for it."""

    run: Annotated[int, Field(ge=1)]
    spec: Digest
    checkpoint: Digest


class StatisticsRef(RunRef):
    """The finalized statistics run that a training run stands on."""


class _Spec(Strict):
    format: Literal["swarmchain-spec/1"] = "swarmchain-spec/1"
    name: Name
    limits: Limits


class _CellSpec(_Spec):
    panel: Panel
    labels: Annotated[tuple[Name, ...], Field(min_length=2, max_length=LABELS_MAX)]
    ontology: dict[Name, Term] = {}
    normalization: Normalization = Normalization()
    minimums: Minimums = Minimums()
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    split_by: Literal["cell", "donor"] = "cell"

    @model_validator(mode="after")
    def _unique_labels(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands twice in the list")
        ids = [term.id for term in self.ontology.values() if term.id is not None]
        if len(set(ids)) != len(ids):
            raise ValueError("two labels of the ontology have one Cell Ontology id")
        return self


class StatisticsSpec(_CellSpec):
    """Sums over all sites' training cells: moments per feature; cells, donors and sites per label and feature.

    With `split_by` = `donor` the training cells are those of the training donors, and samples per label are summed too.
    """

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


class DonorSpec(_TrainedSpec):
    """A classifier of donors: the labels are of conditions or diagnoses, each sample of a donor has one.

    Models of rows take every row of a site's file as a sample's; models of sets take the rows of a sample as a bag. In
    training a bag is `bag_size` cells drawn anew each step, without replacement where the sample has so many; at
    evaluation it is all of the sample's cells. A site takes part with training samples of at least `labels_min` labels.
    The score is macro-F1 or, for two labels, the area under the ROC curve, over the site's validation samples.
    """

    task: Literal["donor"] = "donor"
    split_by: Literal["donor"] = "donor"
    model: DonorModel = RowModel()
    bag_size: Annotated[int, Field(ge=1, le=100_000)] = 64
    labels_min: Annotated[int, Field(ge=1, le=LABELS_MAX)] = 2
    score: Literal["macro_f1", "auroc"] = "macro_f1"

    @model_validator(mode="after")
    def _two_labels(self) -> Self:
        if self.score == "auroc" and len(self.labels) != 2:
            raise ValueError(f"score auroc is for 2 labels, not {len(self.labels)}")
        return self


# 0.5 to 4 in steps of 2^(1/8): near 1 about .09 apart, which moves a confidence by less than a bin
TEMPERATURES = tuple(round(0.5 * 2 ** (i / 8), 4) for i in range(25))


class EvaluationSpec(_Spec):
    """How a trained model does on the sites' own validation cells, as exact sums over the sites that take part.

    Every site scores the checkpoint `trained`, by that run's preprocessing and with its choice of validation cells. The
    sums hold no more than counts and, for each of `temperatures`, one negative log-likelihood; see
    `layouts.evaluation_layout`. What is called, and counted, is a cell or, for a model of donors, a sample: fewer than
    `cells_min` of them for validation, or such of fewer than `donors_min` donors, and a site cannot join, and so
    contributes nothing. Confidences fall into `bins` of equal width. Calls whose confidence is below the threshold
    count as unknown; the threshold is the smallest edge of a bin from which on at least `right_share_min` of all calls
    were right. Labels are the trained run's, in its order.
    """

    task: Literal["evaluation"] = "evaluation"
    trained: RunRef
    labels: Annotated[tuple[Name, ...], Field(min_length=2, max_length=LABELS_MAX)]
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0.01, le=100)], ...], Field(min_length=1, max_length=200)] \
        = TEMPERATURES
    bins: Annotated[int, Field(ge=10, le=1000, multiple_of=10)] = 50
    cells_min: Annotated[int, Field(ge=1)] = 20
    donors_min: Annotated[int, Field(ge=0)] = 0
    right_share_min: Share = 0.95

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if any(a >= b for a, b in itertools.pairwise(self.temperatures)):
            raise ValueError("the temperatures do not ascend")
        return self


class RehearsalSpec(_Spec):
    """A run without cells: `widths` are the layers' widths, from inputs to outputs, of the model that it stands for."""

    task: Literal["rehearsal"] = "rehearsal"
    widths: Annotated[tuple[Annotated[int, Field(ge=1, le=FEATURES_MAX)], ...], Field(min_length=2)]
    merge: Merge = ClippedMean(trust=None)
    codec: Codec = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Tensor(Strict):
    """One tensor of a network's state: a parameter or a buffer, as torch's `state_dict` names it."""

    name: Name
    dtype: Literal["float32", "int64"]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31)], ...], Field(max_length=8)]


class CustomSpec(_Spec):
    """A network of the sites' own, which each site trains with a program of its own; see `api`.

    `tensors` is the network's state in the order of the names. Those whose names begin with one of `local` never leave
    a site. `settings` are whatever the program needs to be equal at all sites (steps, learning rate, seed); `code` is
    the SHA-256 of a file that all of them must hold, such as the program. Nobody can rate, so there is no `trust`.
    """

    task: Literal["custom"] = "custom"
    tensors: Annotated[tuple[Tensor, ...], Field(min_length=1, max_length=100_000)]
    local: tuple[Name, ...] = ()
    settings: dict[str, bool | int | float | str] = {}
    code: Digest | None = None
    merge: Merge = ClippedMean(trust=None)
    codec: Codec = "float32"
    gate: Gate = Gate()
    seed_checkpoint: Digest

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        names = [tensor.name for tensor in self.tensors]
        if sorted(set(names)) != names:
            raise ValueError("the tensors are not in the order of their names, each once")
        if not any(t.dtype == "float32" and not t.name.startswith(self.local) for t in self.tensors):
            raise ValueError("no floating-point tensor is left to train together")
        if self.merge.trust is not None:
            raise ValueError("sites cannot rate each other's contributions here: merge.trust must be null")
        return self


TrainedSpec = CellTypeSpec | DonorSpec
CellSpec = StatisticsSpec | TrainedSpec
NetworkSpec = TrainedSpec | RehearsalSpec | CustomSpec
# Tasks whose merge is the exact sum of all contributions, and whose rounds have no parent.
SumSpec = StatisticsSpec | EvaluationSpec
Spec = CellSpec | EvaluationSpec | RehearsalSpec | CustomSpec
_DONOR_MODELS: TypeAdapter[DonorModel] = TypeAdapter(DonorModel)
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


def parse_donor_model(settings: Mapping[str, Any]) -> DonorModel:
    """A model for donors from plain values. Raises `SpecError`."""
    try:
        return _DONOR_MODELS.validate_json(encode_canonical(dict(settings)))
    except ValidationError as exc:
        raise SpecError(f"model: {first_problem(exc)}") from exc


def encode_spec(spec: Spec) -> bytes:
    """Canonical bytes of a spec; its digest is what stands on chain."""
    return encode_canonical(spec)


def compute_spec_digest(spec: Spec) -> str:
    """SHA-256 of the canonical spec."""
    return compute_digest(encode_spec(spec))
