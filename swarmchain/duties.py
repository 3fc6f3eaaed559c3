"""The round as the chain shows it, and what this site remembers → the one next duty. A pure table.

phase          what is so                                             duty
------------------------------------------------------------------------------------------------
any            not joined                                             WAIT
COMMIT         member, not committed                                  CONTRIBUTE
VOTE           committed, opening not disclosed                       PUBLISH
VOTE           not voted, enough contributions are good, and all
               awaited ones are, or time is up                        VOTE
VOTE           voted, and more contributions can be counted now       VOTE
CLOSED         finalized, otherwise than voted here                   VOTE (counts until the deadline) or VERIFY
CLOSED         this site missed the round, more will follow           ANNOUNCE (unless it is too slow for any)
NONE, CLOSED   the run is over                                        DONE
NONE, CLOSED   this site's turn                                       OPEN
otherwise                                                             WAIT

What was sent is believed only when the chain shows it: a duty whose transaction was lost comes up again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from swarmchain.protocol import Outcome, Phase, Reason, RunView
from swarmchain.spec import Limits

Exclusions = frozenset[tuple[int, Reason]]


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

    `excluded` are the committed sites whose contributions are of no use by now, and why; None while that was not looked
    at. `weighed` is what `excluded` was when this site last computed the merge, None before it. `distrusted` are the
    sites that the last certificate excludes: they are not waited for. `voted_manifest` is what this site last voted
    for, and `recomputed` says that it recomputed what others accepted instead. `is_too_slow`: local training takes
    longer than the window. `quiet_s` is how long the site has seen the round closed; `stagger_s` its patience before it
    opens in another's place.
    """

    published: bool = False
    excluded: Exclusions | None = None
    weighed: Exclusions | None = None
    distrusted: frozenset[int] = frozenset()
    voted_manifest: str | None = None
    recomputed: bool = False
    announced: bool = False
    is_too_slow: bool = False
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


def is_opening_over(view: RunView, limits: Limits) -> bool:
    """Whether contributions that are missing or of no use are no longer waited for."""
    return view.now >= min(view.commit_deadline + limits.opening_timeout_s, view.vote_deadline)


def _decide_vote(view: RunView, limits: Limits, memory: Memory, site: int) -> Duty:
    if site in view.committed and not memory.published:
        return Duty.PUBLISH
    if memory.excluded is None:
        return Duty.WAIT
    excluded = _sites(memory.excluded)
    if site in view.voted:
        # a vote moves to what counts more, or the same for reasons that are newer; never to what counts less
        is_better = memory.weighed not in (None, memory.excluded) and excluded <= _sites(memory.weighed or frozenset())
        return Duty.VOTE if is_better else Duty.WAIT
    is_enough = len(view.committed - excluded) >= view.terms.sites_min
    awaited = excluded - memory.distrusted
    return Duty.VOTE if is_enough and (not awaited or is_opening_over(view, limits)) else Duty.WAIT


def _decide_closed(view: RunView, limits: Limits, memory: Memory, site: int) -> Duty:
    agreed = memory.recomputed or memory.voted_manifest == view.manifest
    if view.outcome is Outcome.FINALIZED and site in view.members and not agreed:
        if site in view.committed and not memory.published:
            return Duty.PUBLISH
        is_late = site not in view.voted and memory.weighed is None and view.now < view.vote_deadline
        return Duty.VOTE if is_late else Duty.VERIFY
    if is_over(view, limits):
        return Duty.DONE
    missed = view.phase is Phase.CLOSED and site in view.members - view.committed
    if missed and not memory.announced and not memory.is_too_slow:
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


def _sites(excluded: Exclusions) -> frozenset[int]:
    return frozenset(site for site, _ in excluded)
