"""What training together costs beside training in one place, and what a site needs of memory.

    SWARMCHAIN_DATA=DIR python bench/training.py [--rounds 20] [--repeats 3] [--memory] [--json]

On one core, in one process, round by round in turns: the swarm (`swarmchain.inprocess`: all sites' training, coding,
store, merge, rating and judging), and pooled training of the same network with the same total number of steps (sites ×
rounds × steps), by the same code. Medians of the repeats, and of the ratio of each pair, by the clock and by the
processor's time (which does not know who else uses the core). Reading and standardising the cells is in neither, nor is
a first pair that warms up. The store is a folder in memory where there is one (/dev/shm): what a disk takes to have
data safe is no computing.
`--memory`: a process of its own for each of the 16 samples of cytof_multicenter.h5ad (929,685 cells), whose cells it
picks out of the whole file, plays a statistics run and a training run (`--rounds`) from the first sum to the last
merge; the peak of its resident memory, beside that of a process that only imports the same libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import h5py
import numpy as np
import torch
from anndata.io import read_elem
from science import SETS, find_root, make_settings

from swarmchain.baselines import pool
from swarmchain.benchmark import Settings, name_cells
from swarmchain.certify import Arrays
from swarmchain.config import DataConfig
from swarmchain.data import read_cells
from swarmchain.dealing import deal_splits
from swarmchain.inprocess import InProcess, RoundPlayed
from swarmchain.planning import plan_cell_type, plan_statistics, read_statistics
from swarmchain.selection import SiteData, select_cells
from swarmchain.spec import CellTypeSpec, Limits
from swarmchain.store import read_checkpoint
from swarmchain.trainer import prepare_training, train_round

MEMORY = Path("/dev/shm")


def open_room(folder: Path, settings: Settings, cells: dict[str, DataConfig]) -> tuple[InProcess, int, CellTypeSpec]:
    """Sites in one process, ready to train."""
    room = InProcess(folder, cells)
    cards = room.list_cards()
    view = room.play(room.propose(plan_statistics(cards, name="statistics", sites_to_start=len(cards),
                                                  normalization=settings.normalization))).view
    spec, seed = plan_cell_type(
        read_statistics(room.store, view), view, name="training", model=settings.model, training=settings.training,
        limits=Limits(rounds=settings.rounds, sites_to_start=len(cards)), panel_share_min=settings.panel_share_min,
        sites_per_feature_min=min(settings.sites_per_feature_min, len(cards)))
    return room, room.propose(spec, seed_checkpoint=seed), spec


def deal(folder: Path, settings: Settings) -> dict[str, DataConfig]:
    dealt = deal_splits(folder, settings.data, splits=settings.splits, site_column=settings.site_column,
                        label_column=settings.label_column)
    return {name: name_cells(path, settings) for name, path in dealt.files.items()}


class Pooled:
    """Pooled training as `baselines.train_alone` does it, a round at a time, with the seconds that it took."""

    def __init__(self, data: SiteData, seed: Arrays, law: CellTypeSpec) -> None:
        self._law = law
        self._cells = prepare_training(data, law, seed, np.bincount(data.y[data.train], minlength=len(law.labels)))
        self._state = {name: value for name, value in seed.items() if not name.startswith("standardize.")}
        self.wall_s = self.cpu_s = self.between_s = 0.0
        self._left: float | None = None

    def train(self, played: RoundPlayed) -> None:
        """The round after one of the swarm's; the processor's time between two calls is that of a swarm's round."""
        started, cpu = time.perf_counter(), time.process_time()
        self.between_s += 0.0 if self._left is None else cpu - self._left
        found = train_round(self._state, self._cells, self._law, round_id=played.round_id, site=0)
        moved = {name: self._state[name] + delta for name, delta in found.deltas.items()}
        self._state = {**self._state, **moved, **found.local}
        self._left = time.process_time()
        self.wall_s += time.perf_counter() - started
        self.cpu_s += self._left - cpu


def measure_time(name: str, rounds: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both, and the median of their ratio."""
    pairs, parts = [], []
    settings = make_settings(name, rounds=rounds)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        files = deal(Path(folder) / "data", settings)
        for repeat in range(repeats + 1):
            room, run, spec = open_room(Path(folder) / str(repeat), settings, files)
            seed = read_checkpoint(room.store, spec.seed_checkpoint, spec)
            sites = [select_cells(read_cells(Path(c.data.path), c.data, spec.normalization), spec)
                     for c in room.configs if c.data is not None]
            law = spec.model_copy(update={"training": spec.training.model_copy(
                update={"steps": spec.training.steps * len(sites)})})
            central = Pooled(pool(sites, seed), seed, law)
            played = room.play(run, watch=central.train)
            swarm_cpu_s = central.between_s * rounds / (rounds - 1)
            swarm_s = sum(sum(r.train_s.values()) + r.merge_s + sum(r.judge_s.values()) for r in played.rounds)
            parts.append([sum(sum(r.train_s.values()) for r in played.rounds), sum(r.merge_s for r in played.rounds),
                          sum(sum(r.judge_s.values()) for r in played.rounds)])
            pairs.append((swarm_s, central.wall_s, swarm_cpu_s, central.cpu_s))
    del pairs[0], parts[0]
    middle = [statistics.median(column) for column in zip(*parts, strict=True)]
    return {"data": name, "sites": len(files), "rounds": rounds, "steps": settings.training.steps,
            "swarm_s": statistics.median(p[0] for p in pairs), "central_s": statistics.median(p[1] for p in pairs),
            "ratio": statistics.median(p[0] / p[1] for p in pairs),
            "cpu_ratio": statistics.median(p[2] / p[3] for p in pairs),
            "parts_s": dict(zip(("contribute", "merge", "judge"), middle, strict=True))}


def measure_memory(rounds: int) -> list[dict[str, Any]]:
    """Peak resident memory of every site's process, MB."""
    path = find_root() / "cytof_multicenter" / "cytof_multicenter.h5ad"
    with h5py.File(path) as file:
        samples = Counter(read_elem(file["obs/sample"]).tolist())
    base = _run_child("-", rounds)["peak_mb"]
    return [{"site": site, "cells": int(cells), "libraries_mb": base, **_run_child(str(site), rounds)}
            for site, cells in samples.items()]


def _run_child(site: str, rounds: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--child", site, "--rounds", str(rounds)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def be_child(site: str, rounds: int) -> None:
    """One site alone plays; print the peak of this process's memory in MB, and the seconds that it computed."""
    if site != "-":
        settings = make_settings("cytof", rounds=rounds, sites_per_feature_min=1)
        path = find_root() / "cytof_multicenter" / "cytof_multicenter.h5ad"
        cells = DataConfig(path=str(path), label_column=settings.label_column, state=settings.state,
                           where={"sample": site})
        with tempfile.TemporaryDirectory() as folder:
            room, run, _ = open_room(Path(folder) / "room", settings, {site: cells})
            room.play(run)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"peak_mb": round(usage.ru_maxrss / 1024, 1), "cpu_s": round(usage.ru_utime + usage.ru_stime, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        be_child(options.child, options.rounds)
        return
    rows = [] if options.memory else [measure_time(name, options.rounds, options.repeats) for name in options.data]
    memory = measure_memory(options.rounds) if options.memory else []
    if options.json:
        print(json.dumps({"time": rows, "memory": memory}, indent=1))
        return
    print("| data | sites | rounds × steps | swarm, s | pooled, same total steps, s | ratio | of CPU time |\n"
          "|---|---:|---:|---:|---:|---:|---:|" if rows else
          "| site | cells | peak memory, MB | libraries alone, MB | CPU seconds |\n|---|---:|---:|---:|---:|")
    for r in rows:
        print(f"| {r['data']} | {r['sites']} | {r['rounds']} × {r['steps']} | {r['swarm_s']:.1f} "
              f"| {r['central_s']:.1f} | {r['ratio']:.2f} | {r['cpu_ratio']:.2f} |")
    for row in memory:
        print(f"| {row['site']} | {row['cells']:,} | {row['peak_mb']:.0f} | {row['libraries_mb']:.0f} "
              f"| {row['cpu_s']:.0f} |")


if __name__ == "__main__":
    main()
