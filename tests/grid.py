"""A swarm under a fault: real agents as processes, a real chain, a real folder, and a hand that breaks things.

Time moves when everybody who can act has acted: then the chain is moved to the next deadline, as if one had waited.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarmchain.consortium import AGENT, Consortium, LocalSite, Polling, start_consortium
from swarmchain.protocol import Phase, RunView, Terms
from swarmchain.spec import Limits, RehearsalSpec

SITES, ROUNDS = 4, 3
FAULTY = 2
TERMS = Terms(commit_window_s=300, vote_window_s=300, sites_min=2)
LIMITS = Limits(rounds=ROUNDS, sites_to_start=SITES, opening_timeout_s=60)
QUIET_S = 1.5
TIMEOUT_S = 120.0
PROGRAM = str(Path(__file__).with_name("faulty.py"))
# in which event of the first round an environment fault strikes
MOMENTS = {"commit": "opened", "vote": "published", "open": "voted"}


@dataclass
class Told:
    """What the agents said."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    last: float = field(default_factory=time.monotonic)

    def names(self, kind: str, round_id: int | None = None) -> set[str]:
        return {site for site, event in self.events
                if event["event"] == kind and (round_id is None or event.get("round") == round_id)}


class Grid:
    """One cell: a consortium of which one site, or the world around it, has a fault."""

    def __init__(self, swarm: Consortium, run: int, fault: str, at: str) -> None:
        self.swarm, self.run, self.fault, self.at = swarm, run, fault, at
        self.told = Told()
        self.has_struck = False
        self.heard_before = 0
        self.is_held = False

    @property
    def sick(self) -> LocalSite:
        return self.swarm.sites[FAULTY]

    @property
    def honest(self) -> list[LocalSite]:
        return [site for site in self.swarm.sites if site is not self.sick]

    def start(self) -> None:
        for site in self.swarm.sites:
            self.start_site(site)

    def start_site(self, site: LocalSite) -> None:
        if site is self.sick:
            self.heard_before = len(self.told.events)
        program = (PROGRAM, "--fault", self.fault, "--at", self.at) if site is self.sick else AGENT
        if not (site is self.sick and (self.fault, self.at) == ("OFFLINE", "start")):
            self.swarm.start_agent(site, [self.run], program=program)

    def play(self, strike: Callable[[], None] | None = None) -> None:
        """Until all honest agents have ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while any(site.process.poll() is None for site in self.honest if site.process):
            assert time.monotonic() < deadline, self.explain()
            self.listen()
            self.revive()
            self.release()
            if strike is not None and not self.has_struck and self.told.names(MOMENTS[self.at], 1):
                self.has_struck = True
                strike()
            self.move_time()
            time.sleep(0.05)
        self.listen()
        if self.sick.process is not None:
            with contextlib.suppress(Exception):
                self.sick.process.wait(timeout=20)
            self.listen()

    def listen(self) -> None:
        for site in self.swarm.sites:
            for event in site.read_new_events():
                self.told.events.append((site.name, event))
                self.told.last = time.monotonic()

    def revive(self) -> None:
        """What a supervisor does: start again what was killed, or could not reach chain or store."""
        for site in self.swarm.sites:
            if site.process is None and self.may_return():
                self.heard_before = len(self.told.events)
                self.swarm.start_agent(site, [self.run])
                self.hold()
            if site.process is None or site.process.poll() in (None, 0):
                continue
            is_gone = site is self.sick and self.fault == "OFFLINE" and not self.may_return()
            if site.process.returncode in (-signal.SIGKILL, 3) and not is_gone:
                self.start_site(site)
                if self.fault == "OFFLINE":
                    self.hold()

    def is_starting(self) -> bool:
        """Whether the faulty site's process is on its way, and has not looked at the run yet."""
        process = self.sick.process
        said = [event["event"] for site, event in self.told.events[self.heard_before:] if site == self.sick.name]
        return process is not None and process.poll() is None and "run" not in said

    def hold(self) -> None:
        """Rounds take a tenth of a second here, a process seconds to start: let the others stand still so long."""
        self.is_held = True
        self.signal_honest(signal.SIGSTOP)

    def release(self) -> None:
        if self.is_held and not self.is_starting():
            self.is_held = False
            self.signal_honest(signal.SIGCONT)

    def signal_honest(self, number: signal.Signals) -> None:
        for site in self.honest:
            if site.process is not None and site.process.poll() is None:
                os.killpg(site.process.pid, number)

    def may_return(self) -> bool:
        """A site that went offline comes back after the first round, except one that left for good."""
        return self.at != "vote" and bool(self.told.names("opened", 2))

    def move_time(self) -> None:
        """To the next deadline, once the honest sites have done what they can and nothing more is heard."""
        is_quiet = time.monotonic() - self.told.last >= QUIET_S
        if not is_quiet or self.fault in ENVIRONMENT or self.is_held or self.is_starting():
            return
        view = self.swarm.contract.view_run(self.run)
        indices = {self.swarm.sites.index(site) for site in self.honest}
        if view.phase is Phase.COMMIT and indices <= view.committed:
            self.jump(view.commit_deadline - view.now)
        elif view.phase is Phase.VOTE and self.have_disclosed(view, indices):
            opening = int(view.commit_deadline + LIMITS.opening_timeout_s)
            self.jump((opening if view.now < opening else view.vote_deadline) - view.now)

    def have_disclosed(self, view: RunView, sites: set[int]) -> bool:
        return all(self.swarm.store.has_opening(view.commitments[site]) for site in sites & view.committed)

    def jump(self, seconds: int) -> None:
        request = self.swarm.contract.node.web3.provider.make_request
        request("evm_increaseTime", [max(1, seconds)])  # type: ignore[arg-type]
        request("evm_mine", [])  # type: ignore[arg-type]
        self.told.last = time.monotonic()

    def explain(self) -> str:
        tails = {site.name: site.errors.read_text()[-500:] for site in self.swarm.sites if site.errors.exists()}
        view = self.swarm.contract.view_run(self.run)
        return f"{self.fault} at {self.at}: stuck at {view}\n{tails}\n" + "\n".join(
            f"{site} {json.dumps(event)}" for site, event in self.told.events[-30:])

    # -- what breaks around them

    def stop_answering(self, seconds: float) -> None:
        os.killpg(self.swarm.chain.process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.killpg(self.swarm.chain.process.pid, signal.SIGCONT)

    def drop_transactions(self) -> None:
        """No block takes anything in for a while, and the pool forgets what it was given."""
        request = self.swarm.contract.node.web3.provider.make_request
        request("evm_setAutomine", [False])  # type: ignore[arg-type]
        for _ in range(6):
            time.sleep(0.5)
            request("anvil_dropAllTransactions", [])  # type: ignore[arg-type]
        request("evm_setAutomine", [True])  # type: ignore[arg-type]
        request("evm_mine", [])  # type: ignore[arg-type]

    def unmount_store(self) -> None:
        store = self.swarm.folder / "store"
        store.rename(self.swarm.folder / "elsewhere")
        store.mkdir()  # an empty mount point
        time.sleep(2.0)
        store.rmdir()
        (self.swarm.folder / "elsewhere").rename(store)

    def fill_store(self) -> None:
        (self.swarm.folder / "full").touch()

    def free_store(self) -> None:
        (self.swarm.folder / "full").unlink()


ENVIRONMENT = {"CHAIN_DOWN", "CHAIN_RESTART", "DROPPED_TX", "RPC_TIMEOUT", "STORE_DOWN", "STORE_FULL"}


@contextlib.contextmanager
def start_grid(folder: Path, fault: str, at: str) -> Iterator[Grid]:
    """A consortium that has joined a run, with the agents not started yet."""
    options = ("--state", str(folder / "swarm" / "chain.json"), "--state-interval", "1") \
        if fault in ("CHAIN_DOWN", "CHAIN_RESTART") else ()
    names = {f"site-{i}": None for i in range(SITES)}
    polling = Polling(poll_s=0.1, stagger_s=0.5)
    with start_consortium(folder / "swarm", names, seed=1, polling=polling, chain_options=options) as swarm:
        spec = RehearsalSpec(name="grid", widths=(30, 8, 4), limits=LIMITS)
        grid = Grid(swarm, swarm.propose(spec, terms=TERMS), fault, at)
        if fault == "RPC_TIMEOUT":
            for site in swarm.sites:
                site.toml.write_text(site.toml.read_text().replace("timeout_s = 10.0", "timeout_s = 1.0"))
        try:
            yield grid
        finally:
            grid.signal_honest(signal.SIGCONT)
            swarm.stop_agents()
