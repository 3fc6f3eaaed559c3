"""The table of duties: row by row, over every reachable state of a small round, and as a swarm of agents that die."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmchain.duties import Duty, Memory, decide
from swarmchain.errors import ContractError
from swarmchain.protocol import Outcome, Phase, RunView, Terms
from swarmchain.rules import Replica, Vote
from swarmchain.spec import Limits

ZERO = "0" * 64
ALL = frozenset({0, 1, 2})
LIMITS = Limits(rounds=9, sites_to_start=3)


def make_view(**changes: object) -> RunView:
    values: dict[str, object] = {
        "run": 1, "spec": ZERO, "terms": Terms(100, 50, 2), "proposer": 0, "joined": ALL,
        "successor": "", "round_id": 1, "phase": Phase.COMMIT, "outcome": Outcome.PENDING, "commit_deadline": 100,
        "vote_deadline": 150, "quorum": 2, "members": ALL, "expected": ALL, "committed": frozenset(),
        "voted": frozenset(), "rejecting": frozenset(), "finalized_round": 0, "checkpoint": ZERO, "manifest": ZERO,
        "head": ZERO, "failures": 0, "rejections": 0, "commitments": {}, "now": 10,
    }
    return RunView(**{**values, **changes})  # type: ignore[arg-type]


def out(*sites: int) -> frozenset[tuple[int, str]]:
    return frozenset((site, "withheld") for site in sites)


VOTING = {"phase": Phase.VOTE, "committed": ALL, "commit_deadline": 10}
VOTED = {**VOTING, "voted": frozenset({0})}
CLOSED = {"phase": Phase.CLOSED, "outcome": Outcome.FINALIZED, "committed": ALL, "voted": ALL}
UNVOTED = {**CLOSED, "voted": frozenset({1, 2})}
MISSED = {**CLOSED, "committed": frozenset({1, 2})}
SHOWN = {"published": True}


@pytest.mark.parametrize(
    ("changes", "memory", "duty"),
    [
        ({}, {}, Duty.CONTRIBUTE),
        ({"committed": frozenset({0})}, {}, Duty.WAIT),
        ({"joined": frozenset({1, 2})}, {}, Duty.WAIT),
        ({"members": frozenset({1, 2})}, {}, Duty.WAIT),
        (VOTING, {}, Duty.PUBLISH),
        (VOTING, SHOWN, Duty.WAIT),
        (VOTING, {**SHOWN, "excluded": out()}, Duty.VOTE),
        (VOTING, {**SHOWN, "excluded": out(2)}, Duty.WAIT),
        (VOTING, {**SHOWN, "excluded": out(2), "distrusted": frozenset({2})}, Duty.VOTE),
        ({**VOTING, "now": 41}, {**SHOWN, "excluded": out(2)}, Duty.VOTE),
        ({**VOTING, "now": 41}, {**SHOWN, "excluded": out(1, 2)}, Duty.WAIT),
        (VOTING, {**SHOWN, "excluded": out(), "weighed": out()}, Duty.VOTE),  # its vote was lost
        (VOTED, {**SHOWN, "excluded": out(), "weighed": out(2)}, Duty.VOTE),
        (VOTED, {**SHOWN, "excluded": out(2), "weighed": out()}, Duty.WAIT),
        (VOTED, {**SHOWN, "excluded": out(2), "weighed": frozenset({(2, "blob altered")})}, Duty.VOTE),
        (VOTED, {**SHOWN, "excluded": out(), "weighed": out()}, Duty.WAIT),
        (VOTED, {**SHOWN, "excluded": out()}, Duty.WAIT),  # voted, and the journal is gone
        (UNVOTED, SHOWN, Duty.VOTE),
        ({**UNVOTED, "now": 151}, SHOWN, Duty.VERIFY),
        (UNVOTED, {**SHOWN, "weighed": out(2), "voted_manifest": "ee" * 32}, Duty.VERIFY),
        (CLOSED, SHOWN, Duty.VERIFY),
        (CLOSED, {**SHOWN, "voted_manifest": ZERO}, Duty.WAIT),
        (CLOSED, {"recomputed": True, "quiet_s": 0.0}, Duty.WAIT),
        (CLOSED, {"recomputed": True, "quiet_s": 4.0}, Duty.OPEN),
        (MISSED, {"recomputed": True}, Duty.ANNOUNCE),
        (MISSED, {"recomputed": True, "is_too_slow": True}, Duty.WAIT),
        ({**MISSED, "members": frozenset({1, 2})}, {}, Duty.WAIT),
        ({**CLOSED, "round_id": 9}, {"recomputed": True}, Duty.DONE),
        ({"phase": Phase.CLOSED, "outcome": Outcome.EXPIRED, "failures": 4}, {}, Duty.DONE),
        ({"phase": Phase.NONE, "round_id": 0, "joined": frozenset({0, 1})}, {"quiet_s": 99.0}, Duty.WAIT),
        ({"phase": Phase.NONE, "round_id": 0}, {}, Duty.OPEN),
    ],
)
def test_duty_table(changes: dict[str, object], memory: dict[str, object], duty: Duty) -> None:
    assert decide(make_view(**changes), LIMITS, Memory(**memory), site=0) is duty  # type: ignore[arg-type]


def test_statistics_end_with_their_first_checkpoint() -> None:
    view = make_view(**CLOSED, round_id=1, finalized_round=1)
    limits = Limits(rounds=9, sites_to_start=3, one_checkpoint=True)
    assert decide(view, limits, Memory(recomputed=True), site=0) is Duty.DONE


# -- every state


def subsets(sites: frozenset[int]) -> Iterator[frozenset[int]]:
    return (frozenset(c) for n in range(len(sites) + 1) for c in itertools.combinations(sorted(sites), n))


def list_views() -> Iterator[RunView]:
    """Every round of three sites, by phase, committed, voted, outcome and time."""
    yield make_view(phase=Phase.NONE, round_id=0, members=frozenset(), commit_deadline=0, vote_deadline=0)
    for committed in subsets(ALL):
        if committed != ALL:
            yield make_view(committed=committed)
        for voted, now in itertools.product(subsets(ALL), (10, 45, 200)):
            changes: dict[str, object] = {"committed": committed, "voted": voted, "commit_deadline": 10, "now": now}
            if len(committed) >= 2 and now < 150:
                yield make_view(**changes, phase=Phase.VOTE)
            for outcome in (Outcome.FINALIZED, Outcome.REJECTED, Outcome.EXPIRED):
                finalized = 1 if outcome is Outcome.FINALIZED else 0
                yield make_view(**changes, phase=Phase.CLOSED, outcome=outcome, finalized_round=finalized)


def list_memories(view: RunView) -> Iterator[Memory]:
    exclusions = [None, *(out(*sites) for sites in subsets(view.committed))]
    flags = itertools.product((False, True), repeat=4)
    for published, recomputed, announced, slow in flags:
        for excluded, weighed in itertools.product(exclusions, exclusions):
            for manifest in (None, ZERO, "ee" * 32):
                yield Memory(published=published, recomputed=recomputed, announced=announced, is_too_slow=slow,
                             excluded=excluded, weighed=weighed, voted_manifest=manifest, quiet_s=100.0)


def do(duty: Duty, view: RunView, memory: Memory) -> tuple[RunView, Memory]:
    """What a duty of site 0 leaves behind, as the chain and the site's memory then show it."""
    me = frozenset({0})
    if duty is Duty.CONTRIBUTE:
        return replace(view, committed=view.committed | me), memory
    if duty is Duty.PUBLISH:
        return view, replace(memory, published=True)
    if duty is Duty.VOTE:
        return replace(view, voted=view.voted | me), replace(
            memory, weighed=memory.excluded or frozenset(), voted_manifest="dd" * 32)
    if duty is Duty.VERIFY:
        return view, replace(memory, recomputed=True)
    if duty is Duty.ANNOUNCE:
        return view, replace(memory, announced=True)
    assert duty is Duty.OPEN
    return make_view(round_id=view.round_id + 1), Memory()


def test_every_state_has_one_duty_and_doing_it_ends_it() -> None:
    seen = set()
    for view in list_views():
        for memory in list_memories(view):
            duty = decide(view, LIMITS, memory, site=0)
            seen.add(duty)
            chain = [duty]
            while chain[-1] not in (Duty.WAIT, Duty.DONE, Duty.OPEN):
                view_after, memory_after = do(chain[-1], view, memory)
                chain.append(decide(view_after, LIMITS, memory_after, site=0))
                assert chain[-1] not in chain[:-1], (chain, view, memory)
                view, memory = view_after, memory_after
    assert seen == set(Duty) - {Duty.DONE} | {Duty.WAIT}


def test_no_state_promises_twice_or_votes_for_too_little() -> None:
    for view in list_views():
        for memory in list_memories(view):
            duty = decide(view, LIMITS, memory, site=0)
            if duty is Duty.CONTRIBUTE:
                assert view.phase is Phase.COMMIT and 0 not in view.committed
            if duty is Duty.VOTE and view.phase is Phase.VOTE:
                assert memory.excluded is not None
                assert len(view.committed) - len(memory.excluded) >= view.terms.sites_min or 0 in view.voted
            if duty is Duty.ANNOUNCE:
                assert view.phase is Phase.CLOSED and 0 not in view.committed


# -- a swarm of tables


@dataclass
class Simulated:
    """One site: its memory dies with it, its journal does not."""

    site: int
    memory: Memory = field(default_factory=Memory)
    round_id: int = -1
    ballots: dict[int, tuple[str, frozenset[tuple[int, str]]]] = field(default_factory=dict)
    closed_at: int | None = None
    done: bool = False


class Swarm:
    """Sites that follow the table over the contract's rules; the store is a set of disclosed commitments."""

    def __init__(self, sites: int, rounds: int, dice: random.Random) -> None:
        self.keys = [f"0x{i + 1:040x}" for i in range(sites)]
        self.chain = Replica(self.keys)
        self.dice = dice
        self.now = 1_000
        self.limits = Limits(rounds=rounds, sites_to_start=sites, failures_max=200, opening_timeout_s=30)
        self.chain.propose_run(self.keys[0], "ab" * 32, Terms(100, 100, 2))
        for key in self.keys:
            self.chain.join_run(key, 1)
        self.sites = [Simulated(i) for i in range(sites)]
        self.disclosed: set[tuple[int, int]] = set()

    def step(self, one: Simulated) -> None:
        view = self.chain.view_run(1, now=self.now)
        if one.round_id != view.round_id:
            ballot = one.ballots.get(view.round_id)
            one.memory, one.round_id = Memory(stagger_s=2.0), view.round_id
            if ballot is not None:
                one.memory = replace(one.memory, voted_manifest=ballot[0], weighed=ballot[1])
        if view.phase in (Phase.CLOSED, Phase.NONE):
            one.closed_at = self.now if one.closed_at is None else one.closed_at
            one.memory = replace(one.memory, quiet_s=float(self.now - one.closed_at))
        else:
            one.closed_at = None
        if view.phase is Phase.VOTE and (one.memory.published or one.site not in view.committed):
            one.memory = replace(one.memory, excluded=self.look_into_store(view))
        duty = decide(view, self.limits, one.memory, site=one.site)
        with contextlib.suppress(ContractError):  # another site was faster
            self.do(duty, one, view)

    def look_into_store(self, view: RunView) -> frozenset[tuple[int, str]]:
        return out(*(s for s in view.committed if (view.round_id, s) not in self.disclosed))

    def do(self, duty: Duty, one: Simulated, view: RunView) -> None:
        key, die = self.keys[one.site], self.dice
        if duty is Duty.CONTRIBUTE:
            self.chain.commit(key, 1, view.round_id, f"{view.round_id:032x}{one.site + 1:032x}", now=self.now)
        elif duty is Duty.PUBLISH:
            self.disclosed.add((view.round_id, one.site))
            one.memory = replace(one.memory, published=True)
        elif duty is Duty.VOTE:
            excluded = self.look_into_store(view)
            manifest = f"{view.round_id:032x}{hash(excluded) & (1 << 96) - 1:032x}"
            one.memory = replace(one.memory, excluded=excluded, weighed=excluded, voted_manifest=manifest)
            one.ballots[view.round_id] = (manifest, excluded)
            if die.random() > 0.1:  # else it dies with the ballot written down and the vote not sent
                self.chain.vote(key, 1, view.round_id, Vote(True, "cc" * 32, manifest), score_bps=0, now=self.now)
            else:
                self.kill(one)
        elif duty is Duty.VERIFY:
            one.memory = replace(one.memory, recomputed=True)
        elif duty is Duty.ANNOUNCE:
            self.chain.announce(key, 1)
            one.memory = replace(one.memory, announced=True)
        elif duty is Duty.OPEN:
            self.chain.open_round(key, 1, now=self.now)
        elif duty is Duty.DONE:
            one.done = True

    def kill(self, one: Simulated) -> None:
        self.sites[one.site] = Simulated(one.site, ballots=one.ballots)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 6), st.sampled_from([0.0, 0.05, 0.3]))
def test_swarm_of_agents_that_die_always_ends(seed: int, sites: int, mortality: float) -> None:
    """Whoever acts when, dies when, and however time jumps: every run ends, and every site sees the same end."""
    dice = random.Random(seed)
    swarm = Swarm(sites, 4, dice)
    for _ in range(20_000):
        if all(one.done for one in swarm.sites):
            break
        one = swarm.sites[dice.randrange(sites)]
        if dice.random() < mortality:
            swarm.kill(one)
        else:
            swarm.step(one)
        # mostly seconds, at times a chain that stalled for an hour: several deadlines are past at once
        swarm.now += 3_600 if dice.random() < 0.005 else dice.choice([0, 0, 1])
    view = swarm.chain.view_run(1, now=swarm.now)
    assert all(one.done for one in swarm.sites), view
    assert view.round_id == 4
