"""Kill anything, at any moment, and see whether the swarm goes on and ends where it would have ended.

    python bench/soak.py [--sites 5] [--rounds 200] [--seed 0] [--json] [--write]

A rehearsal of a small model runs twice with the same seed: undisturbed, and while a random agent is killed (SIGKILL)
every 1 to 3 seconds, the chain every 15, and agents and chain at once twice. A supervisor starts again whatever is
gone; the chain comes back with what it had written down, so it may lose its last second of blocks. Prints

- `rounds_lost`: rounds that were not finalized;
- `kills`: agents and chains that were killed, and `kills_chain`, `kills_all` among them;
- `recovery_s`: seconds from a kill to the next duty done by that site (by any site, if it was the chain): median, max;
- `digest_equal`: whether the final checkpoint is the undisturbed run's, at every site.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import replace_table

from swarmchain.consortium import Consortium, LocalSite, Polling, start_consortium
from swarmchain.history import count, read_rounds
from swarmchain.protocol import Terms
from swarmchain.spec import Limits, RehearsalSpec

# No deadline passes here: what is killed comes back within seconds, and every contribution is to be counted.
TERMS = Terms(commit_window_s=86_400, vote_window_s=86_400, sites_min=2)
AGENT_EVERY_S, CHAIN_EVERY_S = (1.0, 3.0), 15.0
ALL_AT = (1 / 3, 2 / 3)  # of the rounds
TIMEOUT_S = 3_600.0


class Soak:
    """One run, with a hand that kills."""

    def __init__(self, swarm: Consortium, run: int, *, rounds: int, dice: random.Random, is_disturbed: bool) -> None:
        self.swarm, self.run, self.rounds, self.dice = swarm, run, rounds, dice
        self.is_disturbed = is_disturbed
        self.kills = {"agent": 0, "chain": 0, "all": 0}
        self.held: dict[str, str] = {}
        self.round_id = 0
        self.open_kills: list[tuple[float, str]] = []
        self.recovery_s: list[float] = []

    def play(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        agent_at = time.monotonic() + 10.0
        chain_at = time.monotonic() + CHAIN_EVERY_S
        all_at = [share * self.rounds for share in ALL_AT]
        self.swarm.start_agents([self.run])
        while len(self.held) < len(self.swarm.sites):
            if time.monotonic() > deadline:
                sys.exit(f"stuck in round {self.round_id}: {self.swarm.contract.view_run(self.run)}")
            self.listen()
            self.revive()
            now = time.monotonic()
            if self.is_disturbed and self.round_id < self.rounds:
                if all_at and self.round_id >= all_at[0]:
                    all_at.pop(0)
                    self.kill_all()
                elif now >= chain_at:
                    chain_at = now + CHAIN_EVERY_S
                    self.kill_chain()
                elif now >= agent_at:
                    agent_at = now + self.dice.uniform(*AGENT_EVERY_S)
                    self.kill_agent(self.dice.choice(self.swarm.sites))
            time.sleep(0.02)

    def listen(self) -> None:
        for site in self.swarm.sites:
            for event in site.read_new_events():
                if event["event"] == "ended":
                    self.held[site.name] = event["checkpoint"]
                if event["event"] in ("opened", "committed", "published", "voted", "verified", "ended"):
                    self.round_id = max(self.round_id, event["round"])
                    over = [kill for kill in self.open_kills if event["time"] > kill[0] and kill[1] in ("", site.name)]
                    self.recovery_s += [event["time"] - at for at, _ in over]
                    self.open_kills = [kill for kill in self.open_kills if kill not in over]

    def revive(self) -> None:
        for site in self.swarm.sites:
            code = None if site.process is None else site.process.poll()
            if code in (-signal.SIGKILL, 3):
                self.swarm.start_agent(site, [self.run])
            elif code not in (None, 0):
                sys.exit(f"the agent of {site.name} ended with {code}: {site.errors.read_text()[-1000:]}")

    def kill_agent(self, site: LocalSite) -> None:
        if site.name in self.held or site.process is None or site.process.poll() is not None:
            return
        self.open_kills.append((time.time(), site.name))
        os.killpg(site.process.pid, signal.SIGKILL)
        site.process.wait(timeout=10)
        self.kills["agent"] += 1

    def kill_chain(self) -> None:
        self.open_kills.append((time.time(), ""))
        self.kills["chain"] += 1
        self.swarm.restart_chain(number=signal.SIGKILL)

    def kill_all(self) -> None:
        for site in self.swarm.sites:
            self.kill_agent(site)
        self.kill_chain()
        self.kills["all"] += 1


@contextlib.contextmanager
def start_soak(options: argparse.Namespace, *, is_disturbed: bool) -> Iterator[Soak]:
    with tempfile.TemporaryDirectory(prefix="swarmchain-soak-", ignore_cleanup_errors=True) as name:
        folder = Path(name) / "swarm"
        names = {f"site-{i}": None for i in range(options.sites)}
        with start_consortium(folder, names, seed=options.seed, polling=Polling(poll_s=0.1, stagger_s=1.0),
                              chain_options=("--state", str(folder / "chain.json"), "--state-interval", "1")) as swarm:
            limits = Limits(rounds=options.rounds, sites_to_start=options.sites, opening_timeout_s=86_400.0)
            spec = RehearsalSpec(name="soak", widths=(100, 32, 8), limits=limits, seed=options.seed)
            soak = Soak(swarm, swarm.propose(spec, terms=TERMS), rounds=options.rounds,
                        dice=random.Random(options.seed), is_disturbed=is_disturbed)
            time.sleep(1.5)  # until the chain has written down that the run exists
            yield soak


def measure(options: argparse.Namespace) -> dict[str, Any]:
    finals, found = [], {}
    for is_disturbed in (False, True):
        started = time.monotonic()
        with start_soak(options, is_disturbed=is_disturbed) as soak:
            soak.play()
            view = soak.swarm.contract.view_run(soak.run)
            tally = count(read_rounds(soak.swarm.contract, soak.swarm.store, soak.run))
            finals.append({view.checkpoint, *soak.held.values()})
        found[f"total_s_{'disturbed' if is_disturbed else 'undisturbed'}"] = round(time.monotonic() - started, 1)
    recovery = soak.recovery_s or [0.0]
    return {
        "sites": options.sites, "rounds": options.rounds, "rounds_lost": options.rounds - tally.finalized,
        "left_out": {f"site-{site}": dict(reasons) for site, reasons in tally.left_out.items()},
        "kills": soak.kills["agent"] + soak.kills["chain"], "kills_chain": soak.kills["chain"],
        "kills_all": soak.kills["all"],
        "recovery_s": {"median": round(statistics.median(recovery), 2), "max": round(max(recovery), 2)},
        "digest_equal": len(finals[0] | finals[1]) == 1, "checkpoint": view.checkpoint, **found,
    }


def format_table(row: dict[str, Any]) -> str:
    recovery = row["recovery_s"]
    cells = {
        "sites": row["sites"], "rounds": row["rounds"], "kills": row["kills"], "of the chain": row["kills_chain"],
        "of all at once": row["kills_all"], "rounds lost": row["rounds_lost"],
        "contributions left out": sum(n for reasons in row["left_out"].values() for n in reasons.values()),
        "recovery, s (median, max)": f"{recovery['median']:.2f}, {recovery['max']:.2f}",
        "final digest equal": "yes" if row["digest_equal"] else "NO",
        "seconds (undisturbed)": f"{row['total_s_disturbed']:.0f} ({row['total_s_undisturbed']:.0f})",
    }
    return ("| " + " | ".join(cells) + " |\n|" + "---:|" * len(cells) + "\n| "
            + " | ".join(str(value) for value in cells.values()) + " |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    row = measure(options)
    print(json.dumps(row) if options.json else format_table(row), end="\n" if options.json else "")
    if options.write:
        replace_table("soak", format_table(row))
    if row["rounds_lost"] or not row["digest_equal"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
