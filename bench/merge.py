"""Speed and memory of the merge, against one pass of `acc.add_(x, alpha=w)` over the same bytes in the same process.

    python bench/merge.py [--sites 4 16 64] [--mb 2 40 400] [--methods clipped_mean …] [--json] [--write]

One core. Both write to memory that is there already. A merge includes the norms of all contributions, as a site
computes them. Contributions lie in files that are mapped, as the spool keeps big ones; more than 3 GB of them are eight
files that several sites hand in, so that they stay in the page cache. `ratio_to_axpy` is the pass's median time over
the merge's; `peak_mb` is the most memory that the process took for parent, result and work (anonymous memory, sampled
every 2 ms), `models` the same in models. Methods that take all pairs of contributions, or sort, are measured up to
40 MB. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from tables import replace_table

from swarmchain.checkpoint import allocate_tensors
from swarmchain.layouts import Layout
from swarmchain.merge import Input, compute_norm, merge_deltas
from swarmchain.methods import METHODS
from swarmchain.spec import Limits, RehearsalSpec
from swarmchain.spool import Spool

FILES_BYTES_MAX = 3 << 30
MB_MAX_OF_ALL = 40
ALL_SIZES = ("clipped_mean", "mean")


class Peak:
    """The most anonymous memory that this process takes while the context lasts, beyond what it had."""

    def __enter__(self) -> Peak:
        self.before = self.highest = read_anonymous()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_over.wait(0.002):
            self.highest = max(self.highest, read_anonymous())

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def mb(self) -> float:
        return (self.highest - self.before) / 1e6


def read_anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def make_settings(method: str) -> Any:
    return RehearsalSpec.model_validate({"name": "m", "widths": (1, 1), "merge": {"method": method},
                                         "limits": Limits(rounds=1, sites_to_start=1).model_dump()}).merge


def measure(method: str, sites: int, mb: int, repeats: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    size = mb * 1_000_000 // 4
    layout: Layout = {"w": ("float32", (size,))}
    with tempfile.TemporaryDirectory(prefix="swarmchain-bench-") as folder:
        spool = Spool(Path(folder), memory_bytes=0)
        files = sites if sites * mb * 1_000_000 <= FILES_BYTES_MAX else 8
        generator = np.random.default_rng(0)
        arrays = []
        for k in range(files):
            array = np.frombuffer(spool.get_slot(k, size * 4), np.float32)
            for start in range(0, size, 1 << 20):
                array[start : start + (1 << 20)] = generator.standard_normal(min(1 << 20, size - start), np.float32)
            arrays.append(array)
        tensors = [{"w": arrays[i % files]} for i in range(sites)]
        settings = make_settings(method)

        acc = torch.zeros(size)

        def axpy() -> None:
            for i in range(sites):
                acc.add_(torch.from_numpy(arrays[i % files]), alpha=1 / sites)

        def merge() -> None:
            inputs = [Input(i, 100 + i, t, compute_norm(t)) for i, t in enumerate(tensors)]
            merge_deltas(parent, inputs, settings, into=into)

        warm_up(settings)
        with Peak() as peak:
            (_, parent), (_, into) = allocate_tensors(layout), allocate_tensors(layout)
            parent["w"][:] = 1.0
            merge()
        merge()
        axpy()
        merges, passes = [], []
        for _ in range(repeats):
            for function, times in ((axpy, passes), (merge, merges)):
                started = time.perf_counter()
                function()
                times.append(time.perf_counter() - started)
    took = statistics.median(merges)
    return {"method": method, "sites": sites, "mb": mb, "ratio_to_axpy": round(statistics.median(passes) / took, 3),
            "gb_per_s": round(sites * mb / 1e3 / took, 2), "peak_mb": round(peak.mb, 1),
            "models": round(peak.mb / mb, 2), "merge_s": round(took, 4)}


def warm_up(settings: Any) -> None:
    """Load the compiled code, which takes some 20 MB once, whatever the model."""
    layout: Layout = {"w": ("float32", (64,))}
    _, parent = allocate_tensors(layout)
    tensors = [{"w": np.arange(64, dtype=np.float32) + i} for i in range(6)]
    inputs = [Input(i, 1, t, compute_norm(t)) for i, t in enumerate(tensors)]
    merge_deltas(parent, inputs, settings, into=allocate_tensors(layout)[1])


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | sites | MB each | of `add_` | GB/s | peak memory, MB | in models | one merge, s |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| `{r['method']}` | {r['sites']} | {r['mb']} | {r['ratio_to_axpy']:.2f} | {r['gb_per_s']:.2f} | "
              f"{r['peak_mb']:.0f} | {r['models']:.2f} | {r['merge_s']:.3f} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--mb", type=int, nargs="+", default=[2, 40, 400])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.methods[0], options.sites[0], options.mb[0], options.repeats)))
        return
    rows = []
    for method in options.methods:
        for mb in options.mb:
            for sites in options.sites:
                if mb > MB_MAX_OF_ALL and method not in ALL_SIZES:
                    continue
                repeats = options.repeats if sites * mb <= 1_000 else 3
                # a process of its own for each, so that one row's memory is not another's
                done = subprocess.run([sys.executable, __file__, "--row", "--methods", method, "--sites", str(sites),
                                       "--mb", str(mb), "--repeats", str(repeats)], stdout=subprocess.PIPE, text=True,
                                      check=True)
                rows.append(json.loads(done.stdout))
                if not options.json:
                    print(format_table(rows[-1:]).splitlines()[-1], flush=True)
    if options.json:
        print(json.dumps(rows))
    if options.write:
        replace_table("merge", format_table(rows))


if __name__ == "__main__":
    main()
