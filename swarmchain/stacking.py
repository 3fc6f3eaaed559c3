"""A site's own use of a swarm's model of cells: a mixture of that and of models that know the site.

Four models call the site's cells: `home`, trained on them alone; `swarm`; `own_shares`, the swarm's told how often the
classes are here (`shares`); `trained_on`, the swarm's after some rounds more on the site's cells. The mixture's
probabilities are theirs, weighted: stacking, with weights that add up to 1 (Wolpert 1992; Smyth & Wolpert 1999,
"Linearly combining density estimators via stacking"). The weights are those of the greatest likelihood of the site's
validation cells, which no model was trained on; a cell counts as 1/√count of its class, so that rare classes have a
say, and `home` has the share `PRIOR` of all counts beforehand, so that a swarm must earn its part. Nothing leaves the
site.

    home.json            weights, shares, the run, digests
    home.safetensors     the weights of the networks `home` and `trained_on`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from swarmchain.baselines import TRAINED_ON_ROUNDS, train_on
from swarmchain.baselines_donors import predict_samples
from swarmchain.checkpoint import compute_size, decode_tensors, encode_tensors
from swarmchain.config import write_file
from swarmchain.errors import CheckpointError, ConfigError
from swarmchain.examples import TrainingSet, prepare_validation
from swarmchain.layouts import Layout, state_layout
from swarmchain.metrics import compute_macro_f1
from swarmchain.protocol import Digest, Strict, compute_digest, encode_canonical, first_problem
from swarmchain.selection import SiteData
from swarmchain.shares import apply_shares, compute_drawn, count_own
from swarmchain.spec import CellTypeSpec

Arrays = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

MODELS = ("home", "swarm", "own_shares", "trained_on")
VARIANTS = ("own_shares", "trained_on", "stacked")  # what a site may make of the swarm's model
NETWORKS = ("home", "trained_on")  # what a folder holds; the swarm's own is in the model folder
FOLDS = 5
STEPS_MAX = 200
TOLERANCE = 1e-5
PRIOR = 0.05
CARD, WEIGHTS = "home.json", "home.safetensors"
CARD_BYTES_MAX = 1 << 20

_HINT = "`swarmchain run compare --out` writes such a folder"


class HomeCard(Strict):
    """home.json: whose mixture it is, of which checkpoint, and how it is made.

    `weights` are in the order of `MODELS`; `ratios` are own share over drawn share of each label.
    """

    format: Literal["swarmchain-home/1"] = "swarmchain-home/1"
    site: str
    run: Annotated[int, Field(ge=1)]
    checkpoint: Digest
    labels: tuple[str, ...]
    weights: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    ratios: tuple[Annotated[float, Field(gt=0)], ...]
    networks: Digest


@dataclass(frozen=True)
class HomeModel:
    """A site's mixture: its card, and the tensors of the networks `home` and `trained_on`."""

    card: HomeCard
    networks: Mapping[str, Arrays]

    @property
    def weights(self) -> dict[str, float]:
        """By the names of `MODELS`."""
        return dict(zip(MODELS, self.card.weights, strict=True))

    def mix(self, chances: Mapping[str, Floats]) -> Floats:
        """Class probabilities [cells, labels] from those of the networks `home`, `swarm` and `trained_on`."""
        own = np.array(self.card.ratios)
        told = {**chances, "own_shares": apply_shares(chances["swarm"], own, np.ones_like(own))}
        return mix(np.stack([told[name] for name in MODELS]), np.array(self.card.weights))


def call_at_home(home: Arrays, swarm: Arrays, data: SiteData, examples: TrainingSet, spec: CellTypeSpec, *,
                 counts: npt.NDArray[np.generic], constants: Arrays, site: int, rounds: int
                 ) -> tuple[dict[str, Floats], Arrays]:
    """What every model of `MODELS` says of the examples' validation cells, and the weights of `trained_on`.

    Parameters
    ----------
    counts
        Training cells of every label over all sites, [labels].
    constants
        The standardisation of the run's seed checkpoint.
    rounds
        How many the swarm's model is trained on.
    """
    more = train_on(swarm, data, spec, site=site, constants=constants, rounds=rounds)
    states = {"home": home, "swarm": swarm, "trained_on": more}
    chances = {name: predict_samples(state, examples, spec) for name, state in states.items()}
    own = count_own(data.y[data.train], len(spec.labels))
    return {**chances, "own_shares": apply_shares(chances["swarm"], own, compute_drawn(counts, spec))}, more


def fit_weights(chances: Floats, truth: Ints) -> npt.NDArray[np.float64]:
    """Weights [models], in the order of `MODELS`, that make the truth [cells] likeliest, as far as the prior lets them.

    `chances` is [models, cells, labels]. By expectation and maximisation, from equal weights; there is one maximum.
    """
    likelihoods = np.maximum(chances[:, np.arange(len(truth)), truth].astype(np.float64), np.finfo(np.float32).tiny)
    cells = np.bincount(truth)[truth] ** -0.5
    prior = PRIOR * cells.sum() * np.eye(1, len(chances))[0]
    weights = np.full(len(chances), 1 / len(chances))
    for _ in range(STEPS_MAX):
        shares = weights[:, None] * likelihoods
        moved = (cells * shares / shares.sum(axis=0)).sum(axis=1) + prior
        moved /= moved.sum()
        is_done = bool(np.abs(moved - weights).max() < TOLERANCE)
        weights = moved
        if is_done:
            break
    return weights


def mix(chances: Floats, weights: npt.NDArray[np.float64]) -> Floats:
    """Probabilities [cells, labels] of a mixture of [models, cells, labels]."""
    found: Floats = np.einsum("m,mcl->cl", weights, chances.astype(np.float64)).astype(np.float32)
    return found


def cross_fit(chances: Floats, truth: Ints) -> Floats:
    """The mixture's probabilities [cells, labels], for each cell by weights that other cells gave.

    A fifth of each class at a time is called by the weights of the other four: so a score on these cells says what the
    mixture is worth on new ones.
    """
    fold = np.zeros(len(truth), dtype=np.int64)
    for label in np.unique(truth):
        rows = np.flatnonzero(truth == label)
        fold[rows] = np.arange(len(rows)) % FOLDS
    found = np.empty(chances.shape[1:], dtype=np.float32)
    for one in np.unique(fold):
        held = fold == one
        weights = np.eye(1, len(chances))[0] if held.all() else fit_weights(chances[:, ~held], truth[~held])
        found[held] = mix(chances[:, held], weights)
    return found


def score_at_home(home: Arrays, swarm: Arrays, data: SiteData, spec: CellTypeSpec, *,
                  counts: npt.NDArray[np.generic], constants: Arrays, site: int) -> dict[str, float]:
    """Macro-F1 on a site's validation cells of what it may make of the swarm's model; arguments as `call_at_home`."""
    examples = prepare_validation(data, spec, constants)
    assert isinstance(examples, TrainingSet)
    truth = examples.y.numpy()
    chances, _ = call_at_home(home, swarm, data, examples, spec, counts=counts, constants=constants, site=site,
                              rounds=TRAINED_ON_ROUNDS)
    chances["stacked"] = cross_fit(np.stack([chances[name] for name in MODELS]), truth)
    return {f"swarm_{name}": compute_macro_f1(truth, chances[name].argmax(axis=1), classes=len(spec.labels))
            for name in VARIANTS}


def make_home(chances: Mapping[str, Floats], truth: Ints, networks: Mapping[str, Arrays], spec: CellTypeSpec, *,
              site: str, run: int, checkpoint: str, ratios: npt.NDArray[np.float64]) -> HomeModel:
    """The mixture by all validation cells; `chances` as `call_at_home` gives them."""
    weights = fit_weights(np.stack([chances[name] for name in MODELS]), truth)
    kept = {name: networks[name] for name in NETWORKS}
    card = HomeCard(site=site, run=run, checkpoint=checkpoint, labels=spec.labels,
                    weights=tuple(min(float(w), 1.0) for w in weights), ratios=tuple(float(r) for r in ratios),
                    networks=compute_digest(_encode(kept, spec)))
    return HomeModel(card, kept)


def write_home(folder: Path, model: HomeModel, spec: CellTypeSpec) -> list[str]:
    """Write a folder, for its owner alone; returns the names of its files. Raises `ConfigError` if it cannot."""
    write_file(folder / WEIGHTS, _encode(model.networks, spec), mode=0o600)
    write_file(folder / CARD, encode_canonical(model.card), mode=0o600)
    return [WEIGHTS, CARD]


def read_home(folder: Path, spec: CellTypeSpec, *, checkpoint: str) -> HomeModel:
    """Read a folder that belongs to a run's checkpoint.

    Raises
    ------
    ConfigError
        If a file is missing, altered, or of another model.
    """
    layout = _name_layout(spec)
    try:
        card = HomeCard.model_validate_json(_read(folder / CARD, CARD_BYTES_MAX))
    except ValidationError as exc:
        raise ConfigError(f"{folder / CARD} is no home model: {first_problem(exc)}", hint=_HINT) from exc
    if card.checkpoint != checkpoint:
        raise ConfigError(f"{folder}: it goes with the checkpoint {card.checkpoint[:12]}…, and the model folder holds "
                          f"{checkpoint[:12]}…", hint="export the model of the same run, or compare again")
    if card.labels != spec.labels or {len(card.weights), len(card.ratios)} != {len(MODELS), len(spec.labels)} \
            or len(card.weights) != len(MODELS):
        raise ConfigError(f"{folder / CARD} does not fit the model's {len(spec.labels)} labels", hint=_HINT)
    data = _read(folder / WEIGHTS, compute_size(layout))
    if compute_digest(data) != card.networks:
        raise ConfigError(f"{folder / WEIGHTS} is not the file that {CARD} names", hint=_HINT)
    try:
        tensors = decode_tensors(data, layout)
    except CheckpointError as exc:
        raise ConfigError(f"{folder / WEIGHTS}: {exc.message}", hint=_HINT) from exc
    return HomeModel(card, {name: {key.removeprefix(f"{name}."): value for key, value in tensors.items()
                                   if key.startswith(f"{name}.")} for name in NETWORKS})


def _name_layout(spec: CellTypeSpec) -> Layout:
    parts = {f"{name}.{key}": entry for name in NETWORKS for key, entry in state_layout(spec).items()}
    return dict(sorted(parts.items()))


def _encode(networks: Mapping[str, Arrays], spec: CellTypeSpec) -> bytes:
    layout = _name_layout(spec)
    return encode_tensors({f"{name}.{key}": networks[name][key] for name in NETWORKS for key in state_layout(spec)},
                          layout)


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as exc:
        raise ConfigError(f"{path.parent} is no home model: cannot read {path.name}: {exc.strerror}", hint=_HINT
                          ) from exc
    if len(data) > bytes_max:
        raise ConfigError(f"{path} is larger than the {bytes_max} bytes that it should have", hint=_HINT)
    return data
