"""The science tables of docs/benchmarks.md: `swarmchain benchmark` on every set with fixed splits.

    SWARMCHAIN_DATA=DIR python bench/science.py [--data NAME …] [--seeds 3] [--rounds 50] [--real] [--write] [--json]

`SWARMCHAIN_DATA` names the folder with the sets and `splits/`. `--real` plays the first seed again by agents on a
chain and demands the same checkpoint. `--write` puts the tables into docs/benchmarks.md and the figures into
docs/images; with `--out` and then `--read` the measuring may be spread over several calls.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tables import PAGE, replace_table

from swarmchain.benchmark import Settings, deal, play_swarm, run_benchmark
from swarmchain.benchmark_donors import run_donor_benchmark
from swarmchain.dealing import Dealt
from swarmchain.dealing_donors import AML_FOLDS, KANG_FOLDS, deal_aml, deal_kang
from swarmchain.planning import recommend_training
from swarmchain.scoreboard import HOME, METRICS, format_row, write_figure
from swarmchain.spec import Minimums, Normalization, Pseudobulk, RowModel, Training

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


# one row for each subject: a site with a single case may use it; chosen on folds inside the training folds
AML: dict[str, Any] = {
    "label_column": "diagnosis", "donor_column": "subject", "state": "none",
    "normalization": Normalization(kind="none"), "minimums": Minimums(cells_per_label=1), "sites_per_feature_min": 2,
    "rounds": 40, "training": Training(steps=10, batch_size=32, weight_decay=1e-3, class_balance="inverse"),
    "donor": {"model": RowModel(hidden=(64,), dropout=0.3), "labels_min": 1}}
KANG: dict[str, Any] = {
    "label_column": "condition", "donor_column": "donor", "sample_column": "sample", "sites_per_feature_min": 2,
    "rounds": 10, "training": Training(steps=5, batch_size=4), "donor": {"model": Pseudobulk(), "bag_size": 32},
    "pools_folds": True}
DONORS: dict[str, tuple[int, dict[str, Any]]] = {"aml_skew": (AML_FOLDS, AML), "aml_even": (AML_FOLDS, AML),
                                                 "kang": (KANG_FOLDS, KANG)}
ALL = (*SETS, *DONORS)


def find_root() -> Path:
    root = os.environ.get("SWARMCHAIN_DATA")
    if root is None:
        sys.exit("SWARMCHAIN_DATA must name the folder that holds pbmc_multistudy, cytof_multicenter, … and splits")
    return Path(root)


def make_settings(name: str, **changes: Any) -> Settings:
    """A set's own settings; `rounds` of a set of donors are its own."""
    root = find_root()
    if name in DONORS:
        changes.pop("rounds", None)
        return Settings(**{"data": root / name, "splits": root, "task": "donor", **DONORS[name][1], **changes})
    data, splits, settings = SETS[name]
    training = recommend_training(settings["normalization"])
    return Settings(**{"training": training, "data": root / data, "splits": root / "splits" / splits, **settings,
                       **changes})


def deal_fold(name: str, folder: Path, fold: int) -> Dealt:
    root = find_root()
    return deal_kang(folder, root, fold) if name == "kang" else deal_aml(folder, root, fold, skew=name == "aml_skew")


def measure(name: str, settings: Settings) -> dict[str, Any]:
    def say(words: str) -> None:
        print(f"{name}, {words}", file=sys.stderr, flush=True)

    if name not in DONORS:
        return run_benchmark(settings, say=say)
    return run_donor_benchmark(settings, deal_fold=partial(deal_fold, name), folds=DONORS[name][0], say=say)


def check_real(settings: Settings, found: dict[str, Any], name: str) -> None:
    """The first seed (and fold) through agents on a chain; ends the script unless it gives the same checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        dealt = deal_fold(name, data, 0) if name in DONORS else deal(data, settings)
        real = play_swarm(Path(folder) / "swarm", dealt, replace(settings, is_real=True), seed=0)
    if real.checkpoint != found["checkpoints"][0]:
        sys.exit(f"{name}: agents on a chain give {real.checkpoint}, one process gives {found['checkpoints'][0]}")
    found["real_checkpoint"] = real.checkpoint


def format_tables(rows: dict[str, dict[str, Any]]) -> str:
    """Every arm on the held-out cells or samples, and every site at home."""
    heads = ("data", "score", "seeds", "central", "swarm", "linear", "local mean", "local worst",
             "swarm - central (95 %)", "agents agree")
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for name, found in rows.items():
        agree = "yes" if "real_checkpoint" in found else "–"
        metrics = ("auroc", "macro_f1") if "auroc" in found else ("macro_f1",)
        lines += [f"| {name} | {METRICS[metric]} | {found['settings']['seeds']} | "
                  f"{' | '.join(format_row(found, metric=metric))} | {agree} |" for metric in metrics]
    return "\n".join(lines) + "\n"


def format_home(rows: dict[str, dict[str, Any]]) -> str:
    heads = ("data", "site", "cells", "trained alone", "swarm", "gain", "swarm, own shares", "gain",
             "swarm, trained on", "gain", "mixture", "gain")
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for name, found in rows.items():
        for site, one in found["home"].items():
            cells = [f"{one['cells']:,}" if "cells" in one else "–", f"{one['local']:.3f}"]
            for key in ("swarm", *HOME):
                cells += [f"{one[key]:.3f}", f"{one[key] - one['local']:+.3f}"] if key in one else ["–", "–"]
            lines.append(f"| {name} | {site} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(ALL), choices=list(ALL))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=50)
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
        found = rows[name] = measure(name, settings)
        found["dataset"] = name
        if options.real:
            check_real(settings, found, name)
        if options.out:
            write_figure(options.out / f"{name}.png", found)
            (options.out / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True))
    if options.write:
        for name, found in rows.items():
            write_figure(PAGE.parent / "images" / f"benchmark-{name}.png", found)
        replace_table("science", format_tables(rows))
        replace_table("home", format_home(rows))
    print(json.dumps(rows, indent=1) if options.json else f"{format_tables(rows)}\n{format_home(rows)}")


if __name__ == "__main__":
    main()
