"""The contract's rules once more, in plain Python: an oracle for the contract, and a replay of it for an auditor.

Written from the specification (ISwarm.sol), not from the source: sets instead of masks, nothing packed, history kept. A
`Replica` is told every call with its sender and block time; it answers with the error that the contract must answer
with, or changes as the contract must change. A refused call changes nothing. Addresses are hex strings in any case,
digests hex without 0x, times seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from eth_hash.auto import keccak

from swarmchain import errors
from swarmchain.protocol import BPS, SITES_MAX, Change, Outcome, Phase, RunView, Terms

PROPOSAL_WINDOW_S = 30 * 86_400
WINDOW_MAX_S = 90 * 86_400
COUNT_MAX = 255
ZERO = "0" * 64
ZERO_ADDRESS = "0x" + "0" * 40


def compute_quorum(members: int, quorum_bps: int) -> int:
    """Accepting members that a round needs: a majority, or the run's higher share, rounded up."""
    return max(members // 2 + 1, -(-members * quorum_bps // BPS))


def compute_head(head: str, round_id: int, checkpoint: str, manifest: str) -> str:
    """The chained head after one more finalized round."""
    return keccak(bytes.fromhex(head + f"{round_id:064x}" + checkpoint + manifest)).hex()


@dataclass
class Proposal:
    """A change that was proposed. `subject` is an address, `data` a word as hex."""

    kind: Change
    subject: str
    data: str
    deadline: int
    approvals: set[int]
    executed: bool = False


@dataclass(frozen=True)
class Vote:
    """One member's vote as it stands."""

    accept: bool
    checkpoint: str
    manifest: str


@dataclass
class Round:
    """One round with all that happened in it."""

    members: frozenset[int]
    expected: frozenset[int]
    quorum: int
    commit_end: int
    terms: Terms
    commitments: dict[int, str] = field(default_factory=dict)
    votes: dict[int, Vote] = field(default_factory=dict)
    decided: Outcome = Outcome.PENDING

    @property
    def vote_deadline(self) -> int:
        """When the Vote phase ends."""
        return self.commit_end + self.terms.vote_window_s

    def phase(self, now: int) -> tuple[Phase, Outcome]:
        """Phase and outcome while this is the newest round."""
        if self.decided is not Outcome.PENDING:
            return Phase.CLOSED, self.decided
        if now < self.commit_end:
            return Phase.COMMIT, Outcome.PENDING
        if len(self.commitments) >= self.terms.sites_min and now < self.vote_deadline:
            return Phase.VOTE, Outcome.PENDING
        return Phase.CLOSED, Outcome.EXPIRED

    def accepting(self, checkpoint: str, manifest: str) -> frozenset[int]:
        """Members whose vote accepts this result."""
        return frozenset(site for site, vote in self.votes.items() if vote == Vote(True, checkpoint, manifest))

    @property
    def rejecting(self) -> frozenset[int]:
        """Members whose vote does not accept."""
        return frozenset(site for site, vote in self.votes.items() if not vote.accept)


@dataclass
class Run:
    """One run with all its rounds; `rounds[n - 1]` is round n."""

    spec: str
    terms: Terms
    proposer: int
    head: str
    joined: set[int] = field(default_factory=set)
    announced: set[int] = field(default_factory=set)
    rounds: list[Round] = field(default_factory=list)
    finalized_round: int = 0
    checkpoint: str = ZERO
    manifest: str = ZERO

    def phase(self, round_id: int, now: int) -> tuple[Phase, Outcome]:
        """Phase and outcome of any round."""
        if not 1 <= round_id <= len(self.rounds):
            return Phase.NONE, Outcome.PENDING
        if round_id == len(self.rounds):
            return self.rounds[-1].phase(now)
        return Phase.CLOSED, self.rounds[round_id - 1].decided or Outcome.EXPIRED

    def failures(self) -> tuple[int, int]:
        """Rounds before the newest and since the last finalized one that were not finalized, and were rejected."""
        outcomes: list[Outcome] = []
        for round_ in self.rounds[:-1]:
            outcomes = [] if round_.decided is Outcome.FINALIZED else [*outcomes, round_.decided]
        return min(len(outcomes), COUNT_MAX), min(outcomes.count(Outcome.REJECTED), COUNT_MAX)


class Replica:
    """A consortium as its contract must hold it after the calls it was told.

    Parameters
    ----------
    founders
        Addresses of the founding sites.
    """

    def __init__(self, founders: Sequence[str]) -> None:
        self.keys: list[str] = [key.lower() for key in founders]
        self.index: dict[str, int] = {key: site for site, key in enumerate(self.keys)}
        self.active: set[int] = set(range(len(self.keys)))
        self.successor = ""
        self.proposals: list[Proposal] = []
        self.runs: list[Run] = []

    # -- membership

    def propose(self, caller: str, kind: Change, subject: str, data: str, *, now: int, has_code: bool = True) -> int:
        """Propose a change; `has_code` says whether a contract lies at `subject`."""
        site = self._active_site(caller)
        subject, data = subject.lower(), data.lower()
        self._require_possible(kind, subject, data, has_code=has_code)
        self.proposals.append(Proposal(kind, subject, data, now + PROPOSAL_WINDOW_S, {site}))
        self._execute_if_agreed(self.proposals[-1])
        return len(self.proposals)

    def approve(self, caller: str, number: int, *, now: int) -> None:
        """Approve a proposal."""
        site = self._active_site(caller)
        if not 1 <= number <= len(self.proposals):
            raise errors.UnknownProposal(proposal=number, proposals=len(self.proposals))
        proposal = self.proposals[number - 1]
        if proposal.executed:
            raise errors.ProposalExecuted(proposal=number, kind=proposal.kind.name)
        if now >= proposal.deadline:
            raise errors.ProposalExpired(proposal=number, deadline=proposal.deadline)
        before = set(proposal.approvals)
        proposal.approvals.add(site)
        try:
            self._execute_if_agreed(proposal)
        except errors.ContractError:
            proposal.approvals = before
            raise

    def get_site(self, address: str) -> int:
        """Index of the site that signs with `address`."""
        if address.lower() not in self.index:
            raise errors.NotSite(caller=address)
        return self.index[address.lower()]

    def _active_site(self, caller: str) -> int:
        site = self.get_site(caller)
        if self.successor:
            raise errors.Retired(successor=self.successor)
        return site

    def _require_possible(self, kind: Change, subject: str, data: str, *, has_code: bool) -> None:
        if kind is Change.RETIRE:
            if not has_code:
                raise errors.InvalidSuccessor(successor=subject)
        elif kind is Change.ADMIT:
            if len(self.keys) == SITES_MAX:
                raise errors.TooManySites(sites=SITES_MAX + 1, sitesMax=SITES_MAX)
            self._require_new(subject, data)
        elif kind is Change.ROTATE_KEY:
            site, new = self.get_site(subject), "0x" + data[24:]
            if int(data, 16) >> 160:
                raise errors.InvalidSite(site=site, key=new)
            self._require_new(new, "-")
        else:
            self.get_site(subject)
            if len(self.active) == 1 or any(self._is_stretched(run) for run in self.runs):
                raise errors.SitesNeeded(remaining=len(self.active) - 1, needed=len(self.active))

    def _is_stretched(self, run: Run) -> bool:
        """Whether a run that enough sites have joined needs every site there is."""
        return len(run.joined) >= run.terms.sites_min == len(self.active)

    def _require_new(self, key: str, name: str) -> None:
        if key == ZERO_ADDRESS or not name.strip("0"):
            raise errors.InvalidSite(site=len(self.keys), key=key)
        if key in self.index:
            raise errors.SiteExists(key=key, site=self.index[key])

    def _execute_if_agreed(self, proposal: Proposal) -> None:
        if len(proposal.approvals & self.active) * 2 <= len(self.active):
            return
        self._require_possible(proposal.kind, proposal.subject, proposal.data, has_code=True)
        proposal.executed = True
        if proposal.kind is Change.ADMIT:
            self.index[proposal.subject] = len(self.keys)
            self.active.add(len(self.keys))
            self.keys.append(proposal.subject)
        elif proposal.kind is Change.RETIRE:
            self.successor = proposal.subject
            self.active.clear()
        else:
            site = self.index.pop(proposal.subject)
            if proposal.kind is Change.REMOVE:
                self.active.discard(site)
            else:
                self.keys[site] = "0x" + proposal.data[24:]
                self.index[self.keys[site]] = site

    # -- runs

    def propose_run(self, caller: str, spec: str, terms: Terms) -> int:
        """Propose a run."""
        site = self._active_site(caller)
        number = len(self.runs) + 1
        if spec == ZERO:
            raise errors.EmptyDigest(run=number, round=0)
        for window in (terms.commit_window_s, terms.vote_window_s):
            if not 1 <= window <= WINDOW_MAX_S:
                raise errors.WindowOutOfRange(windowS=window, windowMaxS=WINDOW_MAX_S)
        if not 1 <= terms.sites_min <= len(self.active):
            raise errors.SitesMinOutOfRange(sitesMin=terms.sites_min, sites=len(self.active))
        if terms.quorum_bps > BPS:
            raise errors.QuorumOutOfRange(quorumBps=terms.quorum_bps, quorumBpsMax=BPS)
        self.runs.append(Run(spec, terms, site, head=spec))
        return number

    def join_run(self, caller: str, number: int) -> None:
        """Opt in."""
        site, run = self._active_site(caller), self._run(number)
        if site in run.joined:
            raise errors.AlreadyJoined(run=number, site=site)
        run.joined = self._present(run) | {site}
        run.announced.add(site)

    def leave_run(self, caller: str, number: int) -> None:
        """Withdraw."""
        site, run = self._joined(caller, number)
        run.joined = self._present(run) - {site}

    def announce(self, caller: str, number: int) -> None:
        """Ask to be waited for."""
        site, run = self._joined(caller, number)
        run.announced.add(site)

    def _run(self, number: int) -> Run:
        if not 1 <= number <= len(self.runs):
            raise errors.UnknownRun(run=number, runs=len(self.runs))
        return self.runs[number - 1]

    def _joined(self, caller: str, number: int) -> tuple[int, Run]:
        site, run = self.get_site(caller), self._run(number)
        if site not in run.joined:
            raise errors.NotJoined(run=number, site=site)
        return site, run

    def _present(self, run: Run) -> set[int]:
        """Who has joined and was not removed since; after the retirement, who had joined."""
        return set(run.joined) if self.successor else run.joined & self.active

    # -- rounds

    def open_round(self, caller: str, number: int, *, now: int) -> int:
        """Open the next round."""
        _, run = self._joined(caller, number)
        phase, _ = run.phase(len(run.rounds), now)
        if phase in (Phase.COMMIT, Phase.VOTE):
            raise errors.WrongPhase(phase=phase.name, needed=Phase.CLOSED.name)
        if self.successor:
            raise errors.Retired(successor=self.successor)
        members = frozenset(self._present(run))
        if len(members) < run.terms.sites_min:
            raise errors.TooFewSites(joined=len(members), sitesMin=run.terms.sites_min)
        came = set(run.rounds[-1].commitments) if run.rounds else set()
        expected = members & (came | run.announced) or members
        if run.rounds and run.rounds[-1].decided is Outcome.PENDING:
            run.rounds[-1].decided = Outcome.EXPIRED
        quorum = compute_quorum(len(members), run.terms.quorum_bps)
        run.rounds.append(Round(members, expected, quorum, now + run.terms.commit_window_s, run.terms))
        run.announced = set()
        return len(run.rounds)

    def commit(self, caller: str, number: int, round_id: int, commitment: str, *, now: int) -> None:
        """Commit to a contribution."""
        site, _, round_ = self._newest(caller, number, round_id)
        phase, _ = round_.phase(now)
        if phase is not Phase.COMMIT:
            raise errors.WrongPhase(phase=phase.name, needed=Phase.COMMIT.name)
        if commitment == ZERO:
            raise errors.EmptyDigest(run=number, round=round_id)
        self._require_member(round_, round_id, site)
        if site in round_.commitments:
            raise errors.AlreadyCommitted(round=round_id, site=site)
        round_.commitments[site] = commitment
        if len(round_.commitments) >= round_.terms.sites_min and round_.expected <= set(round_.commitments):
            round_.commit_end = now

    def vote(self, caller: str, number: int, round_id: int, vote: Vote, *, score_bps: int, now: int) -> None:
        """Vote, or move the vote."""
        site, run, round_ = self._newest(caller, number, round_id)
        self._require_member(round_, round_id, site)
        phase, _ = round_.phase(now)
        late = round_.decided is not Outcome.PENDING and site not in round_.votes and now < round_.vote_deadline
        if phase is not Phase.VOTE and not late:
            raise errors.WrongPhase(phase=phase.name, needed=Phase.VOTE.name)
        if ZERO in (vote.checkpoint, vote.manifest):
            raise errors.EmptyDigest(run=number, round=round_id)
        if score_bps > BPS:
            raise errors.ScoreOutOfRange(scoreBps=score_bps, scoreBpsMax=BPS)
        round_.votes[site] = vote
        if late:
            return
        if len(round_.accepting(vote.checkpoint, vote.manifest)) >= round_.quorum:
            round_.decided = Outcome.FINALIZED
            run.finalized_round, run.checkpoint, run.manifest = round_id, vote.checkpoint, vote.manifest
            run.head = compute_head(run.head, round_id, vote.checkpoint, vote.manifest)
        elif len(round_.rejecting) + round_.quorum > len(round_.members):
            round_.decided = Outcome.REJECTED

    def _newest(self, caller: str, number: int, round_id: int) -> tuple[int, Run, Round]:
        site, run = self.get_site(caller), self._run(number)
        if round_id == 0 or round_id != len(run.rounds):
            raise errors.WrongRound(round=round_id, current=len(run.rounds))
        return site, run, run.rounds[-1]

    @staticmethod
    def _require_member(round_: Round, round_id: int, site: int) -> None:
        if site not in round_.members:
            raise errors.NotMember(round=round_id, site=site)

    # -- views

    def view_run(self, number: int, *, now: int) -> RunView:
        """The run as the contract must show it."""
        run = self._run(number)
        phase, outcome = run.phase(len(run.rounds), now)
        nobody: frozenset[int] = frozenset()
        newest = run.rounds[-1] if run.rounds else Round(nobody, nobody, 0, 0, Terms(0, 0, 0))
        failures, rejections = run.failures()
        return RunView(
            run=number, spec=run.spec, terms=run.terms, proposer=run.proposer, joined=frozenset(self._present(run)),
            successor=self.successor, round_id=len(run.rounds), phase=phase, outcome=outcome,
            commit_deadline=newest.commit_end, vote_deadline=newest.vote_deadline, quorum=newest.quorum,
            members=newest.members, expected=newest.expected, committed=frozenset(newest.commitments),
            voted=frozenset(newest.votes), rejecting=newest.rejecting, finalized_round=run.finalized_round,
            checkpoint=run.checkpoint, manifest=run.manifest, head=run.head, failures=failures, rejections=rejections,
            commitments=dict(newest.commitments), now=now,
        )
