"""The duties done: each reads what was seen, writes into the journal first, and then into the store or the chain.

Doing one twice is the same as doing it once: the contract and the store know what is there already.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from swarmchain.certify import Certified
from swarmchain.checkpoint import compute_size
from swarmchain.duties import Duty, Memory
from swarmchain.errors import JournalError, MergeMismatch, RunFailed, StoreError, SwarmError
from swarmchain.history import Tally, count, read_rounds
from swarmchain.journal import Ballot, Pace
from swarmchain.layouts import checkpoint_layout
from swarmchain.protocol import (
    BPS,
    Manifest,
    Opening,
    Reason,
    RoundKey,
    RunView,
    compute_commitment,
    compute_digest,
    encode_canonical,
)
from swarmchain.site import Site
from swarmchain.store import Store, read_manifest
from swarmchain.timing import Clock, Patience
from swarmchain.work import RunWork

Log = Callable[[dict[str, Any]], None]


@dataclass
class Recheck:
    """A contribution that was of no use: why, and when it is looked at again."""

    reason: Reason
    patience: Patience
    due: float


@dataclass
class Following:
    """One run that a site works on: what was last seen of it, and what this process knows of its newest round.

    `head` is the block that `view` was read at or after, `look_at` when it is to be read again in any case.
    """

    work: RunWork
    view: RunView
    key_of: Callable[[int, int], RoundKey]
    memory: Memory
    clock: Clock = field(default_factory=Clock)
    head: int = -1
    look_at: float = 0.0
    closed_since: float | None = None
    recheck: dict[int, Recheck] = field(default_factory=dict)

    @property
    def key(self) -> RoundKey:
        """Names the newest round."""
        return self.key_of(self.view.run, self.view.round_id)

    def remember(self, **changes: Any) -> None:
        """Change what is remembered of the newest round."""
        self.memory = replace(self.memory, **changes)

    def put_off(self, site: int, reason: Reason, *, pauses: tuple[float, float]) -> None:
        """Look at a contribution that is of no use again, later each time."""
        last = self.recheck.get(site)
        patience = last.patience if last is not None else Patience(*pauses)
        self.recheck[site] = Recheck(reason, patience, time.monotonic() + patience.grow())


def act(duty: Duty, found: Following, site: Site, store: Store, *, log: Log) -> SwarmError | None:
    """Do one duty, and log what it did and how long it took.

    Returns
    -------
    What is wrong with a run that is over, for `Duty.DONE`; None if nothing is, and for every other duty.
    """
    started = time.monotonic()

    def say(event: str, **about: Any) -> None:
        where = {"event": event, "run": found.view.run, "round": found.view.round_id}
        log({**where, "duty": duty.value, **about, "took_s": round(time.monotonic() - started, 3)})

    return Acts(found, site, store, say).do(duty)


class Acts:
    """What one site can do in one round."""

    def __init__(self, found: Following, site: Site, store: Store, say: Callable[..., None]) -> None:
        self.found = found
        self.view = found.view
        self.work = found.work
        self.clock = found.clock
        self.site = site
        self.store = store
        self.say = say

    def do(self, duty: Duty) -> SwarmError | None:
        """See `act`."""
        if duty is Duty.DONE:
            return self.finish()
        {Duty.OPEN: self.open, Duty.ANNOUNCE: self.announce, Duty.CONTRIBUTE: self.contribute,
         Duty.PUBLISH: self.publish, Duty.VOTE: self.vote, Duty.VERIFY: self.verify}[duty]()
        return None

    def open(self) -> None:
        """Open the next round."""
        with self.clock.measure("chain"):
            self.site.contract.open_round(self.site.signer, self.view.run)
        self.say("opened", round=self.view.round_id + 1)

    def announce(self) -> None:
        """Ask to be waited for in the next round."""
        with self.clock.measure("chain"):
            self.site.contract.announce(self.site.signer, self.view.run)
        self.found.remember(announced=True)
        self.say("announced")

    def contribute(self) -> None:
        """Train, write the promise down, commit to it."""
        opening = self._promise()
        commitment = compute_commitment(self.found.key, self.site.index, opening)
        with self.clock.measure("chain"):
            gas = self.site.contract.commit(self.site.signer, self.view.run, self.view.round_id, commitment)
        self.say("committed", gas=gas, samples=opening.samples)

    def _promise(self) -> Opening:
        """The opening of the round: from the journal, or trained for and written there."""
        key, journal = self.found.key, self.site.journal
        if (opening := journal.get_contribution(key)) is not None:
            return opening
        started = time.monotonic()
        with self.clock.measure("train"):
            ratings = self.work.rate(self.view)  # first, while what they are of is at hand
            data, samples, metrics = self.work.contribute(self.view, key)
        pace = Pace(key.run, round(time.monotonic() - started, 3), float(self.view.terms.commit_window_s))
        digest = compute_digest(data)
        nonce = self.site.signer.derive_salt(key, digest)
        opening = Opening(digest=digest, samples=samples, labels=self.work.task.labels, ratings=ratings, nonce=nonce)
        journal.record_contribution(key, opening, data)
        journal.record_pace(pace)
        self.found.remember(is_too_slow=pace.is_too_slow)
        self.say("trained", samples=samples, metrics=metrics)
        if pace.is_too_slow:
            self.say("too slow", needs_s=pace.train_s, window_s=pace.window_s)
        return opening

    def publish(self) -> None:
        """Disclose the contribution and its opening, and put right what was put in their place."""
        opening, commitment = self._promise(), self.view.commitments[self.site.index]
        if compute_commitment(self.found.key, self.site.index, opening) != commitment:
            self.say("lost", reason="the journal is gone, and training again gave another contribution")
            self.found.remember(published=True)
            return
        with self.clock.measure("store"):
            self.store.restore_blob(self._read_contribution(opening), digest=opening.digest)
            self.store.put_opening(commitment, encode_canonical(opening))
        self.found.remember(published=True)
        self.say("published")

    def _read_contribution(self, opening: Opening) -> bytes:
        """The promised bytes; trained for again where they were discarded and the chain lost the rounds after."""
        try:
            return self.site.journal.read_contribution(opening)
        except JournalError:
            data, _, _ = self.work.contribute(self.view, self.found.key)
            if compute_digest(data) != opening.digest:
                raise
            return data

    def vote(self) -> None:
        """Recompute the merge, judge it, put it into the store, write the vote down, cast it."""
        view, key = self.view, self.found.key
        with self.clock.measure("merge"):
            certified = self.work.certify(view, key)
        if certified is None or len(certified.manifest.included) < view.terms.sites_min:
            self.found.remember(excluded=None, weighed=self.found.memory.excluded or frozenset())
            self.say("too few", openings=0 if certified is None else len(certified.manifest.included),
                     needed=view.terms.sites_min)
            return
        weighed = frozenset((item.site, item.reason) for item in certified.manifest.excluded)
        self.found.remember(excluded=weighed, weighed=weighed)
        if self._is_no_better(certified):
            return
        accept, score = self.work.judge(certified, view)
        with self.clock.measure("store"):
            self.store.put_blob(certified.checkpoint, digest=certified.manifest.checkpoint)
            self.store.put_public(certified.manifest_bytes)
        included = frozenset(item.site for item in certified.manifest.included)
        ballot = Ballot(certified.manifest.checkpoint, certified.manifest_digest, accept,
                        round((score or 0.0) * BPS), included)
        self.site.journal.record_vote(key, ballot)
        with self.clock.measure("chain"):
            gas = self.site.contract.vote(
                self.site.signer, (view.run, view.round_id), ballot.checkpoint, ballot.manifest,
                accept=accept, score_bps=ballot.score_bps)
        self.found.remember(voted_manifest=ballot.manifest)
        self.say("voted", checkpoint=ballot.checkpoint, manifest=ballot.manifest, accept=accept, score=score, gas=gas,
                 timing_s=self.clock.summarize(), bytes=self._count_bytes())
        self.site.journal.discard_contributions(view.run, before_round=view.round_id - 1)

    def _is_no_better(self, certified: Certified) -> bool:
        """Whether this site has voted for the same already, or for what counts a contribution that this does not."""
        before = self.site.journal.get_vote(self.found.key)
        if before is None or self.site.index not in self.view.voted:
            return False
        included = frozenset(item.site for item in certified.manifest.included)
        return before.manifest == certified.manifest_digest or not before.included <= included

    def verify(self) -> None:
        """Recompute a round that the others finalized, from the contributions that its certificate counts."""
        view, key = self.view, self.found.key
        manifest = self._read_certificate()
        only = frozenset(item.site for item in manifest.included)
        with self.clock.measure("merge"):
            certified = self.work.certify(view, key, only=only) if only else None
        self.found.remember(recomputed=True)
        found = {item.site for item in certified.manifest.included} if certified else set()
        if certified is None or found != only:
            self.say("unverifiable", on_chain=view.checkpoint, missing=sorted(only - found))
            return
        computed = certified.manifest.checkpoint
        self.say("verified" if computed == view.checkpoint else "MISMATCH", on_chain=view.checkpoint,
                 checkpoint=computed)
        if computed != view.checkpoint:
            raise MergeMismatch(
                f"run {view.run}, round {view.round_id}: the merge gives {computed}, "
                f"the others accepted {view.checkpoint}",
                hint="do not go on with this run: compare versions with the other sites, then suspect them",
            )
        self.store.put_blob(certified.checkpoint, digest=computed)

    def _read_certificate(self) -> Manifest:
        """The newest manifest on record; whoever finds it missing, and can, puts it back."""
        try:
            return read_manifest(self.store, self.view.manifest)
        except StoreError:
            certified = self.work.certify(self.view, self.found.key)
            if certified is None or certified.manifest_digest != self.view.manifest:
                raise
            self.store.restore_public(certified.manifest_bytes)
            return certified.manifest

    def finish(self) -> SwarmError | None:
        """Say what became of the run, and of whom."""
        view, limits = self.view, self.work.spec.limits
        tally = count(read_rounds(self.site.contract, self.store, view.run))
        names = {record.site: record.name for record in self.site.contract.get_sites()}
        failed = view.failures_in_a_row >= limits.failures_max
        reason = f"done after round {view.round_id}"
        if failed:
            reason = f"{view.failures_in_a_row} failures in a row"
        if view.successor:
            reason, failed = f"the consortium has moved to the contract {view.successor}", False
        held = ""
        if view.finalized_round:
            layout = checkpoint_layout(self.work.spec)
            held = compute_digest(self.store.get_blob(view.checkpoint, bytes_max=compute_size(layout)))
        left_out = {names[i]: reasons for i, reasons in tally.left_out.items()}
        rounds = {"finalized": tally.finalized, "rejected": tally.rejected, "expired": tally.expired}
        self.say("ended", reason=reason, checkpoint=held, round=view.finalized_round, rounds=rounds,
                 left_out=left_out, bytes=self._count_bytes())
        if failed or not (held or view.successor):
            return RunFailed(
                f"run {view.run} ended without reaching its goal, {reason}: {describe_tally(tally)}",
                hint="`swarmchain status` shows who is missing; a new run can start from its last checkpoint",
            )
        return None

    def _count_bytes(self) -> dict[str, int]:
        return {"up": self.store.bytes_up, "down": self.store.bytes_down}


def describe_tally(tally: Tally) -> str:
    """A run's rounds in words."""
    return f"{tally.finalized} rounds finalized, {tally.rejected} rejected, {tally.expired} expired"
