"""One site's process: look, decide, do, write down; at its own pace, one duty at a time.

The agent is stateless but for its journal: what to do follows from the chain, the store and the promises on disk, so
it may be stopped at any moment and started again. It recomputes every merge, also of rounds that the others closed
before it came to vote. A node or a store that does not answer is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from swarmchain.chain import SwarmContract
from swarmchain.checkpoint import compute_size
from swarmchain.config import SiteConfig
from swarmchain.duties import Duty, Memory, decide
from swarmchain.errors import ContractError, MergeMismatch, UnknownRun, Unreachable
from swarmchain.journal import Ballot, Journal
from swarmchain.keys import Signer
from swarmchain.protocol import (
    Opening,
    Phase,
    RunView,
    compute_commitment,
    compute_digest,
    encode_canonical,
)
from swarmchain.spec import checkpoint_layout
from swarmchain.store import Store, read_manifest
from swarmchain.work import RunWork

Log = Callable[[dict[str, Any]], None]
FAILURES_PAUSE_S = 30.0


@dataclass
class Clock:
    """Seconds spent per kind of work in one round; `wait` is what is left of the round's duration."""

    spent: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add what happens inside to `kind`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[kind] = self.spent.get(kind, 0.0) + time.monotonic() - start

    def summarize(self) -> dict[str, float]:
        """Seconds of train, chain, store, merge and wait, rounded to milliseconds."""
        kinds = {kind: self.spent.get(kind, 0.0) for kind in ("train", "chain", "store", "merge")}
        kinds["wait"] = max(0.0, time.monotonic() - self.started - sum(kinds.values()))
        return {kind: round(value, 3) for kind, value in kinds.items()}


class Agent:
    """One site at work.

    Parameters
    ----------
    log
        Receives every event as a dictionary with `event` and what belongs to it.
    """

    def __init__(self, config: SiteConfig, signer: Signer, contract: SwarmContract, *, log: Log) -> None:
        self.config = config
        self.signer = signer
        self.contract = contract
        self.store = Store(config.store_url)
        self.store.require_writable()
        self.site = contract.get_site_index(signer.address)
        self.log = log
        self.journal = Journal(
            config.work_dir, chain_id=contract.chain_id, contract=contract.address, address=signer.address
        )
        self._work: dict[int, RunWork] = {}
        self._memory: dict[int, tuple[int, Memory]] = {}
        self._clock: dict[int, Clock] = {}
        self._closed_since: dict[tuple[int, int], float] = {}

    def run(self, runs: Sequence[int], *, stopping: Callable[[], bool] = lambda: False) -> None:
        """Do this site's duties in `runs` until each is over, or for good in whatever it joined if none is named."""
        ended: set[int] = set()
        while not stopping():
            following = list(runs) or list(range(1, self.contract.get_run_count() + 1))
            busy = False
            for run in [run for run in following if run not in ended]:
                duty = self._step_safely(run)
                busy = busy or duty not in (Duty.WAIT, Duty.DONE)
                if duty is Duty.DONE:
                    ended.add(run)
            if runs and ended >= set(runs):
                return
            if not busy:
                time.sleep(self.config.agent.poll_s)

    def _step_safely(self, run: int) -> Duty:
        """One step; what waiting may mend is logged and waited for."""
        try:
            return self.step(run)
        except UnknownRun:
            return Duty.WAIT
        except ContractError as exc:
            # another site was faster, or a phase ended between look and act: look again
            self.log({"event": "refused", "run": run, "reason": exc.message})
        except Unreachable as exc:
            self.log({"event": "unreachable", "run": run, "reason": exc.message})
            time.sleep(min(10 * self.config.agent.poll_s, FAILURES_PAUSE_S))
        return Duty.WAIT

    def step(self, run: int) -> Duty:
        """Look at a run once, do the next duty in it, and say which it was."""
        view = self.contract.view_run(run)
        if self.site not in view.joined:
            return Duty.WAIT
        work = self._work.get(run)
        if work is None:
            work = self._work[run] = RunWork(self.config, self.store, view, site=self.site,
                                                view_run=self.contract.view_run)
            self.log({"event": "run", "run": run, "spec": view.spec, "cells_train": len(work.data.train),
                      "cells_validation": len(work.data.validation), "features": int(work.data.present.sum())})
        memory = self._look(view, work)
        duty = decide(view, work.spec.limits, memory, site=self.site)
        self._do(duty, view, work)
        return duty

    def _look(self, view: RunView, work: RunWork) -> Memory:
        """What this site knows beside the chain, about the newest round."""
        round_id, memory = self._memory.get(view.run, (-1, Memory()))
        if round_id != view.round_id:
            memory = self._recall(view)
            self._clock[view.run] = Clock()
        changes: dict[str, Any] = {"quiet_s": 0.0, "stagger_s": self.config.agent.stagger_s}
        if view.phase is Phase.VOTE:
            clock = self._clock[view.run]
            with clock.measure("store"):
                missing = view.committed - memory.available
                new = {s for s in missing if self.store.has_opening(view.commitments[s])}
            changes["available"] = memory.available | new
        elif view.phase in (Phase.CLOSED, Phase.NONE):
            since = self._closed_since.setdefault((view.run, view.round_id), time.monotonic())
            changes["quiet_s"] = time.monotonic() - since
        memory = Memory(**{**memory.__dict__, **changes})
        self._memory[view.run] = (view.round_id, memory)
        return memory

    def _recall(self, view: RunView) -> Memory:
        """What the journal and the last certificate say of a round that this process has not seen yet."""
        key = self.contract.key_of(view.run, view.round_id)
        ballot = self.journal.get_vote(key)
        withheld: frozenset[int] = frozenset()
        if 0 < view.finalized_round < view.round_id:
            manifest = read_manifest(self.store, view.manifest)
            withheld = frozenset(item.site for item in manifest.excluded if item.reason == "withheld")
        if ballot is None:
            return Memory(withheld=withheld)
        return Memory(withheld=withheld, weighed=ballot.weighed, voted_manifest=ballot.manifest)

    def _remember(self, view: RunView, **changes: Any) -> None:
        _, memory = self._memory[view.run]
        self._memory[view.run] = (view.round_id, Memory(**{**memory.__dict__, **changes}))

    def _do(self, duty: Duty, view: RunView, work: RunWork) -> None:
        actions: dict[Duty, Callable[[RunView, RunWork], None]] = {
            Duty.OPEN: self._open, Duty.ANNOUNCE: self._announce, Duty.CONTRIBUTE: self._contribute,
            Duty.PUBLISH: self._publish, Duty.VOTE: self._vote, Duty.VERIFY: self._verify, Duty.DONE: self._finish,
        }
        if duty in actions:
            actions[duty](view, work)

    def _open(self, view: RunView, work: RunWork) -> None:
        with self._clock[view.run].measure("chain"):
            self.contract.open_round(self.signer, view.run)
        self.log({"event": "opened", "run": view.run, "round": view.round_id + 1})

    def _announce(self, view: RunView, work: RunWork) -> None:
        with self._clock[view.run].measure("chain"):
            self.contract.announce(self.signer, view.run)
        self._remember(view, announced=True)

    def _contribute(self, view: RunView, work: RunWork) -> None:
        key, clock = self.contract.key_of(view.run, view.round_id), self._clock[view.run]
        opening = self.journal.get_contribution(key)
        if opening is None:
            with clock.measure("train"):
                data, samples, metrics = work.contribute(view)
            digest = compute_digest(data)
            salt = self.signer.derive_salt(key, digest)
            opening = Opening(digest=digest, samples=samples, salt=salt, metrics=metrics)
            self.journal.record_contribution(key, opening, data)
        with clock.measure("chain"):
            gas = self.contract.commit(
                self.signer, view.run, view.round_id, compute_commitment(key, self.site, opening))
        self.log({"event": "committed", "run": view.run, "round": view.round_id, "gas": gas,
                  "samples": opening.samples, "metrics": opening.metrics})

    def _publish(self, view: RunView, work: RunWork) -> None:
        key = self.contract.key_of(view.run, view.round_id)
        opening = self.journal.get_contribution(key)
        if opening is not None:
            with self._clock[view.run].measure("store"):
                self.store.put_blob(self.journal.read_contribution(opening))
                self.store.put_opening(view.commitments[self.site], encode_canonical(opening))
        self._remember(view, published=True)

    def _vote(self, view: RunView, work: RunWork) -> None:
        key, clock = self.contract.key_of(view.run, view.round_id), self._clock[view.run]
        with clock.measure("merge"):
            certified = work.certify(view, key)
        weighed = len(view.committed & self._memory[view.run][1].available)
        if certified is None or len(certified.manifest.included) < view.terms.sites_min:
            self._remember(view, weighed=weighed)
            self.log({"event": "too few", "run": view.run, "round": view.round_id, "openings": weighed,
                      "needed": view.terms.sites_min})
            return
        accept, score = work.judge(certified, view)
        with clock.measure("store"):
            self.store.put_blob(certified.checkpoint)
            self.store.put_blob(certified.manifest_bytes)
        ballot = Ballot(certified.manifest.checkpoint, certified.manifest_digest, accept,
                        round((score or 0.0) * 10_000), weighed)
        self.journal.record_vote(key, ballot)
        with clock.measure("chain"):
            gas = self.contract.vote(self.signer, (view.run, view.round_id), ballot.checkpoint, ballot.manifest,
                                     accept=accept, score_bps=ballot.score_bps)
        self._remember(view, weighed=weighed, voted_manifest=ballot.manifest)
        self.log({"event": "voted", "run": view.run, "round": view.round_id, "checkpoint": ballot.checkpoint,
                  "manifest": ballot.manifest, "accept": accept, "score": score, "gas": gas,
                  "timing_s": clock.summarize(), "bytes": self._count_bytes()})
        self.journal.discard_contributions(view.run, before_round=view.round_id - 1)

    def _verify(self, view: RunView, work: RunWork) -> None:
        """Recompute a round that the others finalized, from the contributions that its certificate counts."""
        key = self.contract.key_of(view.run, view.round_id)
        manifest = read_manifest(self.store, view.manifest)
        only = frozenset(item.site for item in manifest.included)
        with self._clock[view.run].measure("merge"):
            certified = work.certify(view, key, only=only) if only else None
        about = {"run": view.run, "round": view.round_id, "on_chain": view.checkpoint}
        self._remember(view, recomputed=True)
        found = {item.site for item in certified.manifest.included} if certified else set()
        if certified is None or found != only:
            self.log({"event": "unverifiable", **about, "missing": sorted(only - found)})
            return
        computed = certified.manifest.checkpoint
        self.log({"event": "verified" if computed == view.checkpoint else "MISMATCH", **about, "checkpoint": computed})
        if computed != view.checkpoint:
            raise MergeMismatch(
                f"run {view.run}, round {view.round_id}: the merge gives {computed}, "
                f"the others accepted {view.checkpoint}",
                hint="do not go on with this run: compare versions with the other sites, then suspect them",
            )

    def _finish(self, view: RunView, work: RunWork) -> None:
        limits = work.spec.limits
        failed = view.failures_in_a_row >= limits.failures_max
        reason = "too many failures in a row" if failed else f"done after round {view.round_id}"
        if view.successor:
            reason = f"the consortium has moved to the contract {view.successor}"
        held = ""
        if view.finalized_round:
            layout = checkpoint_layout(work.spec)
            held = compute_digest(self.store.get_blob(view.checkpoint, bytes_max=compute_size(layout)))
        self.log({"event": "ended", "run": view.run, "reason": reason, "checkpoint": held,
                  "round": view.finalized_round, "bytes": self._count_bytes()})

    def _count_bytes(self) -> dict[str, int]:
        return {"up": self.store.bytes_up, "down": self.store.bytes_down}

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()
