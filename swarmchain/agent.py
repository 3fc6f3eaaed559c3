"""One site's process: look, decide, do, write down; at its own pace, one duty at a time.

Level-triggered: what to do follows from the chain, the store and the promises on disk, so the agent may be killed at
any moment and started again. Block numbers are hints that a look is worth while; nothing depends on them. A chain or a
store that does not answer, takes nothing in, or is full, is waited for, however long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from swarmchain.acts import Following, Log, act
from swarmchain.duties import Duty, Exclusions, Memory, decide
from swarmchain.errors import (
    ChainError,
    ChainMismatch,
    ContractError,
    DataError,
    OpeningError,
    SpecError,
    StoreError,
    SwarmError,
    Unreachable,
)
from swarmchain.keys import SealKey
from swarmchain.protocol import Phase, Reason, RunView
from swarmchain.sealed import SealedStore
from swarmchain.site import Site, find_seal_keys, seal_store
from swarmchain.store import Store, read_manifest
from swarmchain.tasks import Task
from swarmchain.timing import Clock, Patience, sleep
from swarmchain.work import RunWork

FAILURES_PAUSE_S = 30.0
# A look at the chain even if its newest block is the same: time passes without blocks too.
LOOK_S = 5.0
HEALTH_S = 30.0
RECHECK_S = (0.2, 5.0)
POLL_MIN_S = 0.03


@dataclass
class Health:
    """When the nodes were compared last, and whether the chain was found to stand still."""

    checked_at: float = field(default_factory=time.monotonic)
    is_stalled: bool = False


class Agent:
    """One site at work.

    Parameters
    ----------
    seal_key
        Opens and seals contributions and checkpoints; without one they stay in the clear.
    log
        Receives every event as a dictionary with `event` and what belongs to it.
    now
        Seconds since 1970, to tell the age of the newest block; nothing is decided by it.
    tasks
        By run: what computes for it, where that is a program of the site's own.
    on_duty
        Is told of each duty before it is done, and of the seconds that it may take before something is wrong.
    """

    def __init__(self, site: Site, store: Store, *, log: Log, now: Callable[[], float] = time.time,
                 seal_key: SealKey | None = None, tasks: Mapping[int, Task] | None = None,
                 on_duty: Callable[[str, float], None] = lambda duty, allowed_s: None) -> None:
        self.site = site
        self.store = store
        self._seal_key = seal_key
        self.log = log
        self.head = -1
        self._now = now
        self._tasks = tasks or {}
        self._on_duty = on_duty
        self._following: dict[int, Following] = {}
        self._not_ours: dict[int, int] = {}
        self._ended: dict[int, SwarmError | None] = {}
        self._runs: tuple[int, int] = (-1, 0)
        settings = site.config.agent
        self._patience = Patience(POLL_MIN_S, settings.poll_s)
        self._failures = Patience(settings.poll_s, FAILURES_PAUSE_S)
        self._health = Health()

    def run(self, runs: Sequence[int], *, stopping: Callable[[], bool] = lambda: False) -> None:
        """Do this site's duties in `runs` until each is over, or for good in whatever it joined if none is named.

        Raises
        ------
        RunFailed
            If all are over and one of `runs` has not reached its goal.
        MergeMismatch
            If a majority accepted what its own certificate does not give.
        SwarmError
            For what a person has to mend.
        """
        while not stopping():
            try:
                is_busy = self._turn(runs)
            except ChainMismatch:
                raise
            except (Unreachable, StoreError, ChainError) as exc:
                # a node may also refuse: for want of funds, or until it has caught up
                self.log({"event": "unreachable", "reason": exc.message, "hint": exc.hint})
                sleep(self._failures.grow(), stopping=stopping)
                continue
            self._failures.reset()
            if runs and set(self._ended) >= set(runs):
                break
            if is_busy:
                self._patience.reset()
            else:
                sleep(self._patience.grow(), stopping=stopping)
        for run in runs:
            if (problem := self._ended.get(run)) is not None:
                raise problem

    def get_views(self) -> list[RunView]:
        """The runs that it works on, as it last saw them."""
        return [found.view for found in self._following.values()]

    def _turn(self, runs: Sequence[int]) -> bool:
        """One duty in each run at most; whether there was any."""
        self._check_health()
        self.site.outbox.settle(self.site.signer)
        head = self.head = self.site.contract.node.read_head()
        if not runs and self._runs[0] != head:
            self._runs = (head, self.site.contract.get_run_count())
        following = runs or range(1, self._runs[1] + 1)
        found = {self._step_safely(run, head) for run in following if run not in self._ended}
        return not found <= {Duty.WAIT, Duty.DONE}

    def _step_safely(self, run: int, head: int) -> Duty:
        try:
            return self.step(run, head)
        except ContractError as exc:
            # another site was faster, a phase ended between look and act, or the run is not there yet: look again
            if run in self._following:
                self.log({"event": "refused", "run": run, "reason": exc.message})
                self._following[run].head = -1
        except (SpecError, DataError) as exc:
            self.log({"event": "cannot", "run": run, "reason": exc.message})
            self._ended[run] = exc
        return Duty.WAIT

    def step(self, run: int, head: int) -> Duty:
        """Look at a run where that is worth while, do the next duty in it, and say which it was."""
        found = self._following.get(run)
        is_fresh = found is None or found.head != head or time.monotonic() >= found.look_at
        if is_fresh:
            found = self._look(run, head)
        if found is None:
            return Duty.WAIT
        duty = self._decide(found)
        if duty is not Duty.WAIT and not is_fresh:
            found = self._look(run, head)
            duty = self._decide(found) if found else Duty.WAIT
        if found is None or duty is Duty.WAIT:
            return Duty.WAIT
        self._on_duty(duty.value, found.view.terms.commit_window_s + found.view.terms.vote_window_s)
        problem = act(duty, found, self.site, found.work.store, log=self.log)
        found.head = -1
        if duty is Duty.DONE:
            self._ended[run] = problem
            del self._following[run]
        return duty

    def _look(self, run: int, head: int) -> Following | None:
        """The run as the chain shows it now; None if this site has not joined it."""
        if self._not_ours.get(run) == head:
            return None
        view = self.site.contract.view_run(run)
        if self.site.index not in view.joined:
            self._not_ours[run] = head
            self._following.pop(run, None)
            return None
        found = self._following.get(run)
        has_news = found is None or (found.view.round_id, found.view.joined) != (view.round_id, view.joined)
        if found is None:
            found = self._following[run] = self._follow(view)
        elif found.view.round_id != view.round_id:
            found.memory, found.clock, found.recheck = self._recall(view), Clock(), {}
        if view.phase not in (Phase.CLOSED, Phase.NONE):
            found.closed_since = None
        elif found.closed_since is None:
            found.closed_since = time.monotonic()
        found.view, found.head = view, head
        if has_news and isinstance(found.work.store, SealedStore):
            self._welcome(found, found.work.store)
        found.look_at = time.monotonic() + self._compute_pause(found)
        return found

    def _follow(self, view: RunView) -> Following:
        contract = self.site.contract
        store = seal_store(self.store, self._seal_key, contract, view.run)
        work = RunWork(self.site.config, store, view, site=self.site.index, view_run=contract.view_run,
                       task=self._tasks.get(view.run))
        self.log({"event": "run", "run": view.run, "spec": view.spec, **work.task.describe()})
        return Following(work, view, contract.key_of, self._recall(view))

    def _welcome(self, found: Following, store: SealedStore) -> None:
        """Let who joined read what the next round starts from, and all sites what they must see before they join."""
        wanted = [found.view.checkpoint] if found.view.finalized_round else []
        source, seed = getattr(found.work.spec, "statistics", None), getattr(found.work.spec, "seed_checkpoint", None)
        everyone = find_seal_keys(self.site.contract, None) if source else frozenset[str]()
        for digest, also in [*((d, ()) for d in wanted), *((d, everyone) for d in (
                seed, source.checkpoint if source else None) if d)]:
            # what is in the clear, not there yet, or not for this site is others' to give
            with contextlib.suppress(StoreError):
                store.welcome(digest, also=also)

    def _compute_pause(self, found: Following) -> float:
        """Seconds until the run may look otherwise without a new block: the next deadline."""
        view = found.view
        opening = int(view.commit_deadline + found.work.spec.limits.opening_timeout_s)
        deadlines = [t - view.now for t in (view.commit_deadline, opening, view.vote_deadline) if t >= view.now]
        return max(POLL_MIN_S, min([LOOK_S, *deadlines]))

    def _recall(self, view: RunView) -> Memory:
        """What the journal and the last certificate say of a round that this process has not seen yet."""
        pace = self.site.journal.get_pace(view.run)
        memory = Memory(is_too_slow=pace is not None and pace.is_too_slow, stagger_s=self.site.config.agent.stagger_s)
        if 0 < view.finalized_round < view.round_id:
            memory = replace(memory, distrusted=frozenset(
                site for site, _ in self._read_exclusions(view.manifest) or ()))
        ballot = self.site.journal.get_vote(self.site.contract.key_of(view.run, view.round_id))
        if ballot is None:
            return memory
        return replace(memory, weighed=self._read_exclusions(ballot.manifest), voted_manifest=ballot.manifest)

    def _read_exclusions(self, manifest: str) -> Exclusions | None:
        try:
            return frozenset((item.site, item.reason) for item in read_manifest(self.store, manifest).excluded)
        except (StoreError, OpeningError):
            return None

    def _decide(self, found: Following) -> Duty:
        """What to do by what was last seen of the chain and what the store shows now."""
        view, memory = found.view, found.memory
        if view.phase is Phase.VOTE and (memory.published or self.site.index not in view.committed):
            with found.clock.measure("merge"):
                found.remember(excluded=self._check(found))
        elif found.closed_since is not None:
            found.remember(quiet_s=time.monotonic() - found.closed_since)
        return decide(view, found.work.spec.limits, found.memory, site=self.site.index)

    def _check(self, found: Following) -> Exclusions:
        """Fetch what was disclosed since the last look; who is of no use by now, and why."""
        view, sites = found.view, sorted(found.view.committed)
        reasons: dict[int, Reason | None] = {}
        for site in sites:
            last = found.recheck.get(site)
            if last is not None and time.monotonic() < last.due:
                reasons[site] = last.reason
            elif last is None and site != self.site.index and not self.store.has_opening(view.commitments[site]):
                reasons[site] = "withheld"
        looked = found.work.check(view, found.key, [site for site in sites if site not in reasons])
        for site, reason in looked.items():
            if reason is None:
                found.recheck.pop(site, None)
                continue
            found.put_off(site, reason, pauses=RECHECK_S)
            if site == self.site.index:
                # what this site disclosed was altered or removed: anyone can write to a store
                found.remember(published=False)
        return frozenset((site, reason) for site, reason in (reasons | looked).items() if reason is not None)

    def _check_health(self) -> None:
        """Prefer the node that is farthest, and say once when the chain stands still."""
        node, health = self.site.contract.node, self._health
        oldest = node.profile.head_age_max_s
        is_due = time.monotonic() - health.checked_at >= HEALTH_S
        if not is_due or (oldest is None and len(node.endpoints.endpoints) == 1):
            return
        health.checked_at = time.monotonic()
        age = self._now() - node.choose_freshest()
        is_stalled = oldest is not None and age > oldest
        if is_stalled and not health.is_stalled:
            self.log({"event": "stalled", "reason": f"the newest block is {age:.0f} s old", "node": node.rpc_url})
        health.is_stalled = is_stalled
