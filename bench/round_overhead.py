"""What a round costs beside the training: real agents as processes, Anvil, a shared folder, no cells.

    python bench/round_overhead.py [--sites 4 10 32] [--rounds 13] [--idle SECONDS] [--json] [--write]

A rehearsal of a perceptron of 2000-256-10 (2 MB of parameters): contributions are random numbers, everything else is
as ever. `round_s_median` is the median time from one `openRound` to the next, over all rounds but the first; `total_s`
is from the start of this process to the last agent's end; `split_s` is where a site's time goes in a round (median over
sites and rounds; `wait` is for the others). `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from tables import replace_table

from swarmchain.consortium import Polling, start_consortium
from swarmchain.protocol import Terms
from swarmchain.spec import Limits, RehearsalSpec

WIDTHS = (2000, 256, 10)
TERMS = Terms(commit_window_s=600, vote_window_s=600, sites_min=2)


def measure(sites: int, rounds: int, *, started: float) -> dict[str, Any]:
    events: list[tuple[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="swarmchain-bench-") as folder:
        names = {f"site-{i}": None for i in range(sites)}
        polling = Polling(poll_s=0.05 if sites <= 10 else 0.2)
        with start_consortium(Path(folder), names, seed=0, polling=polling) as swarm:
            spec = RehearsalSpec(name="overhead", widths=WIDTHS, limits=Limits(rounds=rounds, sites_to_start=sites))
            run = swarm.propose(spec, terms=TERMS)
            swarm.start_agents([run])
            swarm.follow(lambda site, event: events.append((site, event)), timeout_s=900)
            held = {event["checkpoint"] for _, event in events if event["event"] == "ended"}
            view = swarm.contract.view_run(run)
    total = time.time() - started
    if held != {view.checkpoint} or view.finalized_round != rounds:
        sys.exit(f"the sites do not hold the same checkpoint, or a round was lost: {held}, {view}")
    opened = sorted(event["time"] for _, event in events if event["event"] == "opened")
    last = max(event["time"] for _, event in events if event["event"] == "voted")
    durations = [b - a for a, b in zip(opened, [*opened[1:], last], strict=True)][1:]
    votes = [event["timing_s"] for _, event in events if event["event"] == "voted" and event["round"] > 1]
    split = {kind: round(statistics.median(vote[kind] for vote in votes), 4) for kind in votes[0]}
    return {"sites": sites, "rounds": rounds, "round_s_median": round(statistics.median(durations), 3),
            "total_s": round(total, 2), "split_s": split}


def measure_idle(sites: int, seconds: float) -> float:
    """Share of one core that an agent takes while nothing happens, with the settings that `site init` writes."""
    with tempfile.TemporaryDirectory(prefix="swarmchain-bench-") as folder:
        names = {f"site-{i}": None for i in range(sites)}
        with start_consortium(Path(folder), names, seed=0, polling=Polling(poll_s=0.5)) as swarm:
            limits = Limits(rounds=1, sites_to_start=256)
            run = swarm.propose(RehearsalSpec(name="idle", widths=WIDTHS, limits=limits), terms=TERMS)
            swarm.start_agents([run])
            time.sleep(8.0)  # until they have looked, and found nothing to do
            agents = [psutil.Process(site.process.pid) for site in swarm.sites if site.process]
            before = [sum(agent.cpu_times()[:2]) for agent in agents]
            time.sleep(seconds)
            after = [sum(agent.cpu_times()[:2]) for agent in agents]
    return max(b - a for a, b in zip(before, after, strict=True)) / seconds


def format_table(rows: list[dict[str, Any]]) -> str:
    kinds = list(rows[0]["split_s"])
    lines = ["| sites | rounds | median round, s | whole command, s | " + " | ".join(kinds) + " |",
             "|---:|---:|---:|---:|" + "---:|" * len(kinds)]
    lines += [f"| {row['sites']} | {row['rounds']} | {row['round_s_median']:.2f} | {row['total_s']:.1f} | "
              + " | ".join(f"{row['split_s'][kind]:.3f}" for kind in kinds) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 10, 32])
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--idle", type=float, metavar="SECONDS", help="measure agents that wait, for so long, instead")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    if options.idle:
        share = measure_idle(options.sites[0], options.idle)
        print(json.dumps({"sites": options.sites[0], "idle_core_share_max": round(share, 5)}))
        return
    started = psutil.Process().create_time()
    rows = []
    for sites in options.sites:
        rows.append(measure(sites, options.rounds, started=started))
        started = time.time()
    if options.json:
        print(json.dumps(rows[0] if len(rows) == 1 else rows))
        return
    print(format_table(rows), end="")
    if options.write:
        replace_table("overhead", format_table(rows))


if __name__ == "__main__":
    main()
