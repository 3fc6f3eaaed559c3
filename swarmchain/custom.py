"""A run whose network and training are the sites' own: their law, and what a site computes for it.

The network is any torch module. What travels of it are its floating-point tensors, as differences to the checkpoint
that the round started from; counters stay as the seed checkpoint has them, and tensors that the law calls local stay
at the site. The training itself happens outside, between two looks at the chain: see `api`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import nn

from swarmchain.checkpoint import encode_tensors
from swarmchain.errors import SpecError
from swarmchain.keeper import Keeper
from swarmchain.layouts import checkpoint_layout, local_layout, parameter_layout, state_layout
from swarmchain.merging import ClippedMean, Codec, Merge
from swarmchain.model import load_state, read_state
from swarmchain.protocol import Rating, compute_digest, first_problem
from swarmchain.spec import CustomSpec, Gate, Limits, Tensor
from swarmchain.tasks import Arrays, Assignment, Judgement, Past

Score = Callable[[nn.Module], float]
Settings = Mapping[str, bool | int | float | str]

_KINDS = {torch.float32: "float32", torch.int64: "int64"}


class TrainingNeeded(Exception):
    """No failure: the next duty is to train, for this assignment, and the program that trains goes on from here."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(f"round {assignment.key.round_id} has to be trained for")
        self.assignment = assignment


def plan_custom(model: nn.Module, *, name: str, limits: Limits, settings: Settings | None = None,
                local: Sequence[str] = (), code: Path | None = None, merge: Merge | None = None,
                codec: Codec = "float32", gate: Gate | None = None) -> tuple[CustomSpec, bytes]:
    """The law of a run that trains `model`, and its seed checkpoint: the model as it is.

    Parameters
    ----------
    settings
        What every site's program must have equal: steps, learning rate, seed.
    local
        Beginnings of the names of tensors that never leave a site.
    code
        A file that all sites must hold, such as the program that trains.

    Raises
    ------
    SpecError
        If the module holds tensors of other kinds than float32 and int64, or numbers that are not finite.
    """
    state = read_state(model)
    tensors = []
    for key, value in sorted(model.state_dict().items()):
        if value.dtype not in _KINDS:
            raise SpecError(f"the network's {key!r} is {value.dtype}, what travels is float32 (and int64 as it is)",
                            hint="call model.float(), or keep such tensors out of the state with persistent=False")
        tensors.append({"name": key, "dtype": _KINDS[value.dtype], "shape": tuple(value.shape)})
    try:
        draft = CustomSpec(
            name=name, limits=limits, tensors=tuple(Tensor.model_validate(t) for t in tensors), local=tuple(local),
            settings=dict(settings or {}), code=None if code is None else digest_file(code),
            merge=(merge or ClippedMean()).model_copy(update={"trust": None}), codec=codec, gate=gate or Gate(),
            seed_checkpoint="0" * 64)
    except ValidationError as exc:
        raise SpecError(f"no run can be made of this network: {first_problem(exc)}") from exc
    layout = checkpoint_layout(draft)
    zeros = {key: np.zeros(shape, dtype) for key, (dtype, shape) in layout.items()}
    seed = encode_tensors({**zeros, **state}, layout)
    return draft.model_copy(update={"seed_checkpoint": compute_digest(seed)}), seed


def digest_file(path: Path) -> str:
    """SHA-256 of a file. Raises `SpecError` if it cannot be read."""
    try:
        return compute_digest(path.read_bytes())
    except OSError as exc:
        raise SpecError(f"cannot read {path}: {exc.strerror}") from exc


def require_fit(spec: CustomSpec, model: nn.Module, *, code: Path | None) -> None:
    """Whether a network and a program are those of the law. Raises `SpecError` naming what differs."""
    own = {key: (str(v.dtype).removeprefix("torch."), tuple(v.shape)) for key, v in model.state_dict().items()}
    law = state_layout(spec)
    for key in sorted(set(own) | set(law)):
        if own.get(key) != law.get(key):
            raise SpecError(f"the network's {key!r} is {_describe(own.get(key))} here, {_describe(law.get(key))} in "
                            "the run's spec", hint="build the network as the site that proposed the run did")
    if spec.code is None:
        return
    if code is None:
        raise SpecError(f"the run's spec names a program, SHA-256 {spec.code[:12]}…",
                        hint="say which file it is: code=Path(__file__)")
    if (found := digest_file(code)) != spec.code:
        raise SpecError(f"{code} is {found[:12]}…, the run's spec names {spec.code[:12]}…",
                        hint="use the very file that the run was proposed with")


class CustomTask:
    """What a site computes for such a run: the differences that the program's training made.

    Parameters
    ----------
    score
        What the site thinks of a network, from 0 to 1, on cells that it does not train on; None: it accepts all.
    folder
        Where the site keeps its local tensors.
    """

    labels: tuple[int, ...] = ()

    def __init__(self, spec: CustomSpec, model: nn.Module, *, score: Score | None, folder: Path) -> None:
        self._spec, self._model, self._score = spec, model, score
        self._kept = Keeper(folder, "local", local_layout(spec))
        self._trained: tuple[Assignment, int] | None = None

    def describe(self) -> dict[str, int]:
        """Number of parameters that travel."""
        return {"parameters": sum(math.prod(shape) for _, shape in parameter_layout(self._spec).values())}

    def load(self, assignment: Assignment) -> None:
        """Set the network to what a round starts from."""
        load_state(self._model, {**assignment.parent[1], **(self._kept.read(assignment.after) or {})})

    def load_final(self, checkpoint: Arrays) -> None:
        """Set the network to what the sites hold in common, with this site's local tensors."""
        load_state(self._model, {**checkpoint, **(self._kept.read(self._spec.limits.rounds) or {})})

    def give(self, assignment: Assignment, samples: int) -> None:
        """The network is trained for this round, on so many samples.

        Raises
        ------
        SpecError
            If the number of samples is none, or the network holds numbers that are not finite.
        """
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise SpecError(f"samples is {samples!r}: it is the number of cells or donors that the site trains on",
                            hint="say it: swarm.rounds(run, model, samples=len(dataset))")
        for name, value in read_state(self._model).items():
            if not np.isfinite(value).all():
                raise SpecError(f"after training, the network's {name!r} holds NaN or infinity",
                                hint="lower the learning rate; nothing was committed")
        self._trained = (assignment, samples)

    def contribute(self, assignment: Assignment) -> tuple[Arrays, int, dict[str, float]]:
        """See `tasks.Task`. Raises `TrainingNeeded` before the training."""
        if self._trained is None or self._trained[0].key != assignment.key:
            raise TrainingNeeded(assignment)
        _, samples = self._trained
        parent, state = assignment.parent[1], read_state(self._model)
        deltas = {name: state[name] - parent[name] for name in parameter_layout(self._spec)}
        self._kept.write(assignment.key.round_id, {name: state[name] for name in local_layout(self._spec)})
        return deltas, samples, {}

    def judge(self, merged: Arrays, parent: Arrays) -> Judgement:
        """Accept unless the site's score falls by more than the gate allows; the network is left as it was."""
        if self._score is None:
            return True, None
        own = self._kept.read(self._spec.limits.rounds) or {}
        before = read_state(self._model)
        was, score = (self._measure({**tensors, **own}) for tensors in (parent, merged))
        load_state(self._model, before)
        return score >= was - self._spec.gate.score_drop_max, score

    def rate(self, past: Past) -> tuple[Rating, ...]:
        """Nothing: what a site's score is about is its own affair, and need not compare."""
        return ()

    def _measure(self, state: Mapping[str, npt.NDArray[Any]]) -> float:
        assert self._score is not None
        load_state(self._model, state)
        found = float(self._score(self._model))
        if not 0.0 <= found <= 1.0:
            raise SpecError(f"score gave {found}: it must lie between 0 and 1", hint="accuracy, F1 and AUROC do")
        return found


def _describe(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if entry is None else f"{entry[0]}{list(entry[1])}"
