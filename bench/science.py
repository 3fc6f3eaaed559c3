"""The science tables of docs/benchmarks.md: `swarmchain benchmark` on every set with fixed splits.

    SWARMCHAIN_DATA=DIR python bench/science.py [--data NAME …] [--seeds 3] [--rounds 100] [--real] [--write] [--json]

`SWARMCHAIN_DATA` names the folder with the sets and `splits/`. `--real` plays the first seed again through agents on a
chain and demands the same checkpoint. `--write` puts the table into docs/benchmarks.md and the figures into
docs/images; with `--out` and then `--read` the measuring may be spread over several calls.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tables import PAGE, replace_table

from swarmchain.benchmark import Settings, run_benchmark
from swarmchain.planning import recommend_training
from swarmchain.scoreboard import format_row, write_figure
from swarmchain.spec import Normalization

GENES: dict[str, Any] = {"normalization": Normalization(), "sites_per_feature_min": 3, "panel_share_min": 0.3}
MARKERS: dict[str, Any] = {
    "normalization": Normalization(kind="arcsinh", cofactor=5.0), "state": "none", "sites_per_feature_min": 1,
    "panel_share_min": 0.5}
CYTOMETRY = ("cytof_multicenter/cytof_multicenter_small.h5ad", "cytof_multicenter_small.csv.gz")
SETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pbmc_multistudy": ("pbmc_multistudy", "pbmc_multistudy.csv.gz", GENES),
    "cytof": (*CYTOMETRY, MARKERS),
    **{f"cytof_skew{i}": (*CYTOMETRY, {**MARKERS, "site_column": f"site_skew{i}"}) for i in range(3)},
}


def make_settings(name: str, **changes: Any) -> Settings:
    root = os.environ.get("SWARMCHAIN_DATA")
    if root is None:
        sys.exit("SWARMCHAIN_DATA must name the folder that holds pbmc_multistudy, cytof_multicenter and splits")
    data, splits, settings = SETS[name]
    training = recommend_training(settings["normalization"])
    paths = {"data": Path(root) / data, "splits": Path(root) / "splits" / splits}
    return Settings(**{"training": training, **paths, **settings, **changes})


def check_real(settings: Settings, found: dict[str, Any], name: str) -> None:
    """The first seed through agents on a chain; ends the script unless it gives the same checkpoint."""
    import tempfile

    from swarmchain.benchmark import deal, play_swarm

    with tempfile.TemporaryDirectory() as folder:
        real = play_swarm(Path(folder) / "swarm", deal(Path(folder) / "data", settings),
                          replace(settings, is_real=True), seed=0)
    if real.checkpoint != found["checkpoints"][0]:
        sys.exit(f"{name}: agents on a chain give {real.checkpoint}, one process gives {found['checkpoints'][0]}")
    found["real_checkpoint"] = real.checkpoint


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    heads = ("data", "seeds", "central", "swarm", "linear", "local mean", "local worst", "swarm - central (95 %)",
             "least gain at home", "agents agree")
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, found in rows.items():
        agree = "yes" if "real_checkpoint" in found else "–"
        lines.append(f"| {name} | {found['settings']['seeds']} | {' | '.join(format_row(found))} | {agree} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder for every set's benchmark.json and figure")
    parser.add_argument("--read", type=Path, help="take what an earlier --out left there, and measure nothing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name in options.data:
        if options.read:
            if (options.read / f"{name}.json").exists():
                rows[name] = json.loads((options.read / f"{name}.json").read_text())
            continue
        settings = make_settings(name, seeds=options.seeds, rounds=options.rounds)
        found = rows[name] = run_benchmark(settings, say=lambda words: print(words, file=sys.stderr, flush=True))
        found["dataset"] = name
        if options.real:
            check_real(settings, found, name)
        if options.out:
            write_figure(options.out / f"{name}.png", found)
            (options.out / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True))
    if options.write:
        for name, found in rows.items():
            write_figure(PAGE.parent / "images" / f"benchmark-{name}.png", found)
        replace_table("science", format_table(rows))
    print(json.dumps(rows, indent=1) if options.json else format_table(rows))


if __name__ == "__main__":
    main()
