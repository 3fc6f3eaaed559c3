"""What a site computes for a run, one class for each task of `spec`: its contributions, and its judgement of a merge.

Knows tensors and cells, and neither chain, store, keys nor files of the run. A task with much to compute writes its
progress into a folder of the site's own, so that a long local training survives a restart; what it returns does not
depend on whether it was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from swarmchain.config import SiteConfig
from swarmchain.errors import DataError, SpecError
from swarmchain.keeper import Keeper
from swarmchain.layouts import checkpoint_layout, local_layout, parameter_layout
from swarmchain.protocol import Rating, RoundKey, derive_seed
from swarmchain.spec import DonorSpec, EvaluationSpec, RehearsalSpec, StatisticsSpec, SumSpec, TrainedSpec
from swarmchain.trust import Claim

Arrays = Mapping[str, npt.NDArray[Any]]
Judgement = tuple[bool, float | None]

REHEARSAL_SAMPLES = 1_000
STEPS_MEASURED = 20


@dataclass(frozen=True)
class Assignment:
    """What one contribution is for: the round, the site, the parent's digest and tensors, and a folder for progress.

    `after` is the finalized round that the parent came from, 0 for the first parent.
    """

    key: RoundKey
    site: int
    parent: tuple[str, Arrays]
    folder: Path
    after: int = 0


@dataclass(frozen=True)
class Past:
    """The last finalized round, to be rated; nothing is read before it is asked for.

    `read_parent` gives the checkpoint that it started from, `read_contributions` those of every site but this one.
    """

    round_id: int
    read_parent: Callable[[], Arrays]
    read_contributions: Callable[[], Iterator[Claim]]


class Task(Protocol):
    """One task, ready for every round of its run.

    `labels` are the run's labels, by number, that its contributions claim to be about; see `trust.CLAIMED_SHARE_MIN`.
    """

    @property
    def labels(self) -> tuple[int, ...]:
        """See above."""
        ...

    def describe(self) -> dict[str, int]:
        """Numbers that a person wants to see: of cells, of features."""
        ...

    def contribute(self, assignment: Assignment) -> tuple[Arrays, int, dict[str, float]]:
        """Tensors of this site's contribution, its number of training cells, and remarks."""
        ...

    def judge(self, merged: Arrays, parent: Arrays) -> Judgement:
        """Whether a merged checkpoint passes this site's gate, and its score on the site's validation cells."""
        ...

    def rate(self, past: Past) -> tuple[Rating, ...]:
        """What the contributions of a round do to the site's validation cells; nothing if it has none."""
        ...


@runtime_checkable
class MeasuresSteps(Protocol):
    """A task that trains `steps` steps a round, and can say what one of them takes here."""

    steps: int

    def measure_step(self, parent: Arrays) -> float:
        """Seconds of one step of local training from `parent`, measured on this machine; changes nothing."""
        ...


class StatisticsTask:
    """Sums over the site's training cells; the same in every round, so made once, and the cells let go.

    Raises
    ------
    DataError
        If the site's data cannot serve the spec.
    """

    labels: tuple[int, ...] = ()

    def __init__(self, config: SiteConfig, spec: StatisticsSpec) -> None:
        from swarmchain.agreement import compute_statistics
        from swarmchain.data import load_site_data

        data = load_site_data(config, spec)
        self._counts, self._samples = _count(data), len(data.train)
        self._sums = compute_statistics(data, spec)

    def describe(self) -> dict[str, int]:
        """See `Task`."""
        return self._counts

    def contribute(self, assignment: Assignment) -> tuple[Arrays, int, dict[str, float]]:
        """See `Task`."""
        return self._sums, self._samples, {}

    def judge(self, merged: Arrays, parent: Arrays) -> Judgement:
        """Sums are what they are."""
        return True, None

    def rate(self, past: Past) -> tuple[Rating, ...]:
        """There is nothing to rate by."""
        return ()


class CellTypeTask:
    """Local training of the classifier.

    Parameters
    ----------
    source
        Spec and checkpoint of the statistics run that the training run stands on.
    seed
        The seed checkpoint.
    folder
        Where the site keeps what is its own of the network.

    Raises
    ------
    SpecError
        If the seed checkpoint's standardisation is not what the statistics give.
    DataError
        If the site's data cannot serve the spec.
    """

    def __init__(self, config: SiteConfig, spec: TrainedSpec, source: tuple[StatisticsSpec, Arrays], seed: Arrays,
                 *, folder: Path) -> None:
        import torch

        from swarmchain.data import load_site_data
        from swarmchain.rating import Rater, find_labels
        from swarmchain.trainer import prepare_training

        torch.set_num_threads(config.agent.threads)
        self._spec = spec
        self.steps = spec.training.steps
        self._kept = Keeper(folder, "local", local_layout(spec))
        self._pause_s = config.agent.resume_s
        self._data = load_site_data(config, spec)
        source_spec, statistics = source
        constants = check_standardization(spec, source_spec, statistics, seed)
        rows = [source_spec.labels.index(label) for label in spec.labels]
        counts = statistics["samples_per_label" if isinstance(spec, DonorSpec) else "cells_per_label"]
        self._cells = prepare_training(self._data, spec, constants, counts[rows])
        self._scored: tuple[Arrays, float | None] = ({}, None)
        self.labels = find_labels(self._cells)
        self._rater = Rater(self._cells, spec)

    def describe(self) -> dict[str, int]:
        """See `Task`."""
        return _count(self._data)

    def contribute(self, assignment: Assignment) -> tuple[Arrays, int, dict[str, float]]:
        """See `Task`."""
        from swarmchain.trainer import Resume, train_round

        digest, parent = assignment.parent
        resume = Resume(assignment.folder, pause_s=self._pause_s, parent=digest)
        own = {**parent, **(self._kept.read(assignment.after) or {})}
        found = train_round(own, self._cells, self._spec, round_id=assignment.key.round_id, site=assignment.site,
                            resume=resume, network=self._rater.network)
        self._kept.write(assignment.key.round_id, found.local)
        return found.deltas, found.samples, found.metrics

    def measure_step(self, parent: Arrays) -> float:
        """See `MeasuresSteps`. Setting up is spread over the steps, as many as fit into a second."""
        from swarmchain.trainer import train_round

        own, took_s, steps = {**parent, **(self._kept.read(self._spec.limits.rounds) or {})}, 0.0, 1
        for _ in range(2):  # the first step costs more than the others: it only says how many to measure
            settings = self._spec.training.model_copy(update={"steps": steps})
            spec, started = self._spec.model_copy(update={"training": settings}), time.perf_counter()
            train_round(own, self._cells, spec, round_id=1, site=0)
            took_s = (time.perf_counter() - started) / steps
            steps = min(max(int(1 / took_s), 1), STEPS_MEASURED)
        return took_s

    def judge(self, merged: Arrays, parent: Arrays) -> Judgement:
        """Accept unless the score on the site's validation cells falls by more than the gate allows."""
        from swarmchain.trainer import score_checkpoint

        own = self._kept.read(self._spec.limits.rounds) or {}
        last, self._scored = self._scored, ({}, None)
        network = self._rater.network
        score = score_checkpoint({**merged, **own}, self._cells, self._spec, network=network)
        if score is None:
            return True, None
        # what was merged last is mostly the parent now, and its score stands unless the site's own parts moved
        is_known = not own and _is_same(parent, last[0])
        before = last[1] if is_known else score_checkpoint({**parent, **own}, self._cells, self._spec, network=network)
        self._scored = (merged, score)
        return score >= (before or 0.0) - self._spec.gate.score_drop_max, score

    def rate(self, past: Past) -> tuple[Rating, ...]:
        """See `rating`."""
        if len(self._cells.validation) == 0:
            return ()
        own = self._kept.read(past.round_id) or {}
        return self._rater.rate({**past.read_parent(), **own}, past.read_contributions())


class DonorTask(CellTypeTask):
    """Local training of a classifier of donors: the same, on rows or bags of cells, with scores as the spec says."""

    def describe(self) -> dict[str, int]:
        """See `Task`."""
        return {**super().describe(), "samples_train": len(self._cells.train),
                "samples_validation": len(self._cells.validation)}


class EvaluationTask:
    """Counts of a trained model's calls on the site's validation cells, or samples; the same in every round.

    Parameters
    ----------
    trained
        Spec and checkpoint of the run whose model is scored.
    own
        What this site keeps to itself of that model's tensors.

    Raises
    ------
    SpecError
        If the labels are not the trained run's.
    DataError
        If the site's data cannot serve the trained run's spec, or hold fewer validation cells, samples or donors than
        the spec asks for.
    """

    labels: tuple[int, ...] = ()

    def __init__(self, config: SiteConfig, spec: EvaluationSpec, trained: tuple[TrainedSpec, Arrays], *,
                 own: Arrays) -> None:
        from swarmchain.data import load_site_data
        from swarmchain.examples import list_owners, load_network, prepare_validation

        source, checkpoint = trained
        if spec.labels != source.labels:
            raise SpecError(f"labels: not those of run {spec.trained.run}, which the spec evaluates",
                            hint="`swarmchain run new evaluation` writes a valid spec")
        self._data = load_site_data(config, source)
        self._kind = "samples" if isinstance(source, DonorSpec) else "cells"
        if len(self._data.validation) == 0:
            self._require(config.name, self._kind, 0, spec.cells_min)
        examples = prepare_validation(self._data, source, checkpoint)
        self._require(config.name, self._kind, len(examples.validation), spec.cells_min)
        if spec.donors_min:
            known = self._data.donors is not None
            owners = len(np.unique(list_owners(self._data, examples))) if known else 0
            self._require(config.name, "donors", owners, spec.donors_min)
        self._spec, self._truth = spec, examples.y.numpy()[examples.validation]
        network = load_network(source, {**checkpoint, **own}, examples)
        self._logits = examples.call(network, examples.validation)

    @staticmethod
    def _require(site: str, what: str, found: int, least: int) -> None:
        if found < least:
            raise DataError(f"{site} has {found} validation {what}, the evaluation needs {least}",
                            hint=f"leave this run to the other sites: sums over so few {what} could be traced to them")

    def describe(self) -> dict[str, int]:
        """See `Task`."""
        return _count(self._data) | ({"samples_validation": len(self._truth)} if self._kind == "samples" else {})

    def contribute(self, assignment: Assignment) -> tuple[Arrays, int, dict[str, float]]:
        """See `Task`; what is counted here is for validation."""
        from swarmchain.calibration import sum_calls

        return sum_calls(self._logits, self._truth, self._spec), len(self._truth), {}

    def judge(self, merged: Arrays, parent: Arrays) -> Judgement:
        """Sums are what they are."""
        return True, None

    def rate(self, past: Past) -> tuple[Rating, ...]:
        """There is nothing to rate by."""
        return ()


class RehearsalTask:
    """Random numbers of the model's size, the same for the same seed, round and site on every machine."""

    labels: tuple[int, ...] = ()

    def __init__(self, spec: RehearsalSpec) -> None:
        self._spec = spec
        self._layout = parameter_layout(spec)

    def describe(self) -> dict[str, int]:
        """See `Task`."""
        return {"parameters": sum(int(np.prod(shape)) for _, shape in self._layout.values())}

    def contribute(self, assignment: Assignment) -> tuple[Arrays, int, dict[str, float]]:
        """Deltas in ±1/2, made from the generator's raw bits: no rounding, so equal on every CPU."""
        seed = derive_seed("rehearsal", self._spec.seed, assignment.key.round_id, assignment.site)
        bits = np.random.PCG64(seed)
        deltas = {}
        for name, (_, shape) in self._layout.items():
            size = int(np.prod(shape))
            words = bits.random_raw((size + 1) // 2).astype("<u8").view("<u4")[:size]
            deltas[name] = ((words >> 8).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)).reshape(shape)
        return deltas, REHEARSAL_SAMPLES, {}

    def judge(self, merged: Arrays, parent: Arrays) -> Judgement:
        """There is nothing to judge by."""
        return True, None

    def rate(self, past: Past) -> tuple[Rating, ...]:
        """There is nothing to rate by."""
        return ()


def check_standardization(spec: TrainedSpec, source: StatisticsSpec, statistics: Arrays, seed: Arrays) -> Arrays:
    """Mean and SD of the panel as the statistics give them.

    Raises
    ------
    SpecError
        If the seed checkpoint has others, or the spec chooses or normalises cells in another way than the statistics'.
    """
    from swarmchain.agreement import compute_standardization

    for field in ("normalization", "minimums", "validation_share", "split_by"):
        if getattr(spec, field) != getattr(source, field):
            raise SpecError(f"{field} is not that of the statistics run {spec.statistics.run}",
                            hint="do not join this run: its cells are not those that the statistics are about")
    constants = compute_standardization(statistics, source.panel.features, spec.panel)
    for name, expected in constants.items():
        if seed[name].tobytes() != expected.tobytes():
            raise SpecError(
                f"the seed checkpoint's {name} is not what the statistics run {spec.statistics.run} gives",
                hint="do not join this run: whoever proposed it changed the standardisation",
            )
    return constants


def start_parent(spec: SumSpec | RehearsalSpec) -> Arrays:
    """Tensors that the first round starts from where no seed checkpoint is named: none, or zeros."""
    if isinstance(spec, SumSpec):
        return {}
    return {name: np.zeros(shape, dtype) for name, (dtype, shape) in checkpoint_layout(spec).items()}


def _is_same(one: Arrays, other: Arrays) -> bool:
    return one is other or (one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one))


def _count(data: Any) -> dict[str, int]:
    return {"cells_train": len(data.train), "cells_validation": len(data.validation),
            "features": int(data.present.sum()), "labels_left_out": len(data.left_out),
            "cells_left_out": sum(data.left_out.values()), "cells_excluded": sum(data.excluded.values())}
