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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from swarmchain.agreement import standardize
from swarmchain.config import write_file
from swarmchain.data import SiteData
from swarmchain.layouts import local_layout, parameter_layout
from swarmchain.metrics import compute_macro_f1
from swarmchain.model import build_model, load_state, predict_probabilities, read_state
from swarmchain.protocol import derive_seed
from swarmchain.spec import CellTypeSpec, compute_spec_digest

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class TrainingSet:
    """A site's standardised cells, ready for every round of a run.

    Shapes: `x` float32 [cells, panel], `y` int64 [cells]; `draw` float64 [train cells] sums to 1.
    """

    x: torch.Tensor
    y: torch.Tensor
    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    draw: npt.NDArray[np.float64]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that training reads."""
        parts = (self.x.numpy(), self.y.numpy(), self.train, self.draw)
        return hashlib.sha256(b"".join(hashlib.sha256(p.tobytes()).digest() for p in parts)).hexdigest()


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
    """What one round of training gives: deltas of `layouts.parameter_layout`, the number of training cells, remarks.

    `local` holds the tensors of `layouts.local_layout` as they are after it.
    """

    deltas: dict[str, npt.NDArray[np.float32]]
    samples: int
    metrics: dict[str, float]
    local: dict[str, npt.NDArray[Any]]


def prepare_training(
    data: SiteData, spec: CellTypeSpec, constants: Arrays, cells_per_label: npt.NDArray[np.generic]
) -> TrainingSet:
    """Standardise a site's cells and weigh them for drawing.

    Parameters
    ----------
    constants
        `standardize.mean` and `standardize.scale`, [panel].
    cells_per_label
        Training cells of every class over all sites, [labels].
    """
    x = standardize(data.x, data.present, constants)
    weights = np.ones(len(data.train))
    if spec.training.class_balance == "inverse_sqrt":
        weights = 1.0 / np.sqrt(np.maximum(cells_per_label.astype(np.float64), 1.0))[data.y[data.train]]
    return TrainingSet(
        x=torch.from_numpy(x), y=torch.from_numpy(data.y), train=data.train, validation=data.validation,
        draw=weights / weights.sum(),
    )


def compute_learning_rate(spec: CellTypeSpec, round_id: int) -> float:
    """Half cosine from `lr` in round 1 to `lr · lr_final_share` in the last (Loshchilov & Hutter 2017, eq. 5)."""
    progress = min(round_id - 1, spec.limits.rounds - 1) / max(spec.limits.rounds - 1, 1)
    low = spec.training.lr_final_share
    return spec.training.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_round(parent: Arrays, cells: TrainingSet, spec: CellTypeSpec, *, round_id: int, site: int,
                resume: Resume | None = None) -> Contribution:
    """Train from `parent` for the spec's number of steps.

    Parameters
    ----------
    parent
        The network by name, see `layouts.state_layout`: the checkpoint, but with this site's own local tensors.
    resume
        Where progress is written and looked for. The result is the same with and without.
    """
    settings = spec.training
    seed = derive_seed("train", settings.seed, round_id, site)
    torch.manual_seed(seed)  # dropout
    generator = np.random.default_rng(seed)  # minibatches

    model = build_model(spec)
    load_state(model, parent)
    model.train()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=compute_learning_rate(spec, round_id), weight_decay=settings.weight_decay
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    batches = generator.choice(cells.train, size=(settings.steps, settings.batch_size), p=cells.draw)
    losses = np.zeros(settings.steps)

    def identify() -> str:
        assert resume is not None
        own = [parent[name].tobytes() for name in local_layout(spec)]
        parts = (resume.parent, own, compute_spec_digest(spec), round_id, site, cells.fingerprint,
                 torch.get_num_threads())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    start = 0
    if resume is not None and resume.exists() and (found := resume.read(identify())):
        start = _restore(model, optimizer, losses, found)
    for step in range(start, settings.steps):
        rows = batches[step]
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(model(cells.x[rows]), cells.y[rows])
        loss.backward()
        optimizer.step()
        losses[step] = float(loss.detach())
        if resume is not None and resume.is_due():
            resume.write(identify(), _save(model, optimizer, losses, step + 1))

    if resume is not None:
        resume.discard()
    state = read_state(model)
    deltas = {name: state[name] - parent[name] for name in parameter_layout(spec)}
    local = {name: state[name] for name in local_layout(spec)}
    tail = losses[-max(1, settings.steps // 4) :]
    return Contribution(deltas=deltas, samples=len(cells.train), local=local,
                        metrics={"loss": round(float(tail.mean()), 6)})


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


def score_checkpoint(parameters: Arrays, cells: TrainingSet, spec: CellTypeSpec) -> float | None:
    """Macro-F1 on this site's validation cells, over the classes that occur there; None without such cells."""
    if len(cells.validation) == 0:
        return None
    model = build_model(spec)
    load_state(model, parameters)
    probabilities = predict_probabilities(model, cells.x[cells.validation].numpy())
    truth = cells.y[cells.validation].numpy()
    return compute_macro_f1(truth, probabilities.argmax(axis=1), classes=len(spec.labels))
