"""What became of a run, round by round, from the chain's events and the rounds' certificates.

Where a node lost events (a development chain that was killed does), the contract says how a round ended, and the
certificate who contributed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from swarmchain.chain import Event, SwarmContract
from swarmchain.errors import OpeningError, StoreError
from swarmchain.protocol import Manifest, Outcome, mask_to_sites
from swarmchain.store import Store, read_manifest

NO_CONTRIBUTION = "no contribution in time"
UNKNOWN = "certificate not in the store"


@dataclass
class RoundRecord:
    """One round. `scores` holds the newest vote's score in 1/10,000 of each site that voted.

    `manifest` is None for a round without a checkpoint, and where the store lacks the certificate.
    """

    round_id: int
    members: frozenset[int] = frozenset()
    expected: frozenset[int] = frozenset()
    outcome: Outcome = Outcome.PENDING
    committed: set[int] = field(default_factory=set)
    scores: dict[int, int] = field(default_factory=dict)
    checkpoint: str = ""
    manifest_digest: str = ""
    manifest: Manifest | None = None

    def explain_absence(self, site: int) -> str:
        """Why a member's contribution has no part in a finalized round's checkpoint; "" if it has."""
        if self.manifest is None:
            return UNKNOWN if site in self.committed else NO_CONTRIBUTION
        reasons: dict[int, str] = {item.site: item.doubt or "" for item in self.manifest.included}
        reasons |= {item.site: item.reason for item in self.manifest.excluded}
        return reasons.get(site, NO_CONTRIBUTION)


@dataclass(frozen=True)
class Tally:
    """How often a run's rounds ended in which way, and for every site the rounds that it was left out of, by reason.

    Left out counts finalized rounds only: in the others nobody was counted.
    """

    finalized: int
    rejected: int
    expired: int
    left_out: Mapping[int, Mapping[str, int]]


def read_rounds(contract: SwarmContract, store: Store, run: int) -> list[RoundRecord]:
    """All rounds of a run, in their order. Raises `Unreachable` if chain or store do not answer."""
    names = ["RoundOpened", "Committed", "Voted", "RoundFinalized", "RoundRejected", "RoundExpired"]
    rounds: dict[int, RoundRecord] = {}
    for event in contract.get_events(names, run=run):
        _apply(rounds, event)
    view = contract.view_run(run)
    for number in range(1, view.round_id + 1):
        record = rounds.setdefault(number, RoundRecord(number))
        if record.outcome is Outcome.PENDING:
            # nobody sends a transaction when a deadline passes
            record.outcome = contract.get_phase(run, number, at=view.now)[1]
    for record in rounds.values():
        if record.manifest_digest:
            try:
                record.manifest = read_manifest(store, record.manifest_digest)
            except (StoreError, OpeningError):
                record.manifest = None
    return [rounds[number] for number in sorted(rounds)]


def count(rounds: Sequence[RoundRecord]) -> Tally:
    """Add the rounds up."""
    outcomes = Counter(record.outcome for record in rounds)
    left_out: dict[int, Counter[str]] = {}
    for record in rounds:
        if record.outcome is Outcome.FINALIZED:
            for site in sorted(record.members):
                if reason := record.explain_absence(site):
                    left_out.setdefault(site, Counter())[reason] += 1
    return Tally(outcomes[Outcome.FINALIZED], outcomes[Outcome.REJECTED], outcomes[Outcome.EXPIRED],
                 {site: dict(reasons) for site, reasons in sorted(left_out.items())})


def _apply(rounds: dict[int, RoundRecord], event: Event) -> None:
    values = event.values
    if event.name == "RoundOpened":
        members, expected = mask_to_sites(values["members"]), mask_to_sites(values["expected"])
        rounds[values["round"]] = RoundRecord(values["round"], members, expected)
        return
    record = rounds.setdefault(values["round"], RoundRecord(values["round"]))
    if event.name == "Committed":
        record.committed.add(values["site"])
    elif event.name == "Voted":
        record.scores[values["site"]] = values["scoreBps"]
    elif event.name == "RoundFinalized":
        record.outcome, record.checkpoint, record.manifest_digest = (
            Outcome.FINALIZED, values["checkpoint"], values["manifest"])
    elif event.name == "RoundRejected":
        record.outcome = Outcome.REJECTED
    elif event.name == "RoundExpired":
        record.outcome = Outcome.EXPIRED
