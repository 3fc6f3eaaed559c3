"""What of a run's old rounds a store need not hold any longer.

Nothing is removed that anyone may still need: of every run its spec, seed checkpoint and statistics, its newest and its
best checkpoint, all certificates of finalized rounds, and its last `keep_rounds` rounds with the checkpoint that they
start from, so that those can be audited as ever. Of older rounds the contributions, openings and checkpoints go. What
the contract's runs do not name is never touched.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from swarmchain.certify import open_commitment
from swarmchain.chain import Event, SwarmContract
from swarmchain.errors import OpeningError, SpecError, StoreError
from swarmchain.protocol import Phase, RoundKey, RunView, Strict, encode_canonical
from swarmchain.sealing import ENVELOPE_BYTES_MAX, parse_envelope
from swarmchain.store import Store, read_manifest, read_spec

Name = tuple[str, str]
EVENTS = ("Committed", "Voted", "RoundFinalized")
NOTE_BYTES_MAX = 4096


class Note(Strict):
    """What `store prune` leaves for an auditor. It proves nothing: whoever may write to the store may write it."""

    format: Literal["swarmchain-pruned/1"] = "swarmchain-pruned/1"
    before_round: Annotated[int, Field(ge=1)]


@dataclass
class RunPruning:
    """What is to go of one run: its rounds before `before_round`."""

    run: int
    before_round: int
    doomed: dict[Name, int] = field(default_factory=dict)

    @property
    def bytes_freed(self) -> int:
        """Of everything that is to go."""
        return sum(self.doomed.values())


@dataclass
class _Named:
    """What one run names in the store, round by round."""

    view: RunView
    by_round: dict[int, set[Name]] = field(default_factory=dict)
    certificates: set[Name] = field(default_factory=set)
    always: set[Name] = field(default_factory=set)
    checkpoints: dict[int, str] = field(default_factory=dict)
    scores: dict[int, dict[int, int]] = field(default_factory=dict)

    def first_kept(self, keep_rounds: int) -> int:
        """The first of the last `keep_rounds` closed rounds; a round that is going on is kept beside them."""
        is_open = self.view.phase in (Phase.COMMIT, Phase.VOTE)
        return max(1, self.view.round_id - is_open - keep_rounds + 1)

    def find_kept(self, keep_rounds: int) -> set[Name]:
        """Everything that must stay."""
        first = self.first_kept(keep_rounds)
        kept = self.always | self.certificates
        for round_id, names in self.by_round.items():
            kept |= names if round_id >= first else set()
        parents = [round_id for round_id in self.checkpoints if round_id < first]
        chosen = [self.checkpoints[max(parents)]] if parents else []
        if self.checkpoints:
            chosen.append(self.checkpoints[max(self.checkpoints, key=self._rank)])
        return kept | {("blobs", digest) for digest in chosen}

    def _rank(self, round_id: int) -> tuple[float, int]:
        """The best checkpoint has the highest median score, so that one liar cannot choose it; else the newest."""
        scores = list(self.scores.get(round_id, {}).values())
        return (statistics.median(scores) if scores else 0.0, round_id)


def plan_pruning(contract: SwarmContract, store: Store, *, keep_rounds: int) -> list[RunPruning]:
    """What can go of every run, and how many bytes it has; nothing is changed.

    Raises
    ------
    SpecError, StoreError
        If a run's spec cannot be read: it may name what must stay.
    """
    runs = [_read_named(contract, store, run) for run in range(1, contract.get_run_count() + 1)]
    kept = set[Name]().union(*(named.find_kept(keep_rounds) for named in runs))
    there = store.list_all()
    kept |= _find_sealed(store, kept, there)
    plans = []
    for named in runs:
        plan = RunPruning(named.view.run, named.first_kept(keep_rounds))
        for round_id, names in sorted(named.by_round.items()):
            if round_id < plan.before_round:
                gone = names - kept
                gone |= _find_sealed(store, gone, there) - kept
                plan.doomed |= {name: there[name].size for name in sorted(gone) if name in there}
        plans.append(plan)
    return plans


def find_blobs(contract: SwarmContract, store: Store, run: int) -> set[str]:
    """Digests of all blobs that a run names, but for its spec. Raises as `plan_pruning` does."""
    named = _read_named(contract, store, run)
    names = named.always.union(*named.by_round.values())
    return {digest for kind, digest in names if kind == "blobs"} - {named.view.spec}


def prune(contract: SwarmContract, store: Store, plans: Sequence[RunPruning]) -> None:
    """Remove what was planned, and leave a note for auditors. Doing it twice is the same as doing it once."""
    for plan in plans:
        if not plan.doomed:
            continue
        note = Note(before_round=plan.before_round)
        store.put_note(_note_name(contract.key_of(plan.run, 0)), encode_canonical(note))
        # blobs first, then openings, then envelopes: the later tell what the earlier are, should this be cut short
        for kind, name in sorted(plan.doomed):
            store.remove(kind, name)


def read_pruned(store: Store, key: RoundKey) -> int:
    """The round before which a run was pruned, by the store's own word; 0 if it says nothing."""
    try:
        return Note.model_validate_json(store.get_note(_note_name(key), bytes_max=NOTE_BYTES_MAX)).before_round
    except (StoreError, ValidationError):
        return 0


def _find_sealed(store: Store, names: set[Name], there: Collection[Name]) -> set[Name]:
    """Envelopes of blobs of these names, and the ciphertexts that they speak of."""
    found: set[Name] = set()
    for kind, digest in names:
        if kind != "blobs" or ("sealed", digest) not in there:
            continue
        found.add(("sealed", digest))
        with suppress(StoreError):
            envelope = parse_envelope(store.get_envelope(digest, bytes_max=ENVELOPE_BYTES_MAX), digest)
            found.add(("blobs", envelope.ciphertext))
    return found


def _note_name(key: RoundKey) -> str:
    return f"pruned-{key.chain_id}-{key.contract.lower()}-{key.run}.json"


def _read_named(contract: SwarmContract, store: Store, run: int) -> _Named:
    view = contract.view_run(run)
    named = _Named(view, always={("blobs", view.spec), ("blobs", view.checkpoint), ("blobs", view.manifest)})
    try:
        spec = read_spec(store, view.spec)
    except (SpecError, StoreError) as exc:
        raise type(exc)(f"nothing is pruned, since run {run} may need it: {exc.message}", hint=exc.hint) from exc
    if (seed := getattr(spec, "seed_checkpoint", None)) is not None:
        named.always.add(("blobs", seed))
    if (source := getattr(spec, "statistics", None)) is not None:
        named.always |= {("blobs", source.spec), ("blobs", source.checkpoint)}
    for event in contract.get_events(EVENTS, run=run):
        _add(named, event, contract, store)
    return named


def _add(named: _Named, event: Event, contract: SwarmContract, store: Store) -> None:
    values, round_id = event.values, event.values["round"]
    names = named.by_round.setdefault(round_id, set())
    if event.name == "Committed":
        names.add(("openings", values["commitment"]))
        names |= _find_contribution(store, contract.key_of(named.view.run, round_id), values)
        return
    names |= {("blobs", values["checkpoint"]), ("blobs", values["manifest"])}
    if event.name == "Voted":
        named.scores.setdefault(round_id, {})[values["site"]] = values["scoreBps"]
        return
    named.checkpoints[round_id] = values["checkpoint"]
    named.certificates.add(("blobs", values["manifest"]))
    try:
        names |= {("blobs", item.digest) for item in read_manifest(store, values["manifest"]).included}
    except (OpeningError, StoreError):
        return  # its certificate is lost; the openings say the same


def _find_contribution(store: Store, key: RoundKey, values: dict[str, int | str]) -> set[Name]:
    """A contribution by its opening, if that opens the commitment: else anyone could have any blob removed."""
    try:
        opening = open_commitment(store, str(values["commitment"]), key=key, site=int(values["site"]))
    except (OpeningError, StoreError):
        return set()
    return {("blobs", opening.digest)}
