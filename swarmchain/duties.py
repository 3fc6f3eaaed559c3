"""The round as the chain shows it, and what this site remembers → the one next duty. A pure table.

phase          what is so                                             duty
------------------------------------------------------------------------------------------------
any            not joined                                             WAIT
COMMIT         member, not committed                                  CONTRIBUTE
VOTE           committed, opening not disclosed                       PUBLISH
VOTE           not voted, and all awaited openings there or time up   VOTE
VOTE           voted, and more contributions can be counted now       VOTE
CLOSED         finalized, otherwise than voted here                   VOTE (counts until the deadline) or VERIFY
CLOSED         this site missed the round, more will follow           ANNOUNCE
NONE, CLOSED   the run is over                                        DONE
NONE, CLOSED   this site's turn                                       OPEN
otherwise                                                             WAIT
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from swarmchain.protocol import Outcome, Phase, RunView
from swarmchain.spec import Limits


class Duty(Enum):
    """What an agent does next."""

    WAIT = "wait"
    OPEN = "open"
    CONTRIBUTE = "contribute"
    PUBLISH = "publish"
    VOTE = "vote"
    VERIFY = "verify"
    ANNOUNCE = "announce"
    DONE = "done"


@dataclass(frozen=True)
class Memory:
    """What a site knows beside the chain, about the newest round.

    `available` are sites whose openings lie in the store; `withheld` those that did not open last time and are not
    waited for; `weighed` counts the openings that were there when this site last computed the merge, None before it, so
    that openings of no use are looked at once only; `voted_manifest` is what it then voted for, and `recomputed` says
    that it recomputed what others accepted instead; `quiet_s` is how long the site has seen the round closed;
    `stagger_s` its patience before it opens in another's place.
    """

    published: bool = False
    weighed: int | None = None
    voted_manifest: str | None = None
    recomputed: bool = False
    announced: bool = False
    available: frozenset[int] = frozenset()
    withheld: frozenset[int] = frozenset()
    quiet_s: float = 0.0
    stagger_s: float = 2.0


def is_over(view: RunView, limits: Limits) -> bool:
    """Whether no further round will be opened: all done, too many failures in a row, or the consortium has moved."""
    if view.phase in (Phase.COMMIT, Phase.VOTE):
        return False
    if view.successor:
        return True
    if limits.one_checkpoint and view.finalized_round > 0:
        return True
    return view.round_id >= limits.rounds or view.failures_in_a_row >= limits.failures_max


def decide(view: RunView, limits: Limits, memory: Memory, *, site: int) -> Duty:
    """The next duty of `site`; see the table above."""
    if site not in view.joined:
        return Duty.WAIT
    if view.phase is Phase.COMMIT:
        return Duty.CONTRIBUTE if site in view.members - view.committed else Duty.WAIT
    if view.phase is Phase.VOTE:
        return _decide_vote(view, limits, memory, site) if site in view.members else Duty.WAIT
    return _decide_closed(view, limits, memory, site)


def _decide_vote(view: RunView, limits: Limits, memory: Memory, site: int) -> Duty:
    if site in view.committed and not memory.published:
        return Duty.PUBLISH
    available = view.committed & memory.available
    awaited = view.committed - memory.withheld - available
    time_is_up = view.now >= min(view.commit_deadline + limits.opening_timeout_s, view.vote_deadline)
    if memory.weighed is None:
        enough = len(available) >= view.terms.sites_min
        return Duty.VOTE if enough and (not awaited or time_is_up) else Duty.WAIT
    return Duty.VOTE if len(available) > memory.weighed else Duty.WAIT


def _decide_closed(view: RunView, limits: Limits, memory: Memory, site: int) -> Duty:
    agreed = memory.recomputed or memory.voted_manifest == view.manifest
    if view.outcome is Outcome.FINALIZED and site in view.members and not agreed:
        if site in view.committed and not memory.published:
            return Duty.PUBLISH
        late = memory.weighed is None and view.now < view.vote_deadline
        return Duty.VOTE if late else Duty.VERIFY
    if is_over(view, limits):
        return Duty.DONE
    if view.phase is Phase.CLOSED and site not in view.committed and not memory.announced:
        return Duty.ANNOUNCE
    return Duty.OPEN if _is_turn(view, limits, memory, site) else Duty.WAIT


def _is_turn(view: RunView, limits: Limits, memory: Memory, site: int) -> bool:
    """Whether this site should open the next round now.

    The sites take turns, round by round; when the one whose turn it is stays away, the next steps in after
    `stagger_s`. Votes that are still under way are given one `stagger_s`, so that no score is lost.
    """
    needed = max(view.terms.sites_min, limits.sites_to_start if view.round_id == 0 else 0)
    if len(view.joined) < needed:
        return False
    order = sorted(view.joined)
    rank = (order.index(site) - view.round_id) % len(order)
    votes_due = view.outcome is Outcome.FINALIZED and not view.committed <= view.voted
    return memory.quiet_s >= memory.stagger_s * (rank + int(votes_due))
