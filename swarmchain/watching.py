"""A run as anyone may watch it: from the chain, and the store for its spec, without a key and without the agents.

Events are read once and remembered, so that a look costs a few questions however long the run has lasted.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field

from swarmchain.chain import Event, SwarmContract
from swarmchain.duties import is_over
from swarmchain.errors import StoreError, SwarmError
from swarmchain.protocol import BPS, Outcome, Phase, RunView
from swarmchain.spec import Spec
from swarmchain.store import Store, read_spec

EVENTS = ("RoundOpened", "Committed", "Voted", "RoundFinalized", "RoundRejected", "RoundExpired")


@dataclass(frozen=True)
class Snapshot:
    """One look. Times in seconds; `missing` are the sites that the open phase waits for.

    `scores` holds the newest vote's macro-F1 of each site that ever voted, `gas` what the newest round has cost so far.
    `eta_s` is the median time between openings times the rounds left, None until two rounds were opened.
    """

    run: int
    name: str
    task: str
    round: int
    rounds: int | None
    phase: str
    outcome: str
    seconds_left: int | None
    committed: tuple[str, ...]
    voted: tuple[str, ...]
    missing: tuple[str, ...]
    joined: tuple[str, ...]
    scores: dict[str, float]
    finalized_round: int
    checkpoint: str | None
    failures_in_a_row: int
    gas: int
    eta_s: int | None
    is_over: bool

    @property
    def state(self) -> tuple[object, ...]:
        """All that counts as a change: everything but what time alone moves."""
        return (self.round, self.phase, self.outcome, self.committed, self.voted, self.joined, self.finalized_round,
                self.is_over)


@dataclass
class RunWatch:
    """Looks at one run, again and again. Raises `UnknownRun` at the first look if there is none."""

    contract: SwarmContract
    store: Store | None
    run: int
    _next_block: int | None = None
    _opened: dict[int, int] = field(default_factory=dict)
    _scores: dict[int, int] = field(default_factory=dict)
    _transactions: dict[int, set[str]] = field(default_factory=dict)
    _gas: dict[str, int] = field(default_factory=dict)
    _spec: Spec | None = None

    def look(self) -> Snapshot:
        """The run as it is now. Raises `Unreachable` if the chain does not answer; the store may be away."""
        view = self.contract.view_run(self.run)
        self._read_events()
        spec = self._read_spec(view)
        names = {record.site: record.name for record in self.contract.get_sites()}

        def name(sites: frozenset[int] | set[int]) -> tuple[str, ...]:
            return tuple(names[i] for i in sorted(sites))

        awaited = {Phase.COMMIT: view.expected - view.committed, Phase.VOTE: view.members - view.voted}
        deadline = {Phase.COMMIT: view.commit_deadline, Phase.VOTE: view.vote_deadline}.get(view.phase)
        over = is_over(view, spec.limits) if spec else bool(view.successor)
        return Snapshot(
            run=self.run, name=spec.name if spec else "", task=spec.task if spec else "", round=view.round_id,
            rounds=spec.limits.rounds if spec else None, phase=view.phase.name, outcome=view.outcome.name,
            seconds_left=None if deadline is None else max(0, deadline - view.now), committed=name(view.committed),
            voted=name(view.voted), missing=name(awaited.get(view.phase, frozenset())), joined=name(view.joined),
            scores={names[i]: score / BPS for i, score in sorted(self._scores.items())},
            finalized_round=view.finalized_round, checkpoint=view.checkpoint if view.finalized_round else None,
            failures_in_a_row=view.failures_in_a_row, gas=self._count_gas(view.round_id),
            eta_s=None if over else self._compute_eta(view, spec), is_over=over)

    def _read_events(self) -> None:
        head = self.contract.node.read_head()
        if self._next_block is not None and head < self._next_block:
            return
        for event in self.contract.get_events(EVENTS, run=self.run, from_block=self._next_block, to_block=head):
            self._take(event)
        self._next_block = head + 1

    def _take(self, event: Event) -> None:
        number = event.values["round"]
        self._transactions.setdefault(number, set()).add(event.transaction)
        if event.name == "RoundOpened":
            self._opened[number] = self.contract.node.read_block_time(event.block)
        elif event.name == "Voted":
            self._scores[event.values["site"]] = event.values["scoreBps"]

    def _read_spec(self, view: RunView) -> Spec | None:
        if self._spec is None and self.store is not None:
            try:
                self._spec = read_spec(self.store, view.spec)
            except (StoreError, SwarmError):
                return None  # names and rounds are a comfort: the chain alone says how the run stands
        return self._spec

    def _count_gas(self, round_id: int) -> int:
        for transaction in self._transactions.get(round_id, set()):
            if transaction not in self._gas:
                self._gas[transaction] = self.contract.get_gas(transaction)
        return sum(self._gas[transaction] for transaction in self._transactions.get(round_id, set()))

    def _compute_eta(self, view: RunView, spec: Spec | None) -> int | None:
        times = [self._opened[number] for number in sorted(self._opened)]
        if spec is None or len(times) < 2:
            return None
        pace = statistics.median(b - a for a, b in itertools.pairwise(times))
        left = spec.limits.rounds - view.round_id + (view.phase is not Phase.CLOSED)
        return round(pace * left)


def describe_snapshot(seen: Snapshot) -> str:
    """One look as a line for a person."""
    from swarmchain.describe import describe_duration

    where = f"round {seen.round}" + (f"/{seen.rounds}" if seen.rounds else "")
    parts = [f"{where} {seen.phase}" if seen.round else f"waits for sites: {', '.join(seen.joined) or 'none'} joined"]
    if seen.seconds_left is not None:
        parts.append(f"{describe_duration(seen.seconds_left)} left")
    if seen.round:
        parts.append(f"committed {', '.join(seen.committed) or '–'}")
        parts.append(f"voted {', '.join(seen.voted) or '–'}")
    if seen.missing:
        parts.append(f"missing {', '.join(seen.missing)}")
    if seen.phase == Phase.CLOSED.name and seen.outcome != Outcome.PENDING.name:
        parts.append(seen.outcome.lower())
    if any(seen.scores.values()):
        parts.append("scores " + ", ".join(f"{name} {score:.2f}" for name, score in seen.scores.items()))
    if seen.gas:
        parts.append(f"gas {seen.gas:,}")
    if seen.eta_s is not None:
        parts.append(f"about {describe_duration(seen.eta_s)} to go")
    if seen.is_over:
        parts.append(f"over; checkpoint {seen.checkpoint or 'none'}")
    return f"run {seen.run}  " + "; ".join(parts)
