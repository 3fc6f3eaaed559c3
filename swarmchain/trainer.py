"""One site's local training for one round, read top to bottom; same seed, same bytes.

A contribution is a pure function of (parent checkpoint, local data, spec, round, site). No optimiser state survives a
round, so a restarted site reproduces the same bytes; a training that takes long is written down as it goes, and goes on
from there with the same bytes (`Resume`). PyTorch's results depend on the number of threads and on the
CPU; that is no harm, for nobody else ever recomputes a site's training.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from swarmchain.config import write_file
from swarmchain.examples import BagSet, Examples, TrainingSet, load_network, prepare_training
from swarmchain.layouts import local_layout, parameter_layout
from swarmchain.metrics import compute_auroc, compute_macro_f1
from swarmchain.model import build_model, load_state, read_state
from swarmchain.protocol import derive_seed
from swarmchain.spec import DonorSpec, TrainedSpec, compute_spec_digest

__all__ = ["BagSet", "Contribution", "Examples", "Resume", "TrainingSet", "compute_loss", "prepare_training",
           "score_checkpoint", "train_round"]

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass
class Resume:
    """Where a long local training writes its progress, at most every `pause_s` seconds of `clock`.

    The file is bound to all that the result depends on: parent, spec, round, site and cells. Whatever is not exactly
    such a file is passed over, and training starts from its first step.
    """

    folder: Path
    pause_s: float
    parent: str
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def is_due(self) -> bool:
        """Whether it is time to write again."""
        return self.clock() - self._last >= self.pause_s

    def write(self, identity: str, arrays: Arrays) -> None:
        """Replace the file. Raises `ConfigError` if the folder cannot be written."""
        buffer = io.BytesIO()
        np.savez(buffer, identity=np.array(identity), **arrays)  # type: ignore[arg-type]
        write_file(self._path, buffer.getvalue(), mode=0o600)
        self._last = self.clock()

    def exists(self) -> bool:
        """Whether there is anything to read; asked first, since an identity takes a pass over all cells."""
        return self._path.exists()

    def read(self, identity: str) -> dict[str, npt.NDArray[Any]] | None:
        """What was written under this identity, if anything."""
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        return arrays if str(arrays.pop("identity", "")) == identity else None

    def discard(self) -> None:
        """Remove the file: the contribution is done."""
        self._path.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self.folder / "training.npz"


@dataclass(frozen=True)
class Contribution:
    """What one round of training gives: deltas of `layouts.parameter_layout`, the number of training examples, remarks.

    `local` holds the tensors of `layouts.local_layout` as they are after it.
    """

    deltas: dict[str, npt.NDArray[np.float32]]
    samples: int
    metrics: dict[str, float]
    local: dict[str, npt.NDArray[Any]]


def compute_learning_rate(spec: TrainedSpec, round_id: int) -> float:
    """Half cosine from `lr` in round 1 to `lr · lr_final_share` in the last (Loshchilov & Hutter 2017, eq. 5)."""
    progress = min(round_id - 1, spec.limits.rounds - 1) / max(spec.limits.rounds - 1, 1)
    low = spec.training.lr_final_share
    return spec.training.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_round(parent: Arrays, cells: Examples, spec: TrainedSpec, *, round_id: int, site: int,
                resume: Resume | None = None, network: nn.Module | None = None) -> Contribution:
    """Train from `parent` for the spec's number of steps.

    Parameters
    ----------
    parent
        The network by name, see `layouts.state_layout`: the checkpoint, but with this site's own local tensors.
    resume
        Where progress is written and looked for. The result is the same with and without.
    network
        One of the spec, for the inputs of `cells`, to train in; else one is made.
    """
    settings = spec.training
    seed = derive_seed("train", settings.seed, round_id, site)
    torch.default_generator.manual_seed(seed)  # dropout; without a look for accelerators, which takes longer
    generator = np.random.default_rng(seed)  # minibatches

    start_state = cells.narrow(parent)
    model = network or build_model(spec, features=cells.features)
    load_state(model, start_state)
    model.train()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=compute_learning_rate(spec, round_id), weight_decay=settings.weight_decay
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    batches = cells.sample(generator, settings.steps, settings.batch_size)
    losses = np.zeros(settings.steps)
    anchors = {name: torch.tensor(start_state[name]) for name in parameter_layout(spec)} if settings.proximal else {}

    def identify() -> str:
        assert resume is not None
        own = [parent[name].tobytes() for name in local_layout(spec)]
        parts = (resume.parent, own, compute_spec_digest(spec), round_id, site, cells.fingerprint,
                 torch.get_num_threads())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    start = 0
    if resume is not None and resume.exists() and (found := resume.read(identify())):
        start = _restore(model, optimizer, losses, found)
    with _denormals_as_zero():
        for step in range(start, settings.steps):
            inputs, labels = cells.take(batches[step])
            optimizer.zero_grad(set_to_none=True)
            loss = loss_function(model(inputs), labels)
            loss.backward()
            if settings.proximal:
                _pull(model, anchors, settings.proximal)
            optimizer.step()
            losses[step] = float(loss.detach())
            if resume is not None and resume.is_due():
                resume.write(identify(), _save(model, optimizer, losses, step + 1))

    if resume is not None:
        resume.discard()
    optimizer.zero_grad()
    state = read_state(model)
    deltas = cells.widen({name: state[name] - start_state[name] for name in parameter_layout(spec)}, parent)
    local = {name: state[name] for name in local_layout(spec)}
    tail = losses[-max(1, settings.steps // 4) :]
    return Contribution(deltas=deltas, samples=len(cells.train), local=local,
                        metrics={"loss": round(float(tail.mean()), 6)})


@contextmanager
def _denormals_as_zero() -> Iterator[None]:
    """Adam's second moments of gradients near 0 are denormal numbers, with which a processor is many times slower.

    For training alone: a merge must round alike everywhere.
    """
    torch.set_flush_denormal(True)  # changes nothing where the processor cannot
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _pull(model: nn.Module, anchors: Mapping[str, torch.Tensor], proximal: float) -> None:
    """Add the gradient of μ/2 · ‖w - parent‖² to that of the loss."""
    for name, parameter in model.named_parameters():
        if name in anchors and parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchors[name], alpha=proximal)


def _save(model: nn.Module, optimizer: torch.optim.Adam, losses: npt.NDArray[np.float64], step: int) -> Arrays:
    """All that the steps to come depend on, as arrays: the network, Adam's moments, the state of the random numbers."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "step": np.array(step), "losses": losses, "random": torch.get_rng_state().numpy()}
    for name, value in model.state_dict().items():
        arrays[f"state.{name}"] = value.detach().numpy()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            arrays[f"{key}.{name}"] = value.numpy()
    return arrays


def _restore(model: nn.Module, optimizer: torch.optim.Adam, losses: npt.NDArray[np.float64], arrays: Arrays) -> int:
    """Undo `_save`; returns the number of steps that are done."""
    load_state(model, {name.removeprefix("state."): value for name, value in arrays.items()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {
                key: torch.from_numpy(arrays[f"{key}.{name}"].copy()) for key in ("step", "exp_avg", "exp_avg_sq")}
    losses[:] = arrays["losses"]
    torch.set_rng_state(torch.from_numpy(arrays["random"].copy()))
    return int(arrays["step"])


def score_checkpoint(parameters: Arrays, cells: Examples, spec: TrainedSpec, *, network: nn.Module | None = None
                     ) -> float | None:
    """The spec's score of a checkpoint on this site's validation examples; None where they do not tell it.

    `network`, if there is one of the spec already, is given the checkpoint's weights.
    Macro-F1 over the classes that occur there, or, where a spec on donors says so, the area under the ROC curve: None
    then if all have the same label.
    """
    if len(cells.validation) == 0:
        return None
    if network is None:
        network = load_network(spec, parameters, cells)
    else:
        load_state(network, cells.narrow(parameters))
    probabilities = cells.predict(network, cells.validation)
    truth = cells.y[cells.validation].numpy()
    if isinstance(spec, DonorSpec) and spec.score == "auroc":
        area = compute_auroc(truth, probabilities[:, 1])
        return None if math.isnan(area) else area
    return compute_macro_f1(truth, probabilities.argmax(axis=1), classes=len(spec.labels))


def compute_loss(parameters: Arrays, cells: Examples, spec: TrainedSpec) -> float | None:
    """Mean cross-entropy (natural logarithm) on this site's validation examples; None without any.

    Finer than a score: it moves with every change of the parameters.
    """
    if len(cells.validation) == 0:
        return None
    truth = cells.y[cells.validation].numpy()
    probabilities = cells.predict(load_network(spec, parameters, cells), cells.validation)
    likelihoods = probabilities[np.arange(len(truth)), truth].astype(np.float64)
    return float(-np.log(np.maximum(likelihoods, np.finfo(np.float32).tiny)).mean())
