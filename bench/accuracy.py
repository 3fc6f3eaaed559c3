"""What sharing the training is worth: the demonstration over several seeds, through real agents and a real chain.

    python bench/accuracy.py [--seeds 3] [--json]

`SWARMCHAIN_DATA` names the folder that holds `pbmc_multistudy/` and `splits/`; without it only the data inside scanpy
are used. The seed moves training and, for the embedded data, also how the cells are dealt and which are held out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARMS = ("central", "swarm", "local_mean", "local_worst", "linear")


def run_demo(seed: int, *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "swarmchain", "demo", "--json", "--seed", str(seed), "--out", out, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def measure(seeds: int, *options: str) -> dict[str, Any]:
    """Per arm the macro-F1 of every seed; whether all sites agreed; median seconds of a round's parts."""
    found = [run_demo(seed, *options) for seed in range(seeds)]
    parts = [times for s in found for row in s["timing_s"]["rounds"][1:] for times in row["sites"].values()]
    return {
        "arms": {arm: [s["metrics"][arm]["macro_f1"] for s in found] for arm in ARMS},
        "same_at_all_sites": all(s["final"]["same_at_all_sites"] for s in found),
        "rounds": len(found[0]["rounds"]), "sites": len(found[0]["sites"]),
        "total_s": statistics.median(s["timing_s"]["total"] for s in found),
        "round_s": {kind: statistics.median(p[kind] for p in parts) for kind in parts[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tasks: dict[str, tuple[str, ...]] = {"pbmc68k_reduced": ()}
    if folder := os.environ.get("SWARMCHAIN_DATA"):
        root = Path(folder)
        splits = root / "splits" / "pbmc_multistudy.csv.gz"
        tasks["pbmc_multistudy"] = ("--data", str(root / "pbmc_multistudy"), "--splits", str(splits))
    found = {name: measure(options.seeds, *words) for name, words in tasks.items()}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"macro-F1, mean (lowest to highest) of {options.seeds} seeds\n")
    print("| data | sites, rounds | " + " | ".join(ARMS) + " | equal bytes | seconds |")
    print("|---|---|" + "---|" * len(ARMS) + "---|---|")
    for name, row in found.items():
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in row["arms"].values()]
        print(f"| {name} | {row['sites']}, {row['rounds']} | {' | '.join(cells)} | "
              f"{'yes' if row['same_at_all_sites'] else 'NO'} | {row['total_s']:.0f} |")
    print("\nmedian seconds of a site's round, without the first\n")
    kinds = list(next(iter(found.values()))["round_s"])
    print("| data | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{row['round_s'][kind]:.3f}" for kind in kinds) + " |")


if __name__ == "__main__":
    main()
