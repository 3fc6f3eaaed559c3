"""From the chain and the store to a model folder: the checkpoint, its law, its certificate, and the card of all of it.

Nothing in a card is typed by hand but the fixed texts on use and limits; the sections follow Mitchell et al. 2019,
"Model cards for model reporting". What the card's evaluation says was agreed on by the sites in a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import numpy as np

import swarmchain
from swarmchain.calibration import calibrate, compute_class_scores
from swarmchain.card import (
    CARD,
    LOCAL,
    MANIFEST,
    PAGE,
    SPEC,
    WEIGHTS,
    BarRow,
    ClassRow,
    Evaluated,
    ModelCard,
    Provenance,
    RoundRow,
    SiteRow,
)
from swarmchain.certify import Arrays
from swarmchain.chain import SwarmContract
from swarmchain.checkpoint import compute_size, encode_tensors
from swarmchain.config import SiteConfig, write_file
from swarmchain.evaluating import read_evaluation
from swarmchain.history import RoundRecord, read_rounds
from swarmchain.layouts import checkpoint_layout, local_layout
from swarmchain.protocol import BPS, MANIFEST_BYTES_MAX, Manifest, RunView, compute_digest, encode_canonical
from swarmchain.spec import EvaluationSpec, RunRef, TrainedSpec, encode_spec
from swarmchain.store import Store, read_manifest
from swarmchain.work import read_own


@dataclass(frozen=True)
class Release:
    """A card, and the files that it names, by name."""

    card: ModelCard
    spec: TrainedSpec
    files: Mapping[str, bytes]


def build_release(
    contract: SwarmContract, store: Store, view: RunView, spec: TrainedSpec, *, config: SiteConfig,
    evaluation: RunView | None = None,
) -> Release:
    """Gather a model folder's content.

    Parameters
    ----------
    spec
        As `evaluating.read_trained` gives it.
    config
        The site whose own parts of the network go along, where the spec has such parts.
    evaluation
        A finished evaluation run of this model.

    Raises
    ------
    SpecError
        If the evaluation is of another model, or this site lacks parts of its own.
    StoreError
        If the store does not hold the checkpoint or the certificate.
    """
    names = {record.site: record.name for record in contract.get_sites()}
    files = {
        WEIGHTS: store.get_blob(view.checkpoint, bytes_max=compute_size(checkpoint_layout(spec))),
        SPEC: encode_spec(spec), MANIFEST: store.get_blob(view.manifest, bytes_max=MANIFEST_BYTES_MAX),
    }
    layout = local_layout(spec)
    if layout:
        files[LOCAL] = encode_tensors(read_own(config, view.run, spec), layout)
    manifest = read_manifest(store, view.manifest)
    records = read_rounds(contract, store, view.run)
    # who left the run is still in the checkpoints that counted it
    took_part = view.joined | {item.site for record in records if record.manifest for item in record.manifest.included}
    found = None
    if evaluation is not None:
        made = read_evaluation(store, evaluation, of=view)
        found = _evaluate(evaluation, *made, sites=_name_sites(read_manifest(store, evaluation.manifest), names))
    card = ModelCard(
        name=spec.name, task=spec.task, version=swarmchain.__version__,
        provenance=Provenance(
            chain_id=contract.chain_id, contract=contract.address, run=view.run, round=view.finalized_round,
            spec=view.spec, checkpoint=view.checkpoint, manifest=view.manifest, head=view.head, code=manifest.code),
        files={name: compute_digest(data) for name, data in files.items()},
        sites=tuple(_describe_site(site, names[site], records) for site in sorted(took_part)),
        rounds=tuple(_describe_round(record, names) for record in records), evaluation=found,
    )
    return Release(card, spec, files)


def write_release(folder: Path, release: Release, *, pictures: Sequence[str] = ()) -> list[str]:
    """Write the files, the card last; returns their names.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    """
    for name, data in release.files.items():
        write_file(folder / name, data, mode=0o600 if name == LOCAL else 0o644)
    write_file(folder / PAGE, render_card(release.card, release.spec, pictures=pictures).encode())
    write_file(folder / CARD, encode_canonical(release.card))
    return [*release.files, PAGE, CARD]


def draw_release(folder: Path, release: Release) -> list[str]:
    """The evaluation's pictures, if there is one; returns the names of those that the card shows."""
    found = release.card.evaluation
    if found is None:
        return []
    from swarmchain.plots import draw_evaluation  # takes scanpy's libraries

    return draw_evaluation(folder, release.spec.labels, np.array(found.confusion, dtype=np.int64), bars=found.bars,
                           error=found.error, threshold=found.threshold,
                           unit="samples" if release.card.task == "donor" else "cells")


def render_card(card: ModelCard, spec: TrainedSpec, *, pictures: Sequence[str] = ()) -> str:
    """model-card.md: the same card for people."""
    environment = jinja2.Environment(  # noqa: S701 - Markdown; `md` escapes what strangers named
        loader=jinja2.PackageLoader("swarmchain"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True)
    environment.filters |= {"md": _escape, "number": _number, "percent": lambda v: "–" if v is None else f"{v:.1%}"}
    return environment.get_template("model-card.md").render(card=card, spec=spec, p=card.provenance,
                                                           e=card.evaluation, pictures=pictures)


def _evaluate(view: RunView, spec: EvaluationSpec, sums: Arrays, *, sites: tuple[str, ...]) -> Evaluated:
    found = calibrate(sums, spec)
    confusion = sums["confusion"]
    f1, support = compute_class_scores(confusion)
    scored = [value for value in f1 if value is not None]
    cells = int(confusion.sum())
    plain = asdict(found)
    bars = tuple(BarRow(**bar) for bar in plain.pop("bars"))
    return Evaluated(
        source=RunRef(run=view.run, spec=view.spec, checkpoint=view.checkpoint), sites=sites, cells=cells,
        macro_f1=sum(scored) / max(len(scored), 1), accuracy=int(confusion.trace()) / max(cells, 1),
        per_class=tuple(ClassRow(label=label, f1=value, support=n)
                        for label, value, n in zip(spec.labels, f1, support, strict=True)),
        confusion=tuple(tuple(int(n) for n in row) for row in confusion), right_share_min=spec.right_share_min,
        bars=bars, **plain)


def _describe_site(site: int, name: str, records: Sequence[RoundRecord]) -> SiteRow:
    shares = [item for record in records if record.manifest for item in record.manifest.included if item.site == site]
    counted = [item.weight for item in shares if not item.doubt]
    return SiteRow(site=site, name=name, rounds=len(counted),
                   weight=sum(counted) / len(counted) if counted else None,
                   cells_train=shares[-1].samples if shares else None)


def _describe_round(record: RoundRecord, names: Mapping[int, str]) -> RoundRow:
    manifest = record.manifest
    return RoundRow.model_validate({
        "round": record.round_id, "outcome": record.outcome.name.lower(), "checkpoint": record.checkpoint or None,
        "included": tuple(names[item.site] for item in manifest.included if not item.doubt) if manifest else (),
        "excluded": {names[site]: reason for site, reason in _find_left_out(manifest)} if manifest else {},
        "scores": {names[site]: score / BPS for site, score in sorted(record.scores.items())},
    })


def _find_left_out(manifest: Manifest) -> list[tuple[int, str]]:
    """Sites without a part in a round's checkpoint, and why: not merged at all, or with no weight."""
    return [*((item.site, str(item.reason)) for item in manifest.excluded),
            *((item.site, item.doubt) for item in manifest.included if item.doubt)]


def _name_sites(manifest: Manifest, names: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(names[item.site] for item in manifest.included)


def _escape(value: object) -> str:
    """What strangers named, as text and not as Markdown, HTML or a new line."""
    text = str(value).replace("\\", "\\\\")
    for mark, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), *((c, f"\\{c}") for c in "`*_[]|#~")):
        text = text.replace(mark, entity)
    return " ".join(text.split())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
