"""A run replayed by an outsider: from the contract's events and the store alone, without any key.

Nothing is taken on trust that can be computed: members, rounds, quorums and the chained head follow from the events by
the rules; every opening must open its commitment, every blob hash to its name, every merge give the very bytes of the
certificate and the checkpoint that a quorum accepted. A *finding* breaks that proof. A *remark* does not: a file that
no finalized round stands on was altered, or an excluded site disclosed nothing.

What this cannot show: that the node tells the truth of the chain (ask one's own), what a site trained on, and whether
an excluded site's file was missing then, or is only not missing now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swarmchain.certify import CODE, NO_PARENT, Arrays, Gathered, certify, gather_many, open_commitment
from swarmchain.chain import Event, SwarmContract
from swarmchain.errors import (
    BlobMissing,
    CheckpointError,
    ContractError,
    OpeningError,
    SpecError,
    StoreError,
    SwarmError,
)
from swarmchain.layouts import contribution_layout
from swarmchain.protocol import Manifest, Outcome, RoundKey, RunView
from swarmchain.replay import read_history, rebuild
from swarmchain.retention import read_pruned
from swarmchain.rules import Replica, Round
from swarmchain.spec import CustomSpec, EvaluationSpec, RehearsalSpec, Spec, SumSpec, TrainedSpec
from swarmchain.spool import Spool
from swarmchain.store import Store, read_checkpoint, read_manifest, read_spec
from swarmchain.tasks import check_standardization, start_parent
from swarmchain.work import check_statistics, load_statistics_source, load_trained


@dataclass
class RoundAudit:
    """One round: what the chain says of it, what was found wrong, and what is worth a remark. Sites by name."""

    round_id: int
    outcome: str
    members: list[str]
    committed: list[str]
    accepting: list[str] = field(default_factory=list)
    rejecting: list[str] = field(default_factory=list)
    quorum: int = 0
    included: list[dict[str, Any]] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    checkpoint: str = ""
    manifest: str = ""
    is_recomputed: bool = False
    findings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass
class Audit:
    """A run's audit; `findings` and `remarks` of the run itself, beside those of its rounds."""

    run: int
    name: str
    task: str
    chain_id: int
    contract: str
    block: int
    spec: str
    head: str
    checkpoint: str
    is_fast: bool
    code: str = CODE
    sites: list[str] = field(default_factory=list)
    rounds: list[RoundAudit] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def all_findings(self) -> list[str]:
        """Every finding, with the round that it is of."""
        return self.findings + [f"round {r.round_id}: {line}" for r in self.rounds for line in r.findings]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.all_findings

    def to_dict(self) -> dict[str, Any]:
        """For audit.json."""
        return {"format": "swarmchain-audit/1", "is_sound": self.is_sound, **asdict(self)}


Say = Callable[[RoundAudit], None]


@dataclass(frozen=True)
class Record:
    """What the chain says of a run: the contract's own view at one block, and all that its events give."""

    view: RunView
    block: int
    names: Mapping[int, str]
    key_of: Callable[[int, int], RoundKey]
    events: Sequence[Event]
    replica: Replica


def read_record(contract: SwarmContract, run: int) -> Record:
    """Ask the chain.

    Raises
    ------
    UnknownRun
        If there is none of this number.
    ReplayError
        If the events do not give a state.
    ChainUnreachable
        If no node answers: that says nothing about the run.
    """
    # all as of one block: the run may be going on
    block = contract.node.read_head()
    view = contract.view_run(run, at=contract.node.read_block_time(block), block=block)
    names = {record.site: record.name for record in contract.get_sites()}
    events = read_history(contract, to_block=block)
    return Record(view, block, names, contract.key_of, events, rebuild(contract, events))


def audit_run(record: Record, store: Store, *, spool_folder: Path, is_fast: bool = False, say: Say = lambda _: None
              ) -> Audit:
    """Replay a run.

    Parameters
    ----------
    is_fast
        Check openings and digests, and recompute no merge.
    say
        Told of every round as it is done.

    Raises
    ------
    StoreUnreachable
        If the store does not answer: that says nothing about the run.
    """
    view, replica, number = record.view, record.replica, record.view.run
    run, key = replica.runs[number - 1], record.key_of(number, 0)
    audit = Audit(number, "?", "?", key.chain_id, key.contract, record.block, view.spec, run.head,
                  view.checkpoint if view.finalized_round else "", is_fast,
                  sites=[record.names[i] for i in sorted(record.names)])
    if replica.view_run(number, now=view.now) != view:
        audit.findings.append("the contract shows another state of the run than its events give")
    replayed = _Replay(record, store, audit, Spool(spool_folder))
    replayed.check_heads(record.events)
    if replayed.read_law(replica):
        for round_id, round_ in enumerate(run.rounds, 1):
            outcome = run.phase(round_id, view.now)[1]
            audit.rounds.append(replayed.check_round(round_id, round_, outcome=outcome))
            say(audit.rounds[-1])
        replayed.sweep()
    return audit


class _Replay:
    """The steps of one audit; what they find goes into it."""

    def __init__(self, record: Record, store: Store, audit: Audit, spool: Spool) -> None:
        self.store, self.audit, self.spool, self.now = store, audit, spool, record.view.now
        self.run, self.names, self.key_of = record.replica.runs[audit.run - 1], record.names, record.key_of
        self.spec: Spec | None = None
        self.parent: tuple[str, Arrays] = (NO_PARENT, {})
        self.previous: tuple[str, Manifest | None] = (NO_PARENT, None)
        self.rejections = 0
        self.pruned = read_pruned(store, record.key_of(audit.run, 0))
        self.sound: set[str] = set()
        self.named: dict[str, str] = {self.run.spec: "the spec"}

    def check_heads(self, events: Sequence[Event]) -> None:
        """Whether the heads that the contract announced are those that the finalized rounds chain up to."""
        announced = [e.values for e in events if e.name == "RoundFinalized" and e.values["run"] == self.audit.run]
        if announced and announced[-1]["head"] != self.run.head:
            self.audit.findings.append("the chained head is not what the finalized rounds give")

    def read_law(self, replica: Replica) -> bool:
        """Spec, and the checkpoint that the first round starts from; whether the rounds can be checked at all."""
        try:
            self.spec = read_spec(self.store, self.run.spec)
            self.audit.name, self.audit.task = self.spec.name, self.spec.task
            self.sound.add(self.run.spec)
            if isinstance(self.spec, TrainedSpec | CustomSpec):
                self.named[self.spec.seed_checkpoint] = "the seed checkpoint"
                self.parent = (self.spec.seed_checkpoint, {})
                seed = read_checkpoint(self.store, self.spec.seed_checkpoint, self.spec)
                self.sound.add(self.spec.seed_checkpoint)
                self.parent = (self.spec.seed_checkpoint, seed)
                if isinstance(self.spec, TrainedSpec):
                    self._check_statistics(self.spec, seed, replica)
            elif isinstance(self.spec, EvaluationSpec):
                trained = self.spec.trained
                self.named |= {trained.spec: "the evaluated run's spec", trained.checkpoint: "the evaluated model"}
                load_trained(self.store, self.spec, lambda run: replica.view_run(run, now=self.now))
                self.sound |= {trained.spec, trained.checkpoint}
            elif isinstance(self.spec, RehearsalSpec):
                self.parent = (NO_PARENT, start_parent(self.spec))
        except (StoreError, SpecError, CheckpointError, ContractError) as exc:
            self.audit.findings.append(f"the run's law: {exc.message}")
        return self.spec is not None

    def _check_statistics(self, spec: TrainedSpec, seed: Arrays, replica: Replica) -> None:
        """The statistics that the spec stands on must be on record, and the seed standardise as they say."""
        named = spec.statistics
        check_statistics(spec, replica.view_run(named.run, now=self.now))
        self.named |= {named.spec: "the statistics run's spec", named.checkpoint: "the statistics"}
        source = load_statistics_source(self.store, spec)
        sums = read_checkpoint(self.store, named.checkpoint, source)
        self.sound |= {named.spec, named.checkpoint}
        check_standardization(spec, source, sums, seed)

    def check_round(self, number: int, round_: Round, *, outcome: Outcome) -> RoundAudit:
        """One round, after those before it."""
        found = RoundAudit(number, outcome.name.lower(), self._names(round_.members), self._names(round_.commitments),
                           rejecting=self._names(round_.rejecting), quorum=round_.quorum)
        key = self.key_of(self.audit.run, number)
        if outcome is Outcome.FINALIZED:
            result = next(vote for site, vote in round_.votes.items() if vote.accept and len(
                round_.accepting(vote.checkpoint, vote.manifest)) >= round_.quorum)
            found.checkpoint, found.manifest = result.checkpoint, result.manifest
            found.accepting = self._names(round_.accepting(result.checkpoint, result.manifest))
            self._check_finalized(found, round_, key)
            self.rejections = 0
            if found.findings and number < self.pruned:
                found.remarks.append(f"the store says that it was pruned before round {self.pruned}: what is missing "
                                     "may have gone there; an audit that was made before then stands")
        else:
            self.rejections += outcome is Outcome.REJECTED
            for site, commitment in sorted(round_.commitments.items()):
                found.remarks += self._look(site, commitment, key)
        return found

    def _check_finalized(self, found: RoundAudit, round_: Round, key: RoundKey) -> None:
        self.named |= {found.manifest: f"the manifest of round {found.round_id}",
                       found.checkpoint: f"the checkpoint of round {found.round_id}"}
        manifest: Manifest | None = None
        try:
            manifest = read_manifest(self.store, found.manifest)
            self.sound.add(found.manifest)
        except (StoreError, OpeningError) as exc:
            found.findings.append(f"the manifest: {exc.message}")
        if manifest is not None:
            found.findings += self._compare(manifest, round_, key)
            found.included = [{**item.model_dump(), "site": self._name(item.site)} for item in manifest.included]
            found.excluded = {self._name(item.site): item.reason for item in manifest.excluded}
            found.excluded |= {self._name(item.site): item.doubt for item in manifest.included if item.doubt}
        contributions = self._gather(found, manifest, round_, key)
        made: Arrays | None = None
        if manifest is not None and contributions is not None and not self.audit.is_fast and not found.findings:
            made = self._recompute(found, manifest, contributions, key)
        result = self._read_result(found, made)
        self.previous = (found.manifest, manifest)
        if not isinstance(self.spec, SumSpec):
            self.parent = (found.checkpoint, result)

    def _compare(self, manifest: Manifest, round_: Round, key: RoundKey) -> Iterator[str]:
        """What a certificate says of its round against what the chain says."""
        expected = {"chain_id": key.chain_id, "contract": key.contract.lower(), "run": key.run, "round": key.round_id,
                    "spec": self.run.spec, "parent": self.parent[0], "previous": self.previous[0]}
        for name, value in expected.items():
            if getattr(manifest, name) != value:
                yield f"the manifest's {name} is {getattr(manifest, name)}, the chain's is {value}"
        if manifest.code != CODE:
            yield f"the manifest was made by {manifest.code}, this is {CODE}: verify with the version that made it"
        spoken_of = {item.site: item.commitment for item in manifest.included}
        spoken_of |= {item.site: item.commitment for item in manifest.excluded}
        if spoken_of != round_.commitments or len(spoken_of) != len(manifest.included) + len(manifest.excluded):
            yield "the manifest does not speak of exactly the commitments on the chain"

    def _gather(self, found: RoundAudit, manifest: Manifest | None, round_: Round, key: RoundKey
                ) -> list[Gathered] | None:
        """The contributions that were counted; None if one of them is not what it was."""
        assert self.spec is not None
        included = {item.site for item in manifest.included} if manifest else set(round_.commitments)
        layout = contribution_layout(self.spec)
        gathered: list[Gathered] = []
        is_whole = True
        counted = {site: commitment for site, commitment in round_.commitments.items() if site in included}
        answers = gather_many(self.store, self.spool, counted, layout, key=key)
        for site, commitment in sorted(round_.commitments.items()):
            if site not in included:
                found.remarks += self._look(site, commitment, key)
                continue
            answer = answers[site]
            if isinstance(answer, Gathered):
                gathered.append(answer)
                self.sound.add(answer.opening.digest)
                continue
            is_whole = False
            found.findings += self._look(site, commitment, key) or [f"{self._name(site)}'s contribution: {answer}"]
        return gathered if is_whole else None

    def _recompute(self, found: RoundAudit, manifest: Manifest, contributions: list[Gathered], key: RoundKey
                   ) -> Arrays | None:
        assert self.spec is not None
        if not self.parent[1] and not isinstance(self.spec, SumSpec):
            found.findings.append("the merge cannot be computed: the checkpoint that the round started from is lost")
            return None
        if self.previous[0] != NO_PARENT and self.previous[1] is None:
            found.findings.append("the merge cannot be computed: the manifest that it builds on is lost")
            return None
        try:
            made = certify(self.spec, self.parent, (contributions, manifest.excluded), key=key,
                           spec_digest=self.run.spec, rejections=self.rejections, previous=self.previous)
        except SwarmError as exc:
            found.findings.append(f"the merge cannot be computed: {exc.message}")
            return None
        found.is_recomputed = True
        if made.manifest.checkpoint != found.checkpoint:
            found.findings.append(f"the merge gives {made.manifest.checkpoint}, not the checkpoint on the chain")
        for name in type(manifest).model_fields:
            if getattr(made.manifest, name) != getattr(manifest, name) and name != "checkpoint":
                found.findings.append(f"the manifest's {name} is not what the merge gives")
        return made.tensors if made.manifest.checkpoint == found.checkpoint else None

    def _read_result(self, found: RoundAudit, made: Arrays | None) -> Arrays:
        """The checkpoint that the next round starts from; what lies in the store must be it."""
        assert self.spec is not None
        try:
            stored = read_checkpoint(self.store, found.checkpoint, self.spec)
            self.sound.add(found.checkpoint)
        except (StoreError, CheckpointError) as exc:
            found.findings.append(f"the checkpoint: {exc.message}")
            stored = dict(made or {})
        return stored

    def _look(self, site: int, commitment: str, key: RoundKey) -> list[str]:
        """What is to be said of a disclosure that nothing stands on, or that is broken."""
        name = self._name(site)
        try:
            opening = open_commitment(self.store, commitment, key=key, site=site)
        except BlobMissing:
            return [f"{name}'s opening is not in the store"]
        except (OpeningError, StoreError) as exc:
            return [f"{name}'s opening does not open its commitment: {exc.message}"]
        self.named[opening.digest] = f"{name}'s contribution to round {key.round_id}"
        try:
            self.store.require_whole(opening.digest)
        except StoreError as exc:
            return [f"{name}'s contribution: {exc.message}"]
        self.sound.add(opening.digest)
        return []

    def sweep(self) -> None:
        """Every other blob in the store must at least be what its name says."""
        for digest in self.store.list_blobs():
            if digest in self.sound:
                continue
            try:
                self.store.require_whole(digest)
            except StoreError as exc:
                words = self.named.get(digest, "a file that this run does not stand on")
                line = f"{words}: {exc.message}"
                if not any(exc.message in known for known in self.audit.all_findings):
                    self.audit.remarks.append(line)

    def _name(self, site: int) -> str:
        return self.names.get(site, f"site {site}")

    def _names(self, sites: Any) -> list[str]:
        return [self._name(site) for site in sorted(sites)]
