"""What a site trains on, ready for every round: cells or rows one by one, or the samples of donors as bags of cells.

All kinds offer the same (`Examples`), so that the training loop does not know which it has. A bag is never copied: it
is a range of row numbers, and only the cells that a step draws are gathered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from swarmchain.agreement import standardize
from swarmchain.errors import DataError
from swarmchain.model import (
    build_model,
    compute_logits,
    load_model,
    load_state,
    predict_probabilities,
    predict_tensor,
)
from swarmchain.selection import SiteData
from swarmchain.spec import DonorSpec, Model, TrainedSpec

Arrays = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Batch = tuple[torch.Tensor, torch.Tensor]

FIRST = "layers.0.weight"


class Examples(Protocol):
    """What the training loop and the judgement ask of a site's data."""

    @property
    def y(self) -> torch.Tensor:
        """Labels of all examples, int64."""
        ...

    @property
    def train(self) -> Ints:
        """Numbers of the examples to train on."""
        ...

    @property
    def validation(self) -> Ints:
        """Numbers of the examples to judge by."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that training reads."""
        ...

    @property
    def features(self) -> int:
        """How many features the inputs have: those of the panel, or fewer; see `TrainingSet`."""
        ...

    def narrow(self, state: Arrays) -> Arrays:
        """The network's tensors without what no input here ever reaches."""
        ...

    def widen(self, deltas: Arrays, parent: Arrays) -> dict[str, npt.NDArray[Any]]:
        """What training of the narrow network changed, in the shapes of `parent`: 0 where no input reaches."""
        ...

    def sample(self, generator: np.random.Generator, steps: int, batch_size: int) -> Ints:
        """What every step of a round trains on, [steps, …]: a pure function of the generator's state."""
        ...

    def take(self, batch: Ints) -> Batch:
        """Inputs and labels of one step, from its row of what `sample` gave."""
        ...

    def predict(self, model: nn.Module, chosen: Ints) -> Floats:
        """Class probabilities [chosen, labels]."""
        ...

    def choose(self, chosen: Ints) -> Examples:
        """Examples whose `validation` is these, in this order, and nothing to train on."""
        ...


@dataclass(frozen=True)
class TrainingSet:
    """A site's standardised cells, or rows of donors' samples.

    Shapes: `x` float32 [cells, features], `y` int64 [cells]; `draw` float64 [train cells] sums to 1.

    A feature that the site lacks is 0 in all of its cells: its weights add nothing and never get a gradient. `columns`
    are those of the first layer's weights that the features in `x` meet; the site reckons with them alone. None: all.
    """

    x: torch.Tensor
    y: torch.Tensor
    train: Ints
    validation: Ints
    draw: npt.NDArray[np.float64]
    columns: Ints | None = None

    @cached_property
    def fingerprint(self) -> str:
        """See `Examples`."""
        return _hash(self.x.numpy(), self.y.numpy(), self.train, self.draw)

    @property
    def features(self) -> int:
        """See `Examples`."""
        return int(self.x.shape[1])

    def narrow(self, state: Arrays) -> Arrays:
        """See `Examples`."""
        return state if self.columns is None else {**state, FIRST: state[FIRST][:, self.columns]}

    def widen(self, deltas: Arrays, parent: Arrays) -> dict[str, npt.NDArray[Any]]:
        """See `Examples`."""
        if self.columns is None:
            return dict(deltas)
        wide = np.zeros_like(parent[FIRST])
        wide[:, self.columns] = deltas[FIRST]
        return {**deltas, FIRST: wide}

    def sample(self, generator: np.random.Generator, steps: int, batch_size: int) -> Ints:
        """See `Examples`; [steps, batch_size] row numbers."""
        return self.train[draw_weighted(generator, self._bounds, (steps, batch_size))]

    def take(self, batch: Ints) -> Batch:
        """See `Examples`."""
        return self.x[batch], self.y[batch]

    def predict(self, model: nn.Module, chosen: Ints) -> Floats:
        """See `Examples`."""
        return predict_tensor(model, self._validation_x if chosen is self.validation else self.x[chosen])

    def choose(self, chosen: Ints) -> TrainingSet:
        """See `Examples`; they are copied."""
        none = np.zeros(0, dtype=np.int64)
        return replace(self, x=self.x[chosen], y=self.y[chosen], train=none, validation=np.arange(len(chosen)),
                       draw=np.zeros(0))

    @cached_property
    def _validation_x(self) -> torch.Tensor:
        """The validation cells, gathered once: every checkpoint is scored on them."""
        return self.x[self.validation]

    @cached_property
    def _bounds(self) -> npt.NDArray[np.float64]:
        return sum_weights(self.draw)

    def call(self, model: nn.Module, chosen: Ints) -> Floats:
        """Logits [chosen, labels]."""
        return compute_logits(model, self.x[chosen].numpy())


@dataclass(frozen=True)
class BagSet:
    """A site's samples as bags of standardised cells.

    Shapes: `x` float32 [cells, panel]; `cells` int64 [cells] are row numbers, grouped by sample: those of sample s are
    `cells[starts[s] : starts[s + 1]]`; `y` int64 [samples]; `draw` float64 [train samples] sums to 1.
    """

    x: torch.Tensor
    cells: Ints
    starts: Ints
    y: torch.Tensor
    train: Ints
    validation: Ints
    draw: npt.NDArray[np.float64]
    bag_size: int

    @cached_property
    def fingerprint(self) -> str:
        """See `Examples`."""
        return _hash(self.x.numpy(), self.cells, self.starts, self.y.numpy(), self.train, self.draw)

    @property
    def features(self) -> int:
        """See `Examples`."""
        return int(self.x.shape[1])

    def narrow(self, state: Arrays) -> Arrays:
        """See `Examples`; bags keep all features."""
        return state

    def widen(self, deltas: Arrays, parent: Arrays) -> dict[str, npt.NDArray[Any]]:
        """See `Examples`."""
        return dict(deltas)

    def sample(self, generator: np.random.Generator, steps: int, batch_size: int) -> Ints:
        """See `Examples`; [steps, batch_size + 1]: samples, and the seed that their cells are drawn by."""
        samples = self.train[draw_weighted(generator, sum_weights(self.draw), (steps, batch_size))]
        return np.column_stack([samples, generator.integers(2**63, size=steps)])

    def take(self, batch: Ints) -> Batch:
        """See `Examples`; inputs are [batch_size, bag_size, panel]."""
        generator = np.random.default_rng(int(batch[-1]))
        rows = np.stack([self._draw_cells(int(sample), generator) for sample in batch[:-1]])
        return self.x[rows], self.y[batch[:-1]]

    def predict(self, model: nn.Module, chosen: Ints) -> Floats:
        """See `Examples`; a sample's bag is all of its cells."""
        return np.concatenate([predict_probabilities(model, self.get_bag(int(sample))[None]) for sample in chosen])

    def choose(self, chosen: Ints) -> BagSet:
        """See `Examples`; nothing is copied, and samples keep their numbers."""
        return replace(self, train=np.zeros(0, dtype=np.int64), validation=chosen, draw=np.zeros(0))

    def call(self, model: nn.Module, chosen: Ints) -> Floats:
        """Logits [chosen, labels]."""
        return np.concatenate([compute_logits(model, self.get_bag(int(sample))[None]) for sample in chosen])

    def get_bag(self, sample: int) -> Floats:
        """All cells of a sample, [cells of it, panel]."""
        bag: Floats = self.x[self._get_rows(sample)].numpy()
        return bag

    def compute_means(self) -> Floats:
        """Mean of each sample's cells, [samples, panel]: its pseudobulk."""
        return np.stack([self.get_bag(sample).mean(axis=0) for sample in range(len(self.y))])

    def _get_rows(self, sample: int) -> Ints:
        return self.cells[self.starts[sample] : self.starts[sample + 1]]

    def _draw_cells(self, sample: int, generator: np.random.Generator) -> Ints:
        rows = self._get_rows(sample)
        return generator.choice(rows, size=self.bag_size, replace=len(rows) < self.bag_size)


def prepare_training(
    data: SiteData, spec: TrainedSpec, constants: Arrays, examples_per_label: npt.NDArray[np.generic]
) -> TrainingSet | BagSet:
    """Standardise a site's cells and weigh them, or its samples, for drawing.

    Parameters
    ----------
    constants
        `standardize.mean` and `standardize.scale`, [panel].
    examples_per_label
        Training cells (task `donor`: training samples) of every class over all sites, [labels].
    """
    if isinstance(spec.model, Model):
        kept = _find_kept(data, spec)
        chosen = {name: constants[name][kept] for name in ("standardize.mean", "standardize.scale")}
        x = torch.from_numpy(standardize(data.x[:, kept], data.present[kept], chosen))
        columns = np.concatenate([kept, kept + len(data.present)]) if spec.model.mask else kept
        return TrainingSet(x=x, y=torch.from_numpy(data.y), train=data.train, validation=data.validation,
                           draw=_weigh(data.y[data.train], spec, examples_per_label),
                           columns=None if len(kept) == len(data.present) else columns)
    x = torch.from_numpy(standardize(data.x, data.present, constants))
    assert data.samples is not None
    cells, starts = _group(data.samples, len(data.sample_names))
    y = data.y[cells[starts[:-1]]]
    train, validation = np.unique(data.samples[data.train]), np.unique(data.samples[data.validation])
    return BagSet(x=x, cells=cells, starts=starts, y=torch.from_numpy(y), train=train, validation=validation,
                  draw=_weigh(y[train], spec, examples_per_label), bag_size=spec.bag_size)


def load_network(spec: TrainedSpec, state: Arrays, cells: Examples) -> nn.Module:
    """The spec's network with these weights, for the inputs of these examples."""
    model = build_model(spec, features=cells.features)
    load_state(model, cells.narrow(state))
    return model


def prepare_validation(data: SiteData, spec: TrainedSpec, constants: Arrays) -> TrainingSet | BagSet:
    """A site's validation cells or samples and no others, all of them in `validation`. Raises `DataError` for none."""
    rows, none = data.validation, np.zeros(0, dtype=np.int64)
    if len(rows) == 0:
        raise DataError("there are no validation cells", hint="a share of each label's cells or donors is set aside; "
                        "there are too few of every label")
    names, samples = data.sample_names, data.samples
    if samples is not None:
        kept, samples = np.unique(samples[rows], return_inverse=True)
        names = tuple(names[i] for i in kept)
    chosen = replace(data, x=data.x[rows], y=data.y[rows], train=none, validation=np.arange(len(rows)),
                     donors=None if data.donors is None else data.donors[rows], samples=samples, sample_names=names)
    return prepare_training(chosen, spec, constants, np.ones(len(spec.labels)))


def list_owners(data: SiteData, examples: TrainingSet | BagSet) -> Ints:
    """Donors of the examples that `prepare_validation` made, [examples]; each its own if none is known."""
    rows = data.validation[examples.cells[examples.starts[:-1]]] if isinstance(examples, BagSet) else data.validation
    return np.arange(len(rows)) if data.donors is None else data.donors[rows]


def predict_bags(parameters: Arrays, x: Floats, samples: Ints, spec: DonorSpec) -> Floats:
    """Class probabilities [samples, labels] of samples whose labels nobody knows.

    Parameters
    ----------
    x
        Standardised cells, [cells, panel].
    samples
        Each cell's sample, numbered from 0 without a gap, [cells].

    Raises
    ------
    DataError
        If a sample has no cells.
    """
    count = int(samples.max(initial=-1)) + 1
    cells, starts = _group(samples, count)
    model = load_model(spec, parameters)
    none = np.zeros(0, dtype=np.int64)
    bags = BagSet(x=torch.from_numpy(x), cells=cells, starts=starts, y=torch.zeros(count, dtype=torch.int64),
                  train=none, validation=np.arange(count), draw=np.zeros(0), bag_size=spec.bag_size)
    return bags.predict(model, bags.validation)


def sum_weights(draw: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Upper bounds of each example's part of [0, 1), from its probability."""
    bounds: npt.NDArray[np.float64] = draw.cumsum()
    bounds /= bounds[-1]
    return bounds


def draw_weighted(generator: np.random.Generator, bounds: npt.NDArray[np.float64], shape: tuple[int, int]) -> Ints:
    """Numbers of examples, as `generator.choice` with probabilities draws them, without summing those each time."""
    drawn: Ints = bounds.searchsorted(generator.random(shape), side="right")
    return drawn


def _weigh(y: Ints, spec: TrainedSpec, examples_per_label: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Probabilities of the training examples, from their labels."""
    counts = np.maximum(examples_per_label.astype(np.float64), 1.0)
    divisors = {"none": np.ones_like(counts), "inverse_sqrt": np.sqrt(counts), "inverse": counts}
    weights = 1.0 / divisors[spec.training.class_balance][y]
    draw: npt.NDArray[np.float64] = weights / weights.sum()
    return draw


def _find_kept(data: SiteData, spec: TrainedSpec) -> Ints:
    """Numbers of the panel's features that the site reckons with: those that it has.

    All where weights decay: a weight without a gradient then changes, too.
    """
    everything = np.arange(len(data.present))
    is_all = spec.training.weight_decay > 0 or not data.present.any()
    return everything if is_all else everything[data.present]


def _group(samples: Ints, count: int) -> tuple[Ints, Ints]:
    """Row numbers grouped by sample, and where each sample's begin, with the end: [samples + 1]."""
    sizes = np.bincount(samples, minlength=count)
    if not count:
        raise DataError("there are no cells, so no samples", hint="check the data and its sample column")
    if not sizes.all():
        raise DataError(f"an empty bag: sample number {int(np.argmin(sizes))} has no cells", hint="leave it out")
    return np.argsort(samples, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _hash(*parts: npt.NDArray[Any]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(p.tobytes()).digest() for p in parts)).hexdigest()
