"""The contract on a real chain, and its rules in plain Python, side by side under random calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from conftest import World, make_signers, make_world
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from swarmchain.chain import encode_name
from swarmchain.devchain import Devchain
from swarmchain.errors import ContractError
from swarmchain.node import load_artifact
from swarmchain.protocol import Change, Terms
from swarmchain.replay import CALLS, CONSEQUENCES, list_consequences, read_history, rebuild
from swarmchain.rules import Replica, Vote

EXAMPLES = int(os.environ.get("SWARMCHAIN_ORACLE_EXAMPLES", "8"))
STEPS = int(os.environ.get("SWARMCHAIN_ORACLE_STEPS", "60"))
SITES = 5
KEYS = make_signers(12)  # the founders' first, then fresh ones and outsiders
DIGESTS = [f"{n:064x}" for n in range(5)]  # the first is empty

anyone = st.integers(0, 7)
site_runs = st.integers(0, 3)
rounds_ago = st.sampled_from([0, 0, 0, 0, 0, 1, -1])


def normalize(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.lower() if isinstance(v, str) else v for k, v in values.items()}


class Machine(RuleBasedStateMachine):
    """Every rule makes one call on both; they must agree on the error, or on all that can be seen afterwards."""

    chain: Devchain

    def __init__(self) -> None:
        super().__init__()
        self.world = make_world(self.chain, SITES)
        self.contract = self.world.contract
        self.replica = Replica([signer.address for signer in KEYS[:SITES]])
        self.now = self.contract.node.read_time() + 10

    @initialize(terms=st.tuples(st.integers(5, 60), st.integers(5, 60), st.integers(1, SITES), st.integers(0, 10_000)))
    def start(self, terms: tuple[int, int, int, int]) -> None:
        """Two runs that all have joined, so that most of the calls that follow mean something."""
        for words in (Terms(*terms), Terms(30, 20, 2)):
            run = self.both(lambda words=words: self.contract.propose_run(KEYS[0], spec=DIGESTS[1], terms=words),
                            lambda words=words: self.replica.propose_run(KEYS[0].address, DIGESTS[1], words))
            for signer in KEYS[:SITES]:
                self.join(KEYS.index(signer), run)

    def both(self, real: Callable[[], Any], oracle: Callable[[], Any]) -> Any:
        """One call on the chain at time `now`, and on the replica."""
        self.now += 1
        self.contract.node.web3.provider.make_request("evm_setNextBlockTimestamp", [self.now])
        expected, found = None, None
        try:
            answer = oracle()
        except ContractError as exc:
            expected = exc
        try:
            told = real()
        except ContractError as exc:
            found = exc
        assert type(found) is type(expected), f"the chain says {found!r}, the rules say {expected!r}"
        if found is not None and expected is not None:
            assert normalize(found.values) == normalize(expected.values), type(found).__name__
            return 0
        return answer if answer is not None else told

    def newest(self, run: int, ago: int) -> int:
        known = 1 <= run <= len(self.replica.runs)
        return max((len(self.replica.runs[run - 1].rounds) if known else 1) - ago, 0)

    # -- time

    @rule(seconds=st.sampled_from([1, 7, 20, 60, 200, 10**5]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(days=st.sampled_from([20, 40, 3650]))
    def stall(self, days: int) -> None:
        self.now += days * 86_400

    # -- membership

    @rule(by=anyone, kind=st.sampled_from([Change.ADMIT, Change.REMOVE, Change.ROTATE_KEY]), subject=anyone,
          other=st.integers(0, 11))
    def propose(self, by: int, kind: Change, subject: int, other: int) -> None:
        data = {Change.ADMIT: encode_name(f"Site {other}").hex(), Change.REMOVE: "0" * 64,
                Change.ROTATE_KEY: KEYS[other].address[2:].rjust(64, "0")}[kind]
        if other == 11:
            data = "0" * 64 if kind is Change.ADMIT else "f" * 64
        address = KEYS[subject].address
        self.both(lambda: self.contract.propose_change(KEYS[by], kind, subject=address, data=data),
                  lambda: self.replica.propose(KEYS[by].address, kind, address, data, now=self.now))

    @precondition(lambda self: self.replica.proposals)
    @rule(by=anyone, back=st.integers(0, 2))
    def approve(self, by: int, back: int) -> None:
        number = max(len(self.replica.proposals) - back, 0)
        self.both(lambda: self.contract.approve_change(KEYS[by], number),
                  lambda: self.replica.approve(KEYS[by].address, number, now=self.now))

    @precondition(lambda self: len(self.replica.runs[0].rounds) > 3)
    @rule(by=anyone, real=st.booleans())
    def retire(self, by: int, real: bool) -> None:
        target = self.contract.address if real else KEYS[0].address
        self.both(lambda: self.contract.propose_change(KEYS[by], Change.RETIRE, subject=target),
                  lambda: self.replica.propose(KEYS[by].address, Change.RETIRE, target, "0" * 64, now=self.now,
                                               has_code=real))

    # -- runs

    @rule(by=anyone, terms=st.tuples(st.sampled_from([0, 9, 2**32 - 1]), st.sampled_from([0, 9]),
                                     st.sampled_from([0, 2, 9]), st.sampled_from([0, 10_001])),
          spec=st.sampled_from(DIGESTS))
    def propose_run(self, by: int, terms: tuple[int, int, int, int], spec: str) -> None:
        self.both(lambda: self.contract.propose_run(KEYS[by], spec=spec, terms=Terms(*terms)),
                  lambda: self.replica.propose_run(KEYS[by].address, spec, Terms(*terms)))

    @rule(by=anyone, run=site_runs)
    def join(self, by: int, run: int) -> None:
        self.both(lambda: self.contract.join_run(KEYS[by], run), lambda: self.replica.join_run(KEYS[by].address, run))

    @rule(by=anyone, run=site_runs)
    def leave(self, by: int, run: int) -> None:
        self.both(lambda: self.contract.leave_run(KEYS[by], run), lambda: self.replica.leave_run(KEYS[by].address, run))

    @rule(by=anyone, run=site_runs)
    def announce(self, by: int, run: int) -> None:
        self.both(lambda: self.contract.announce(KEYS[by], run), lambda: self.replica.announce(KEYS[by].address, run))

    # -- rounds

    @rule(by=anyone, run=site_runs)
    def open(self, by: int, run: int) -> None:
        self.both(lambda: self.contract.open_round(KEYS[by], run),
                  lambda: self.replica.open_round(KEYS[by].address, run, now=self.now))

    @rule(by=anyone, run=site_runs, ago=rounds_ago, commitment=st.sampled_from(DIGESTS))
    def commit(self, by: int, run: int, ago: int, commitment: str) -> None:
        n = self.newest(run, ago)
        self.both(lambda: self.contract.commit(KEYS[by], run, n, commitment),
                  lambda: self.replica.commit(KEYS[by].address, run, n, commitment, now=self.now))

    @rule(by=anyone, run=site_runs, ago=rounds_ago, digests=st.tuples(*[st.sampled_from(DIGESTS[:3])] * 2),
          accept=st.booleans(), score=st.sampled_from([0, 10_000, 10_001]))
    def vote(self, by: int, run: int, ago: int, digests: tuple[str, str], accept: bool, score: int) -> None:
        n, (checkpoint, manifest) = self.newest(run, ago), digests
        self.both(
            lambda: self.contract.vote(KEYS[by], (run, n), checkpoint, manifest, accept=accept, score_bps=score),
            lambda: self.replica.vote(KEYS[by].address, run, n, Vote(accept, checkpoint, manifest), score_bps=score,
                                      now=self.now))

    @rule(run=st.integers(1, 2), coming=st.sets(st.integers(0, SITES - 1), min_size=1),
          votes=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 2), st.booleans()), max_size=9))
    def play(self, run: int, coming: set[int], votes: list[tuple[int, int, bool]]) -> None:
        """A round as it usually goes, so that most examples get beyond the first."""
        self.open(min(coming), run)
        for by in sorted(coming):
            self.commit(by, run, 0, DIGESTS[3])
        self.now += self.replica.runs[run - 1].terms.commit_window_s
        for by, choice, accept in votes:
            self.vote(by, run, 0, (DIGESTS[choice], DIGESTS[2]), accept, 9_000)

    # -- what must be equal

    @invariant()
    def all_that_can_be_seen_is_equal(self) -> None:
        contract, replica = self.contract, self.replica
        assert contract.get_run_count() == len(replica.runs)
        for number, run in enumerate(replica.runs, 1):
            assert contract.view_run(number, at=self.now) == replica.view_run(number, now=self.now)
            for round_id in (1, len(run.rounds) // 2, len(run.rounds), len(run.rounds) + 1):
                assert contract.get_phase(number, round_id, at=self.now) == run.phase(round_id, self.now)
            if run.rounds:
                for choice in (1, 2):
                    pair = (DIGESTS[choice], DIGESTS[2])
                    assert contract.get_accepting(number, *pair) == run.rounds[-1].accepting(*pair)

    @invariant()
    def members_are_equal(self) -> None:
        sites = self.contract.get_sites()
        assert [site.address.lower() for site in sites] == self.replica.keys
        assert {site.site for site in sites if site.active} == self.replica.active
        assert self.contract.get_successor().lower() == self.replica.successor.lower()
        for found, expected in zip(self.contract.get_proposals(), self.replica.proposals, strict=True):
            assert (found.kind, found.subject.lower(), found.data) == (expected.kind, expected.subject, expected.data)
            assert (found.deadline, found.executed) == (expected.deadline, expected.executed)
            assert found.approvals == expected.approvals

    def teardown(self) -> None:
        """The events say it all: whoever has nothing else arrives at the same state."""
        rebuilt = rebuild(self.contract, read_history(self.contract))
        assert rebuilt.__dict__ == self.replica.__dict__
        for name, count in list_consequences(rebuilt).items():
            assert len(self.contract.get_events([name])) == count, name


@pytest.mark.timeout(3600)
def test_contract_and_rules_agree(anvil: Devchain) -> None:
    Machine.chain = anvil
    run_state_machine_as_test(Machine, settings=settings(
        max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # to shrink takes minutes on a chain
        suppress_health_check=list(HealthCheck)))


def test_every_event_is_a_call_or_a_consequence(world: World) -> None:
    abi = load_artifact()["abi"]
    names = {entry["name"] for entry in abi if entry["type"] == "event"}
    assert names == {*CALLS, *CONSEQUENCES, "SealKeySet"}
