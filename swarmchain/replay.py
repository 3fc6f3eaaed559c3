"""All state of a contract rebuilt from its events alone: the events become calls, and a `Replica` is told them.

So an outsider need not believe the contract's answers: what it shows must follow, by the rules, from what was signed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swarmchain.chain import Event, SwarmContract
from swarmchain.errors import ContractError, ReplayError
from swarmchain.protocol import Change, Terms
from swarmchain.rules import Replica, Vote

CALLS = ("ChangeProposed", "ChangeApproved", "RunProposed", "RunJoined", "RunLeft", "Announced", "RoundOpened",
         "Committed", "Voted")
# what follows from the calls, and must be said by the contract all the same
CONSEQUENCES = ("SiteAdmitted", "SiteRemoved", "KeyRotated", "ConsortiumRetired", "RoundFinalized", "RoundRejected",
                "RoundExpired")


def read_history(contract: SwarmContract, *, to_block: int | None = None) -> list[Event]:
    """All events that say something of members, runs and rounds, in the chain's order."""
    return contract.get_events((*CONSEQUENCES, *CALLS), to_block=to_block)


def rebuild(contract: SwarmContract, events: Sequence[Event]) -> Replica:
    """A replica of the contract from nothing but its events and their blocks' times.

    Raises
    ------
    ReplayError
        If an event is against the rules, or one that must have followed is missing.
    """
    admitted = [e for e in events if e.name == "SiteAdmitted"]
    if not admitted:
        raise ReplayError("the node shows no event of this contract", hint="ask a node that keeps the whole history")
    replica = Replica([e.values["key"] for e in admitted if e.block == admitted[0].block])
    times: dict[int, int] = {}
    for event in events:
        if event.name in CONSEQUENCES:
            continue
        if event.block not in times:
            times[event.block] = contract.node.read_block_time(event.block)
        try:
            tell(replica, event, now=times[event.block])
        except (ContractError, IndexError) as exc:
            raise ReplayError(f"{event.name} in block {event.block} is against the rules: {exc}",
                              hint="does the node keep the whole history?") from exc
    found = Counter(event.name for event in events)
    for name, count in list_consequences(replica).items():
        if found[name] != count:
            raise ReplayError(f"the node shows {found[name]} events {name} where the calls give {count}",
                              hint="does the node keep the whole history?")
    return replica


def tell(replica: Replica, event: Event, *, now: int) -> None:
    """Repeat the call that an event speaks of. Raises the contract's error if the rules forbid it."""
    v = event.values
    caller = replica.keys[v.get("site", v.get("proposer", v.get("opener", 0)))]
    tellers: Mapping[str, Callable[[], Any]] = {
        "ChangeProposed": lambda: replica.propose(caller, Change(v["kind"]), v["subject"], v["data"], now=now),
        "ChangeApproved": lambda: replica.approve(caller, v["proposal"], now=now),
        "RunProposed": lambda: replica.propose_run(caller, v["spec"], to_terms(v["terms"])),
        "RunJoined": lambda: replica.join_run(caller, v["run"]),
        "RunLeft": lambda: replica.leave_run(caller, v["run"]),
        "Announced": lambda: replica.announce(caller, v["run"]),
        "RoundOpened": lambda: replica.open_round(caller, v["run"], now=now),
        "Committed": lambda: replica.commit(caller, v["run"], v["round"], v["commitment"], now=now),
        "Voted": lambda: replica.vote(caller, v["run"], v["round"], Vote(v["accept"], v["checkpoint"], v["manifest"]),
                                      score_bps=v["scoreBps"], now=now),
    }
    tellers[event.name]()


def to_terms(words: Mapping[str, int] | Sequence[int]) -> Terms:
    """A run's terms as an event holds them."""
    return Terms(*(words.values() if isinstance(words, Mapping) else words))


def list_consequences(replica: Replica) -> dict[str, int]:
    """How many of each event must have followed from the calls that the replica was told."""
    done = [p for p in replica.proposals if p.executed]
    past = [r for run in replica.runs for r in run.rounds]
    return {
        "SiteAdmitted": len(replica.keys),
        "SiteRemoved": sum(p.kind is Change.REMOVE for p in done),
        "KeyRotated": sum(p.kind is Change.ROTATE_KEY for p in done),
        "ConsortiumRetired": sum(p.kind is Change.RETIRE for p in done),
        "RoundFinalized": sum(r.decided.name == "FINALIZED" for r in past),
        "RoundRejected": sum(r.decided.name == "REJECTED" for r in past),
        "RoundExpired": sum(r.decided.name == "EXPIRED" for r in past),
    }
